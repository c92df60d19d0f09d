/*
 * merge_impl.h - what merge.c (the sums) and merge_co.c (Co-Merge) share; nobody else includes it. Threads: no state.
 */
#ifndef SAFELIGHT_MODELS_MERGE_IMPL_H
#define SAFELIGHT_MODELS_MERGE_IMPL_H

#include "models/merge.h"

/* One site of a merge: what goes in, and where it goes. */
struct merge_site {
  const struct merge_expert *expert;
  int n;
  const struct merge_options *o;
  const struct generation *base;
  int site;
  struct adapter *out;
  int at;                   /* out->delta[at] is this site's */
  double total, captured;   /* |merged dW|^2, and what of it the rank keeps */
  double places, kept;      /* co-merge: weights (or rows), and those that some expert keeps */
};

/* w += f * scale * up down, dense (out, columns), in double. */
void merge_add_dense(double *w, const struct delta *d, const struct site *s, double f);
/* Rank of the result at this site: the option's, or the largest of the experts there. */
int64_t merge_rank(const struct merge_site *m);
/* Cuts the dense dW to the rank and makes it the result of the site, times o->scale. */
MUST_CHECK int merge_cut(struct merge_site *m, const double *w, struct err *e);

MUST_CHECK int merge_co(struct merge_site *m, const struct merge_counts_site *c, struct err *e);
MUST_CHECK int merge_co_rows(struct merge_site *m, const struct merge_counts_site *c, struct err *e);

#endif
