/*
 * store.c - see store.h: the line of operations and the thread that does them.
 *
 * The way of a line: the thread takes all that is submitted, writes the new files and makes them durable, does everything in one transaction, and
 * answers. When that fails every operation gets a transaction of its own, so that a body that does not fit on the disk fails alone. A FINISH that
 * cannot be written goes to `held`, which is tried again every second.
 *
 *      what                        who may touch it
 *      db, folder, held, counters  the store's thread alone, once it runs
 *      line, status, is_stopping   under the lock
 *      an operation                its owner until store_submit, then the thread until it calls done
 */
#include "server/store.h"

#include <sodium.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "server/log.h"
#include "server/metrics.h"
#include "server/store_db.h"
#include "server/store_files.h"
#include "server/thread.h"

enum { SWEEP_FILES = 64, SWEEP_JOBS = 512, SWEEP_MS = 1000, RETRY_MS = 1000 };

struct line {
  struct store_op *first, **end;
};

struct store {
  struct store_limits limits;
  struct store_db *db;
  struct store_folder folder;
  int64_t last_seq;          /* of the jobs that store_open found */
  pthread_t thread;
  int is_running;

  struct line held;
  uint64_t unrecorded;       /* bytes of files that are on the disk and in no row yet */
  int needs_sync;            /* the folder has entries that are not durable */
  _Atomic int is_last_try;   /* the store closes: nothing is held any more; any thread */
  int64_t swept_ms, retry_ns;
  int is_sweeping;           /* the last portion may not have been the last */
  struct store_status count;

  struct lock lock;
  pthread_cond_t work, done;
  struct line line;
  int is_stopping;
  struct store_status status;
};

static void line_init(struct line *l)
{
  l->first = NULL;
  l->end = &l->first;
}

static void line_add(struct line *l, struct store_op *op)
{
  op->next = NULL;
  *l->end = op;
  l->end = &op->next;
}

static struct store_op *line_pop(struct line *l)
{
  struct store_op *op = l->first;

  if (op) {
    l->first = op->next;
    op->next = NULL;
  }
  if (!l->first)
    l->end = &l->first;
  return op;
}

static void line_take(struct line *to, struct line *from)
{
  *to = *from;
  if (!to->first)
    to->end = &to->first;
  line_init(from);
}

static int64_t wall_ms(void)
{
  struct timespec t;

  clock_gettime(CLOCK_REALTIME, &t);
  return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

/* ---- removing ---- */

/* The files go first: should the rows stay because the disk is full, there is more room at the next try. A row without its file is an expired one. */
static int drop_files(struct store *s, char (*name)[STORE_NAME], int n, uint64_t enough, struct err *e)
{
  for (int i = 0; i < n && store_db_bytes(s->db) > enough; i++) {
    store_folder_remove(&s->folder, name[i]);
    if (store_db_drop_file(s->db, name[i], e))
      return e->code;
    s->count.expired_files++;
  }
  return 0;
}

/* One portion of what has expired. *more: there may be another. */
static int sweep_once(struct store *s, int64_t now, int *more, struct err *e)
{
  char name[SWEEP_FILES][STORE_NAME];
  int n = 0, jobs = 0;

  if (store_db_old_files(s->db, now - s->limits.results_ms, name, SWEEP_FILES, &n, e) || store_db_begin(s->db, e))
    return e->code;
  for (int i = 0; i < n; i++) {
    store_folder_remove(&s->folder, name[i]);
    if (store_db_drop_file(s->db, name[i], e))
      return e->code;
  }
  if (store_db_drop_jobs(s->db, now - s->limits.history_ms, SWEEP_JOBS, &jobs, e) || store_db_commit(s->db, e))
    return e->code;
  s->count.expired_files += (uint64_t)n;
  *more = n == SWEEP_FILES || jobs == SWEEP_JOBS;
  return 0;
}

/* Every second a portion; when it was not the last another after the next line: nobody waits for more than one. */
static void sweep(struct store *s)
{
  int64_t now = s->limits.now_ms();
  struct err e = {0};
  int more = 0;

  if (!s->is_sweeping && now >= s->swept_ms && now < s->swept_ms + SWEEP_MS)
    return;
  if (sweep_once(s, now, &more, &e)) {
    store_db_cancel(s->db);
    if (!s->count.is_failing)
      log_event("store: what has expired cannot be removed: %s", e.msg);
    s->count.is_failing = 1;
  }
  s->swept_ms = now;
  s->is_sweeping = more;
}

/* Removes the oldest files until `need` more bytes fit results_bytes. */
static int make_room(struct store *s, uint64_t need, struct err *e)
{
  char name[SWEEP_FILES][STORE_NAME];
  uint64_t max = s->limits.results_bytes, taken = s->unrecorded + need;
  int n;

  while (store_db_bytes(s->db) + taken > max) {
    if (store_db_old_files(s->db, INT64_MAX, name, SWEEP_FILES, &n, e))
      return e->code;
    if (!n || taken > max)
      return err_field(e, E_FULL, "results_mb", "results that wait to be recorded take all of results_mb");
    if (store_db_begin(s->db, e) || drop_files(s, name, n, max - taken, e) || store_db_commit(s->db, e)) {
      store_db_cancel(s->db);
      return e->code;
    }
  }
  return 0;
}

/* ---- files of operations ---- */

static int count_files(const struct store_op *op)
{
  return op->verb == STORE_FINISH ? op->job.n_files : op->verb == STORE_PUT_FILE ? 1 : 0;
}

static uint64_t count_bytes(const struct store_op *op)
{
  uint64_t bytes = 0;

  for (int i = 0; i < count_files(op); i++)
    bytes += op->job.file[i].bytes;
  return bytes;
}

static void remove_files(struct store *s, struct store_op *op, int n)
{
  for (int i = 0; i < n; i++) {
    store_folder_remove(&s->folder, op->job.file[i].name);
    op->job.file[i].name[0] = 0;
  }
}

/* op->err says how it went. What is written stays written when the operation is tried again: should a commit that failed turn out to be in the file
 * after all, its rows name files that are there. */
static void write_files(struct store *s, struct store_op *op)
{
  uint64_t bytes = count_bytes(op);

  if (op->is_written || !count_files(op))
    return;
  if (bytes > s->limits.results_bytes) {
    err_field(&op->err, E_TOOBIG, "results_mb", "the result takes %llu bytes and results_mb allows %llu for all: raise it", (unsigned long long)bytes,
              (unsigned long long)s->limits.results_bytes);
    return;
  }
  if (make_room(s, bytes, &op->err))
    return;
  for (int i = 0; i < count_files(op); i++)
    if (store_folder_write(&s->folder, &op->job.file[i], &op->err)) {
      remove_files(s, op, i);
      return;
    }
  s->unrecorded += bytes;
  s->needs_sync = 1;
  op->is_written = 1;
}

/* ---- one operation ---- */

static int64_t expires(const struct store *s, int64_t made_ms)
{
  return made_ms + s->limits.results_ms;
}

static int open_found(struct store *s, struct store_op *op, int64_t now, struct err *e)
{
  struct store_file *f = &op->job.file[0];
  struct store_file found = {0};

  if (!memchr(f->name, 0, sizeof f->name) || !store_is_name(f->name))
    return err_field(&op->err, E_NOTFOUND, "name", "there is no such file, or it has expired"), 0;
  if (store_db_find_file(s->db, f->name, &found, &op->err, e) || op->err.code)
    return e->code;
  found.expires_ms = expires(s, found.expires_ms);
  *f = found;
  if (found.expires_ms <= now)
    return err_field(&op->err, E_NOTFOUND, "name", "the file has expired"), 0;
  if (store_folder_read(&s->folder, f->name, f->bytes, &op->fd, &op->err))
    op->fd = -1;
  return 0;
}

/* In a transaction. Fails when the transaction does. */
static int do_op(struct store *s, struct store_op *op, struct err *e)
{
  int64_t now = s->limits.now_ms();

  switch (op->verb) {
  case STORE_ADD:
    return store_db_add(s->db, &op->job, &op->found, now, &op->is_existing, &op->err, e);
  case STORE_START:
    return store_db_start(s->db, op->job.id, now, &op->err, e);
  case STORE_PUT_BACK:
    return store_db_put_back(s->db, op->job.id, &op->err, e);
  case STORE_FINISH:
    return store_db_finish(s->db, &op->job, now, &op->is_existing, &op->err, e);
  case STORE_FIND:
    return store_db_find(s->db, &op->job, &op->found, &op->err, e);
  case STORE_NEXT:
    return store_db_next(s->db, op->job.seq, s->last_seq, &op->found, &op->err, e);
  case STORE_LIST:
    return store_db_list(s->db, op->job.tenant, op->job.id, op->wanted, op->list, op->cap, &op->listed, &op->err, e);
  case STORE_PUT_FILE:
    op->job.file[0].expires_ms = expires(s, now);
    return store_db_put_file(s->db, &op->job.file[0], now, e);
  case STORE_OPEN_FILE:
    return open_found(s, op, now, e);
  }
  return err_set(e, E_INTERNAL, "there is no operation %d", (int)op->verb);
}

/* Takes back what an attempt gave; the files stay. */
static void reset_op(struct store_op *op)
{
  store_job_close(&op->found);
  while (op->listed)
    store_job_close(&op->list[--op->listed]);
  if (op->fd >= 0)
    close(op->fd);
  op->fd = -1;
  op->is_existing = 0;
  op->err = (struct err){0};
}

static int is_storage_error(int code)
{
  return code == E_FULL || code == E_FILE || code == E_NOMEM;
}

static int is_write(const struct store_op *op)
{
  return op->verb != STORE_FIND && op->verb != STORE_NEXT && op->verb != STORE_LIST && op->verb != STORE_OPEN_FILE;
}

/* The log gets what the system said, and paths; a client what it means. */
static void note_health(struct store *s, struct store_op *op)
{
  int code = op->err.code, fails = is_storage_error(code);

  if (fails && !is_write(op)) {
    log_event("store: %s", op->err.msg);
  } else if (fails && !s->count.is_failing) {
    s->count.is_failing = 1;
    log_event("store: a write failed; what cannot be kept is refused, what was accepted is not lost: %s", op->err.msg);
  } else if (s->count.is_failing && is_write(op) && !code && !op->is_existing && !s->held.first) {
    s->count.is_failing = 0;
    log_event("store: can be written again");
  }
  if (!fails)
    return;
  op->err = (struct err){0};
  err_field(&op->err, code, "state", "%s", code == E_FULL    ? "the server's disk is full and this cannot be kept: try again later"
                                           : code == E_NOMEM ? "the server is short of memory for this: try again later"
                                           : is_write(op)    ? "the server cannot write its job store: try again later"
                                                             : "the server cannot read its job store");
}

/* The times that files expire, and no names of those that have. */
static void finish_found(const struct store *s, struct store_job *j)
{
  int64_t now = s->limits.now_ms();

  for (int i = 0; i < j->n_files; i++) {
    j->file[i].expires_ms = expires(s, j->file[i].expires_ms);
    if (j->file[i].expires_ms <= now)
      j->file[i] = (struct store_file){0};
  }
}

/* An operation whose transaction is over: answers it, or holds it. */
static void settle(struct store *s, struct store_op *op)
{
  int is_storage = is_storage_error(op->err.code), n = count_files(op);

  note_health(s, op);
  if (op->verb == STORE_FINISH && is_storage && !op->is_impatient && !atomic_load(&s->is_last_try)) {
    line_add(&s->held, op);
    s->count.held++;
    return;
  }
  if (op->is_written) {
    s->unrecorded -= count_bytes(op);
    if (op->is_existing || (op->err.code && !(op->verb == STORE_FINISH && is_storage)))
      remove_files(s, op, n);
  }
  op->is_written = 0;
  for (int i = 0; i < n; i++)
    op->job.file[i].data = NULL;
  finish_found(s, &op->found);
  s->count.added += op->verb == STORE_ADD && !op->err.code && !op->is_existing;
  s->count.finished += op->verb == STORE_FINISH && !op->err.code && !op->is_existing;
  op->done(op);
}

/* ---- a line of operations ---- */

/* All of it or nothing. After a failure nothing has changed but what reset_op takes back. */
static int transact(struct store *s, struct store_op *first, struct err *e)
{
  int r = store_db_begin(s->db, e);

  for (struct store_op *op = first; op && !r; op = op->next)
    r = do_op(s, op, e);
  if (!r)
    r = store_db_commit(s->db, e);
  if (r)
    store_db_cancel(s->db);
  return r;
}

static void do_alone(struct store *s, struct store_op *op)
{
  struct err e = {0};

  reset_op(op);
  if (transact(s, op, &e)) {
    reset_op(op);
    op->err = e;
  }
  settle(s, op);
}

/* Writes what files the line has; those that could not be are settled, the others are moved to ready. */
static void write_line(struct store *s, struct line *line, struct line *ready)
{
  struct line written;
  struct store_op *op;
  struct err e = {0};

  line_init(&written);
  while ((op = line_pop(line))) {
    reset_op(op);
    write_files(s, op);
    if (op->err.code)
      settle(s, op);
    else
      line_add(&written, op);
  }
  if (s->needs_sync && !store_folder_sync(&s->folder, &e))
    s->needs_sync = 0;
  while ((op = line_pop(&written))) {
    if (op->is_written)
      op->err = e;
    if (op->err.code)
      settle(s, op);
    else
      line_add(ready, op);
  }
}

static void do_line(struct store *s, struct line *line)
{
  struct line ready;
  struct store_op *op;
  struct err e = {0};
  int r;

  line_init(&ready);
  write_line(s, line, &ready);
  if (!ready.first)
    return;
  r = transact(s, ready.first, &e);
  while ((op = line_pop(&ready))) {
    if (r)
      do_alone(s, op);
    else
      settle(s, op);
  }
}

/* Tries the held ones in their order, until one fails. */
static void retry_held(struct store *s)
{
  struct line all, one;
  struct store_op *op;

  line_take(&all, &s->held);
  s->count.held = 0;
  while ((op = line_pop(&all))) {
    if (s->held.first) {
      line_add(&s->held, op);
      s->count.held++;
      continue;
    }
    line_init(&one);
    line_add(&one, op);
    do_line(s, &one);
  }
  s->retry_ns = clock_ns() + (int64_t)RETRY_MS * 1000000;
}

static void count_rows(struct store *s)
{
  s->count.bytes = store_db_bytes(s->db);
  for (int i = STORE_QUEUED; i <= STORE_CANCELLED; i++) {
    s->count.jobs[i] = store_db_count(s->db, (enum store_state)i);
    metric_set(METRIC_DURABLE, i, s->count.jobs[i]);
  }
  s->count.unfinished = s->count.jobs[STORE_QUEUED] + s->count.jobs[STORE_RUNNING];
}

static void publish(struct store *s)
{
  count_rows(s);
  lock_take(&s->lock);
  s->status = s->count;
  lock_drop(&s->lock);
}

/* What was submitted since the last time. */
static void take_line(struct store *s, struct line *line, int wait, int *stop)
{
  lock_take(&s->lock);
  if (wait && !s->line.first && !s->is_stopping)
    lock_wait_for(&s->lock, &s->work, SWEEP_MS);
  line_take(line, &s->line);
  *stop = s->is_stopping;
  lock_drop(&s->lock);
}

static void *run(void *arg)
{
  struct store *s = arg;
  struct line line;
  int stop;

  thread_self = THREAD_STORE;
  do {
    take_line(s, &line, !s->is_sweeping, &stop);
    sweep(s);
    do_line(s, &line);
    if (s->held.first && (clock_ns() >= s->retry_ns || atomic_load(&s->is_last_try)))
      retry_held(s);
    publish(s);
  } while (!stop);
  atomic_store(&s->is_last_try, 1);
  retry_held(s);
  for (take_line(s, &line, 0, &stop); line.first; take_line(s, &line, 0, &stop)) /* what an answer led to */
    do_line(s, &line);
  return NULL;
}

/* ---- callers ---- */

void store_submit(struct store *s, struct store_op *op)
{
  assert(op->job.n_files >= 0 && op->job.n_files <= REQUEST_N_MAX);
  op->fd = -1;
  op->is_written = 0;
  op->found = (struct store_job){0};
  op->listed = 0;
  lock_take(&s->lock);
  line_add(&s->line, op);
  pthread_cond_signal(&s->work);
  lock_drop(&s->lock);
}

struct waiter {
  struct store *store;
  int is_done;
};

static void wake_waiter(struct store_op *op)
{
  struct waiter *w = op->arg;
  struct store *s = w->store;

  lock_take(&s->lock);
  w->is_done = 1;
  pthread_cond_broadcast(&s->done);
  lock_drop(&s->lock);
}

int store_run(struct store *s, struct store_op *op, struct err *e)
{
  struct waiter w = {.store = s};

  op->done = wake_waiter;
  op->arg = &w;
  store_submit(s, op);
  lock_take(&s->lock);
  while (!w.is_done)
    lock_wait(&s->lock, &s->done);
  lock_drop(&s->lock);
  return op->err.code ? err_field(e, op->err.code, op->err.field, "%s", op->err.msg) : 0;
}

int store_put_file(struct store *s, struct store_file *f, struct err *e)
{
  struct store_op op = {.verb = STORE_PUT_FILE};
  int r;

  op.job.file[0] = *f;
  r = store_run(s, &op, e);
  if (!r)
    *f = op.job.file[0];
  return r;
}

int store_open_file(struct store *s, const char *name, struct store_file *f, int *fd, struct err *e)
{
  struct store_op op = {.verb = STORE_OPEN_FILE};
  int r;

  *fd = -1;
  if (!store_is_name(name))
    return err_field(e, E_NOTFOUND, "name", "there is no such file, or it has expired");
  memcpy(op.job.file[0].name, name, strlen(name) + 1);
  r = store_run(s, &op, e);
  if (r)
    return r;
  *f = op.job.file[0];
  *fd = op.fd;
  return 0;
}

void store_job_close(struct store_job *j)
{
  free(j->owned);
  j->owned = NULL;
  j->answer = j->note = j->body = NULL;
  j->body_len = 0;
}

void store_hold_no_more(struct store *s)
{
  atomic_store(&s->is_last_try, 1);
}

void store_get_status(struct store *s, struct store_status *out)
{
  lock_take(&s->lock);
  *out = s->status;
  lock_drop(&s->lock);
}

const char *store_state_name(enum store_state state)
{
  static const char *const name[] = {"queued", "running", "succeeded", "failed", "cancelled"};

  return name[state];
}

/* ---- open and close ---- */

static int is_known(void *arg, const char *name, struct err *e)
{
  struct store *s = arg;
  struct store_file f;
  struct err no = {0};

  if (store_db_find_file(s->db, name, &f, &no, e))
    return e->code;
  return !no.code;
}

static int open_parts(struct store *s, const char *dir, struct err *e)
{
  struct store_found found = {0};
  int removed = 0;

  if (sodium_init() < 0)
    return err_set(e, E_INTERNAL, "libsodium does not start");
  if (store_db_open(&s->db, dir, s->limits.now_ms(), &found, e) || store_folder_open(&s->folder, dir, e) ||
      store_folder_clean(&s->folder, is_known, s, &removed, e))
    return e->code;
  s->last_seq = found.last_seq;
  count_rows(s);
  s->status = s->count;
  if (found.put_back || found.crashed || removed)
    log_event("store: %lld unfinished jobs, %lld given up after %d attempts, %d files of unfinished writes removed", (long long)found.put_back,
              (long long)found.crashed, STORE_ATTEMPTS, removed);
  return thread_start(&s->thread, "store", run, s, e);
}

int store_open(struct store **out, const char *dir, const struct store_limits *limits, struct err *e)
{
  struct store *s = calloc(1, sizeof *s);

  *out = NULL;
  if (!s)
    return err_set(e, E_NOMEM, "out of memory for the job store");
  s->limits = *limits;
  if (!s->limits.now_ms)
    s->limits.now_ms = wall_ms;
  if (s->limits.results_ms > s->limits.history_ms)
    s->limits.results_ms = s->limits.history_ms; /* no file outlives its job */
  s->folder.fd = -1;
  line_init(&s->held);
  line_init(&s->line);
  lock_init(&s->lock, "store");
  pthread_cond_init(&s->work, NULL);
  pthread_cond_init(&s->done, NULL);
  if (open_parts(s, dir, e)) {
    store_close(s);
    return e->code;
  }
  s->is_running = 1;
  *out = s;
  return 0;
}

void store_close(struct store *s)
{
  if (!s)
    return;
  if (s->is_running) {
    lock_take(&s->lock);
    s->is_stopping = 1;
    pthread_cond_signal(&s->work);
    lock_drop(&s->lock);
    pthread_join(s->thread, NULL);
  }
  store_folder_close(&s->folder);
  store_db_close(s->db);
  pthread_cond_destroy(&s->work);
  pthread_cond_destroy(&s->done);
  lock_fini(&s->lock);
  free(s);
}
