/*
 * sdapi.h - the wire format of A1111's /sdapi/v1: bodies to struct request, results, lists and errors to JSON.
 *
 * POST txt2img and img2img take A1111's fields under A1111's names. Those that have an effect here:
 *   prompt, negative_prompt, seed (-1: drawn), steps, cfg_scale, width, height, batch_size x n_iter (pictures, seeds counting up),
 *   sampler_name (else sampler_index) as models/sampler.h knows them, scheduler (automatic, uniform, normal, karras),
 *   clip_skip (SD.Next's) and override_settings: CLIP_stop_at_last_layers, sd_model_checkpoint (which must be the served one), samples_format
 *   (png, jpg, jpeg, webp), jpeg_quality; send_images; disable_extra_networks (tags are taken out and not applied);
 *   img2img: init_images (one), mask (white: draw anew), denoising_strength, mask_blur or mask_blur_x and mask_blur_y, inpainting_fill (0 fill,
 *   1 original), inpainting_mask_invert, inpaint_full_res (true, with a mask: only what is masked is drawn, at width x height, and put back into the picture,
 *   whose size the answer has) with inpaint_full_res_padding, resize_mode (0 just resize, 1 crop and resize, 2 resize and fill).
 * In prompt, <lora:NAME:WEIGHT> adds a style adapter: it is taken out of the prompt into request.lora, and the operator's policy says whether it may be
 * there. No other tag has a meaning; <hypernet:...> is refused. In the negative prompt tags are text, as in A1111.
 * Where A1111's default would need another model than the one that is served, absence means: sampler, steps, cfg_scale, width and height as the served model
 * is at its best, or the first picture's own size.
 * Fields that change nothing (save_images, do_not_save_grid, comments ...) are accepted; fields that would change the picture and are not supported
 * (enable_hr, tiling, restore_faces, scripts ...) are accepted at the values that switch them off and refused, by name, at any other. So are unknown
 * fields. Fields that would have to do with safety are refused whatever they say.
 *
 * Called by server/. Threads: pure functions.
 */
#ifndef SAFELIGHT_PROTO_SDAPI_H
#define SAFELIGHT_PROTO_SDAPI_H

#include "proto/first.h"
#include "proto/openai.h"

/* What only this surface's answers tell again. */
struct sdapi_extra {
  int is_img2img;
  int batch_size, n_iter;
  int sends_images;             /* 0: the answer's images are an empty list */
  float denoising;              /* as said, with its default */
};

/* E_ARG with e->field set wherever a field is at fault, E_NOMEM. r and x are undefined after failure. After success of an img2img body the caller closes
 * first, and first_decode makes pixels of it; txt2img leaves it empty. */
MUST_CHECK int sdapi_decode(struct request *r, struct sdapi_extra *x, struct first *first, int is_img2img, const char *body, size_t len,
                            const struct request_limits *lim, struct err *e);

/* Takes A1111's tags out of a prompt, in place, and their adapters into r (n_loras grows). is_dropped: takes them out and forgets them.
 * E_ARG (field "prompt"). */
MUST_CHECK int sdapi_take_tags(struct request *r, int is_dropped, struct err *e);

/* The file of POST png-info ({"image": base64}), malloc'ed, the caller's. E_ARG, E_NOMEM. */
MUST_CHECK int sdapi_decode_png_info(uint8_t **file, size_t *n, const char *body, size_t len, struct err *e);

/* Whether the flag `name` of a query is set: query is its value, NULL when it is not there. Booleans as A1111 reads them; anything else is E_ARG with that
 * field. */
MUST_CHECK int sdapi_decode_flag(int *flag, const char *name, const char *query, struct err *e);

/* ---- answers ---- */

struct sdapi_result {
  const struct openai_picture *picture; /* file NULL: it was interrupted before there was one, and is left out of images and infotexts */
  int n;                        /* that were asked for */
  const struct request *req;
  const struct sdapi_extra *x;
  const struct recipe *recipe;  /* of the first picture */
  int64_t created;              /* seconds since 1970 */
};

/* {"images", "parameters", "info"}: info is JSON in a string, as A1111 sends it. The prompts in it hold the style adapters' tags again. */
MUST_CHECK int sdapi_encode_result(struct buf *out, const struct sdapi_result *r, struct err *e);

struct sdapi_progress {
  double progress;              /* 0 .. 1; 0: idle */
  double eta_s;                 /* seconds to go */
  int is_skipped, is_interrupted; /* its pictures at hand are about to end as they are */
  const char *job;              /* id of the job at hand; NULL: idle */
  int64_t started;              /* seconds since 1970 */
  int n, picture;               /* pictures of the job; which is at hand, from 0 */
  int step, steps;
  const char *file;             /* its preview; NULL: none */
  size_t len;
  const char *text;             /* what a person is told; NULL: nothing */
};

MUST_CHECK int sdapi_encode_progress(struct buf *out, const struct sdapi_progress *p, struct err *e);

/* A1111's progress of a job: 1 % for having begun, then the share of its steps. */
double sdapi_progress_of(int picture, int n, int step, int steps);

/* {"error", "detail", "body", "errors"} as A1111's clients print it. */
MUST_CHECK int sdapi_encode_error(struct buf *out, const struct err *what, struct err *e);

/* {"info", "items", "parameters"} of a PNG file; a file without parameters gives empty ones. E_ARG (field "image") when it is no PNG. */
MUST_CHECK int sdapi_encode_png_info(struct buf *out, const uint8_t *file, size_t len, struct err *e);

/* ---- lists (sdapi_lists.c) ---- */

struct sdapi_sampler {
  const char *name;             /* "euler_a": an alias here */
  const char *label;            /* "Euler a": its name here */
  int has_karras;
};

struct sdapi_lora {
  const char *name, *alias;     /* alias may be NULL */
};

/* What the lists tell of the server. */
struct sdapi_server {
  const struct request_limits *lim;
  const char *digest;           /* of the model, in hex; "" when unknown */
  const char *filename;         /* the model's folder as clients may know it */
  const char *version;
  const struct sdapi_sampler *sampler;
  int n_samplers;
  const struct sdapi_lora *lora; /* style adapters that this client may use */
  int n_loras;
  int64_t memory_used, memory_total; /* bytes of this machine */
};

/* Answers GET /sdapi/v1/NAME for a name of: options, sd-models, samplers, schedulers, loras, upscalers, latent-upscale-modes, sd-vae, sd-modules, embeddings,
 * hypernetworks, face-restorers, realesrgan-models, prompt-styles, scripts, script-info, extensions, cmd-flags, memory. E_NOTFOUND for any other. */
MUST_CHECK int sdapi_encode_list(struct buf *out, const char *name, const struct sdapi_server *s, struct err *e);

/* What GET system-info/status is asked for, and is made of. */
struct sdapi_status {
  const struct sdapi_server *server;
  const struct sdapi_progress *progress; /* of the caller's job at hand */
  int64_t now, up_s;            /* seconds since 1970, since the start */
  int has_state, has_memory;
};

/* {"version", "uptime", "timestamp", "state", "memory", ...} as SD.Next's clients read it; what is not told of the machine is null. */
MUST_CHECK int sdapi_encode_status(struct buf *out, const struct sdapi_status *s, struct err *e);

/* GET /queue/status, which gradio answers for A1111: how many wait, and for how many seconds about. */
MUST_CHECK int sdapi_encode_queue(struct buf *out, int waiting, double eta_s, struct err *e);

/* Checks POST options: options are the operator's, so that one client cannot change what another gets. What says what is so already is accepted. E_ARG
 * names the option that would change something. */
MUST_CHECK int sdapi_decode_options(const char *body, size_t len, const struct sdapi_server *s, struct err *e);

#endif
