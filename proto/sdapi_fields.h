/*
 * sdapi_fields.h - what the parts of the A1111 decoder share.
 *
 * Called by proto/sdapi.c and proto/sdapi_fields.c. Threads: pure functions.
 */
#ifndef SAFELIGHT_PROTO_SDAPI_FIELDS_H
#define SAFELIGHT_PROTO_SDAPI_FIELDS_H

#include "proto/field.h"
#include "proto/sdapi.h"

/* What the fields say that has no place elsewhere until all are read. */
struct sdapi_more {
  struct sdapi_extra *x;
  struct first *first;
  char sampler_index[REQUEST_SAMPLER_MAX];
  int has_sampler, drops_tags, has_eta, has_blur;
  int fill;                 /* inpainting_fill: 0 fill, 1 original, 2 latent noise, 3 latent nothing */
  double eta, blur;
};

/* Whether A1111, Forge or SD.Next have a field of that name that has no effect here. */
int sdapi_is_idle_field(const char *name);

/* 0 when the value of such a field changes nothing, E_ARG when it would, 1 when there is no such field. */
MUST_CHECK int sdapi_check_idle_field(const struct field_in *f, struct err *e);

/* Whether a name is that of the served model as its lists write it: the name, with .safetensors, with its hash in brackets. */
int sdapi_is_model(const char *name, const struct request_limits *lim);

MUST_CHECK int sdapi_decode_override(const struct field_in *f, struct request *r, struct err *e);
MUST_CHECK int sdapi_decode_scripts(const struct field_in *f, struct request *r, struct err *e);

#endif
