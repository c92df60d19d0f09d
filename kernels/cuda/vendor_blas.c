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

#include "kernels/cuda/cuda.h"
#include "kernels/cuda/plans.h"

enum { ASKED = 16 };

/* What a product is known by; memcmp compares, so that it is zeroed before it is filled. */
struct class_key {
  int64_t picture_rows, out, in;
  int act, y_type, has_bias, has_residual;
};

_Static_assert(sizeof(struct class_key) % 8 == 0, "hashed by words of eight");

struct product_key {
  struct class_key class;
  int64_t rows;
};

enum { MOST_PRODUCTS = 4096, MOST_CLASSES = 4096 };

struct product {
  cublasLtMatmulDesc_t op;
  cublasLtMatrixLayout_t a, b, d; /* W, x, y; C is laid out as y */
  cublasLtMatmulAlgo_t algo;
};

struct gpu_blas {
  cublasLtHandle_t handle;
  void *workspace;
  struct plans products;        /* struct product by product_key: descriptions of the host, which no kernel reads */
  struct plans classes;         /* cublasLtMatmulAlgo_t by class_key */
};

MUST_CHECK static int check(cublasStatus_t s, const char *what, struct err *e)
{
  if (s == CUBLAS_STATUS_SUCCESS)
    return 0;
  return err_set(e, s == CUBLAS_STATUS_ALLOC_FAILED ? E_NOMEM : s == CUBLAS_STATUS_NOT_SUPPORTED || s == CUBLAS_STATUS_INVALID_VALUE ? E_INTERNAL : E_DEVICE,
                 "cuBLASLt: %s: %s", what, cublasLtGetStatusString(s));
}

static void product_free(struct product *p)
{
  cublasLtMatrixLayoutDestroy(p->a);
  cublasLtMatrixLayoutDestroy(p->b);
  cublasLtMatrixLayoutDestroy(p->d);
  cublasLtMatmulDescDestroy(p->op);
  free(p);
}

static void drop_product(void *value)
{
  product_free(value);
}

int gpu_blas_open(struct gpu_blas **out, struct err *e)
{
  struct gpu_blas *b = calloc(1, sizeof *b);
  int r;

  *out = NULL;
  if (!b)
    return err_set(e, E_NOMEM, "out of memory for cuBLASLt");
  plans_init(&b->products, sizeof(struct product_key), MOST_PRODUCTS, drop_product);
  plans_init(&b->classes, sizeof(struct class_key), MOST_CLASSES, free);
  r = check(cublasLtCreate(&b->handle), "opening", e);
  if (!r)
    r = cuda_check(cudaMalloc(&b->workspace, GPU_BLAS_WORKSPACE), "working memory for cuBLASLt", e);
  if (r) {
    gpu_blas_close(b);
    return r;
  }
  *out = b;
  return 0;
}

void gpu_blas_close(struct gpu_blas *b)
{
  if (!b)
    return;
  plans_clear(&b->products);
  plans_clear(&b->classes);
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
MUST_CHECK static int describe(struct product *p, const struct class_key *k, int64_t rows, struct err *e)
{
  cudaDataType_t io = type_of(k->act), out = type_of(k->y_type);
  cublasOperation_t t = CUBLAS_OP_T;
  cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_BIAS;
  int r;

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

/* The best algorithm within so much working memory that splits no sum; *is_found 0: there is none. */
MUST_CHECK static int ask_within(struct gpu_blas *b, const struct product *p, cublasLtMatmulPreference_t pref, size_t workspace, cublasLtMatmulAlgo_t *algo,
                                 int *is_found, struct err *e)
{
  cublasLtMatmulHeuristicResult_t found[ASKED];
  cublasStatus_t status;
  int n = 0, r;

  *is_found = 0;
  r = check(cublasLtMatmulPreferenceSetAttribute(pref, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace, sizeof workspace), "a preference", e);
  if (r)
    return r;
  status = cublasLtMatmulAlgoGetHeuristic(b->handle, p->op, p->a, p->b, p->d, p->d, pref, ASKED, found, &n);
  if (status == CUBLAS_STATUS_NOT_SUPPORTED)
    return 0;
  r = check(status, "the choice of an algorithm", e);
  for (int i = 0; !r && i < n && !*is_found; i++) {
    uint32_t split = 1;

    if (found[i].state == CUBLAS_STATUS_SUCCESS &&
        cublasLtMatmulAlgoConfigGetAttribute(&found[i].algo, CUBLASLT_ALGO_CONFIG_SPLITK_NUM, &split, sizeof split, NULL) == CUBLAS_STATUS_SUCCESS &&
        split <= 1) {
      *algo = found[i].algo;
      *is_found = 1;
    }
  }
  return r;
}

/* The best algorithm for what p describes that splits no sum. First of those that work in no memory: one that does might keep partial sums there, of as many
 * tiles as the count of rows leaves over, as cuDNN's do (see vendor_graph.c). */
MUST_CHECK static int ask(struct gpu_blas *b, const struct product *p, const struct class_key *k, cublasLtMatmulAlgo_t *algo, struct err *e)
{
  cublasLtMatmulPreference_t pref = NULL;
  uint32_t none = CUBLASLT_REDUCTION_SCHEME_NONE, align = k->in % 8 == 0 && k->out % 8 == 0 ? 16 : 2;
  int is_found = 0, r;

  if ((r = check(cublasLtMatmulPreferenceCreate(&pref), "a preference", e)) ||
      (r = check(cublasLtMatmulPreferenceSetAttribute(pref, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &none, sizeof none), "a preference", e)) ||
      (r = check(cublasLtMatmulPreferenceSetAttribute(pref, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &align, sizeof align), "a preference", e)) ||
      (r = check(cublasLtMatmulPreferenceSetAttribute(pref, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &align, sizeof align), "a preference", e)) ||
      (r = check(cublasLtMatmulPreferenceSetAttribute(pref, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &align, sizeof align), "a preference", e)) ||
      (r = check(cublasLtMatmulPreferenceSetAttribute(pref, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &align, sizeof align), "a preference", e)))
    goto out;
  r = ask_within(b, p, pref, 0, algo, &is_found, e);
  if (!r && !is_found)
    r = ask_within(b, p, pref, GPU_BLAS_WORKSPACE, algo, &is_found, e);
  if (!r && !is_found)
    r = err_set(e, E_INTERNAL, "cuBLASLt has no algorithm without split sums for %lld>%lld", (long long)k->in, (long long)k->out);
out:
  if (pref)
    cublasLtMatmulPreferenceDestroy(pref);
  return r;
}

/* The algorithm of a class, chosen on its first sight. */
MUST_CHECK static int class_of(struct gpu_blas *b, const struct class_key *k, cublasLtMatmulAlgo_t *algo, struct err *e)
{
  const cublasLtMatmulAlgo_t *known = plans_find(&b->classes, k);
  cublasLtMatmulAlgo_t *chosen = NULL;
  struct product *canon = NULL;
  int r;

  if (known) {
    *algo = *known;
    return 0;
  }
  chosen = calloc(1, sizeof *chosen);
  canon = calloc(1, sizeof *canon);
  r = chosen && canon ? describe(canon, k, 2 * k->picture_rows, e) : err_set(e, E_NOMEM, "out of memory for an algorithm");
  if (!r)
    r = ask(b, canon, k, chosen, e);
  if (!r) {
    *algo = *chosen;
    r = plans_add(&b->classes, k, chosen, e);
  }
  if (r)
    free(chosen);
  if (canon)
    product_free(canon);
  return r;
}

MUST_CHECK static int product_of(struct gpu_blas *b, const struct product_key *k, struct product **out, struct err *e)
{
  struct product *p = plans_find(&b->products, k);
  int r;

  *out = p;
  if (p)
    return 0;
  p = calloc(1, sizeof *p);
  if (!p)
    return err_set(e, E_NOMEM, "out of memory for a product");
  r = class_of(b, &k->class, &p->algo, e);
  if (!r)
    r = describe(p, &k->class, k->rows, e);
  if (!r)
    r = plans_add(&b->products, k, p, e);
  if (r) {
    product_free(p);
    return r;
  }
  *out = p;
  return 0;
}

/* The product of a call. */
MUST_CHECK static int product_for(struct gpu_blas *b, const struct gpu_linear *l, struct product **p, struct err *e)
{
  struct product_key k;

  memset(&k, 0, sizeof k);
  k.rows = l->rows;
  k.class.picture_rows = l->picture_rows;
  k.class.out = l->out;
  k.class.in = l->in;
  k.class.act = (int)l->act;
  k.class.y_type = (int)l->y_type;
  k.class.has_bias = l->bias != NULL;
  k.class.has_residual = l->residual != NULL;
  return product_of(b, &k, p, e);
}

int gpu_blas_ready(struct gpu_blas *b, const struct gpu_linear *l, struct err *e)
{
  struct product *p;

  return product_for(b, l, &p, e);
}

int gpu_blas_linear(struct gpu_blas *b, cudaStream_t s, const struct gpu_linear *l, struct err *e)
{
  static const float one = 1, zero = 0;
  struct product *p;
  int r = product_for(b, l, &p, e);

  if (!r && l->bias)
    r = check(cublasLtMatmulDescSetAttribute(p->op, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &l->bias, sizeof l->bias), "a bias", e);
  if (r)
    return r;
  return check(cublasLtMatmul(b->handle, p->op, &one, l->w, p->a, l->x, p->b, l->residual ? &one : &zero, l->residual ? l->residual : l->y, p->d,
                              l->y, p->d, &p->algo, b->workspace, GPU_BLAS_WORKSPACE, s),
               "a product", e);
}
