/*
 * first_mask.h - what A1111 does with a mask before it draws: soften its edge, and fill what it covers with the colours around it.
 *
 * Called by proto/first_pixels.c. Threads: pure functions.
 */
#ifndef SAFELIGHT_PROTO_FIRST_MASK_H
#define SAFELIGHT_PROTO_FIRST_MASK_H

#include <stdint.h>

#include "base/err.h"

/* Gaussian blur of a (h, w) mask in place: across and down pixels of standard deviation, as far as 2.5 of them, the outermost pixels going on beyond the edge.
 * 0: none. E_ARG above 64, E_NOMEM. */
MUST_CHECK int first_mask_blur(uint8_t *mask, int w, int h, float across, float down, struct err *e);

/* Fills what the (h, w) mask covers of rgb (h, w, 3), in proportion to how far it does, from the rest. A picture that is covered wholly stays as it is.
 * E_NOMEM. Method: push and pull through a pyramid of halves (Gortler et al. 1996, The Lumigraph, 3.4). */
MUST_CHECK int first_mask_fill(uint8_t *rgb, const uint8_t *mask, int w, int h, struct err *e);

#endif
