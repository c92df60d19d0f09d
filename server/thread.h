/*
 * thread.h - who am I, and which lock do I hold: two questions that server/ asks itself with assert, which stays on in release.
 *
 * Every thread names itself once; a function that belongs to one thread says ON_THREAD(...) first. Locks are leaves: a thread
 * that holds one may not take another, so there is no lock order to get wrong. No lock is held across a call of the
 * engine or of libmicrohttpd, but for MHD_resume_connection, whose own locks are leaves too.
 *
 * Threads: all of server/. The table of who owns what stands in serve.c.
 */
#ifndef SAFELIGHT_SERVER_THREAD_H
#define SAFELIGHT_SERVER_THREAD_H

#include <assert.h>
#include <pthread.h>
#include <stdint.h>

#include "base/err.h"

enum thread_kind { THREAD_OTHER, THREAD_MAIN, THREAD_HTTP, THREAD_WATCH, THREAD_DEVICE, THREAD_STAGE, THREAD_ENCODE, THREAD_AUDIT, THREAD_LOADER, THREAD_ADMIN,
                   THREAD_STORE, THREAD_ASYNC, THREAD_READ };

extern _Thread_local enum thread_kind thread_self;

#define ON_THREAD(kind) assert(thread_self == (kind))

struct lock {
  pthread_mutex_t mu;
  const char *name;
};

void lock_init(struct lock *l, const char *name);
void lock_fini(struct lock *l);
void lock_take(struct lock *l);   /* asserts that this thread holds none */
void lock_drop(struct lock *l);
void lock_wait(struct lock *l, pthread_cond_t *cv); /* held before and after, dropped while waiting */
/* The same for at most ms. */
void lock_wait_for(struct lock *l, pthread_cond_t *cv, int ms);
int lock_is_held(const struct lock *l);             /* by this thread */

#define HELD(l) assert(lock_is_held(l))

/* The calling thread computes for long, as do those that it starts from now on (OpenMP's): where they share a processor with threads that answer clients, the
 * answers go first. On processors of its own it loses nothing. */
void thread_gives_way(void);
/* Starts run(arg) with all signals blocked. name is at most 15 bytes, for ps and debuggers. E_NOMEM when there is no thread. */
MUST_CHECK int thread_start(pthread_t *t, const char *name, void *(*run)(void *), void *arg, struct err *e);

int64_t clock_ns(void); /* monotonic */

#endif
