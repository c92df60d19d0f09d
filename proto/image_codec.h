/*
 * image_codec.h - what the files of image_read and image share among themselves: one decoder or encoder per format, and EXIF.
 *
 * Called by image_read*.c and image*.c alone. Threads: pure functions.
 */
#ifndef SAFELIGHT_PROTO_IMAGE_CODEC_H
#define SAFELIGHT_PROTO_IMAGE_CODEC_H

#include "base/buf.h"
#include "proto/image.h"
#include "proto/image_read.h"

/* ---- in: each decodes a file whose first bytes are its format's. *orientation: 1..8, as EXIF counts ---- */

MUST_CHECK int image_read_png(struct image *im, const uint8_t *file, size_t len, const struct image_limits *lim, int *orientation, struct err *e);
MUST_CHECK int image_read_jpeg(struct image *im, const uint8_t *file, size_t len, const struct image_limits *lim, int *orientation, struct err *e);
MUST_CHECK int image_read_webp(struct image *im, const uint8_t *file, size_t len, const struct image_limits *lim, int *orientation, struct err *e);

/* Sets the sides and channels of im and allocates its pixels, when they are within the limits. */
MUST_CHECK int image_alloc(struct image *im, int64_t w, int64_t h, int channels, const struct image_limits *lim, struct err *e);

/* ---- out ---- */

struct image_encoder {
  struct libdeflate_compressor *deflate; /* NULL: pack.h */
  uint8_t *scratch;     /* the filtered picture, candidate rows, and the packed picture */
  size_t scratch_bytes;
};

/* ---- EXIF ---- */

enum { EXIF_JPEG_MAX = 0xffff - 2 - 6 }; /* bytes of EXIF data that a JPEG marker has room for behind its length and "Exif", twice NUL */

/* The orientation in EXIF data (a TIFF header and its first directory); 1 when it has none or makes no sense. */
int exif_orientation(const uint8_t *tiff, size_t len);

/* Appends EXIF data (a TIFF header and directories) whose UserComment is a text of UTF-8, as A1111 writes it: UTF-16, big endian. Where that is longer
 * than max bytes and the text is ASCII, it stays ASCII. E_TOOBIG when it is too long even so; out is unchanged then. */
MUST_CHECK int exif_write_comment(struct buf *out, const char *text, size_t max, struct err *e);

#endif
