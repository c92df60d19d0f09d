/*
 * pack.c - see pack.h. Called by image_png.c. Threads: pure functions.
 *
 * A block is looked at three times: its runs are found, its other bytes are counted, and it is written. Codes have at most 14 bits, so that four of them and
 * what an unfinished byte holds fit 64 bits.
 */
#include "proto/pack.h"

#include <endian.h>
#include <libdeflate.h>
#include <stdlib.h>
#include <string.h>

enum {
  BLOCK = 65535,         /* bytes; also what a stored block holds at most */
  RUN_MIN = 4, RUN_MAX = 258,
  RUNS = BLOCK / RUN_MIN + 1,
  LITERALS = 286, END = 256, FIRST_LENGTH = 257, LENGTHS = 29,
  CODE_MAX = 14,         /* bits */
  LENGTH_CODES = 19, LENGTH_CODE_MAX = 7,
  OVERHANG = 8           /* bytes that put_bits writes past what it counts */
};

/* RFC 1951, 3.2.5: the first length of each symbol from FIRST_LENGTH on, and its extra bits. */
static const uint16_t length_first[LENGTHS] = {3,  4,  5,  6,  7,  8,  9,  10, 11,  13,  15,  17,  19,  23, 27,
                                               31, 35, 43, 51, 59, 67, 83, 99, 115, 131, 163, 195, 227, 258};
static const uint8_t length_extra[LENGTHS] = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 0};

struct run {
  uint32_t at;           /* where in the block */
  uint16_t len;          /* RUN_MIN..RUN_MAX, as often as the byte before is repeated */
};

struct code {
  uint16_t bits;         /* the first one lowest */
  uint16_t len;
};

struct bits {
  uint8_t *to;
  uint64_t held;
  unsigned n;            /* bits in held: fewer than 8 after flush */
};

/* ---- bits ---- */

static inline void put_bits(struct bits *b, unsigned value, unsigned n)
{
  b->held |= (uint64_t)value << b->n;
  b->n += n;
}

static inline void flush(struct bits *b)
{
  uint64_t held = htole64(b->held);

  memcpy(b->to, &held, sizeof held);
  b->to += b->n >> 3;
  b->held >>= b->n & ~7u;
  b->n &= 7;
}

static void to_byte(struct bits *b)
{
  b->n = (b->n + 7) & ~7u;
  flush(b);
}

/* ---- codes ---- */

/* A symbol and how often it occurs, in one number that sorts. */
static int by_count(const void *a, const void *b)
{
  uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

  return (x > y) - (x < y);
}

/* Lengths of an optimal prefix code for n >= 2 weights in rising order, in their place, longest first (Moffat and Katajainen 1995). */
static void optimal_lengths(uint32_t *w, int n)
{
  int root = 0, leaf = 2, available, used, depth, next;

  w[0] += w[1];
  for (next = 1; next < n - 1; next++) { /* join the two lightest; w[i] of a joined one becomes its parent */
    if (leaf >= n || w[root] < w[leaf]) {
      w[next] = w[root];
      w[root++] = (uint32_t)next;
    } else {
      w[next] = w[leaf++];
    }
    if (leaf >= n || (root < next && w[root] < w[leaf])) {
      w[next] += w[root];
      w[root++] = (uint32_t)next;
    } else {
      w[next] += w[leaf++];
    }
  }
  w[n - 2] = 0;
  for (next = n - 3; next >= 0; next--)
    w[next] = w[w[next]] + 1;
  available = 1;
  depth = used = 0;
  root = n - 2;
  next = n - 1;
  while (available > 0) { /* depths of the joined ones to lengths of the leaves */
    for (; root >= 0 && (int)w[root] == depth; root--)
      used++;
    for (; available > used; available--)
      w[next--] = (uint32_t)depth;
    available = 2 * used;
    depth++;
    used = 0;
  }
}

/* Cuts lengths (longest first) to max, and lengthens others until they are a code again. */
static void limit_lengths(uint32_t *len, int n, unsigned max)
{
  uint32_t full = 1u << max, sum = 0;
  int i;

  for (i = 0; i < n; i++) {
    if (len[i] > max)
      len[i] = max;
    sum += full >> len[i];
  }
  for (i = 0; sum > full; i++) /* the rarest that is not yet of full length pays first */
    for (; len[i] < max && sum > full; len[i]++)
      sum -= full >> (len[i] + 1);
  for (i = n - 1; i >= 0; i--) /* what that was too much goes to the most frequent that it fits */
    while (len[i] > 1 && sum + (full >> len[i]) <= full)
      sum += full >> len[i]--;
}

/* RFC 1951, 3.2.2: the codes from their lengths, turned around because bits are written lowest first. */
static void number_codes(struct code *code, int n, unsigned max)
{
  unsigned count[CODE_MAX + 2] = {0}, next[CODE_MAX + 2] = {0};

  for (int i = 0; i < n; i++)
    count[code[i].len]++;
  count[0] = 0;
  for (unsigned k = 1; k <= max; k++)
    next[k] = (next[k - 1] + count[k - 1]) << 1;
  for (int i = 0; i < n; i++) {
    unsigned v = code[i].len ? next[code[i].len]++ : 0, turned = 0;
    for (unsigned k = 0; k < code[i].len; k++)
      turned |= (v >> k & 1) << (code[i].len - 1 - k);
    code[i].bits = (uint16_t)turned;
  }
}

/* Codes of at most max bits for n symbols that occur count times, two of them at least. */
static void make_codes(struct code *code, const uint32_t *count, int n, unsigned max)
{
  uint64_t order[LITERALS];
  uint32_t len[LITERALS] = {0};
  int used = 0;

  for (int i = 0; i < n; i++) {
    code[i] = (struct code){0, 0};
    if (count[i])
      order[used++] = (uint64_t)count[i] << 16 | (unsigned)i;
  }
  qsort(order, (size_t)used, sizeof *order, by_count);
  for (int i = 0; i < used; i++)
    len[i] = (uint32_t)(order[i] >> 16);
  optimal_lengths(len, used);
  limit_lengths(len, used, max);
  for (int i = 0; i < used; i++)
    code[order[i] & 0xffff].len = (uint16_t)len[i];
  number_codes(code, n, max);
}

/* ---- a block ---- */

static int length_symbol(unsigned len)
{
  int i = LENGTHS - 1;

  while (length_first[i] > len)
    i--;
  return i;
}

/* Finds the runs of a block: the bytes from at on that are all as the one before. Returns how many there are. */
static int find_runs(struct run *run, const uint8_t *in, size_t n)
{
  int runs = 0;
  size_t i = 1, end;

  while (i + RUN_MIN <= n) {
    uint32_t four;
    memcpy(&four, in + i, sizeof four);
    if (four != in[i - 1] * 0x01010101u) {
      i++;
      continue;
    }
    for (end = i + RUN_MIN; end < n && end - i < RUN_MAX && in[end] == in[i];)
      end++;
    run[runs++] = (struct run){(uint32_t)i, (uint16_t)(end - i)};
    i = end;
  }
  return runs;
}

/* Four counters, since one would wait for itself where a byte follows itself. */
static void count_bytes(uint32_t count[4][256], const uint8_t *in, size_t n)
{
  size_t i = 0;

  for (; i + 4 <= n; i += 4) {
    count[0][in[i]]++;
    count[1][in[i + 1]]++;
    count[2][in[i + 2]]++;
    count[3][in[i + 3]]++;
  }
  for (; i < n; i++)
    count[0][in[i]]++;
}

static void count_block(uint32_t *count, const uint8_t *in, size_t n, const struct run *run, int runs)
{
  uint32_t four[4][256] = {{0}};
  size_t at = 0;

  memset(count, 0, LITERALS * sizeof *count);
  for (int k = 0; k < runs; k++) {
    count_bytes(four, in + at, run[k].at - at);
    count[FIRST_LENGTH + length_symbol(run[k].len)]++;
    at = run[k].at + run[k].len;
  }
  count_bytes(four, in + at, n - at);
  for (int i = 0; i < 256; i++)
    count[i] = four[0][i] + four[1][i] + four[2][i] + four[3][i];
  count[END] = 1;
}

static void put_code(struct bits *b, struct code c)
{
  put_bits(b, c.bits, c.len);
}

static void put_literals(struct bits *b, const struct code *code, const uint8_t *in, size_t n)
{
  struct bits own = *b;
  size_t i = 0;

  for (; i + 4 <= n; i += 4) {
    put_code(&own, code[in[i]]);
    put_code(&own, code[in[i + 1]]);
    put_code(&own, code[in[i + 2]]);
    put_code(&own, code[in[i + 3]]);
    flush(&own);
  }
  for (; i < n; i++) {
    put_code(&own, code[in[i]]);
    flush(&own);
  }
  *b = own;
}

/* What a block's codes are: their lengths, coded themselves. Both distances' codes have one bit; the first stands for 1, the only one there is. */
static void put_header(struct bits *b, const struct code *code, const struct code *of_length, int is_last)
{
  static const uint8_t order[LENGTH_CODES] = {16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15};

  put_bits(b, (unsigned)is_last, 1);
  put_bits(b, 2, 2);
  put_bits(b, LITERALS - 257, 5);
  put_bits(b, 2 - 1, 5);
  put_bits(b, LENGTH_CODES - 4, 4);
  flush(b);
  for (int i = 0; i < LENGTH_CODES; i++) {
    put_bits(b, of_length[order[i]].len, 3);
    flush(b);
  }
  for (int i = 0; i < LITERALS; i++) {
    put_code(b, of_length[code[i].len]);
    flush(b);
  }
  put_code(b, of_length[1]);
  put_code(b, of_length[1]);
  flush(b);
}

static void put_stored(struct bits *b, const uint8_t *in, size_t n, int is_last)
{
  put_bits(b, (unsigned)is_last, 3); /* the type is 0 */
  to_byte(b);
  put_bits(b, (unsigned)n, 16);
  put_bits(b, (unsigned)n ^ 0xffff, 16);
  flush(b);
  memcpy(b->to, in, n);
  b->to += n;
}

static void put_block(struct bits *b, const uint8_t *in, size_t n, struct run *run, int is_last)
{
  int runs;
  uint32_t count[LITERALS], lengths[LENGTH_CODES] = {[1] = 2};
  struct code code[LITERALS], of_length[LENGTH_CODES];
  size_t at = 0, cost = 17 + 3 * LENGTH_CODES;

  if (n < RUN_MIN) { /* nothing to make codes of */
    put_stored(b, in, n, is_last);
    return;
  }
  runs = find_runs(run, in, n);
  count_block(count, in, n, run, runs);
  make_codes(code, count, LITERALS, CODE_MAX);
  for (int i = 0; i < LITERALS; i++)
    lengths[code[i].len]++;
  make_codes(of_length, lengths, LENGTH_CODES, LENGTH_CODE_MAX);
  for (int i = 0; i < LITERALS; i++)
    cost += (size_t)count[i] * (code[i].len + (i >= FIRST_LENGTH ? 1u + length_extra[i - FIRST_LENGTH] : 0)) + of_length[code[i].len].len;
  if (cost / 8 > n) {
    put_stored(b, in, n, is_last);
    return;
  }
  put_header(b, code, of_length, is_last);
  for (int k = 0; k < runs; k++) {
    int s = length_symbol(run[k].len);
    put_literals(b, code, in + at, run[k].at - at);
    put_code(b, code[FIRST_LENGTH + s]);
    put_bits(b, (unsigned)run[k].len - length_first[s], length_extra[s]);
    put_bits(b, 0, 1); /* distance 1 */
    flush(b);
    at = run[k].at + run[k].len;
  }
  put_literals(b, code, in + at, n - at);
  put_code(b, code[END]);
  flush(b);
}

size_t pack_bound(size_t n)
{
  /* A block takes at most its bytes, the bits around them and a stored block's lengths; two bytes before all and four behind. */
  return 2 + n + 16 * (n / BLOCK + 1) + 4 + OVERHANG;
}

size_t pack_zlib(uint8_t *out, const uint8_t *in, size_t n)
{
  struct run run[RUNS];
  struct bits b = {.to = out + 2};
  uint32_t sum = libdeflate_adler32(1, in, n);
  size_t at = 0, part;

  out[0] = 0x78; /* deflate, a window of 32 kB */
  out[1] = 0x01; /* the fastest way; makes both a multiple of 31 */
  do {
    part = n - at < BLOCK ? n - at : BLOCK;
    put_block(&b, in + at, part, run, at + part == n);
    at += part;
  } while (at < n);
  to_byte(&b);
  for (int i = 0; i < 4; i++)
    *b.to++ = (uint8_t)(sum >> (24 - 8 * i));
  return (size_t)(b.to - out);
}
