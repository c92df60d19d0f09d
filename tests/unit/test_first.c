/*
 * test_first.c - from files to a request's first picture and mask: sizes, fits, masks of both kinds, blur and fill. Threads: none.
 */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>
#include <libdeflate.h>

#include "proto/first.h"
#include "proto/first_mask.h"

static const struct request_limits lim = {.default_size = 64, .size_multiple = 8, .max_size = 128, .default_sampler = "ddim", .model = "emoji"};
static struct request r;

/* ---- a writer of PNG files of its own: 8 bits, RGB or RGBA ---- */

static uint8_t *put_chunk(uint8_t *p, const char *type, const uint8_t *data, size_t n)
{
  uint32_t crc;

  for (int i = 0; i < 4; i++)
    *p++ = (uint8_t)(n >> (24 - 8 * i));
  memcpy(p, type, 4);
  if (n)
    memcpy(p + 4, data, n);
  crc = libdeflate_crc32(0, p, n + 4);
  p += n + 4;
  for (int i = 0; i < 4; i++)
    *p++ = (uint8_t)(crc >> (24 - 8 * i));
  return p;
}

/* A w x h file whose pixel at x, y is colour(x, y); malloc'ed. */
static struct first_file png(int w, int h, int channels, void (*colour)(int x, int y, uint8_t px[4]), const char *field)
{
  const uint8_t head[13] = {0, 0, (uint8_t)(w >> 8), (uint8_t)w, 0, 0, (uint8_t)(h >> 8), (uint8_t)h, 8, channels == 4 ? 6 : 2, 0, 0, 0};
  size_t row = (size_t)w * (size_t)channels + 1, n = row * (size_t)h, packed;
  struct libdeflate_compressor *z = libdeflate_alloc_compressor(1);
  uint8_t *raw = calloc(n, 1), *idat, *out, *p, px[4];
  struct first_file f = {.len = 0};

  assert_true(z && raw);
  for (int y = 0; y < h; y++)
    for (int x = 0; x < w; x++) {
      colour(x, y, px);
      memcpy(raw + (size_t)y * row + 1 + (size_t)x * (size_t)channels, px, (size_t)channels);
    }
  idat = malloc(libdeflate_zlib_compress_bound(z, n));
  assert_non_null(idat);
  packed = libdeflate_zlib_compress(z, raw, n, idat, libdeflate_zlib_compress_bound(z, n));
  out = malloc(packed + 100);
  assert_non_null(out);
  memcpy(out, "\x89PNG\r\n\x1a\n", 8);
  p = put_chunk(out + 8, "IHDR", head, sizeof head);
  p = put_chunk(p, "IDAT", idat, packed);
  p = put_chunk(p, "IEND", NULL, 0);
  f.p = f.owned = out;
  f.len = (size_t)(p - out);
  snprintf(f.field, sizeof f.field, "%s", field);
  free(raw);
  free(idat);
  libdeflate_free_compressor(z);
  return f;
}

static void red(int x, int y, uint8_t px[4])
{
  (void)x, (void)y;
  memcpy(px, (uint8_t[]){200, 10, 20, 255}, 4);
}

/* Red, and transparent on the left of 16 pixels. */
static void left_clear(int x, int y, uint8_t px[4])
{
  red(x, y, px);
  px[3] = x < 16 ? 0 : 255;
}

static void left_white(int x, int y, uint8_t px[4])
{
  (void)y;
  memset(px, x < 16 ? 255 : 0, 3);
  px[3] = 255;
}

/* Three stripes, each as wide as the picture is high. */
static void stripes(int x, int y, uint8_t px[4])
{
  (void)y;
  memset(px, 0, 3);
  px[x / 32] = 255;
  px[3] = 255;
}

/* A colour for every place, and a mask that is a rectangle. */
static void places(int x, int y, uint8_t px[4])
{
  memcpy(px, (uint8_t[]){(uint8_t)x, (uint8_t)y, (uint8_t)(x * 7 + y * 13), 255}, 4);
}

static struct {
  int left, top, right, bottom;
} box;

static void box_white(int x, int y, uint8_t px[4])
{
  memset(px, x >= box.left && x < box.right && y >= box.top && y < box.bottom ? 255 : 0, 3);
  px[3] = 255;
}

static int decode(struct first *f, int w, int h, struct err *e)
{
  int ret;

  *e = (struct err){0};
  request_init(&r, &lim);
  r.width = w, r.height = h;
  ret = first_decode(&r, f, &lim, e);
  return ret;
}

static void good(struct first *f, int w, int h)
{
  struct err e;

  if (decode(f, w, h, &e))
    fail_msg("refused: %s", e.msg);
}

static const uint8_t *pixel(int x, int y)
{
  return r.init + ((size_t)y * (size_t)r.width + (size_t)x) * 3;
}

static void test_sizes(void **state)
{
  static const struct {
    int w, h, got_w, got_h;
  } cases[] = {{64, 64, 64, 64}, {100, 60, 104, 64}, {32, 16, 64, 32}, {300, 150, 128, 64}, {1, 1, 64, 64}, {2, 200, 8, 128}, {127, 127, 128, 128}};

  (void)state;
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    struct first f = {.file = {png(cases[i].w, cases[i].h, 3, red, "image")}};
    good(&f, 0, 0);
    assert_int_equal(r.width, cases[i].got_w);
    assert_int_equal(r.height, cases[i].got_h);
    assert_memory_equal(pixel(r.width - 1, r.height - 1), "\xc8\x0a\x14", 3);
    assert_null(r.mask);
    request_close(&r);
    first_close(&f);
  }
  struct first none = {.is_filled = 0};
  good(&none, 64, 64);
  assert_null(r.init);
}

static void test_fits(void **state)
{
  struct first f = {.file = {png(96, 32, 3, stripes, "image")}};

  (void)state;
  good(&f, 64, 64); /* stretched: red, green and blue */
  assert_memory_equal(pixel(2, 9), "\xff\0\0", 3);
  assert_memory_equal(pixel(61, 9), "\0\0\xff", 3);
  request_close(&r);
  f.fit = FIRST_CROP;
  good(&f, 64, 64); /* the middle alone */
  for (int x = 0; x < 64; x++)
    assert_memory_equal(pixel(x, x), "\0\xff\0", 3);
  request_close(&r);
  f.fit = FIRST_FILL;
  good(&f, 64, 64); /* all of it, a third as high, between what its edges go on as */
  assert_memory_equal(pixel(2, 0), "\xff\0\0", 3);
  assert_memory_equal(pixel(32, 32), "\0\xff\0", 3);
  assert_memory_equal(pixel(61, 63), "\0\0\xff", 3);
  request_close(&r);
  good(&f, 64, 8); /* and at its sides */
  assert_memory_equal(pixel(0, 3), "\xff\0\0", 3);
  assert_memory_equal(pixel(19, 3), "\xff\0\0", 3);
  assert_memory_equal(pixel(32, 3), "\0\xff\0", 3);
  assert_memory_equal(pixel(63, 7), "\0\0\xff", 3);
  request_close(&r);
  first_close(&f);
}

static void test_masks(void **state)
{
  struct first f = {.file = {png(32, 32, 4, left_clear, "image"), png(32, 32, 4, left_clear, "mask")}};
  struct err e;

  (void)state;
  good(&f, 32, 32);
  assert_memory_equal(pixel(3, 3), "\xff\xff\xff", 3); /* over white */
  assert_memory_equal(pixel(20, 3), "\xc8\x0a\x14", 3);
  assert_true(r.mask[3] == 255 && r.mask[15] == 255 && r.mask[16] == 0);
  request_close(&r);
  f.is_inverted = 1;
  good(&f, 32, 32);
  assert_true(r.mask[3] == 0 && r.mask[16] == 255);
  request_close(&r);
  first_close(&f);
  f = (struct first){.file = {png(32, 32, 3, red, "init_images"), png(64, 64, 3, left_white, "mask")}, .mask = FIRST_MASK_LIGHT};
  good(&f, 32, 32); /* stretched with the picture, its edge as Pillow's LANCZOS has it */
  assert_memory_equal(r.mask, "\377\377\377\377\377\376\377\361\016\0\001\0\0", 13);
  request_close(&r);
  f.mask = FIRST_MASK_ALPHA;
  assert_int_equal(decode(&f, 32, 32, &e), E_ARG); /* no alpha says nothing */
  assert_string_equal(e.field, "mask");
  assert_true(!r.init && !r.mask);
  first_close(&f);
  f = (struct first){.file = {png(32, 32, 3, red, "image"), png(32, 32, 4, red, "mask")}};
  assert_int_equal(decode(&f, 32, 32, &e), E_ARG); /* nor does alpha that is nowhere transparent */
  first_close(&f);
}

static void test_broken(void **state)
{
  struct first f = {.file = {png(32, 32, 3, red, "init_images")}};
  struct err e;

  (void)state;
  f.file[FIRST_INIT].len /= 2;
  assert_int_equal(decode(&f, 32, 32, &e), E_ARG);
  assert_string_equal(e.field, "init_images");
  assert_memory_equal(e.msg, "init_images: ", 13);
  assert_null(r.init);
  first_close(&f);
  f = (struct first){.file = {png(32, 32, 3, red, "image"), png(32, 32, 4, left_clear, "mask")}};
  f.file[FIRST_MASK].len = 9;
  assert_int_equal(decode(&f, 32, 32, &e), E_ARG);
  assert_string_equal(e.field, "mask");
  assert_true(!r.init && !r.mask);
  first_close(&f);
}

/* The blur keeps the whole's sum and order, spreads an edge as far as it says and no further, and is even. */
static void test_blur(void **state)
{
  uint8_t m[40 * 40];
  struct err e = {0};

  (void)state;
  for (int i = 0; i < 40 * 40; i++)
    m[i] = i % 40 < 20 ? 255 : 0;
  assert_int_equal(first_mask_blur(m, 40, 40, 4, 4, &e), 0);
  for (int x = 1; x < 40; x++) {
    assert_true(m[x] <= m[x - 1] && m[x + 39 * 40] == m[x]);
    assert_true(abs(m[x] + m[39 - x] - 255) <= 1);
  }
  assert_true(m[9] == 255 && m[10] < 255 && m[29] > 0 && m[30] == 0); /* 2.5 sigma: 10 pixels each way */
  assert_true(abs(m[19] - 141) <= 1);                                 /* the normal distribution half a pixel from its middle, over 10 pixels */
  memset(m, 7, sizeof m);
  assert_int_equal(first_mask_blur(m, 40, 40, 64, 64, &e), 0);
  assert_true(m[0] == 7 && m[1599] == 7);
  assert_int_equal(first_mask_blur(m, 40, 40, 65, 1, &e), E_ARG);
  assert_int_equal(first_mask_blur(m, 40, 40, 1, NAN, &e), E_ARG);
  for (int i = 0; i < 40 * 40; i++)
    m[i] = i % 40 < 20 && i / 40 < 20 ? 255 : 0;
  assert_int_equal(first_mask_blur(m, 40, 40, 0, 4, &e), 0); /* down alone: across it is as sharp as it was */
  assert_true(m[19] == 255 && m[20] == 0 && m[9 * 40] == 255 && m[10 * 40] < 255 && m[29 * 40] > 0 && m[29 * 40 + 20] == 0);
}

static void test_fill(void **state)
{
  enum { W = 33, H = 21 };
  uint8_t rgb[W * H * 3], mask[W * H], before[W * H * 3];
  struct err e = {0};

  (void)state;
  for (int i = 0; i < W * H; i++) {
    mask[i] = i % W >= 10 && i % W < 20 ? 255 : 0;
    memcpy(rgb + (ptrdiff_t)i * 3, i % W < 15 ? "\x10\x20\x30" : "\xf0\x20\x30", 3);
    if (mask[i])
      memset(rgb + (ptrdiff_t)i * 3, 255, 3); /* what must vanish */
  }
  memcpy(before, rgb, sizeof rgb);
  assert_int_equal(first_mask_fill(rgb, mask, W, H, &e), 0);
  for (int i = 0; i < W * H; i++) {
    const uint8_t *p = rgb + (ptrdiff_t)i * 3;
    if (!mask[i])
      assert_memory_equal(p, before + (ptrdiff_t)i * 3, 3);
    assert_true(p[1] == 0x20 && p[2] == 0x30 && p[0] >= 0x10 && p[0] <= 0xf0);
  }
  assert_true(rgb[10 * 3] < 0x60 && rgb[19 * 3] > 0xa0); /* the nearer side shows */
  memset(mask, 255, sizeof mask);
  memcpy(before, rgb, sizeof rgb);
  assert_int_equal(first_mask_fill(rgb, mask, W, H, &e), 0);
  assert_memory_equal(rgb, before, sizeof rgb);
  rgb[0] = 9; /* one pixel is a picture too */
  assert_int_equal(first_mask_fill(rgb, mask, 1, 1, &e), 0);
  assert_int_equal(rgb[0], 9);
}

/* Filled by first_decode: what the mask covers no longer shows. */
static void test_decode_fills(void **state)
{
  struct first f = {.file = {png(32, 32, 4, left_clear, "init_images"), png(32, 32, 3, left_white, "mask")}, .mask = FIRST_MASK_LIGHT,
                    .blur_x = 2, .blur_y = 2, .is_filled = 1};

  (void)state;
  good(&f, 32, 32);
  assert_memory_equal(pixel(1, 9), "\xc8\x0a\x14", 3); /* was white */
  assert_true(r.mask[3] == 255 && r.mask[15] > 100 && r.mask[15] < 200 && r.mask[25] == 0);
  request_close(&r);
  first_close(&f);
}

/* ---- only what is masked ---- */

static struct first only_masked(int w, int h, int padding)
{
  return (struct first){.file = {png(w, h, 3, places, "init_images"), png(w, h, 3, box_white, "mask")}, .mask = FIRST_MASK_LIGHT, .is_only_masked = 1,
                        .padding = padding};
}

/* Which part is cut out: what A1111's get_crop_region and expand_crop_region say for these. */
static void test_part(void **state)
{
  static const struct {
    int w, h, box[4], padding, to_w, to_h, x, y, part_w, part_h;
  } cases[] = {
      {200, 100, {40, 30, 60, 70}, 0, 64, 64, 30, 30, 40, 40},     {200, 100, {40, 30, 60, 70}, 8, 64, 64, 22, 22, 56, 56},
      {200, 100, {0, 0, 7, 3}, 5, 64, 64, 0, 0, 12, 12},           {200, 100, {190, 95, 200, 100}, 32, 64, 64, 158, 58, 42, 42},
      {200, 100, {10, 50, 191, 51}, 0, 64, 64, 10, 0, 181, 100},   {200, 100, {10, 10, 190, 90}, 32, 64, 128, 0, 0, 200, 100},
      {96, 160, {30, 100, 41, 111}, 3, 128, 64, 19, 97, 34, 17},   {100, 100, {0, 0, 100, 100}, 0, 64, 64, 0, 0, 100, 100},
      {64, 48, {13, 7, 14, 8}, 0, 64, 32, 13, 7, 2, 1},            {64, 48, {13, 7, 14, 8}, FIRST_MAX_SIDE, 64, 48, 0, 0, 64, 48},
  };

  (void)state;
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    memcpy(&box, cases[i].box, sizeof box);
    struct first f = only_masked(cases[i].w, cases[i].h, cases[i].padding);
    good(&f, cases[i].to_w, cases[i].to_h);
    assert_int_equal(r.whole.x, cases[i].x);
    assert_int_equal(r.whole.y, cases[i].y);
    assert_int_equal(r.whole.w, cases[i].part_w);
    assert_int_equal(r.whole.h, cases[i].part_h);
    assert_true(r.width == cases[i].to_w && r.height == cases[i].to_h && r.whole.width == cases[i].w && r.whole.height == cases[i].h);
    request_close(&r);
    first_close(&f);
  }
}

/* What is drawn goes back where it came from, as far as the mask says, and nothing else changes. */
static void test_put_back(void **state)
{
  struct err e = {0};
  uint8_t *out, drawn[64 * 64 * 3];
  struct first f;

  (void)state;
  memcpy(&box, (int[]){40, 30, 56, 46}, sizeof box);
  f = only_masked(100, 80, 8);
  good(&f, 64, 64); /* 32 x 32 from 32, 22 on: twice as large each way */
  assert_true(r.whole.x == 32 && r.whole.y == 22 && r.whole.w == 32 && r.whole.h == 32);
  assert_true(pixel(0, 0)[0] == 32 && pixel(0, 0)[1] == 22 && pixel(63, 63)[0] == 63 && pixel(63, 63)[1] == 53);
  assert_true(r.mask[0] == 0 && r.mask[64 * 32 + 32] == 255 && r.mask[64 * 63 + 63] == 0);
  memset(drawn, 99, sizeof drawn);
  assert_int_equal(first_put_back(&out, &r, drawn, &e), 0);
  for (int y = 0; y < 80; y++)
    for (int x = 0; x < 100; x++) {
      uint8_t want[4];
      places(x, y, want);
      if (x >= 40 && x < 56 && y >= 30 && y < 46)
        memset(want, 99, 3);
      assert_memory_equal(out + ((size_t)y * 100 + (size_t)x) * 3, want, 3);
    }
  free(out);
  request_close(&r);

  f.blur_x = 2; /* five pixels of edge each side, which shows both; the part is found after */
  good(&f, 64, 64);
  assert_true(r.whole.x == 27 && r.whole.y == 17 && r.whole.w == 42 && r.whole.h == 42);
  assert_int_equal(first_put_back(&out, &r, drawn, &e), 0);
  for (int x = 35; x < 61; x++) {
    int at = out[((size_t)40 * 100 + (size_t)x) * 3], mask = r.whole.mask[(40 - 17) * 42 + (x - 27)];
    assert_int_equal(at, (99 * mask + x * (255 - mask) + 127) / 255);
    assert_true(mask > 0 && (x != 35 || mask < 20) && (x != 47 || mask > 250));
  }
  free(out);
  request_close(&r);

  f.blur_x = 0; /* a shape that the picture does not have: all of the part is drawn, and what is beyond it is cut off again */
  memcpy(&box, (int[]){0, 0, 100, 80}, sizeof box);
  free(f.file[FIRST_MASK].owned);
  f.file[FIRST_MASK] = png(50, 40, 3, box_white, "mask"); /* and a mask of another size is stretched */
  good(&f, 64, 64);
  assert_true(r.whole.w == 100 && r.whole.h == 80);
  assert_true(pixel(5, 0)[1] <= 1 && pixel(5, 5)[1] <= 1 && pixel(5, 63)[1] >= 78); /* 64 x 51 of it, from row 6 on */
  for (size_t i = 0; i < 64 * 64; i++)
    memset(drawn + i * 3, i / 64 < 6 || i / 64 >= 57 ? 0 : 99, 3);
  assert_int_equal(first_put_back(&out, &r, drawn, &e), 0);
  for (size_t i = 0; i < 100 * 80 * 3; i++)
    assert_true(out[i] == 99);
  free(out);
  request_close(&r);
  first_close(&f);
}

static void test_only_masked_fills(void **state)
{
  struct first f;

  (void)state;
  memcpy(&box, (int[]){8, 8, 24, 24}, sizeof box);
  f = (struct first){.file = {png(32, 32, 3, box_white, "init_images"), png(32, 32, 3, box_white, "mask")}, .mask = FIRST_MASK_LIGHT, .is_only_masked = 1,
                     .padding = 8, .is_filled = 1};
  good(&f, 32, 32);
  assert_memory_equal(pixel(16, 16), "\0\0\0", 3); /* was white */
  request_close(&r);
  first_close(&f);
}

static void test_only_masked_refuses(void **state)
{
  struct first f;
  struct err e;

  (void)state;
  memset(&box, 0, sizeof box);
  f = only_masked(32, 32, 4);
  assert_int_equal(decode(&f, 32, 32, &e), E_ARG);
  assert_string_equal(e.field, "mask");
  assert_non_null(strstr(e.msg, "covers nothing"));
  assert_true(!r.init && !r.mask && !r.whole.rgb && !r.whole.mask);
  first_close(&f);
  box.right = box.bottom = 8;
  f = only_masked(2049, 2048, 4); /* it would be kept for as long as the request waits */
  assert_int_equal(decode(&f, 32, 32, &e), E_ARG);
  assert_string_equal(e.field, "init_images");
  assert_non_null(strstr(e.msg, "2049x2048"));
  f.is_only_masked = 0;
  good(&f, 32, 32);
  assert_null(r.whole.rgb);
  request_close(&r);
  first_close(&f);
}

int main(void)
{
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_sizes), cmocka_unit_test(test_fits), cmocka_unit_test(test_masks), cmocka_unit_test(test_broken),
                                     cmocka_unit_test(test_blur), cmocka_unit_test(test_fill), cmocka_unit_test(test_decode_fills),
                                     cmocka_unit_test(test_part), cmocka_unit_test(test_put_back), cmocka_unit_test(test_only_masked_fills),
                                     cmocka_unit_test(test_only_masked_refuses)};

  return cmocka_run_group_tests(tests, NULL, NULL);
}
