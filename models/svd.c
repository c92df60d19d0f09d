/*
 * svd.c - see svd.h. Called by merge.c and extract.c. Threads: no state.
 *
 * Vectors lie in rows here, so that every inner loop walks through memory. "Rows w (k, len)" means k vectors.
 */
#include "models/svd.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "models/rng.h"

enum { SWEEPS_MAX = 60, ITERATIONS = 8 };

static double dot(const double *a, const double *b, int64_t n)
{
  double s = 0;

  for (int64_t i = 0; i < n; i++)
    s += a[i] * b[i];
  return s;
}

/* ---- one-sided Jacobi ---- */

static void rotate(double *a, double *b, int64_t n, double c, double s)
{
  for (int64_t i = 0; i < n; i++) {
    double x = a[i], y = b[i];

    a[i] = c * x - s * y;
    b[i] = s * x + c * y;
  }
}

/* Makes the rows of w (k, len) orthogonal by rotations, and does the same to j (k, k), which starts as 1: then j w_before = w_after. The
 * usual rotation that annihilates <a, b>, with the smaller angle. */
static void orthogonalise(double *w, int64_t k, int64_t len, double *j)
{
  const double rounding = 2.3e-16 * (double)(len + 4); /* of a dot product: what is smaller cannot be told from orthogonal */
  const double nothing = 1e-31 * dot(w, w, k * len); /* rows that rounding left of a zero have no direction to turn */
  int turned = 1;

  for (int sweep = 0; turned && sweep < SWEEPS_MAX; sweep++) {
    turned = 0;
    for (int64_t p = 0; p < k; p++)
      for (int64_t q = p + 1; q < k; q++) {
        double a = dot(w + p * len, w + p * len, len), b = dot(w + q * len, w + q * len, len);
        double g = dot(w + p * len, w + q * len, len), z, t, c;

        if (fabs(g) <= rounding * sqrt(a * b) || a <= nothing || b <= nothing)
          continue;
        turned = 1;
        z = (b - a) / (2 * g);
        t = copysign(1 / (fabs(z) + sqrt(1 + z * z)), z);
        c = 1 / sqrt(1 + t * t);
        rotate(w + p * len, w + q * len, len, c, c * t);
        rotate(j + p * k, j + q * k, k, c, c * t);
      }
  }
}

struct order {
  double s;
  int64_t row;
};

static int falling(const void *a, const void *b)
{
  const struct order *x = a, *y = b;

  return x->s != y->s ? (x->s < y->s ? 1 : -1) : (x->row < y->row ? -1 : x->row > y->row);
}

/* Scales v by 1 / s, and turns u and v so that u's largest element is positive: of the two equal answers always the same one. */
static void normalise(double *u, int64_t m, double *v, int64_t n, double s)
{
  double largest = 0, sign;

  for (int64_t i = 0; i < m; i++)
    if (fabs(u[i]) > fabs(largest))
      largest = u[i];
  sign = largest < 0 ? -1 : 1;
  for (int64_t i = 0; i < m; i++)
    u[i] *= s > 0 ? sign : 0;
  for (int64_t i = 0; i < n; i++)
    v[i] = s > 0 ? v[i] * sign / s : 0;
}

static int allocate(struct svd *x, int64_t m, int64_t n, int64_t r, struct err *e)
{
  *x = (struct svd){.m = m, .n = n, .r = r};
  x->u = calloc((size_t)(r * m) + 1, sizeof *x->u);
  x->s = calloc((size_t)r + 1, sizeof *x->s);
  x->v = calloc((size_t)(r * n) + 1, sizeof *x->v);
  if (x->u && x->s && x->v)
    return 0;
  svd_free(x);
  return err_set(e, E_NOMEM, "out of memory for a decomposition of %lldx%lld", (long long)m, (long long)n);
}

void svd_free(struct svd *x)
{
  free(x->u);
  free(x->s);
  free(x->v);
  *x = (struct svd){0};
}

/* Exact: rows w (k, len) = sum of s u v^T with u (k), v (len). w is used up. */
MUST_CHECK static int jacobi(struct svd *out, double *w, int64_t k, int64_t len, int64_t rank, struct err *e)
{
  double *j = calloc((size_t)(k * k) + 1, sizeof *j);
  struct order *order = calloc((size_t)k + 1, sizeof *order);
  int r = j && order ? allocate(out, k, len, rank, e) : err_set(e, E_NOMEM, "out of memory for a decomposition");

  if (r)
    goto out;
  for (int64_t i = 0; i < k; i++)
    j[i * k + i] = 1;
  orthogonalise(w, k, len, j);
  for (int64_t i = 0; i < k; i++)
    order[i] = (struct order){sqrt(dot(w + i * len, w + i * len, len)), i};
  qsort(order, (size_t)k, sizeof *order, falling);
  for (int64_t i = 0; i < rank; i++) {
    /* What rounding leaves of a zero is no direction. */
    double s = order[i].s > 1e-14 * order[0].s ? order[i].s : 0;

    out->s[i] = s;
    memcpy(out->u + i * k, j + order[i].row * k, (size_t)k * sizeof *j);
    memcpy(out->v + i * len, w + order[i].row * len, (size_t)len * sizeof *w);
    normalise(out->u + i * k, k, out->v + i * len, len, s);
  }
out:
  free(j);
  free(order);
  return r;
}

/* ---- larger ones ---- */

/* Orthonormal rows q from the rows of w (k, len), in place, Gram-Schmidt twice over; t (k, k) with w_before[i] = sum of t[i][p] q[p], or
 * NULL. What is no direction of its own becomes 0. */
static void orthonormalise(double *w, int64_t k, int64_t len, double *t)
{
  for (int64_t i = 0; i < k; i++) {
    double *x = w + i * len, before = sqrt(dot(x, x, len)), norm;

    for (int pass = 0; pass < 2; pass++)
      for (int64_t p = 0; p < i; p++) {
        double g = dot(x, w + p * len, len);

        for (int64_t c = 0; c < len; c++)
          x[c] -= g * w[p * len + c];
        if (t)
          t[i * k + p] += g;
      }
    norm = sqrt(dot(x, x, len));
    if (!(norm > 1e-13 * before))
      norm = 0;
    for (int64_t c = 0; c < len; c++)
      x[c] = norm > 0 ? x[c] / norm : 0;
    if (t)
      t[i * k + i] = norm;
  }
}

/* y (k, m) = x (k, n) a^T, a (m, n). */
static void times_rows(double *y, const double *x, const double *a, int64_t k, int64_t m, int64_t n)
{
  for (int64_t i = 0; i < m; i++)
    for (int64_t p = 0; p < k; p++)
      y[p * m + i] = dot(a + i * n, x + p * n, n);
}

/* y (k, n) = x (k, m) a, a (m, n). */
static void times_columns(double *y, const double *x, const double *a, int64_t k, int64_t m, int64_t n)
{
  memset(y, 0, (size_t)(k * n) * sizeof *y);
  for (int64_t i = 0; i < m; i++)
    for (int64_t p = 0; p < k; p++) {
      double g = x[p * m + i];

      for (int64_t c = 0; c < n; c++)
        y[p * n + c] += g * a[i * n + c];
    }
}

/* u of the core (r, k) back through the basis q (k, m): u (r, m). */
MUST_CHECK static int lift(struct svd *out, const double *q, int64_t k, int64_t m, struct err *e)
{
  double *u = calloc((size_t)(out->r * m) + 1, sizeof *u);

  if (!u)
    return err_set(e, E_NOMEM, "out of memory for a decomposition");
  times_columns(u, out->u, q, out->r, k, m);
  free(out->u);
  out->u = u;
  out->m = m;
  for (int64_t i = 0; i < out->r; i++) /* the largest element may have another sign here than in the core */
    normalise(out->u + i * m, m, out->v + i * out->n, out->n, out->s[i] > 0 ? 1 : 0);
  return 0;
}

/* Subspace iteration: the leading directions of a (m, n), then the exact decomposition of what a is within them. */
MUST_CHECK static int iterate(struct svd *out, const double *a, int64_t m, int64_t n, int64_t rank, struct err *e)
{
  int64_t least = m < n ? m : n, k = rank + SVD_SPARE < least ? rank + SVD_SPARE : least;
  double *q = calloc((size_t)(k * m), sizeof *q), *z = calloc((size_t)(k * n), sizeof *z);
  struct rng rng;
  int r = q && z ? 0 : err_set(e, E_NOMEM, "out of memory for a decomposition");

  if (r)
    goto out;
  rng_seed(&rng, 1);
  for (int64_t i = 0; i < k * n; i++)
    z[i] = (double)rng_u32(&rng) * 0x1p-31 - 1;
  for (int i = 0; i < ITERATIONS; i++) {
    times_rows(q, z, a, k, m, n);
    orthonormalise(q, k, m, NULL);
    times_columns(z, q, a, k, m, n);
    if (i < ITERATIONS - 1)
      orthonormalise(z, k, n, NULL);
  }
  r = jacobi(out, z, k, n, rank, e); /* q^T a = u s v^T */
  if (!r)
    r = lift(out, q, k, m, e);
out:
  free(q);
  free(z);
  if (r)
    svd_free(out);
  return r;
}

static void swap_sides(struct svd *x)
{
  double *u = x->u;
  int64_t m = x->m;

  x->u = x->v;
  x->v = u;
  x->m = x->n;
  x->n = m;
  for (int64_t i = 0; i < x->r; i++)
    normalise(x->u + i * x->m, x->m, x->v + i * x->n, x->n, x->s[i] > 0 ? 1 : 0);
}

int svd_dense(struct svd *out, const double *a, int64_t m, int64_t n, int64_t rank, struct err *e)
{
  int64_t least = m < n ? m : n;
  double *w, sum = 0;
  int r;

  *out = (struct svd){0};
  rank = rank < least ? rank : least;
  for (int64_t i = 0; i < m * n; i++)
    sum += a[i] * a[i];
  if (!isfinite(sum))
    return err_set(e, E_INTERNAL, "a weight change that is not finite cannot be decomposed");
  if (least > SVD_EXACT && rank + SVD_SPARE < least)
    return iterate(out, a, m, n, rank, e);
  w = malloc((size_t)(m * n) * sizeof *w + 1);
  if (!w)
    return err_set(e, E_NOMEM, "out of memory for a decomposition of %lldx%lld", (long long)m, (long long)n);
  for (int64_t i = 0; i < m; i++)
    for (int64_t c = 0; c < n; c++)
      w[m <= n ? i * n + c : c * m + i] = a[i * n + c];
  r = m <= n ? jacobi(out, w, m, n, rank, e) : jacobi(out, w, n, m, rank, e);
  if (!r && m > n)
    swap_sides(out);
  free(w);
  return r;
}

/* The product itself, where the factors are no thinner than it is. */
MUST_CHECK static int multiply_out(struct svd *out, const double *up, const double *down, int64_t m, int64_t R, int64_t n, int64_t rank,
                                   struct err *e)
{
  double *a = malloc((size_t)(m * n) * sizeof *a + 1);
  int r;

  if (!a)
    return err_set(e, E_NOMEM, "out of memory for a product of %lldx%lld", (long long)m, (long long)n);
  times_columns(a, up, down, m, R, n);
  r = svd_dense(out, a, m, n, rank, e);
  free(a);
  return r;
}

int svd_product(struct svd *out, const double *up, const double *down, int64_t m, int64_t R, int64_t n, int64_t rank, struct err *e)
{
  int64_t least = m < n ? m : n;
  double *q = NULL, *tq = NULL, *p = NULL, *tp = NULL, *core = NULL;
  struct svd x = {0};
  int r = 0;

  *out = (struct svd){0};
  if (R >= least)
    return multiply_out(out, up, down, m, R, n, rank, e);
  q = calloc((size_t)(R * m) + 1, sizeof *q);
  tq = calloc((size_t)(R * R) + 1, sizeof *tq);
  p = calloc((size_t)(R * n) + 1, sizeof *p);
  tp = calloc((size_t)(R * R) + 1, sizeof *tp);
  core = calloc((size_t)(R * R) + 1, sizeof *core);
  if (!q || !tq || !p || !tp || !core) {
    r = err_set(e, E_NOMEM, "out of memory for a decomposition");
    goto out;
  }
  for (int64_t i = 0; i < m; i++)
    for (int64_t k = 0; k < R; k++)
      q[k * m + i] = up[i * R + k];
  memcpy(p, down, (size_t)(R * n) * sizeof *p);
  orthonormalise(q, R, m, tq); /* up^T = tq q */
  orthonormalise(p, R, n, tp); /* down = tp p */
  /* up down = q^T (tq^T tp) p */
  for (int64_t k = 0; k < R; k++)
    for (int64_t i = 0; i < R; i++)
      for (int64_t c = 0; c < R; c++)
        core[i * R + c] += tq[k * R + i] * tp[k * R + c];
  r = svd_dense(&x, core, R, R, rank, e);
  if (!r)
    r = lift(&x, q, R, m, e);
  if (r)
    goto out;
  swap_sides(&x); /* lift works on u */
  r = lift(&x, p, R, n, e);
  if (r)
    goto out;
  swap_sides(&x);
  *out = x;
  x = (struct svd){0};
out:
  svd_free(&x);
  free(q);
  free(tq);
  free(p);
  free(tp);
  free(core);
  return r;
}

/* ---- what comes out ---- */

void svd_factors(const struct svd *x, int64_t rank, float *up, float *down)
{
  for (int64_t k = 0; k < rank; k++) {
    double root = sqrt(x->s[k]);

    for (int64_t i = 0; i < x->m; i++)
      up[i * rank + k] = (float)(root * x->u[k * x->m + i]);
    for (int64_t i = 0; i < x->n; i++)
      down[k * x->n + i] = (float)(root * x->v[k * x->n + i]);
  }
}

double svd_energy(const struct svd *x, int64_t rank)
{
  double sum = 0;

  for (int64_t k = 0; k < rank && k < x->r; k++)
    sum += x->s[k] * x->s[k];
  return sum;
}
