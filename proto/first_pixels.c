/*
 * first_pixels.c - the files of a first picture and its mask become pixels of the request's size, and what was drawn goes back into the picture. See first.h.
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

/* ---- shapes ---- */

/* Copies the w x h pixels at x, y of im. They may go to im's own beginning. */
static void copy_part(uint8_t *to, const struct image *im, int x, int y, int w, int h)
{
  size_t px = (size_t)im->channels, row = (size_t)w * px;

  for (int i = 0; i < h; i++)
    memmove(to + (size_t)i * row, im->px + ((size_t)(y + i) * (size_t)im->w + (size_t)x) * px, row);
}

/* Cuts the middle of im that has the shape w x h, in place. */
static void crop(struct image *im, int w, int h)
{
  int64_t cw = im->w, ch = im->h;

  if ((int64_t)im->w * h > (int64_t)im->h * w)
    cw = (int64_t)im->h * w / h;
  else
    ch = (int64_t)im->w * h / w;
  cw = cw ? cw : 1;
  ch = ch ? ch : 1;
  copy_part(im->px, im, (int)((im->w - cw) / 2), (int)((im->h - ch) / 2), (int)cw, (int)ch);
  im->w = (int)cw;
  im->h = (int)ch;
}

static int resize(struct image *im, int w, int h, struct err *e)
{
  struct image out;

  if (im->w == w && im->h == h)
    return 0;
  if (image_resize(&out, im, w, h, e))
    return e->code;
  image_free(im);
  *im = out;
  return 0;
}

struct part {
  int x, y, w, h;
};

/* Where a picture of shape sw x sh lies in one of w x h that holds all of it: in the middle, as large as there is room. */
static struct part inside(int w, int h, int sw, int sh)
{
  int64_t iw = w, ih = h;

  if ((int64_t)sw * h > (int64_t)sh * w)
    ih = (int64_t)sh * w / sw;
  else
    iw = (int64_t)sw * h / sh;
  iw = iw ? iw : 1;
  ih = ih ? ih : 1;
  return (struct part){(int)(w - iw) / 2, (int)(h - ih) / 2, (int)iw, (int)ih};
}

/* All of im in the middle of w x h; beyond its edges its outermost pixels go on. */
static int resize_and_fill(struct image *im, int w, int h, struct err *e)
{
  struct part in = inside(w, h, im->w, im->h);
  struct image out = {w, h, im->channels, NULL};
  size_t px = (size_t)im->channels;

  if (resize(im, in.w, in.h, e))
    return e->code;
  out.px = malloc((size_t)w * (size_t)h * px);
  if (!out.px)
    return err_set(e, E_NOMEM, "out of memory to resize a picture to %dx%d", w, h);
  for (int y = 0; y < h; y++)
    for (int x = 0; x < w; x++) {
      int sx = x < in.x ? 0 : x >= in.x + in.w ? in.w - 1 : x - in.x, sy = y < in.y ? 0 : y >= in.y + in.h ? in.h - 1 : y - in.y;
      memcpy(out.px + ((size_t)y * (size_t)w + (size_t)x) * px, im->px + ((size_t)sy * (size_t)in.w + (size_t)sx) * px, px);
    }
  image_free(im);
  *im = out;
  return 0;
}

/* im becomes w x h. */
static int fit(struct image *im, enum first_fit how, int w, int h, struct err *e)
{
  if (how == FIRST_FILL)
    return resize_and_fill(im, w, h, e);
  if (how == FIRST_CROP)
    crop(im, w, h);
  return resize(im, w, h, e);
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

/* ---- the two files ---- */

static int read_init(struct image *im, const struct first *f, struct err *e)
{
  int ret = read_file(im, &f->file[FIRST_INIT], e);

  if (!ret)
    image_flatten_white(im);
  return ret;
}

/* The mask as one channel of w x h, 255: draw anew. */
static int read_mask(struct image *grey, const struct first *f, enum first_fit how, int w, int h, struct err *e)
{
  const struct first_file *file = &f->file[FIRST_MASK];
  size_t n = (size_t)w * (size_t)h;
  struct image im;
  int ret = read_file(&im, file, e);

  *grey = (struct image){w, h, 1, NULL};
  if (!ret && f->mask == FIRST_MASK_ALPHA && im.channels != 4)
    ret = err_field(e, E_ARG, file->field, "%s has no transparent pixels: transparency says what is drawn anew", file->field);
  ret = ret ? ret : fit(&im, how, w, h, e);
  if (!ret && !(grey->px = malloc(n)))
    ret = err_set(e, E_NOMEM, "out of memory for the mask");
  if (!ret && f->mask == FIRST_MASK_ALPHA)
    image_mask_of_alpha(grey->px, &im);
  else if (!ret)
    image_mask_of_light(grey->px, &im);
  image_free(&im);
  for (size_t i = 0; !ret && f->is_inverted && i < n; i++)
    grey->px[i] = (uint8_t)(255 - grey->px[i]);
  if (!ret && !memchr(grey->px, 255, n) && f->mask == FIRST_MASK_ALPHA)
    ret = err_field(e, E_ARG, file->field, "%s has no transparent pixels: transparency says what is drawn anew", file->field);
  if (ret)
    image_free(grey);
  return ret;
}

/* ---- the whole picture ---- */

static int decode_init(struct request *r, const struct first *f, const struct request_limits *lim, struct err *e)
{
  struct image im;
  int ret = read_init(&im, f, e);

  if (ret)
    return ret;
  if (!r->width)
    own_size(r, &im, lim);
  ret = fit(&im, f->fit, r->width, r->height, e);
  if (!ret) {
    r->init = im.px;
    im.px = NULL;
  }
  image_free(&im);
  return ret;
}

static int decode_whole(struct request *r, const struct first *f, const struct request_limits *lim, struct err *e)
{
  struct image grey;
  int ret = decode_init(r, f, lim, e);

  if (ret || !f->file[FIRST_MASK].p)
    return ret;
  ret = read_mask(&grey, f, f->fit, r->width, r->height, e);
  r->mask = grey.px;
  if (!ret && f->is_filled) /* before the blur, whose edge would let through what is to vanish */
    ret = first_mask_fill(r->init, r->mask, r->width, r->height, e);
  return ret ? ret : first_mask_blur(r->mask, r->width, r->height, f->blur_x, f->blur_y, e);
}

/* ---- only what is masked ---- */

/* The smallest rectangle that holds all of a mask that is not 0. Returns 0 when that is nothing. */
static int find_part(struct request_whole *p, const struct image *grey)
{
  int right = -1, bottom = -1;

  p->x = grey->w;
  p->y = grey->h;
  for (int y = 0; y < grey->h; y++)
    for (int x = 0; x < grey->w; x++)
      if (grey->px[(size_t)y * (size_t)grey->w + (size_t)x]) {
        p->x = x < p->x ? x : p->x;
        p->y = y < p->y ? y : p->y;
        right = x > right ? x : right;
        bottom = y;
      }
  p->w = right - p->x + 1;
  p->h = bottom - p->y + 1;
  return right >= 0;
}

/* A side of n pixels from at on grows by n pixels both ways, as far as there is picture. */
static void pad(int *at, int *n, int by, int most)
{
  int end = *n + by < most - *at ? *at + *n + by : most;

  *at = *at > by ? *at - by : 0;
  *n = end - *at;
}

/* The same to want pixels about its middle; where it would leave the picture it moves, and is all of it when that has less. */
static void widen(int *at, int *n, int64_t want, int most)
{
  int64_t from = *at - (want - *n) / 2;

  from = from + want > most ? most - want : from;
  *at = from < 0 ? 0 : (int)from;
  *n = want > most ? most : (int)want;
}

/* Where in the picture the mask is, with the padding, in the shape w x h as far as there is picture. */
static int choose_part(struct request_whole *p, const struct image *grey, int padding, int w, int h)
{
  if (!find_part(p, grey))
    return 0;
  pad(&p->x, &p->w, padding, grey->w);
  pad(&p->y, &p->h, padding, grey->h);
  if ((int64_t)p->w * h > (int64_t)w * p->h)
    widen(&p->y, &p->h, (int64_t)p->w * h / w, grey->h);
  else
    widen(&p->x, &p->w, (int64_t)p->h * w / h, grey->w);
  return 1;
}

/* The part of im, as it is. */
static int cut(uint8_t **out, const struct image *im, const struct request_whole *p, struct err *e)
{
  *out = malloc((size_t)p->w * (size_t)p->h * (size_t)im->channels);
  if (!*out)
    return err_set(e, E_NOMEM, "out of memory for a part of %dx%d pixels", p->w, p->h);
  copy_part(*out, im, p->x, p->y, p->w, p->h);
  return 0;
}

/* The part of im, as it is drawn. */
static int cut_to_size(uint8_t **out, const struct image *im, const struct request *r, struct err *e)
{
  struct image part = {r->whole.w, r->whole.h, im->channels, NULL};

  if (cut(&part.px, im, &r->whole, e) || fit(&part, FIRST_FILL, r->width, r->height, e)) {
    image_free(&part);
    return e->code;
  }
  *out = part.px;
  return 0;
}

/* What the mask covered before it was blurred, as it is drawn, loses its colours to those around it. */
static int fill_part(struct request *r, const struct image *plain, struct err *e)
{
  uint8_t *mask = NULL;
  int ret = cut_to_size(&mask, plain, r, e);

  ret = ret ? ret : first_mask_fill(r->init, mask, r->width, r->height, e);
  free(mask);
  return ret;
}

static int decode_part(struct request *r, const struct first *f, struct err *e)
{
  const char *field = f->file[FIRST_MASK].field;
  struct image im = {0}, grey = {0}, plain = {0};
  size_t n;
  int ret = read_init(&im, f, e);

  if (!ret && (int64_t)im.w * im.h > FIRST_WHOLE_PIXELS)
    ret = err_field(e, E_ARG, f->file[FIRST_INIT].field, "%s has %dx%d pixels; %d are allowed where only what is masked is drawn: send inpaint_full_res false",
                    f->file[FIRST_INIT].field, im.w, im.h, FIRST_WHOLE_PIXELS);
  ret = ret ? ret : read_mask(&grey, f, FIRST_STRETCH, im.w, im.h, e);
  if (ret)
    goto out;
  n = (size_t)im.w * (size_t)im.h;
  plain = (struct image){grey.w, grey.h, 1, f->is_filled ? malloc(n) : NULL};
  if (f->is_filled && !plain.px)
    ret = err_set(e, E_NOMEM, "out of memory for the mask");
  else if (f->is_filled)
    memcpy(plain.px, grey.px, n);
  ret = ret ? ret : first_mask_blur(grey.px, grey.w, grey.h, f->blur_x, f->blur_y, e);
  if (!ret && !choose_part(&r->whole, &grey, f->padding, r->width, r->height))
    ret = err_field(e, E_ARG, field, "%s covers nothing: what is white in it is drawn anew", field);
  if (ret || (ret = cut(&r->whole.mask, &grey, &r->whole, e)) || (ret = cut_to_size(&r->init, &im, r, e)) || (ret = cut_to_size(&r->mask, &grey, r, e)) ||
      (f->is_filled && (ret = fill_part(r, &plain, e))))
    goto out;
  r->whole.width = im.w;
  r->whole.height = im.h;
  r->whole.rgb = im.px;
  im.px = NULL;
out:
  image_free(&im);
  image_free(&grey);
  image_free(&plain);
  return ret;
}

int first_decode(struct request *r, const struct first *f, const struct request_limits *lim, struct err *e)
{
  struct err none = {0};
  int ret;

  e = e ? e : &none;
  if (!f->file[FIRST_INIT].p)
    return 0;
  ret = f->is_only_masked && f->file[FIRST_MASK].p ? decode_part(r, f, e) : decode_whole(r, f, lim, e);
  if (ret)
    request_close(r);
  return ret;
}

int first_put_back(uint8_t **out, const struct request *r, const uint8_t *rgb, struct err *e)
{
  const struct request_whole *p = &r->whole;
  const struct image drawn = {r->width, r->height, 3, (uint8_t *)(uintptr_t)rgb};
  struct part in = inside(r->width, r->height, p->w, p->h); /* without what was filled in around it */
  struct image part = {in.w, in.h, 3, malloc((size_t)in.w * (size_t)in.h * 3)};
  size_t all = (size_t)p->width * (size_t)p->height * 3;
  int ret = 0;

  *out = malloc(all);
  if (!*out || !part.px)
    ret = err_set(e, E_NOMEM, "out of memory for a picture of %dx%d", p->width, p->height);
  else
    copy_part(part.px, &drawn, in.x, in.y, in.w, in.h);
  ret = ret ? ret : resize(&part, p->w, p->h, e);
  if (ret) {
    free(*out);
    *out = NULL;
    goto out;
  }
  memcpy(*out, p->rgb, all);
  for (int y = 0; y < p->h; y++) {
    const uint8_t *from = part.px + (size_t)y * (size_t)p->w * 3, *mask = p->mask + (size_t)y * (size_t)p->w;
    uint8_t *to = *out + ((size_t)(p->y + y) * (size_t)p->width + (size_t)p->x) * 3;
    for (size_t i = 0; i < (size_t)p->w * 3; i++)
      to[i] = (uint8_t)((from[i] * mask[i / 3] + to[i] * (255 - mask[i / 3]) + 127) / 255);
  }
out:
  image_free(&part);
  return ret;
}
