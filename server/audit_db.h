/*
 * audit_db.h - the SQLite side of the audit log: the chain in the file.
 *
 *      meta        version, genesis (64 random digits that the first record chains to), head ("seq hash mac")
 *      record      seq 1, 2, ...; time and kind repeat what is in json; hash = BLAKE2b-256(hash of seq - 1 || json), both as the text they are
 *      activation  number, the seq of its record, profile, digest, members: the record says the same
 *
 * The head's mac is keyed with a key that lies beside the database: records cut off at the end are found as long as the key is not in the
 * hands of whoever cut them. Whoever has the key and the database can write another history; only a head kept elsewhere (the log has it) tells.
 *
 * Called by audit.c and audit_command.c. Threads: a struct audit_db belongs to one thread at a time; several may be open on one file, of which
 * one writes.
 */
#ifndef SAFELIGHT_SERVER_AUDIT_DB_H
#define SAFELIGHT_SERVER_AUDIT_DB_H

#include <stdint.h>

#include "base/buf.h"
#include "base/err.h"
#include "server/audit.h"

enum { AUDIT_KEY = 32, AUDIT_JSON_MAX = 1 << 19 };

struct audit_db;

/* Opens for writing, makes what is missing, and checks the last record. mac_key is copied. On failure *d is NULL. */
MUST_CHECK int audit_db_open(struct audit_db **d, const char *dir, const unsigned char mac_key[AUDIT_KEY], struct err *e);
/* Opens for reading alone; E_NOTFOUND when there is no log. */
MUST_CHECK int audit_db_open_read(struct audit_db **d, const char *dir, struct err *e);
void audit_db_close(struct audit_db *d); /* takes NULL */

void audit_db_head(const struct audit_db *d, struct audit_head *head);

/* One transaction: begin, any number of appends, commit. After a failure call audit_db_cancel, which forgets all of it and reads the head again. */
MUST_CHECK int audit_db_begin(struct audit_db *d, struct err *e);
/* body: the record's JSON after its kind, as audit_record_body makes it. */
MUST_CHECK int audit_db_append(struct audit_db *d, const char *kind, const char *body, struct err *e);
/* Appends an activation and its record: *number is the one it got. */
MUST_CHECK int audit_db_activate(struct audit_db *d, const char *profile, const char *digest, const char *members, const char *body, int64_t *number,
                                 struct err *e);
MUST_CHECK int audit_db_commit(struct audit_db *d, struct err *e);
void audit_db_cancel(struct audit_db *d);

MUST_CHECK int audit_db_last_activation(struct audit_db *d, const char *profile, int64_t *number, char digest[65], char *members, size_t cap,
                                        struct err *e);
/* Appends the newest n records to out as a JSON array, newest first, each with its hash. */
MUST_CHECK int audit_db_recent(struct audit_db *d, int n, struct buf *out, struct err *e);
/* See audit_verify. mac_key NULL: the head is not checked. */
MUST_CHECK int audit_db_walk(struct audit_db *d, const unsigned char *mac_key, const char *anchor, struct audit_walk *w, struct err *e);

/* audit_record.c: `,"tenant":"x",...}`, the record's JSON after its kind. prompt_key NULL: prompts are kept as they are. */
MUST_CHECK int audit_record_body(struct buf *out, const struct audit_record *r, const unsigned char *prompt_key, struct err *e);
/* A JSON string with its quotes; what is not UTF-8 becomes U+FFFD. */
MUST_CHECK int audit_record_quote(struct buf *out, const char *s, struct err *e);
const char *audit_kind_name(enum audit_kind kind);

#endif
