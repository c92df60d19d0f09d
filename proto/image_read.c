/*
 * image_read.c - which format a file has, limits, and turning pictures upright. See image_read.h.
 *
 * Called by the decoders that take pictures. Threads: pure functions.
 */
#include "proto/image_read.h"

#include <stdlib.h>
#include <string.h>

#include "proto/image_codec.h"

void image_free(struct image *im)
{
  free(im->px);
  *im = (struct image){0};
}

int image_alloc(struct image *im, int64_t w, int64_t h, int channels, const struct image_limits *lim, struct err *e)
{
  if (w < 1 || h < 1)
    return err_set(e, E_ARG, "the picture has no pixels");
  if (w > lim->max_side || h > lim->max_side)
    return err_set(e, E_ARG, "the picture has %lldx%lld pixels; a side may have %d at most: make it smaller", (long long)w, (long long)h, lim->max_side);
  if (w * h > lim->max_pixels)
    return err_set(e, E_ARG, "the picture has %lldx%lld pixels; %lld are allowed in all: make it smaller", (long long)w, (long long)h,
                   (long long)lim->max_pixels);
  im->w = (int)w;
  im->h = (int)h;
  im->channels = channels;
  im->px = malloc((size_t)w * (size_t)h * (size_t)channels);
  return im->px ? 0 : err_set(e, E_NOMEM, "out of memory for a picture of %dx%d", im->w, im->h);
}

/* Turns im by what EXIF's orientation o (2..8) says has to be done to it: 2 and 4 mirror, 3 is half a turn, 5 to 8 also swap the sides. */
static int turn_upright(struct image *im, int o, struct err *e)
{
  int is_swapped = o >= 5, w = is_swapped ? im->h : im->w, h = is_swapped ? im->w : im->h, c = im->channels;
  int from_right = o == 2 || o == 3 || o == 7 || o == 8, from_bottom = o == 3 || o == 4 || o == 6 || o == 7;
  uint8_t *px = malloc((size_t)w * (size_t)h * (size_t)c), *to = px;

  if (!px)
    return err_set(e, E_NOMEM, "out of memory for a picture of %dx%d", w, h);
  for (int y = 0; y < h; y++)
    for (int x = 0; x < w; x++, to += c) {
      int sx = is_swapped ? y : x, sy = is_swapped ? x : y; /* the pixel of the file before it is mirrored */
      if (from_right)
        sx = im->w - 1 - sx;
      if (from_bottom)
        sy = im->h - 1 - sy;
      memcpy(to, im->px + ((size_t)sy * (size_t)im->w + (size_t)sx) * (size_t)c, (size_t)c);
    }
  free(im->px);
  *im = (struct image){w, h, c, px};
  return 0;
}

int image_read(struct image *im, const void *file, size_t len, const struct image_limits *lim, struct err *e)
{
  const uint8_t *p = file;
  int orientation = 1, r;

  *im = (struct image){0};
  if (len > lim->max_bytes)
    return err_set(e, E_ARG, "the picture's file has %zu bytes; %zu are allowed", len, lim->max_bytes);
  if (len >= 8 && !memcmp(p, "\x89PNG\r\n\x1a\n", 8))
    r = image_read_png(im, p, len, lim, &orientation, e);
  else if (len >= 3 && !memcmp(p, "\xff\xd8\xff", 3))
    r = image_read_jpeg(im, p, len, lim, &orientation, e);
  else if (len >= 12 && !memcmp(p, "RIFF", 4) && !memcmp(p + 8, "WEBP", 4))
    r = image_read_webp(im, p, len, lim, &orientation, e);
  else
    r = err_set(e, E_ARG, len ? "the picture is neither a PNG nor a JPEG nor a WebP file" : "the picture's file is empty");
  if (!r && orientation != 1)
    r = turn_upright(im, orientation, e);
  if (r)
    image_free(im);
  return r;
}
