/*
 * openai.h - the OpenAI Images wire format: JSON bodies to struct request, results and errors to JSON.
 *
 * The fields of POST /v1/images/generations (null counts as absent, except for prompt):
 *   prompt           required; valid UTF-8, at most REQUEST_PROMPT_MAX bytes; may be empty
 *   model            the served model's name; anything else is 404
 *   n                1 .. max_n; picture i is drawn with seed + i
 *   size             "WxH" or "auto"; multiples of size_multiple, at most max_size. width and height (both) are the same thing
 *   response_format  "b64_json" or "url" (a stream carries b64_json alone)
 *   output_format    "png", "jpeg", "webp"
 *   output_compression 0 .. 100: the quality of JPEG and WebP; without effect on PNG
 *   stream           boolean: server-sent events (openai_encode_partial and its like)
 *   partial_images   0 .. REQUEST_PREVIEWS_MAX, with a stream: pictures on their way
 *   seed             0 .. 2^63-1; -1 or absent: the server draws one and reports it
 *   steps            1 .. max_steps
 *   guidance_scale   0 .. max_guidance; 1 and below: no guidance, the negative prompt is unused
 *   negative_prompt  as prompt
 *   sampler          checked by the caller, who knows the samplers
 *   karras           boolean
 *   clip_skip        1 .. REQUEST_CLIP_SKIP_MAX
 *   loras            style adapters, at most REQUEST_LORAS_MAX of {"name": ..., "scale": ...}; the operator's policy says which and how far
 * Checked for their values and otherwise without effect, because a client cannot do without them: quality, style, background
 * (not "transparent"), moderation, user, metadata. What the server does not offer (struct request_limits) is refused.
 * POST /v1/images/edits is a form with the same fields, the files image and mask, and beside them
 *   strength         0 .. 1: which share of the steps is done on the image; 0.75, or 1 with a mask
 *   input_fidelity   "low" or "high"; without effect
 * POST /v1/jobs takes the same fields in JSON, image and mask as base64, no stream; partial_images says how many previews its events show,
 * metadata is kept and echoed.
 * Every other field is refused by name: a field that a server drops silently is a picture that is silently wrong. Fields that
 * would name, scale or switch off a safety adapter are refused with a message that says so.
 *
 * Called by server/http.c (decode), server/encode.c (results), both (errors). Threads: pure functions.
 */
#ifndef SAFELIGHT_PROTO_OPENAI_H
#define SAFELIGHT_PROTO_OPENAI_H

#include <stddef.h>
#include <stdint.h>

#include "base/buf.h"
#include "base/err.h"
#include "proto/first.h"
#include "proto/request.h"

struct multipart;

enum { OPENAI_METADATA_MAX = 16384 }; /* bytes of what a job carries for its client */

/* Decodes a body of len bytes (need not be NUL terminated). E_ARG (or E_NOTFOUND for the model) with e->field set wherever a
 * field is at fault. r is undefined after failure. */
MUST_CHECK int openai_decode(struct request *r, const char *body, size_t len, const struct request_limits *lim, struct err *e);

/* POST /v1/images/edits: the form's parts; first borrows from them. After success the caller closes first, and first_decode makes pixels of it. */
MUST_CHECK int openai_decode_edit(struct request *r, struct first *first, const struct multipart *form, const struct request_limits *lim, struct err *e);

/* POST /v1/jobs. As openai_decode, with a first picture of its own memory, or none. After success the caller closes first. */
MUST_CHECK int openai_decode_job(struct request *r, struct first *first, const char *body, size_t len, const struct request_limits *lim, struct err *e);

struct openai_picture {
  const char *file;             /* of the result's format */
  size_t len;
  uint64_t seed;
  const char *url;              /* NULL: the file goes into the answer as base64 */
  int cut_at;                   /* as of a recipe */
};

/* Milliseconds that a request spent in each stage. */
struct stage_times {
  double queue, text, unet, vae, png, total;
};

struct openai_result {
  const struct openai_picture *picture;
  int n;
  int64_t created;              /* seconds since 1970 */
  int text_tokens, image_tokens; /* image tokens: latent positions of all pictures */
  const char *request_id;
  const struct recipe *recipe;  /* of the first picture */
  const struct stage_times *times;
  enum image_format format;
};

/* Appends the answer; out's maximum bounds it. */
MUST_CHECK int openai_encode_result(struct buf *out, const struct openai_result *r, struct err *e);

/* Appends {"error":{message,type,param,code}} for what e says. */
MUST_CHECK int openai_encode_error(struct buf *out, const struct err *what, struct err *e);

/* "png", "jpeg", "webp". */
const char *openai_format_name(enum image_format format);

/* One event of a streamed answer: a preview, or the picture itself. */
struct openai_event {
  const char *file;             /* of this format, len bytes */
  size_t len;
  enum image_format format;
  int width, height;
  int picture;                  /* which of the request's, from 0 */
  int is_edit;                  /* image_edit.* instead of image_generation.* */
  int64_t created;              /* seconds since 1970 */
};

/* Append a whole server-sent event: image_generation.partial_image, the partial-th (from 0) of its picture; image_generation.completed, with the usage
 * and recipe of r (its picture and n are not looked at: tokens and recipe are this picture's); error, which the OpenAI SDK raises. */
MUST_CHECK int openai_encode_partial(struct buf *out, const struct openai_event *v, int partial, struct err *e);
MUST_CHECK int openai_encode_completed(struct buf *out, const struct openai_event *v, const struct openai_result *r, struct err *e);
MUST_CHECK int openai_encode_error_event(struct buf *out, const struct err *what, struct err *e);

/* The name of an error as answers have it ("queue_full"), for a code and the field at fault ("" for none). */
const char *openai_error_name(int code, const char *field);
/* The E_* of such a name; E_INTERNAL when it is none. */
int openai_error_code(const char *name);

/* The HTTP status of an E_* code; 500 for one that has none. */
int openai_status(int code);

struct openai_model {
  const struct request_limits *lim;
  int64_t created;
  const char *const *samplers;  /* names, NULL terminated */
  const char *digest, *version;
};

/* Appends the answer of GET /v1/models; m NULL: an empty list (nothing is loaded yet). The extra object "safelight" tells a
 * client (the web page, for one) the defaults and bounds. */
MUST_CHECK int openai_encode_models(struct buf *out, const struct openai_model *m, struct err *e);

#endif
