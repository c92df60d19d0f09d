/*
 * base64.h - RFC 4648 base64 with padding, as JSON carries files.
 *
 * Called by the encoders of every surface (pictures out) and by the decoders that take pictures (in). Threads: pure functions.
 */
#ifndef SAFELIGHT_PROTO_BASE64_H
#define SAFELIGHT_PROTO_BASE64_H

#include <stddef.h>
#include <stdint.h>

#include "base/buf.h"
#include "base/err.h"

/* Appends len bytes as text. E_TOOBIG and E_NOMEM as buf_add; nothing is appended then. */
MUST_CHECK int base64_encode(struct buf *out, const void *data, size_t len, struct err *e);

/* How many bytes a text of len characters holds at most. */
size_t base64_decode_bound(size_t len);

/* Reads len characters into out, which has room for base64_decode_bound(len), and sets *n. Blanks and line ends are skipped, as every
 * client's library breaks lines where it likes; anything else that is not the standard alphabet, padding that is missing, and bits
 * behind the last byte that are not zero are E_ARG, with a sentence that says which and where. */
MUST_CHECK int base64_decode(uint8_t *out, size_t *n, const char *text, size_t len, struct err *e);

/* The part of a data: URL (data:image/png;base64,...) that is base64, and its length in *len; a text that is no such URL as it is. */
const char *base64_of_url(const char *text, size_t *len);

#endif
