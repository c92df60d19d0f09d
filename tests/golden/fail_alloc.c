/*
 * fail_alloc.c - see fail_alloc.h. Takes malloc's place in front of glibc's own.
 */
#include "tests/golden/fail_alloc.h"

#include <errno.h>
#include <malloc.h>
#include <stdatomic.h>
#include <stdlib.h>

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SANITIZED
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define SANITIZED
#endif
#endif

static atomic_long left = -1; /* allocations until one fails; negative: none will */
static atomic_long live;      /* blocks */

#if defined(__GLIBC__) && !defined(SANITIZED)

int fail_alloc_works(void)
{
  return 1;
}

static int fails(void)
{
  return atomic_load(&left) >= 0 && atomic_fetch_sub(&left, 1) == 0;
}

extern void *__libc_malloc(size_t n);
extern void *__libc_calloc(size_t n, size_t each);
extern void *__libc_realloc(void *p, size_t n);
extern void *__libc_memalign(size_t align, size_t n);
extern void __libc_free(void *p);

static void *count(void *p)
{
  if (p)
    atomic_fetch_add(&live, 1);
  return p;
}

void *malloc(size_t n)
{
  return fails() ? NULL : count(__libc_malloc(n));
}

void *calloc(size_t n, size_t each)
{
  return fails() ? NULL : count(__libc_calloc(n, each));
}

void *realloc(void *p, size_t n)
{
  if (fails())
    return NULL;
  return p ? __libc_realloc(p, n) : count(__libc_realloc(p, n));
}

void *aligned_alloc(size_t align, size_t n)
{
  return fails() ? NULL : count(__libc_memalign(align, n));
}

void *memalign(size_t align, size_t n)
{
  return aligned_alloc(align, n);
}

int posix_memalign(void **p, size_t align, size_t n)
{
  *p = fails() ? NULL : count(__libc_memalign(align, n));
  return *p ? 0 : ENOMEM;
}

void free(void *p)
{
  if (p)
    atomic_fetch_sub(&live, 1);
  __libc_free(p);
}

#else

int fail_alloc_works(void)
{
  return 0;
}

#endif

long fail_alloc_live(void)
{
  return atomic_load(&live);
}

void fail_alloc_after(long after)
{
  atomic_store(&left, after);
}

int fail_alloc_stop(void)
{
  return atomic_exchange(&left, -1) < 0;
}
