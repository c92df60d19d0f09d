/*
 * thread_alloc.c - a library to preload: makes the Nth allocation of one of the daemon's threads fail, and those of no other thread.
 *
 * FAULT_COUNTDOWN names a file of 8 bytes that is mapped: a countdown. Each allocation of the thread that FAULT_THREAD names ("loader" unless it does)
 * takes one off; the one that reaches 0 fails. Below 0 none does. Called by tests/wire/test_safety_faults.py, which builds it, and test_devices.py.
 * Threads: any.
 */
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static _Atomic int64_t *countdown;
static const char *wanted = "loader";
static _Thread_local int seen, is_wanted; /* a thread has its name before it runs for long: asked a few times, then known */

__attribute__((constructor)) static void map_countdown(void)
{
  const char *path = getenv("FAULT_COUNTDOWN"), *thread = getenv("FAULT_THREAD");
  int fd = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
  void *p = fd >= 0 ? mmap(NULL, sizeof *countdown, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0) : MAP_FAILED;

  if (thread)
    wanted = thread;
  if (p != MAP_FAILED)
    countdown = p;
  if (fd >= 0)
    close(fd);
}

static int fails(void)
{
  char name[16];

  if (!countdown)
    return 0;
  if (!is_wanted && seen < 1000) {
    seen++;
    is_wanted = !pthread_getname_np(pthread_self(), name, sizeof name) && !strcmp(name, wanted);
  }
  if (!is_wanted || atomic_load(countdown) <= 0)
    return 0;
  return atomic_fetch_sub(countdown, 1) == 1;
}

void *__libc_malloc(size_t n);
void *__libc_calloc(size_t n, size_t size);
void *__libc_realloc(void *p, size_t n);
void *__libc_memalign(size_t align, size_t n);
void *malloc(size_t n);
void *calloc(size_t n, size_t size);
void *realloc(void *p, size_t n);
void *aligned_alloc(size_t align, size_t n);
int posix_memalign(void **p, size_t align, size_t n);

void *malloc(size_t n)
{
  return fails() ? (errno = ENOMEM, NULL) : __libc_malloc(n);
}

void *calloc(size_t n, size_t size)
{
  return fails() ? (errno = ENOMEM, NULL) : __libc_calloc(n, size);
}

void *realloc(void *p, size_t n)
{
  return fails() ? (errno = ENOMEM, NULL) : __libc_realloc(p, n);
}

void *aligned_alloc(size_t align, size_t n)
{
  return fails() ? (errno = ENOMEM, NULL) : __libc_memalign(align, n);
}

int posix_memalign(void **p, size_t align, size_t n)
{
  void *got = fails() ? NULL : __libc_memalign(align, n);

  if (!got)
    return ENOMEM;
  *p = got;
  return 0;
}
