/*
 * sse.c - see sse.h.
 */
#include "proto/sse.h"

#include <errno.h>
#include <stdlib.h>

int sse_begin(struct buf *out, const char *name, int64_t id, struct err *e)
{
  int r = id < 0 ? 0 : buf_addf(out, e, "id: %lld\n", (long long)id);

  return r ? r : buf_addf(out, e, "event: %s\ndata: ", name);
}

int sse_end(struct buf *out, struct err *e)
{
  return buf_add_str(out, "\n\n", e);
}

int64_t sse_last_id(const char *header)
{
  char *end;
  long long v;

  if (!header || *header < '0' || *header > '9')
    return -1;
  errno = 0;
  v = strtoll(header, &end, 10);
  return *end || errno ? -1 : v;
}
