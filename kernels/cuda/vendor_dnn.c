/*
 * vendor_dnn.c - dnn.h on cuDNN: plans by shape, and their execution.
 *
 * The engine of a class of shapes (everything but the count of pictures) is chosen once, for two pictures, and every count gets a plan of that
 * engine with those settings: a row's bits do not depend on the batch. Plans are made on first sight and kept.
 * Nothing here was timed on a card yet.
 *
 * Threads: see dnn.h.
 */
#include "kernels/cuda/dnn.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/cuda/vendor_graph.h"

/* What a plan is known by: the call with pointers replaced by whether they are there; memcmp compares. */
struct key {
  struct gpu_conv conv;
  struct gpu_attention attention;
};

struct entry {
  struct key key;
  struct graph_plan plan;
  struct entry *next;
};

struct class_choice {
  struct key key; /* with B 0 */
  struct graph_choice choice;
  struct class_choice *next;
};

struct gpu_dnn {
  cudnnHandle_t handle;
  cudaStream_t stream;
  struct entry *plans;
  struct class_choice *choices;
  void *workspace;
  size_t workspace_bytes;
};

int gpu_dnn_open(struct gpu_dnn **out, struct err *e)
{
  struct gpu_dnn *d = calloc(1, sizeof *d);
  int r;

  *out = NULL;
  if (!d)
    return err_set(e, E_NOMEM, "out of memory for cuDNN");
  r = graph_check(cudnnCreate(&d->handle), "opening", e);
  if (r) {
    free(d);
    return r;
  }
  *out = d;
  return 0;
}

void gpu_dnn_close(struct gpu_dnn *d)
{
  if (!d)
    return;
  for (struct entry *p = d->plans, *next; p; p = next) {
    next = p->next;
    graph_plan_close(&p->plan);
    free(p);
  }
  for (struct class_choice *c = d->choices, *next; c; c = next) {
    next = c->next;
    free(c);
  }
  (void)cudaFree(d->workspace);
  cudnnDestroy(d->handle);
  free(d);
}

void gpu_dnn_version(char *text, size_t size)
{
  size_t v = cudnnGetVersion();

  snprintf(text, size, "cuDNN %zu.%zu.%zu", v / 10000, v / 100 % 100, v % 100);
}

/* The engine of a class; engine -1 on its first sight, to be filled by the caller. */
MUST_CHECK static int choice_of(struct gpu_dnn *d, const struct key *k, struct graph_choice **out, struct err *e)
{
  struct class_choice *c = d->choices;

  while (c && memcmp(&c->key, k, sizeof *k))
    c = c->next;
  if (!c) {
    c = calloc(1, sizeof *c);
    if (!c)
      return err_set(e, E_NOMEM, "out of memory for an engine");
    memcpy(&c->key, k, sizeof *k);
    c->choice.engine = -1;
    c->next = d->choices;
    d->choices = c;
  }
  *out = &c->choice;
  return 0;
}

MUST_CHECK static int plan_open(struct gpu_dnn *d, struct graph_plan *p, const struct key *k, struct graph_choice *choice, struct err *e)
{
  const struct graph_target here = {.handle = d->handle};

  return k->conv.B ? graph_conv_open(p, &here, &k->conv, choice, e) : graph_attention_open(p, &here, &k->attention, choice, e);
}

MUST_CHECK static int plan_of(struct gpu_dnn *d, const struct key *k, const struct graph_plan **out, struct err *e)
{
  struct entry *p = d->plans;
  struct graph_choice *choice = NULL;
  struct graph_plan first;
  struct key class;
  int r;

  while (p && memcmp(&p->key, k, sizeof *k))
    p = p->next;
  if (p) {
    *out = &p->plan;
    return 0;
  }
  memcpy(&class, k, sizeof class);
  class.conv.B = k->conv.B ? 2 : 0;
  class.attention.B = k->attention.B ? 2 : 0;
  r = choice_of(d, &class, &choice, e);
  if (!r && choice->engine < 0) {
    r = plan_open(d, &first, &class, choice, e);
    if (r)
      choice->engine = -1;
    else
      graph_plan_close(&first);
  }
  if (r)
    return r;
  p = calloc(1, sizeof *p);
  if (!p)
    return err_set(e, E_NOMEM, "out of memory for a plan");
  memcpy(&p->key, k, sizeof *k);
  r = plan_open(d, &p->plan, k, choice, e);
  if (r) {
    free(p);
    return r;
  }
  p->next = d->plans;
  d->plans = p;
  *out = &p->plan;
  return 0;
}

MUST_CHECK static int workspace(struct gpu_dnn *d, size_t bytes, struct err *e)
{
  if (bytes <= d->workspace_bytes)
    return 0;
  (void)cudaFree(d->workspace);
  d->workspace_bytes = 0;
  if (cudaMalloc(&d->workspace, bytes)) {
    (void)cudaGetLastError();
    d->workspace = NULL;
    return err_set(e, E_NOMEM, "no %zu bytes of working memory for cuDNN", bytes);
  }
  d->workspace_bytes = bytes;
  return 0;
}

MUST_CHECK static int run(struct gpu_dnn *d, cudaStream_t s, const struct graph_plan *p, int64_t n, const int64_t *ids, void *const *pointers,
                          struct err *e)
{
  cudnnBackendDescriptor_t pack = NULL;
  int r = workspace(d, (size_t)p->workspace, e);

  if (!r && d->stream != s) {
    r = graph_check(cudnnSetStream(d->handle, s), "a stream", e);
    d->stream = r ? NULL : s;
  }
  if (!r)
    r = graph_check(cudnnBackendCreateDescriptor(CUDNN_BACKEND_VARIANT_PACK_DESCRIPTOR, &pack), "pointers", e);
  if (!r)
    r = graph_check(cudnnBackendSetAttribute(pack, CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS, CUDNN_TYPE_INT64, n, ids), "pointers", e);
  if (!r)
    r = graph_check(cudnnBackendSetAttribute(pack, CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS, CUDNN_TYPE_VOID_PTR, n, pointers), "pointers", e);
  if (!r)
    r = graph_check(cudnnBackendSetAttribute(pack, CUDNN_ATTR_VARIANT_PACK_WORKSPACE, CUDNN_TYPE_VOID_PTR, 1, &d->workspace), "pointers", e);
  if (!r)
    r = graph_check(cudnnBackendFinalize(pack), "pointers", e);
  if (!r)
    r = graph_check(cudnnBackendExecute(d->handle, p->plan, pack), "running a plan", e);
  if (pack)
    cudnnBackendDestroyDescriptor(pack);
  return r;
}

/* Stands for a pointer that is there. */
static void *is_there(const void *p)
{
  static char there;

  return p ? &there : NULL;
}

int gpu_dnn_conv(struct gpu_dnn *d, cudaStream_t s, const struct gpu_conv *c, struct err *e)
{
  int64_t ids[5] = {GRAPH_X, GRAPH_W, GRAPH_Y}, n = 3;
  void *pointers[5] = {(void *)(uintptr_t)c->x, (void *)(uintptr_t)c->w, c->y};
  const struct graph_plan *p;
  struct key k;
  int r;

  memset(&k, 0, sizeof k); /* field by field: what lies between fields is compared as well */
  k.conv.B = c->B;
  k.conv.H = c->H;
  k.conv.W = c->W;
  k.conv.in = c->in;
  k.conv.Ho = c->Ho;
  k.conv.Wo = c->Wo;
  k.conv.out = c->out;
  k.conv.kh = c->kh;
  k.conv.kw = c->kw;
  k.conv.stride = c->stride;
  k.conv.pad_lo = c->pad_lo;
  k.conv.pad_hi = c->pad_hi;
  k.conv.act = c->act;
  k.conv.y_type = c->y_type;
  k.conv.bias = is_there(c->bias);
  k.conv.residual = is_there(c->residual);
  if (c->residual) {
    ids[n] = GRAPH_RESIDUAL;
    pointers[n++] = (void *)(uintptr_t)c->residual;
  }
  if (c->bias) {
    ids[n] = GRAPH_BIAS;
    pointers[n++] = (void *)(uintptr_t)c->bias;
  }
  r = plan_of(d, &k, &p, e);
  return r ? r : run(d, s, p, n, ids, pointers, e);
}

int gpu_dnn_attention(struct gpu_dnn *d, cudaStream_t s, const struct gpu_attention *a, struct err *e)
{
  float scale = a->scale;
  const int64_t ids[5] = {GRAPH_Q, GRAPH_K, GRAPH_V, GRAPH_O, GRAPH_SCALE};
  void *const pointers[5] = {(void *)(uintptr_t)a->q, (void *)(uintptr_t)a->k, (void *)(uintptr_t)a->v, a->o, &scale};
  const struct graph_plan *p;
  struct key k;
  int r;

  memset(&k, 0, sizeof k);
  k.attention.B = a->B;
  k.attention.T = a->T;
  k.attention.keys = a->keys;
  k.attention.heads = a->heads;
  k.attention.K = a->K;
  k.attention.act = a->act;
  r = plan_of(d, &k, &p, e);
  return r ? r : run(d, s, p, 5, ids, pointers, e);
}
