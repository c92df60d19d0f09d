/*
 * watch.h - the watcher: one thread that minds every connection's clock and notices clients that went away.
 *
 * libmicrohttpd neither times out a suspended connection nor sees its client disconnect, and its own timeout restarts with
 * every byte, so that a slow sender could hold a connection for ever. Every connection has an entry here with a phase:
 *
 *      phase      set by HTTP thread when         past its deadline          client gone
 *      IDLE       connected, or answer sent       socket is shut down        (libmicrohttpd sees it)
 *      READING    the request line came           socket is shut down        (libmicrohttpd sees it)
 *      WAITING    a job was submitted             job_stop E_TIMEOUT         job_stop E_GONE
 *      STREAMING  a stream has no news            poke                       socket is shut down, poke
 *      SENDING    the answer was handed over      socket is shut down        (libmicrohttpd sees it)
 *
 * A socket is only touched under the lock and while its entry exists; libmicrohttpd closes it after watch_remove.
 *
 * Called by http.c, and by admin.c, which has no jobs and hence no WAITING. Threads: the functions below on a connection's own thread (the HTTP thread), except
 * where they say otherwise.
 */
#ifndef SAFELIGHT_SERVER_WATCH_H
#define SAFELIGHT_SERVER_WATCH_H

#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>

#include "server/job.h"
#include "server/thread.h"

enum watch_phase { WATCH_FREE, WATCH_IDLE, WATCH_READING, WATCH_WAITING, WATCH_STREAMING, WATCH_SENDING };

struct watch_entry {
  enum watch_phase phase;
  int fd;
  int is_gone;          /* reported already */
  int64_t deadline_ns;
  struct job *job;      /* WAITING */
  uint64_t serial;
  void (*poke)(void *arg); /* STREAMING; called with the lock held: may resume the connection and nothing else */
  void *arg;
};

struct watch {
  struct lock lock;
  struct jobs *jobs;
  struct watch_entry *entry; /* n; lock */
  struct pollfd *poll;       /* n + 1; watcher thread */
  int *polled;               /* n: entry of each poll slot; watcher thread */
  int n, high;               /* entries from high on were never used; lock */
  int event_fd;
  _Atomic int is_over;
  pthread_t thread;
  int is_running;
};

/* Main thread. Room for n connections; starts the thread. watch_close after, also after failure. */
MUST_CHECK int watch_open(struct watch *w, struct jobs *js, int n, struct err *e); /* js NULL: nothing ever waits */
void watch_close(struct watch *w); /* main thread; no connection is left */

int watch_add(struct watch *w, int fd, int64_t deadline_ns); /* the entry's number, phase IDLE; -1 when there is no room */
void watch_remove(struct watch *w, int at);                  /* takes -1 */
void watch_phase(struct watch *w, int at, enum watch_phase phase, int64_t deadline_ns); /* takes -1 */
void watch_job(struct watch *w, int at, struct job *j, uint64_t serial, int64_t deadline_ns);
/* poke(arg) when the client is gone, or at the deadline; once. */
void watch_poke_all(struct watch *w); /* any thread */
void watch_stream(struct watch *w, int at, void (*poke)(void *arg), void *arg, int64_t deadline_ns);

#endif
