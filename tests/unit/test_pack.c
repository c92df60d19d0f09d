/*
 * test_pack.c - the zlib streams of pack.h against libdeflate's reader: every length of run, blocks that end anywhere, counts that ask for codes longer than
 * deflate has, what cannot be packed; and what a stream may cost. Threads: none.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>
#include <libdeflate.h>

#include "proto/pack.h"

/* Packs, holds the stream to what libdeflate reads in it and to its bound, and returns its length. */
static size_t check(const uint8_t *in, size_t n)
{
  struct libdeflate_decompressor *d = libdeflate_alloc_decompressor();
  size_t room = pack_bound(n), len, got, taken;
  uint8_t *out = malloc(room), *back = malloc(n + 1); /* both end where their memory ends */

  memset(out, 0x55, room);
  len = pack_zlib(out, in, n);
  assert_true(len <= room);
  assert_int_equal(libdeflate_zlib_decompress_ex(d, out, len, back, n, &taken, &got), LIBDEFLATE_SUCCESS);
  assert_int_equal(taken, len);
  assert_int_equal(got, n);
  assert_memory_equal(back, in, n);
  libdeflate_free_decompressor(d);
  free(out);
  free(back);
  return len;
}

static uint32_t next(uint32_t *s)
{
  *s = *s * 1664525 + 1013904223;
  return *s >> 8;
}

static void test_lengths(void **state)
{
  static uint8_t in[200000];
  static const size_t around[] = {65531, 65534, 65535, 65536, 65537, 65538, 65539, 65540, 131069, 131070, 131071, 131074, 200000};
  uint32_t s = 1;

  (void)state;
  for (int kind = 0; kind < 3; kind++) {
    for (size_t i = 0; i < sizeof in; i++)
      in[i] = kind == 0 ? 0 : kind == 1 ? (uint8_t)next(&s) : (uint8_t)(next(&s) % 7 ? 0 : next(&s) % 5);
    for (size_t n = 0; n < 600; n++)
      check(in, n);
    for (size_t i = 0; i < sizeof around / sizeof *around; i++)
      check(in, around[i]);
  }
}

/* Runs of every length, one after the other, with a byte between them and without. */
static void test_runs(void **state)
{
  static uint8_t in[1 << 20];
  uint32_t s = 7;

  (void)state;
  for (int gap = 0; gap < 2; gap++)
    for (int shift = 0; shift < 9; shift++) {
      size_t n = 0;
      for (size_t run = 1; run < 800; run++) {
        memset(in + n, (int)(run * 37 + 1) & 255, run);
        n += run;
        if (gap)
          in[n++] = (uint8_t)next(&s);
      }
      check(in + shift, n - (size_t)shift);
    }
}

/* Counts that grow as Fibonacci's numbers do would have the rarest take 21 bits. */
static void test_long_codes(void **state)
{
  uint8_t in[65535];
  uint32_t s = 3;

  (void)state;
  for (int powers = 0; powers < 2; powers++) {
    size_t n = 0, a = 1, b = 1;
    for (int v = 0; v < 22 && n + a <= sizeof in; v++) {
      memset(in + n, v, a);
      n += a;
      size_t c = powers ? 2 * a : a + b;
      b = a;
      a = c;
    }
    for (size_t i = n - 1; i > 0; i--) { /* shuffled, or all of it would be runs */
      size_t k = next(&s) % (i + 1);
      uint8_t t = in[i];
      in[i] = in[k];
      in[k] = t;
    }
    check(in, n);
  }
}

static void test_cost(void **state)
{
  static uint8_t in[1 << 20];
  uint32_t s = 1;

  (void)state;
  assert_true(check(in, sizeof in) < sizeof in / 200); /* all the same */
  for (size_t i = 0; i < sizeof in; i++)
    in[i] = (uint8_t)next(&s);
  assert_true(check(in, sizeof in) < sizeof in + 200); /* nothing helps */
  for (size_t i = 0; i < sizeof in; i++)
    in[i] = (uint8_t)(next(&s) % 16);
  assert_true(check(in, sizeof in) < sizeof in / 2 + sizeof in / 100); /* four bits each */
}

int main(void)
{
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_lengths), cmocka_unit_test(test_runs), cmocka_unit_test(test_long_codes), cmocka_unit_test(test_cost),
  };

  return cmocka_run_group_tests(tests, NULL, NULL);
}
