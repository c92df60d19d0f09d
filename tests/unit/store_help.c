/*
 * store_help.c - see store_help.h. Called by test_store.c and test_store_faults.c. Threads: the test's.
 */
#include "store_help.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>
#include <dirent.h>
#include <ftw.h>
#include <sqlite3.h>
#include <sys/stat.h>
#include <unistd.h>

enum { DATA = 1 << 20 };

char help_dir[64];
_Atomic int64_t help_now;

static int64_t now(void)
{
  return help_now;
}

static int remove_one(const char *path, const struct stat *st, int type, struct FTW *at)
{
  (void)st, (void)type, (void)at;
  return remove(path);
}

int help_setup(void **state)
{
  (void)state;
  help_now = 1000 * HELP_DAY;
  snprintf(help_dir, sizeof help_dir, "test_store.XXXXXX");
  return mkdtemp(help_dir) ? 0 : -1;
}

int help_teardown(void **state)
{
  (void)state;
  return nftw(help_dir, remove_one, 8, FTW_DEPTH | FTW_PHYS);
}

const char *help_in_dir(const char *name)
{
  static char path[160];

  snprintf(path, sizeof path, "%s/%s", help_dir, name);
  return path;
}

int help_sql(const char *text)
{
  sqlite3 *db;
  int code;

  assert_int_equal(sqlite3_open(help_in_dir("jobs.db"), &db), SQLITE_OK);
  sqlite3_busy_timeout(db, 10000);
  code = sqlite3_exec(db, text, NULL, NULL, NULL);
  sqlite3_close(db);
  return code;
}

int help_count_results(void)
{
  DIR *d = opendir(help_in_dir("results"));
  struct dirent *entry;
  int n = 0;

  assert_non_null(d);
  while ((entry = readdir(d)))
    n += entry->d_name[0] != '.';
  closedir(d);
  return n;
}

struct store_limits help_limits(void)
{
  return (struct store_limits){.results_ms = 3600000, .history_ms = 7 * HELP_DAY, .results_bytes = 1 << 20, .now_ms = now};
}

struct store *help_open(void)
{
  struct store_limits limits = help_limits();
  struct store *s = NULL;
  struct err e = {0};

  if (store_open(&s, help_dir, &limits, &e))
    fail_msg("store_open: %s", e.msg);
  return s;
}

static void set(char *out, size_t cap, const char *value)
{
  snprintf(out, cap, "%s", value);
}

int help_add(struct store *s, const char *id, const char *key, const char *body, int *is_existing)
{
  struct store_op op = {.verb = STORE_ADD, .job = {.seed = UINT64_MAX - 7, .priority = 3, .body = body, .body_len = strlen(body)}};
  struct err e = {0};
  int r;

  set(op.job.id, sizeof op.job.id, id);
  set(op.job.tenant, sizeof op.job.tenant, "shop");
  set(op.job.profile, sizeof op.job.profile, "default");
  set(op.job.key, sizeof op.job.key, key ? key : "");
  set(op.job.type, sizeof op.job.type, "application/json");
  r = store_run(s, &op, &e);
  if (is_existing)
    *is_existing = op.is_existing;
  store_job_close(&op.found);
  return r;
}

static int run_id(struct store *s, enum store_verb verb, const char *id)
{
  struct store_op op = {.verb = verb};
  struct err e = {0};

  set(op.job.id, sizeof op.job.id, id);
  return store_run(s, &op, &e);
}

int help_start(struct store *s, const char *id)
{
  return run_id(s, STORE_START, id);
}

int help_put_back(struct store *s, const char *id)
{
  return run_id(s, STORE_PUT_BACK, id);
}

/* Where the content of file n of a job begins in what all share: bytes that say which. */
static const char *data_of(const char *id, int n)
{
  static char data[DATA + 4096];
  unsigned at = (unsigned)n * 131;

  if (!data[0])
    for (unsigned i = 0, x = 1; i < sizeof data; i++, x = x * 1664525u + 1013904223u)
      data[i] = (char)(x >> 24 | 1);
  for (const char *p = id; *p; p++)
    at = at * 31 + (unsigned char)*p;
  return data + at % 4096;
}

void help_finish_op(struct store_op *op, const char *id, int n, size_t bytes)
{
  *op = (struct store_op){.verb = STORE_FINISH, .job = {.state = STORE_SUCCEEDED, .n_files = n, .answer = "{\"steps\":20}"}};
  set(op->job.id, sizeof op->job.id, id);
  set(op->job.generation_id, sizeof op->job.generation_id, "7-3fa9c1d2");
  set(op->job.generation_digest, sizeof op->job.generation_digest, "3fa9c1d2aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa");
  assert_true(bytes <= DATA);
  for (int i = 0; i < n; i++)
    op->job.file[i] = (struct store_file){.format = (enum image_format)(i % 3), .data = data_of(id, i), .bytes = bytes};
}

int help_finish(struct store *s, const char *id, int n, size_t bytes, int *is_existing)
{
  struct store_op op;
  struct err e = {0};
  int r;

  help_finish_op(&op, id, n, bytes);
  r = store_run(s, &op, &e);
  if (is_existing)
    *is_existing = op.is_existing;
  return r;
}

int help_fail(struct store *s, const char *id, enum store_state state, const char *code)
{
  struct store_op op = {.verb = STORE_FINISH, .job = {.state = state}};
  struct err e = {0};

  set(op.job.id, sizeof op.job.id, id);
  set(op.job.error_code, sizeof op.job.error_code, code);
  set(op.job.error_text, sizeof op.job.error_text, "why it failed");
  return store_run(s, &op, &e);
}

int help_find(struct store *s, const char *id, struct store_job *out)
{
  struct store_op op = {.verb = STORE_FIND};
  struct err e = {0};
  int r;

  set(op.job.id, sizeof op.job.id, id);
  set(op.job.tenant, sizeof op.job.tenant, "shop");
  r = store_run(s, &op, &e);
  *out = op.found;
  return r;
}

enum store_state help_state(struct store *s, const char *id)
{
  struct store_job j;

  if (help_find(s, id, &j))
    fail_msg("there is no job %s", id);
  store_job_close(&j);
  return j.state;
}

int help_holds(struct store *s, const char *name, const char *id, int n, size_t bytes)
{
  struct store_file f;
  struct err e = {0};
  char *got;
  int fd, same;

  if (store_open_file(s, name, &f, &fd, &e))
    return 0;
  got = malloc(bytes + 1);
  assert_non_null(got);
  same = read(fd, got, bytes + 1) == (ssize_t)bytes && f.bytes == bytes && !memcmp(got, data_of(id, n), bytes);
  free(got);
  close(fd);
  return same;
}
