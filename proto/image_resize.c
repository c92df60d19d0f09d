/*
 * image_resize.c - pixels to the size and the mask that a request needs. See image_read.h.
 *
 * Called by the decoders that take pictures. Threads: pure functions.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "proto/image.h"
#include "proto/image_read.h"

/* Of a weight's fraction. Weights of one pixel are 1 together and 1.572 at most without their signs (a corner of a picture that grows), so that a sum of bytes
 * times weights, however far it has come, fits 32 bits. */
enum { BITS = 22, LOBES = 3 };

/* Which pixels of a line of in make each of a line of out, and how much of each. */
struct weights {
  int most;           /* of them for one pixel */
  int *first, *count; /* (out) */
  int32_t *weight;    /* (out, most) */
};

static void weights_close(struct weights *t)
{
  free(t->first);
  free(t->count);
  free(t->weight);
}

static double sinc(double x)
{
  return x == 0 ? 1 : sin(x * M_PI) / (x * M_PI);
}

static double lanczos(double x)
{
  return x >= -LOBES && x < LOBES ? sinc(x) * sinc(x / LOBES) : 0;
}

/* The weights of one pixel: n pixels from first on, around center, in units of the wider pixel. The terms are in Pillow's order, for its bits. */
static void weigh(int32_t *w, int first, int n, double center, double wide)
{
  double sum = 0, unit = 1 / wide;

  for (int i = 0; i < n; i++)
    sum += lanczos((i + first - center + 0.5) * unit);
  for (int i = 0; i < n; i++) {
    double share = lanczos((i + first - center + 0.5) * unit) / sum * (1 << BITS);
    w[i] = (int32_t)(share < 0 ? share - 0.5 : share + 0.5);
  }
}

static int weights_open(struct weights *t, int in, int out)
{
  double scale = (double)in / out, wide = fmax(1, scale), support = LOBES * wide;

  t->most = (int)ceil(support) * 2 + 1;
  t->first = malloc((size_t)out * sizeof *t->first);
  t->count = malloc((size_t)out * sizeof *t->count);
  t->weight = malloc((size_t)out * (size_t)t->most * sizeof *t->weight);
  if (!t->first || !t->count || !t->weight)
    return E_NOMEM;
  for (int i = 0; i < out; i++) {
    double center = (i + 0.5) * scale;
    int first = (int)fmax(0, center - support + 0.5), end = (int)fmin(in, center + support + 0.5);
    t->first[i] = first;
    t->count[i] = end - first;
    weigh(t->weight + (size_t)i * (size_t)t->most, first, end - first, center, wide);
  }
  return 0;
}

/* Lanczos' negative lobes make more than white and less than black. */
static uint8_t to_byte(int32_t sum)
{
  int v = sum >> BITS;

  return (uint8_t)(v < 0 ? 0 : v > 255 ? 255 : v);
}

/* One row of w pixels of c channels, 4 at most, from a row of the picture. */
static void resize_row(uint8_t *to, const uint8_t *from, const struct weights *t, int w, int c)
{
  for (int x = 0; x < w; x++) {
    const int32_t *weight = t->weight + (size_t)x * (size_t)t->most;
    const uint8_t *p = from + (size_t)t->first[x] * (size_t)c;
    int32_t sum[4] = {1 << (BITS - 1), 1 << (BITS - 1), 1 << (BITS - 1), 1 << (BITS - 1)};
    for (int i = 0; i < t->count[x]; i++, p += c)
      for (int k = 0; k < c; k++)
        sum[k] += weight[i] * p[k];
    for (int k = 0; k < c; k++)
      *to++ = to_byte(sum[k]);
  }
}

/* Row y of the result from rows of n bytes; sum is room for n. */
static void resize_column(uint8_t *to, const uint8_t *from, const struct weights *t, int y, size_t n, int32_t *sum)
{
  for (size_t i = 0; i < n; i++)
    sum[i] = 1 << (BITS - 1);
  for (int k = 0; k < t->count[y]; k++) {
    const uint8_t *row = from + (size_t)(t->first[y] + k) * n;
    int32_t weight = t->weight[(size_t)y * (size_t)t->most + (size_t)k];
    for (size_t i = 0; i < n; i++)
      sum[i] += weight * row[i];
  }
  for (size_t i = 0; i < n; i++)
    to[i] = to_byte(sum[i]);
}

int image_resize(struct image *out, const struct image *im, int w, int h, struct err *e)
{
  struct weights across = {0}, down = {0};
  size_t n = (size_t)w * (size_t)im->channels;
  uint8_t *narrow = NULL;
  int32_t *sum = NULL;
  int r = 0;

  *out = (struct image){w, h, im->channels, NULL};
  if (w < 1 || h < 1 || w > IMAGE_MAX_SIDE || h > IMAGE_MAX_SIDE)
    return err_set(e, E_INTERNAL, "a picture cannot be resized to %dx%d", w, h);
  out->px = malloc((size_t)h * n);
  narrow = malloc((size_t)im->h * n); /* the right width, still the file's height */
  sum = malloc(n * sizeof *sum);
  if (!out->px || !narrow || !sum || weights_open(&across, im->w, w) || weights_open(&down, im->h, h)) {
    r = err_set(e, E_NOMEM, "out of memory to resize a picture to %dx%d", w, h);
    goto out;
  }
  for (int y = 0; y < im->h; y++)
    resize_row(narrow + (size_t)y * n, im->px + (size_t)y * (size_t)im->w * (size_t)im->channels, &across, w, im->channels);
  for (int y = 0; y < h; y++)
    resize_column(out->px + (size_t)y * n, narrow, &down, y, n, sum);
out:
  weights_close(&across);
  weights_close(&down);
  free(narrow);
  free(sum);
  if (r) {
    free(out->px);
    out->px = NULL;
  }
  return r;
}

/* ---- alpha ---- */

static void to_rgb(struct image *im, int is_over_white)
{
  size_t n = (size_t)im->w * (size_t)im->h;
  const uint8_t *from = im->px;
  uint8_t *to = im->px;

  if (im->channels == 3)
    return;
  for (size_t i = 0; i < n; i++, from += 4, to += 3) {
    unsigned a = is_over_white ? from[3] : 255;
    for (int k = 0; k < 3; k++)
      to[k] = (uint8_t)((from[k] * a + 255 * (255 - a) + 127) / 255);
  }
  im->channels = 3;
}

void image_flatten_white(struct image *im)
{
  to_rgb(im, 1);
}

void image_drop_alpha(struct image *im)
{
  to_rgb(im, 0);
}

void image_mask_of_alpha(uint8_t *mask, const struct image *im)
{
  size_t n = (size_t)im->w * (size_t)im->h;

  for (size_t i = 0; i < n; i++)
    mask[i] = im->channels == 4 ? (uint8_t)(255 - im->px[4 * i + 3]) : 0;
}

void image_mask_of_light(uint8_t *mask, const struct image *im)
{
  size_t n = (size_t)im->w * (size_t)im->h, c = (size_t)im->channels;
  int is_opaque = 1;

  for (size_t i = 0; i < n && c == 4; i++)
    is_opaque &= im->px[4 * i + 3] == 255;
  for (size_t i = 0; i < n; i++) {
    const uint8_t *p = im->px + i * c;
    mask[i] = is_opaque ? (uint8_t)((p[0] * 19595u + p[1] * 38470u + p[2] * 7471u + 0x8000) >> 16) : p[3];
  }
}
