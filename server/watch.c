/*
 * watch.c - see watch.h.
 */
#include "server/watch.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

enum { TICK_MS = 1000 }; /* new deadlines are never shorter, so the watcher need not be woken for them */

static void stir(struct watch *w)
{
  uint64_t one = 1;
  ssize_t n = write(w->event_fd, &one, sizeof one);

  (void)n; /* full means that it is awake */
}

int watch_add(struct watch *w, int fd, int64_t deadline_ns)
{
  int at = -1;

  lock_take(&w->lock);
  for (int i = 0; i < w->n && at < 0; i++)
    if (w->entry[i].phase == WATCH_FREE)
      at = i;
  if (at >= 0) {
    w->entry[at] = (struct watch_entry){.phase = WATCH_IDLE, .fd = fd, .deadline_ns = deadline_ns};
    w->high = at >= w->high ? at + 1 : w->high;
  }
  lock_drop(&w->lock);
  return at;
}

void watch_remove(struct watch *w, int at)
{
  watch_phase(w, at, WATCH_FREE, 0);
}

void watch_phase(struct watch *w, int at, enum watch_phase phase, int64_t deadline_ns)
{
  if (at < 0)
    return;
  lock_take(&w->lock);
  w->entry[at].phase = phase;
  w->entry[at].deadline_ns = deadline_ns;
  w->entry[at].job = NULL;
  lock_drop(&w->lock);
}

void watch_job(struct watch *w, int at, struct job *j, uint64_t serial, int64_t deadline_ns)
{
  if (at < 0)
    return;
  lock_take(&w->lock);
  w->entry[at].phase = WATCH_WAITING;
  w->entry[at].is_gone = 0;
  w->entry[at].deadline_ns = deadline_ns;
  w->entry[at].job = j;
  w->entry[at].serial = serial;
  lock_drop(&w->lock);
  stir(w); /* its socket must be polled from now on */
}

void watch_stream(struct watch *w, int at, void (*poke)(void *arg), void *arg, int64_t deadline_ns)
{
  if (at < 0)
    return;
  lock_take(&w->lock);
  w->entry[at] = (struct watch_entry){.phase = WATCH_STREAMING, .fd = w->entry[at].fd, .deadline_ns = deadline_ns, .poke = poke, .arg = arg};
  lock_drop(&w->lock);
  stir(w);
}


/* The caller holds the lock. It is not poked again until the stream says that it sleeps again. */
static void poke(struct watch_entry *n)
{
  n->deadline_ns = INT64_MAX;
  n->is_gone = 1;
  n->poke(n->arg);
}

struct overdue {
  struct job *job;
  uint64_t serial;
};

void watch_poke_all(struct watch *w)
{
  lock_take(&w->lock);
  for (int i = 0; i < w->high; i++)
    if (w->entry[i].phase == WATCH_STREAMING && !w->entry[i].is_gone)
      poke(&w->entry[i]);
  lock_drop(&w->lock);
}

/* ---- the watcher thread ---- */

/* Shuts down what is late, finds one job whose deadline passed, lists the sockets to poll. Returns ms until the next deadline. */
static int look_around(struct watch *w, int *polls, struct overdue *late)
{
  int64_t now = clock_ns(), next = now + (int64_t)TICK_MS * 1000000;

  late->job = NULL;
  w->poll[0] = (struct pollfd){.fd = w->event_fd, .events = POLLIN};
  *polls = 1;
  lock_take(&w->lock);
  for (int i = 0; i < w->high; i++) {
    struct watch_entry *n = &w->entry[i];
    if (n->phase == WATCH_FREE)
      continue;
    if (n->deadline_ns <= now && n->phase == WATCH_WAITING && !late->job) {
      *late = (struct overdue){n->job, n->serial};
      n->deadline_ns = INT64_MAX;
    } else if (n->deadline_ns <= now && n->phase == WATCH_STREAMING) {
      poke(n);
    } else if (n->deadline_ns <= now && n->phase != WATCH_WAITING) {
      shutdown(n->fd, SHUT_RDWR);
      n->deadline_ns = INT64_MAX;
    }
    if (n->deadline_ns < next)
      next = n->deadline_ns;
    if ((n->phase == WATCH_WAITING || n->phase == WATCH_STREAMING) && !n->is_gone) {
      w->polled[*polls - 1] = i;
      w->poll[(*polls)++] = (struct pollfd){.fd = n->fd, .events = POLLRDHUP};
    }
  }
  lock_drop(&w->lock);
  if (late->job || next <= now)
    return 0;
  return (int)((next - now + 999999) / 1000000);
}

/* The client of entry `at` hung up while the poll ran. The entry may have changed since: only one that still waits for the same
 * socket counts, and then the socket was its own all the time. */
static void went_away(struct watch *w, int at, int fd)
{
  struct overdue gone = {NULL, 0};
  struct pollfd again = {.fd = fd, .events = POLLRDHUP};

  lock_take(&w->lock);
  if (w->entry[at].fd == fd && !w->entry[at].is_gone && poll(&again, 1, 0) == 1) {
    if (w->entry[at].phase == WATCH_WAITING) {
      w->entry[at].is_gone = 1;
      gone = (struct overdue){w->entry[at].job, w->entry[at].serial};
    } else if (w->entry[at].phase == WATCH_STREAMING) {
      shutdown(fd, SHUT_RDWR); /* who half-closed is gone too: else every comment would be followed by the next */
      poke(&w->entry[at]);
    }
  }
  lock_drop(&w->lock);
  if (gone.job)
    job_stop(w->jobs, gone.job, gone.serial, E_GONE);
}

static void *run(void *arg)
{
  struct watch *w = arg;
  struct overdue late;
  uint64_t count;
  int polls, ms;

  thread_self = THREAD_WATCH;
  while (!atomic_load(&w->is_over)) {
    ms = look_around(w, &polls, &late);
    if (late.job)
      job_stop(w->jobs, late.job, late.serial, E_TIMEOUT);
    if (poll(w->poll, (nfds_t)polls, ms) <= 0)
      continue;
    if (w->poll[0].revents && read(w->event_fd, &count, sizeof count) < 0 && errno != EAGAIN)
      break;
    for (int i = 1; i < polls; i++)
      if (w->poll[i].revents)
        went_away(w, w->polled[i - 1], w->poll[i].fd);
  }
  return NULL;
}

int watch_open(struct watch *w, struct jobs *js, int n, struct err *e)
{
  *w = (struct watch){.jobs = js, .n = n, .event_fd = -1};
  lock_init(&w->lock, "watch");
  w->entry = calloc((size_t)n, sizeof *w->entry);
  w->poll = calloc((size_t)n + 1, sizeof *w->poll);
  w->polled = calloc((size_t)n, sizeof *w->polled);
  w->event_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
  if (!w->entry || !w->poll || !w->polled || w->event_fd < 0)
    return err_set(e, E_NOMEM, "out of memory for %d connections", n);
  if (thread_start(&w->thread, "watch", run, w, e))
    return e->code;
  w->is_running = 1;
  return 0;
}

void watch_close(struct watch *w)
{
  if (!w->n)
    return;
  if (w->is_running) {
    atomic_store(&w->is_over, 1);
    stir(w);
    pthread_join(w->thread, NULL);
  }
  if (w->event_fd >= 0)
    close(w->event_fd);
  free(w->entry);
  free(w->poll);
  free(w->polled);
  lock_fini(&w->lock);
  *w = (struct watch){0};
}
