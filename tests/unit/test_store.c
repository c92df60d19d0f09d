/*
 * test_store.c - the job store when nothing goes wrong with the disk: the way of a job, idempotency, what comes back after a restart, expiry, bounds,
 * files, many callers. test_store_faults.c has the rest. Threads: some tests start callers.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>
#include <fcntl.h>
#include <pthread.h>
#include <sqlite3.h>
#include <sys/stat.h>
#include <unistd.h>

#include "server/thread.h"
#include "store_help.h"

#define ok(x) assert_int_equal(x, 0)

/* ---- one job ---- */

static void test_way(void **state)
{
  struct store *s = help_open();
  struct store_job j;

  (void)state;
  ok(help_add(s, "job_a", NULL, "{\"prompt\":\"a\"}", NULL));
  ok(help_find(s, "job_a", &j));
  assert_int_equal(j.state, STORE_QUEUED);
  assert_true(j.seed == UINT64_MAX - 7 && j.priority == 3 && j.created_ms == help_now && !j.started_ms && !j.attempts && !j.n_files && !*j.answer);
  assert_string_equal(j.profile, "default");
  store_job_close(&j);
  help_now += 5;
  ok(help_start(s, "job_a"));
  assert_int_equal(help_state(s, "job_a"), STORE_RUNNING);
  assert_int_equal(help_start(s, "job_a"), E_NOTFOUND); /* it is not queued */
  help_now += 5;
  ok(help_finish(s, "job_a", 3, 1000, NULL));
  ok(help_find(s, "job_a", &j));
  assert_int_equal(j.state, STORE_SUCCEEDED);
  assert_true(j.attempts == 1 && j.started_ms == help_now - 5 && j.finished_ms == help_now && j.n_files == 3);
  assert_string_equal(j.answer, "{\"steps\":20}");
  assert_string_equal(j.generation_id, "7-3fa9c1d2");
  assert_int_equal(strlen(j.generation_digest), 64);
  for (int i = 0; i < 3; i++) {
    assert_true(help_holds(s, j.file[i].name, "job_a", i, 1000));
    assert_true(j.file[i].bytes == 1000 && strlen(j.file[i].digest) == 64 && j.file[i].expires_ms == help_now + 3600000);
    assert_string_equal(strchr(j.file[i].name, '.'), ((const char *[]){".png", ".jpg", ".webp"})[i]);
  }
  assert_string_not_equal(j.file[0].name, j.file[1].name);
  store_job_close(&j);
  store_close(s);
}

/* Whoever comes second changes nothing: a result after a cancellation, a cancellation after a result, the same result twice. */
static void test_finished_once(void **state)
{
  struct store *s = help_open();
  struct store_status st;
  struct store_job j;
  int existing = -1;

  (void)state;
  ok(help_add(s, "done", NULL, "{}", NULL));
  ok(help_finish(s, "done", 1, 100, &existing));
  assert_int_equal(existing, 0);
  ok(help_finish(s, "done", 2, 100, &existing));
  assert_int_equal(existing, 1);
  ok(help_fail(s, "done", STORE_CANCELLED, "cancelled"));
  ok(help_find(s, "done", &j));
  assert_true(j.state == STORE_SUCCEEDED && j.n_files == 1 && !j.error_code[0]);
  store_job_close(&j);
  ok(help_add(s, "gone", NULL, "{}", NULL));
  ok(help_fail(s, "gone", STORE_CANCELLED, "cancelled"));
  ok(help_finish(s, "gone", 1, 100, &existing));
  assert_int_equal(existing, 1);
  ok(help_find(s, "gone", &j));
  assert_true(j.state == STORE_CANCELLED && !j.n_files);
  assert_string_equal(j.error_code, "cancelled");
  store_job_close(&j);
  assert_int_equal(help_finish(s, "never", 1, 100, NULL), E_NOTFOUND);
  assert_int_equal(help_count_results(), 1); /* the others' files are gone */
  store_close(s);
  s = help_open();
  store_get_status(s, &st);
  assert_true(st.bytes == 100 && st.unfinished == 0);
  store_close(s);
}

static void test_nobody_elses(void **state)
{
  struct store *s = help_open();
  struct store_op op = {.verb = STORE_FIND, .job = {.id = "job_a", .tenant = "other"}};
  struct err e = {0};

  (void)state;
  ok(help_add(s, "job_a", NULL, "{}", NULL));
  assert_int_equal(store_run(s, &op, &e), E_NOTFOUND);
  assert_null(op.found.owned);
  assert_int_equal(help_add(s, "job_a", NULL, "{}", NULL), E_INTERNAL); /* ids are the server's */
  store_close(s);
}

/* ---- idempotency ---- */

static int add_as(struct store *s, const char *tenant, const char *id, const char *key, const char *type, const char *body, char found[STORE_ID + 1])
{
  struct store_op op = {.verb = STORE_ADD, .job = {.body = body, .body_len = strlen(body)}};
  struct err e = {0};
  int r;

  snprintf(op.job.id, sizeof op.job.id, "%s", id);
  snprintf(op.job.tenant, sizeof op.job.tenant, "%s", tenant);
  snprintf(op.job.key, sizeof op.job.key, "%s", key);
  snprintf(op.job.type, sizeof op.job.type, "%s", type);
  r = store_run(s, &op, &e);
  if (r == E_CONFLICT)
    assert_non_null(strstr(e.msg, "use a new key"));
  memcpy(found, op.found.id, STORE_ID + 1);
  store_job_close(&op.found);
  return r;
}

static void test_idempotency(void **state)
{
  struct store *s = help_open();
  struct store_op find = {.verb = STORE_FIND, .job = {.tenant = "a", .key = "k", .type = "t", .body = "body", .body_len = 4}};
  struct err e = {0};
  char id[STORE_ID + 1];

  (void)state;
  ok(add_as(s, "a", "1", "k", "t", "body", id));
  ok(add_as(s, "a", "2", "k", "t", "body", id));
  assert_string_equal(id, "1");
  assert_int_equal(add_as(s, "a", "3", "k", "t", "another", id), E_CONFLICT);
  assert_int_equal(add_as(s, "a", "3", "k", "tb", "ody", id), E_CONFLICT); /* type and body are told apart */
  ok(add_as(s, "b", "4", "k", "t", "another", id));                          /* another tenant's key is another key */
  assert_string_equal(id, "4");
  ok(add_as(s, "a", "5", "", "t", "body", id));
  ok(add_as(s, "a", "6", "", "t", "body", id)); /* no key: every one is new */
  assert_string_equal(id, "6");
  ok(help_finish(s, "1", 1, 10, NULL));
  store_close(s);
  s = help_open(); /* keys live as long as the job's history */
  ok(add_as(s, "a", "7", "k", "t", "body", id));
  assert_string_equal(id, "1");
  assert_int_equal(add_as(s, "a", "7", "k", "t", "", id), E_CONFLICT);
  ok(store_run(s, &find, &e));
  assert_true(!strcmp(find.found.id, "1") && find.found.state == STORE_SUCCEEDED && find.found.n_files == 1);
  store_job_close(&find.found);
  find.job.body_len = 3;
  assert_int_equal(store_run(s, &find, &e), E_CONFLICT);
  e = (struct err){0};
  memcpy(find.job.key, "x", 2);
  assert_int_equal(store_run(s, &find, &e), E_NOTFOUND);
  store_close(s);
}

/* ---- after a restart ---- */

static void assert_next(struct store *s, int64_t *seq, const char *id, const char *body)
{
  struct store_op op = {.verb = STORE_NEXT, .job = {.seq = *seq}};
  struct err e = {0};

  if (!id) {
    assert_int_equal(store_run(s, &op, &e), E_NOTFOUND);
    return;
  }
  ok(store_run(s, &op, &e));
  assert_string_equal(op.found.id, id);
  assert_int_equal(op.found.body_len, strlen(body));
  assert_memory_equal(op.found.body, body, strlen(body));
  assert_string_equal(op.found.type, "application/json");
  assert_true(op.found.seed == UINT64_MAX - 7);
  *seq = op.found.seq;
  store_job_close(&op.found);
}

static void test_restart(void **state)
{
  struct store *s = help_open();
  int64_t seq = 0;

  (void)state;
  for (int i = 0; i < 5; i++)
    ok(help_add(s, (const char *[]){"e", "d", "c", "b", "a"}[i], NULL, (const char *[]){"5", "4", "", "2", "1"}[i], NULL));
  ok(help_start(s, "d"));
  ok(help_start(s, "b"));
  ok(help_finish(s, "e", 1, 10, NULL));
  ok(help_fail(s, "b", STORE_FAILED, "out_of_memory"));
  assert_next(s, &seq, NULL, NULL); /* what came since the start is not what was left over */
  store_close(s);                   /* to the file it is a crash */
  s = help_open();
  ok(help_add(s, "new", NULL, "6", NULL));
  assert_next(s, &seq, "d", "4");
  assert_next(s, &seq, "c", "");
  assert_next(s, &seq, "a", "1");
  assert_next(s, &seq, NULL, NULL);
  assert_int_equal(help_state(s, "d"), STORE_QUEUED);
  assert_int_equal(help_state(s, "e"), STORE_SUCCEEDED);
  assert_int_equal(help_state(s, "b"), STORE_FAILED);
  store_close(s);
}

/* A job that takes the process with it is tried three times; one that only waited, or was put back by an orderly end, for ever. */
static void test_attempts(void **state)
{
  struct store_job j;
  struct store *s = help_open();

  (void)state;
  ok(help_add(s, "bad", NULL, "{}", NULL));
  ok(help_add(s, "waits", NULL, "{}", NULL));
  ok(help_add(s, "drained", NULL, "{}", NULL));
  for (int i = 0; i < 5; i++) {
    assert_int_equal(help_start(s, "bad"), i < STORE_ATTEMPTS ? 0 : E_NOTFOUND);
    ok(help_start(s, "drained"));
    ok(help_put_back(s, "drained"));
    store_close(s);
    s = help_open();
    assert_int_equal(help_state(s, "bad"), i < STORE_ATTEMPTS - 1 ? STORE_QUEUED : STORE_FAILED);
    assert_int_equal(help_state(s, "waits"), STORE_QUEUED);
    assert_int_equal(help_state(s, "drained"), STORE_QUEUED);
  }
  ok(help_find(s, "bad", &j));
  assert_string_equal(j.error_code, "crashed");
  assert_true(j.attempts == 3 && j.finished_ms && strstr(j.error_text, "3 attempts"));
  store_job_close(&j);
  store_close(s);
}

/* ---- expiry and bounds ---- */

static void test_expiry(void **state)
{
  struct store *s = help_open();
  struct store_file url = {.format = IMAGE_PNG, .data = "picture", .bytes = 7};
  struct store_job j;
  struct err e = {0};
  char name[STORE_NAME];
  int fd;

  (void)state;
  ok(help_add(s, "old", "k", "{}", NULL));
  ok(help_add(s, "waits", NULL, "{}", NULL));
  ok(help_finish(s, "old", 2, 100, NULL));
  ok(store_put_file(s, &url, &e));
  assert_true(store_is_name(url.name) && url.expires_ms == help_now + 3600000);
  ok(help_find(s, "old", &j));
  memcpy(name, j.file[1].name, sizeof name);
  store_job_close(&j);
  help_now += 3599999;
  assert_true(help_holds(s, name, "old", 1, 100));
  help_now += 1;
  assert_int_equal(store_open_file(s, name, &url, &fd, &e), E_NOTFOUND);
  e = (struct err){0};
  assert_int_equal(store_open_file(s, url.name, &url, &fd, &e), E_NOTFOUND);
  help_now += 1000;
  ok(help_find(s, "old", &j)); /* the history is longer than the results */
  assert_true(j.state == STORE_SUCCEEDED && j.n_files == 2 && !j.file[0].name[0] && !j.file[1].name[0]);
  store_job_close(&j);
  assert_int_equal(help_count_results(), 0);
  help_now += 7 * HELP_DAY;
  ok(help_find(s, "waits", &j)); /* does what has expired too, and is never expired itself */
  assert_int_equal(j.state, STORE_QUEUED);
  store_job_close(&j);
  assert_int_equal(help_find(s, "old", &j), E_NOTFOUND);
  ok(help_add(s, "again", "k", "{\"another\":1}", NULL)); /* its key is free again */
  store_close(s);
}

/* More than one portion goes without anybody asking. */
static void test_expiry_alone(void **state)
{
  struct store *s = help_open();
  struct store_status st;

  (void)state;
  for (int i = 0; i < 14; i++) {
    char id[16];
    snprintf(id, sizeof id, "j%d", i);
    ok(help_add(s, id, NULL, "{}", NULL));
    ok(help_finish(s, id, 5, 10, NULL));
  }
  assert_int_equal(help_count_results(), 70);
  help_now += 8 * HELP_DAY;
  do {
    usleep(1000);
    store_get_status(s, &st);
  } while (st.expired_files < 70);
  assert_int_equal(help_count_results(), 0);
  assert_true(st.bytes == 0);
  store_close(s);
}

/* How many jobs have a body, behind the store's back. */
static void assert_bodies(int n)
{
  char text[192];

  snprintf(text, sizeof text, "CREATE TABLE t (n INTEGER CHECK (n = %d)); INSERT INTO t SELECT count(*) FROM job WHERE length(body) > 0; DROP TABLE t", n);
  assert_int_equal(help_sql(text), SQLITE_OK);
}

static void test_prompts_are_dropped(void **state)
{
  struct store *s = help_open();

  (void)state;
  ok(help_add(s, "a", NULL, "{\"prompt\":\"private\"}", NULL));
  ok(help_add(s, "b", NULL, "{\"prompt\":\"private\"}", NULL));
  assert_bodies(2);
  ok(help_fail(s, "a", STORE_FAILED, "x"));
  ok(help_finish(s, "b", 1, 10, NULL));
  assert_bodies(0);
  store_close(s);
}

static void test_bytes(void **state)
{
  struct store *s = help_open();
  struct store_status st;
  struct store_job j;

  (void)state;
  for (int i = 0; i < 12; i++) {
    char id[16];
    snprintf(id, sizeof id, "j%d", i);
    help_now += 1;
    ok(help_add(s, id, NULL, "{}", NULL));
    ok(help_finish(s, id, 1, 100 << 10, NULL));
  }
  ok(help_find(s, "j1", &j)); /* 1 MB holds ten of 100 kB: the two oldest made room */
  assert_true(j.state == STORE_SUCCEEDED && j.n_files == 1 && !j.file[0].name[0]);
  store_job_close(&j);
  for (int i = 2; i < 12; i++) {
    char id[16];
    snprintf(id, sizeof id, "j%d", i);
    ok(help_find(s, id, &j));
    assert_true(help_holds(s, j.file[0].name, id, 0, 100 << 10));
    store_job_close(&j);
  }
  assert_int_equal(help_count_results(), 10);
  ok(help_add(s, "huge", NULL, "{}", NULL));
  assert_int_equal(help_finish(s, "huge", 2, 600 << 10, NULL), E_TOOBIG);
  assert_int_equal(help_state(s, "huge"), STORE_QUEUED);
  assert_int_equal(help_count_results(), 10); /* nobody had to go for what does not fit at all */
  store_get_status(s, &st);
  assert_true(st.bytes == 1000 << 10);
  store_close(s);
}

/* ---- files ---- */

static void test_names(void **state)
{
  static const char *const bad[] = {
      "", ".", "..", "a.png", "0123456789abcdef0123456789abcdef", "0123456789abcdef0123456789abcdef.gif", "0123456789ABCDEF0123456789abcdef.png",
      "0123456789abcdef0123456789abcde.png", "0123456789abcdef0123456789abcdef0.png", "0123456789abcdef0123456789abcdef.png/",
      "../456789abcdef0123456789abcdef01.png", "0123456789abcdef0123456789abcdef.png.png", "0123456789abcdef0123456789abcdef.png "};
  struct store *s = help_open();
  struct store_file f;
  int fd;

  (void)state;
  for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
    struct err e = {0};
    assert_int_equal(store_is_name(bad[i]), 0);
    assert_int_equal(store_open_file(s, bad[i], &f, &fd, &e), E_NOTFOUND);
  }
  assert_int_equal(store_is_name("0123456789abcdef0123456789abcdef.webp"), 1);
  for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) { /* the same from a thread that may not wait */
    struct store_op op = {.verb = STORE_OPEN_FILE};
    struct err e = {0};
    snprintf(op.job.file[0].name, sizeof op.job.file[0].name, "%s", bad[i]);
    assert_int_equal(store_run(s, &op, &e), E_NOTFOUND);
    assert_int_equal(op.fd, -1);
  }
  store_close(s);
}

/* A file that was cut, replaced by a link or taken away is not served; one that no row names is removed at the start. */
static void test_damage(void **state)
{
  struct store *s = help_open();
  char path[160], cut[STORE_NAME], gone[STORE_NAME], linked[STORE_NAME];
  struct store_job j;
  int fd;

  (void)state;
  ok(help_add(s, "a", NULL, "{}", NULL));
  ok(help_finish(s, "a", 3, 500, NULL));
  ok(help_find(s, "a", &j));
  memcpy(cut, j.file[0].name, sizeof cut);
  memcpy(gone, j.file[1].name, sizeof gone);
  memcpy(linked, j.file[2].name, sizeof linked);
  store_job_close(&j);
  store_close(s);
  snprintf(path, sizeof path, "%s/results/%s", help_dir, cut);
  ok(truncate(path, 499));
  snprintf(path, sizeof path, "%s/results/%s", help_dir, gone);
  ok(unlink(path));
  snprintf(path, sizeof path, "%s/results/%s", help_dir, linked);
  ok(unlink(path));
  ok(symlink("/etc/passwd", path));
  fd = open(help_in_dir("results/0123456789abcdef0123456789abcdef.png"), O_WRONLY | O_CREAT, 0600);
  assert_true(fd >= 0);
  close(fd);
  fd = open(help_in_dir("results/README"), O_WRONLY | O_CREAT, 0600);
  close(fd);
  s = help_open();
  assert_false(help_holds(s, cut, "a", 0, 499));
  assert_false(help_holds(s, cut, "a", 0, 500));
  assert_false(help_holds(s, gone, "a", 1, 500));
  assert_false(help_holds(s, linked, "a", 2, 500));
  assert_int_equal(access(help_in_dir("results/0123456789abcdef0123456789abcdef.png"), F_OK), -1);
  ok(access(help_in_dir("results/README"), F_OK)); /* not ours */
  store_close(s);
}

static void open_fails(int code, const char *says)
{
  struct store_limits limits = help_limits();
  struct store *s;
  struct err e = {0};

  if (store_open(&s, help_dir, &limits, &e) != code || !strstr(e.msg, says))
    fail_msg("%d \"%s\" does not say \"%s\"", e.code, e.msg, says);
  assert_null(s);
}

static void test_open_refuses(void **state)
{
  struct store *s = help_open();
  int fd;

  (void)state;
  ok(help_add(s, "a", NULL, "{}", NULL));
  ok(help_finish(s, "a", 1, 500, NULL));
  store_close(s);
  ok(help_sql("UPDATE file SET format = 3"));
  open_fails(E_FILE, "is damaged");
  ok(help_sql("DELETE FROM file"));
  store_close(help_open()); /* which removes what no row names */
  ok(help_sql("PRAGMA user_version = 3"));
  open_fails(E_FILE, "is of version 3 and this program writes version 2");
  ok(help_sql("PRAGMA user_version = 2; PRAGMA application_id = 5"));
  open_fails(E_FILE, "another program's database");
  ok(unlink(help_in_dir("jobs.db")));
  fd = open(help_in_dir("jobs.db"), O_WRONLY | O_CREAT, 0600);
  assert_true(write(fd, "this is no database, whatever its name may be", 45) == 45);
  close(fd);
  open_fails(E_FILE, "not a database");
  ok(unlink(help_in_dir("jobs.db")));
  ok(chmod(help_in_dir("results"), 0777));
  open_fails(E_FILE, "others may write to");
  ok(rmdir(help_in_dir("results")));
  fd = open(help_in_dir("results"), O_WRONLY | O_CREAT, 0600);
  close(fd);
  open_fails(E_FILE, "cannot use");
}

/* ---- many callers ---- */

enum { CALLERS = 8, EACH = 12 };

struct caller {
  struct store *s;
  int n, made, met;
};

static void *call(void *arg)
{
  struct caller *c = arg;
  char id[32], key[32];

  for (int i = 0; i < EACH; i++) {
    struct store_job j;
    int existing;
    snprintf(id, sizeof id, "c%d-%d", c->n, i);
    snprintf(key, sizeof key, "k%d", i); /* the same key from everybody: one of them makes the job */
    if (help_add(c->s, id, key, "{}", &existing))
      return "add";
    c->made += !existing;
    c->met += existing;
    if (existing)
      continue;
    if (help_start(c->s, id) || help_finish(c->s, id, 1, 200, NULL) || help_find(c->s, id, &j))
      return "finish";
    if (j.state != STORE_SUCCEEDED || !help_holds(c->s, j.file[0].name, id, 0, 200))
      return "file";
    store_job_close(&j);
  }
  return NULL;
}

static void test_callers(void **state)
{
  struct store *s = help_open();
  struct caller c[CALLERS];
  pthread_t t[CALLERS];
  int made = 0, met = 0;

  (void)state;
  ok(help_add(s, "warm", NULL, "{}", NULL)); /* the helper's data is made by one thread */
  ok(help_finish(s, "warm", 1, 1, NULL));
  for (int i = 0; i < CALLERS; i++) {
    c[i] = (struct caller){.s = s, .n = i};
    ok(pthread_create(&t[i], NULL, call, &c[i]));
  }
  for (int i = 0; i < CALLERS; i++) {
    void *failed;
    pthread_join(t[i], &failed);
    if (failed)
      fail_msg("%s", (const char *)failed);
    made += c[i].made;
    met += c[i].met;
  }
  assert_int_equal(made, EACH);
  assert_int_equal(met, EACH * (CALLERS - 1));
  store_close(s);
}

struct burst {
  struct store_op op[64];
  _Atomic int done, late;
  pthread_t caller;
};

static void count_done(struct store_op *op)
{
  struct burst *b = op->arg;

  b->late += pthread_equal(pthread_self(), b->caller);
  b->done++;
}

/* What was submitted is done before store_close returns, on the store's thread. */
static void test_close_finishes(void **state)
{
  struct store *s = help_open();
  static struct burst b;

  (void)state;
  b = (struct burst){.caller = pthread_self()};
  for (int i = 0; i < 64; i++) {
    b.op[i] = (struct store_op){.verb = STORE_ADD, .job = {.body = "{}", .body_len = 2}, .done = count_done, .arg = &b};
    snprintf(b.op[i].job.id, sizeof b.op[i].job.id, "%02d", i);
    store_submit(s, &b.op[i]);
  }
  store_close(s);
  assert_int_equal(b.done, 64);
  assert_int_equal(b.late, 0);
  for (int i = 0; i < 64; i++) {
    ok(b.op[i].err.code);
    assert_int_equal(b.op[i].found.seq, i + 1);
    store_job_close(&b.op[i].found);
  }
}

/* ---- how many jobs a second are accepted; says it, holds nobody to it ---- */

static void *accept_some(void *arg)
{
  struct caller *c = arg;
  char id[32];

  for (int i = 0; i < c->made; i++) {
    snprintf(id, sizeof id, "a%d-%d", c->n, i);
    if (help_add(c->s, id, NULL, "{\"prompt\":\"a red apple on a wooden table\",\"steps\":20,\"seed\":1}", NULL))
      return "add";
  }
  return NULL;
}

static void accept_with(int callers, int each)
{
  struct store *s = help_open();
  struct caller c[32];
  pthread_t t[32];
  void *failed = NULL;
  int64_t from = clock_ns();

  for (int i = 0; i < callers; i++) {
    c[i] = (struct caller){.s = s, .n = callers * 100 + i, .made = each};
    ok(pthread_create(&t[i], NULL, accept_some, &c[i]));
  }
  for (int i = 0; i < callers; i++) {
    pthread_join(t[i], &failed);
    assert_null(failed);
  }
  print_message("# %d waiting callers: %.0f accepted jobs a second\n", callers, callers * each * 1e9 / (double)(clock_ns() - from));
  store_close(s);
}

static void test_speed(void **state)
{
  (void)state;
  accept_with(1, 50);
  accept_with(32, 10);
}

#define IN_DIR(f) cmocka_unit_test_setup_teardown(f, help_setup, help_teardown)

int main(void)
{
  const struct CMUnitTest tests[] = {
      IN_DIR(test_way),     IN_DIR(test_finished_once), IN_DIR(test_nobody_elses),        IN_DIR(test_idempotency), IN_DIR(test_restart),
      IN_DIR(test_attempts), IN_DIR(test_expiry),        IN_DIR(test_expiry_alone),        IN_DIR(test_prompts_are_dropped), IN_DIR(test_bytes),
      IN_DIR(test_names),   IN_DIR(test_damage),        IN_DIR(test_open_refuses),        IN_DIR(test_callers),     IN_DIR(test_close_finishes),
      IN_DIR(test_speed),
  };

  return cmocka_run_group_tests(tests, NULL, NULL);
}
