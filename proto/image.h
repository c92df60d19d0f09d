/*
 * image.h - pixels to PNG files, with the `parameters` text that users of A1111 expect to find in them and an XMP packet that says where they come from.
 *
 * Called by server/encode.c and server/generate.c. Threads: an encoder belongs to one thread at a time; image_parameters and image_xmp are pure functions.
 */
#ifndef SAFELIGHT_PROTO_IMAGE_H
#define SAFELIGHT_PROTO_IMAGE_H

#include <stdint.h>

#include "base/buf.h"
#include "base/err.h"
#include "proto/request.h"

enum { IMAGE_MAX_SIDE = 16384 };

struct image_encoder; /* a deflate compressor and its scratch memory, kept between pictures */

/* On success image_close after; on failure *enc is NULL. */
MUST_CHECK int image_open(struct image_encoder **enc, struct err *e);
void image_close(struct image_encoder *enc); /* takes NULL */

/* How much of the recipe a file tells. Where it comes from it always tells. */
enum image_detail {
  IMAGE_FULL,
  IMAGE_NO_PROMPTS, /* everything but the prompts */
  IMAGE_PROVENANCE  /* the XMP packet alone: no seed, no settings */
};

#define IMAGE_UNSAFE "unsafe-evaluation" /* the mark of pictures that were drawn without any safety, for evaluation */
#define IMAGE_XMP_NAMESPACE "urn:safelight:xmp:1#"

/* Appends the PNG file of a recipe's picture: rgb holds r->height rows of r->width * 3 bytes. */
MUST_CHECK int image_encode_picture(struct image_encoder *enc, struct buf *out, const uint8_t *rgb, const struct recipe *r,
                                    enum image_detail detail, struct err *e);

struct image_text {
  const char *parameters; /* UTF-8; a tEXt chunk when it is Latin-1 and an iTXt chunk otherwise, as PIL does; NULL: no chunk */
  const char *xmp;        /* a packet; NULL: none */
};

/* Appends a PNG file, 8-bit RGB: rgb holds h rows of w * 3 bytes. text NULL: none. The same input gives the same bytes. */
MUST_CHECK int image_encode_png(struct image_encoder *enc, struct buf *out, const uint8_t *rgb, int w, int h,
                                const struct image_text *text, struct err *e);

/* Appends the recipe as A1111 writes it (modules/processing.py create_infotext): the prompt, a line with the negative prompt,
 * a line of "Key: value" pairs whose values are quoted as JSON strings where they contain a comma, colon or newline. */
MUST_CHECK int image_parameters(struct buf *out, const struct recipe *r, enum image_detail detail, struct err *e);

/* Appends an XMP packet: IPTC's DigitalSourceType says that a trained model made the picture (cv.iptc.org/newscodes/digitalsourcetype), properties of our
 * own say which generation of which model. Never a prompt. */
MUST_CHECK int image_xmp(struct buf *out, const struct recipe *r, struct err *e);

#endif
