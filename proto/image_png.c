/*
 * image_png.c - PNG files. See image.h.
 *
 * Every row is filtered three ways (sub, up, Paeth) and the one with the smallest sum of absolute differences is kept, which is libpng's own heuristic without
 * the two filters that hardly ever win on drawn pictures. What is left goes through pack.h, or through libdeflate where small files matter more than time.
 *
 * Called by image.c. Threads: an encoder belongs to one thread at a time.
 */
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("O3") /* gcc vectorises the filters only here: 1.0 instead of 11 ms for 512x512 */
#endif

#include <libdeflate.h>
#include <stdlib.h>
#include <string.h>

#include "proto/image_codec.h"
#include "proto/pack.h"

enum { BPP = 3, FILTER_SUB = 1, FILTER_UP = 2, FILTER_PAETH = 4 };

/* ---- filters: a row of n bytes, up is the row before; out gets n bytes. The loops are written to vectorise. ---- */

static void filter_sub(uint8_t *restrict out, const uint8_t *restrict row, size_t n)
{
  memcpy(out, row, BPP);
  for (size_t i = BPP; i < n; i++)
    out[i] = (uint8_t)(row[i] - row[i - BPP]);
}

static void filter_up(uint8_t *restrict out, const uint8_t *restrict row, const uint8_t *restrict up, size_t n)
{
  for (size_t i = 0; i < n; i++)
    out[i] = (uint8_t)(row[i] - up[i]);
}

/* A mask of 16 bits: all of them where is_so is 1. Masks, because gcc makes branches of ?: here and vectorises nothing then. */
static inline int16_t mask_of(int is_so)
{
  return (int16_t)-is_so;
}

static void filter_paeth(uint8_t *restrict out, const uint8_t *restrict row, const uint8_t *restrict up, size_t n)
{
  for (size_t i = 0; i < BPP; i++)
    out[i] = (uint8_t)(row[i] - up[i]); /* left and upper left are 0: the predictor is up */
  for (size_t i = BPP; i < n; i++) {
    int16_t a = row[i - BPP], b = up[i], c = up[i - BPP];
    int16_t da = (int16_t)(b - c), db = (int16_t)(a - c), dc = (int16_t)(da + db);
    int16_t pa = (int16_t)abs(da), pb = (int16_t)abs(db), pc = (int16_t)abs(dc);
    int16_t takes_b = mask_of(pb <= pc), takes_a = mask_of(pa <= pb) & mask_of(pa <= pc);
    int16_t bc = (int16_t)((b & takes_b) | (c & ~takes_b));
    out[i] = (uint8_t)(row[i] - ((a & takes_a) | (bc & ~takes_a)));
  }
}

/* Sum of |byte| read as signed: how much is left for deflate to say. In pieces whose sum fits 16 bits, which are half as wide as 32. */
static uint32_t row_cost(const uint8_t *p, size_t n)
{
  enum { PIECE = 256 }; /* times 128 */
  uint32_t sum = 0;

  for (size_t at = 0; at < n; at += PIECE) {
    size_t end = n - at < PIECE ? n : at + PIECE;
    uint16_t part = 0;
    for (size_t i = at; i < end; i++) {
      uint8_t v = p[i], minus = (uint8_t)-p[i];
      part = (uint16_t)(part + (v < minus ? v : minus));
    }
    sum += part;
  }
  return sum;
}

/* Writes h rows of 1 + n bytes (filter type, filtered row) to out; cand is room for three rows. */
static void filter_picture(uint8_t *out, uint8_t *cand, const uint8_t *rgb, size_t n, int h)
{
  uint8_t *sub = cand, *up = cand + n, *paeth = cand + 2 * n, *best;
  uint32_t cost, best_cost;
  int type;

  for (int y = 0; y < h; y++, out += n + 1) {
    const uint8_t *row = rgb + (size_t)y * n;
    filter_sub(sub, row, n);
    best = sub;
    type = FILTER_SUB;
    if (y) {
      best_cost = row_cost(sub, n);
      filter_up(up, row, row - n, n);
      cost = row_cost(up, n);
      if (cost < best_cost) {
        best = up;
        type = FILTER_UP;
        best_cost = cost;
      }
      filter_paeth(paeth, row, row - n, n);
      if (row_cost(paeth, n) < best_cost) {
        best = paeth;
        type = FILTER_PAETH;
      }
    }
    out[0] = (uint8_t)type;
    memcpy(out + 1, best, n);
  }
}

/* ---- chunks ---- */

static void put32(uint8_t *p, uint32_t v)
{
  p[0] = (uint8_t)(v >> 24);
  p[1] = (uint8_t)(v >> 16);
  p[2] = (uint8_t)(v >> 8);
  p[3] = (uint8_t)v;
}

/* Length, type, head and body, CRC. The body may be NULL when there is only a head. */
static int add_chunk(struct buf *out, const char *type, const void *head, size_t head_len, const void *body, size_t body_len,
                     struct err *e)
{
  uint8_t word[4];
  uint32_t crc = libdeflate_crc32(0, type, 4);

  crc = libdeflate_crc32(crc, head, head_len);
  if (body)
    crc = libdeflate_crc32(crc, body, body_len);
  put32(word, (uint32_t)(head_len + body_len));
  if (buf_add(out, word, 4, e) || buf_add(out, type, 4, e) || buf_add(out, head, head_len, e) ||
      (body && buf_add(out, body, body_len, e)))
    return e->code;
  put32(word, crc);
  return buf_add(out, word, 4, e);
}

/* UTF-8 to Latin-1 in place of dst (as many bytes as src at most). Returns the length, or -1 when a character is beyond it. */
static int64_t to_latin1(char *dst, const char *src)
{
  const unsigned char *s = (const unsigned char *)src;
  char *d = dst;

  while (*s) {
    if (*s < 0x80) {
      *d++ = (char)*s++;
    } else if ((*s == 0xc2 || *s == 0xc3) && (s[1] & 0xc0) == 0x80) {
      *d++ = (char)((*s & 3) << 6 | (s[1] & 0x3f));
      s += 2;
    } else {
      return -1;
    }
  }
  return d - dst;
}

static int add_parameters(struct buf *out, const char *text, struct err *e)
{
  static const char plain[] = "parameters";               /* keyword and its NUL */
  static const char international[] = "parameters\0\0\0\0"; /* keyword, not compressed, no language, no translated keyword */
  char *latin = malloc(strlen(text) + 1);
  int64_t n;
  int r;

  if (!latin)
    return err_set(e, E_NOMEM, "out of memory for the picture's text");
  n = to_latin1(latin, text);
  r = n >= 0 ? add_chunk(out, "tEXt", plain, sizeof plain, latin, (size_t)n, e)
             : add_chunk(out, "iTXt", international, sizeof international, text, strlen(text), e);
  free(latin);
  return r;
}

static int add_texts(struct buf *out, const struct image_text *t, struct err *e)
{
  static const char xmp[] = "XML:com.adobe.xmp\0\0\0\0";

  if (t->parameters && add_parameters(out, t->parameters, e))
    return e->code;
  return t->xmp ? add_chunk(out, "iTXt", xmp, sizeof xmp, t->xmp, strlen(t->xmp), e) : 0;
}

/* Room for the two ways to pack n bytes. */
static size_t bound_of(const struct image_encoder *enc, size_t n)
{
  return pack_bound(n) + (enc->deflate ? libdeflate_zlib_compress_bound(enc->deflate, n) : 0);
}

/* Packs n bytes into room of bound_of(n), the smaller of the two ways when libdeflate is asked: on noise its search finds matches that cost more than codes.
 * Returns where and, in *len, how long. */
static const uint8_t *pack(const struct image_encoder *enc, uint8_t *room, const uint8_t *in, size_t n, size_t *len)
{
  uint8_t *second = room + pack_bound(n);
  size_t other = enc->deflate ? libdeflate_zlib_compress(enc->deflate, in, n, second, libdeflate_zlib_compress_bound(enc->deflate, n)) : 0;

  *len = pack_zlib(room, in, n);
  if (!other || *len <= other)
    return room;
  *len = other;
  return second;
}

static int reserve(struct image_encoder *enc, size_t bytes)
{
  if (enc->scratch_bytes >= bytes)
    return 0;
  free(enc->scratch);
  enc->scratch = malloc(bytes);
  enc->scratch_bytes = enc->scratch ? bytes : 0;
  return enc->scratch ? 0 : E_NOMEM;
}

int image_encode_png(struct image_encoder *enc, struct buf *out, const uint8_t *rgb, int w, int h, const struct image_text *text,
                     struct err *e)
{
  static const uint8_t signature[8] = {0x89, 'P', 'N', 'G', '\r', '\n', 0x1a, '\n'};
  uint8_t ihdr[13] = {[8] = 8 /* bits */, [9] = 2 /* RGB */};
  size_t n = (size_t)w * BPP, filtered, len;
  const uint8_t *packed;

  if (w < 1 || h < 1 || w > IMAGE_MAX_SIDE || h > IMAGE_MAX_SIDE)
    return err_set(e, E_INTERNAL, "a picture of %dx%d cannot be encoded", w, h);
  filtered = (n + 1) * (size_t)h;
  if (reserve(enc, filtered + 3 * n + bound_of(enc, filtered)))
    return err_set(e, E_NOMEM, "out of memory for a %dx%d picture", w, h);
  filter_picture(enc->scratch, enc->scratch + filtered, rgb, n, h);
  packed = pack(enc, enc->scratch + filtered + 3 * n, enc->scratch, filtered, &len);
  put32(ihdr, (uint32_t)w);
  put32(ihdr + 4, (uint32_t)h);
  if (buf_add(out, signature, sizeof signature, e) || add_chunk(out, "IHDR", ihdr, sizeof ihdr, NULL, 0, e) ||
      (text && add_texts(out, text, e)) || add_chunk(out, "IDAT", packed, len, NULL, 0, e) ||
      add_chunk(out, "IEND", "", 0, NULL, 0, e))
    return e->code;
  return 0;
}
