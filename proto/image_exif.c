/*
 * image_exif.c - the little of EXIF that concerns us. See image_codec.h. Called by the readers and writers of formats. Threads: pure functions.
 */
#include <string.h>

#include "base/utf8.h"
#include "proto/image_codec.h"

enum { TAG_ORIENTATION = 0x0112, TYPE_SHORT = 3, ENTRY = 12, HEAD = 44, CODE = 8 };

static unsigned get16(const uint8_t *p, int is_little)
{
  return is_little ? (unsigned)p[1] << 8 | p[0] : (unsigned)p[0] << 8 | p[1];
}

static uint32_t get32(const uint8_t *p, int is_little)
{
  return is_little ? get16(p + 2, 1) << 16 | get16(p, 1) : get16(p, 0) << 16 | get16(p + 2, 0);
}

int exif_orientation(const uint8_t *tiff, size_t len)
{
  int is_little;
  uint32_t at;
  unsigned n, value;

  if (len < 8 || (memcmp(tiff, "II*\0", 4) && memcmp(tiff, "MM\0*", 4)))
    return 1;
  is_little = *tiff == 'I';
  at = get32(tiff + 4, is_little);
  if (at > len - 2)
    return 1;
  n = get16(tiff + at, is_little);
  for (size_t i = at + 2; n && i + ENTRY <= len; n--, i += ENTRY) {
    if (get16(tiff + i, is_little) != TAG_ORIENTATION)
      continue;
    value = get16(tiff + i + 8, is_little);
    return get16(tiff + i + 2, is_little) == TYPE_SHORT && value >= 1 && value <= 8 ? (int)value : 1;
  }
  return 1;
}

/* ---- writing ---- */

/* The character at *s, a valid one or what stands for a byte that is none; moves *s behind it. */
static uint32_t next_character(const char **s)
{
  const unsigned char *p = (const unsigned char *)*s;
  size_t n = utf8_length(*s);
  uint32_t c;

  *s += n ? n : 1;
  switch (n) {
  case 1: return *p;
  case 2: c = *p & 0x1f; break;
  case 3: c = *p & 0x0f; break;
  case 4: c = *p & 0x07; break;
  default: return 0xfffd;
  }
  for (size_t i = 1; i < n; i++)
    c = c << 6 | (p[i] & 0x3f);
  return c;
}

static int add_utf16(struct buf *out, uint32_t unit, struct err *e)
{
  const uint8_t two[2] = {(uint8_t)(unit >> 8), (uint8_t)unit};

  return buf_add(out, two, 2, e);
}

static int add_character(struct buf *out, uint32_t c, struct err *e)
{
  if (c < 0x10000)
    return add_utf16(out, c, e);
  c -= 0x10000;
  return add_utf16(out, 0xd800 + (c >> 10), e) || add_utf16(out, 0xdc00 + (c & 0x3ff), e) ? e->code : 0;
}

int exif_write_comment(struct buf *out, const char *text, size_t max, struct err *e)
{
  /* A directory of one entry that points to the EXIF directory, whose one entry is the comment. */
  uint8_t head[HEAD + 1] = "MM\0*\0\0\0\x08" "\0\x01\x87\x69\0\x04\0\0\0\x01\0\0\0\x1a\0\0\0\0"
                           "\0\x01\x92\x86\0\x07\0\0\0\0\0\0\0\x2c\0\0\0\0";
  size_t units = 0, len;
  int is_ascii = 1, is_unicode;

  for (const char *s = text; *s;) {
    uint32_t c = next_character(&s);
    units += c < 0x10000 ? 1 : 2;
    is_ascii &= c < 0x80;
  }
  is_unicode = HEAD + CODE + 2 * units <= max || !is_ascii;
  len = CODE + (is_unicode ? 2 * units : strlen(text));
  if (HEAD + len > max || HEAD + len > out->max - out->len)
    return err_set(e, E_TOOBIG, "a text of %zu characters does not fit into EXIF data of %zu bytes", units, max);
  for (int i = 0; i < 4; i++)
    head[32 + i] = (uint8_t)(len >> (24 - 8 * i));
  if (buf_add(out, head, HEAD, e) || buf_add(out, is_unicode ? "UNICODE" : "ASCII\0\0", CODE, e))
    return e->code;
  if (!is_unicode)
    return buf_add_str(out, text, e);
  while (*text)
    if (add_character(out, next_character(&text), e))
      return e->code;
  return 0;
}
