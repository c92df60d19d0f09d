/*
 * image_read.h - pictures from outside: PNG, JPEG and WebP files to pixels, pixels to the size and the mask that a request needs.
 *
 * A file is nobody's friend. Its bytes, sides and pixels are held to the caller's limits before anything is allocated for them; memory is at most
 * 12 bytes a pixel beside the decoder's own; a file that is damaged or cut off anywhere in its pixels is refused, never half shown. The errors of a file are
 * E_ARG and say what is wrong with it.
 *
 * Called by the decoders in proto/ that take pictures. Threads: pure functions; a struct image belongs to one thread at a time.
 */
#ifndef SAFELIGHT_PROTO_IMAGE_READ_H
#define SAFELIGHT_PROTO_IMAGE_READ_H

#include <stddef.h>
#include <stdint.h>

#include "base/err.h"

struct image_limits {
  size_t max_bytes;   /* of the file */
  int max_side;       /* pixels */
  int64_t max_pixels;
};

struct image {
  int w, h;
  int channels;       /* 3: RGB, 4: RGBA, where alpha is not multiplied into the colours */
  uint8_t *px;        /* malloc'ed: h rows of w * channels bytes; whoever needs it longer takes it and sets it to NULL */
};

/* Decodes a file into *im, upright as its EXIF says; 16 bits become 8, grey and palettes become colours, colour profiles are ignored. An animated PNG is its
 * first picture, an animated WebP is refused. im->px is NULL after a failure: E_ARG, or E_NOMEM. */
MUST_CHECK int image_read(struct image *im, const void *file, size_t len, const struct image_limits *lim, struct err *e);

void image_free(struct image *im); /* takes zeroed and freed ones */

/* Stretches im to w x h into *out: Lanczos with three lobes, as wide as the larger of both pixels, along rows and then columns, with the bits of Pillow's
 * LANCZOS. So do A1111 (modules/images.py, resize_image) and diffusers (VaeImageProcessor, resample="lanczos") with first pictures and with masks.
 * Beside a sharp edge it leaves a ripple of a few of 255, three pixels wide. Every channel by itself: flatten before, where what is transparent must not
 * shine through. out->px is NULL after a failure (E_NOMEM). */
MUST_CHECK int image_resize(struct image *out, const struct image *im, int w, int h, struct err *e);

/* RGBA to RGB in place: over white, as A1111 does, or the colours as they stand below what is transparent. RGB stays as it is. */
void image_flatten_white(struct image *im);
void image_drop_alpha(struct image *im);

/* The masks of a request, im->w * im->h bytes, 255: draw anew, 0: keep.
 * OpenAI: what is transparent is drawn anew. A picture without alpha asks for nothing. */
void image_mask_of_alpha(uint8_t *mask, const struct image *im);
/* A1111: what is light is drawn anew (ITU-R 601 luma); in a picture that has transparent pixels, what is opaque. */
void image_mask_of_light(uint8_t *mask, const struct image *im);

#endif
