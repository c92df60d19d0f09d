/*
 * test_image_formats.c - JPEG and WebP files beside PNG: their pixels, recipe and provenance as Pillow reads them (check_images.py), the same bytes every
 * time, what happens to texts that do not fit, and every failure. Threads: none.
 */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include <cmocka.h>

#include "proto/image.h"
#include "proto/image_codec.h"

#define FOLDER "build/test-formats/"

static const char parameters[] = "a caf\xc3\xa9 \xf0\x9f\x8d\x8e, \xe4\xb8\xad\nSteps: 20, Sampler: DDIM";
static const char xmp[] = "<?xpacket begin=\"\xef\xbb\xbf\"?><x:xmpmeta xmlns:x=\"adobe:ns:meta/\">\xc3\xa9</x:xmpmeta>";

static void put(const char *name, const void *p, size_t n)
{
  char path[256];
  FILE *f;

  snprintf(path, sizeof path, FOLDER "%s", name);
  f = fopen(path, "wb");
  assert_non_null(f);
  assert_int_equal(fwrite(p, 1, n, f), n);
  assert_int_equal(fclose(f), 0);
}

static void paint(uint8_t *rgb, int w, int h)
{
  for (int y = 0; y < h; y++)
    for (int x = 0; x < w; x++)
      for (int c = 0; c < 3; c++)
        *rgb++ = (uint8_t)(128 + 70 * sin(x * .11 + c) + 50 * cos(y * .07 - c) + (x * 7 + y * 3 + c) % 5);
}

static int encode(struct buf *out, enum image_format format, const uint8_t *rgb, int w, int h, int quality, const struct image_text *t, struct err *e)
{
  static struct image_encoder *enc;

  *e = (struct err){0};
  if (format == IMAGE_JPEG)
    return image_encode_jpeg(out, rgb, w, h, quality, t, e);
  if (format == IMAGE_WEBP)
    return image_encode_webp(out, rgb, w, h, quality, t, e);
  assert_int_equal(image_open(&enc, e), 0);
  assert_int_equal(image_encode_png(enc, out, rgb, w, h, t, e), 0);
  image_close(enc);
  return 0;
}

static void test_pillow(void **state)
{
  static const struct {
    const char *name;
    enum image_format format;
    int w, h, quality, psnr;
    const char *text;
  } files[] = {
      {"a.png", IMAGE_PNG, 64, 48, 0, 0, "full"},     {"long.png", IMAGE_PNG, 9, 7, 0, 0, "long"},    {"a.jpg", IMAGE_JPEG, 64, 48, 0, 38, "full"},
      {"low.jpg", IMAGE_JPEG, 201, 99, 20, 26, "full"}, {"best.jpg", IMAGE_JPEG, 64, 48, 100, 45, "full"}, {"one.jpg", IMAGE_JPEG, 1, 1, 0, 38, "full"},
      {"bare.jpg", IMAGE_JPEG, 17, 300, 0, 36, "none"}, {"long.jpg", IMAGE_JPEG, 64, 48, 0, 38, "long"}, {"a.webp", IMAGE_WEBP, 64, 48, 0, 35, "full"},
      {"low.webp", IMAGE_WEBP, 201, 99, 20, 26, "full"}, {"exact.webp", IMAGE_WEBP, 64, 48, 100, 0, "full"}, {"bare.webp", IMAGE_WEBP, 17, 300, 100, 0, "none"},
      {"one.webp", IMAGE_WEBP, 1, 1, 0, 30, "full"},  {"long.webp", IMAGE_WEBP, 64, 48, 0, 35, "long"},
  };
  char list[2048] = "", *longer = malloc(40001), path[64];
  size_t used = 0;
  struct err e;

  (void)state;
  mkdir(FOLDER, 0777);
  memset(longer, 'x', 40000); /* UTF-16 would take 80 kB, more than a JPEG marker holds */
  longer[40000] = 0;
  put("full.txt", parameters, strlen(parameters));
  put("long.txt", longer, 40000);
  put("xmp.txt", xmp, strlen(xmp));
  for (size_t i = 0; i < sizeof files / sizeof *files; i++) {
    size_t n = (size_t)files[i].w * (size_t)files[i].h * 3;
    struct image_text t = {strcmp(files[i].text, "long") ? parameters : longer, xmp};
    uint8_t *rgb = malloc(n);
    struct buf b, again;
    buf_init(&b, 1 << 20);
    buf_init(&again, 1 << 20);
    paint(rgb, files[i].w, files[i].h);
    for (int k = 0; k < 2; k++)
      assert_int_equal(encode(k ? &again : &b, files[i].format, rgb, files[i].w, files[i].h, files[i].quality,
                              strcmp(files[i].text, "none") ? &t : NULL, &e), 0);
    assert_int_equal(b.len, again.len);
    assert_memory_equal(b.p, again.p, b.len);
    put(files[i].name, b.p, b.len);
    snprintf(path, sizeof path, "%s.raw", files[i].name);
    put(path, rgb, n);
    used += (size_t)snprintf(list + used, sizeof list - used, "%s %d %d %d %s\n", files[i].name, files[i].w, files[i].h, files[i].psnr, files[i].text);
    buf_close(&b);
    buf_close(&again);
    free(rgb);
  }
  put("list", list, used);
  free(longer);
  assert_int_equal(system(".venv/bin/python tests/unit/check_images.py " FOLDER), 0);
}

/* Quality means something: better ones are larger, and the default is IMAGE_QUALITY. */
static void test_quality(void **state)
{
  static uint8_t rgb[96 * 96 * 3];
  struct err e;

  (void)state;
  paint(rgb, 96, 96);
  for (enum image_format f = IMAGE_JPEG; f <= IMAGE_WEBP; f++) {
    static const int quality[] = {1, 50, 89, 90, 99, 0};
    size_t len[6];
    for (int i = 0; i < 6; i++) {
      struct buf b;
      buf_init(&b, 1 << 20);
      assert_int_equal(encode(&b, f, rgb, 96, 96, quality[i], NULL, &e), 0);
      len[i] = b.len;
      buf_close(&b);
    }
    assert_true(len[0] < len[1] && len[1] < len[2] && len[2] < len[3] && len[3] < len[4] && len[5] == len[3]);
  }
}

static void test_failures(void **state)
{
  static uint8_t rgb[128 * 128 * 3], row[IMAGE_MAX_SIDE * 3];
  static char packet[70000];
  struct image_text t = {parameters, packet};
  struct err e;
  struct buf b;

  (void)state;
  paint(rgb, 128, 128);
  memset(packet, 'x', sizeof packet - 1);
  for (enum image_format f = IMAGE_JPEG; f <= IMAGE_WEBP; f++) {
    buf_init(&b, 1000); /* too little */
    assert_int_equal(encode(&b, f, rgb, 128, 128, 95, NULL, &e), E_TOOBIG);
    assert_int_equal(encode(&b, f, rgb, 0, 1, 0, NULL, &e), E_INTERNAL);
    assert_int_equal(encode(&b, f, rgb, 1, IMAGE_MAX_SIDE + 1, 0, NULL, &e), E_INTERNAL);
    buf_close(&b);
  }
  buf_init(&b, 1 << 20);
  assert_int_equal(encode(&b, IMAGE_JPEG, rgb, 8, 8, 0, &t, &e), E_TOOBIG); /* no marker holds such a packet */
  assert_int_equal(encode(&b, IMAGE_WEBP, row, IMAGE_MAX_SIDE, 1, 0, NULL, &e), E_ARG);
  assert_non_null(strstr(e.msg, "16383"));
  assert_int_equal(encode(&b, IMAGE_JPEG, row, IMAGE_MAX_SIDE, 1, 0, NULL, &e), 0);
  buf_close(&b);
}

/* The prompts that do not fit into a JPEG file are left out of it, and nothing else is; other formats keep them. */
static void test_prompts_too_long(void **state)
{
  static char prompt[REQUEST_PROMPT_MAX + 1], negative[REQUEST_PROMPT_MAX + 1];
  static const char euro[] = "\xe2\x82\xac";
  struct recipe r = {.prompt = prompt, .negative = negative, .sampler_label = "DDIM", .model = "m", .model_digest = "", .version = "9.9",
                     .generation_id = "7-3fa9c1d2", .width = 1, .height = 1, .seed = 77};
  struct image_encoder *enc;
  uint8_t rgb[3] = {1, 2, 3};
  struct err e = {0};

  (void)state;
  memset(prompt, 'p', REQUEST_PROMPT_MAX);
  memset(negative, 'n', REQUEST_PROMPT_MAX);
  memcpy(prompt, euro, 3); /* so that ASCII is no way out */
  assert_int_equal(image_open(&enc, &e), 0);
  for (enum image_format f = IMAGE_PNG; f <= IMAGE_WEBP; f++) {
    struct buf b;
    buf_init(&b, 1 << 20);
    r.format = f;
    assert_int_equal(image_encode_picture(enc, &b, rgb, &r, IMAGE_FULL, &e), 0);
    assert_int_equal(f == IMAGE_PNG ? memmem(b.p, b.len, "nnnnn", 5) != NULL : memmem(b.p, b.len, "n\0n\0n\0n", 7) != NULL, f != IMAGE_JPEG);
    assert_non_null(f == IMAGE_PNG ? memmem(b.p, b.len, "Seed: 77", 8) : memmem(b.p, b.len, "S\0e\0e\0d\0:\0 \0" "7\0" "7", 15));
    assert_non_null(memmem(b.p, b.len, "safelight:GenerationId=\"7-3fa9c1d2\"", 35));
    buf_close(&b);
  }
  image_close(enc);
}

/* Where a file comes from is in each format, whatever the operator leaves out. */
static void test_detail(void **state)
{
  struct recipe r = {.prompt = "a secret", .negative = "", .sampler_label = "DDIM", .model = "m", .model_digest = "", .version = "9.9",
                     .generation_id = "7-3fa9c1d2", .width = 1, .height = 1, .seed = 77};
  struct image_encoder *enc;
  uint8_t rgb[3] = {1, 2, 3};
  struct err e = {0};

  (void)state;
  assert_int_equal(image_open(&enc, &e), 0);
  for (int i = 0; i < 6; i++) {
    static const char secret[] = "s\0e\0c\0r\0e\0t", steps[] = "S\0t\0e\0p\0s";
    enum image_detail detail = (enum image_detail)(i % 3);
    struct buf b;
    buf_init(&b, 1 << 16);
    r.format = i < 3 ? IMAGE_JPEG : IMAGE_WEBP;
    assert_int_equal(image_encode_picture(enc, &b, rgb, &r, detail, &e), 0);
    assert_int_equal(memmem(b.p, b.len, secret, sizeof secret - 1) != NULL, detail == IMAGE_FULL);
    assert_int_equal(memmem(b.p, b.len, steps, sizeof steps - 1) != NULL, detail != IMAGE_PROVENANCE);
    assert_null(memmem(b.p, b.len, "secret", 6));
    assert_non_null(memmem(b.p, b.len, "trainedAlgorithmicMedia", 23));
    assert_non_null(memmem(b.p, b.len, "7-3fa9c1d2", 10));
    buf_close(&b);
  }
  image_close(enc);
}

static void test_names(void **state)
{
  static const struct {
    const char *name;
    enum image_format format;
    const char *mime;
  } names[] = {{"a.png", IMAGE_PNG, "image/png"},       {"a.b/c.JPG", IMAGE_JPEG, "image/jpeg"}, {"x.jpeg", IMAGE_JPEG, "image/jpeg"},
               {"x.png.webp", IMAGE_WEBP, "image/webp"}};
  enum image_format f;
  struct err e = {0};

  (void)state;
  for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
    assert_int_equal(image_format_of(names[i].name, &f, &e), 0);
    assert_int_equal(f, names[i].format);
    assert_string_equal(image_mime(f), names[i].mime);
  }
  assert_int_equal(image_format_of("a.gif", &f, &e), E_ARG);
  e.code = 0;
  assert_int_equal(image_format_of("png", &f, &e), E_ARG);
}

/* What is no UTF-8 becomes U+FFFD, and surrogates stand for what lies beyond 16 bits. */
static void test_comment(void **state)
{
  static const char want[] = "UNICODE\0\0a\xff\xfd\0\xe9\x20\xac\xd8\x3c\xdf\x4e\xff\xfd";
  struct err e = {0};
  struct buf b;

  (void)state;
  buf_init(&b, 1000);
  assert_int_equal(exif_write_comment(&b, "a\xff\xc3\xa9\xe2\x82\xac\xf0\x9f\x8d\x8e\xc3", 1000, &e), 0);
  assert_int_equal(b.len, 44 + sizeof want - 1);
  assert_memory_equal(b.p + 44, want, sizeof want - 1);
  assert_int_equal(exif_orientation((const uint8_t *)b.p, b.len), 1);
  b.len = 0;
  assert_int_equal(exif_write_comment(&b, "abc", 44 + 8 + 5, &e), 0);
  assert_memory_equal(b.p + 44, "ASCII\0\0\0abc", 11);
  b.len = 0;
  assert_int_equal(exif_write_comment(&b, "abc", 44 + 8 + 2, &e), E_TOOBIG);
  assert_int_equal(b.len, 0);
  buf_close(&b);
}

int main(void)
{
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_pillow), cmocka_unit_test(test_quality), cmocka_unit_test(test_failures), cmocka_unit_test(test_prompts_too_long),
      cmocka_unit_test(test_detail), cmocka_unit_test(test_names),   cmocka_unit_test(test_comment),
  };

  return cmocka_run_group_tests(tests, NULL, NULL);
}
