/*
 * trace.c - see trace.h. Source: W3C Recommendation "Trace Context", level 1, section 3.2.
 */
#include "server/trace.h"

#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>

enum { AT_ID = 3, AT_PARENT = 36, AT_FLAGS = 53 };

/* n digits of lower-case hexadecimal. */
static int is_hex(const char *s, size_t n)
{
  return strspn(s, "0123456789abcdef") >= n;
}

static int is_zero(const char *s, size_t n)
{
  return strspn(s, "0") >= n;
}

static int digit(char c)
{
  return c <= '9' ? c - '0' : c - 'a' + 10;
}

int trace_parse(struct trace *t, const char *header)
{
  size_t n = header ? strlen(header) : 0;

  *t = (struct trace){.id = ""};
  if (n < TRACE_HEADER || !is_hex(header, 2) || !memcmp(header, "ff", 2) || header[2] != '-' || header[AT_PARENT - 1] != '-' || header[AT_FLAGS - 1] != '-')
    return 0;
  /* Version 00 is exactly this long; a later one may go on after a dash. */
  if (n > TRACE_HEADER && (!memcmp(header, "00", 2) || header[TRACE_HEADER] != '-'))
    return 0;
  if (!is_hex(header + AT_ID, TRACE_ID) || is_zero(header + AT_ID, TRACE_ID) || !is_hex(header + AT_PARENT, TRACE_SPAN) ||
      is_zero(header + AT_PARENT, TRACE_SPAN) || !is_hex(header + AT_FLAGS, 2))
    return 0;
  memcpy(t->id, header + AT_ID, TRACE_ID);
  memcpy(t->parent, header + AT_PARENT, TRACE_SPAN);
  t->is_sampled = digit(header[AT_FLAGS + 1]) & 1;
  return 1;
}

/* n random digits, not all of them 0. An id, not a secret: without random numbers the clock does. */
static void draw_hex(char *out, size_t n)
{
  unsigned char bytes[TRACE_ID / 2];
  struct timespec now;
  uint64_t seed;

  do {
    if (getrandom(bytes, n / 2, 0) != (ssize_t)(n / 2)) {
      clock_gettime(CLOCK_MONOTONIC, &now);
      seed = (uint64_t)now.tv_sec * 1000000007u + (uint64_t)now.tv_nsec;
      for (size_t i = 0; i < n / 2; i++)
        bytes[i] = (unsigned char)((seed = seed * 6364136223846793005u + 1442695040888963407u) >> 56);
    }
    for (size_t i = 0; i < n / 2; i++)
      snprintf(out + 2 * i, 3, "%02x", bytes[i]);
  } while (is_zero(out, n));
}

void trace_begin(struct trace *t, const char *header)
{
  if (!trace_parse(t, header))
    draw_hex(t->id, TRACE_ID);
  draw_hex(t->span, TRACE_SPAN);
}

void trace_header(char out[TRACE_HEADER + 1], const struct trace *t)
{
  snprintf(out, TRACE_HEADER + 1, "00-%.32s-%.16s-%02x", t->id, t->span, t->is_sampled ? 1 : 0);
}
