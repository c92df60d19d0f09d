/*
 * draw.h - what a picture on its way is made of; shared by the files that move it: pipeline.c (prepare, start, close), subject.c (what the pictures
 * of a request share), first.c (the picture that it starts from), step.c (steps), picture.c (pixels), batch.c (many at once). Nobody else includes it.
 *
 * Invariants: a draw holds all its device memory from draw_start on, and no later call allocates. A step transfers nothing and waits for nothing:
 * what another lane reads afterwards is behind a mark. Rows of the UNet are in the order
 * (negative, prompt), or only (prompt) without guidance. Threads: one at a time, with one exception: draw_preview reads `snapshot` and what
 * never changes after draw_start, and may run beside steps. A subject is written by the draw_start of the first picture that has it, and read by all
 * of them, on any thread, after the hand-over that follows.
 */
#ifndef SAFELIGHT_MODELS_DRAW_H
#define SAFELIGHT_MODELS_DRAW_H

#include <stdatomic.h>

#include "models/model.h"
#include "models/rng.h"

enum { SIDE_PROMPT, SIDE_NEGATIVE, SIDES };

/* The picture that others start from, in host memory, one allocation. */
struct first {
  float *moments;                       /* (h, w, 2c): the encoder's distribution of it, means then log variances; of subject_start */
  uint8_t *rgb;                         /* (height, width, 3) */
  uint8_t *mask;                        /* (height, width), 255: draw anew; NULL: everywhere */
};

/* What the pictures of one request share, whose seeds alone differ. Each of them holds a reference. */
struct subject {
  atomic_int refs;
  struct sampler_plan plan;
  struct prompt_tokens tokens[SIDES];   /* [SIDE_NEGATIVE] unused (n 0) without guidance */
  struct first *first;                  /* NULL: from noise alone */
  /* Of the first subject_start; nothing changes afterwards. */
  struct model *m;                      /* whose device has it */
  struct generation *g;                 /* that the prompts were encoded under; a reference. NULL before */
  struct err err;                       /* why none of the pictures can be drawn */
  void *mem;                            /* device slab that everything below lives in */
  struct unet_context context[SIDES];
  struct tensor pooled;                 /* (1, 1, 1, D) F32: SDXL's text embedding; p NULL elsewhere */
};

struct draw {
  struct model *m;                      /* that it was prepared with; from draw_start on that of its lane */
  struct generation *g;                 /* pinned by draw_start; a reference */
  struct draw_params p;                 /* texts and pictures of the caller are not kept */
  struct subject *subject;              /* a reference */
  struct rng rng;                       /* of draw_start; what comes later is drawn on the device, from `random` on */
  int rows;                             /* of the UNet: 1 or 2 */
  int step;                             /* done */
  int is_cut;                           /* it ends before its last step, as x0_old */
  int64_t h, w, c;                      /* of the latent */
  void *mem;                            /* device slab that everything below lives in */
  struct tensor x, x0_old, noise;       /* (1, h, w, c) F32 */
  struct tensor random;                 /* (1, 1, 1, NORMAL_WORDS) I32: the generator */
  struct tensor snapshot;               /* (1, h, w, c) act: what the VAE takes, of draw_snapshot */
  int has_snapshot;
  struct mark *seen, *done;             /* behind the last snapshot; behind the last step */
  /* With a mask: (1, h, w, 1) U8, 0: what it keeps; the first picture's latent as the UNet sees it, and the noise of N(0, 1) that it was noised
   * with, as x. */
  struct tensor anew, clean, added;
};

/* Places one tensor at *top of a slab; with mem NULL only *top moves. */
struct tensor draw_place(char *mem, size_t *top, enum dtype type, int64_t b, int64_t h, int64_t w, int64_t c);

/* subject.c */

/* Checks and tokenises the texts, keeps the first picture, plans the sampler, for d, which has no subject yet: any thread. On failure it has what there is. */
MUST_CHECK int subject_prepare(struct draw *d, const struct draw_params *p, struct err *e);
struct subject *subject_ref(struct subject *s);
void subject_unref(struct subject *s); /* takes NULL; any thread */
/* On a lane with LANE_ENDS, for a picture that is to be drawn under g: encodes prompts and first picture, if none before it did. A failure of that is the
 * failure of all the pictures. E_INTERNAL: another one of them has another generation, perhaps of another device. */
MUST_CHECK int subject_start(struct draw *d, struct lane *l, struct generation *g, struct err *e);
size_t subject_bytes(const struct subject *s, const struct model *m); /* of the slab */

/* first.c */

/* Copies the caller's picture and mask and says in *skip how many of p->steps are left out. E_ARG: "image", "mask", "strength". */
MUST_CHECK int first_prepare(struct draw *d, const struct draw_params *p, int *skip, struct err *e);
/* Encodes the picture, for all that start from it. */
MUST_CHECK int first_encode(struct draw *d, struct run *run);
/* Fills d->x with its noised latent, and what a mask needs. */
MUST_CHECK int first_start(struct draw *d, struct run *run);
/* After a step: where the mask keeps, the latent is the first picture's, noised as the next step expects. */
MUST_CHECK int first_hold(struct draw *d, struct be *be, struct err *e);
/* Pixels that the mask keeps, over rgb. */
void first_paste(const struct draw *d, uint8_t *rgb);

/* One UNet pass on the lane for n draws of one size with rows in all <= RUN_MAX_ROWS, and each one's update. err: n entries with code 0; a draw
 * whose entry has a code afterwards has failed and the others have not. Returns 0, or the code of the pass when that failed: then every entry has
 * it, and no draw was touched. */
MUST_CHECK int step_draws(struct lane *l, struct draw *const *d, int n, struct err *err);

#endif
