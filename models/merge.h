/*
 * merge.h - several experts become one adapter.
 *
 *   concat        the sum of w_e dW_e, exactly: factors stacked, the rank is the sum of the ranks. No order, no calibration.
 *   weighted      the same sum, cut to a rank by SVD (the best approximation in the Frobenius norm; Eckart, Young 1936).
 *   mean          weighted, with w_e / E.
 *   ties          TIES-merging (Yadav et al. 2023, arXiv 2306.01708) of the dW_e, site by site: trim each to its largest `keep` by
 *                 magnitude, elect at each place the sign of the sum, mean over those that have that sign; then cut to a rank by SVD.
 *   co-merge      Co-Merge of SafetyDPO (arXiv 2412.10493; its README describes it in two sentences, code was never published), as
 *                 reconstructed here: for every input of a calibration and every weight of a factor, the expert with the strongest signal
 *                 |weight| * mean |input| wins; an expert keeps the `keep` of its weights that won most often; a merged weight is the mean
 *                 over the experts that keep it, and 0 (or the mean of all) where nobody does. Factors are merged, not their products, so
 *                 the experts must have grown from one start: down matrices of different starts do not speak of the same directions. The
 *                 result has the experts' rank.
 *   co-merge-rows the same idea on dW: a row (one output) is the unit, its signal is the sum over j of |dW_e[i][j]| * mean |x_j|; merged
 *                 rows are means over keepers; then cut to a rank by SVD. Does not need a common start.
 *
 * w_e multiplies an expert's dW in every method, before anything is compared.
 *
 * Called by the command line (`safelight adapter merge`), tests. merge_stats.c gathers the counts by running the model. Invariants: the
 * result depends on the experts' numbers, weights, options and counts alone; not on threads. Threads: uses OpenMP over sites; no state.
 */
#ifndef SAFELIGHT_MODELS_MERGE_H
#define SAFELIGHT_MODELS_MERGE_H

#include "models/adapter.h"

enum merge_method { MERGE_CONCAT, MERGE_WEIGHTED, MERGE_MEAN, MERGE_TIES, MERGE_CO, MERGE_CO_ROWS, MERGE_METHODS };

enum { MERGE_EXPERTS_MAX = 64 };

const char *merge_method_name(enum merge_method m); /* "co-merge-rows" */
MUST_CHECK int merge_method_find(const char *name, enum merge_method *m, struct err *e); /* E_ARG lists the names */
int merge_needs_counts(enum merge_method m);

struct merge_expert {
  const struct adapter *a;  /* low-rank deltas without bias */
  float weight;
};

struct merge_options {
  enum merge_method method;
  int64_t rank;             /* of the result, for the methods that cut; 0: the experts' largest */
  double keep;              /* ties, co-merge, co-merge-rows: 0 < keep <= 1 */
  double scale;             /* the merged dW times this: lambda of TIES; 1 otherwise */
  int fill_mean;            /* co-merge: what nobody keeps is the mean of all instead of 0 */
};

/* ---- who wins where: filled by a calibration ---- */

struct merge_counts_site {
  int site;
  int64_t rank, in, out;
  uint32_t *down, *up;      /* (E, rank, in), (E, out, rank): how often this weight won; NULL unless method is MERGE_CO */
  uint32_t *rows;           /* (E, out); NULL unless method is MERGE_CO_ROWS */
};

struct merge_counts {
  int experts, sites;
  struct merge_counts_site *at; /* ordered by site */
};

/* What one input looked like to one expert at one site. */
struct merge_activation {
  const double *x;          /* (in): mean |x_j| over tokens; NULL: not seen */
  const double *hidden;     /* (rank): mean |(down x)_k| over tokens */
};

/* Zeroed counts. E_ARG when the experts differ in sites or ranks (co-merge; they must be of one architecture), or touch a convolution. */
MUST_CHECK int merge_counts_new(struct merge_counts **c, enum merge_method method, const struct generation *base,
                                const struct merge_expert *expert, int n, struct err *e);
void merge_counts_free(struct merge_counts *c); /* takes NULL */
/* One calibration input: act[i * n + k] is what site i of c saw of it when expert k was active. A site that any expert did not see is left
 * out. Where signals are equal the first expert wins; where all are 0 nobody does. */
void merge_counts_add(struct merge_counts *c, const struct merge_expert *expert, int n, const struct merge_activation *act);

/* ---- merging ---- */

struct merge_report {
  double energy;            /* share of |merged dW|^2 over all sites that the rank kept; 1 when nothing was cut */
  double worst;             /* the same of the site with the least */
  char worst_site[128];
  double kept;              /* co-merge: share of places that some expert keeps */
};

/* counts: NULL unless merge_needs_counts. On success *out is an adapter in memory (adapter_close), with scale 1 everywhere. report may be
 * NULL. E_ARG names the expert and the site that cannot be merged. */
MUST_CHECK int merge_run(struct adapter **out, const struct generation *base, const struct merge_expert *expert, int n,
                         const struct merge_options *o, const struct merge_counts *counts, struct merge_report *report, struct err *e);

#endif
