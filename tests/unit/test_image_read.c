/*
 * test_image_read.c - pictures from outside, against what Pillow reads in the same files (make_images.py): every kind of file, turned every way, cut off
 * at every byte, damaged, and larger than they say; resizing and masks. Threads: none.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>

#include <cmocka.h>

#include "proto/image_read.h"

#define FOLDER "build/test-images/"

static const struct image_limits roomy = {.max_bytes = 1 << 20, .max_side = 4096, .max_pixels = 1 << 24};

struct bytes {
  uint8_t *p;
  size_t n;
};

static struct bytes slurp(const char *name, const char *suffix)
{
  struct bytes b;
  char path[256];
  FILE *f;
  long n;

  snprintf(path, sizeof path, FOLDER "%s%s", name, suffix);
  f = fopen(path, "rb");
  if (!f || fseek(f, 0, SEEK_END))
    fail_msg("cannot read %s", path);
  n = ftell(f);
  rewind(f);
  b.n = (size_t)n;
  b.p = malloc(b.n + 1);
  assert_int_equal(fread(b.p, 1, b.n, f), b.n);
  fclose(f);
  return b;
}

/* Holds n bytes to NAME.raw, each within slack. */
static void assert_raw(const char *name, const uint8_t *px, size_t n, int slack)
{
  struct bytes want = slurp(name, ".raw");
  int off = 0;

  assert_int_equal(want.n, n);
  for (size_t i = 0; i < n; i++)
    if (abs(px[i] - want.p[i]) > off)
      off = abs(px[i] - want.p[i]);
  if (off > slack)
    fail_msg("%s is off by %d", name, off);
  free(want.p);
}

struct item {
  char name[64];
  int w, h, channels, slack;
};

/* The files of the list, without the results of resizing and masking. Returns how many. */
static int read_list(struct item *item, int max)
{
  FILE *f = fopen(FOLDER "list", "r");
  char line[64];
  int n = 0;

  assert_non_null(f);
  while (n < max && fgets(line, sizeof line, f)) {
    char *s = strchr(line, ' ');
    assert_non_null(s);
    *s++ = 0;
    if (!strchr(line, '.'))
      continue;
    snprintf(item[n].name, sizeof item->name, "%s", line);
    item[n].w = (int)strtol(s, &s, 10);
    item[n].h = (int)strtol(s, &s, 10);
    item[n].channels = (int)strtol(s, &s, 10);
    item[n++].slack = (int)strtol(s, &s, 10);
  }
  fclose(f);
  return n;
}

static int make(void **state)
{
  (void)state;
  return system(".venv/bin/python tests/unit/make_images.py " FOLDER) ? -1 : 0;
}

/* Reads a copy of n bytes that ends where its memory ends, so that a sanitizer sees a byte read too far. */
static int read_copy(struct image *im, const uint8_t *p, size_t n, const struct image_limits *lim, struct err *e)
{
  uint8_t *copy = malloc(n ? n : 1);
  int r;

  assert_non_null(copy);
  memcpy(copy, p, n);
  *e = (struct err){0};
  r = image_read(im, copy, n, lim, e);
  assert_int_equal(r, e->code);
  assert_true(r ? !im->px && *e->msg : im->px != NULL);
  free(copy);
  return r;
}

static void test_kinds(void **state)
{
  struct item item[64];
  int n = read_list(item, 64);

  (void)state;
  assert_in_range(n, 27, 63);
  for (int i = 0; i < n; i++) {
    struct bytes file = slurp(item[i].name, "");
    struct image im;
    struct err e;
    if (read_copy(&im, file.p, file.n, &roomy, &e))
      fail_msg("%s: %s", item[i].name, e.msg);
    assert_int_equal(im.w, item[i].w);
    assert_int_equal(im.h, item[i].h);
    if (im.channels != item[i].channels)
      fail_msg("%s has %d channels", item[i].name, im.channels);
    assert_raw(item[i].name, im.px, (size_t)(im.w * im.h * im.channels), item[i].slack);
    image_free(&im);
    free(file.p);
  }
}

/* A file that ends too early is refused, or has its pixels whole. One with a wrong bit is refused or read: never a crash, never a huge picture. */
static void test_damaged(void **state)
{
  static const struct image_limits lim = {.max_bytes = 1 << 20, .max_side = 256, .max_pixels = 1 << 14};
  struct item item[64];
  int n = read_list(item, 64), refused = 0;

  (void)state;
  for (int i = 0; i < n; i++) {
    struct bytes file = slurp(item[i].name, "");
    struct image im;
    struct err e;
    for (size_t k = 0; k < file.n; k += 1 + file.n / 500) {
      if (!read_copy(&im, file.p, k, &lim, &e))
        assert_raw(item[i].name, im.px, (size_t)(im.w * im.h * im.channels), item[i].slack);
      else
        assert_int_equal(e.code, E_ARG);
      image_free(&im);
    }
    for (size_t k = 0; k < file.n; k += 1 + file.n / 500) {
      file.p[k] ^= (uint8_t)(1 << k % 8);
      refused += read_copy(&im, file.p, file.n, &lim, &e) != 0;
      assert_true(!im.px || (im.w <= 256 && im.h <= 256 && im.w * im.h <= 1 << 14));
      file.p[k] ^= (uint8_t)(1 << k % 8);
      image_free(&im);
    }
    free(file.p);
  }
  assert_true(refused > 1000);
}

static void assert_refused(const char *name, const struct image_limits *lim, const char *why)
{
  struct bytes file = slurp(name, "");
  struct image im;
  struct err e;

  if (read_copy(&im, file.p, file.n, lim, &e) != E_ARG || !strstr(e.msg, why))
    fail_msg("%s: %s", name, e.msg);
  free(file.p);
}

static void test_refused(void **state)
{
  struct image im;
  struct err e;

  (void)state;
  assert_refused("moving.webp", &roomy, "animated");
  assert_refused("other.gif", &roomy, "neither");
  assert_refused("other.bmp", &roomy, "neither");
  assert_refused("scans.jpg", &roomy, "scans");
  assert_refused("too-little.png", &roomy, "cut off");
  assert_int_equal(read_copy(&im, (const uint8_t *)"", 0, &roomy, &e), E_ARG);
  assert_non_null(strstr(e.msg, "empty"));
}

static void test_limits(void **state)
{
  static const char *const names[] = {"rgb.png", "plain.jpg", "progressive.jpg", "lossy.webp", "lossless.webp"};

  (void)state;
  for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
    struct bytes file = slurp(names[i], "");
    struct image im;
    struct err e;
    assert_refused(names[i], &(struct image_limits){file.n - 1, 4096, 1 << 24}, "bytes");
    assert_refused(names[i], &(struct image_limits){file.n, 36, 1 << 24}, "a side may have 36");
    assert_refused(names[i], &(struct image_limits){file.n, 37, 37 * 23 - 1}, "850 are allowed");
    assert_int_equal(read_copy(&im, file.p, file.n, &(struct image_limits){file.n, 37, 37 * 23}, &e), 0);
    image_free(&im);
    free(file.p);
  }
}

/* Files that would unfold to much more than their pixels: what they cost is bounded, whatever becomes of them. */
static void test_bombs(void **state)
{
  static const char *const names[] = {"text-bomb.png", "too-much.png"};
  struct rusage before, after;

  (void)state;
  getrusage(RUSAGE_SELF, &before);
  for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
    struct bytes file = slurp(names[i], "");
    struct image im;
    struct err e;
    if (read_copy(&im, file.p, file.n, &roomy, &e))
      assert_int_equal(e.code, E_ARG);
    image_free(&im);
    free(file.p);
  }
  getrusage(RUSAGE_SELF, &after);
  assert_true(after.ru_maxrss - before.ru_maxrss < 64 << 10); /* kB; unfolded they are 256 and 64 MB */
}

/* Sizes that only the header says, in files that would be terabytes. */
static void test_headers_that_lie(void **state)
{
  static const uint8_t png[] = "\x89PNG\r\n\x1a\n\0\0\0\rIHDR\x7f\xff\xff\xff\x7f\xff\xff\xff\x08\x02\0\0\0\x52\x43\x9c\x1c\0\0\0\0IDAT\x35\xaf\x06\x1e";
  static const uint8_t jpeg[] = "\xff\xd8\xff\xc0\0\x11\x08\xff\xdc\xff\xdc\x03\x01\x22\0\x02\x11\0\x03\x11\0\xff\xda\0\x0c\x03\x01\0\x02\0\x03\0\0\x3f\0";
  static const uint8_t webp[] = "RIFF\x20\0\0\0WEBPVP8L\x14\0\0\0\x2f\xff\xff\xff\x0f\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
  struct image im;
  struct err e;

  (void)state;
  assert_int_equal(read_copy(&im, png, sizeof png - 1, &roomy, &e), E_ARG);
  assert_int_equal(read_copy(&im, jpeg, sizeof jpeg - 1, &roomy, &e), E_ARG);
  assert_non_null(strstr(e.msg, "65500"));
  assert_int_equal(read_copy(&im, webp, sizeof webp - 1, &roomy, &e), E_ARG);
  assert_non_null(strstr(e.msg, "16384x16384"));
}

/* Pillow's LANCZOS to the last bit. Where Pillow has taken the columns first: 4 times the 1 that was measured. */
static void test_resize(void **state)
{
  static const int size[][2] = {{37, 23}, {16, 8}, {64, 64}, {5, 100}, {1, 1}, {74, 3}, {36, 22}, {38, 23}, {3, 24}, {300, 2}};
  struct bytes file = slurp("source.png", "");
  struct image im, out;
  struct err e;

  (void)state;
  assert_int_equal(read_copy(&im, file.p, file.n, &roomy, &e), 0);
  for (size_t i = 0; i < sizeof size / sizeof *size; i++) {
    char name[32];
    snprintf(name, sizeof name, "resize-%dx%d", size[i][0], size[i][1]);
    assert_int_equal(image_resize(&out, &im, size[i][0], size[i][1], &e), 0);
    assert_true(out.w == size[i][0] && out.h == size[i][1] && out.channels == 4);
    assert_raw(name, out.px, (size_t)(out.w * out.h * 4), 0);
    snprintf(name, sizeof name, "at-once-%dx%d", size[i][0], size[i][1]);
    assert_raw(name, out.px, (size_t)(out.w * out.h * 4), 4 * 1);
    image_free(&out);
  }
  assert_int_equal(image_resize(&out, &im, 0, 8, &e), E_INTERNAL);
  assert_null(out.px);
  image_free(&im);
  free(file.p);
}

/* What is all of one colour stays so, black and white included, whatever the sizes. */
static void test_resize_flat(void **state)
{
  struct err e = {0};

  (void)state;
  for (int v = 0; v <= 255; v += 51)
    for (int in = 1; in < 70; in += 7)
      for (int w = 1; w < 70; w += 11) {
        struct image im = {in, 3, 3, malloc((size_t)in * 9)}, out;
        memset(im.px, v, (size_t)in * 9);
        assert_int_equal(image_resize(&out, &im, w, 7, &e), 0);
        for (int i = 0; i < w * 21; i++)
          assert_int_equal(out.px[i], v);
        image_free(&out);
        image_free(&im);
      }
}

static void test_masks(void **state)
{
  struct bytes file = slurp("source.png", "");
  uint8_t mask[37 * 23];
  struct image im;
  struct err e;

  (void)state;
  assert_int_equal(read_copy(&im, file.p, file.n, &roomy, &e), 0);
  image_mask_of_alpha(mask, &im);
  assert_raw("mask-alpha", mask, sizeof mask, 0);
  image_mask_of_light(mask, &im);
  assert_raw("mask-opaque", mask, sizeof mask, 0);
  image_drop_alpha(&im);
  assert_int_equal(im.channels, 3);
  assert_raw("dropped", im.px, sizeof mask * 3, 0);
  image_mask_of_light(mask, &im);
  assert_raw("mask-light", mask, sizeof mask, 0);
  image_mask_of_alpha(mask, &im);
  for (size_t i = 0; i < sizeof mask; i++)
    assert_int_equal(mask[i], 0);
  image_free(&im);
  assert_int_equal(read_copy(&im, file.p, file.n, &roomy, &e), 0);
  image_flatten_white(&im);
  assert_raw("white", im.px, sizeof mask * 3, 1);
  image_flatten_white(&im);
  assert_raw("white", im.px, sizeof mask * 3, 1);
  image_free(&im);
  free(file.p);
}

int main(void)
{
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_kinds),  cmocka_unit_test(test_damaged),           cmocka_unit_test(test_refused), cmocka_unit_test(test_limits),
      cmocka_unit_test(test_bombs),  cmocka_unit_test(test_headers_that_lie),  cmocka_unit_test(test_resize),  cmocka_unit_test(test_resize_flat),
      cmocka_unit_test(test_masks),
  };

  return cmocka_run_group_tests(tests, make, NULL);
}
