/*
 * sdapi_json.h - two helpers for the answers of /sdapi/v1.
 *
 * Called by proto/sdapi_*.c. Threads: pure functions.
 */
#ifndef SAFELIGHT_PROTO_SDAPI_JSON_H
#define SAFELIGHT_PROTO_SDAPI_JSON_H

#include <jansson.h>

#include "base/buf.h"

/* Appends root as compact JSON without the first skip bytes, and drops it; NULL is E_NOMEM. */
MUST_CHECK int sdapi_add_json(struct buf *out, json_t *root, size_t skip, struct err *e);

/* A string; one that is not UTF-8 says so. NULL: no memory. */
json_t *sdapi_text(const char *s);

#endif
