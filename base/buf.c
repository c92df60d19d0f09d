/*
 * buf.c - see buf.h. Called by everything that builds text or files.
 */
#include "base/buf.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void buf_init(struct buf *b, size_t max)
{
  *b = (struct buf){.max = max};
}

void buf_close(struct buf *b)
{
  if (!b)
    return;
  free(b->p);
  *b = (struct buf){.max = b->max};
}

/* Room for n more bytes and the final NUL. */
static int grow(struct buf *b, size_t n, struct err *e)
{
  size_t need, cap = b->cap ? b->cap : 256;
  char *p;

  if (n > b->max || b->len > b->max - n)
    return err_set(e, E_TOOBIG, "over the limit of %zu bytes", b->max);
  need = b->len + n + 1;
  if (need <= b->cap)
    return 0;
  while (cap < need)
    cap += cap / 2;
  p = realloc(b->p, cap);
  if (!p)
    return err_set(e, E_NOMEM, "out of memory for %zu bytes", cap);
  b->p = p;
  b->cap = cap;
  return 0;
}

int buf_add(struct buf *b, const void *p, size_t n, struct err *e)
{
  int r = grow(b, n, e);

  if (r)
    return r;
  if (n)
    memcpy(b->p + b->len, p, n);
  b->len += n;
  b->p[b->len] = 0;
  return 0;
}

int buf_add_str(struct buf *b, const char *s, struct err *e)
{
  return buf_add(b, s, strlen(s), e);
}

int buf_addf(struct buf *b, struct err *e, const char *fmt, ...)
{
  va_list ap;
  int n, r;

  va_start(ap, fmt);
  n = vsnprintf(NULL, 0, fmt, ap);
  va_end(ap);
  if (n < 0)
    return err_set(e, E_INTERNAL, "cannot format text");
  r = grow(b, (size_t)n, e);
  if (r)
    return r;
  va_start(ap, fmt);
  vsnprintf(b->p + b->len, (size_t)n + 1, fmt, ap);
  va_end(ap);
  b->len += (size_t)n;
  return 0;
}

char *buf_take(struct buf *b, size_t *len)
{
  char *p = b->p;

  *len = b->len;
  b->p = NULL;
  b->len = b->cap = 0;
  return p;
}
