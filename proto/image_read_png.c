/*
 * image_read_png.c - PNG files on libspng. See image_read.h.
 *
 * libspng inflates row by row into the pixels and nothing else, so a bomb costs the time of the picture it says it is. Its ancillary chunks are inflated by
 * libspng too and are therefore bounded here. Called by image_read.c. Threads: pure functions.
 */
#include <spng.h>
#include <stdlib.h>

#include "proto/image_codec.h"

enum { CHUNK_MAX = 8 << 20, CHUNKS_MAX = 16 << 20 }; /* bytes of one ancillary chunk and of all: texts, profiles */

static int fail(int code, struct err *e)
{
  if (code == SPNG_EMEM)
    return err_set(e, E_NOMEM, "out of memory for a PNG file");
  if (code == SPNG_IO_EOF || code == SPNG_EOF || code == SPNG_IO_ERROR || code == SPNG_EIDAT_TOO_SHORT)
    return err_set(e, E_ARG, "the PNG file is cut off");
  return err_set(e, E_ARG, "the PNG file is damaged: %s", spng_strerror(code));
}

static int has_alpha(spng_ctx *ctx, const struct spng_ihdr *h)
{
  struct spng_trns trns;

  return h->color_type == SPNG_COLOR_TYPE_TRUECOLOR_ALPHA || h->color_type == SPNG_COLOR_TYPE_GRAYSCALE_ALPHA || !spng_get_trns(ctx, &trns);
}

int image_read_png(struct image *im, const uint8_t *file, size_t len, const struct image_limits *lim, int *orientation, struct err *e)
{
  spng_ctx *ctx = spng_ctx_new(0);
  struct spng_ihdr h;
  struct spng_exif exif;
  int code, alpha, r;

  if (!ctx)
    return err_set(e, E_NOMEM, "out of memory for a PNG file");
  if ((code = spng_set_png_buffer(ctx, file, len)) || (code = spng_set_chunk_limits(ctx, CHUNK_MAX, CHUNKS_MAX)) || (code = spng_get_ihdr(ctx, &h))) {
    r = fail(code, e);
    goto out;
  }
  if (h.width > INT32_MAX || h.height > INT32_MAX) {
    r = err_set(e, E_ARG, "the PNG file is damaged: its size");
    goto out;
  }
  alpha = has_alpha(ctx, &h);
  if ((r = image_alloc(im, h.width, h.height, alpha ? 4 : 3, lim, e)))
    goto out;
  if ((code = spng_decode_image(ctx, im->px, (size_t)im->w * (size_t)im->h * (size_t)im->channels, alpha ? SPNG_FMT_RGBA8 : SPNG_FMT_RGB8,
                                alpha ? SPNG_DECODE_TRNS : 0)) ||
      (code = spng_decode_chunks(ctx))) { /* to the end of the file: EXIF may stand behind the pixels */
    r = fail(code, e);
    goto out;
  }
  if (!spng_get_exif(ctx, &exif))
    *orientation = exif_orientation((const uint8_t *)exif.data, exif.length);
out:
  spng_ctx_free(ctx);
  return r;
}
