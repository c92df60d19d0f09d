/*
 * safety_store.h - what an operator loaded beside the policy's files, kept in the state folder so that what is live survives a restart.
 *
 *      STATE/adapters/DIGEST.safetensors (or a folder DIGEST with its configuration) and DIGEST.manifest.json: the bytes as they were loaded
 *      STATE/adapters/NAME.live: two lines, the digest that is live under this name and the hash of what the policy's path held at that time
 *
 * The policy has the last word: when the file at its path has changed since, or it pins another digest, what was kept is not used. What is read back is
 * verified as if it came from outside. Called by safety_rebuild.c and safety_commands.c. Threads: the loader's.
 */
#ifndef SAFELIGHT_SERVER_SAFETY_STORE_H
#define SAFELIGHT_SERVER_SAFETY_STORE_H

#include "server/safety_verify.h"

/* Writes the bytes of an adapter with this digest, durably. */
MUST_CHECK int safety_store_bytes(const char *state, const char *digest, const struct adapter_bytes *b, struct err *e);
/* Remembers that the adapter called name is live with this digest, over a policy's file with the hash `seen`; digest NULL: that it is the policy's file. */
MUST_CHECK int safety_store_live(const char *state, const char *name, const char *digest, const char *seen, struct err *e);
/* The digest that was live under name while the policy's path held `seen`; "" when there was none. */
void safety_store_find(const char *state, const char *name, const char *seen, char digest[65]);
/* Reads back what safety_store_bytes wrote; as verifier_read. */
MUST_CHECK int safety_store_read(const char *state, const char *digest, const struct verifier *v, struct adapter_bytes *b, struct err *e);

#endif
