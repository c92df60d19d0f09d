/*
 * svd.h - the leading singular triplets of a weight change, to write it as a low-rank adapter.
 *
 * Three ways by shape. A product of thin factors: QR of both and an exact decomposition of the small core. A dense matrix with a side up to
 * SVD_EXACT: exact, by one-sided Jacobi. A larger one: subspace iteration from a fixed random start, with SVD_SPARE vectors more than asked
 * for; what it finds of a matrix whose rank is within that is exact, and of others the energy is within 1e-4 of the best
 * (tests/unit/test_svd.c).
 *
 * Why not LAPACK: this runs in two offline subcommands. LAPACK would be linked into the server, BLAS libraries start threads of their own,
 * and OpenBLAS chooses kernels by the processor, so that a merged file would have other bytes on another machine. Everything here is plain
 * double arithmetic in a fixed order.
 *
 * Called by merge.c, extract.c. Threads: no state. Sources: Hestenes 1958 (one-sided Jacobi); Halko, Martinsson, Tropp 2011,
 * "Finding structure with randomness", algorithm 4.4.
 */
#ifndef SAFELIGHT_MODELS_SVD_H
#define SAFELIGHT_MODELS_SVD_H

#include <stdint.h>

#include "base/err.h"

enum { SVD_EXACT = 256, SVD_SPARE = 16 };

/* a = sum over k < r of s[k] u[k] v[k]^T and a rest; s falls. A vector whose s is 0 is 0. */
struct svd {
  int64_t m, n, r;
  double *u;  /* (r, m): row k is the k-th left vector, its largest element positive */
  double *s;  /* (r) */
  double *v;  /* (r, n) */
};

/* a (m, n), row after row. rank: triplets wanted, cut to min(m, n). On failure *out is zeroed. E_NOMEM; E_INTERNAL when a is not finite. */
MUST_CHECK int svd_dense(struct svd *out, const double *a, int64_t m, int64_t n, int64_t rank, struct err *e);
/* The same of up (m, R) times down (R, n). */
MUST_CHECK int svd_product(struct svd *out, const double *up, const double *down, int64_t m, int64_t R, int64_t n, int64_t rank,
                           struct err *e);
void svd_free(struct svd *x); /* takes a zeroed one; leaves one */

/* The first `rank` triplets (<= x->r) as factors, each with the root of the singular value: up (m, rank), down (rank, n). */
void svd_factors(const struct svd *x, int64_t rank, float *up, float *down);
/* Sum of the squares of the first `rank` singular values. */
double svd_energy(const struct svd *x, int64_t rank);

#endif
