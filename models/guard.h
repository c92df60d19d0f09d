/*
 * guard.h - does what a client adds take away what the policy requires?
 *
 * At every site let S be the sum of weight * dW over the required adapters and U_k that of style adapter k (weight and bias side by side, as
 * one vector). How much of the safety a style takes back is
 *
 *      c = <U, S> / |S|^2          -1: all of it at this site; 0: none; +1: it adds the same again
 *
 * for each style alone and for all of them together (many small ones add up), against S and against each required adapter alone (else one that is
 * weak beside the others could be taken out of their sum unnoticed). It depends on dW alone: not on names, on how a dW is
 * factored (up R, R^-1 down), padded with zero ranks or encoded (LoHa, LoKr, DoRA, full difference, overlay), and neither on the sign being in the
 * file or in the weight. Sites that S does not touch are free. Low-rank pairs never leave their factors:
 * <B_u A_u, B_s A_s> = sum of (B_u^T B_s) * (A_u A_s^T), r_u r_s (out + in) multiply-adds.
 *
 * A request whose c is below -tau at a site is refused, or projected: there the required adapters get factors 1 + p, with the p that lifts every c
 * of the styles together to -tau: max(0, -c - tau) where one adapter is required. The factors are part of the generation's digest.
 *
 * What it cannot see: weights trained to undo the effect of S in directions of their own, or at other sites. Only an allow list of styles
 * and a classifier on the pictures help against those.
 *
 * Called by server/safety_compose.c. Threads: the loader; pure functions of what they are given.
 * Source: the composition is the Modular LoRA sum; the inner product is the Frobenius one.
 */
#ifndef SAFELIGHT_MODELS_GUARD_H
#define SAFELIGHT_MODELS_GUARD_H

#include "models/adapter.h"

struct guard_style {
  double c;               /* the smallest over the sites, against S and each of its members; 0 when it touches none of S */
  int site;               /* where, or SITE_NONE */
  double c_all;           /* over all sites as one: near +1 or -1 for a copy of S at weight +1 or -1 */
  double norm_ratio;      /* the largest |U_k| / |W0| over the sites, at its weight */
};

struct guard_report {
  double c;               /* the smallest over the sites, each style alone and all together, S and each member of it: what is held against -tau */
  int site;               /* where, or SITE_NONE */
  int style;              /* index in `use` of the style alone that does it; -1: all together */
  int member;             /* index in `use` of the required adapter alone whose part it takes; -1: of S */
  int can_project;        /* 0 when no reasonable factor mends it: refuse whatever the policy says */
  double c_together;      /* the smallest of all styles together: what projection mends */
  double c_all;           /* all styles together, over all sites as one */
  double norm_ratio;      /* the largest sum over the styles of |U_k| / |W0| over the sites */
  int norm_site;
  int n;                  /* uses */
  struct guard_style *of; /* n entries; those of required uses are zeroed, with SITE_NONE */
  float **factor;         /* n entries: for a required use, adapter->n factors (guard_project); NULL for styles and while there is nothing to mend */
};

/*
 * Measures a set: use[i].required tells S from U; use[i].factor is ignored. tau >= 0 is what may be taken back; it decides the factors alone, refusing
 * is the caller's. sources: for norms of W0 and for what depends on it. E_FILE when something is not finite. After success guard_free is the
 * caller's; after failure r is zeroed.
 */
MUST_CHECK int guard_measure(struct guard_report *r, const struct generation *base, const struct model_sources *sources,
                             const struct adapter_use *use, int n, double tau, struct err *e);
/* 1 when the styles may not be drawn with as they are: written so that a NaN refuses. */
int guard_cancels(const struct guard_report *r, double tau);
/* Lets every use[i].factor point into r: generation_build then gives the projected sum. r outlives that call, and r->can_project is 1. */
void guard_project(const struct guard_report *r, struct adapter_use *use);
void guard_free(struct guard_report *r); /* takes a zeroed one */

#endif
