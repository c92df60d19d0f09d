/*
 * test_audit.c - the audit log: what is written, that it survives (restart, kill -9, a full disk), and that whoever changes it is found. The chain is
 * computed again here, from the rows of the file, with SQLite and libsodium alone. Threads: some tests start writers and readers.
 */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <jansson.h>
#include <pthread.h>
#include <signal.h>
#include <sodium.h>
#include <sqlite3.h>
#include <stdatomic.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "server/audit_db.h"

#define DIGEST "3fa9c1d2aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
#define OTHER "b0b1b2b3cccccccccccccccccccccccccccccccccccccccccccccccccccccccc"

static char dir[96];

static int remove_one(const char *path, const struct stat *st, int type, struct FTW *at)
{
  (void)st, (void)type, (void)at;
  return remove(path);
}

static int setup(void **state)
{
  (void)state;
  snprintf(dir, sizeof dir, "test_audit.XXXXXX");
  return mkdtemp(dir) ? 0 : -1;
}

static int teardown(void **state)
{
  (void)state;
  return nftw(dir, remove_one, 8, FTW_DEPTH | FTW_PHYS);
}

static const char *in_dir(const char *name)
{
  static char path[128];

  snprintf(path, sizeof path, "%s/%s", dir, name);
  return path;
}

static struct audit *open_log(int keep_prompts)
{
  struct audit *a = NULL;
  struct err e = {0};

  if (audit_open(&a, dir, keep_prompts, &e))
    fail_msg("audit_open: %s", e.msg);
  return a;
}

static void open_fails(int code, const char *text)
{
  struct audit *a = NULL;
  struct err e = {0};

  if (!audit_open(&a, dir, 0, &e))
    fail_msg("opened, and \"%s\" was expected", text);
  assert_null(a);
  if (e.code != code || !strstr(e.msg, text))
    fail_msg("%d \"%s\" does not say \"%s\"", e.code, e.msg, text);
}

static void add_image(struct audit *a, uint64_t seed)
{
  struct audit_record r = {.kind = AUDIT_IMAGE, .tenant = "shop", .profile = "default", .request_id = "r-1", .prompt = "a red apple", .seed = seed,
                           .generation_id = "1-3fa9c1d2", .generation_digest = DIGEST, .verdict = "served", .image_digest = OTHER};
  struct err e = {0};

  if (audit_add(a, &r, &e))
    fail_msg("audit_add: %s", e.msg);
}

static int64_t activate(struct audit *a, const char *profile, const char *digest, const char *members)
{
  int64_t number = -1;
  struct err e = {0};

  if (audit_activated(a, profile, digest, members, &number, &e))
    fail_msg("audit_activated: %s", e.msg);
  return number;
}

/* Runs SQL on the file behind the log's back. */
static int sql(const char *text)
{
  sqlite3 *db;
  int code;

  assert_int_equal(sqlite3_open(in_dir("audit.db"), &db), SQLITE_OK);
  code = sqlite3_exec(db, text, NULL, NULL, NULL);
  sqlite3_close(db);
  return code;
}

static struct audit_walk walk(const char *anchor)
{
  struct audit_walk w;
  struct err e = {0};

  if (audit_verify(dir, anchor, &w, &e))
    fail_msg("audit_verify: %s", e.msg);
  return w;
}

static json_t *recent(struct audit *a, int n)
{
  struct err e = {0};
  json_t *root;
  char *json;

  if (audit_recent(a, n, &json, &e))
    fail_msg("audit_recent: %s", e.msg);
  root = json_loads(json, 0, NULL);
  if (!root)
    fail_msg("not JSON: %s", json);
  free(json);
  return root;
}

static const char *text_of(json_t *record, const char *field)
{
  const char *s = json_string_value(json_object_get(record, field));

  return s ? s : "(none)";
}

/* Three pictures, an activation, two more. */
static void make_log(void)
{
  struct audit *a = open_log(0);

  for (uint64_t i = 1; i <= 3; i++)
    add_image(a, i);
  assert_int_equal(activate(a, "default", DIGEST, "[{\"name\":\"nudity\"}]"), 1);
  add_image(a, 5);
  add_image(a, 6);
  audit_close(a);
}

/* ---- what is written ---- */

static void test_fields(void **state)
{
  struct audit_style style[2] = {{"ink", DIGEST, 0.5f, -0.25}, {"odd", "", -1, NAN}};
  struct audit_record r = {.kind = AUDIT_REFUSAL, .tenant = "t\"\\\n\x01\x7f\xff\xc3\xa9\xed\xa0\x80", .negative = "blood", .prompt = "an apple",
                           .style = style, .n_styles = 2, .verdict = "refused", .reason = "loras[0].scale"};
  struct audit *a = open_log(0);
  json_t *all, *one, *two;
  struct err e = {0};
  struct stat st;

  (void)state;
  assert_int_equal(audit_add(a, &r, &e), 0);
  add_image(a, 0);
  all = recent(a, 10);
  assert_int_equal(json_array_size(all), 2);
  one = json_array_get(all, 1);
  two = json_array_get(all, 0);
  assert_string_equal(text_of(one, "kind"), "refusal");
  assert_string_equal(text_of(one, "tenant"), "t\"\\\n\x01\x7f\xef\xbf\xbd\xc3\xa9\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd");
  assert_string_equal(text_of(one, "reason"), "loras[0].scale");
  assert_null(json_object_get(one, "seed"));
  assert_null(json_object_get(one, "prompt"));
  assert_int_equal(strlen(text_of(one, "prompt_hash")), 64);
  assert_int_equal(strlen(text_of(one, "negative_prompt_hash")), 64);
  assert_true(json_number_value(json_object_get(json_array_get(json_object_get(one, "styles"), 0), "c")) == -0.25);
  assert_true(json_is_null(json_object_get(json_array_get(json_object_get(one, "styles"), 1), "c")));
  assert_string_equal(text_of(two, "kind"), "image");
  assert_true(json_is_integer(json_object_get(two, "seed")) && json_integer_value(json_object_get(two, "seed")) == 0);
  assert_string_equal(text_of(two, "image_digest"), OTHER);
  assert_int_equal(json_integer_value(json_object_get(two, "seq")), 2);
  json_decref(all);
  audit_close(a);
  assert_int_equal(stat(in_dir("audit.db"), &st), 0);
  assert_int_equal(st.st_mode & 0777, 0600);
  assert_int_equal(stat(in_dir("audit.key"), &st), 0);
  assert_int_equal(st.st_mode & 0777, 0600);
}

/* Prompts are in the file only when the operator wants them there; equal prompts have equal hashes, in one log and not in another. */
static void test_prompts(void **state)
{
  struct audit_record r = {.kind = AUDIT_IMAGE, .prompt = "a very private wish", .verdict = "served"};
  char hash[65], key[128];
  struct err e = {0};
  struct audit *a;
  json_t *all;

  (void)state;
  a = open_log(0);
  assert_int_equal(audit_add(a, &r, &e), 0);
  assert_int_equal(audit_add(a, &r, &e), 0);
  r.prompt = "another wish";
  assert_int_equal(audit_add(a, &r, &e), 0);
  all = recent(a, 3);
  snprintf(hash, sizeof hash, "%s", text_of(json_array_get(all, 2), "prompt_hash"));
  assert_string_equal(text_of(json_array_get(all, 1), "prompt_hash"), hash);
  assert_string_not_equal(text_of(json_array_get(all, 0), "prompt_hash"), hash);
  json_decref(all);
  audit_close(a);
  assert_int_equal(sql("SELECT 1 / (SELECT count(*) = 0 FROM record WHERE json LIKE '%wish%')"), SQLITE_OK);
  a = open_log(1);
  r.prompt = "a very private wish";
  assert_int_equal(audit_add(a, &r, &e), 0);
  all = recent(a, 1);
  assert_string_equal(text_of(json_array_get(all, 0), "prompt"), "a very private wish");
  json_decref(all);
  audit_close(a);
  /* Another key, another hash: nobody can try prompts against a log without its key. */
  snprintf(key, sizeof key, "%s", in_dir("audit.key"));
  assert_int_equal(unlink(key) + unlink(in_dir("audit.db")), 0);
  a = open_log(0);
  assert_int_equal(audit_add(a, &r, &e), 0);
  all = recent(a, 1);
  assert_string_not_equal(text_of(json_array_get(all, 0), "prompt_hash"), hash);
  json_decref(all);
  audit_close(a);
}

/* Every hash of the file, computed again as docs/operating.md says. */
static int check_row(void *arg, int n, char **v, char **name)
{
  crypto_generichash_state s;
  unsigned char hash[32];
  char hex[65], *prev = arg;

  (void)n, (void)name;
  crypto_generichash_init(&s, NULL, 0, 32);
  crypto_generichash_update(&s, (unsigned char *)prev, 64);
  crypto_generichash_update(&s, (unsigned char *)v[0], strlen(v[0]));
  crypto_generichash_final(&s, hash, 32);
  sodium_bin2hex(hex, 65, hash, 32);
  memcpy(prev, v[1], 65);
  return strcmp(hex, v[1]);
}

static int copy_value(void *arg, int n, char **v, char **name)
{
  (void)n, (void)name;
  snprintf(arg, 65, "%s", v[0]);
  return 0;
}

static void test_chain(void **state)
{
  char prev[65] = "";
  struct audit_walk w;
  sqlite3 *db;

  (void)state;
  make_log();
  assert_int_equal(sqlite3_open(in_dir("audit.db"), &db), SQLITE_OK);
  assert_int_equal(sqlite3_exec(db, "SELECT value FROM meta WHERE key = 'genesis'", copy_value, prev, NULL), SQLITE_OK);
  assert_int_equal(strlen(prev), 64);
  assert_int_equal(sqlite3_exec(db, "SELECT json, hash FROM record ORDER BY seq", check_row, prev, NULL), SQLITE_OK);
  sqlite3_close(db);
  w = walk(NULL);
  assert_int_equal(w.bad, 0);
  assert_int_equal(w.count, 6);
  assert_int_equal(w.is_head_checked, 1);
  assert_string_equal(w.head.hash, prev);
}

static void test_activations(void **state)
{
  char digest[65], members[64];
  int64_t number;
  struct err e = {0};
  struct audit *a = open_log(0);

  (void)state;
  assert_int_equal(audit_last_activation(a, "default", &number, digest, members, sizeof members, &e), 0);
  assert_int_equal(number, 0);
  assert_int_equal(activate(a, "default", DIGEST, "[1]"), 1);
  assert_int_equal(activate(a, "kids", OTHER, "[2]"), 2);
  audit_close(a);
  a = open_log(0);
  assert_int_equal(activate(a, "default", OTHER, "[ 3, \"\xc3\xa9\\u0041\" ]"), 3);
  assert_int_equal(audit_last_activation(a, "default", &number, digest, members, sizeof members, &e), 0);
  assert_int_equal(number, 3);
  assert_string_equal(digest, OTHER);
  assert_string_equal(members, "[ 3, \"\xc3\xa9\\u0041\" ]");
  assert_int_equal(audit_last_activation(a, "kids", &number, digest, members, sizeof members, &e), 0);
  assert_int_equal(number, 2);
  assert_int_equal(audit_last_activation(a, "kids", &number, digest, members, 3, &e), E_TOOBIG);
  audit_close(a);
  assert_int_equal(walk(NULL).bad, 0);
}

/* ---- who changes it is found ---- */

static const char drop[] = "DROP TRIGGER record_no_update; DROP TRIGGER record_no_delete; DROP TRIGGER activation_no_update;"
                           "DROP TRIGGER activation_no_delete; PRAGMA foreign_keys = OFF;";

static void test_triggers(void **state)
{
  static const char *const refused[] = {"UPDATE record SET json = '{}' WHERE seq = 2", "DELETE FROM record WHERE seq = 6", "DELETE FROM record",
                                        "UPDATE activation SET digest = 'x'", "DELETE FROM activation",
                                        "INSERT INTO record SELECT 2, time, kind, json, hash FROM record WHERE seq = 1"};

  (void)state;
  make_log();
  for (size_t i = 0; i < sizeof refused / sizeof *refused; i++)
    if (sql(refused[i]) == SQLITE_OK)
      fail_msg("accepted: %s", refused[i]);
  assert_int_equal(walk(NULL).bad, 0);
}

static void test_tampering(void **state)
{
  static const struct {
    const char *what;
    int64_t bad;
  } cases[] = {
      {"UPDATE record SET seq = 100 WHERE seq = 6", 6},
      {"UPDATE record SET seq = -5 WHERE seq = 1", 1},
      {"UPDATE record SET time = '2020-01-01T00:00:00.000Z' WHERE seq = 2", 2},
      {"UPDATE record SET kind = 'refusal' WHERE seq = 3", 3},
      {"UPDATE record SET kind = X'696D616765' WHERE seq = 3", 3},
      {"UPDATE record SET json = replace(json, 'shop', 'shoq') WHERE seq = 1", 1},
      {"UPDATE record SET json = json || ' ' WHERE seq = 6", 6},
      {"UPDATE record SET json = '{' WHERE seq = 5", 5},
      {"UPDATE record SET hash = '" DIGEST "' WHERE seq = 3", 3},
      {"UPDATE record SET hash = upper(hash) WHERE seq = 6", 6},
      {"DELETE FROM record WHERE seq = 1", 1},
      {"DELETE FROM record WHERE seq = 3", 3},
      {"DELETE FROM record WHERE seq = 3; UPDATE record SET seq = seq - 1 WHERE seq > 3", 3},
      {"DELETE FROM record WHERE seq = 6", 6},
      {"DELETE FROM record WHERE seq > 3; DELETE FROM activation", 4},
      {"DELETE FROM record; DELETE FROM activation", 1},
      {"UPDATE record SET seq = 50 WHERE seq = 2; UPDATE record SET seq = 2 WHERE seq = 3; UPDATE record SET seq = 3 WHERE seq = 50", 2},
      {"INSERT INTO record SELECT 7, time, kind, json, hash FROM record WHERE seq = 6", 7},
      {"UPDATE meta SET value = '" DIGEST "' WHERE key = 'genesis'", 1},
      {"UPDATE meta SET value = replace(value, '6 ', '5 ') WHERE key = 'head'", 7},
      {"UPDATE activation SET digest = '" OTHER "'", 4},
      {"UPDATE activation SET members = '[]'", 4},
      {"UPDATE activation SET profile = 'kids'", 4},
      {"UPDATE activation SET number = 9", 4},
      {"UPDATE activation SET seq = 5", 5},
      {"DELETE FROM activation", 4},
      {"INSERT INTO activation SELECT 2, 6, profile, digest, members FROM activation", 6},
  };

  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    struct audit_walk w;
    make_log();
    assert_int_equal(walk(NULL).bad, 0);
    assert_int_equal(sql(drop), SQLITE_OK);
    if (sql(cases[i].what) != SQLITE_OK)
      fail_msg("SQL: %s", cases[i].what);
    w = walk(NULL);
    if (w.bad != cases[i].bad || !*w.why)
      fail_msg("%s: record %lld %s; expected %lld", cases[i].what, (long long)w.bad, w.why, (long long)cases[i].bad);
    teardown(state);
    setup(state);
  }
}

/* A server does not write on top of a broken end. */
static void test_open_checks_the_end(void **state)
{
  static const char *const broken[] = {"UPDATE record SET json = replace(json, 'shop', 'shoq') WHERE seq = 6", "DELETE FROM record WHERE seq = 6",
                                       "DELETE FROM record WHERE seq = 5", "UPDATE record SET hash = '" DIGEST "' WHERE seq = 6",
                                       "UPDATE record SET seq = 7 WHERE seq = 6", "DELETE FROM meta WHERE key = 'head'"};

  for (size_t i = 0; i < sizeof broken / sizeof *broken; i++) {
    make_log();
    assert_int_equal(sql(drop), SQLITE_OK);
    assert_int_equal(sql(broken[i]), SQLITE_OK);
    open_fails(E_FILE, "audit.db");
    teardown(state);
    setup(state);
  }
}

static void copy_file(const char *from, const char *to)
{
  char a[128], b[128], bytes[4096];
  FILE *in, *out;
  size_t n;

  snprintf(a, sizeof a, "%s/%s", dir, from);
  snprintf(b, sizeof b, "%s/%s", dir, to);
  in = fopen(a, "rb");
  out = fopen(b, "wb");
  assert_true(in && out);
  while ((n = fread(bytes, 1, sizeof bytes, in)))
    assert_int_equal(fwrite(bytes, 1, n, out), n);
  fclose(in);
  fclose(out);
}

/* What the file alone cannot show: an older copy of it put back. A head that was kept elsewhere shows it. */
static void test_anchor(void **state)
{
  struct audit_walk w;
  struct audit *a;

  (void)state;
  make_log();
  copy_file("audit.db", "old.db");
  a = open_log(0);
  add_image(a, 7);
  audit_close(a);
  w = walk(NULL);
  assert_int_equal(w.count, 7);
  assert_int_equal(walk(w.head.hash).has_anchor, 1);
  assert_int_equal(walk(w.head.hash).bad, 0);
  copy_file("old.db", "audit.db");
  assert_int_equal(walk(NULL).bad, 0);
  assert_int_equal(walk(w.head.hash).bad, 7);
}

/* ---- the folder ---- */

static void write_bytes(const char *name, const char *bytes, size_t n)
{
  FILE *f = fopen(in_dir(name), "wb");

  assert_non_null(f);
  assert_int_equal(fwrite(bytes, 1, n, f), n);
  fclose(f);
}

static void test_folder(void **state)
{
  struct audit *a, *b = NULL;
  char old[64], pid[32];
  struct err e = {0};

  (void)state;
  a = open_log(0);
  assert_int_equal(audit_open(&b, dir, 0, &e), E_FILE); /* a second server */
  assert_null(b);
  snprintf(pid, sizeof pid, "process %ld", (long)getpid());
  assert_non_null(strstr(e.msg, pid));
  add_image(a, 1);
  audit_close(a);

  assert_int_equal(chmod(in_dir("audit.key"), 0640), 0);
  open_fails(E_FILE, "chmod 600");
  assert_int_equal(walk(NULL).is_head_checked, 0); /* a chain can be checked without the key, its end cannot */
  assert_int_equal(chmod(in_dir("audit.key"), 0600), 0);
  assert_int_equal(truncate(in_dir("audit.key"), 31), 0);
  open_fails(E_FILE, "not 32 bytes");
  assert_int_equal(unlink(in_dir("audit.key")), 0);
  open_fails(E_FILE, "restore it");
  write_bytes("audit.key", "0123456789abcdef0123456789abcdef", 32);
  assert_int_equal(chmod(in_dir("audit.key"), 0600), 0);
  open_fails(E_FILE, "another log's");
  assert_int_equal(walk(NULL).bad, 2);

  assert_int_equal(chmod(dir, 0777), 0);
  open_fails(E_FILE, "chmod 700");
  assert_int_equal(chmod(dir, 0700), 0);
  snprintf(old, sizeof old, "%.60s", dir);
  snprintf(dir, sizeof dir, "%s/audit.db", old);
  open_fails(E_FILE, "not a folder");
  snprintf(dir, sizeof dir, "%s/not/there", old);
  open_fails(E_FILE, "cannot make");
  snprintf(dir, sizeof dir, "%s", "");
  open_fails(E_ARG, "empty");
  snprintf(dir, sizeof dir, "%s/made", old);
  a = open_log(0);
  audit_close(a);
  assert_int_equal(audit_open(&b, "/proc/self", 0, &(struct err){0}), E_FILE);
  snprintf(dir, sizeof dir, "%s", old);
}

static void test_read_only_folder(void **state)
{
  int status;
  pid_t child;

  (void)state;
  make_log();
  assert_int_equal(chmod(dir, 0555), 0);
  assert_int_equal(chmod(in_dir("lock"), 0444), 0);
  child = fork();
  if (!child) { /* root may write anywhere: be nobody */
    struct audit *a = NULL;
    struct err e = {0};
    int r = geteuid() == 0 && seteuid(65534);
    r = r || audit_open(&a, dir, 0, &e) != E_FILE || a || !strstr(e.msg, "cannot write");
    _exit(r);
  }
  assert_int_equal(waitpid(child, &status, 0), child);
  assert_int_equal(chmod(dir, 0700), 0);
  assert_int_equal(status, 0);
}

static void test_damage(void **state)
{
  struct audit_walk w;
  struct err e = {0};
  char junk[8192];
  struct stat st;

  assert_int_equal(audit_verify(dir, NULL, &w, &e), E_NOTFOUND);
  make_log();
  memset(junk, 'x', sizeof junk);
  write_bytes("audit.db", junk, sizeof junk);
  open_fails(E_FILE, "not a database");
  e = (struct err){0};
  assert_int_equal(audit_verify(dir, NULL, &w, &e), E_FILE);
  teardown(state);
  setup(state);
  make_log();
  assert_int_equal(stat(in_dir("audit.db"), &st), 0);
  assert_int_equal(truncate(in_dir("audit.db"), st.st_size / 2), 0);
  open_fails(E_FILE, "malformed");
  teardown(state);
  setup(state);
  make_log();
  assert_int_equal(sql("UPDATE meta SET value = '99' WHERE key = 'version'"), SQLITE_OK);
  open_fails(E_FILE, "version 99");
  teardown(state);
  setup(state);
  audit_close(open_log(0));
  assert_int_equal(unlink(in_dir("audit.db")), 0);
  assert_int_equal(sql("CREATE TABLE precious (x)"), SQLITE_OK);
  open_fails(E_FILE, "another program");
}

/* ---- many at once, and the end of the world ---- */

enum { WRITERS = 8, EACH = 40 };
static _Atomic int failures;

static void *writer(void *arg)
{
  struct audit *a = arg;
  struct audit_record r = {.kind = AUDIT_IMAGE, .prompt = "p", .verdict = "served"};
  struct err e = {0};
  int64_t number;

  for (int i = 0; i < EACH; i++) {
    r.seed = (uint64_t)i;
    r.kind = i % 4 == 3 ? AUDIT_REFUSAL : AUDIT_IMAGE;
    failures += i % 4 == 3 ? !!audit_note(a, &r, &e) : i == 20 ? !!audit_activated(a, "default", DIGEST, "[]", &number, &e) : !!audit_add(a, &r, &e);
  }
  return NULL;
}

static void *reader(void *arg)
{
  struct audit_walk w;
  struct err e = {0};
  char *json;

  for (int i = 0; i < 5; i++) {
    failures += !!audit_recent(arg, 5, &json, &e);
    free(json);
    failures += audit_verify(dir, NULL, &w, &e) || w.bad;
  }
  return NULL;
}

static void test_concurrent(void **state)
{
  struct audit *a = open_log(0);
  pthread_t t[WRITERS + 1];
  struct audit_walk w;

  (void)state;
  failures = 0;
  for (int i = 0; i <= WRITERS; i++)
    assert_int_equal(pthread_create(&t[i], NULL, i < WRITERS ? writer : reader, a), 0);
  for (int i = 0; i <= WRITERS; i++)
    pthread_join(t[i], NULL);
  audit_close(a);
  assert_int_equal(failures, 0);
  w = walk(NULL);
  assert_int_equal(w.bad, 0);
  assert_int_equal(w.count, WRITERS * EACH);
}

/* Somebody holds the database: notes wait, up to a bound in number and in bytes, and none is lost that was taken. */
static void test_notes_are_bounded(void **state)
{
  static char prompt[16001];
  static const struct {
    int keep, notes, most;
  } cases[] = {{0, 4300, 4097 + 64}, {1, 1400, 1050 + 64}}; /* 4096, or 16 MB of 16 kB, and what the writer had taken already */

  memset(prompt, 'p', sizeof prompt - 1);
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    struct audit_record r = {.kind = AUDIT_REFUSAL, .prompt = prompt, .verdict = "refused"};
    struct audit *a = open_log(cases[i].keep);
    int taken = 0, full = 0;
    sqlite3 *db;
    assert_int_equal(sqlite3_open(in_dir("audit.db"), &db), SQLITE_OK);
    assert_int_equal(sqlite3_exec(db, "BEGIN IMMEDIATE", NULL, NULL, NULL), SQLITE_OK);
    for (int k = 0; k < cases[i].notes; k++) {
      struct err e = {0};
      if (!audit_note(a, &r, &e))
        taken++;
      else
        full += e.code == E_POLICY && strstr(e.msg, "does not fit");
    }
    assert_int_equal(taken + full, cases[i].notes);
    assert_in_range(taken, 500, cases[i].most);
    assert_int_equal(audit_lost(a), full);
    assert_int_equal(sqlite3_exec(db, "COMMIT", NULL, NULL, NULL), SQLITE_OK);
    sqlite3_close(db);
    audit_close(a);
    assert_int_equal(walk(NULL).bad, 0);
    assert_int_equal(walk(NULL).count, taken);
    teardown(state);
    setup(state);
  }
}

/* A record that audit_add said is written is there after kill -9, and the chain holds. */
static void test_kill(void **state)
{
  char byte;
  int fd[2], status, acknowledged = 0;
  pid_t child;

  (void)state;
  assert_int_equal(pipe(fd), 0);
  child = fork();
  if (!child) {
    struct audit *a = open_log(0);
    close(fd[0]);
    for (uint64_t i = 0;; i++) {
      add_image(a, i);
      if (write(fd[1], "x", 1) != 1)
        _exit(1);
    }
  }
  close(fd[1]);
  while (acknowledged < 50 && read(fd[0], &byte, 1) == 1)
    acknowledged++;
  kill(child, SIGKILL);
  while (read(fd[0], &byte, 1) == 1)
    acknowledged++;
  close(fd[0]);
  assert_int_equal(waitpid(child, &status, 0), child);
  assert_true(WIFSIGNALED(status) && acknowledged >= 50);
  audit_close(open_log(0));
  assert_int_equal(walk(NULL).bad, 0);
  assert_in_range(walk(NULL).count, acknowledged, acknowledged + 1);
}

/* The disk fills up: adds fail closed, what was acknowledged stays, and when there is room again the log goes on. */
static int fill_disk(void)
{
  struct rlimit limit = {256 << 10, RLIM_INFINITY};
  struct audit_record r = {.kind = AUDIT_IMAGE, .prompt = "p", .verdict = "served"};
  struct audit *a = NULL;
  struct audit_walk w;
  struct err e = {0};
  int64_t number;
  int good = 0, failed = 0;

  signal(SIGXFSZ, SIG_IGN);
  if (audit_open(&a, dir, 0, &e) || setrlimit(RLIMIT_FSIZE, &limit))
    return 1;
  for (int i = 0; i < 400; i++) {
    struct err why = {0};
    if (!audit_add(a, &r, &why))
      good++;
    else if (why.code == E_POLICY && strstr(why.msg, "could not be written"))
      failed++;
  }
  if (!good || !failed || good + failed != 400)
    return 2;
  e = (struct err){0};
  if (audit_activated(a, "default", DIGEST, "[]", &number, &e) != E_POLICY || audit_note(a, &r, &(struct err){0}))
    return 3;
  e = (struct err){0};
  if (audit_verify(dir, NULL, &w, &e) || w.bad || w.count != good)
    return 4;
  limit.rlim_cur = RLIM_INFINITY;
  e = (struct err){0};
  while (!audit_lost(a))
    usleep(1000);
  if (setrlimit(RLIMIT_FSIZE, &limit) || audit_lost(a) != 1 || audit_add(a, &r, &e) || audit_activated(a, "default", DIGEST, "[]", &number, &e))
    return 5;
  audit_close(a);
  return audit_verify(dir, NULL, &w, &e) || w.bad || w.count != good + 2 || number != 1 ? 6 : 0;
}

static void test_full_disk(void **state)
{
  int status;
  pid_t child;

  (void)state;
  child = fork();
  if (!child)
    _exit(fill_disk());
  assert_int_equal(waitpid(child, &status, 0), child);
  assert_true(WIFEXITED(status));
  assert_int_equal(WEXITSTATUS(status), 0);
}

/* A transaction that failed and whose head cannot be read again has moved nothing: the next record follows the last one in the file. */
static void test_cancel_without_memory(void **state)
{
  static const unsigned char key[AUDIT_KEY] = {1};
  struct audit_walk w = {0};
  struct audit_db *d;
  struct err e = {0};

  (void)state;
  assert_int_equal(audit_db_open(&d, dir, key, &e), 0);
  assert_int_equal(audit_db_begin(d, &e) || audit_db_append(d, "start", "}", &e) || audit_db_commit(d, &e), 0);
  assert_int_equal(audit_db_begin(d, &e) || audit_db_append(d, "start", "}", &e) || audit_db_append(d, "start", "}", &e), 0);
  sqlite3_hard_heap_limit64(1);
  audit_db_cancel(d);
  sqlite3_hard_heap_limit64(0);
  if (audit_db_begin(d, &e) || audit_db_append(d, "start", "}", &e) || audit_db_commit(d, &e))
    fail_msg("%s", e.msg);
  assert_int_equal(audit_db_walk(d, key, NULL, &w, &e), 0);
  assert_int_equal(w.bad, 0);
  assert_int_equal(w.count, 2);
  audit_db_close(d);
}

#define WITH_DIR(f) cmocka_unit_test_setup_teardown(f, setup, teardown)

int main(void)
{
  const struct CMUnitTest tests[] = {
      WITH_DIR(test_fields),      WITH_DIR(test_prompts),     WITH_DIR(test_chain),
      WITH_DIR(test_activations), WITH_DIR(test_triggers),    WITH_DIR(test_tampering),
      WITH_DIR(test_open_checks_the_end), WITH_DIR(test_anchor), WITH_DIR(test_folder),
      WITH_DIR(test_read_only_folder), WITH_DIR(test_damage), WITH_DIR(test_concurrent),
      WITH_DIR(test_notes_are_bounded), WITH_DIR(test_kill),        WITH_DIR(test_full_disk),
      WITH_DIR(test_cancel_without_memory),
  };

  return sodium_init() < 0 ? 1 : cmocka_run_group_tests(tests, NULL, NULL);
}
