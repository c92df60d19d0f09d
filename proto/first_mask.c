/*
 * first_mask.c - see first_mask.h.
 */
#include "proto/first_mask.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---- blur ---- */

enum { BLUR_RADIUS = 160 }; /* of sigma 64 */

/* One direction's weights, and room for a line. */
struct blur {
  int radius;
  float tap[BLUR_RADIUS + 1]; /* of the pixel itself, and of each of the two at that distance */
  float *line, *sum;          /* (n + 2 * radius), (n): of the longest line */
};

static void blur_taps(struct blur *b, float sigma)
{
  float sum = 0;

  b->radius = (int)(2.5f * sigma + 0.5f);
  for (int k = 0; k <= b->radius; k++) {
    b->tap[k] = k ? expf(-(float)(k * k) / (2 * sigma * sigma)) : 1;
    sum += k ? 2 * b->tap[k] : b->tap[k];
  }
  for (int k = 0; k <= b->radius; k++)
    b->tap[k] /= sum;
}

/* Most lines of most masks are of one value, and stay so. */
static int is_flat(const uint8_t *p, size_t step, int n)
{
  for (int i = 1; i < n; i++)
    if (p[(size_t)i * step] != *p)
      return 0;
  return 1;
}

/* Along a line of n pixels that lie step bytes apart: weight by weight, so that the innermost loop is one that compilers know. */
static void blur_line(uint8_t *p, size_t step, int n, const struct blur *b)
{
  const float *middle = b->line + b->radius;

  if (is_flat(p, step, n))
    return;
  for (int i = -b->radius; i < n + b->radius; i++)
    b->line[i + b->radius] = (float)p[(size_t)(i < 0 ? 0 : i >= n ? n - 1 : i) * step];
  for (int i = 0; i < n; i++)
    b->sum[i] = b->tap[0] * middle[i];
  for (int k = 1; k <= b->radius; k++)
    for (int i = 0; i < n; i++)
      b->sum[i] += b->tap[k] * (middle[i - k] + middle[i + k]);
  for (int i = 0; i < n; i++)
    p[(size_t)i * step] = (uint8_t)(b->sum[i] + 0.5f);
}

int first_mask_blur(uint8_t *mask, int w, int h, float across, float down, struct err *e)
{
  size_t longest = (size_t)(w > h ? w : h);
  struct blur b;

  if (!(across <= 64 && down <= 64))
    return err_set(e, E_ARG, "a mask cannot be blurred by more than 64 pixels");
  b.line = malloc((2 * longest + 2 * BLUR_RADIUS) * sizeof *b.line);
  if (!b.line)
    return err_set(e, E_NOMEM, "out of memory to blur the mask");
  b.sum = b.line + longest + 2 * BLUR_RADIUS;
  blur_taps(&b, across);
  for (int y = 0; y < h && b.radius; y++)
    blur_line(mask + (size_t)y * (size_t)w, 1, w, &b);
  blur_taps(&b, down);
  for (int x = 0; x < w && b.radius; x++)
    blur_line(mask + x, (size_t)w, h, &b);
  free(b.line);
  return 0;
}

/* ---- fill ---- */

/* One level of the pyramid. Colours are multiplied by their weight. */
struct level {
  int w, h;
  float *px;      /* (h, w, 4): red, green, blue, weight 0..1 */
};

enum { LEVELS = 16 };

/* The sum of the four above, cut to a weight of 1. */
static void push(const struct level *fine, struct level *coarse)
{
  memset(coarse->px, 0, (size_t)coarse->w * (size_t)coarse->h * 4 * sizeof *coarse->px);
  for (int y = 0; y < fine->h; y++)
    for (int x = 0; x < fine->w; x++) {
      const float *from = fine->px + ((size_t)y * (size_t)fine->w + (size_t)x) * 4;
      float *to = coarse->px + ((size_t)(y / 2) * (size_t)coarse->w + (size_t)(x / 2)) * 4;
      for (int c = 0; c < 4; c++)
        to[c] += from[c];
    }
  for (size_t i = 0; i < (size_t)coarse->w * (size_t)coarse->h; i++) {
    float *p = coarse->px + i * 4, weight = p[3];
    for (int c = 0; c < 4 && weight > 1; c++)
      p[c] /= weight;
  }
}

/* The coarse level at a fine pixel's place, bilinear. */
static void sample(const struct level *l, int x, int y, float out[4])
{
  float fx = ((float)x - 0.5f) / 2, fy = ((float)y - 0.5f) / 2;
  int x0 = (int)floorf(fx), y0 = (int)floorf(fy);

  fx -= (float)x0;
  fy -= (float)y0;
  memset(out, 0, 4 * sizeof *out);
  for (int k = 0; k < 4; k++) {
    int at_x = x0 + (k & 1), at_y = y0 + (k >> 1);
    float share = (k & 1 ? fx : 1 - fx) * (k >> 1 ? fy : 1 - fy);
    at_x = at_x < 0 ? 0 : at_x >= l->w ? l->w - 1 : at_x;
    at_y = at_y < 0 ? 0 : at_y >= l->h ? l->h - 1 : at_y;
    for (int c = 0; c < 4; c++)
      out[c] += share * l->px[((size_t)at_y * (size_t)l->w + (size_t)at_x) * 4 + (size_t)c];
  }
}

/* What a fine pixel lacks in weight comes from the coarse level, whose weights are all 1. */
static void pull(struct level *fine, const struct level *coarse)
{
  for (int y = 0; y < fine->h; y++)
    for (int x = 0; x < fine->w; x++) {
      float *p = fine->px + ((size_t)y * (size_t)fine->w + (size_t)x) * 4, from[4], lack = 1 - p[3];
      if (!(lack > 0))
        continue;
      sample(coarse, x, y, from);
      for (int c = 0; c < 4; c++)
        p[c] += lack * from[c];
    }
}

static void load(struct level *l, const uint8_t *rgb, const uint8_t *mask)
{
  for (size_t i = 0; i < (size_t)l->w * (size_t)l->h; i++) {
    l->px[i * 4 + 3] = (float)(255 - mask[i]) / 255;
    for (size_t c = 0; c < 3; c++)
      l->px[i * 4 + c] = (float)rgb[i * 3 + c] * l->px[i * 4 + 3];
  }
}

/* Every pixel that the mask touches; the others keep their bytes. */
static void store(const struct level *l, uint8_t *rgb, const uint8_t *mask)
{
  for (size_t i = 0; i < (size_t)l->w * (size_t)l->h; i++)
    for (size_t c = 0; mask[i] && c < 3; c++) {
      float v = l->px[i * 4 + c];
      rgb[i * 3 + c] = v < 0 ? 0 : v > 255 ? 255 : (uint8_t)(v + 0.5f);
    }
}

int first_mask_fill(uint8_t *rgb, const uint8_t *mask, int w, int h, struct err *e)
{
  struct level level[LEVELS] = {{w, h, NULL}};
  int n = 1, ret = 0;
  float *top;

  while (n < LEVELS && (level[n - 1].w > 1 || level[n - 1].h > 1)) {
    level[n] = (struct level){(level[n - 1].w + 1) / 2, (level[n - 1].h + 1) / 2, NULL};
    n++;
  }
  for (int i = 0; i < n && !ret; i++)
    if (!(level[i].px = malloc((size_t)level[i].w * (size_t)level[i].h * 4 * sizeof *level[i].px)))
      ret = err_set(e, E_NOMEM, "out of memory to fill what the mask covers");
  if (ret)
    goto out;
  load(&level[0], rgb, mask);
  for (int i = 1; i < n; i++)
    push(&level[i - 1], &level[i]);
  top = level[n - 1].px; /* one pixel: the mean of all that is kept */
  if (!(top[3] > 0))
    goto out;
  for (int c = 0; c < 3; c++)
    top[c] /= top[3];
  top[3] = 1;
  for (int i = n - 1; i > 0; i--)
    pull(&level[i - 1], &level[i]);
  store(&level[0], rgb, mask);
out:
  for (int i = 0; i < n; i++)
    free(level[i].px);
  return ret;
}
