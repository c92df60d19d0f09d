/*
 * png_text.c - see png_text.h. Format: PNG specification (third edition), 5.3 chunks, 11.3.3 texts.
 */
#include "proto/png_text.h"

#include <libdeflate.h>
#include <string.h>

#include "base/utf8.h"

struct chunk {
  const uint8_t *type, *data;
  uint32_t len;
};

static uint32_t be32(const uint8_t *p)
{
  return (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | p[3];
}

/* The chunk at *at, which moves behind it. */
static int next_chunk(struct chunk *c, const uint8_t *file, size_t len, size_t *at, struct err *e)
{
  if (len - *at < 12 || be32(file + *at) > len - *at - 12)
    return err_set(e, E_ARG, "the PNG file is cut off");
  c->len = be32(file + *at);
  c->type = file + *at + 4;
  c->data = c->type + 4;
  if (libdeflate_crc32(0, c->type, (size_t)c->len + 4) != be32(c->data + c->len))
    return err_set(e, E_ARG, "the PNG file is damaged: a chunk's checksum is wrong");
  *at += (size_t)c->len + 12;
  return 0;
}

static int add_latin1(struct buf *out, const uint8_t *p, size_t n, struct err *e)
{
  for (size_t i = 0; i < n; i++) {
    char two[2] = {(char)(0xc0 | p[i] >> 6), (char)(0x80 | (p[i] & 0x3f))};
    if (p[i] && (p[i] < 0x80 ? buf_add(out, p + i, 1, e) : buf_add(out, two, 2, e)))
      return e->code;
  }
  return 0;
}

/* UTF-8 as it is; what is not becomes U+FFFD, a byte at a time. */
static int add_utf8(struct buf *out, const uint8_t *p, size_t n, struct err *e)
{
  char at[5];
  size_t k;

  for (size_t i = 0; i < n; i += k) {
    memset(at, 0, sizeof at);
    memcpy(at, p + i, n - i < 4 ? n - i : 4);
    k = *at ? utf8_length(at) : 0;
    if (k ? buf_add(out, p + i, k, e) : p[i] && buf_add_str(out, "\xef\xbf\xbd", e))
      return e->code;
    k = k ? k : 1;
  }
  return 0;
}

/* Where an iTXt chunk's text starts, behind its flags, language and translated keyword; 0 when it is compressed or malformed. */
static size_t itxt_start(const struct chunk *c, size_t at)
{
  const uint8_t *nul;

  if (c->len - at < 2 || c->data[at])
    return 0;
  at += 2;
  for (int i = 0; i < 2; i++) {
    nul = memchr(c->data + at, 0, c->len - at);
    if (!nul)
      return 0;
    at = (size_t)(nul - c->data) + 1;
  }
  return at;
}

int png_text_find(struct buf *out, const uint8_t *file, size_t len, const char *keyword, struct err *e)
{
  static const uint8_t magic[8] = {0x89, 'P', 'N', 'G', '\r', '\n', 0x1a, '\n'};
  size_t at = sizeof magic, key = strlen(keyword) + 1;
  struct chunk c = {NULL, NULL, 0};

  if (len < sizeof magic || memcmp(file, magic, sizeof magic))
    return err_set(e, E_ARG, "the file is not a PNG file");
  do {
    if (next_chunk(&c, file, len, &at, e))
      return e->code;
    if (c.len < key || memcmp(c.data, keyword, key))
      continue;
    if (!memcmp(c.type, "tEXt", 4))
      return add_latin1(out, c.data + key, c.len - key, e);
    size_t start = memcmp(c.type, "iTXt", 4) ? 0 : itxt_start(&c, key);
    if (start)
      return add_utf8(out, c.data + start, c.len - start, e);
  } while (memcmp(c.type, "IEND", 4));
  return 0;
}
