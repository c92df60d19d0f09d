/*
 * first.h - the first picture of image-to-image and its mask, on their way from a body's bytes to struct request.
 *
 * Decoding a body is quick and done where it arrives; decoding a picture takes milliseconds and is done on another thread. So the decoders of
 * surfaces leave the files here, and first_decode makes pixels of them.
 *
 * Called by the decoders in proto/ (fill), server/ (first_decode, first_close). Threads: plain data, owned by whoever holds it.
 */
#ifndef SAFELIGHT_PROTO_FIRST_H
#define SAFELIGHT_PROTO_FIRST_H

#include "proto/field.h"

enum { FIRST_INIT, FIRST_MASK, FIRST_FILES };

struct first_file {
  const uint8_t *p;         /* an encoded picture; NULL: there is none */
  size_t len;
  uint8_t *owned;           /* p when it is malloc'ed and this file's; NULL when p borrows from the body */
  char field[24];           /* what the client calls it, for refusals */
};

/* Which pixels of a mask are drawn anew. */
enum first_mask {
  FIRST_MASK_ALPHA,         /* transparent ones, as OpenAI has it */
  FIRST_MASK_LIGHT          /* white ones, as A1111 has it */
};

/* How a picture of another shape becomes one of the request's. */
enum first_fit {
  FIRST_STRETCH,
  FIRST_CROP,               /* the middle of it, as large as the shape allows */
  FIRST_FILL                /* all of it in the middle, its outermost pixels going on to the edge */
};

struct first {
  struct first_file file[FIRST_FILES];
  enum first_mask mask;
  enum first_fit fit;
  int is_inverted;          /* the mask says what to keep */
  float blur_x, blur_y;     /* standard deviation in pixels that the mask's edge is softened by, across and down; 0: none */
  int is_filled;            /* what is drawn anew starts from the colours around it, not from what is there */
  int is_only_masked;       /* with a mask: what it covers is cut out, drawn alone at the request's size, and put back into the picture */
  int padding;              /* pixels of the picture around what the mask covers that are cut out with it */
};

void first_init(struct first *f);
void first_close(struct first *f); /* takes a zeroed one and a closed one */

enum {
  FIRST_MAX_SIDE = 8192,            /* of the file's picture, in pixels */
  FIRST_MAX_PIXELS = 1 << 24,
  FIRST_WHOLE_PIXELS = 1 << 22      /* of a picture that is kept until what was drawn goes back into it */
};

/* Makes the request's init and mask of the files: decoded, upright, over white, of the request's size; a request without one (width and height 0) gets the
 * picture's own, its longer side within default_size and max_size, both sides multiples of what the model can. Then the mask is turned over, what it covers is
 * filled from around it, and its edge blurred, as f says. Only masked, as A1111 does it: the mask is blurred as large as the picture; the smallest rectangle
 * around it grows by the padding, then to the request's shape as far as there is picture, and becomes init and mask; r->whole keeps the picture. Does nothing
 * without a first picture. E_ARG with the client's name of the file, E_NOMEM; r holds no picture then. f stays the caller's. Takes milliseconds to a second:
 * any thread may do it. */
MUST_CHECK int first_decode(struct request *r, const struct first *f, const struct request_limits *lim, struct err *e);

/* What was drawn (width x height of r) goes back into r->whole, which is there: *out gets whole.width * whole.height * 3 bytes, malloc'ed and the caller's.
 * E_NOMEM, and *out is NULL. */
MUST_CHECK int first_put_back(uint8_t **out, const struct request *r, const uint8_t *rgb, struct err *e);

/* Decodes a field's base64 into file which (FIRST_INIT, FIRST_MASK) of f. E_ARG when it is no base64 or given before, E_NOMEM. */
MUST_CHECK int first_take(struct first *f, int which, const struct field_in *in, struct err *e);

#endif
