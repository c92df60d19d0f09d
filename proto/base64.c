/*
 * base64.c - see base64.h. Method: RFC 4648, section 4.
 */
#include "proto/base64.h"

#include <string.h>
#include <strings.h>

static const char digit[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

int base64_encode(struct buf *out, const void *data, size_t len, struct err *e)
{
  const uint8_t *p = data;
  char chunk[4096];
  size_t n = 0, before = out->len;
  unsigned v;

  for (; len >= 3; len -= 3, p += 3) {
    v = (unsigned)p[0] << 16 | (unsigned)p[1] << 8 | p[2];
    chunk[n++] = digit[v >> 18];
    chunk[n++] = digit[v >> 12 & 63];
    chunk[n++] = digit[v >> 6 & 63];
    chunk[n++] = digit[v & 63];
    if (n == sizeof chunk) {
      if (buf_add(out, chunk, n, e))
        goto out;
      n = 0;
    }
  }
  if (len) {
    v = (unsigned)p[0] << 16 | (len == 2 ? (unsigned)p[1] << 8 : 0);
    chunk[n++] = digit[v >> 18];
    chunk[n++] = digit[v >> 12 & 63];
    chunk[n++] = len == 2 ? digit[v >> 6 & 63] : '=';
    chunk[n++] = '=';
  }
  if (!buf_add(out, chunk, n, e))
    return 0;
out:
  out->len = before;
  if (out->p)
    out->p[before] = 0;
  return e ? e->code : E_TOOBIG;
}

size_t base64_decode_bound(size_t len)
{
  return len / 4 * 3 + 3;
}

/* 0..63, or 64: padding, 65: skipped, 66: none of them. */
static unsigned value_of(unsigned char c)
{
  if (c >= 'A' && c <= 'Z')
    return c - 'A';
  if (c >= 'a' && c <= 'z')
    return c - 'a' + 26u;
  if (c >= '0' && c <= '9')
    return c - '0' + 52u;
  switch (c) {
  case '+': return 62;
  case '/': return 63;
  case '=': return 64;
  case ' ': case '\t': case '\r': case '\n': return 65;
  default: return 66;
  }
}

/* What remains when the digits are at their end: have of them (0..3) in bits, and pads padding characters. */
static int finish(uint8_t *out, size_t *at, uint32_t bits, unsigned have, unsigned pads, struct err *e)
{
  if (have == 1 || (have + pads) % 4 || (!have && pads))
    return err_set(e, E_ARG, "the base64 text is cut off or its padding is wrong");
  if (have && (bits & (have == 2 ? 15u : 3u)))
    return err_set(e, E_ARG, "the base64 text is damaged at its end: bits that belong to no byte are set");
  if (have == 2) {
    out[(*at)++] = (uint8_t)(bits >> 4);
  } else if (have == 3) {
    out[(*at)++] = (uint8_t)(bits >> 10);
    out[(*at)++] = (uint8_t)(bits >> 2);
  }
  return 0;
}

int base64_decode(uint8_t *out, size_t *n, const char *text, size_t len, struct err *e)
{
  uint32_t bits = 0;
  unsigned have = 0, pads = 0;
  size_t at = 0;

  for (size_t i = 0; i < len; i++) {
    unsigned v = value_of((unsigned char)text[i]);
    if (v == 65)
      continue;
    if (v == 66)
      return err_set(e, E_ARG, "character %zu is not base64", i);
    if (v == 64) {
      pads++;
      continue;
    }
    if (pads)
      return err_set(e, E_ARG, "character %zu follows the padding that ends base64", i);
    bits = bits << 6 | v;
    if (++have == 4) {
      out[at++] = (uint8_t)(bits >> 16);
      out[at++] = (uint8_t)(bits >> 8);
      out[at++] = (uint8_t)bits;
      bits = have = 0;
    }
  }
  *n = at;
  return finish(out, n, bits, have, pads, e);
}

const char *base64_of_url(const char *text, size_t *len)
{
  static const char mark[] = ";base64,";
  const char *end;

  if (*len < 5 || strncasecmp(text, "data:", 5))
    return text;
  end = memmem(text, *len < 256 ? *len : 256, mark, sizeof mark - 1);
  if (!end)
    return text;
  *len -= (size_t)(end + sizeof mark - 1 - text);
  return end + sizeof mark - 1;
}
