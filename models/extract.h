/*
 * extract.h - a LoRA out of a fine-tuned UNet: dW = W_tuned - W_base at each site, cut to a rank by SVD.
 *
 * For safe models that were only ever published whole (SafetyDPO's, SafeGen's): what they changed becomes an adapter that can be merged,
 * swapped and weighed. The cut is the best approximation of that rank in the Frobenius norm; how much of |dW|^2 it holds is reported per
 * site and in all, with what lies outside of the chosen sites (norms, biases) counted against it.
 *
 * Called by `safelight adapter extract`, tests. Threads: OpenMP over sites; no state.
 */
#ifndef SAFELIGHT_MODELS_EXTRACT_H
#define SAFELIGHT_MODELS_EXTRACT_H

#include "models/adapter.h"
#include "models/sources.h"

enum extract_sites {
  EXTRACT_ATTENTION,  /* to_q, to_k, to_v, to_out.0 of attn1 and attn2 */
  EXTRACT_ALL         /* every linear and convolution of the UNet */
};

struct extract_options {
  int64_t rank;             /* at most, per site */
  double energy;            /* 0 < energy <= 1: a site takes the least rank that holds this share of its |dW|^2; 1: always `rank` */
  enum extract_sites sites;
};

struct extract_site {
  int site;
  int64_t rank;
  double norm;              /* |dW|_F */
  double relative;          /* |dW|_F / |W0|_F */
  double energy;            /* share of |dW|^2 in the factors */
};

struct extract_report {
  struct extract_site *site; /* n entries, the sites of the adapter in order; freed by extract_report_free */
  int n;
  double energy;            /* share of |dW|^2 of the chosen sites in the factors */
  double energy_all;        /* the same of all that changed in the UNet, biases and norms included */
  double outside;           /* share of all |dW|^2 that is not at the chosen sites */
  int unchanged;            /* chosen sites where nothing changed: they get no factors */
};

/* base: site table; pristine: its weights; tuned: has a component "unet" of the same shapes (sources_add). On success *out is an adapter in
 * memory (adapter_close). E_ARG when nothing differs; E_FILE names the tensor that is missing or has another shape. */
MUST_CHECK int extract_run(struct adapter **out, const struct generation *base, const struct model_sources *pristine,
                           const struct model_sources *tuned, const struct extract_options *o, struct extract_report *report,
                           struct err *e);
void extract_report_free(struct extract_report *r); /* takes a zeroed one; leaves one */

#endif
