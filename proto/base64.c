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

/* What a character is worth, plus one; 0 is none of the alphabet. A table, since a picture is a million of them. */
static const uint8_t worth[256] = {
    ['A'] = 1,  ['B'] = 2,  ['C'] = 3,  ['D'] = 4,  ['E'] = 5,  ['F'] = 6,  ['G'] = 7,  ['H'] = 8,  ['I'] = 9,  ['J'] = 10, ['K'] = 11,
    ['L'] = 12, ['M'] = 13, ['N'] = 14, ['O'] = 15, ['P'] = 16, ['Q'] = 17, ['R'] = 18, ['S'] = 19, ['T'] = 20, ['U'] = 21, ['V'] = 22,
    ['W'] = 23, ['X'] = 24, ['Y'] = 25, ['Z'] = 26, ['a'] = 27, ['b'] = 28, ['c'] = 29, ['d'] = 30, ['e'] = 31, ['f'] = 32, ['g'] = 33,
    ['h'] = 34, ['i'] = 35, ['j'] = 36, ['k'] = 37, ['l'] = 38, ['m'] = 39, ['n'] = 40, ['o'] = 41, ['p'] = 42, ['q'] = 43, ['r'] = 44,
    ['s'] = 45, ['t'] = 46, ['u'] = 47, ['v'] = 48, ['w'] = 49, ['x'] = 50, ['y'] = 51, ['z'] = 52, ['0'] = 53, ['1'] = 54, ['2'] = 55,
    ['3'] = 56, ['4'] = 57, ['5'] = 58, ['6'] = 59, ['7'] = 60, ['8'] = 61, ['9'] = 62, ['+'] = 63, ['/'] = 64,
};

/* Whole quartets up to the first character that is none of the alphabet. Returns how many characters it took. */
static size_t decode_run(uint8_t *out, const char *text, size_t len)
{
  const unsigned char *s = (const unsigned char *)text;
  size_t i = 0;

  for (; len - i >= 4; i += 4, out += 3) {
    unsigned a = worth[s[i]], b = worth[s[i + 1]], c = worth[s[i + 2]], d = worth[s[i + 3]];
    uint32_t v;
    if (!a || !b || !c || !d)
      break;
    v = (a - 1) << 18 | (b - 1) << 12 | (c - 1) << 6 | (d - 1);
    out[0] = (uint8_t)(v >> 16);
    out[1] = (uint8_t)(v >> 8);
    out[2] = (uint8_t)v;
  }
  return i;
}

/* What remains when the digits are at their end: have of them (0..3) in bits, and pads padding characters. */
static int finish(uint8_t *out, size_t *at, uint32_t bits, unsigned have, unsigned pads, struct err *e)
{
  if (have == 1 || (have ? have + pads != 4 : pads))
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
    unsigned char c = (unsigned char)text[i];
    if (!have && !pads) {
      size_t run = decode_run(out + at, text + i, len - i);
      at += run / 4 * 3;
      i += run;
      if (i == len)
        break;
      c = (unsigned char)text[i];
    }
    if (c == ' ' || c == '\t' || c == '\r' || c == '\n')
      continue;
    if (c == '=') {
      pads++;
      continue;
    }
    if (!worth[c])
      return err_set(e, E_ARG, "character %zu is not base64", i);
    if (pads)
      return err_set(e, E_ARG, "character %zu follows the padding that ends base64", i);
    bits = bits << 6 | (worth[c] - 1u);
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
