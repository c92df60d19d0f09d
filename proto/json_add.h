/*
 * json_add.h - jansson's values as text in an answer, for every surface.
 *
 * Called by the encoders in proto/. Threads: pure functions.
 */
#ifndef SAFELIGHT_PROTO_JSON_ADD_H
#define SAFELIGHT_PROTO_JSON_ADD_H

#include <jansson.h>

#include "base/buf.h"

/* Appends root as compact JSON without the first skip bytes, and drops it; NULL is E_NOMEM. */
MUST_CHECK int json_add_value(struct buf *out, json_t *root, size_t skip, struct err *e);

/* A string; one that is not UTF-8 says so. NULL: no memory. */
json_t *json_make_text(const char *s);

#endif
