/*
 * first_pixels.c - the files of a first picture and its mask become pixels of the request's size. See first.h.
 *
 * Called by server/. Threads: pure functions.
 */
#include <stdlib.h>
#include <string.h>

#include "proto/first.h"
#include "proto/first_mask.h"
#include "proto/image_read.h"

/* The sentence of a picture's own fault gets the client's name of the file. */
static int blame(const struct first_file *file, const struct err *why, struct err *e)
{
  return err_field(e, why->code, why->code == E_ARG ? file->field : "", "%s: %s", file->field, why->msg);
}

static int read_file(struct image *im, const struct first_file *file, struct err *e)
{
  const struct image_limits lim = {.max_bytes = file->len, .max_side = FIRST_MAX_SIDE, .max_pixels = FIRST_MAX_PIXELS};
  struct err why = {0};

  return image_read(im, file->p, file->len, &lim, &why) ? blame(file, &why, e) : 0;
}

/* Cuts the middle of im that has the shape w x h, in place. */
static void crop(struct image *im, int w, int h)
{
  int64_t cw = im->w, ch = im->h;
  size_t px = (size_t)im->channels, from;

  if ((int64_t)im->w * h > (int64_t)im->h * w)
    cw = (int64_t)im->h * w / h;
  else
    ch = (int64_t)im->w * h / w;
  cw = cw ? cw : 1;
  ch = ch ? ch : 1;
  from = (size_t)((im->h - ch) / 2) * (size_t)im->w + (size_t)((im->w - cw) / 2);
  for (int64_t y = 0; y < ch; y++)
    memmove(im->px + (size_t)(y * cw) * px, im->px + (from + (size_t)(y * im->w)) * px, (size_t)cw * px);
  im->w = (int)cw;
  im->h = (int)ch;
}

/* im becomes w x h. */
static int fit(struct image *im, const struct first *f, int w, int h, struct err *e)
{
  struct image out;

  if (f->fit == FIRST_CROP)
    crop(im, w, h);
  if (im->w == w && im->h == h)
    return 0;
  if (image_resize(&out, im, w, h, e))
    return e->code;
  image_free(im);
  *im = out;
  return 0;
}

/* A side near v that the model can draw. */
static int round_side(double v, const struct request_limits *lim)
{
  int m = lim->size_multiple, side = (int)(v / m + 0.5) * m, most = lim->max_size / m * m;

  return side < m ? m : side > most ? most : side;
}

/* The picture's own shape, as large as it is, but neither smaller than what the model is made for nor larger than allowed. */
static void own_size(struct request *r, const struct image *im, const struct request_limits *lim)
{
  double longer = im->w > im->h ? im->w : im->h, scale = 1;

  if (longer < lim->default_size)
    scale = lim->default_size / longer;
  if (longer > lim->max_size)
    scale = lim->max_size / longer;
  r->width = round_side(im->w * scale, lim);
  r->height = round_side(im->h * scale, lim);
}

static int decode_init(struct request *r, const struct first *f, const struct request_limits *lim, struct err *e)
{
  struct image im;
  int ret = read_file(&im, &f->file[FIRST_INIT], e);

  if (ret)
    return ret;
  image_flatten_white(&im);
  if (!r->width)
    own_size(r, &im, lim);
  ret = fit(&im, f, r->width, r->height, e);
  if (!ret) {
    r->init = im.px;
    im.px = NULL;
  }
  image_free(&im);
  return ret;
}

static int decode_mask(struct request *r, const struct first *f, struct err *e)
{
  const struct first_file *file = &f->file[FIRST_MASK];
  size_t n = (size_t)r->width * (size_t)r->height;
  struct image im;
  int ret = read_file(&im, file, e);

  if (!ret && f->mask == FIRST_MASK_ALPHA && im.channels != 4)
    ret = err_field(e, E_ARG, file->field, "%s has no transparent pixels: transparency says what is drawn anew", file->field);
  ret = ret ? ret : fit(&im, f, r->width, r->height, e);
  if (!ret && !(r->mask = malloc(n)))
    ret = err_set(e, E_NOMEM, "out of memory for the mask");
  if (!ret && f->mask == FIRST_MASK_ALPHA)
    image_mask_of_alpha(r->mask, &im);
  else if (!ret)
    image_mask_of_light(r->mask, &im);
  image_free(&im);
  for (size_t i = 0; !ret && f->is_inverted && i < n; i++)
    r->mask[i] = (uint8_t)(255 - r->mask[i]);
  if (!ret && !memchr(r->mask, 255, n) && f->mask == FIRST_MASK_ALPHA)
    ret = err_field(e, E_ARG, file->field, "%s has no transparent pixels: transparency says what is drawn anew", file->field);
  return ret;
}

int first_decode(struct request *r, const struct first *f, const struct request_limits *lim, struct err *e)
{
  struct err none = {0};
  int ret;

  e = e ? e : &none;
  if (!f->file[FIRST_INIT].p)
    return 0;
  ret = decode_init(r, f, lim, e);
  if (!ret && f->file[FIRST_MASK].p) {
    ret = decode_mask(r, f, e);
    if (!ret && f->is_filled) /* before the blur, whose edge would let through what is to vanish */
      ret = first_mask_fill(r->init, r->mask, r->width, r->height, e);
    ret = ret ? ret : first_mask_blur(r->mask, r->width, r->height, f->blur, e);
  }
  if (ret)
    request_close(r);
  return ret;
}
