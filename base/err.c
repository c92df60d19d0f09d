/*
 * err.c - see err.h. Called by everything; no state.
 */
#include "base/err.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

static int record(struct err *e, int code, const char *field, const char *fmt, va_list ap)
{
  if (!e)
    return code;
  if (e->code)
    return e->code; /* the first cause wins */
  e->code = code;
  snprintf(e->field, sizeof e->field, "%s", field);
  vsnprintf(e->msg, sizeof e->msg, fmt, ap);
  return code;
}

int err_set(struct err *e, int code, const char *fmt, ...)
{
  va_list ap;
  va_start(ap, fmt);
  code = record(e, code, "", fmt, ap);
  va_end(ap);
  return code;
}

int err_field(struct err *e, int code, const char *field, const char *fmt, ...)
{
  va_list ap;
  va_start(ap, fmt);
  code = record(e, code, field, fmt, ap);
  va_end(ap);
  return code;
}

int err_wrap(struct err *e, const char *fmt, ...)
{
  char prefix[160], old[sizeof e->msg];
  va_list ap;

  if (!e)
    return E_INTERNAL;
  va_start(ap, fmt);
  vsnprintf(prefix, sizeof prefix, fmt, ap);
  va_end(ap);
  memcpy(old, e->msg, sizeof old);
  snprintf(e->msg, sizeof e->msg, "%s: %.*s", prefix, (int)(sizeof e->msg - sizeof prefix - 3), old);
  return e->code;
}

const char *err_name(int code)
{
  static const char *const names[] = {"ok",     "arg",      "notfound", "busy",   "nomem",   "file", "policy", "device",
                                      "cancel", "internal", "toobig",   "method", "timeout", "type", "auth", "notready",
                                      "conflict", "full",  "crashed",  "gone", "absent"};
  unsigned i = 0u - (unsigned)code; /* defined for INT_MIN too */

  return code <= 0 && i < sizeof names / sizeof *names ? names[i] : "unknown";
}
