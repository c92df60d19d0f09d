/*
 * fuzz_image.c - pictures from outside: whatever bytes come, image_read keeps to its limits or refuses with a sentence, and what it reads can be resized,
 * flattened and made a mask of; and as a picture with itself for a mask it is drawn in part and put back.
 *
 * links: proto/image_read*.c proto/image_exif.c proto/image_resize.c proto/first*.c proto/request.c proto/field.c proto/base64.c base/buf.c base/err.c
 * links: base/json_load.c
 */
#include <stdlib.h>
#include <string.h>

#include "proto/first.h"
#include "proto/image_read.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void must(int ok)
{
  if (!ok)
    abort();
}

/* The rest of the picture is what it was; the part lies in it. */
static void part(const uint8_t *file, size_t len, const struct image *im)
{
  static const struct request_limits req = {.default_size = 64, .size_multiple = 8, .max_size = 128, .default_sampler = "ddim", .model = "emoji"};
  static struct request r;
  struct first f = {.file = {{.p = file, .len = len, .field = "image"}, {.p = file, .len = len, .field = "mask"}}, .mask = FIRST_MASK_LIGHT,
                    .is_only_masked = 1, .padding = (int)(len % 40), .blur_x = (float)(len % 3), .is_filled = (int)len & 1, .is_inverted = (int)len >> 1 & 1};
  uint8_t drawn[40 * 16 * 3] = {0}, *out;
  struct err e = {0};

  request_init(&r, &req);
  r.width = 40;
  r.height = 16;
  if (first_decode(&r, &f, &req, &e)) {
    must(e.code == E_ARG && !r.init && !r.whole.rgb);
    return;
  }
  must(r.whole.width == im->w && r.whole.height == im->h && r.whole.x >= 0 && r.whole.y >= 0 && r.whole.w >= 1 && r.whole.h >= 1);
  must(r.whole.x + r.whole.w <= im->w && r.whole.y + r.whole.h <= im->h);
  must(!first_put_back(&out, &r, drawn, &e));
  for (int y = 0; y < im->h; y++)
    for (int x = 0; x < im->w; x++)
      must((x >= r.whole.x && x < r.whole.x + r.whole.w && y >= r.whole.y && y < r.whole.y + r.whole.h) ||
           !memcmp(out + ((size_t)y * (size_t)im->w + (size_t)x) * 3, r.whole.rgb + ((size_t)y * (size_t)im->w + (size_t)x) * 3, 3));
  free(out);
  request_close(&r);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
  static const struct image_limits lim = {.max_bytes = 1 << 16, .max_side = 300, .max_pixels = 1 << 15};
  struct image im, small;
  struct err e = {0};
  uint8_t *copy = malloc(size ? size : 1), *mask; /* its own block, so that reading past the end shows */

  must(copy != NULL);
  memcpy(copy, data, size);
  if (image_read(&im, copy, size, &lim, &e)) {
    must((e.code == E_ARG || e.code == E_NOMEM) && *e.msg && !im.px);
  } else {
    must(im.w >= 1 && im.w <= 300 && im.h >= 1 && im.h <= 300 && im.w * im.h <= 1 << 15 && (im.channels == 3 || im.channels == 4));
    must(!image_resize(&small, &im, 8, 16, &e));
    mask = malloc(8 * 16);
    must(mask != NULL);
    image_mask_of_alpha(mask, &small);
    image_mask_of_light(mask, &small);
    image_flatten_white(&small);
    must(small.channels == 3);
    free(mask);
    part(copy, size, &im);
    image_free(&small);
    image_free(&im);
  }
  free(copy);
  return 0;
}
