/*
 * openai_fields.h - the fields that the OpenAI routes and native jobs share, for the decoders of their bodies.
 *
 * Called by proto/openai.c and proto/openai_edit.c. Threads: pure functions.
 */
#ifndef SAFELIGHT_PROTO_OPENAI_FIELDS_H
#define SAFELIGHT_PROTO_OPENAI_FIELDS_H

#include "proto/field.h"
#include "proto/first.h"

enum openai_surface { OPENAI_GENERATE, OPENAI_EDIT, OPENAI_JOB };

/* What the fields say that struct request has no place for until all are read. */
struct openai_more {
  enum openai_surface surface;
  struct first *first;      /* NULL: the surface takes no first picture */
  int is_stream, has_strength;
  int is_url;               /* -1: not said */
};

/* Fills r from an object; root stays the caller's. A request with a first picture whose size nobody said has width and height 0: first_decode
 * sets them. E_ARG, E_NOTFOUND, E_NOMEM. */
MUST_CHECK int openai_fields_decode(struct request *r, json_t *root, struct openai_more *m, const struct request_limits *lim, struct err *e);

#endif
