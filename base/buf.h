/*
 * buf.h - growable bytes with a mandatory maximum, and nothing else.
 *
 * Used wherever text or files of unknown length are put together (JSON answers, PNG files, request bodies). The maximum is
 * given at init so that no input can make the process grow without bound. After a failure the buffer keeps what it had.
 *
 * Threads: a buffer belongs to one thread at a time.
 */
#ifndef SAFELIGHT_BASE_BUF_H
#define SAFELIGHT_BASE_BUF_H

#include <stddef.h>

#include "base/err.h"

struct buf {
  char *p;      /* NUL terminated whenever not NULL; the NUL is not counted in len */
  size_t len;   /* bytes in use */
  size_t cap;   /* bytes allocated */
  size_t max;   /* len may never pass this */
};

/* An empty buffer that may hold at most max bytes. Allocates nothing. */
void buf_init(struct buf *b, size_t max);

/* Frees the bytes; the buffer may be used again as an empty one. NULL and never used are fine. */
void buf_close(struct buf *b);

/* Append. E_TOOBIG past the maximum, E_NOMEM when memory is short; the content is unchanged then. */
MUST_CHECK int buf_add(struct buf *b, const void *p, size_t n, struct err *e);
MUST_CHECK int buf_add_str(struct buf *b, const char *s, struct err *e);
MUST_CHECK int buf_addf(struct buf *b, struct err *e, const char *fmt, ...) __attribute__((format(printf, 3, 4)));

/* Hands the bytes to the caller, who frees them with free(); the buffer is empty after. NULL when it was empty. */
char *buf_take(struct buf *b, size_t *len);

#endif
