/*
 * adapter_forms.c - the algebra of each family of factors: a group of tensors becomes a delta in fp32.
 *
 *   LoRA   dW = s * up down                     LoCon  a core between them: down'[m, j, k] = sum_n mid[m, n, k] down[n, j]
 *   LoHa   dW = s * (1a 1b) o (2a 2b)           Tucker: each product is sum_ij t[i, j, k] a[i, p] b[j, q]
 *   LoKr   dW = s * kron(w1, w2)                each factor whole or a product; w2 perhaps with a core as in LoHa
 *   full   dW = diff                            overlay  W' = weight
 *   DoRA   W' = m * (W0 + dW) / |W0 + dW|       by output row or input column, whichever the magnitude's shape says
 *
 * Products are summed in double and rounded once. Shapes must be exactly the site's; trailing ones may be there or not.
 *
 * Called by adapter.c and adapter_inspect.c. Threads: pure functions. Sources: LyCORIS (functional/, modules/), kohya's sd-scripts,
 * PEFT (tuners/lora/dora.py), safety-methods of the formats in MODEL.md.
 */
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/half.h"
#include "models/adapter_impl.h"

/* ---- tensors ---- */

static int64_t count_of(const struct st_tensor *t)
{
  int64_t n = 1;
  int i;

  for (i = 0; i < t->nd; i++)
    n *= t->shape[i];
  return n;
}

/* Dimension i, 1 behind the last. */
static int64_t dim(const struct st_tensor *t, int i)
{
  return i < t->nd ? t->shape[i] : 1;
}

/* (a, b, kh, kw), trailing ones written or not. */
static int is_shape(const struct st_tensor *t, int64_t a, int64_t b, int64_t kh, int64_t kw)
{
  const int64_t want[ST_MAX_DIMS] = {a, b, kh, kw, 1, 1, 1, 1};
  int i;

  for (i = 0; i < ST_MAX_DIMS; i++)
    if (dim(t, i) != want[i])
      return 0;
  return t->nd > 0;
}

/* (a, b, kernel of the site), or the same flattened to (a, b*kh*kw). */
static int is_kernel(const struct st_tensor *t, int64_t a, int64_t b, const struct site *s)
{
  int64_t kh = s->kind == WEIGHT_CONV ? s->kh : 1, kw = s->kind == WEIGHT_CONV ? s->kw : 1;

  return is_shape(t, a, b, kh, kw) || is_shape(t, a, b * kh * kw, 1, 1);
}

static const char *shape_text(const struct st_tensor *t, char out[80])
{
  size_t n = 0;
  int i;

  out[0] = '\0';
  for (i = 0; i < t->nd && n < 60; i++)
    n += (size_t)snprintf(out + n, 80 - n, "%s%lld", i ? ", " : "", (long long)t->shape[i]);
  return out;
}

static int wrong_shape(const struct st_tensor *t, const struct site *s, struct err *e)
{
  char have[80];

  return adapter_fail(t, e, "has shape (%s), which does not fit %.80s (%lld, %lld%s)", shape_text(t, have), s->name, (long long)s->out,
                      (long long)s->in, s->kind == WEIGHT_CONV ? ", kernel" : "");
}

/* All numbers of t as fp32, finite; the caller frees them. */
static int read_floats(const struct st_tensor *t, float **out, struct err *e)
{
  const unsigned char *p = t->data;
  int64_t i, n = count_of(t), bad;
  uint16_t h;

  *out = NULL;
  if (t->type != ST_F32 && t->type != ST_F16 && t->type != ST_BF16)
    return adapter_fail(t, e, "has the type %s; F32, F16 or BF16 are read", st_dtype_name(t->type));
  bad = st_nonfinite(t);
  if (bad >= 0)
    return adapter_fail(t, e, "holds a value that is not finite at %lld", (long long)bad);
  *out = malloc((size_t)n * sizeof **out + 1);
  if (!*out)
    return err_set(e, E_NOMEM, "no memory for \"%.120s\"", t->name);
  if (t->type == ST_F32)
    memcpy(*out, p, (size_t)n * sizeof **out);
  for (i = 0; i < n && t->type != ST_F32; i++) {
    memcpy(&h, p + 2 * i, sizeof h);
    (*out)[i] = t->type == ST_F16 ? f16_to_f32(h) : bf16_to_f32(h);
  }
  return 0;
}

static int new_floats(int64_t n, const struct site *s, float **out, struct err *e)
{
  *out = calloc((size_t)n + 1, sizeof **out);
  return *out ? 0 : err_set(e, E_NOMEM, "no memory for what an adapter does to %.100s", s->name);
}

static int check_rank(const struct st_tensor *t, int64_t r, const struct adapter_bounds *b, struct err *e)
{
  if (r < 1 || r > b->max_rank)
    return adapter_fail(t, e, "gives its layer rank %lld; 1 to %lld are allowed", (long long)r, (long long)b->max_rank);
  return 0;
}

/* A product that left the range of fp32. */
static int check_finite(const float *p, int64_t n, const struct st_tensor *t, struct err *e)
{
  int64_t i;

  for (i = 0; i < n; i++)
    if (!isfinite(p[i]))
      return adapter_fail(t, e, "and its partners multiply to a value that is not finite");
  return 0;
}

/* ---- products ---- */

/* c (m, n) = a (m, k) b (k, n). */
static void multiply(float *c, const float *a, const float *b, int64_t m, int64_t k, int64_t n)
{
  enum { CHUNK = 256 };
  double sum[CHUNK];
  int64_t i, j, l, at, w;

  for (i = 0; i < m; i++)
    for (at = 0; at < n; at += CHUNK) {
      w = n - at < CHUNK ? n - at : CHUNK;
      memset(sum, 0, sizeof sum);
      for (l = 0; l < k; l++)
        for (j = 0; j < w; j++)
          sum[j] += (double)a[i * k + l] * b[l * n + at + j];
      for (j = 0; j < w; j++)
        c[i * n + at + j] = (float)sum[j];
    }
}

/* c (p, q*taps) = sum over i, j of core (r, r, taps)[i, j, k] a (r, p)[i, p] b (r, q)[j, q]. t is scratch of r*q*taps. */
static void multiply_core(float *c, const float *core, const float *a, const float *b, float *t, int64_t r, int64_t p, int64_t q,
                          int64_t taps)
{
  int64_t i, j, k, l;
  double sum;

  for (i = 0; i < r; i++) /* t (r, q*taps) */
    for (l = 0; l < q; l++)
      for (k = 0; k < taps; k++) {
        sum = 0;
        for (j = 0; j < r; j++)
          sum += (double)core[(i * r + j) * taps + k] * b[j * q + l];
        t[(i * q + l) * taps + k] = (float)sum;
      }
  for (i = 0; i < p; i++)
    for (k = 0; k < q * taps; k++) {
      sum = 0;
      for (j = 0; j < r; j++)
        sum += (double)a[j * p + i] * t[j * q * taps + k];
      c[i * q * taps + k] = (float)sum;
    }
}

/* ---- LoRA and LoCon ---- */

/* down (r, in) with the core (r, r, taps) becomes (r, in*taps). */
static int fold_core(struct delta *d, const struct adapter_group *g, const struct site *s, struct err *e)
{
  const struct st_tensor *mid = g->part[ROLE_MID];
  int64_t taps = site_taps(s), r = d->rank;
  float *core = NULL, *down = NULL;
  int code = read_floats(mid, &core, e);
  int64_t m, n, j, k;

  if (!code)
    code = new_floats(r * s->in * taps, s, &down, e);
  for (m = 0; m < r && !code; m++)
    for (j = 0; j < s->in; j++)
      for (k = 0; k < taps; k++) {
        double sum = 0;

        for (n = 0; n < r; n++)
          sum += (double)core[(m * r + n) * taps + k] * d->down[n * s->in + j];
        down[(m * s->in + j) * taps + k] = (float)sum;
      }
  if (!code)
    code = check_finite(down, r * s->in * taps, mid, e);
  free(core);
  if (code) {
    free(down);
    return code;
  }
  free(d->down);
  d->down = down;
  return 0;
}

static int build_lora(struct delta *d, const struct adapter_group *g, const struct site *s, const struct adapter_bounds *b,
                      struct err *e)
{
  const struct st_tensor *down = g->part[ROLE_DOWN], *up = g->part[ROLE_UP], *mid = g->part[ROLE_MID];
  int64_t r = dim(down, 0), taps = site_taps(s);
  int code = check_rank(down, r, b, e);

  if (code)
    return code;
  if (mid ? !is_shape(down, r, s->in, 1, 1) : !is_kernel(down, r, s->in, s))
    return wrong_shape(down, s, e);
  if (!is_shape(up, s->out, r, 1, 1))
    return wrong_shape(up, s, e);
  if (mid && (taps == 1 ? !is_shape(mid, r, r, 1, 1) : !is_shape(mid, r, r, s->kh, s->kw)))
    return wrong_shape(mid, s, e);
  d->kind = DELTA_LOWRANK;
  d->rank = r;
  code = read_floats(down, &d->down, e);
  if (!code)
    code = read_floats(up, &d->up, e);
  if (!code && mid)
    code = fold_core(d, g, s, e);
  return code;
}

/* A product of two factors, or with a core between them, as it is in the file: a (rows, r) b (r, cols*taps), or core, a (r, rows) and b (r, cols). The
 * shapes are checked. *out (rows, cols*taps) is the caller's, also after failure. */
static int read_product(float **out, const struct st_tensor *a, const struct st_tensor *b, const struct st_tensor *core, int64_t r, int64_t rows,
                        int64_t cols, int64_t taps, const struct site *s, struct err *e)
{
  float *fa = NULL, *fb = NULL, *fc = NULL, *t = NULL;
  int code = read_floats(a, &fa, e);

  if (!code)
    code = read_floats(b, &fb, e);
  if (!code && core)
    code = read_floats(core, &fc, e);
  if (!code && core)
    code = new_floats(r * cols * taps, s, &t, e);
  if (!code)
    code = new_floats(rows * cols * taps, s, out, e);
  if (!code && core)
    multiply_core(*out, fc, fa, fb, t, r, rows, cols, taps);
  else if (!code)
    multiply(*out, fa, fb, rows, r, cols * taps);
  free(fa);
  free(fb);
  free(fc);
  free(t);
  return code;
}

/* ---- LoHa ---- */

/* One of the two products, as (out, cols). */
static int hada_product(float **out, const struct st_tensor *a, const struct st_tensor *b, const struct st_tensor *core, int64_t r,
                        const struct site *s, struct err *e)
{
  int64_t taps = site_taps(s);

  if (core ? !is_shape(a, r, s->out, 1, 1) : !is_shape(a, s->out, r, 1, 1))
    return wrong_shape(a, s, e);
  if (core ? !is_shape(b, r, s->in, 1, 1) : !is_kernel(b, r, s->in, s))
    return wrong_shape(b, s, e);
  if (core && (taps == 1 ? !is_shape(core, r, r, 1, 1) : !is_shape(core, r, r, s->kh, s->kw)))
    return wrong_shape(core, s, e);
  return read_product(out, a, b, core, r, s->out, s->in, taps, s, e);
}

static int build_loha(struct delta *d, const struct adapter_group *g, const struct site *s, const struct adapter_bounds *b, int64_t *r,
                      struct err *e)
{
  const struct st_tensor *first = g->part[ROLE_HADA_1B];
  int64_t i, n = s->out * site_columns(s);
  float *other = NULL;
  int code;

  *r = dim(first, 0);
  code = check_rank(first, *r, b, e);
  if (!code)
    code = hada_product(&d->dense, g->part[ROLE_HADA_1A], first, g->part[ROLE_HADA_T1], *r, s, e);
  if (!code)
    code = hada_product(&other, g->part[ROLE_HADA_2A], g->part[ROLE_HADA_2B], g->part[ROLE_HADA_T2], *r, s, e);
  for (i = 0; i < n && !code; i++)
    d->dense[i] *= other[i];
  free(other);
  d->kind = DELTA_DENSE;
  return code ? code : check_finite(d->dense, n, first, e);
}

/* ---- LoKr ---- */

/* A factor of the Kronecker product: (rows, cols*taps), whole. */
struct kron {
  float *p;
  int64_t rows, cols, rank; /* rank 0: it was stored whole */
};

/* whole, or a times b, or those with a core. taps: of the kernel that this factor carries. */
static int kron_factor(struct kron *k, const struct st_tensor *whole, const struct st_tensor *a, const struct st_tensor *b,
                       const struct st_tensor *core, int64_t taps, const struct site *s, const struct adapter_bounds *bounds, struct err *e)
{
  int64_t width;
  int code;

  if (whole) {
    k->rows = dim(whole, 0);
    width = k->rows ? count_of(whole) / k->rows : 0;
    k->cols = width / taps;
    if (!k->rows || !k->cols || !(taps == 1 ? is_shape(whole, k->rows, k->cols, 1, 1) : is_kernel(whole, k->rows, k->cols, s)))
      return wrong_shape(whole, s, e);
    return read_floats(whole, &k->p, e);
  }
  k->rank = dim(b, 0);
  code = check_rank(b, k->rank, bounds, e);
  if (code)
    return code;
  k->rows = core ? dim(a, 1) : dim(a, 0);
  k->cols = count_of(b) / k->rank / (core ? 1 : taps);
  if (!k->rows || !is_shape(a, core ? k->rank : k->rows, core ? k->rows : k->rank, 1, 1))
    return wrong_shape(a, s, e);
  if (!k->cols || !(core || taps == 1 ? is_shape(b, k->rank, k->cols, 1, 1) : is_kernel(b, k->rank, k->cols, s)))
    return wrong_shape(b, s, e);
  if (core && (taps == 1 ? !is_shape(core, k->rank, k->rank, 1, 1) : !is_shape(core, k->rank, k->rank, s->kh, s->kw)))
    return wrong_shape(core, s, e);
  if (k->rows > s->out || k->cols > s->in) /* bounds the product before it is taken */
    return wrong_shape(a, s, e);
  return read_product(&k->p, a, b, core, k->rank, k->rows, k->cols, taps, s, e);
}

static int build_lokr(struct delta *d, const struct adapter_group *g, const struct site *s, const struct adapter_bounds *b, int64_t *r,
                      struct err *e)
{
  const struct st_tensor *first = g->part[ROLE_KRON_1] ? g->part[ROLE_KRON_1] : g->part[ROLE_KRON_1A];
  const struct st_tensor *second = g->part[ROLE_KRON_2] ? g->part[ROLE_KRON_2] : g->part[ROLE_KRON_2A];
  struct kron one = {0}, two = {0};
  int64_t taps = site_taps(s), cols = site_columns(s), i, j, p, q;
  int code = kron_factor(&one, g->part[ROLE_KRON_1], g->part[ROLE_KRON_1A], g->part[ROLE_KRON_1B], NULL, 1, s, b, e);

  if (!code)
    code = kron_factor(&two, g->part[ROLE_KRON_2], g->part[ROLE_KRON_2A], g->part[ROLE_KRON_2B], g->part[ROLE_KRON_T2], taps, s, b, e);
  if (!code && (one.rows > s->out || one.rows * two.rows != s->out || one.cols > s->in || one.cols * two.cols != s->in))
    code = wrong_shape(second, s, e);
  if (!code && one.rank && two.rank && one.rank != two.rank)
    code = adapter_fail(first, e, "has rank %lld where w2 has %lld: the scale is not defined", (long long)one.rank, (long long)two.rank);
  if (!code)
    code = new_floats(s->out * cols, s, &d->dense, e);
  for (i = 0; i < one.rows && !code; i++) /* kron: blocks of w2, one per number of w1 */
    for (j = 0; j < one.cols; j++)
      for (p = 0; p < two.rows; p++)
        for (q = 0; q < two.cols * taps; q++)
          d->dense[(i * two.rows + p) * cols + j * two.cols * taps + q] =
              (float)((double)one.p[i * one.cols + j] * two.p[p * two.cols * taps + q]);
  *r = one.rank ? one.rank : two.rank;
  d->kind = DELTA_DENSE;
  free(one.p);
  free(two.p);
  return code ? code : check_finite(d->dense, s->out * cols, first, e);
}

/* ---- full differences and overlays ---- */

static int build_whole(struct delta *d, const struct st_tensor *t, const struct site *s, struct err *e)
{
  if (!t) /* a bias alone */
    return new_floats(s->out * site_columns(s), s, &d->dense, e);
  if (s->kind == WEIGHT_NORM ? !is_shape(t, s->out, 1, 1, 1) : !is_kernel(t, s->out, s->in, s))
    return wrong_shape(t, s, e);
  return read_floats(t, &d->dense, e);
}

static int build_bias(struct delta *d, const struct st_tensor *t, const struct site *s, struct err *e)
{
  if (!s->has_bias)
    return adapter_fail(t, e, "is a bias, but %.80s has none", s->name);
  if (!is_shape(t, s->out, 1, 1, 1))
    return wrong_shape(t, s, e);
  return read_floats(t, &d->bias, e);
}

/* ---- DoRA ---- */

/* PEFT: one magnitude per output row; stored (out), for a convolution (1, out, 1, 1). LyCORIS: (1, in, ...) per input column, or
 * (out, 1, ...) per row when trained with wd_on_out. */
static int build_magnitude(struct delta *d, const struct adapter_group *g, const struct site *s, struct err *e)
{
  const struct st_tensor *t = g->part[ROLE_MAGNITUDE];
  int64_t i, n;
  int code;

  if (t) {
    if (!is_shape(t, s->out, 1, 1, 1) && !is_shape(t, 1, s->out, 1, 1))
      return wrong_shape(t, s, e);
    d->magnitude_per_row = 1;
  } else {
    t = g->part[ROLE_DORA_SCALE];
    d->magnitude_per_row = t->nd >= 2 && is_shape(t, s->out, 1, 1, 1);
    if (t->nd < 2 || (!d->magnitude_per_row && !is_shape(t, 1, s->in, 1, 1)))
      return wrong_shape(t, s, e);
  }
  d->kind = DELTA_DORA;
  code = read_floats(t, &d->magnitude, e);
  n = d->magnitude_per_row ? s->out : s->in;
  for (i = 0; i < n && !code; i++)
    if (d->magnitude[i] < 0)
      code = adapter_fail(t, e, "holds a negative magnitude at %lld", (long long)i);
  return code;
}

/* ---- all ---- */

static int build_family(struct delta *d, const struct adapter_group *g, const struct site *s, const struct adapter_bounds *b, int64_t *r,
                        struct err *e)
{
  int code = 0;

  if (s->kind == WEIGHT_NORM && g->family != FAMILY_FULL && g->family != FAMILY_OVERLAY)
    return err_field(e, E_FILE, s->name, "%s is a norm, which has no %s factors", s->name, adapter_family_name(g->family));
  switch (g->family) {
  case FAMILY_LORA:
    code = build_lora(d, g, s, b, e);
    *r = d->rank;
    break;
  case FAMILY_LOHA:
    code = build_loha(d, g, s, b, r, e);
    break;
  case FAMILY_LOKR:
    code = build_lokr(d, g, s, b, r, e);
    break;
  case FAMILY_FULL:
    d->kind = DELTA_DENSE;
    code = build_whole(d, g->part[ROLE_DIFF], s, e);
    break;
  case FAMILY_OVERLAY:
  case FAMILIES:
    d->kind = DELTA_REPLACE;
    code = build_whole(d, g->part[ROLE_WEIGHT], s, e);
    break;
  }
  return code;
}

int adapter_delta_build(struct delta *d, const struct adapter_group *g, const struct site *s, const struct adapter_scale *scale,
                        const struct adapter_bounds *b, struct err *e)
{
  const struct st_tensor *bias = g->part[ROLE_DIFF_B] ? g->part[ROLE_DIFF_B] : g->part[ROLE_BIAS];
  int64_t i, r = 0;
  int code;

  *d = (struct delta){.site = g->site, .norm = -1};
  code = build_family(d, g, s, b, &r, e);
  if (!code)
    code = adapter_scale_find(scale, g, s, r, &d->scale, &d->rule, e);
  if (!code && (bias || g->part[ROLE_UP_BIAS]))
    code = build_bias(d, bias ? bias : g->part[ROLE_UP_BIAS], s, e);
  for (i = 0; i < s->out && !code && g->part[ROLE_UP_BIAS]; i++) /* PEFT scales it like the factors */
    d->bias[i] *= d->scale;
  if (!code && (g->part[ROLE_DORA_SCALE] || g->part[ROLE_MAGNITUDE]))
    code = build_magnitude(d, g, s, e);
  if (!code && (d->kind == DELTA_LOWRANK || d->kind == DELTA_DENSE)) {
    d->norm = delta_norm(d, s, NULL);
    if (!(d->norm <= FLT_MAX)) /* then every number of dW is within fp32 */
      code = err_field(e, E_FILE, s->name, "what the adapter does to %.100s is not finite", s->name);
  }
  return code;
}

void adapter_delta_free(struct delta *d)
{
  free(d->down);
  free(d->up);
  free(d->dense);
  free(d->bias);
  free(d->magnitude);
  *d = (struct delta){0};
}
