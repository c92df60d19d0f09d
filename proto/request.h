/*
 * request.h - what a client asked for, decoded, bounded and validated. No JSON lives past it.
 *
 * Every surface (OpenAI today) decodes into this one structure; server/job.h holds one in each job. Limits are the
 * operator's, given to the decoder; a field outside them is an error that names the field and the bound.
 *
 * Called by proto/openai.c (fills), server/ (reads). Threads: plain data, owned by whoever holds it.
 */
#ifndef SAFELIGHT_PROTO_REQUEST_H
#define SAFELIGHT_PROTO_REQUEST_H

#include <stddef.h>
#include <stdint.h>

enum {
  REQUEST_PROMPT_MAX = 16384,   /* bytes of UTF-8 */
  REQUEST_SAMPLER_MAX = 32,
  REQUEST_MODEL_MAX = 64,
  REQUEST_N_MAX = 10,
  REQUEST_CLIP_SKIP_MAX = 12,
  REQUEST_LORAS_MAX = 8,
  REQUEST_LORA_NAME = 64
};

/* Forms of an answer that a decoder refuses, by name, unless the server offers them. */
enum {
  REQUEST_OFFERS_FORMATS = 1, /* JPEG and WebP */
  REQUEST_OFFERS_URL = 2,
  REQUEST_OFFERS_STREAM = 4
};

/* Bounds and defaults of this server; filled from the configuration and the model at start. */
struct request_limits {
  int default_size, size_multiple, max_size;  /* pixels a side */
  int default_steps, max_steps;
  float default_guidance, max_guidance;
  int max_n;
  char default_sampler[REQUEST_SAMPLER_MAX];
  char model[REQUEST_MODEL_MAX];              /* the only model served */
  unsigned offers;                            /* REQUEST_OFFERS_*: what else than PNG files in JSON this server sends */
};

/* A style adapter by the name that the operator gave it. What it may be, and how far, is his policy. */
struct request_lora {
  char name[REQUEST_LORA_NAME];
  float scale;
};

/* The file that a picture is sent as. quality: 1..100, of JPEG and WebP (100 is WebP without loss); PNG has none. */
enum image_format { IMAGE_PNG, IMAGE_JPEG, IMAGE_WEBP };

/* How the answer carries its pictures. */
enum request_reply {
  REPLY_JSON,   /* base64 in JSON */
  REPLY_URL,    /* JSON with the address of each file, served for a limited time */
  REPLY_STREAM  /* server-sent events, previews among them */
};

enum { REQUEST_PREVIEWS_MAX = 3 };

/* The picture that what was drawn is a part of, and goes back into. */
struct request_whole {
  int width, height;                          /* pixels */
  int x, y, w, h;                             /* the part: of any size, since it is resized both ways */
  uint8_t *rgb;                               /* width*height*3; NULL: what is drawn is all there is */
  uint8_t *mask;                              /* w*h, 255: what was drawn shows, 0: the picture does */
};

struct request {
  char prompt[REQUEST_PROMPT_MAX + 1];
  size_t prompt_len;
  char negative[REQUEST_PROMPT_MAX + 1];
  size_t negative_len;
  char sampler[REQUEST_SAMPLER_MAX];          /* as sent; the server resolves it (models/sampler.h) and refuses unknown ones */
  int karras;                                 /* -1 not said, else 0 or 1 */
  int width, height;                          /* pixels */
  int steps;
  int n;                                      /* pictures wanted, seeds seed .. seed+n-1 */
  int clip_skip;                              /* 0 not said, else 1.. */
  float guidance;
  uint64_t seed;                              /* drawn by the server when has_seed is 0 */
  int has_seed;
  struct request_lora lora[REQUEST_LORAS_MAX];
  int n_loras;
  enum image_format format;
  int quality;                                /* 0: the format's default */
  enum request_reply reply;
  int previews;                               /* pictures on their way that a stream shows, 0..REQUEST_PREVIEWS_MAX */
  /* image to image: NULL without a first picture. All are malloc'ed, of width x height, and the request's: request_close frees them. */
  uint8_t *init;                              /* width*height*3, RGB */
  uint8_t *mask;                              /* width*height, 255: draw anew, 0: keep; NULL: all of it is drawn anew */
  float strength;                             /* 0..1: which share of the steps is done on init; 1 without init */
  struct request_whole whole;                 /* that init is a part of */
};

/* The request of a client who says nothing; width and height are 0 until somebody does. */
void request_init(struct request *r, const struct request_limits *lim);

/* Frees what a request holds beside itself; takes a zeroed one. */
void request_close(struct request *r);

/* The recipe of one finished picture: what its metadata, headers and JSON report. Strings are borrowed. */
struct recipe {
  const char *prompt, *negative;              /* UTF-8, NUL terminated */
  const char *sampler, *sampler_label;        /* "dpmpp_2m", "DPM++ 2M" */
  const char *model, *model_digest;           /* digest "" when unknown */
  const char *version;                        /* of this program */
  const char *generation_id, *generation_digest, *profile; /* what it was drawn under; NULL or "" when there was no generation */
  const char *styles;                         /* "name:weight name:weight" that the client added; NULL or "": none */
  int requires_nothing;                       /* the profile asks for no safety, for evaluation: the picture says so */
  uint64_t seed;
  int karras, steps, width, height, clip_skip;
  int file_width, file_height;                /* of the file, when what was drawn is a part of it; 0: width x height */
  float guidance;
  float strength;                             /* of a picture that starts from another one; 0: from noise alone */
  int cut_at;                                 /* the step that it was interrupted at; 0: it was finished */
  enum image_format format;                   /* of the file, and its quality: 1..100, 0 the format's default */
  int quality;
};

#endif
