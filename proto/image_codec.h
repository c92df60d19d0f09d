/*
 * image_codec.h - what the files of image_read and image share among themselves: one decoder or encoder per format, and EXIF.
 *
 * Called by image_read*.c and image*.c alone. Threads: pure functions.
 */
#ifndef SAFELIGHT_PROTO_IMAGE_CODEC_H
#define SAFELIGHT_PROTO_IMAGE_CODEC_H

#include "base/buf.h"
#include "proto/image_read.h"

/* ---- in: each decodes a file whose first bytes are its format's. *orientation: 1..8, as EXIF counts ---- */

MUST_CHECK int image_read_png(struct image *im, const uint8_t *file, size_t len, const struct image_limits *lim, int *orientation, struct err *e);
MUST_CHECK int image_read_jpeg(struct image *im, const uint8_t *file, size_t len, const struct image_limits *lim, int *orientation, struct err *e);
MUST_CHECK int image_read_webp(struct image *im, const uint8_t *file, size_t len, const struct image_limits *lim, int *orientation, struct err *e);

/* Sets the sides and channels of im and allocates its pixels, when they are within the limits. */
MUST_CHECK int image_alloc(struct image *im, int64_t w, int64_t h, int channels, const struct image_limits *lim, struct err *e);

/* ---- EXIF ---- */

/* The orientation in EXIF data (a TIFF header and its first directory); 1 when it has none or makes no sense. */
int exif_orientation(const uint8_t *tiff, size_t len);

#endif
