/*
 * bench_batch.h - what drawing several pictures at once brings, against one at a time.
 *
 * Called by bench.c. Threads: that of the backend; helpers of its own for what a server does beside the steps.
 */
#ifndef SAFELIGHT_SERVER_BENCH_BATCH_H
#define SAFELIGHT_SERVER_BENCH_BATCH_H

#include "models/batch.h"

struct batch_gain {
  double alone, together;  /* pictures a second: the median */
  double gain, step_gain;  /* how many times as many; of whole pictures and of steps alone: the median over rounds */
  size_t bytes;            /* of memory that the batch takes more */
};

/* In each round n pictures are drawn one after the other on all threads, then n at once; all threads share the encoding and decoding of the latter. The
 * model must be reserved for the size. */
MUST_CHECK int bench_batch(struct batch_gain *gain, struct model *m, struct be *be, const struct draw_params *p, int n, int rounds,
                           struct err *e);

#endif
