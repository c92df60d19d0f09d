/*
 * audit_db.c - see audit_db.h.
 *
 * Triggers refuse UPDATE and DELETE on what is written: against accidents, not against whoever owns the file, whom only the chain can show.
 */
#include "server/audit_db.h"

#include <sodium.h>
#include <sqlite3.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "server/db.h"

enum { SCHEMA_VERSION = 1, APPLICATION_ID = 0x534c4155 /* "SLAU" */ };

struct audit_db {
  struct db db;
  sqlite3_stmt *insert, *put_head, *activate;
  unsigned char mac_key[AUDIT_KEY];
  struct audit_head head;   /* what the next record chains to */
  struct audit_head begun;  /* the same when the transaction began */
};

static const char schema[] =
    "CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;"
    "CREATE TABLE IF NOT EXISTS record (seq INTEGER PRIMARY KEY, time TEXT NOT NULL, kind TEXT NOT NULL, json TEXT NOT NULL, hash TEXT NOT NULL);"
    "CREATE TABLE IF NOT EXISTS activation (number INTEGER PRIMARY KEY, seq INTEGER NOT NULL UNIQUE REFERENCES record, profile TEXT NOT NULL,"
    " digest TEXT NOT NULL, members TEXT NOT NULL);"
    "CREATE INDEX IF NOT EXISTS activation_profile ON activation (profile, number);"
    "CREATE TRIGGER IF NOT EXISTS record_no_update BEFORE UPDATE ON record BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END;"
    "CREATE TRIGGER IF NOT EXISTS record_no_delete BEFORE DELETE ON record BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END;"
    "CREATE TRIGGER IF NOT EXISTS activation_no_update BEFORE UPDATE ON activation BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END;"
    "CREATE TRIGGER IF NOT EXISTS activation_no_delete BEFORE DELETE ON activation BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END;";

/* ---- the chain ---- */

static void chain_hash(char out[65], const char *prev, const char *json)
{
  crypto_generichash_state state;
  unsigned char hash[32];

  crypto_generichash_init(&state, NULL, 0, sizeof hash);
  crypto_generichash_update(&state, (const unsigned char *)prev, strlen(prev));
  crypto_generichash_update(&state, (const unsigned char *)json, strlen(json));
  crypto_generichash_final(&state, hash, sizeof hash);
  sodium_bin2hex(out, 65, hash, sizeof hash);
}

/* The head as meta keeps it: "seq hash mac". */
static void head_text(char out[160], const struct audit_head *head, const unsigned char *key)
{
  unsigned char mac[32];
  char hex[65];

  snprintf(out, 160, "%lld %s", (long long)head->seq, head->hash);
  crypto_generichash(mac, sizeof mac, (const unsigned char *)out, strlen(out), key, AUDIT_KEY);
  sodium_bin2hex(hex, sizeof hex, mac, sizeof mac);
  snprintf(out, 160, "%lld %s %s", (long long)head->seq, head->hash, hex);
}

static int read_meta(struct audit_db *d, const char *key, char *out, size_t cap, struct err *e)
{
  sqlite3_stmt *s = NULL;
  int r = 0, code;

  if (db_prepare(&d->db, &s, "SELECT value FROM meta WHERE key = ?", e))
    return e->code;
  sqlite3_bind_text(s, 1, key, -1, SQLITE_STATIC);
  code = sqlite3_step(s);
  if (code == SQLITE_ROW)
    snprintf(out, cap, "%s", db_text(s, 0));
  else if (code == SQLITE_DONE)
    r = err_field(e, E_FILE, "audit.db", "%s holds no %s: it is not an audit log, or it was cut", d->db.path, key);
  else
    r = db_fail(&d->db, "cannot read", e);
  sqlite3_finalize(s);
  return r;
}

/* The hash of record seq; the genesis for 0. */
static int read_hash(struct audit_db *d, int64_t seq, char hash[65], struct err *e)
{
  sqlite3_stmt *s = NULL;
  int r = 0;

  if (!seq)
    return read_meta(d, "genesis", hash, 65, e);
  if (db_prepare(&d->db, &s, "SELECT hash FROM record WHERE seq = ?", e))
    return e->code;
  sqlite3_bind_int64(s, 1, seq);
  if (sqlite3_step(s) == SQLITE_ROW)
    snprintf(hash, 65, "%s", db_text(s, 0));
  else
    r = err_field(e, E_FILE, "audit.db", "%s: record %lld is missing; `safelight audit verify` says more", d->db.path, (long long)seq);
  sqlite3_finalize(s);
  return r;
}

/* Reads the last record into head and holds it to its predecessor and to the signed head. */
static int read_head(struct audit_db *d, struct audit_head *head, struct err *e)
{
  char prev[65] = "", made[65] = "", signed_head[160], want[160];
  sqlite3_stmt *s = NULL;
  int r = 0, code, fits = 1;

  *head = (struct audit_head){0};
  if (db_prepare(&d->db, &s, "SELECT seq, json, hash FROM record ORDER BY seq DESC LIMIT 1", e))
    return e->code;
  code = sqlite3_step(s);
  if (code == SQLITE_ROW) {
    head->seq = sqlite3_column_int64(s, 0);
    snprintf(head->hash, sizeof head->hash, "%s", db_text(s, 2));
    r = read_hash(d, head->seq - 1, prev, e);
    chain_hash(made, prev, db_text(s, 1));
    fits = !strcmp(made, head->hash);
  } else if (code == SQLITE_DONE) {
    r = read_hash(d, 0, head->hash, e);
  } else {
    r = db_fail(&d->db, "cannot read", e);
  }
  sqlite3_finalize(s);
  if (r || read_meta(d, "head", signed_head, sizeof signed_head, e))
    return e->code;
  if (!fits)
    return err_field(e, E_FILE, "audit.db", "%s: the last record, %lld, does not fit the chain; `safelight audit verify` says more", d->db.path,
                     (long long)head->seq);
  head_text(want, head, d->mac_key);
  if (strcmp(want, signed_head))
    return err_field(e, E_FILE, "audit.db", "%s ends at record %lld and its signed head says otherwise: records were cut off, or audit.key is another "
                     "log's; `safelight audit verify` says more", d->db.path, (long long)head->seq);
  return 0;
}

void audit_db_head(const struct audit_db *d, struct audit_head *head)
{
  *head = d->head;
}

/* ---- open and close ---- */

/* The tables, and on the first run the genesis and the head of an empty chain, all or nothing. */
static int make_schema(struct audit_db *d, struct err *e)
{
  unsigned char random[32];
  char sql[640], head[160];
  struct audit_head empty = {0};

  if (db_check_owner(&d->db, APPLICATION_ID, e))
    return e->code;
  randombytes_buf(random, sizeof random);
  sodium_bin2hex(empty.hash, sizeof empty.hash, random, sizeof random);
  head_text(head, &empty, d->mac_key);
  if (db_exec(&d->db, "BEGIN IMMEDIATE", "cannot write", e) || db_exec(&d->db, schema, "cannot write", e))
    return e->code;
  snprintf(sql, sizeof sql,
           "PRAGMA application_id = %d;"
           "INSERT INTO meta SELECT 'genesis', '%s' WHERE NOT EXISTS (SELECT 1 FROM meta);"
           "INSERT INTO meta SELECT 'head', '%s' WHERE (SELECT count(*) FROM meta) = 1;"
           "INSERT INTO meta SELECT 'version', '%d' WHERE (SELECT count(*) FROM meta) = 2;", (int)APPLICATION_ID, empty.hash, head, SCHEMA_VERSION);
  return db_exec(&d->db, sql, "cannot write", e) || db_exec(&d->db, "COMMIT", "cannot write", e) ? e->code : 0;
}

static int check_version(struct audit_db *d, struct err *e)
{
  char version[16];

  if (read_meta(d, "version", version, sizeof version, e))
    return e->code;
  if (strtol(version, NULL, 10) != SCHEMA_VERSION)
    return err_field(e, E_FILE, "audit.db", "%s is of version %s and this program writes version %d", d->db.path, version, SCHEMA_VERSION);
  return 0;
}

int audit_db_open(struct audit_db **out, const char *dir, const unsigned char mac_key[AUDIT_KEY], struct err *e)
{
  struct audit_db *d = calloc(1, sizeof *d);

  *out = NULL;
  if (!d)
    return err_set(e, E_NOMEM, "out of memory for the audit log");
  memcpy(d->mac_key, mac_key, AUDIT_KEY);
  if (db_open_writer(&d->db, dir, "audit.db", e) || make_schema(d, e) || check_version(d, e) || read_head(d, &d->head, e) ||
      db_prepare(&d->db, &d->insert, "INSERT INTO record (seq, time, kind, json, hash) VALUES (?, ?, ?, ?, ?)", e) ||
      db_prepare(&d->db, &d->put_head, "UPDATE meta SET value = ? WHERE key = 'head'", e) ||
      db_prepare(&d->db, &d->activate, "INSERT INTO activation (number, seq, profile, digest, members) VALUES (?, ?, ?, ?, ?)", e) ||
      db_ready(&d->db, e)) {
    audit_db_close(d);
    return e->code;
  }
  *out = d;
  return 0;
}

int audit_db_open_read(struct audit_db **out, const char *dir, struct err *e)
{
  struct audit_db *d = calloc(1, sizeof *d);

  *out = NULL;
  if (!d)
    return err_set(e, E_NOMEM, "out of memory for the audit log");
  if (db_open_reader(&d->db, dir, "audit.db", e) || check_version(d, e)) {
    if (e->code == E_NOTFOUND)
      err_wrap(e, "there is no audit log");
    audit_db_close(d);
    return e->code;
  }
  *out = d;
  return 0;
}

void audit_db_close(struct audit_db *d)
{
  if (!d)
    return;
  sqlite3_finalize(d->insert);
  sqlite3_finalize(d->put_head);
  sqlite3_finalize(d->activate);
  db_close(&d->db);
  sodium_memzero(d->mac_key, sizeof d->mac_key);
  free(d);
}

/* ---- writing ---- */

static void time_text(char out[48])
{
  struct timespec t;
  struct tm tm;
  char day[24];

  clock_gettime(CLOCK_REALTIME, &t);
  gmtime_r(&t.tv_sec, &tm);
  strftime(day, sizeof day, "%Y-%m-%dT%H:%M:%S", &tm);
  snprintf(out, 48, "%s.%03ldZ", day, t.tv_nsec / 1000000);
}

int audit_db_begin(struct audit_db *d, struct err *e)
{
  d->begun = d->head;
  return db_exec(&d->db, "BEGIN IMMEDIATE", "cannot write", e);
}

int audit_db_append(struct audit_db *d, const char *kind, const char *body, struct err *e)
{
  struct audit_head next = {.seq = d->head.seq + 1};
  char now[48];
  struct buf json;
  int r;

  time_text(now);
  buf_init(&json, AUDIT_JSON_MAX + 256);
  r = buf_addf(&json, e, "{\"seq\":%lld,\"time\":\"%s\",\"kind\":\"%s\"%s", (long long)next.seq, now, kind, body);
  if (!r) {
    chain_hash(next.hash, d->head.hash, json.p);
    sqlite3_bind_int64(d->insert, 1, next.seq);
    sqlite3_bind_text(d->insert, 2, now, -1, SQLITE_STATIC);
    sqlite3_bind_text(d->insert, 3, kind, -1, SQLITE_STATIC);
    sqlite3_bind_text(d->insert, 4, json.p, (int)json.len, SQLITE_STATIC);
    sqlite3_bind_text(d->insert, 5, next.hash, -1, SQLITE_STATIC);
    r = db_run(&d->db, d->insert, e);
  }
  if (!r)
    d->head = next;
  buf_close(&json);
  return r;
}

int audit_db_activate(struct audit_db *d, const char *profile, const char *digest, const char *members, const char *body, int64_t *number, struct err *e)
{
  struct buf numbered;
  int r;

  buf_init(&numbered, AUDIT_JSON_MAX);
  r = db_read_number(&d->db, "SELECT coalesce(max(number), 0) + 1 FROM activation", number, e);
  if (!r)
    r = buf_addf(&numbered, e, ",\"activation\":%lld,\"generation_id\":\"%lld-%.8s\"%s", (long long)*number, (long long)*number, digest, body);
  if (!r)
    r = audit_db_append(d, audit_kind_name(AUDIT_ACTIVATION), numbered.p, e);
  if (!r) {
    sqlite3_bind_int64(d->activate, 1, *number);
    sqlite3_bind_int64(d->activate, 2, d->head.seq);
    sqlite3_bind_text(d->activate, 3, profile, -1, SQLITE_STATIC);
    sqlite3_bind_text(d->activate, 4, digest, -1, SQLITE_STATIC);
    sqlite3_bind_text(d->activate, 5, members, -1, SQLITE_STATIC);
    r = db_run(&d->db, d->activate, e);
  }
  buf_close(&numbered);
  return r;
}

int audit_db_commit(struct audit_db *d, struct err *e)
{
  char head[160];

  head_text(head, &d->head, d->mac_key);
  sqlite3_bind_text(d->put_head, 1, head, -1, SQLITE_STATIC);
  return db_run(&d->db, d->put_head, e) || db_exec(&d->db, "COMMIT", "cannot write", e) ? e->code : 0;
}

void audit_db_cancel(struct audit_db *d)
{
  struct audit_head head;
  struct err e = {0};

  db_roll_back(&d->db);
  d->head = d->begun;
  /* The failed transaction may be in the file after all (its fsync failed): the file decides. If it cannot be read the old head stays; should its
   * next number be taken in the file, every later append fails. */
  if (!read_head(d, &head, &e))
    d->head = head;
}

/* ---- reading ---- */

int audit_db_last_activation(struct audit_db *d, const char *profile, int64_t *number, char digest[65], char *members, size_t cap, struct err *e)
{
  sqlite3_stmt *s = NULL;
  int code, r = 0;

  *number = 0;
  digest[0] = 0;
  if (cap)
    members[0] = 0;
  if (db_prepare(&d->db, &s, "SELECT number, digest, members FROM activation WHERE profile = ? ORDER BY number DESC LIMIT 1", e))
    return e->code;
  sqlite3_bind_text(s, 1, profile, -1, SQLITE_STATIC);
  code = sqlite3_step(s);
  if (code == SQLITE_ROW) {
    *number = sqlite3_column_int64(s, 0);
    snprintf(digest, 65, "%s", db_text(s, 1));
    if (cap && (size_t)snprintf(members, cap, "%s", db_text(s, 2)) >= cap)
      r = err_field(e, E_TOOBIG, "members", "the members of activation %lld do not fit %zu bytes", (long long)*number, cap);
  } else if (code != SQLITE_DONE) {
    r = db_fail(&d->db, "cannot read", e);
  }
  sqlite3_finalize(s);
  return r;
}

int audit_db_recent(struct audit_db *d, int n, struct buf *out, struct err *e)
{
  sqlite3_stmt *s = NULL;
  int code = SQLITE_DONE, r, first = 1;

  if (db_prepare(&d->db, &s, "SELECT json, hash FROM record ORDER BY seq DESC LIMIT ?", e))
    return e->code;
  sqlite3_bind_int(s, 1, n);
  r = buf_add_str(out, "[", e);
  while (!r && (code = sqlite3_step(s)) == SQLITE_ROW) {
    const char *json = db_text(s, 0);
    size_t len = strlen(json);
    r = buf_addf(out, e, "%s%.*s,\"hash\":\"%s\"}", first ? "" : ",", (int)(len ? len - 1 : 0), json, db_text(s, 1));
    first = 0;
  }
  if (!r && code != SQLITE_DONE)
    r = db_fail(&d->db, "cannot read", e);
  sqlite3_finalize(s);
  return r ? r : buf_add_str(out, "]", e);
}

/* ---- walking ---- */

static void find_fault(struct audit_walk *w, int64_t seq, const char *why)
{
  if (w->bad)
    return;
  w->bad = seq;
  snprintf(w->why, sizeof w->why, "%s", why);
}

/* One row against the head so far; moves the head on. */
static void walk_row(sqlite3_stmt *s, struct audit_head *head, const char *anchor, struct audit_walk *w)
{
  int64_t seq = sqlite3_column_int64(s, 0);
  const char *hash = db_text(s, 2);
  char made[65];

  if (seq != head->seq + 1)
    find_fault(w, head->seq + 1, "is missing");
  chain_hash(made, head->hash, db_text(s, 1));
  if (strcmp(made, hash))
    find_fault(w, seq, "does not fit the hash of the record before it: this record, or the one before, was changed, removed or moved");
  if (sqlite3_column_int(s, 3) != 1)
    find_fault(w, seq, "has a number, time or kind that its JSON does not have");
  w->has_anchor |= anchor && !strcmp(anchor, hash);
  w->count++;
  head->seq = seq;
  snprintf(head->hash, sizeof head->hash, "%s", hash);
}

static int walk_records(struct audit_db *d, struct audit_head *head, const char *anchor, struct audit_walk *w, struct err *e)
{
  static const char sql[] = "SELECT seq, json, hash, CASE WHEN json_valid(json) THEN json_extract(json, '$.seq') IS seq AND"
                            " json_extract(json, '$.time') IS time AND json_extract(json, '$.kind') IS kind ELSE 0 END FROM record ORDER BY seq";
  sqlite3_stmt *s = NULL;
  int code, r = 0;

  if (read_hash(d, 0, head->hash, e) || db_prepare(&d->db, &s, sql, e))
    return e->code;
  w->has_anchor = anchor && !strcmp(anchor, head->hash);
  while ((code = sqlite3_step(s)) == SQLITE_ROW)
    walk_row(s, head, anchor, w);
  if (code != SQLITE_DONE)
    r = db_fail(&d->db, "cannot read", e);
  sqlite3_finalize(s);
  return r;
}

/* The activations say what their records say, one for one. Only asked when the chain holds: then every record is JSON. */
static int walk_activations(struct audit_db *d, struct audit_walk *w, struct err *e)
{
  static const char sql[] =
      "SELECT a.seq FROM activation a LEFT JOIN record r ON r.seq = a.seq WHERE r.seq IS NULL OR json_extract(r.json, '$.activation') IS NOT a.number OR"
      " json_extract(r.json, '$.profile') IS NOT a.profile OR json_extract(r.json, '$.generation_digest') IS NOT a.digest OR"
      " json_extract(r.json, '$.members') IS NOT a.members UNION ALL "
      "SELECT r.seq FROM record r LEFT JOIN activation a ON a.seq = r.seq WHERE r.kind = 'activation' AND a.seq IS NULL AND"
      " json_extract(r.json, '$.activation') IS NOT NULL LIMIT 1";
  sqlite3_stmt *s = NULL;
  int code, r = 0;

  if (db_prepare(&d->db, &s, sql, e))
    return e->code;
  code = sqlite3_step(s);
  if (code == SQLITE_ROW)
    find_fault(w, sqlite3_column_int64(s, 0), "is not what the table of activations says");
  else if (code != SQLITE_DONE)
    r = db_fail(&d->db, "cannot read", e);
  sqlite3_finalize(s);
  return r;
}

int audit_db_walk(struct audit_db *d, const unsigned char *mac_key, const char *anchor, struct audit_walk *w, struct err *e)
{
  struct audit_head head = {0};
  char kept[160], want[160];

  *w = (struct audit_walk){0};
  if (db_exec(&d->db, "BEGIN", "cannot read", e) || walk_records(d, &head, anchor, w, e) || read_meta(d, "head", kept, sizeof kept, e) ||
      (!w->bad && walk_activations(d, w, e)))
    return e->code;
  if (mac_key) {
    head_text(want, &head, mac_key);
    w->is_head_checked = 1;
    if (strcmp(want, kept))
      find_fault(w, head.seq + 1, "is not there and the signed head says otherwise: records were cut off at the end, or audit.key is another log's");
  }
  if (anchor && !w->has_anchor)
    find_fault(w, head.seq + 1, "is not there, nor is the hash you gave anywhere in the chain: records were cut off, or the log is another one");
  w->head = head;
  return db_exec(&d->db, "COMMIT", "cannot read", e);
}
