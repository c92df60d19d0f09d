/*
 * vendor_blas.c - blas.h on cuBLASLt.
 *
 * y (rows, out) row by row is y^T (out, rows) column by column, so that the product is W (op T) times x^T with bias along the columns: the
 * BIAS epilogue, and the residual as C with beta = 1.
 *
 * The algorithm of a class is what the heuristics like best for two pictures, with split sums and reductions excluded, and serves every count of
 * pictures: the tile, and with it the order of each sum, stays. Nothing here was timed on a card yet.
 *
 * Threads: see blas.h.
 */
#include "kernels/cuda/blas.h"

#include <cublasLt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { WORKSPACE = 32 << 20, ASKED = 16 };

/* What a product is known by; memcmp compares, so that it is zeroed before it is filled. */
struct class_key {
  int64_t picture_rows, out, in;
  int act, y_type, has_bias, has_residual;
};

struct product {
  struct class_key key;
  int64_t rows;
  cublasLtMatmulDesc_t op;
  cublasLtMatrixLayout_t a, b, d; /* W, x, y; C is laid out as y */
  cublasLtMatmulAlgo_t algo;
  struct product *next;
};

struct class_algo {
  struct class_key key;
  cublasLtMatmulAlgo_t algo;
  struct class_algo *next;
};

struct gpu_blas {
  cublasLtHandle_t handle;
  void *workspace;
  struct product *products;
  struct class_algo *classes;
};

MUST_CHECK static int check(cublasStatus_t s, const char *what, struct err *e)
{
  if (s == CUBLAS_STATUS_SUCCESS)
    return 0;
  return err_set(e, s == CUBLAS_STATUS_ALLOC_FAILED ? E_NOMEM : E_DEVICE, "cuBLASLt: %s: %s", what, cublasLtGetStatusString(s));
}

int gpu_blas_open(struct gpu_blas **out, struct err *e)
{
  struct gpu_blas *b = calloc(1, sizeof *b);
  int r;

  *out = NULL;
  if (!b)
    return err_set(e, E_NOMEM, "out of memory for cuBLASLt");
  r = check(cublasLtCreate(&b->handle), "opening", e);
  if (!r && cudaMalloc(&b->workspace, WORKSPACE)) {
    (void)cudaGetLastError();
    r = err_set(e, E_NOMEM, "no memory on the GPU for cuBLASLt");
  }
  if (r) {
    gpu_blas_close(b);
    return r;
  }
  *out = b;
  return 0;
}

static void product_free(struct product *p)
{
  cublasLtMatrixLayoutDestroy(p->a);
  cublasLtMatrixLayoutDestroy(p->b);
  cublasLtMatrixLayoutDestroy(p->d);
  cublasLtMatmulDescDestroy(p->op);
  free(p);
}

void gpu_blas_close(struct gpu_blas *b)
{
  if (!b)
    return;
  for (struct product *p = b->products, *next; p; p = next) {
    next = p->next;
    product_free(p);
  }
  for (struct class_algo *c = b->classes, *next; c; c = next) {
    next = c->next;
    free(c);
  }
  (void)cudaFree(b->workspace);
  if (b->handle)
    cublasLtDestroy(b->handle);
  free(b);
}

void gpu_blas_version(char *text, size_t size)
{
  size_t v = cublasLtGetVersion();

  snprintf(text, size, "cuBLASLt %zu.%zu.%zu", v / 10000, v / 100 % 100, v % 100);
}

static cudaDataType_t type_of(int t)
{
  return t == DT_F32 ? CUDA_R_32F : t == DT_F16 ? CUDA_R_16F : CUDA_R_16BF;
}

/* Descriptor and layouts for so many rows. */
MUST_CHECK static int describe(struct product *p, int64_t rows, struct err *e)
{
  const struct class_key *k = &p->key;
  cudaDataType_t io = type_of(k->act), out = type_of(k->y_type);
  cublasOperation_t t = CUBLAS_OP_T;
  cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_BIAS;
  int r;

  p->rows = rows;
  if ((r = check(cublasLtMatmulDescCreate(&p->op, CUBLAS_COMPUTE_32F, CUDA_R_32F), "a product", e)) ||
      (r = check(cublasLtMatmulDescSetAttribute(p->op, CUBLASLT_MATMUL_DESC_TRANSA, &t, sizeof t), "a product", e)))
    return r;
  if (k->has_bias &&
      ((r = check(cublasLtMatmulDescSetAttribute(p->op, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof epilogue), "a bias", e)) ||
       (r = check(cublasLtMatmulDescSetAttribute(p->op, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, &out, sizeof out), "a bias", e))))
    return r;
  if ((r = check(cublasLtMatrixLayoutCreate(&p->a, io, (uint64_t)k->in, (uint64_t)k->out, k->in), "a layout", e)) ||
      (r = check(cublasLtMatrixLayoutCreate(&p->b, io, (uint64_t)k->in, (uint64_t)rows, k->in), "a layout", e)))
    return r;
  return check(cublasLtMatrixLayoutCreate(&p->d, out, (uint64_t)k->out, (uint64_t)rows, k->out), "a layout", e);
}

/* The best algorithm for what p describes that splits no sum. */
MUST_CHECK static int ask(struct gpu_blas *b, const struct product *p, cublasLtMatmulAlgo_t *algo, struct err *e)
{
  const struct class_key *k = &p->key;
  cublasLtMatmulHeuristicResult_t found[ASKED];
  cublasLtMatmulPreference_t pref = NULL;
  uint32_t none = CUBLASLT_REDUCTION_SCHEME_NONE, align = k->in % 8 == 0 && k->out % 8 == 0 ? 16 : 2;
  size_t workspace = WORKSPACE;
  int n = 0, r;

  if ((r = check(cublasLtMatmulPreferenceCreate(&pref), "a preference", e)) ||
      (r = check(cublasLtMatmulPreferenceSetAttribute(pref, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace, sizeof workspace), "a preference", e)) ||
      (r = check(cublasLtMatmulPreferenceSetAttribute(pref, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &none, sizeof none), "a preference", e)) ||
      (r = check(cublasLtMatmulPreferenceSetAttribute(pref, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &align, sizeof align), "a preference", e)) ||
      (r = check(cublasLtMatmulPreferenceSetAttribute(pref, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &align, sizeof align), "a preference", e)) ||
      (r = check(cublasLtMatmulPreferenceSetAttribute(pref, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &align, sizeof align), "a preference", e)) ||
      (r = check(cublasLtMatmulPreferenceSetAttribute(pref, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &align, sizeof align), "a preference", e)) ||
      (r = check(cublasLtMatmulAlgoGetHeuristic(b->handle, p->op, p->a, p->b, p->d, p->d, pref, ASKED, found, &n), "the choice of an algorithm", e)))
    goto out;
  r = 1;
  for (int i = 0; i < n && r; i++) {
    uint32_t split = 1;

    if (found[i].state == CUBLAS_STATUS_SUCCESS &&
        cublasLtMatmulAlgoConfigGetAttribute(&found[i].algo, CUBLASLT_ALGO_CONFIG_SPLITK_NUM, &split, sizeof split, NULL) == CUBLAS_STATUS_SUCCESS &&
        split <= 1) {
      *algo = found[i].algo;
      r = 0;
    }
  }
  if (r)
    r = err_set(e, E_DEVICE, "cuBLASLt has no algorithm without split sums for %lld>%lld", (long long)k->in, (long long)k->out);
out:
  if (pref)
    cublasLtMatmulPreferenceDestroy(pref);
  return r;
}

/* The algorithm of a class, chosen on its first sight. */
MUST_CHECK static int class_of(struct gpu_blas *b, const struct class_key *k, cublasLtMatmulAlgo_t *algo, struct err *e)
{
  struct class_algo *c = b->classes;
  struct product *canon;
  int r;

  while (c && memcmp(&c->key, k, sizeof *k))
    c = c->next;
  if (c) {
    *algo = c->algo;
    return 0;
  }
  c = calloc(1, sizeof *c);
  canon = calloc(1, sizeof *canon);
  if (!c || !canon) {
    free(c);
    free(canon);
    return err_set(e, E_NOMEM, "out of memory for an algorithm");
  }
  c->key = canon->key = *k;
  r = describe(canon, 2 * k->picture_rows, e);
  if (!r)
    r = ask(b, canon, &c->algo, e);
  product_free(canon);
  if (r) {
    free(c);
    return r;
  }
  c->next = b->classes;
  b->classes = c;
  *algo = c->algo;
  return 0;
}

MUST_CHECK static int product_of(struct gpu_blas *b, const struct class_key *k, int64_t rows, struct product **out, struct err *e)
{
  struct product *p = b->products;
  int r;

  while (p && (p->rows != rows || memcmp(&p->key, k, sizeof *k)))
    p = p->next;
  *out = p;
  if (p)
    return 0;
  p = calloc(1, sizeof *p);
  if (!p)
    return err_set(e, E_NOMEM, "out of memory for a product");
  p->key = *k;
  r = class_of(b, k, &p->algo, e);
  if (!r)
    r = describe(p, rows, e);
  if (r) {
    product_free(p);
    return r;
  }
  p->next = b->products;
  b->products = p;
  *out = p;
  return 0;
}

int gpu_blas_linear(struct gpu_blas *b, cudaStream_t s, const struct gpu_linear *l, struct err *e)
{
  static const float one = 1, zero = 0;
  struct class_key k;
  struct product *p;
  int r;

  memset(&k, 0, sizeof k);
  k.picture_rows = l->picture_rows;
  k.out = l->out;
  k.in = l->in;
  k.act = (int)l->act;
  k.y_type = (int)l->y_type;
  k.has_bias = l->bias != NULL;
  k.has_residual = l->residual != NULL;
  r = product_of(b, &k, l->rows, &p, e);
  if (!r && l->bias)
    r = check(cublasLtMatmulDescSetAttribute(p->op, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &l->bias, sizeof l->bias), "a bias", e);
  if (r)
    return r;
  return check(cublasLtMatmul(b->handle, p->op, &one, l->w, p->a, l->x, p->b, l->residual ? &one : &zero, l->residual ? l->residual : l->y, p->d,
                              l->y, p->d, &p->algo, b->workspace, WORKSPACE, s),
               "a product", e);
}
