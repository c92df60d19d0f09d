/*
 * store.h - durable asynchronous jobs and the files of finished pictures: what was accepted is finished or reported after kill -9 and power cuts, once.
 *
 *      STATE/jobs.db        a row for every job and every file; see store_db.h
 *      STATE/results/NAME   the files; a name is 128 random bits, so whoever has it may read it until it expires
 *
 * A job's way. What the arrows are called is the verb of a struct store_op:
 *
 *      ADD -> QUEUED --START--> RUNNING --FINISH--> SUCCEEDED | FAILED | CANCELLED --history_ms--> gone
 *               ^  \______________|________FINISH______^
 *               +----PUT_BACK-----+   and by store_open, after a crash: attempts counts the STARTs, after STORE_ATTEMPTS of them it is FAILED "crashed"
 *
 * Invariants:
 *   1. ADD is answered after the job's row is durable (fsync). The same tenant's same key gets the job that is there, with another body E_CONFLICT.
 *   2. A job is finished once: one transaction records its state and its files; a FINISH that comes second changes nothing and says is_existing.
 *   3. A file is whole and durable before a row names it. A file that no row names is never served; store_open removes it.
 *   4. A full disk refuses ADD and PUT_FILE with E_FULL. A FINISH is not answered then: it is tried again until it is recorded or the store closes, when
 *      it gets the error; the job is unfinished in the file and is drawn again after the next start. The engine being deterministic, a redo gives the
 *      same bytes.
 *      One whose files pass results_bytes alone is E_TOOBIG at once: finish it as FAILED.
 *   5. Files are removed results_ms after they were made, and the oldest earlier when all take more than results_bytes; jobs history_ms after they
 *      finished, never before. The body of a finished job is dropped: prompts are private.
 *
 * Files beside the database and not blobs in it: SQLite would write each picture twice (log and table), keep the room of those that expired, and have
 * it all read into memory, where an open file goes from the page cache to the socket.
 *
 * Called by http.c, job.c, encode.c, serve.c. Threads: any may submit; it waits for no disk. One thread, the store's own, does everything in the order
 * of submission; operations that wait while it works share the next transaction. It calls `done` without a lock; done may submit and may not block.
 */
#ifndef SAFELIGHT_SERVER_STORE_H
#define SAFELIGHT_SERVER_STORE_H

#include <stddef.h>
#include <stdint.h>

#include "base/err.h"
#include "proto/request.h"

enum { STORE_ID = 64, STORE_KEY = 383, STORE_WORD = 64, STORE_TYPE = 160, STORE_NAME = 40, STORE_ATTEMPTS = 3, STORE_HASH = 32 };

enum store_state { STORE_QUEUED, STORE_RUNNING, STORE_SUCCEEDED, STORE_FAILED, STORE_CANCELLED };

/* A finished picture's file. */
struct store_file {
  char name[STORE_NAME];       /* "0f3c...9a.png"; "" in a job: it is gone */
  enum image_format format;
  const void *data;            /* in: the caller's, unchanged until done; out: NULL */
  size_t bytes;
  char digest[65];             /* BLAKE2b-256 of the bytes */
  int64_t expires_ms;          /* since 1970; it may go earlier, see results_bytes */
};

struct store_job {
  int64_t seq;                 /* order of arrival; never used twice */
  char id[STORE_ID + 1], tenant[STORE_WORD], profile[STORE_WORD];
  char key[STORE_KEY + 1];     /* Idempotency-Key; "": none */
  char type[STORE_TYPE];       /* what the body is: the caller's, such as a route and a content type */
  const char *note;            /* the caller's own words about the request, kept as long as the job; in: NULL is ""; out: never NULL */
  const char *body;            /* as received; in: the caller's, unchanged until done; out: from STORE_NEXT alone */
  size_t body_len;
  uint64_t seed;
  int priority;
  enum store_state state;
  int attempts;
  int64_t created_ms, started_ms, finished_ms; /* since 1970; 0: not yet */
  char error_code[32], error_text[448];        /* of FAILED */
  char generation_id[32], generation_digest[65];
  const char *answer;          /* the caller's own words about the result; in: NULL is ""; out: never NULL */
  struct store_file file[REQUEST_N_MAX];
  int n_files;                 /* of SUCCEEDED, those that are gone included */
  void *owned;                 /* out: what note, answer and body lie in */
};

enum store_verb {
  STORE_ADD,       /* in: id, tenant, profile, key, type, body, seed, priority. Out: found; is_existing when the key was known */
  STORE_START,     /* in: id. E_NOTFOUND when it is not there or is finished */
  STORE_PUT_BACK,  /* in: id. A job that was started and is to be drawn later: the attempt does not count */
  STORE_FINISH,    /* in: id, state, error, generation, answer, files with data. Out: the files' names; is_existing. E_NOTFOUND, E_TOOBIG */
  STORE_FIND,      /* in: tenant and id, or tenant, key, type and body. Out: found. E_NOTFOUND; E_CONFLICT as for ADD */
  STORE_NEXT,      /* in: seq. Out: found, the next job after it that was unfinished at store_open and still is, with its body. E_NOTFOUND */
  STORE_LIST,      /* in: tenant, id ("": from the newest on; else from behind this job on), cap, list with room for cap, wanted. Out: list, listed */
  STORE_PUT_FILE,  /* in: job.file[0] with format and data. Out: its name. E_FULL, E_TOOBIG */
  STORE_OPEN_FILE  /* in: job.file[0].name, anything. Out: the file and fd, the caller's to close. E_NOTFOUND also when it has expired */
};

/* One thing to do: lies with the caller (in its job, its connection) and is the store's from store_submit to done. */
struct store_op {
  enum store_verb verb;
  struct store_job job;              /* in */
  struct store_job found;            /* out of ADD, FIND and NEXT: store_job_close */
  struct store_job *list;            /* of LIST: the caller's, who closes each */
  int cap, listed;
  int wanted;                        /* of LIST: 1 << state for each state that is; 0: any */
  int is_impatient;                  /* of FINISH: answered also when it cannot be recorded now */
  int is_existing, fd;
  struct err err;
  void (*done)(struct store_op *op); /* on the store's thread */
  void *arg;                         /* the caller's */
  struct store_op *next;             /* the store's */
  int is_written;                    /* the store's: the files are on the disk */
};

struct store_limits {
  int64_t results_ms, history_ms;
  uint64_t results_bytes;
  int64_t (*now_ms)(void);     /* NULL: the wall clock */
};

/* What a status page and the metrics show. */
struct store_status {
  int64_t unfinished;          /* jobs */
  int64_t jobs[STORE_CANCELLED + 1]; /* that it knows, by state */
  uint64_t bytes;              /* of recorded files */
  int held;                    /* FINISHes that are tried again */
  int is_failing;              /* the last write failed */
  uint64_t added, finished, expired_files; /* since store_open */
};

struct store;

/* dir: the state folder; audit_open made it and holds its lock. Brings unfinished jobs back to QUEUED, removes files that no row names. E_FILE when the
 * database is damaged or another program's, E_FULL when there is no room to bring jobs back. On failure *s is NULL. */
MUST_CHECK int store_open(struct store **s, const char *dir, const struct store_limits *limits, struct err *e);
/* Takes NULL. Does what was submitted first, calling done for all of it; nobody submits any more. */
void store_close(struct store *s);

/* Queues op and returns at once. op->done is called once, with op->err. */
void store_submit(struct store *s, struct store_op *op);
/* The same and waits; for threads that may. done and arg are overwritten. */
MUST_CHECK int store_run(struct store *s, struct store_op *op, struct err *e);
/* Frees what the store gave; takes a zeroed one. The fields that it filled stay. */
void store_job_close(struct store_job *j);

/* PUT_FILE and OPEN_FILE, waiting. On success the file has its name; fd is the caller's. */
MUST_CHECK int store_put_file(struct store *s, struct store_file *f, struct err *e);
MUST_CHECK int store_open_file(struct store *s, const char *name, struct store_file *f, int *fd, struct err *e);
/* Whether it can be the name of a file at all: what comes from a path may be anything. */
int store_is_name(const char *name);

/* Any thread: from now on a FINISH that cannot be recorded gets its error, as it would when the store closes: whoever stops does not wait for room. */
void store_hold_no_more(struct store *s);

void store_get_status(struct store *s, struct store_status *out);
const char *store_state_name(enum store_state state); /* "queued" ... */

#endif
