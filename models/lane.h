/*
 * lane.h - where a part of a picture's work runs: a context of the backend and activation memory for it, for one thread.
 *
 * A model has a main lane, the backend and slab that it was opened and reserved with. Other lanes are opened beside it, so that text
 * encoding, decoding and previews, each on a thread of its own, do not hold up the steps. What a draw owns (latents, keys and values) may be
 * made through one lane and used and freed through another, once the call that made it has returned and the draw was handed over (a lock).
 * Its bits do not depend on the lane, nor on how many threads that has.
 *
 * Called by the server, batch.c and tests. Threads: a lane belongs to one thread at a time; opening and closing while others draw is fine.
 */
#ifndef SAFELIGHT_MODELS_LANE_H
#define SAFELIGHT_MODELS_LANE_H

#include <stddef.h>

#include "kernels/backend.h"

struct lane;
struct model;

/* What a lane has memory for. */
enum lane_work {
  LANE_ENDS = 1,   /* draw_start, draw_decode, draw_preview: text encoder and VAE */
  LANE_STEPS = 2,  /* draw_step: UNet */
  LANE_ALL = 3
};

/* After model_reserve: memory for pictures of the reserved size. threads: for its own work; 0: as many as the backend. work: enum lane_work,
 * or'ed. On failure *l is NULL. Closed before the model. */
MUST_CHECK int lane_open(struct lane **l, struct model *m, int threads, int work, struct err *e);
void lane_close(struct lane *l); /* takes NULL and, doing nothing, the model's own */
struct lane *model_lane(struct model *m);      /* the model's own; the thread that owns the backend */
/* A lane that was opened computes with so many threads from now on, 0: as many as it was opened with. */
void lane_use_threads(struct lane *l, int threads);
/* What a rehearsal goes through. */
struct lane_rehearsal {
  int width, height;   /* pixels, within what the lane has memory for */
  int rows;            /* of a pass of the UNet, with LANE_STEPS; 0: the VAE both ways, with LANE_ENDS */
  int chunks;          /* with rows: of their prompts */
};
/* Walks the network without computing anything, so that the lane's backend has what it would otherwise take and make when a picture of this kind comes first
 * (be_ops.rehearse); nothing where the backend has nothing to make. E_ARG for an impossible size, else what the backend says. */
MUST_CHECK int lane_rehearse(struct lane *l, const struct lane_rehearsal *of, enum be_rehearsal what, struct err *e);
size_t lane_bytes(const struct lane *l);       /* of activation memory */
void lane_memory(struct lane *l, struct be_memory *m); /* what its context says (be_ops.memory) */

#endif
