/*
 * test_image.c - the PNG encoder against a decoder written here from the PNG specification (libdeflate inflates), and the
 * parameters text against A1111's form. Threads: none.
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

#include "proto/image.h"

static uint32_t get32(const uint8_t *p)
{
  return (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | p[3];
}

/* CRC-32 as the specification defines it, bit by bit. */
static uint32_t crc_of(const uint8_t *p, size_t n)
{
  uint32_t c = 0xffffffff;

  for (size_t i = 0; i < n; i++) {
    c ^= p[i];
    for (int k = 0; k < 8; k++)
      c = c & 1 ? 0xedb88320 ^ c >> 1 : c >> 1;
  }
  return ~c;
}

struct decoded {
  int w, h;
  uint8_t *rgb;
  char text_type[5];
  char *text;        /* the value, NUL terminated */
  char *xmp;
  int filters[5];    /* how often each type was used */
};

static void unfilter(uint8_t *rgb, const uint8_t *in, int w, int h, int *filters)
{
  size_t n = (size_t)w * 3;

  for (int y = 0; y < h; y++, in += n) {
    int type = *in++;
    assert_in_range(type, 0, 4);
    filters[type]++;
    for (size_t i = 0; i < n; i++) {
      uint8_t *at = rgb + (size_t)y * n + i;
      int a = i >= 3 ? at[-3] : 0, b = y ? at[-(ptrdiff_t)n] : 0, c = y && i >= 3 ? at[-(ptrdiff_t)n - 3] : 0;
      int p = a + b - c, pa = abs(p - a), pb = abs(p - b), pc = abs(p - c);
      int paeth = pa <= pb && pa <= pc ? a : pb <= pc ? b : c;
      int add[5] = {0, a, b, (a + b) / 2, paeth};
      *at = (uint8_t)(in[i] + add[type]);
    }
  }
}

static void decode(struct decoded *d, const struct buf *png)
{
  const uint8_t *p = (const uint8_t *)png->p, *end = p + png->len;
  static const uint8_t signature[8] = {137, 80, 78, 71, 13, 10, 26, 10};
  struct libdeflate_decompressor *inflate = libdeflate_alloc_decompressor();
  int idat = 0, iend = 0;

  memset(d, 0, sizeof *d);
  assert_true(png->len > 8 && !memcmp(p, signature, 8));
  for (p += 8; p < end;) {
    uint32_t len = get32(p);
    const uint8_t *body = p + 8;
    assert_true(len <= (size_t)(end - body) - 4);
    assert_int_equal(get32(body + len), crc_of(p + 4, len + 4));
    if (!memcmp(p + 4, "IHDR", 4)) {
      d->w = (int)get32(body);
      d->h = (int)get32(body + 4);
      assert_memory_equal(body + 8, "\x08\x02\x00\x00\x00", 5);
    } else if (!memcmp(p + 4, "iTXt", 4) && len >= 22 && !memcmp(body, "XML:com.adobe.xmp\0\0\0\0\0", 22)) {
      d->xmp = calloc(1, len - 22 + 1);
      memcpy(d->xmp, body + 22, len - 22);
    } else if (!memcmp(p + 4, "tEXt", 4) || !memcmp(p + 4, "iTXt", 4)) {
      size_t head = p[4] == 't' ? 11 : 15;
      memcpy(d->text_type, p + 4, 4);
      assert_memory_equal(body, "parameters\0\0\0\0\0", head);
      d->text = calloc(1, len - head + 1);
      memcpy(d->text, body + head, len - head);
    } else if (!memcmp(p + 4, "IDAT", 4)) {
      size_t raw = ((size_t)d->w * 3 + 1) * (size_t)d->h;
      uint8_t *out = malloc(raw);
      assert_int_equal(libdeflate_zlib_decompress(inflate, body, len, out, raw, NULL), LIBDEFLATE_SUCCESS);
      d->rgb = malloc((size_t)d->w * (size_t)d->h * 3);
      unfilter(d->rgb, out, d->w, d->h, d->filters);
      free(out);
      idat++;
    } else {
      assert_memory_equal(p + 4, "IEND", 4);
      iend++;
    }
    p = body + len + 4;
  }
  assert_int_equal(idat, 1);
  assert_int_equal(iend, 1);
  libdeflate_free_decompressor(inflate);
}

static void decoded_free(struct decoded *d)
{
  free(d->rgb);
  free(d->text);
  free(d->xmp);
}

/* kind 0: black; 1: noise; 2: smooth; 3: columns; 4: rows; 5: a diagonal that Paeth likes. */
static void paint(uint8_t *rgb, int w, int h, int kind)
{
  uint32_t s = 1;

  for (int y = 0; y < h; y++)
    for (int x = 0; x < w; x++)
      for (int c = 0; c < 3; c++) {
        double v = 0;
        s = s * 1664525 + 1013904223;
        if (kind == 1)
          v = s >> 24;
        else if (kind == 2)
          v = 128 + 60 * sin(x * .05 + c) + 50 * cos(y * .03) + (s >> 30);
        else if (kind == 3)
          v = (x * 37 + c * 11) & 255;
        else if (kind == 4)
          v = (y * 37 + c * 11) & 255;
        else if (kind == 5)
          v = x > y ? 200 + (s >> 31) : 30;
        *rgb++ = (uint8_t)v;
      }
}

static void test_pixels(void **state)
{
  static const int sizes[][2] = {{1, 1}, {1, 9}, {9, 1}, {3, 2}, {128, 128}, {200, 72}, {17, 512}, {512, 512}};
  struct image_encoder *enc;
  struct err e = {0};
  int filters[5] = {0};

  (void)state;
  assert_int_equal(image_open(&enc, &e), 0);
  for (size_t k = 0; k < sizeof sizes / sizeof *sizes; k++)
    for (int kind = 0; kind < 6; kind++) {
      int w = sizes[k][0], h = sizes[k][1];
      uint8_t *rgb = malloc((size_t)w * (size_t)h * 3);
      struct decoded d;
      struct buf b;
      paint(rgb, w, h, kind);
      buf_init(&b, 1 << 20);
      assert_int_equal(image_encode_png(enc, &b, rgb, w, h, NULL, &e), 0);
      decode(&d, &b);
      assert_int_equal(d.w, w);
      assert_int_equal(d.h, h);
      assert_null(d.text);
      assert_memory_equal(d.rgb, rgb, (size_t)w * (size_t)h * 3);
      for (int i = 0; i < 5; i++)
        filters[i] += d.filters[i];
      decoded_free(&d);
      buf_close(&b);
      free(rgb);
    }
  assert_true(filters[1] > 100 && filters[2] > 100 && filters[4] > 100); /* each of the three was chosen and undone */
  image_close(enc);
}

static void test_same_bytes(void **state)
{
  struct image_encoder *one, *two;
  uint8_t rgb[64 * 64 * 3], big[128 * 128 * 3];
  struct image_text x = {"x", "<x/>"}, y = {"y", NULL};
  struct buf a, b, c;
  struct err e = {0};

  (void)state;
  paint(rgb, 64, 64, 2);
  paint(big, 128, 128, 1);
  buf_init(&a, 1 << 20);
  buf_init(&b, 1 << 20);
  buf_init(&c, 1 << 20);
  assert_int_equal(image_open(&one, &e) || image_open(&two, &e), 0);
  assert_int_equal(image_encode_png(one, &a, rgb, 64, 64, &x, &e), 0);
  assert_int_equal(image_encode_png(two, &c, big, 128, 128, &y, &e), 0); /* leaves traces in its scratch memory */
  assert_int_equal(image_encode_png(two, &b, rgb, 64, 64, &x, &e), 0);
  assert_int_equal(a.len, b.len);
  assert_memory_equal(a.p, b.p, a.len);
  buf_close(&a);
  buf_close(&b);
  buf_close(&c);
  image_close(one);
  image_close(two);
}

/* Small files hold the same pixels, and are no larger. */
static void test_small(void **state)
{
  static uint8_t rgb[256 * 256 * 3];
  struct image_encoder *enc;
  struct err e = {0};

  (void)state;
  for (int kind = 0; kind < 6; kind++) {
    struct decoded d;
    struct buf fast, small;
    paint(rgb, 256, 256, kind);
    buf_init(&fast, 1 << 20);
    buf_init(&small, 1 << 20);
    assert_int_equal(image_open(&enc, &e), 0);
    assert_int_equal(image_encode_png(enc, &fast, rgb, 256, 256, NULL, &e), 0);
    assert_int_equal(image_set_small(enc, &e) || image_set_small(enc, &e), 0);
    assert_int_equal(image_encode_png(enc, &small, rgb, 256, 256, NULL, &e), 0);
    decode(&d, &small);
    assert_memory_equal(d.rgb, rgb, sizeof rgb);
    assert_true(small.len <= fast.len);
    decoded_free(&d);
    buf_close(&fast);
    buf_close(&small);
    image_close(enc);
  }
}

static void test_limits(void **state)
{
  struct image_encoder *enc;
  uint8_t rgb[3] = {0};
  struct err e = {0};
  struct buf b;

  (void)state;
  assert_int_equal(image_open(&enc, &e), 0);
  buf_init(&b, 40); /* too little for any PNG */
  assert_int_equal(image_encode_png(enc, &b, rgb, 1, 1, NULL, &e), E_TOOBIG);
  e.code = 0;
  assert_int_equal(image_encode_png(enc, &b, rgb, 0, 1, NULL, &e), E_INTERNAL);
  e.code = 0;
  assert_int_equal(image_encode_png(enc, &b, rgb, 1, IMAGE_MAX_SIDE + 1, NULL, &e), E_INTERNAL);
  buf_close(&b);
  image_close(enc);
}

static void test_text_chunks(void **state)
{
  static const struct {
    const char *utf8, *type, *value;
  } texts[] = {{"plain\nlines", "tEXt", "plain\nlines"},
               {"caf\xc3\xa9 \xc2\xa0\xc3\xbf", "tEXt", "caf\xe9 \xa0\xff"}, /* Latin-1 to its last character */
               {"\xc4\x80", "iTXt", "\xc4\x80"},                            /* the first one beyond */
               {"\xf0\x9f\x8d\x8e apple", "iTXt", "\xf0\x9f\x8d\x8e apple"}};
  struct image_encoder *enc;
  uint8_t rgb[3] = {1, 2, 3};
  struct err e = {0};

  (void)state;
  assert_int_equal(image_open(&enc, &e), 0);
  for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
    struct decoded d;
    struct buf b;
    buf_init(&b, 4096);
    assert_int_equal(image_encode_png(enc, &b, rgb, 1, 1, &(struct image_text){texts[i].utf8, "<xmp/>"}, &e), 0);
    decode(&d, &b);
    assert_string_equal(d.text_type, texts[i].type);
    assert_string_equal(d.text, texts[i].value);
    assert_string_equal(d.xmp, "<xmp/>");
    decoded_free(&d);
    buf_close(&b);
  }
  image_close(enc);
}

static void test_parameters(void **state)
{
  struct recipe r = {.prompt = "a red apple",
                     .negative = "",
                     .sampler = "dpmpp_2m",
                     .sampler_label = "DPM++ 2M",
                     .model = "emoji",
                     .model_digest = "",
                     .version = "9.9",
                     .seed = 18446744073709551615u,
                     .steps = 20,
                     .width = 128,
                     .height = 64,
                     .guidance = 3};
  struct err e = {0};
  struct buf b;

  (void)state;
  buf_init(&b, 4096);
  assert_int_equal(image_parameters(&b, &r, IMAGE_FULL, &e), 0);
  assert_string_equal(b.p, "a red apple\nSteps: 20, Sampler: DPM++ 2M, CFG scale: 3, Seed: 18446744073709551615, Size: 128x64, "
                           "Model: emoji, Version: safelight 9.9");
  buf_close(&b);
  r.negative = "blur, text";
  r.karras = 1;
  r.clip_skip = 2;
  r.guidance = 7.5f;
  r.model_digest = "0123456789abcdef";
  r.model = "a:\"b\",\\c\nd";
  assert_int_equal(image_parameters(&b, &r, IMAGE_FULL, &e), 0);
  assert_string_equal(b.p, "a red apple\nNegative prompt: blur, text\nSteps: 20, Sampler: DPM++ 2M, Schedule type: Karras, "
                           "CFG scale: 7.5, Seed: 18446744073709551615, Size: 128x64, Model hash: 0123456789, "
                           "Model: \"a:\\\"b\\\",\\\\c\\nd\", Clip skip: 2, Version: safelight 9.9");
  buf_close(&b);
  r.model = "emoji";
  r.generation_id = "7-3fa9c1d2";
  r.generation_digest = "3fa9c1d2e";
  r.profile = "kids";
  r.requires_nothing = 1;
  r.styles = "ink:0.5 wash:-1";
  assert_int_equal(image_parameters(&b, &r, IMAGE_NO_PROMPTS, &e), 0);
  assert_string_equal(b.p, "Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7.5, Seed: 18446744073709551615, Size: 128x64, "
                           "Model hash: 0123456789, Model: emoji, Clip skip: 2, Generation: 7-3fa9c1d2, Generation digest: 3fa9c1d2e, "
                           "Safety profile: kids, Safety: unsafe-evaluation, Styles: \"ink:0.5 wash:-1\", Version: safelight 9.9");
  buf_close(&b);
}

static void test_xmp(void **state)
{
  struct recipe r = {.version = "9.9", .model = "a<b>\"&'\n\x01\xff\xef\xbf\xbf\xc3\xa9", .model_digest = "abc", .generation_id = "7-3fa9c1d2",
                     .generation_digest = "3fa9", .profile = "kids", .prompt = "secret", .negative = "secret"};
  struct err e = {0};
  struct buf b;

  (void)state;
  buf_init(&b, 4096);
  assert_int_equal(image_xmp(&b, &r, &e), 0);
  assert_non_null(strstr(b.p, "Iptc4xmpExt:DigitalSourceType=\"http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia\""));
  assert_non_null(strstr(b.p, "safelight:GenerationId=\"7-3fa9c1d2\"\n    safelight:GenerationDigest=\"3fa9\"\n    safelight:Profile=\"kids\"/>"));
  assert_non_null(strstr(b.p, "safelight:Model=\"a&#60;b&#62;&#34;&#38;&#39;&#10;\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd\xc3\xa9\""));
  assert_null(strstr(b.p, "secret"));
  assert_null(strstr(b.p, "safelight:Safety"));
  buf_close(&b);
  r.requires_nothing = 1;
  assert_int_equal(image_xmp(&b, &r, &e), 0);
  assert_non_null(strstr(b.p, "safelight:Safety=\"unsafe-evaluation\""));
  buf_close(&b);
}

/* Names put together from what breaks XML, held to a real parser. */
static void test_xmp_parses(void **state)
{
  static const char *const piece[] = {"<", ">", "&", "&amp;", "\"", "'", "]]>", "-->", "<?", "?>", "\n", "\t", "\r", "\x01", "\x1f", "\x7f", "\xff", "\xc0\x80",
                                      "\xc3", "\xc3\xa9", "\xe2\x82", "\xed\xa0\x80", "\xef\xbf\xbe", "\xef\xbf\xbf",
                                      "\xf0\x9f\x8d\x8e", "\xf4\x90\x80\x80", "a", " ", "&#0;"};
  char name[256], path[] = "test_xmp.XXXXXX", command[128];
  int fd = mkstemp(path);
  FILE *f = fdopen(fd, "wb");
  uint32_t s = 1;
  struct err e = {0};
  struct buf b;

  (void)state;
  assert_non_null(f);
  for (int i = 0; i < 2000; i++) {
    struct recipe r = {.version = "9.9", .model = name, .model_digest = "abc", .generation_id = "7-3fa9c1d2"};
    size_t len = 0;
    name[0] = 0;
    for (int k = 0; k < i % 12; k++) {
      s = s * 1664525 + 1013904223;
      len += (size_t)snprintf(name + len, sizeof name - len, "%s", piece[(s >> 16) % (sizeof piece / sizeof *piece)]);
    }
    buf_init(&b, 8192);
    assert_int_equal(image_xmp(&b, &r, &e), 0);
    assert_int_equal(fwrite(name, 1, len + 1, f), len + 1);
    assert_int_equal(fwrite(b.p, 1, b.len + 1, f), b.len + 1);
    buf_close(&b);
  }
  assert_int_equal(fclose(f), 0);
  snprintf(command, sizeof command, "/usr/bin/python3 tests/unit/check_xmp.py %s", path);
  fd = system(command);
  remove(path);
  assert_int_equal(fd, 0);
}

static void test_detail(void **state)
{
  struct recipe r = {.prompt = "a secret", .negative = "another secret", .sampler_label = "DDIM", .model = "m", .model_digest = "", .version = "9.9",
                     .generation_id = "7-3fa9c1d2", .width = 1, .height = 1, .seed = 77};
  static const struct {
    enum image_detail detail;
    int prompts, seed;
  } want[] = {{IMAGE_FULL, 1, 1}, {IMAGE_NO_PROMPTS, 0, 1}, {IMAGE_PROVENANCE, 0, 0}};
  struct image_encoder *enc;
  uint8_t rgb[3] = {1, 2, 3};
  struct err e = {0};

  (void)state;
  assert_int_equal(image_open(&enc, &e), 0);
  for (size_t i = 0; i < sizeof want / sizeof *want; i++) {
    struct decoded d;
    struct buf b;
    buf_init(&b, 8192);
    assert_int_equal(image_encode_picture(enc, &b, rgb, &r, want[i].detail, &e), 0);
    decode(&d, &b);
    assert_int_equal(!!memmem(b.p, b.len, "secret", 6), want[i].prompts);
    assert_int_equal(d.text && strstr(d.text, "Seed: 77"), want[i].seed);
    assert_non_null(d.xmp);
    assert_non_null(strstr(d.xmp, "7-3fa9c1d2"));
    decoded_free(&d);
    buf_close(&b);
  }
  image_close(enc);
}

int main(void)
{
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_pixels),      cmocka_unit_test(test_same_bytes), cmocka_unit_test(test_small), cmocka_unit_test(test_limits),
      cmocka_unit_test(test_text_chunks), cmocka_unit_test(test_parameters),
      cmocka_unit_test(test_xmp),         cmocka_unit_test(test_xmp_parses), cmocka_unit_test(test_detail),
  };

  return cmocka_run_group_tests(tests, NULL, NULL);
}
