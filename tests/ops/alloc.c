/*
 * alloc.c - counts every heap allocation of the program, to hold the backends to rule 3 of backend.h. See harness.h.
 *
 * Takes malloc's place in front of glibc's own. Sanitizers do the same, so that there nothing is counted. Small blocks are not
 * counted: oneDNN keeps its list of arguments in some at every call, whatever its caller does.
 */
#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "tests/ops/harness.h"

enum { SMALL = 1024 }; /* bytes */

static atomic_long count, countdown;

long alloc_count(void)
{
  return atomic_load(&count);
}

void alloc_fail(long n)
{
  atomic_store(&countdown, n);
}

#if defined(__GLIBC__) && !defined(SANITIZED)

extern const char __executable_start, etext;

/* Counts an allocation; 1 when it is to fail. Only those of the program's own code do: oneDNN dies when it gets no memory. */
static int add(size_t n, const char *caller)
{
  if (n >= SMALL)
    atomic_fetch_add(&count, 1);
  return caller >= &__executable_start && caller < &etext && atomic_load(&countdown) > 0 && atomic_fetch_sub(&countdown, 1) == 1;
}

#define ADD(n) add(n, __builtin_return_address(0))

extern void *__libc_malloc(size_t n);
extern void *__libc_calloc(size_t n, size_t each);
extern void *__libc_realloc(void *p, size_t n);
extern void *__libc_memalign(size_t align, size_t n);

void *malloc(size_t n)
{
  return ADD(n) ? NULL : __libc_malloc(n);
}

void *calloc(size_t n, size_t each)
{
  return ADD(n * each) ? NULL : __libc_calloc(n, each);
}

void *realloc(void *p, size_t n)
{
  return ADD(n) ? NULL : __libc_realloc(p, n);
}

void *aligned_alloc(size_t align, size_t n)
{
  return ADD(n) ? NULL : __libc_memalign(align, n);
}

int posix_memalign(void **p, size_t align, size_t n)
{
  *p = ADD(n) ? NULL : __libc_memalign(align, n);
  return *p ? 0 : ENOMEM;
}

#endif
