/*
 * bench_lora.h - what low-rank factors beside the attention projections cost a UNet step, measured through generation_build.
 *
 * Called by bench.c. Threads: that of the backend.
 */
#ifndef SAFELIGHT_SERVER_BENCH_LORA_H
#define SAFELIGHT_SERVER_BENCH_LORA_H

#include "models/pipeline.h"

double bench_median(double *v, int n); /* sorts v */

struct lora_cost {
  int sites;         /* that have factors */
  double step;       /* seconds of a UNet step with them: the median */
  double overhead;   /* what they add, as a part of a step without: the median over pairs of steps */
};

/*
 * Builds a generation in FORM_RUNTIME from one adapter of random factors of that rank (query, key, value and out of both attentions
 * of every block) and draws two pictures step by step in turn, one through it and one through the base, so that what other processes take from the
 * machine is taken from both. The model must be reserved for the size.
 */
MUST_CHECK int bench_lora(struct lora_cost *cost, struct model *m, struct be *be, const struct draw_params *p, int rank,
                          struct err *e);

#endif
