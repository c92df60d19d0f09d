/*
 * bench_files.c - see bench_files.h. Called by bench.c. Threads: none of its own.
 *
 * Processor time of this thread, the median of several, because a picture's file is written by one thread and other processes shall not count.
 */
#include "server/bench_files.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "proto/image.h"
#include "proto/image_read.h"
#include "server/bench_lora.h"

enum { TIMES = 9, FILE_MAX = 256 << 20, DEFAULT_SIZE = 512 };

enum way { PNG_FAST, PNG_SMALL, JPEG, WEBP, WEBP_LOSSLESS, WAYS };

static const char *const way_name[WAYS] = {"png, fast", "png, small", "jpeg 90", "webp 90", "webp 100"};

enum painting { PHOTOGRAPH, DRAWING, GRADIENT, NOISE, PAINTINGS };

static const char *const painting_name[PAINTINGS] = {"like a photograph", "like a drawing", "a gradient", "noise"};

static double thread_ms(void)
{
  struct timespec t;

  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return 1e3 * (double)t.tv_sec + 1e-6 * (double)t.tv_nsec;
}

static unsigned draw_number(uint32_t *s)
{
  *s = *s * 1664525 + 1013904223;
  return *s >> 16;
}

/* One channel of one pixel. A photograph: shapes of every size and the grain of a sensor; a drawing: flat discs on white. */
static double shade(enum painting kind, int x, int y, int c, uint32_t *s)
{
  double v = 128, grain = (double)(draw_number(s) + draw_number(s)) / 65536 - 1;

  switch (kind) {
  case PHOTOGRAPH:
    for (int k = 1; k < 64; k *= 2)
      v += 50.0 / k * sin(k * (0.011 * x + 0.004 * y) + c * 0.3) + 40.0 / k * cos(k * (0.013 * y - 0.005 * x) - c * 0.2 + k);
    return v + 5 * grain;
  case DRAWING: return hypot(x % 171 - 85, y % 171 - 85) < 60 + (x / 171 + y / 171) % 3 * 10 ? 60 + 37 * ((x / 171 + 2 * (y / 171) + c) % 5) : 255;
  case GRADIENT: return (x + 2 * y + c * 40) / 8.0;
  default: return draw_number(s) >> 8;
  }
}

MUST_CHECK static int paint(struct image *im, enum painting kind, int size, struct err *e)
{
  uint32_t s = 1;
  uint8_t *to;

  *im = (struct image){size, size, 3, malloc((size_t)size * (size_t)size * 3)};
  if (!im->px)
    return err_set(e, E_NOMEM, "out of memory for the benchmark");
  to = im->px;
  for (int y = 0; y < size; y++)
    for (int x = 0; x < size; x++)
      for (int c = 0; c < 3; c++)
        *to++ = (uint8_t)fmin(255, fmax(0, shade(kind, x, y, c, &s)));
  return 0;
}

MUST_CHECK static int encode(struct image_encoder *enc, struct buf *out, enum way way, const struct image *im, struct err *e)
{
  switch (way) {
  case JPEG: return image_encode_jpeg(out, im->px, im->w, im->h, 0, NULL, e);
  case WEBP: return image_encode_webp(out, im->px, im->w, im->h, 0, NULL, e);
  case WEBP_LOSSLESS: return image_encode_webp(out, im->px, im->w, im->h, 100, NULL, e);
  default: return image_encode_png(enc, out, im->px, im->w, im->h, NULL, e);
  }
}

/* Milliseconds, the median, and bytes of one way to write a picture. The first writing is not counted. */
MUST_CHECK static int measure(const struct image *im, enum way way, double *ms, size_t *bytes, struct err *e)
{
  struct image_encoder *enc;
  double t[TIMES + 1];
  struct buf out;
  int r = image_open(&enc, e);

  buf_init(&out, FILE_MAX);
  if (!r && way == PNG_SMALL)
    r = image_set_small(enc, e);
  for (int i = 0; !r && i <= TIMES; i++) {
    double start = thread_ms();
    out.len = 0;
    r = encode(enc, &out, way, im, e);
    t[i] = thread_ms() - start;
  }
  *bytes = out.len;
  if (!r)
    *ms = bench_median(t + 1, TIMES);
  buf_close(&out);
  image_close(enc);
  return r;
}

MUST_CHECK static int report(const char *name, const struct image *im, struct err *e)
{
  double ms, fast = 0;
  size_t bytes;

  printf("%s, %dx%d\n", name, im->w, im->h);
  for (enum way way = 0; way < WAYS; way++) {
    if (measure(im, way, &ms, &bytes, e))
      return e->code;
    if (way == PNG_FAST)
      fast = ms;
    printf("  %-12s %9.2f ms %7.1f times png, fast %10zu bytes %6.1f %%\n", way_name[way], ms, ms / fast, bytes,
           100.0 * (double)bytes / (3.0 * im->w * im->h));
  }
  return 0;
}

MUST_CHECK static int read_picture(struct image *im, const char *path, struct err *e)
{
  static const struct image_limits lim = {.max_bytes = FILE_MAX, .max_side = IMAGE_MAX_SIDE, .max_pixels = 1 << 26};
  FILE *f = fopen(path, "rb");
  struct buf b;
  char chunk[65536];
  size_t n;
  int r = f ? 0 : err_field(e, E_FILE, path, "cannot read %s: %m", path);

  buf_init(&b, FILE_MAX);
  while (!r && (n = fread(chunk, 1, sizeof chunk, f)) > 0)
    r = buf_add(&b, chunk, n, e);
  if (!r && ferror(f))
    r = err_field(e, E_FILE, path, "cannot read %s: %m", path);
  if (!r && (r = image_read(im, b.p, b.len, &lim, e)))
    err_wrap(e, "%s", path);
  if (!r)
    image_flatten_white(im);
  if (f)
    fclose(f);
  buf_close(&b);
  return r;
}

int bench_files(char *const *path, int n, int size, struct err *e)
{
  int r = 0;

  for (int i = 0; !r && i < (n ? n : PAINTINGS); i++) {
    struct image im = {0};
    r = n ? read_picture(&im, path[i], e) : paint(&im, (enum painting)i, size ? size : DEFAULT_SIZE, e);
    if (!r)
      r = report(n ? path[i] : painting_name[i], &im, e);
    image_free(&im);
  }
  return r;
}
