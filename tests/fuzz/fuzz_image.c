/*
 * fuzz_image.c - pictures from outside: whatever bytes come, image_read keeps to its limits or refuses with a sentence, and what it reads can be resized,
 * flattened and made a mask of.
 *
 * links: proto/image_read*.c proto/image_exif.c proto/image_resize.c base/buf.c base/err.c
 */
#include <stdlib.h>
#include <string.h>

#include "proto/image_read.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void must(int ok)
{
  if (!ok)
    abort();
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
    image_free(&small);
    image_free(&im);
  }
  free(copy);
  return 0;
}
