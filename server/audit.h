/*
 * audit.h - an append-only, hash-chained record of every picture, refusal and activation, in SQLite.
 *
 * Each record holds the hash of the one before: BLAKE2b-256(previous hash || the record's canonical JSON). Removing, changing or reordering a record
 * breaks the chain; `safelight audit verify` finds where. What it cannot find, and what to do about it, stands in docs/operating.md. Prompts are stored
 * as keyed hashes only, unless audit_prompts says otherwise. Also keeps the activation history.
 * A picture leaves only after its record is in the database: a record that cannot be written is E_POLICY for that picture (fail closed).
 *
 * Called by encode.c (pictures), http.c (refusals), safety_sets.c (activations), admin_actions.c and the command line. Threads: any. One thread of its own
 * writes; records that wait while it does share the next transaction, so that a full house costs one fsync and not one per picture.
 */
#ifndef SAFELIGHT_SERVER_AUDIT_H
#define SAFELIGHT_SERVER_AUDIT_H

#include <stdint.h>
#include <stdio.h>

#include "base/err.h"

struct audit;

enum audit_kind { AUDIT_IMAGE, AUDIT_REFUSAL, AUDIT_ACTIVATION, AUDIT_POLICY, AUDIT_START, AUDIT_ADAPTER, AUDIT_ADMIN };

struct audit_style {
  char name[64], digest[65];
  float weight;
  double c;                     /* cancellation coefficient, the smallest over the sites */
};

/* Empty strings and zeros are left out of the record. */
struct audit_record {
  enum audit_kind kind;
  const char *tenant, *profile, *request_id;
  const char *prompt, *negative;      /* hashed unless prompts are kept */
  uint64_t seed;
  const char *model_digest, *generation_id, *generation_digest;
  const struct audit_style *style;
  int n_styles;
  const char *verdict;                /* "served", "refused", "activated", "failed", "rolled_back", ... */
  const char *reason;                 /* of a refusal or failure; an attempt to get around the policy names the trick's field */
  const char *image_digest;           /* BLAKE2b-256 of the pixels' bytes */
};

/* The newest record: what a copy kept elsewhere proves the chain by. */
struct audit_head {
  int64_t seq;
  char hash[65];                      /* the genesis when seq is 0 */
};

/* dir: the state folder, made with mode 0700 when it is missing; one process at a time may hold it. E_FILE when the database cannot be opened, or its
 * last record does not fit its chain. On failure *a is NULL. */
MUST_CHECK int audit_open(struct audit **a, const char *dir, int keep_prompts, struct err *e);
void audit_close(struct audit *a); /* takes NULL; writes what is queued, logs the head */
/* Appends and waits until it is durable. E_POLICY when it could not be written: then nothing may leave. */
MUST_CHECK int audit_add(struct audit *a, const struct audit_record *r, struct err *e);
/* The same without waiting, for threads that may not (a refusal on the HTTP thread): the record is copied. E_POLICY when the queue is full. A record that
 * cannot be written later is logged and counted. */
MUST_CHECK int audit_note(struct audit *a, const struct audit_record *r, struct err *e);
/* Appends the activation record (profile, generation, members, its number) and waits: no audit_add beside it. members_json is kept as it is. The active
 * set and its history survive a restart: the newest activation number, and each profile's generation digest. */
MUST_CHECK int audit_activated(struct audit *a, const char *profile, const char *generation_digest, const char *members_json,
                               int64_t *number, struct err *e);
/* number 0: none yet. E_TOOBIG when the members do not fit cap bytes. */
MUST_CHECK int audit_last_activation(struct audit *a, const char *profile, int64_t *number, char digest[65], char *members_json,
                                     size_t cap, struct err *e);
/* The newest n records as a JSON array, newest first, for the operator's page. The caller frees *json. */
MUST_CHECK int audit_recent(struct audit *a, int n, char **json, struct err *e);
void audit_head(struct audit *a, struct audit_head *head);
uint64_t audit_lost(struct audit *a); /* noted records that could not be written since the start */

/* What a walk over the whole chain found. */
struct audit_walk {
  int64_t count, bad;                 /* records; the first that does not fit, 0 when all do */
  char why[160];                      /* "record BAD ..." */
  struct audit_head head;
  int is_head_checked;                /* audit.key could be read: a cut-off end would have been found */
  int has_anchor;                     /* the hash that was asked for is in the chain */
};
/* Walks the chain in dir, also while a server writes it. anchor: a hash that must be in it, or NULL. E_NOTFOUND without a log, E_FILE when it cannot be
 * read at all. */
MUST_CHECK int audit_verify(const char *dir, const char *anchor, struct audit_walk *w, struct err *e);

#endif
