/*
 * pack.h - a zlib stream (RFC 1950, 1951) of filtered pixels, fast: runs of one byte and Huffman codes, no search for anything else.
 *
 * What a PNG filter leaves of a picture repeats nothing but runs; a matcher's search finds little in it and costs most of the time. Every block of 64 kB has
 * codes of its own, or is stored when they do not help.
 *
 * Called by image_png.c. Threads: pure functions. The same input gives the same bytes.
 */
#ifndef SAFELIGHT_PROTO_PACK_H
#define SAFELIGHT_PROTO_PACK_H

#include <stddef.h>
#include <stdint.h>

/* How many bytes pack_zlib writes at most for n bytes, what it writes beyond the end of the stream on its way included. */
size_t pack_bound(size_t n);

/* Writes the stream of n bytes to out, which has room for pack_bound(n). Returns the stream's length. */
size_t pack_zlib(uint8_t *out, const uint8_t *in, size_t n);

#endif
