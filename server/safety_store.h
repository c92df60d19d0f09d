/*
 * safety_store.h - what an operator loaded beside the policy's files, kept in the state folder so that what is live survives a restart.
 *
 *      STATE/adapters/DIGEST.safetensors (or a folder DIGEST with its configuration) and DIGEST.manifest.json: the bytes as they were loaded
 *      STATE/adapters/NAME.live: two lines, the digest that is live under this name and the hash of what the policy's path held at that time
 *
 * What is needed no longer goes (safety_store_sweep): bytes stay while the running server has them as loaded, live, retiring or kept for a rollback,
 * while a NAME.live of an adapter of the policy names them (the next start needs them), and while the policy pins their digest. The history in the audit
 * log names digests alone and needs no bytes: only what was live before can be rolled back to, and not across a restart.
 *
 * The policy has the last word: when the file at its path has changed since, or it pins another digest, what was kept is not used. What is read back is
 * verified as if it came from outside. Called by safety_loader.c, safety_rebuild.c and safety_commands.c. Threads: the loader's.
 */
#ifndef SAFELIGHT_SERVER_SAFETY_STORE_H
#define SAFELIGHT_SERVER_SAFETY_STORE_H

#include "server/safety_verify.h"

/* Writes the bytes of an adapter with this digest, durably. */
MUST_CHECK int safety_store_bytes(const char *state, const char *digest, const struct adapter_files *b, struct err *e);
/* Remembers that the adapter called name is live with this digest, over a policy's file with the hash `seen`; digest NULL: that it is the policy's file. */
MUST_CHECK int safety_store_live(const char *state, const char *name, const char *digest, const char *seen, struct err *e);
/* The digest that was live under name while the policy's path held `seen`; "" when there was none. */
void safety_store_find(const char *state, const char *name, const char *seen, char digest[65]);
/* The digest in NAME.live, whatever it was live over; "" when there is none. -1 when there is a file that cannot be read now. */
MUST_CHECK int safety_store_named(const char *state, const char *name, char digest[65]);
/* Removes the bytes of every digest, and the NAME.live of every name, for which is_needed(arg, digest or NULL, name or NULL) is 0; and what a crash left
 * half written. How many adapters went. What cannot be removed stays for the next time. */
int safety_store_sweep(const char *state, int (*is_needed)(void *arg, const char *digest, const char *name), void *arg);
/* Reads back what safety_store_bytes wrote; as verifier_read. */
MUST_CHECK int safety_store_read(const char *state, const char *digest, const struct verifier *v, struct adapter_files *b, struct err *e);

#endif
