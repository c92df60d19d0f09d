/*
 * draw.h - what a picture on its way is made of; shared by the files that move it: pipeline.c (prepare, start, close), first.c (the picture
 * that it starts from), step.c (steps), picture.c (pixels), batch.c (many at once). Nobody else includes it.
 *
 * Invariants: a draw holds all its device memory from draw_start on, and no later call allocates. A step transfers nothing and waits for nothing:
 * what another lane reads afterwards is behind a mark. Rows of the UNet are in the order
 * (negative, prompt), or only (prompt) without guidance. Threads: one at a time, with one exception: draw_preview reads `snapshot` and what
 * never changes after draw_start, and may run beside steps.
 */
#ifndef SAFELIGHT_MODELS_DRAW_H
#define SAFELIGHT_MODELS_DRAW_H

#include "models/model.h"
#include "models/rng.h"

enum { SIDE_PROMPT, SIDE_NEGATIVE, SIDES };

/* The picture that another one starts from, in host memory, one allocation. */
struct first {
  uint8_t *rgb;                         /* (height, width, 3) */
  uint8_t *mask;                        /* (height, width), 255: draw anew; NULL: everywhere */
};

struct draw {
  struct model *m;                      /* that it was prepared with; from draw_start on that of its lane */
  struct generation *g;                 /* pinned by draw_start; a reference */
  struct draw_params p;                 /* texts and pictures of the caller are not kept */
  struct sampler_plan plan;
  struct prompt_tokens tokens[SIDES];   /* [SIDE_NEGATIVE] unused without guidance */
  struct rng rng;                       /* of draw_start; what comes later is drawn on the device, from `random` on */
  int rows;                             /* of the UNet: 1 or 2 */
  int step;                             /* done */
  int is_cut;                           /* it ends before its last step, as x0_old */
  int64_t h, w, c;                      /* of the latent */
  void *mem;                            /* device slab that everything below lives in */
  struct unet_context context[SIDES];
  struct tensor x, x0_old, noise;       /* (1, h, w, c) F32 */
  struct tensor random;                 /* (1, 1, 1, NORMAL_WORDS) I32: the generator */
  struct tensor pooled;                 /* (1, 1, 1, D) F32: SDXL's text embedding; p NULL elsewhere */
  struct tensor snapshot;               /* (1, h, w, c) act: what the VAE takes, of draw_snapshot */
  int has_snapshot;
  struct mark *seen, *done;             /* behind the last snapshot; behind the last step */
  struct first *first;                  /* NULL: from noise alone */
  /* With a mask: (1, h, w, 1) U8, 0: what it keeps; the first picture's latent as the UNet sees it, and the noise of N(0, 1) that it was noised
   * with, as x. */
  struct tensor anew, clean, added;
};

/* first.c */

/* Copies the caller's picture and mask and says in *skip how many of p->steps are left out. E_ARG: "image", "mask", "strength". */
MUST_CHECK int first_prepare(struct draw *d, const struct draw_params *p, int *skip, struct err *e);
/* Encodes the picture on a lane of draw_start and fills d->x with its noised latent, and what a mask needs. */
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
