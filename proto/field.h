/*
 * field.h - reading JSON bodies from outside: the body as a whole, and one field at a time, with refusals that name the field and say what it must be.
 *
 * Every surface has a table of fields, one function each (struct field), that fill struct request through what is here.
 *
 * Called by the decoders in proto/. Threads: pure functions.
 */
#ifndef SAFELIGHT_PROTO_FIELD_H
#define SAFELIGHT_PROTO_FIELD_H

#include <jansson.h>
#include <stddef.h>
#include <stdint.h>

#include "base/err.h"
#include "proto/request.h"

/* A body that was read. Numbers that no integer holds became floating point, so that the field's own bounds can name them; a body with one that no
 * field refuses is refused as a whole by body_end. */
struct body {
  json_t *root;          /* an object */
  int has_overflow;
};

/* E_ARG when the body is not UTF-8 (e->field is the field that holds the bad byte, where that can be said), not JSON, or not an object; E_NOMEM. After
 * success body_end, after failure nothing. */
MUST_CHECK int body_begin(struct body *b, const char *text, size_t len, struct err *e);

/* Drops the body. r is what decoding its fields returned, and returned again unless a number was out of all bounds. */
MUST_CHECK int body_end(struct body *b, int r, struct err *e);

/* What a field's function sees. */
struct field_in {
  const char *name;      /* as the client sent it */
  const json_t *v;       /* not null */
  const struct request_limits *lim;
  void *more;            /* the surface's own record */
};

struct field {
  const char *name;
  int (*decode)(const struct field_in *f, struct request *r, struct err *e);
};

/* The row of that name in a table of n; NULL when there is none. */
const struct field *field_find(const struct field *table, size_t n, const char *name);

/* The readers: 0, or E_ARG with the field's name. Integers may be written as floating point when they are whole, as JSON has one kind of number. */
MUST_CHECK int field_int(const struct field_in *f, int64_t lo, int64_t hi, int64_t *out, struct err *e);
MUST_CHECK int field_small(const struct field_in *f, int lo, int hi, int *out, struct err *e);
MUST_CHECK int field_number(const struct field_in *f, double lo, double hi, double *out, struct err *e);
MUST_CHECK int field_flag(const struct field_in *f, int *out, struct err *e);
/* out has room for max bytes and a NUL; len may be NULL. */
MUST_CHECK int field_text(const struct field_in *f, char *out, size_t max, size_t *len, struct err *e);
/* One of the words in a "a|b|c" list; *which (may be NULL) is its index. */
MUST_CHECK int field_word(const struct field_in *f, const char *words, int *which, struct err *e);
/* A side of a picture in pixels: within the limits and a multiple of what the model can. */
MUST_CHECK int field_side(const struct field_in *f, int64_t v, struct err *e);
MUST_CHECK int field_get_side(const struct field_in *f, int *out, struct err *e); /* the field itself is one */
/* Refuses with "NAME must be WANT". Returns E_ARG. */
int field_wrong(const struct field_in *f, struct err *e, const char *want);

/* A base64 picture, with or without data: URL, in memory of its own that the caller frees. E_ARG, E_NOMEM. */
MUST_CHECK int field_file(const struct field_in *f, uint8_t **bytes, size_t *len, struct err *e);

/* Whether a name has to do with adapters or safety, in which no client has a say. */
int field_is_safety(const char *name);

/* Refuses a name that is in no table. The name is cut to e->field between characters, as it goes back to the client as JSON. hint: what the name is here,
 * or NULL. Returns E_ARG. */
int field_unknown(const char *name, const char *hint, struct err *e);

#endif
