/*
 * merge_stats.h - the calibration of Co-Merge: the model itself is run on a list of prompts, once for each expert, and every layer's input
 * is watched.
 *
 * For each prompt and expert a short picture is drawn (DDIM, no guidance, the same first noise for all experts) under that expert alone at
 * its weight; each step is one input of the calibration. The keys' and values' layers of cross-attention and the text encoder see the
 * prompt only and count once a prompt.
 *
 * Called by `safelight adapter merge`. Threads: the one that owns the backend.
 */
#ifndef SAFELIGHT_MODELS_MERGE_STATS_H
#define SAFELIGHT_MODELS_MERGE_STATS_H

#include "models/merge.h"
#include "models/pipeline.h"

struct merge_calibration {
  const char *const *prompt;
  int prompts;
  int steps;                /* of each picture, 1 to 100 */
  uint64_t seed;            /* the first noise of prompt i is that of seed + i */
  void (*progress)(void *arg, int done, int prompts); /* NULL: nobody is told */
  void *arg;
};

/* Fills c (merge_counts_new with the same experts). be: m's backend. *inputs: how many (prompt, step) inputs were seen. */
MUST_CHECK int merge_calibrate(struct merge_counts *c, struct model *m, struct be *be, const struct merge_expert *expert, int n,
                               const struct merge_calibration *k, int *inputs, struct err *e);

#endif
