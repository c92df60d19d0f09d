/*
 * image.h - pixels to PNG, JPEG and WebP files, with the `parameters` text that users of A1111 expect to find in them and an XMP packet that says where they
 * come from.
 *
 * Called by server/encode.c and server/generate.c. Threads: an encoder belongs to one thread at a time; everything without one is a pure function.
 * The same input gives the same bytes.
 */
#ifndef SAFELIGHT_PROTO_IMAGE_H
#define SAFELIGHT_PROTO_IMAGE_H

#include <stdint.h>

#include "base/buf.h"
#include "base/err.h"
#include "proto/request.h"

enum { IMAGE_MAX_SIDE = 16384, IMAGE_QUALITY = 90 };

struct image_encoder; /* scratch memory, kept between pictures */

/* On success image_close after; on failure *enc is NULL. */
MUST_CHECK int image_open(struct image_encoder **enc, struct err *e);
void image_close(struct image_encoder *enc); /* takes NULL */

/* From now on PNG files are small rather than fast: some percent less, never more, for many times the time. E_NOMEM; the encoder goes on as before then. */
MUST_CHECK int image_set_small(struct image_encoder *enc, struct err *e);

/* How much of the recipe a file tells. Where it comes from it always tells. */
enum image_detail {
  IMAGE_FULL,
  IMAGE_NO_PROMPTS, /* everything but the prompts */
  IMAGE_PROVENANCE  /* the XMP packet alone: no seed, no settings */
};

#define IMAGE_UNSAFE "unsafe-evaluation" /* the mark of pictures that were drawn without any safety, for evaluation */
#define IMAGE_XMP_NAMESPACE "urn:safelight:xmp:1#"

/* "image/png", and the format of a file's name by its ending (.png, .jpg, .jpeg, .webp; any case): 0, or E_ARG. */
const char *image_mime(enum image_format format);
MUST_CHECK int image_format_of(const char *name, enum image_format *format, struct err *e);

/* Appends the file of a recipe's picture, in the recipe's format and quality: rgb holds r->height rows of r->width * 3 bytes (of file_height and file_width,
 * where they are set). E_ARG when the format cannot hold a picture of that size. A JPEG file has room for 64 kB of text; where the prompts do not fit in,
 * it has the rest without them. */
MUST_CHECK int image_encode_picture(struct image_encoder *enc, struct buf *out, const uint8_t *rgb, const struct recipe *r,
                                    enum image_detail detail, struct err *e);

struct image_text {
  const char *parameters; /* UTF-8; NULL: none. PNG: a tEXt chunk when it is Latin-1, an iTXt chunk otherwise, as PIL does; JPEG, WebP: EXIF's UserComment */
  const char *xmp;        /* a packet; NULL: none */
};

/* Append a file of 8-bit RGB: rgb holds h rows of w * 3 bytes. text NULL: none. quality 1..100, 0: IMAGE_QUALITY. */
MUST_CHECK int image_encode_png(struct image_encoder *enc, struct buf *out, const uint8_t *rgb, int w, int h,
                                const struct image_text *text, struct err *e);
/* From quality 90 on colours have the full resolution, below half of it each way. */
MUST_CHECK int image_encode_jpeg(struct buf *out, const uint8_t *rgb, int w, int h, int quality, const struct image_text *text, struct err *e);
/* Quality 100 is without loss. */
MUST_CHECK int image_encode_webp(struct buf *out, const uint8_t *rgb, int w, int h, int quality, const struct image_text *text, struct err *e);

/* Appends the recipe as A1111 writes it (modules/processing.py create_infotext): the prompt, a line with the negative prompt,
 * a line of "Key: value" pairs whose values are quoted as JSON strings where they contain a comma, colon or newline. */
MUST_CHECK int image_parameters(struct buf *out, const struct recipe *r, enum image_detail detail, struct err *e);

/* Appends an XMP packet: IPTC's DigitalSourceType says that a trained model made the picture (cv.iptc.org/newscodes/digitalsourcetype), properties of our
 * own say which generation of which model. Never a prompt. */
MUST_CHECK int image_xmp(struct buf *out, const struct recipe *r, struct err *e);

#endif
