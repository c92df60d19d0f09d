/*
 * test_store_faults.c - the job store when the process, the power or the disk goes: at every system call that changes a file.
 *
 * write, fsync and their like are this program's own here, for SQLite as for the store. Each counts; the one whose number is `fault_at` ends the process
 * (half of a write done), or ends it and undoes what no fsync made durable (a power cut), or fails with fault_errno, as do those after it. Otherwise fsync
 * only keeps the books, so that hundreds of crashes take no time.
 *
 * Threads: the store's and the test's; the books are under a lock.
 */
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
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "store_help.h"

#define ok(x) assert_int_equal(x, 0)

/* ---- the disk ---- */

enum fault { NONE, CRASH, POWER_CUT, FAIL };
enum { DIED = 77, FILES = 64 };

/* A file that was written or made since the start: what of it is durable. */
struct tracked {
  char path[256];
  ino_t ino;
  off_t durable;      /* bytes */
  int has_entry;      /* its folder was made durable after it */
};

static pthread_mutex_t mu = PTHREAD_MUTEX_INITIALIZER;
static struct tracked tracked[FILES];
static int n_tracked;
static enum fault fault;
static int fault_at, fault_errno, is_fault_once;
static _Atomic int fault_count;

int fsync(int fd);
int fdatasync(int fd);
ssize_t write(int fd, const void *p, size_t n);
ssize_t pwrite64(int fd, const void *p, size_t n, off_t at);
int ftruncate64(int fd, off_t n);
int unlink(const char *path);
int unlinkat(int dir, const char *path, int flags);

/* NULL: it is no file of the store's. By its path too: a new file gets the number of one that was removed. */
static struct tracked *track(int fd)
{
  char link[64], path[256];
  struct stat st;
  ssize_t n;
  struct tracked *t;

  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  n = readlink(link, path, sizeof path - 1);
  path[n > 0 ? n : 0] = 0;
  if (fstat(fd, &st) || !S_ISREG(st.st_mode) || !strstr(path, "test_store."))
    return NULL;
  for (int i = 0; i < n_tracked; i++)
    if (tracked[i].ino == st.st_ino && !strcmp(tracked[i].path, path))
      return &tracked[i];
  if (n_tracked == FILES)
    syscall(SYS_exit_group, 1);
  t = &tracked[n_tracked++];
  *t = (struct tracked){.ino = st.st_ino};
  memcpy(t->path, path, sizeof path);
  return t;
}

/* What a disk shows that lost its power: no byte and no name that was not made durable. */
static void lose_power(void)
{
  for (int i = 0; i < n_tracked; i++) {
    struct tracked *t = &tracked[i];
    struct stat st;
    if (strstr(t->path, "-shm") || stat(t->path, &st) || st.st_ino != t->ino)
      continue; /* the shared memory's file is made anew at every start */
    if (!t->has_entry)
      syscall(SYS_unlink, t->path);
    else if (st.st_size > t->durable)
      syscall(SYS_truncate, t->path, t->durable);
  }
}

/* 1: this call is to fail. */
static int is_hit(void)
{
  int n;

  if (fault == NONE)
    return 0;
  n = ++fault_count;
  if (fault == FAIL) {
    errno = fault_errno;
    return fault_at && (is_fault_once ? n == fault_at : n >= fault_at);
  }
  return n == fault_at;
}

static void die(void)
{
  if (fault == POWER_CUT)
    lose_power();
  syscall(SYS_exit_group, DIED);
}

static ssize_t do_write(int fd, const void *p, size_t n, off_t at, int has_at)
{
  ssize_t r;
  int hit;

  pthread_mutex_lock(&mu);
  hit = fault != NONE && track(fd) && is_hit();
  if (hit && fault == FAIL) {
    pthread_mutex_unlock(&mu);
    return -1;
  }
  if (hit)
    n /= 2;
  r = has_at ? syscall(SYS_pwrite64, fd, p, n, at) : syscall(SYS_write, fd, p, n);
  if (hit)
    die();
  pthread_mutex_unlock(&mu);
  return r;
}

ssize_t write(int fd, const void *p, size_t n)
{
  return do_write(fd, p, n, 0, 0);
}

ssize_t pwrite64(int fd, const void *p, size_t n, off_t at)
{
  return do_write(fd, p, n, at, 1);
}

/* A folder: all names in it are durable. A file: its bytes are. */
static void make_durable(int fd)
{
  struct tracked *t = fault == NONE ? NULL : track(fd);
  struct stat st;
  char link[64], path[256];
  ssize_t n;

  if (fstat(fd, &st))
    return;
  if (t)
    t->durable = st.st_size;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  n = S_ISDIR(st.st_mode) ? readlink(link, path, sizeof path - 1) : -1;
  for (int i = 0; i < n_tracked && n > 0; i++)
    tracked[i].has_entry |= !strncmp(tracked[i].path, path, (size_t)n) && tracked[i].path[n] == '/' && !strchr(tracked[i].path + n + 1, '/');
}

static int sync_file(int fd)
{
  int r = 0;

  pthread_mutex_lock(&mu);
  if (!is_hit())
    make_durable(fd);
  else if (fault == FAIL)
    r = -1;
  else
    die();
  pthread_mutex_unlock(&mu);
  return r;
}

int fsync(int fd)
{
  return sync_file(fd);
}

int fdatasync(int fd)
{
  return sync_file(fd);
}

/* Those that change a file in one stroke: 1 to fail. */
static int is_refused(void)
{
  int hit;

  pthread_mutex_lock(&mu);
  hit = is_hit();
  if (hit && fault != FAIL)
    die();
  pthread_mutex_unlock(&mu);
  return hit;
}

int ftruncate64(int fd, off_t n)
{
  return is_refused() ? -1 : (int)syscall(SYS_ftruncate, fd, n);
}

int unlink(const char *path)
{
  return is_refused() ? -1 : (int)syscall(SYS_unlink, path);
}

int unlinkat(int dir, const char *path, int flags)
{
  return is_refused() ? -1 : (int)syscall(SYS_unlinkat, dir, path, flags);
}

static void arm(enum fault f, int at, int number)
{
  pthread_mutex_lock(&mu);
  fault = f;
  fault_at = at;
  fault_errno = number;
  fault_count = 0;
  is_fault_once = 0;
  n_tracked = 0;
  pthread_mutex_unlock(&mu);
}

/* ---- what the process did before it died ---- */

enum { BYTES = 9000 };

/* What was answered; shared with the parent. */
struct answered {
  int added_a, added_b, added_c, finished_a, failed_b, cancelled_c, has_url, is_over;
  char url[STORE_NAME];
};

static struct answered *answered;

static int put_url(struct store *s, char name[STORE_NAME])
{
  struct store_op op;
  struct err e = {0};
  int r;

  help_finish_op(&op, "url", 1, BYTES);
  op.verb = STORE_PUT_FILE;
  r = store_run(s, &op, &e);
  memcpy(name, op.job.file[0].name, STORE_NAME);
  return r;
}

/* Everything that is done to a store, once; what went well is written down. */
static void live(struct store *s, struct answered *a)
{
  a->added_a = !help_add(s, "a", "key", "{\"prompt\":\"a\"}", NULL);
  a->added_b = !help_add(s, "b", NULL, "{\"prompt\":\"b\"}", NULL);
  (void)help_start(s, "a");
  a->finished_a = a->added_a && !help_finish(s, "a", 2, BYTES, NULL);
  a->has_url = !put_url(s, a->url);
  (void)help_start(s, "b");
  a->failed_b = a->added_b && !help_fail(s, "b", STORE_FAILED, "out_of_memory");
  a->added_c = !help_add(s, "c", NULL, "{\"prompt\":\"c\"}", NULL);
  a->cancelled_c = a->added_c && !help_fail(s, "c", STORE_CANCELLED, "cancelled");
}

/* A job after the crash: what was answered is so; what was not is there whole or not at all, and can be done again. Returns its files. */
static int check_job(struct store *s, const char *id, int added, int finished, enum store_state end, int n)
{
  struct store_job j;
  int existing, files;

  if (help_find(s, id, &j)) {
    assert_false(added);
    return 0;
  }
  assert_true(j.state == STORE_QUEUED || j.state == end);
  if (finished)
    assert_int_equal(j.state, end);
  files = j.state == end ? n : 0;
  for (int i = 0; i < files; i++)
    assert_true(help_holds(s, j.file[i].name, id, i, BYTES));
  store_job_close(&j);
  if (end != STORE_SUCCEEDED || files)
    return files;
  ok(help_finish(s, id, n, BYTES, &existing));
  assert_int_equal(existing, 0);
  assert_int_equal(help_state(s, id), STORE_SUCCEEDED);
  return n;
}

static void check(const struct answered *a)
{
  struct store *s = help_open();
  int existing, files = 0;

  files += check_job(s, "a", a->added_a, a->finished_a, STORE_SUCCEEDED, 2);
  files += check_job(s, "b", a->added_b, a->failed_b, STORE_FAILED, 0);
  files += check_job(s, "c", a->added_c, a->cancelled_c, STORE_CANCELLED, 0);
  if (a->has_url)
    assert_true(help_holds(s, a->url, "url", 0, BYTES));
  ok(help_add(s, "a2", "key", "{\"prompt\":\"a\"}", &existing));
  if (a->added_a)
    assert_int_equal(existing, 1);
  store_close(s);
  s = help_open(); /* no row without a file, no file without a row; the url's may be there unanswered */
  assert_in_range(help_count_results(), files + a->has_url, files + 1);
  store_close(s);
}

static pid_t fork_life(enum fault f, int at)
{
  struct store_limits limits = help_limits();
  struct store *s;
  struct err e = {0};
  pid_t child = fork();

  assert_true(child >= 0);
  if (child)
    return child;
  arm(f, at, 0);
  if (store_open(&s, help_dir, &limits, &e))
    _exit(1);
  live(s, answered);
  store_close(s);
  answered->is_over = 1;
  _exit(0);
}

/* Dies at the first call, at the second, ... until it lives to the end. */
static void die_everywhere(enum fault f)
{
  int at = 0, status;

  answered = mmap(NULL, sizeof *answered, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  assert_true(answered != MAP_FAILED);
  do {
    memset(answered, 0, sizeof *answered);
    ok(help_setup(NULL));
    assert_true(waitpid(fork_life(f, ++at), &status, 0) > 0);
    assert_true(WIFEXITED(status) && (WEXITSTATUS(status) == DIED || WEXITSTATUS(status) == 0));
    check(answered);
    ok(help_teardown(NULL));
  } while (WEXITSTATUS(status) == DIED);
  assert_true(answered->is_over && answered->finished_a && answered->failed_b && answered->cancelled_c && answered->has_url);
  assert_true(at > 40);
  print_message("# %d places to die\n", at - 1);
  munmap(answered, sizeof *answered);
}

static void test_crash(void **state)
{
  (void)state;
  die_everywhere(CRASH);
}

static void test_power_cut(void **state)
{
  (void)state;
  die_everywhere(POWER_CUT);
}

/* ---- the disk fails from some call on, or once ---- */

static void done_nothing(struct store_op *op)
{
  ++*(_Atomic int *)op->arg;
}

/* Jobs are accepted, the disk goes, more is tried, the server stops; the disk comes back, the server starts. 1: the disk was still well at the end. */
static int fail_from(int at, int number, int once)
{
  struct answered a = {0};
  struct store *s = help_open();
  struct store_op finish;
  _Atomic int done = 0;
  int r, well;

  ok(help_add(s, "a", "key", "{\"prompt\":\"a\"}", NULL));
  ok(help_start(s, "a"));
  arm(FAIL, at, number);
  is_fault_once = once;
  r = help_add(s, "b", NULL, "{\"prompt\":\"b\"}", NULL);
  assert_true(!r || r == (number == ENOSPC ? E_FULL : E_FILE));
  a.added_b = !r;
  r = put_url(s, a.url);
  assert_true(!r || r == (number == ENOSPC ? E_FULL : E_FILE));
  a.has_url = !r;
  help_finish_op(&finish, "a", 2, BYTES);
  finish.done = done_nothing;
  finish.arg = &done;
  store_submit(s, &finish);
  assert_true(help_state(s, "a") == STORE_RUNNING || help_state(s, "a") == STORE_SUCCEEDED); /* reads go on */
  store_close(s);
  assert_int_equal(done, 1); /* answered at the latest when the store closes */
  assert_true(!finish.err.code || finish.err.code == (number == ENOSPC ? E_FULL : E_FILE));
  if (once)
    ok(finish.err.code); /* tried again */
  a.added_a = 1;
  a.finished_a = !finish.err.code;
  well = fault_count < at;
  arm(NONE, 0, 0);
  check(&a);
  return well;
}

static void fail_everywhere(int number, int once)
{
  int at = 0, well;

  do {
    ok(help_setup(NULL));
    well = fail_from(++at, number, once);
    ok(help_teardown(NULL));
  } while (!well);
  assert_true(at > 10);
}

static void test_full_from(void **state)
{
  (void)state;
  fail_everywhere(ENOSPC, 0);
}

static void test_full_once(void **state)
{
  (void)state;
  fail_everywhere(ENOSPC, 1);
}

static void test_broken_from(void **state)
{
  (void)state;
  fail_everywhere(EIO, 0);
}

static void test_broken_once(void **state)
{
  (void)state;
  fail_everywhere(EIO, 1);
}

/* A result that does not fit waits and is recorded when there is room again; expired files make that room. */
static void test_held(void **state)
{
  struct store *s = help_open();
  struct store_status st;
  struct store_op finish[2];
  _Atomic int done = 0;

  (void)state;
  ok(help_add(s, "a", NULL, "{}", NULL));
  ok(help_add(s, "b", NULL, "{}", NULL));
  arm(FAIL, 1, ENOSPC);
  for (int i = 0; i < 2; i++) {
    help_finish_op(&finish[i], i ? "b" : "a", 1, BYTES);
    finish[i].done = done_nothing;
    finish[i].arg = &done;
    store_submit(s, &finish[i]);
  }
  assert_int_equal(help_add(s, "c", NULL, "{}", NULL), E_FULL);
  do {
    usleep(1000);
    store_get_status(s, &st);
  } while (st.held < 2);
  assert_true(st.is_failing && !done && st.unfinished == 2);
  arm(NONE, 0, 0);
  while (done < 2)
    usleep(1000);
  do
    store_get_status(s, &st);
  while (st.held || st.unfinished);
  assert_true(!st.is_failing && st.finished == 2 && st.bytes == 2 * BYTES);
  for (int i = 0; i < 2; i++) {
    ok(finish[i].err.code);
    assert_true(help_holds(s, finish[i].job.file[0].name, i ? "b" : "a", 0, BYTES));
  }
  store_close(s);
}

/* No file may grow past 200 kB: large bodies are refused, small ones and results of jobs that are there go on, all are there after. */
static int fill_disk(void)
{
  struct rlimit limit = {200 << 10, RLIM_INFINITY};
  struct store *s = help_open();
  static char body[100 << 10];
  int good = 0, full = 0;
  char id[16];

  signal(SIGXFSZ, SIG_IGN);
  memset(body, 'x', sizeof body - 1);
  if (setrlimit(RLIMIT_FSIZE, &limit))
    return 1;
  for (int i = 0; i < 20; i++) {
    snprintf(id, sizeof id, "j%d", good);
    int r = help_add(s, id, NULL, body, NULL);
    good += !r;
    full += r == E_FULL;
  }
  if (!good || good + full != 20 || full < 10)
    return 2;
  limit.rlim_cur = RLIM_INFINITY;
  if (setrlimit(RLIMIT_FSIZE, &limit))
    return 3;
  store_close(s);
  s = help_open();
  for (int i = 0; i < good; i++) {
    snprintf(id, sizeof id, "j%d", i);
    if (help_state(s, id) != STORE_QUEUED || help_finish(s, id, 1, BYTES, NULL))
      return 4;
  }
  if (help_add(s, "after", NULL, body, NULL))
    return 5;
  store_close(s);
  return 0;
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

#define IN_DIR(f) cmocka_unit_test_setup_teardown(f, help_setup, help_teardown)

int main(void)
{
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_crash),       cmocka_unit_test(test_power_cut),   cmocka_unit_test(test_full_from), cmocka_unit_test(test_full_once),
      cmocka_unit_test(test_broken_from), cmocka_unit_test(test_broken_once), IN_DIR(test_held),                IN_DIR(test_full_disk),
  };

  return cmocka_run_group_tests(tests, NULL, NULL);
}
