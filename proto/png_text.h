/*
 * png_text.h - the texts in a PNG file: what A1111 and its kin write into pictures, and what this server writes.
 *
 * Called by proto/sdapi_info.c. Threads: pure functions.
 */
#ifndef SAFELIGHT_PROTO_PNG_TEXT_H
#define SAFELIGHT_PROTO_PNG_TEXT_H

#include <stddef.h>
#include <stdint.h>

#include "base/buf.h"
#include "base/err.h"

enum { PNG_TEXT_MAX = 65536 }; /* bytes of a text */

/* Appends the text under a keyword as UTF-8: of the first tEXt (Latin-1) or uncompressed iTXt chunk that has it. Nothing is appended when there is none;
 * compressed ones are passed over. E_ARG when the bytes are no PNG file, are cut off, or a chunk's CRC is wrong; E_TOOBIG past out's maximum. */
MUST_CHECK int png_text_find(struct buf *out, const uint8_t *file, size_t len, const char *keyword, struct err *e);

#endif
