/*
 * vendor_dnn.c - dnn.h on cuDNN: plans by shape, and their execution.
 *
 * The engine of a class of shapes (everything but the count of pictures) is chosen once, for two pictures, and every count gets a plan of that
 * engine with those settings: a row's bits do not depend on the batch. Plans are made on first sight and kept, up to a bound (plans.h).
 * Nothing here was timed on a card yet.
 *
 * Threads: see dnn.h.
 */
#include "kernels/cuda/dnn.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/cuda/plan_file.h"
#include "kernels/cuda/plans.h"
#include "kernels/cuda/vendor_graph.h"

/* What a plan is known by: the call with pointers replaced by whether they are there; memcmp compares. */
struct key {
  struct gpu_conv conv;
  struct gpu_attention attention;
};

_Static_assert(sizeof(struct key) % 8 == 0, "hashed by words of eight");

enum { MOST_PLANS = 2048, MOST_CHOICES = 2048 };

/* What a saved plan is known by: cuDNN compares device and version once more. */
struct file_key {
  char device[64];
  int32_t major, minor, processors, unused;
  uint64_t version;
  struct key shape;
};

_Static_assert(sizeof(struct file_key) <= PLAN_FILE_KEY, "a key has its place in the file");

struct gpu_dnn {
  const char *plan_cache;       /* folder, or NULL */
  struct file_key file;         /* without its shape */
  cudnnHandle_t handle;
  cudaStream_t stream;
  struct plans plans;           /* struct graph_plan by key */
  struct plans choices;         /* struct graph_choice by key with 2 pictures */
  void *workspace;
  size_t workspace_bytes;
  long moved;                   /* how often the workspace did */
};

static void drop_plan(void *value)
{
  graph_plan_close(value);
  free(value);
}

/* Device and version. Nothing is kept on disk for a device that does not tell its name. */
static void know_device(struct gpu_dnn *d)
{
  struct cudaDeviceProp prop;
  int device = 0;

  if (cudaGetDevice(&device) || cudaGetDeviceProperties(&prop, device)) {
    (void)cudaGetLastError();
    d->plan_cache = NULL;
    return;
  }
  snprintf(d->file.device, sizeof d->file.device, "%.63s", prop.name);
  d->file.major = prop.major;
  d->file.minor = prop.minor;
  d->file.processors = prop.multiProcessorCount;
  d->file.version = cudnnGetVersion();
}

int gpu_dnn_open(struct gpu_dnn **out, const char *plan_cache, struct err *e)
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
  d->plan_cache = plan_cache;
  if (plan_cache)
    know_device(d);
  plans_init(&d->plans, sizeof(struct key), MOST_PLANS, drop_plan);
  plans_init(&d->choices, sizeof(struct key), MOST_CHOICES, free);
  *out = d;
  return 0;
}

void gpu_dnn_close(struct gpu_dnn *d)
{
  if (!d)
    return;
  plans_clear(&d->plans);
  plans_clear(&d->choices);
  (void)cudaFree(d->workspace);
  cudnnDestroy(d->handle);
  free(d);
}

void gpu_dnn_version(char *text, size_t size)
{
  size_t v = cudnnGetVersion();

  snprintf(text, size, "cuDNN %zu.%zu.%zu", v / 10000, v / 100 % 100, v % 100);
}

long gpu_dnn_epoch(const struct gpu_dnn *d)
{
  return d->plans.dropped + d->moved;
}

MUST_CHECK static int plan_open(struct gpu_dnn *d, struct graph_plan *p, const struct key *k, struct graph_choice *choice, struct err *e)
{
  const struct graph_target here = {.handle = d->handle};

  return k->conv.B ? graph_conv_open(p, &here, &k->conv, choice, e) : graph_attention_open(p, &here, &k->attention, choice, e);
}

/* The engine of a class; on its first sight the heuristics choose it, for two pictures. */
MUST_CHECK static int choice_of(struct gpu_dnn *d, const struct key *k, const struct graph_choice **out, struct err *e)
{
  struct graph_choice *choice;
  struct graph_plan first;
  struct key class;
  int r;

  memcpy(&class, k, sizeof class);
  class.conv.B = k->conv.B ? 2 : 0;
  class.attention.B = k->attention.B ? 2 : 0;
  *out = choice = plans_find(&d->choices, &class);
  if (choice)
    return 0;
  choice = calloc(1, sizeof *choice);
  if (!choice)
    return err_set(e, E_NOMEM, "out of memory for an engine");
  choice->engine = -1;
  r = plan_open(d, &first, &class, choice, e);
  if (!r)
    graph_plan_close(&first);
  if (!r)
    r = plans_add(&d->choices, &class, choice, e);
  if (r)
    free(choice);
  else
    *out = choice;
  return r;
}

/* The saved plan; whether there was one that cuDNN takes. */
static int plan_from_file(struct gpu_dnn *d, const struct key *k, struct graph_plan *p)
{
  const struct graph_target here = {.handle = d->handle};
  struct file_key name = d->file;
  size_t n;
  char *text;
  int ok;

  if (!d->plan_cache)
    return 0;
  memcpy(&name.shape, k, sizeof *k);
  text = plan_file_read(d->plan_cache, &name, sizeof name, &n);
  ok = text && !graph_plan_load(p, &here, text, n, NULL);
  free(text);
  return ok;
}

/* What cannot be written is compiled again another time. */
static void plan_to_file(struct gpu_dnn *d, const struct key *k, const struct graph_plan *p)
{
  struct file_key name = d->file;
  size_t n;
  char *text;

  if (!d->plan_cache || graph_plan_save(p, &text, &n, NULL))
    return;
  memcpy(&name.shape, k, sizeof *k);
  (void)plan_file_write(d->plan_cache, &name, sizeof name, text, n);
  free(text);
}

/* A plan of the class's engine for exactly this count of pictures. */
MUST_CHECK static int plan_make(struct gpu_dnn *d, const struct key *k, struct graph_plan *p, struct err *e)
{
  const struct graph_choice *choice;
  struct graph_choice fixed;
  int r;

  if (plan_from_file(d, k, p)) /* saved with the engine that the class has: the same heuristics of the same version chose it */
    return 0;
  r = choice_of(d, k, &choice, e);
  if (r)
    return r;
  fixed = *choice;
  r = plan_open(d, p, k, &fixed, e);
  if (!r)
    plan_to_file(d, k, p);
  return r;
}

MUST_CHECK static int plan_of(struct gpu_dnn *d, const struct key *k, const struct graph_plan **out, struct err *e)
{
  struct graph_plan *p = plans_find(&d->plans, k);
  int r;

  *out = p;
  if (p)
    return 0;
  p = calloc(1, sizeof *p);
  if (!p)
    return err_set(e, E_NOMEM, "out of memory for a plan");
  r = plan_make(d, k, p, e);
  if (!r && plans_is_full(&d->plans))
    (void)cudaStreamSynchronize(d->stream); /* kernels of plans that are about to go may still run; an error comes back from the next call */
  if (!r) {
    r = plans_add(&d->plans, k, p, e);
    if (r)
      graph_plan_close(p);
  }
  if (r)
    free(p);
  else
    *out = p;
  return r;
}

MUST_CHECK static int workspace(struct gpu_dnn *d, size_t bytes, struct err *e)
{
  cudaError_t code;

  if (bytes <= d->workspace_bytes)
    return 0;
  (void)cudaFree(d->workspace); /* waits for what still uses it */
  d->workspace = NULL;
  d->workspace_bytes = 0;
  d->moved++;
  code = cudaMalloc(&d->workspace, bytes);
  if (code) {
    d->workspace = NULL;
    (void)cudaGetLastError();
    return err_set(e, code == cudaErrorMemoryAllocation ? E_NOMEM : E_DEVICE, "%zu bytes of working memory for cuDNN: %s", bytes, cudaGetErrorString(code));
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

/* Stands for a pointer that is there, in this process and in files of others. */
static void *is_there(const void *p)
{
  return p ? (void *)(uintptr_t)1 : NULL;
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
