/*
 * vendor_dnn.c - dnn.h on cuDNN: plans by shape, and their execution.
 *
 * The engine of a class of shapes (everything but the count of pictures) is chosen once, for two pictures, and every count gets a plan of that
 * engine with those settings: a row's bits do not depend on the batch. Plans are made on first sight and kept, up to a bound (plans.h). All work in the
 * same memory, which is taken in gpu_dnn_open: no plan is used that needs more (vendor_graph.h), so that no call takes or frees memory of the device, and
 * what was captured stays where it is.
 *
 * On disk lie the choices and the plans (plan_file.h). A start that finds both asks no heuristics and compiles nothing; one that finds the choice
 * alone compiles with that engine. `safelight compile` fills the folder without the GPU, through this file. Nothing here was timed on a card yet.
 *
 * Threads: see dnn.h.
 */
#include "kernels/cuda/dnn.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/backend.h"
#include "kernels/cuda/cuda.h"
#include "kernels/cuda/device_id.h"
#include "kernels/cuda/plan_file.h"
#include "kernels/cuda/plans.h"
#include "kernels/cuda/vendor_graph.h"

/* A rehearsal of SD1.5 with 64 rows makes 2,150 plans, which are all to stay. */
enum { MOST_PLANS = 4096, MOST_CHOICES = 2048 };

/* What is kept on disk for a class of shapes: the engine that was chosen for it, and for each count of pictures the plan of that engine. */
enum kept { KEPT_PLAN, KEPT_CHOICE };

/* What a kept file is known by: cuDNN compares device and version once more. A plan's engine belongs to its name: one that was saved under another
 * choice is never found, so that all counts of a class have one engine whatever became of single files. */
struct file_key {
  struct device_id device;
  uint64_t version;             /* of cuDNN */
  int64_t what;                 /* enum kept */
  int64_t workspace, rules;     /* the bound that the engine was chosen under; GRAPH_RULES */
  struct gpu_key shape;         /* KEPT_CHOICE: of the class */
  struct graph_choice choice;   /* KEPT_PLAN; see canonical() */
};

_Static_assert(sizeof(struct file_key) <= PLAN_FILE_KEY, "a key has its place in the file");

/* The engine of a class. */
struct choice {
  struct graph_choice is;       /* canonical */
  int is_from_file, is_used;    /* used: a plan of it was made or found in this process */
};

struct gpu_dnn {
  const char *plan_cache;       /* folder, or NULL */
  struct be_plans *counts;
  struct device_id device;
  struct graph_target target;   /* a handle, or a described device */
  cudaStream_t stream;
  struct plans plans;           /* struct graph_plan by struct gpu_key */
  struct plans choices;         /* struct choice by the class's key */
  void *workspace;              /* GPU_DNN_WORKSPACE bytes; NULL for a described device */
};

static void drop_plan(void *value)
{
  graph_plan_close(value);
  free(value);
}

/* Nothing is kept on disk for a device that does not tell its name. */
static void know_device(struct gpu_dnn *d)
{
  struct cudaDeviceProp prop;
  int device = 0, driver = 0;

  if (cudaGetDevice(&device) || cudaGetDeviceProperties(&prop, device) || cudaDriverGetVersion(&driver)) {
    (void)cudaGetLastError();
    d->plan_cache = NULL;
    return;
  }
  device_id_set(&d->device, prop.name, prop.major, prop.minor, prop.multiProcessorCount, driver);
}

MUST_CHECK static int dnn_new(struct gpu_dnn **out, const char *plan_cache, struct be_plans *counts, struct err *e)
{
  struct gpu_dnn *d = calloc(1, sizeof *d);

  *out = d;
  if (!d)
    return err_set(e, E_NOMEM, "out of memory for cuDNN");
  d->plan_cache = plan_cache;
  d->counts = counts;
  plans_init(&d->plans, sizeof(struct gpu_key), MOST_PLANS, drop_plan);
  plans_init(&d->choices, sizeof(struct gpu_key), MOST_CHOICES, free);
  return 0;
}

int gpu_dnn_open(struct gpu_dnn **out, const char *plan_cache, struct be_plans *counts, struct err *e)
{
  int r = dnn_new(out, plan_cache, counts, e);

  if (r)
    return r;
  r = graph_check(cudnnCreate(&(*out)->target.handle), "opening", e);
  if (!r)
    r = cuda_check(cudaMalloc(&(*out)->workspace, GPU_DNN_WORKSPACE), "working memory for cuDNN", e);
  if (r) {
    gpu_dnn_close(*out);
    *out = NULL;
    return r;
  }
  if (plan_cache)
    know_device(*out);
  return 0;
}

int gpu_dnn_open_described(struct gpu_dnn **out, const char *description, const char *plan_cache, struct be_plans *counts, struct err *e)
{
  struct err why = {0};
  int r = dnn_new(out, plan_cache, counts, e);

  if (r)
    return r;
  r = device_id_read(&(*out)->device, description, e);
  if (!r && graph_device_open(&(*out)->target.device, description, &why))
    r = err_set(e, E_ARG, "cuDNN does not take the device's description: %s", why.msg);
  if (r) {
    gpu_dnn_close(*out);
    *out = NULL;
  }
  return r;
}

void gpu_dnn_close(struct gpu_dnn *d)
{
  if (!d)
    return;
  plans_clear(&d->plans);
  plans_clear(&d->choices);
  if (d->workspace)
    (void)cudaFree(d->workspace);
  if (d->target.handle)
    cudnnDestroy(d->target.handle);
  if (d->target.device)
    cudnnBackendDestroyDescriptor(d->target.device);
  free(d);
}

void gpu_dnn_version(char *text, size_t size)
{
  size_t v = cudnnGetVersion();

  snprintf(text, size, "cuDNN %zu.%zu.%zu", v / 10000, v / 100 % 100, v % 100);
}

long gpu_dnn_epoch(const struct gpu_dnn *d)
{
  return d->plans.dropped;
}

/* ---- what is kept on disk ---- */

/* The same choice with every byte that says nothing zero, as a part of a name. */
static void canonical(struct graph_choice *out, const struct graph_choice *c)
{
  memset(out, 0, sizeof *out);
  out->engine = c->engine;
  out->knobs = c->knobs;
  for (int i = 0; i < c->knobs; i++) {
    out->knob_type[i] = c->knob_type[i];
    out->knob_value[i] = c->knob_value[i];
  }
}

static void name_of(struct file_key *name, const struct gpu_dnn *d, enum kept what, const struct gpu_key *k, const struct graph_choice *choice)
{
  memset(name, 0, sizeof *name);
  name->device = d->device;
  name->version = cudnnGetVersion();
  name->what = what;
  name->workspace = GPU_DNN_WORKSPACE;
  name->rules = GRAPH_RULES;
  memcpy(&name->shape, k, sizeof *k);
  if (choice)
    memcpy(&name->choice, choice, sizeof *choice);
}

/* Whether there was one. */
static int choice_from_file(struct gpu_dnn *d, const struct gpu_key *class, struct graph_choice *choice)
{
  struct file_key name;
  struct graph_choice read;
  size_t n = 0;
  char *text;
  int ok;

  if (!d->plan_cache)
    return 0;
  name_of(&name, d, KEPT_CHOICE, class, NULL);
  text = plan_file_read(d->plan_cache, &name, sizeof name, &n);
  ok = text && n == sizeof read;
  if (ok) {
    memcpy(&read, text, sizeof read);
    ok = read.engine >= 0 && read.knobs >= 0 && read.knobs <= GRAPH_KNOBS;
  }
  if (ok)
    canonical(choice, &read);
  free(text);
  return ok;
}

/* What cannot be written is chosen again another time. */
static void choice_to_file(struct gpu_dnn *d, const struct gpu_key *class, const struct graph_choice *choice)
{
  struct file_key name;

  if (!d->plan_cache)
    return;
  name_of(&name, d, KEPT_CHOICE, class, NULL);
  (void)plan_file_write(d->plan_cache, &name, sizeof name, (const char *)choice, sizeof *choice);
}

/* The saved plan; whether there was one that cuDNN takes. *bytes: of its text. */
static int plan_from_file(struct gpu_dnn *d, const struct gpu_key *k, const struct graph_choice *choice, struct graph_plan *p, size_t *bytes)
{
  struct file_key name;
  char *text;
  int ok;

  if (!d->plan_cache)
    return 0;
  name_of(&name, d, KEPT_PLAN, k, choice);
  text = plan_file_read(d->plan_cache, &name, sizeof name, bytes);
  ok = text && !graph_plan_load(p, &d->target, text, *bytes, NULL);
  free(text);
  return ok;
}

/* Bytes written; 0: what cannot be written is compiled again another time. */
static size_t plan_to_file(struct gpu_dnn *d, const struct gpu_key *k, const struct graph_choice *choice, const struct graph_plan *p)
{
  struct file_key name;
  size_t n;
  char *text;

  if (!d->plan_cache || graph_plan_save(p, &text, &n, NULL))
    return 0;
  name_of(&name, d, KEPT_PLAN, k, choice);
  if (!plan_file_write(d->plan_cache, &name, sizeof name, text, n))
    n = 0;
  free(text);
  return n;
}

/* ---- engines and plans ---- */

/* How a plan came about. */
struct made {
  int is_found;                 /* on disk */
  size_t bytes;                 /* of the text on disk; 0: it is not there */
};

MUST_CHECK static int plan_open(struct gpu_dnn *d, struct graph_plan *p, const struct gpu_key *k, struct graph_choice *choice, struct err *e)
{
  return k->conv.B ? graph_conv_open(p, &d->target, &k->conv, choice, e) : graph_attention_open(p, &d->target, &k->attention, choice, e);
}

/* The heuristics choose for two pictures; what they compiled for these is *first, the caller's, and on disk. */
MUST_CHECK static int choose(struct gpu_dnn *d, const struct gpu_key *class, struct choice *choice, struct graph_plan *first, struct made *made,
                             struct err *e)
{
  struct graph_choice chosen = {.engine = -1};
  int r = plan_open(d, first, class, &chosen, e);

  if (r)
    return r;
  atomic_fetch_add(&d->counts->chosen, 1);
  atomic_fetch_add(&d->counts->compiled, 1);
  *choice = (struct choice){0};
  canonical(&choice->is, &chosen);
  choice_to_file(d, class, &choice->is);
  made->bytes = plan_to_file(d, class, &choice->is, first);
  return 0;
}

/* The engine of a class that is new to this process: as kept on disk, else chosen; then first->plan is set, see choose(). */
MUST_CHECK static int choice_new(struct gpu_dnn *d, const struct gpu_key *class, struct choice **out, struct graph_plan *first, struct made *made,
                                 struct err *e)
{
  struct choice *choice = calloc(1, sizeof *choice);
  int r = 0;

  *out = NULL;
  if (!choice)
    return err_set(e, E_NOMEM, "out of memory for an engine");
  choice->is_from_file = choice_from_file(d, class, &choice->is);
  if (!choice->is_from_file)
    r = choose(d, class, choice, first, made, e);
  if (!r)
    r = plans_add(&d->choices, class, choice, e);
  if (r) {
    graph_plan_close(first);
    free(choice);
    return r;
  }
  *out = choice;
  return 0;
}

/* A plan of exactly this engine. An engine from a file that cuDNN does not take here after all is chosen anew, unless pictures were drawn with it. */
MUST_CHECK static int plan_compile(struct gpu_dnn *d, const struct gpu_key *k, const struct gpu_key *class, struct choice *choice, struct graph_plan *p,
                                   struct made *made, struct err *e)
{
  struct graph_choice fixed = choice->is;
  struct graph_plan first = {0};
  struct err why = {0};
  int r = plan_open(d, p, k, &fixed, &why);

  if (r == E_INTERNAL && choice->is_from_file && !choice->is_used) {
    why = (struct err){0};
    r = choose(d, class, choice, &first, made, &why);
    graph_plan_close(&first);
    fixed = choice->is;
    if (!r)
      r = plan_open(d, p, k, &fixed, &why);
  }
  if (r)
    return err_set(e, r, "%s", why.msg);
  atomic_fetch_add(&d->counts->compiled, 1);
  made->bytes = plan_to_file(d, k, &choice->is, p);
  return 0;
}

/* A plan of the class's engine for exactly this count of pictures. */
MUST_CHECK static int plan_make(struct gpu_dnn *d, const struct gpu_key *k, struct graph_plan *p, struct made *made, struct err *e)
{
  struct graph_plan first = {0};
  struct choice *choice;
  struct gpu_key class;
  int r = 0;

  *made = (struct made){0};
  gpu_key_class(&class, k);
  choice = plans_find(&d->choices, &class);
  if (!choice)
    r = choice_new(d, &class, &choice, &first, made, e);
  if (r)
    return r;
  if (first.plan && !memcmp(k, &class, sizeof class)) {
    *p = first;
  } else if (graph_plan_close(&first), plan_from_file(d, k, &choice->is, p, &made->bytes)) {
    made->is_found = 1;
    atomic_fetch_add(&d->counts->found, 1);
  } else {
    r = plan_compile(d, k, &class, choice, p, made, e);
  }
  choice->is_used |= !r;
  return r;
}

int gpu_dnn_prepare(struct gpu_dnn *d, const struct gpu_key *k, size_t *bytes, struct err *e)
{
  struct graph_plan p;
  struct made made;
  int r = plan_make(d, k, &p, &made, e);

  *bytes = made.bytes;
  if (r)
    return r;
  graph_plan_close(&p);
  return made.bytes ? 0 : err_set(e, E_FILE, "a plan cannot be written to %.300s: is there room, and may this user write?", d->plan_cache);
}

MUST_CHECK static int plan_of(struct gpu_dnn *d, const struct gpu_key *k, const struct graph_plan **out, struct err *e)
{
  struct graph_plan *p = plans_find(&d->plans, k);
  struct made made;
  int r;

  *out = p;
  if (p)
    return 0;
  p = calloc(1, sizeof *p);
  if (!p)
    return err_set(e, E_NOMEM, "out of memory for a plan");
  r = plan_make(d, k, p, &made, e);
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

int gpu_dnn_ready(struct gpu_dnn *d, const struct gpu_key *k, struct err *e)
{
  const struct graph_plan *p;

  return plan_of(d, k, &p, e);
}

MUST_CHECK static int run(struct gpu_dnn *d, cudaStream_t s, const struct graph_plan *p, int64_t n, const int64_t *ids, void *const *pointers,
                          struct err *e)
{
  cudnnBackendDescriptor_t pack = NULL;
  int r = 0;

  if (d->stream != s) {
    r = graph_check(cudnnSetStream(d->target.handle, s), "a stream", e);
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
    r = graph_check(cudnnBackendExecute(d->target.handle, p->plan, pack), "running a plan", e);
  if (pack)
    cudnnBackendDestroyDescriptor(pack);
  return r;
}

int gpu_dnn_conv(struct gpu_dnn *d, cudaStream_t s, const struct gpu_conv *c, struct err *e)
{
  int64_t ids[5] = {GRAPH_X, GRAPH_W, GRAPH_Y}, n = 3;
  void *pointers[5] = {(void *)(uintptr_t)c->x, (void *)(uintptr_t)c->w, c->y};
  const struct graph_plan *p;
  struct gpu_key k;
  int r;

  gpu_key_of_conv(&k, c);
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
  struct gpu_key k;
  int r;

  gpu_key_of_attention(&k, a);
  r = plan_of(d, &k, &p, e);
  return r ? r : run(d, s, p, 5, ids, pointers, e);
}
