/*
 * multipart.h - a multipart/form-data body (RFC 7578 on RFC 2046) that is in memory as a whole, as its parts. Nothing is copied: parts point into it.
 *
 * Strict where leniency would let two readers see two forms: lines end in CRLF, a line that begins with the boundary is one (RFC 2046, 5.1.1) and holds
 * nothing else but white space or the closing "--", the closing boundary is there, every part has a name. What stands before the first boundary and after
 * the last is ignored, as the RFC says. A part's own encoding must be the identity (RFC 7578, 4.7).
 *
 * Called by the decoders in proto/. Threads: pure functions.
 */
#ifndef SAFELIGHT_PROTO_MULTIPART_H
#define SAFELIGHT_PROTO_MULTIPART_H

#include <stddef.h>

#include "base/err.h"

enum {
  MULTIPART_PARTS_MAX = 64,
  MULTIPART_NAME_MAX = 256,    /* bytes of a name or a filename */
  MULTIPART_HEADERS_MAX = 4096 /* bytes of one part's headers */
};

/* Bytes of the body, not NUL terminated. p NULL: there is none. */
struct multipart_span {
  const char *p;
  size_t len;
};

struct multipart_part {
  struct multipart_span name;     /* as sent: \" and %22 stay what they are */
  struct multipart_span filename; /* the same; a part with one is a file */
  struct multipart_span type;     /* Content-Type, parameters included */
  struct multipart_span data;     /* may be empty, never NULL */
};

struct multipart {
  int n;
  struct multipart_part part[MULTIPART_PARTS_MAX]; /* in the order of the body; names may repeat */
};

/* Parses a body under the request's Content-Type header (may be NULL). Parts borrow from body. E_TYPE when the type is not multipart/form-data, E_ARG with
 * e->field "Content-Type" or the part's name otherwise; m->n is 0 after a failure. */
MUST_CHECK int multipart_parse(struct multipart *m, const char *content_type, const char *body, size_t len, struct err *e);

/* The first part of that name at index from or later; NULL when there is none. Index of a part: part - m->part. */
const struct multipart_part *multipart_find(const struct multipart *m, const char *name, int from);

#endif
