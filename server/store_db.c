/*
 * store_db.c - see store_db.h. Called by store.c. Threads: the store's.
 */
#include "server/store_db.h"

#include <sodium.h>
#include <sqlite3.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "server/db.h"

enum { SCHEMA_VERSION = 2, APPLICATION_ID = 0x534c4a42 /* "SLJB" */ };

static const char schema[] =
    "CREATE TABLE IF NOT EXISTS job (seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, tenant TEXT NOT NULL, profile TEXT NOT NULL,"
    " key TEXT, hash BLOB NOT NULL, type TEXT NOT NULL, body BLOB NOT NULL, seed INTEGER NOT NULL, priority INTEGER NOT NULL, state INTEGER NOT NULL,"
    " attempts INTEGER NOT NULL, created INTEGER NOT NULL, started INTEGER NOT NULL, finished INTEGER NOT NULL, error_code TEXT NOT NULL,"
    " error_text TEXT NOT NULL, generation_id TEXT NOT NULL, generation_digest TEXT NOT NULL, answer TEXT NOT NULL, n_files INTEGER NOT NULL,"
    " note TEXT NOT NULL);"
    "CREATE UNIQUE INDEX IF NOT EXISTS job_key ON job (tenant, key) WHERE key IS NOT NULL;"
    "CREATE INDEX IF NOT EXISTS job_tenant ON job (tenant, seq);"
    "CREATE INDEX IF NOT EXISTS job_unfinished ON job (seq) WHERE state < 2;"
    "CREATE INDEX IF NOT EXISTS job_finished ON job (finished) WHERE state >= 2;"
    "CREATE TABLE IF NOT EXISTS file (name TEXT PRIMARY KEY, job INTEGER REFERENCES job, n INTEGER NOT NULL, format INTEGER NOT NULL,"
    " bytes INTEGER NOT NULL, digest TEXT NOT NULL, created INTEGER NOT NULL);"
    "CREATE INDEX IF NOT EXISTS file_job ON file (job, n);"
    "CREATE INDEX IF NOT EXISTS file_created ON file (created);"
    "PRAGMA application_id = 1397508674; PRAGMA user_version = 2";

/* What read_row reads, in its order. */
#define JOB "SELECT seq, id, tenant, profile, key, type, seed, priority, state, attempts, created, started, finished, error_code, error_text," \
            " generation_id, generation_digest, n_files, hash, answer, note, body FROM job "
#define ENDED "body = x'', finished = ?2, state = ?3, error_code = ?4, error_text = ?5 "

#define NO_FILES "NOT EXISTS (SELECT 1 FROM file WHERE file.job = job.seq)"

enum statement { ADD, BY_KEY, BY_ID, NEXT, LIST, START, PUT_BACK, STATE, FINISH, FILES, ADD_FILE, FIND_FILE, OLD_FILES, DROP_FILE, DROP_JOBS, STATEMENTS };

static const char *const text[STATEMENTS] = {
    [ADD] = "INSERT INTO job VALUES (NULL, ?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, 0, 0, ?10, 0, 0, '', '', '', '', '', 0, ?11)",
    [BY_KEY] = JOB "WHERE tenant = ? AND key = ?",
    [BY_ID] = JOB "WHERE id = ?",
    [NEXT] = JOB "WHERE state < 2 AND seq > ? AND seq <= ? ORDER BY seq LIMIT 1",
    [LIST] = JOB "WHERE tenant = ?1 AND seq < ?2 AND (?3 = 0 OR ?3 & (1 << state)) ORDER BY seq DESC LIMIT ?4",
    [START] = "UPDATE job SET state = 1, attempts = attempts + 1, started = ?2 WHERE id = ?1 AND state = 0",
    [PUT_BACK] = "UPDATE job SET state = 0, attempts = attempts - 1, started = 0 WHERE id = ?1 AND state = 1",
    [STATE] = "SELECT seq, state FROM job WHERE id = ?",
    [FINISH] = "UPDATE job SET " ENDED ", generation_id = ?6, generation_digest = ?7, answer = ?8, n_files = ?9 WHERE seq = ?1",
    [FILES] = "SELECT n, name, format, bytes, digest, created FROM file WHERE job = ? ORDER BY n",
    [ADD_FILE] = "INSERT INTO file VALUES (?, ?, ?, ?, ?, ?, ?)",
    [FIND_FILE] = "SELECT n, name, format, bytes, digest, created FROM file WHERE name = ?",
    [OLD_FILES] = "SELECT name FROM file WHERE created <= ? ORDER BY created, name LIMIT ?",
    [DROP_FILE] = "DELETE FROM file WHERE name = ? RETURNING bytes",
    [DROP_JOBS] = "DELETE FROM job WHERE seq IN (SELECT seq FROM job WHERE state >= 2 AND finished <= ? AND " NO_FILES " LIMIT ?) RETURNING state",
};

/* What changes with a transaction beside the file. */
struct counts {
  int64_t bytes, jobs[STORE_CANCELLED + 1];
};

struct store_db {
  struct db db;
  sqlite3_stmt *statement[STATEMENTS];
  struct counts now, begun;
  int is_begun;
};

/* ---- binding and reading ---- */

static void bind_text(sqlite3_stmt *s, int i, const char *value)
{
  sqlite3_bind_text(s, i, value, -1, SQLITE_STATIC);
}

static void reset(sqlite3_stmt *s)
{
  sqlite3_reset(s);
  sqlite3_clear_bindings(s);
}

static void copy(char *out, size_t cap, sqlite3_stmt *s, int column)
{
  snprintf(out, cap, "%s", db_text(s, column));
}

static void hash_body(unsigned char hash[STORE_HASH], const struct store_job *j)
{
  crypto_generichash_state state;

  crypto_generichash_init(&state, NULL, 0, STORE_HASH);
  crypto_generichash_update(&state, (const unsigned char *)j->type, strlen(j->type) + 1);
  crypto_generichash_update(&state, (const unsigned char *)j->body, j->body_len);
  crypto_generichash_final(&state, hash, STORE_HASH);
}

/* Answer, note and body lie in one block of the job's own. */
static int read_texts(struct store_db *d, sqlite3_stmt *s, struct store_job *j, int with_body, struct err *e)
{
  const char *answer = db_text(s, 19), *note = db_text(s, 20);
  const void *body = with_body ? sqlite3_column_blob(s, 21) : NULL;
  size_t n = with_body ? (size_t)sqlite3_column_bytes(s, 21) : 0, len = strlen(answer) + 1, noted = strlen(note) + 1;
  char *block;

  if (n && !body)
    return db_fail(&d->db, "cannot read", e);
  block = malloc(len + noted + n + 1);
  if (!block)
    return err_set(e, E_NOMEM, "out of memory for a job's body");
  memcpy(block, answer, len);
  memcpy(block + len, note, noted);
  if (n)
    memcpy(block + len + noted, body, n);
  block[len + noted + n] = 0;
  j->owned = block;
  j->answer = block;
  j->note = block + len;
  j->body = with_body ? block + len + noted : NULL;
  j->body_len = n;
  return 0;
}

static int read_file(struct store_db *d, sqlite3_stmt *s, struct store_file *f, struct err *e)
{
  int format = sqlite3_column_int(s, 2);

  if (format < IMAGE_PNG || format > IMAGE_WEBP)
    return err_field(e, E_FILE, "jobs.db", "%s: file %.40s is damaged", d->db.path, db_text(s, 1));
  *f = (struct store_file){.format = (enum image_format)format, .bytes = (size_t)sqlite3_column_int64(s, 3), .expires_ms = sqlite3_column_int64(s, 5)};
  copy(f->name, sizeof f->name, s, 1);
  copy(f->digest, sizeof f->digest, s, 4);
  return 0;
}

static int read_files(struct store_db *d, struct store_job *j, struct err *e)
{
  sqlite3_stmt *s = d->statement[FILES];
  int code, r = 0;

  sqlite3_bind_int64(s, 1, j->seq);
  while (!r && (code = sqlite3_step(s)) == SQLITE_ROW) {
    int n = sqlite3_column_int(s, 0);
    if (n >= 0 && n < j->n_files)
      r = read_file(d, s, &j->file[n], e);
  }
  if (!r && code != SQLITE_DONE)
    r = db_fail(&d->db, "cannot read", e);
  reset(s);
  return r;
}

/* The row that s stands on, without its files. */
static int read_row(struct store_db *d, sqlite3_stmt *s, struct store_job *j, int with_body, struct err *e)
{
  *j = (struct store_job){.seq = sqlite3_column_int64(s, 0), .seed = (uint64_t)sqlite3_column_int64(s, 6), .priority = sqlite3_column_int(s, 7),
                          .state = (enum store_state)sqlite3_column_int(s, 8), .attempts = sqlite3_column_int(s, 9),
                          .created_ms = sqlite3_column_int64(s, 10), .started_ms = sqlite3_column_int64(s, 11),
                          .finished_ms = sqlite3_column_int64(s, 12), .n_files = sqlite3_column_int(s, 17)};
  if (j->n_files < 0 || j->n_files > REQUEST_N_MAX || j->state > STORE_CANCELLED)
    return err_field(e, E_FILE, "jobs.db", "%s: job %lld is damaged", d->db.path, (long long)j->seq);
  copy(j->id, sizeof j->id, s, 1);
  copy(j->tenant, sizeof j->tenant, s, 2);
  copy(j->profile, sizeof j->profile, s, 3);
  copy(j->key, sizeof j->key, s, 4);
  copy(j->type, sizeof j->type, s, 5);
  copy(j->error_code, sizeof j->error_code, s, 13);
  copy(j->error_text, sizeof j->error_text, s, 14);
  copy(j->generation_id, sizeof j->generation_id, s, 15);
  copy(j->generation_digest, sizeof j->generation_digest, s, 16);
  return read_texts(d, s, j, with_body, e);
}

/* Runs a bound query for one job; *out is untouched when there is none. */
static int read_job(struct store_db *d, sqlite3_stmt *s, struct store_job *out, int with_body, int *found, unsigned char hash[STORE_HASH], struct err *e)
{
  struct store_job row = {0};
  int code = sqlite3_step(s), r = 0;

  *found = code == SQLITE_ROW;
  if (code == SQLITE_ROW) {
    r = read_row(d, s, &row, with_body, e);
    memset(hash, 0, STORE_HASH);
    if (sqlite3_column_bytes(s, 18) == STORE_HASH)
      memcpy(hash, sqlite3_column_blob(s, 18), STORE_HASH);
  } else if (code != SQLITE_DONE) {
    r = db_fail(&d->db, "cannot read", e);
  }
  reset(s);
  if (!r && *found)
    r = read_files(d, &row, e);
  if (r || !*found) {
    store_job_close(&row);
    return r;
  }
  *out = row;
  return 0;
}

/* The job of this tenant and key; E_CONFLICT in no when it had another body. */
static int read_by_key(struct store_db *d, const struct store_job *in, struct store_job *out, int *found, struct err *no, struct err *e)
{
  unsigned char want[STORE_HASH], hash[STORE_HASH];
  sqlite3_stmt *s = d->statement[BY_KEY];

  hash_body(want, in);
  bind_text(s, 1, in->tenant);
  bind_text(s, 2, in->key);
  if (read_job(d, s, out, 0, found, hash, e) || !*found || !memcmp(want, hash, STORE_HASH))
    return e->code;
  err_field(no, E_CONFLICT, "Idempotency-Key", "this Idempotency-Key came with another body before, for job %s: use a new key", out->id);
  store_job_close(out);
  return 0;
}

/* ---- jobs ---- */

static int is_constraint(struct store_db *d)
{
  return (sqlite3_errcode(d->db.sql) & 0xff) == SQLITE_CONSTRAINT;
}

static int insert_job(struct store_db *d, const struct store_job *j, struct store_job *out, int64_t now, struct err *no, struct err *e)
{
  sqlite3_stmt *s = d->statement[ADD];
  unsigned char hash[STORE_HASH];
  struct err why = {0};

  hash_body(hash, j);
  bind_text(s, 1, j->id);
  bind_text(s, 2, j->tenant);
  bind_text(s, 3, j->profile);
  bind_text(s, 4, j->key[0] ? j->key : NULL);
  sqlite3_bind_blob(s, 5, hash, sizeof hash, SQLITE_STATIC);
  bind_text(s, 6, j->type);
  sqlite3_bind_blob64(s, 7, j->body_len ? j->body : "", j->body_len, SQLITE_STATIC);
  sqlite3_bind_int64(s, 8, (int64_t)j->seed);
  sqlite3_bind_int(s, 9, j->priority);
  sqlite3_bind_int64(s, 10, now);
  bind_text(s, 11, j->note ? j->note : "");
  if (db_run(&d->db, s, &why)) {
    if (is_constraint(d))
      return err_field(no, E_INTERNAL, "id", "there is a job %s already", j->id), 0;
    *e = why;
    return e->code;
  }
  *out = (struct store_job){.seq = sqlite3_last_insert_rowid(d->db.sql), .seed = j->seed, .priority = j->priority, .created_ms = now, .answer = "",
                            .note = ""};
  memcpy(out->id, j->id, sizeof out->id);
  memcpy(out->tenant, j->tenant, sizeof out->tenant);
  memcpy(out->profile, j->profile, sizeof out->profile);
  memcpy(out->key, j->key, sizeof out->key);
  memcpy(out->type, j->type, sizeof out->type);
  d->now.jobs[STORE_QUEUED]++;
  return 0;
}

int store_db_add(struct store_db *d, const struct store_job *j, struct store_job *out, int64_t now, int *is_existing, struct err *no, struct err *e)
{
  int found = 0;

  *is_existing = 0;
  if (j->key[0] && read_by_key(d, j, out, &found, no, e))
    return e->code;
  if (!found)
    return insert_job(d, j, out, now, no, e);
  *is_existing = !no->code;
  return 0;
}

/* An update of one job by its id. */
static int move_job(struct store_db *d, sqlite3_stmt *s, const char *id, enum store_state from, enum store_state to, struct err *no, struct err *e)
{
  bind_text(s, 1, id);
  if (db_run(&d->db, s, e))
    return e->code;
  if (!sqlite3_changes(d->db.sql))
    return err_field(no, E_NOTFOUND, "id", "there is no %s job %s", store_state_name(from), id), 0;
  d->now.jobs[from]--;
  d->now.jobs[to]++;
  return 0;
}

int store_db_start(struct store_db *d, const char *id, int64_t now, struct err *no, struct err *e)
{
  sqlite3_bind_int64(d->statement[START], 2, now);
  return move_job(d, d->statement[START], id, STORE_QUEUED, STORE_RUNNING, no, e);
}

int store_db_put_back(struct store_db *d, const char *id, struct err *no, struct err *e)
{
  return move_job(d, d->statement[PUT_BACK], id, STORE_RUNNING, STORE_QUEUED, no, e);
}

static int insert_file(struct store_db *d, const struct store_file *f, int64_t seq, int n, int64_t now, struct err *e)
{
  sqlite3_stmt *s = d->statement[ADD_FILE];

  bind_text(s, 1, f->name);
  if (seq)
    sqlite3_bind_int64(s, 2, seq);
  sqlite3_bind_int(s, 3, n);
  sqlite3_bind_int(s, 4, (int)f->format);
  sqlite3_bind_int64(s, 5, (int64_t)f->bytes);
  bind_text(s, 6, f->digest);
  sqlite3_bind_int64(s, 7, now);
  if (db_run(&d->db, s, e))
    return e->code;
  d->now.bytes += (int64_t)f->bytes;
  return 0;
}

/* state -1: there is no such job. */
static int read_state(struct store_db *d, const char *id, int64_t *seq, int *state, struct err *e)
{
  sqlite3_stmt *s = d->statement[STATE];
  int code, r = 0;

  *state = -1;
  bind_text(s, 1, id);
  code = sqlite3_step(s);
  if (code == SQLITE_ROW) {
    *seq = sqlite3_column_int64(s, 0);
    *state = sqlite3_column_int(s, 1);
  } else if (code != SQLITE_DONE) {
    r = db_fail(&d->db, "cannot read", e);
  }
  reset(s);
  return r;
}

int store_db_finish(struct store_db *d, const struct store_job *j, int64_t now, int *is_existing, struct err *no, struct err *e)
{
  sqlite3_stmt *s = d->statement[FINISH];
  int64_t seq = 0;
  int state;

  *is_existing = 0;
  if (read_state(d, j->id, &seq, &state, e))
    return e->code;
  if (state < 0)
    return err_field(no, E_NOTFOUND, "id", "there is no job %s", j->id), 0;
  *is_existing = state >= STORE_SUCCEEDED;
  if (*is_existing)
    return 0;
  sqlite3_bind_int64(s, 1, seq);
  sqlite3_bind_int64(s, 2, now);
  sqlite3_bind_int(s, 3, (int)j->state);
  bind_text(s, 4, j->error_code);
  bind_text(s, 5, j->error_text);
  bind_text(s, 6, j->generation_id);
  bind_text(s, 7, j->generation_digest);
  bind_text(s, 8, j->answer ? j->answer : "");
  sqlite3_bind_int(s, 9, j->n_files);
  if (db_run(&d->db, s, e))
    return e->code;
  for (int i = 0; i < j->n_files; i++)
    if (insert_file(d, &j->file[i], seq, i, now, e))
      return e->code;
  d->now.jobs[state]--;
  d->now.jobs[j->state]++;
  return 0;
}

int store_db_find(struct store_db *d, const struct store_job *j, struct store_job *out, struct err *no, struct err *e)
{
  unsigned char hash[STORE_HASH];
  int found = 0;

  if (!j->id[0])
    return read_by_key(d, j, out, &found, no, e) || found ? e->code : (err_field(no, E_NOTFOUND, "Idempotency-Key", "no job has this key"), 0);
  bind_text(d->statement[BY_ID], 1, j->id);
  if (read_job(d, d->statement[BY_ID], out, 0, &found, hash, e))
    return e->code;
  if (found && !strcmp(out->tenant, j->tenant))
    return 0;
  if (found)
    store_job_close(out); /* another tenant's job is nobody's */
  err_field(no, E_NOTFOUND, "id", "there is no job %s", j->id);
  return 0;
}

int store_db_next(struct store_db *d, int64_t after, int64_t last, struct store_job *out, struct err *no, struct err *e)
{
  unsigned char hash[STORE_HASH];
  int found;

  sqlite3_bind_int64(d->statement[NEXT], 1, after);
  sqlite3_bind_int64(d->statement[NEXT], 2, last);
  if (read_job(d, d->statement[NEXT], out, 1, &found, hash, e))
    return e->code;
  if (!found)
    err_field(no, E_NOTFOUND, "seq", "no unfinished job is left");
  return 0;
}

int store_db_list(struct store_db *d, const char *tenant, const char *id, int wanted, struct store_job *out, int cap, int *n, struct err *no,
                  struct err *e)
{
  sqlite3_stmt *s = d->statement[LIST];
  struct store_job in = {0}, behind = {.seq = INT64_MAX};
  int code = SQLITE_DONE, r = 0;

  *n = 0;
  snprintf(in.id, sizeof in.id, "%s", id);
  snprintf(in.tenant, sizeof in.tenant, "%s", tenant);
  if (*id && (store_db_find(d, &in, &behind, no, e) || no->code))
    return e->code;
  store_job_close(&behind);
  bind_text(s, 1, tenant);
  sqlite3_bind_int64(s, 2, behind.seq);
  sqlite3_bind_int(s, 3, wanted);
  sqlite3_bind_int(s, 4, cap);
  while (!r && *n < cap && (code = sqlite3_step(s)) == SQLITE_ROW) {
    r = read_row(d, s, &out[*n], 0, e);
    *n += !r;
  }
  if (!r && code != SQLITE_DONE && code != SQLITE_ROW)
    r = db_fail(&d->db, "cannot read", e);
  reset(s);
  return r;
}

/* ---- files ---- */

int store_db_put_file(struct store_db *d, const struct store_file *f, int64_t now, struct err *e)
{
  return insert_file(d, f, 0, 0, now, e);
}

int store_db_find_file(struct store_db *d, const char *name, struct store_file *f, struct err *no, struct err *e)
{
  sqlite3_stmt *s = d->statement[FIND_FILE];
  int code, r = 0;

  bind_text(s, 1, name);
  code = sqlite3_step(s);
  if (code == SQLITE_ROW)
    r = read_file(d, s, f, e);
  else if (code == SQLITE_DONE)
    err_field(no, E_NOTFOUND, "name", "there is no such file, or it has expired");
  else
    r = db_fail(&d->db, "cannot read", e);
  reset(s);
  return r;
}

int store_db_old_files(struct store_db *d, int64_t before, char (*name)[STORE_NAME], int cap, int *n, struct err *e)
{
  sqlite3_stmt *s = d->statement[OLD_FILES];
  int code, r = 0;

  *n = 0;
  sqlite3_bind_int64(s, 1, before);
  sqlite3_bind_int(s, 2, cap);
  while ((code = sqlite3_step(s)) == SQLITE_ROW)
    copy(name[(*n)++], STORE_NAME, s, 0);
  if (code != SQLITE_DONE)
    r = db_fail(&d->db, "cannot read", e);
  reset(s);
  return r;
}

int store_db_drop_file(struct store_db *d, const char *name, struct err *e)
{
  sqlite3_stmt *s = d->statement[DROP_FILE];
  int64_t bytes = 0;
  int code, r = 0;

  bind_text(s, 1, name);
  while ((code = sqlite3_step(s)) == SQLITE_ROW)
    bytes += sqlite3_column_int64(s, 0);
  if (code != SQLITE_DONE)
    r = db_fail(&d->db, "cannot write", e);
  reset(s);
  d->now.bytes -= r ? 0 : bytes;
  return r;
}

int store_db_drop_jobs(struct store_db *d, int64_t before, int cap, int *n, struct err *e)
{
  sqlite3_stmt *s = d->statement[DROP_JOBS];
  int code, r = 0;

  *n = 0;
  sqlite3_bind_int64(s, 1, before);
  sqlite3_bind_int(s, 2, cap);
  while ((code = sqlite3_step(s)) == SQLITE_ROW) {
    d->now.jobs[sqlite3_column_int(s, 0)]--;
    ++*n;
  }
  if (code != SQLITE_DONE)
    r = db_fail(&d->db, "cannot write", e);
  reset(s);
  return r;
}

/* ---- transactions ---- */

int store_db_begin(struct store_db *d, struct err *e)
{
  if (db_exec(&d->db, "BEGIN IMMEDIATE", "cannot write", e))
    return e->code;
  d->begun = d->now;
  d->is_begun = 1;
  return 0;
}

int store_db_commit(struct store_db *d, struct err *e)
{
  if (db_exec(&d->db, "COMMIT", "cannot write", e))
    return e->code;
  d->is_begun = 0;
  return 0;
}

void store_db_cancel(struct store_db *d)
{
  if (!d->is_begun)
    return;
  db_roll_back(&d->db);
  d->now = d->begun;
  d->is_begun = 0;
}

uint64_t store_db_bytes(const struct store_db *d)
{
  return d->now.bytes > 0 ? (uint64_t)d->now.bytes : 0;
}

int64_t store_db_count(const struct store_db *d, enum store_state state)
{
  return d->now.jobs[state];
}

/* ---- open and close ---- */

static int check_version(struct store_db *d, struct err *e)
{
  int64_t version = 0;

  if (db_check_owner(&d->db, APPLICATION_ID, e) || db_read_number(&d->db, "PRAGMA user_version", &version, e))
    return e->code;
  if (version && version != SCHEMA_VERSION)
    return err_field(e, E_FILE, "jobs.db", "%s is of version %lld and this program writes version %d", d->db.path, (long long)version, SCHEMA_VERSION);
  return 0;
}

static int make_schema(struct store_db *d, struct err *e)
{
  if (check_version(d, e) || db_exec(&d->db, "BEGIN IMMEDIATE", "cannot write", e) || db_exec(&d->db, schema, "cannot write", e))
    return e->code;
  return db_exec(&d->db, "COMMIT", "cannot write", e);
}

/* Jobs that ran when the process ended: each start was an attempt, and one that took the process with it STORE_ATTEMPTS times does not get another. */
static int recover(struct store_db *d, int64_t now, struct store_found *found, struct err *e)
{
  static const char give_up[] = "UPDATE job SET " ENDED "WHERE state = 1 AND attempts >= ?1";
  char why[160];
  sqlite3_stmt *s = NULL;
  int r;

  snprintf(why, sizeof why, "the server stopped unexpectedly during each of %d attempts to draw this job", STORE_ATTEMPTS);
  if (db_exec(&d->db, "BEGIN IMMEDIATE", "cannot write", e) || db_prepare(&d->db, &s, give_up, e))
    return e->code;
  sqlite3_bind_int(s, 1, STORE_ATTEMPTS);
  sqlite3_bind_int64(s, 2, now);
  sqlite3_bind_int(s, 3, STORE_FAILED);
  bind_text(s, 4, "crashed");
  bind_text(s, 5, why);
  r = db_run(&d->db, s, e);
  found->crashed = sqlite3_changes(d->db.sql);
  sqlite3_finalize(s);
  if (r || db_exec(&d->db, "UPDATE job SET state = 0 WHERE state = 1", "cannot write", e))
    return e->code;
  return db_exec(&d->db, "COMMIT", "cannot write", e) || db_read_number(&d->db, "SELECT count(*) FROM job WHERE state < 2", &found->put_back, e) ||
                 db_read_number(&d->db, "SELECT coalesce(max(seq), 0) FROM job", &found->last_seq, e)
             ? e->code
             : 0;
}

static int count_jobs(struct store_db *d, struct err *e)
{
  sqlite3_stmt *s = NULL;
  int code, state, r = 0;

  if (db_prepare(&d->db, &s, "SELECT state, count(*) FROM job GROUP BY state", e))
    return e->code;
  while (!r && (code = sqlite3_step(s)) != SQLITE_DONE) {
    state = sqlite3_column_int(s, 0);
    if (code != SQLITE_ROW)
      r = db_fail(&d->db, "cannot read", e);
    else if (state < STORE_QUEUED || state > STORE_CANCELLED)
      r = err_field(e, E_FILE, "jobs.db", "%s is damaged: there is no state %d", d->db.path, state);
    else
      d->now.jobs[state] = sqlite3_column_int64(s, 1);
  }
  sqlite3_finalize(s);
  return r;
}

int store_db_open(struct store_db **out, const char *dir, int64_t now, struct store_found *found, struct err *e)
{
  struct store_db *d = calloc(1, sizeof *d);

  *out = NULL;
  if (!d)
    return err_set(e, E_NOMEM, "out of memory for the job store");
  if (db_open_writer(&d->db, dir, "jobs.db", e) || db_exec(&d->db, "PRAGMA secure_delete = ON", "cannot open", e) || make_schema(d, e) ||
      recover(d, now, found, e) || db_read_number(&d->db, "SELECT coalesce(sum(bytes), 0) FROM file", &d->now.bytes, e) || count_jobs(d, e))
    goto fail;
  for (int i = 0; i < STATEMENTS; i++)
    if (db_prepare(&d->db, &d->statement[i], text[i], e))
      goto fail;
  if (db_ready(&d->db, e))
    goto fail;
  *out = d;
  return 0;
fail:
  store_db_close(d);
  return e->code;
}

void store_db_close(struct store_db *d)
{
  if (!d)
    return;
  for (int i = 0; i < STATEMENTS; i++)
    sqlite3_finalize(d->statement[i]);
  db_close(&d->db);
  free(d);
}
