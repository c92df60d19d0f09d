/*
 * store_db.h - the SQLite side of the job store.
 *
 *      job   seq 1, 2, ...; what struct store_job holds; hash is BLAKE2b-256 of type and body, and stays when the body is dropped
 *      file  name; job (its seq) and n, or no job for a file of its own; format, bytes, digest, created
 *
 * A function's own error is one of the database (E_FULL, E_FILE): the transaction is to be rolled back. What is wrong with one operation alone
 * (E_NOTFOUND, E_CONFLICT) goes to `no`, and leaves the others of its transaction alone.
 *
 * Called by store.c. Threads: the store's own; store_open's before it runs.
 */
#ifndef SAFELIGHT_SERVER_STORE_DB_H
#define SAFELIGHT_SERVER_STORE_DB_H

#include "server/store.h"

struct store_db;

/* What store_db_open found. */
struct store_found {
  int64_t put_back, crashed, last_seq;
};

/* Opens or makes the file; brings RUNNING jobs back to QUEUED, or to FAILED after STORE_ATTEMPTS. On failure *d is NULL. */
MUST_CHECK int store_db_open(struct store_db **d, const char *dir, int64_t now, struct store_found *found, struct err *e);
void store_db_close(struct store_db *d); /* takes NULL */

MUST_CHECK int store_db_begin(struct store_db *d, struct err *e);
MUST_CHECK int store_db_commit(struct store_db *d, struct err *e);
void store_db_cancel(struct store_db *d);
/* As of the transaction in progress. */
uint64_t store_db_bytes(const struct store_db *d);
int64_t store_db_count(const struct store_db *d, enum store_state state);

/* Inserts the job, or finds the one that has its key. out: that job; the caller closes it when 0 is returned and no is empty. */
MUST_CHECK int store_db_add(struct store_db *d, const struct store_job *j, struct store_job *out, int64_t now, int *is_existing, struct err *no, struct err *e);
MUST_CHECK int store_db_start(struct store_db *d, const char *id, int64_t now, struct err *no, struct err *e);
MUST_CHECK int store_db_put_back(struct store_db *d, const char *id, struct err *no, struct err *e);
/* Records the end and the files by their names. */
MUST_CHECK int store_db_finish(struct store_db *d, const struct store_job *j, int64_t now, int *is_existing, struct err *no, struct err *e);
/* By tenant and id, or tenant, key and body. */
MUST_CHECK int store_db_find(struct store_db *d, const struct store_job *j, struct store_job *out, struct err *no, struct err *e);
/* The first unfinished job with after < seq <= last, and its body. */
MUST_CHECK int store_db_next(struct store_db *d, int64_t after, int64_t last, struct store_job *out, struct err *no, struct err *e);

/* The tenant's jobs behind the one with this id ("": all), newest first. wanted: bits of states, 0: any. The caller closes the n that were read, also
 * after failure. */
MUST_CHECK int store_db_list(struct store_db *d, const char *tenant, const char *id, int wanted, struct store_job *out, int cap, int *n, struct err *no,
                             struct err *e);

MUST_CHECK int store_db_put_file(struct store_db *d, const struct store_file *f, int64_t now, struct err *e);
/* A file's expires_ms, here and in a job, is the time it was made. */
MUST_CHECK int store_db_find_file(struct store_db *d, const char *name, struct store_file *f, struct err *no, struct err *e);
/* Up to cap names of files made at `before` or earlier, the oldest first. */
MUST_CHECK int store_db_old_files(struct store_db *d, int64_t before, char (*name)[STORE_NAME], int cap, int *n, struct err *e);
MUST_CHECK int store_db_drop_file(struct store_db *d, const char *name, struct err *e);
/* Up to cap jobs that finished at `before` or earlier and have no file left; *n: how many. */
MUST_CHECK int store_db_drop_jobs(struct store_db *d, int64_t before, int cap, int *n, struct err *e);

#endif
