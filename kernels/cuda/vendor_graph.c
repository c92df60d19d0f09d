/*
 * vendor_graph.c - cuDNN graphs through the backend API in C. See vendor_graph.h.
 *
 * Convolution, then residual, then bias, in this order, with fp32 between: the one order for which cuDNN 9.19 keeps a Hopper kernel; bias
 * first, or anything else behind, silently falls to an Ampere one. Attention is the single SDPA operation.
 *
 * Descriptors of a graph are collected in a struct parts and destroyed together; a plan keeps what it needs.
 */
#include "kernels/cuda/vendor_graph.h"

#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/cuda/vendor_nvrtc.h"

/* LITTLE: working memory for two pictures that stays within the bound for the most pictures when it grows with their count. */
enum { MOST_PARTS = 256, ASKED = 24, LITTLE = GPU_DNN_WORKSPACE / (GPU_DNN_ROWS / 2) };

/* The value of CUDNN_KNOB_TYPE_WORKSPACE with which an engine that has this setting (41, Hopper's convolutions) wants no memory for whatever count of pictures.
 * With the other one, 0, it wants whole tiles of fp32 for some counts and none for others: there it splits the sums of the tiles that fill no round of the
 * processors, and a picture's bits would depend on how many are beside it. */
enum { WORKS_IN_NOTHING = 1 };

/* What a plan is of: one of the two. */
struct call {
  const struct gpu_conv *conv;
  const struct gpu_attention *attention;
};

struct parts {
  cudnnBackendDescriptor_t d[MOST_PARTS];
  int n;
  struct err *e;
};

/* Memory that is short passes; a graph that cuDNN cannot do, or that we described wrongly, says nothing about the device; the rest does. */
static int code_of(cudnnStatus_t s)
{
  int family = CUDNN_STATUS_CATEGORY((int)s);

  if (s == CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED || s == CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED)
    return E_NOMEM;
  if (family == CUDNN_STATUS_BAD_PARAM || family == CUDNN_STATUS_NOT_SUPPORTED || s == CUDNN_STATUS_INTERNAL_ERROR_COMPILATION_FAILED)
    return E_INTERNAL;
  return E_DEVICE;
}

int graph_check(cudnnStatus_t s, const char *what, struct err *e)
{
  char words[256] = "";

  if (s == CUDNN_STATUS_SUCCESS)
    return 0;
  cudnnGetLastErrorString(words, sizeof words);
  return err_set(e, code_of(s), "cuDNN: %s: %s %.200s", what, cudnnGetErrorString(s), words);
}

static void parts_close(struct parts *p)
{
  while (p->n)
    cudnnBackendDestroyDescriptor(p->d[--p->n]);
}

/* A new descriptor, or NULL with the error recorded; later calls on NULL do nothing, so that a graph is checked once. */
static cudnnBackendDescriptor_t part(struct parts *p, cudnnBackendDescriptorType_t type)
{
  cudnnBackendDescriptor_t d = NULL;

  if (p->e->code)
    return NULL;
  if (p->n == MOST_PARTS) {
    (void)!err_set(p->e, E_INTERNAL, "a cuDNN graph of more than %d descriptors", (int)MOST_PARTS);
    return NULL;
  }
  if (graph_check(cudnnBackendCreateDescriptor(type, &d), "a descriptor", p->e))
    return NULL;
  p->d[p->n++] = d;
  return d;
}

static void set(struct parts *p, cudnnBackendDescriptor_t d, cudnnBackendAttributeName_t name, cudnnBackendAttributeType_t type, int64_t n,
                const void *value)
{
  char what[40];

  snprintf(what, sizeof what, "attribute %d", (int)name);
  if (!p->e->code && graph_check(cudnnBackendSetAttribute(d, name, type, n, value), what, p->e))
    return;
}

static void set_part(struct parts *p, cudnnBackendDescriptor_t d, cudnnBackendAttributeName_t name, cudnnBackendDescriptor_t value)
{
  set(p, d, name, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &value);
}

static void set_int(struct parts *p, cudnnBackendDescriptor_t d, cudnnBackendAttributeName_t name, int64_t value)
{
  set(p, d, name, CUDNN_TYPE_INT64, 1, &value);
}

static void set_bool(struct parts *p, cudnnBackendDescriptor_t d, cudnnBackendAttributeName_t name, bool value)
{
  set(p, d, name, CUDNN_TYPE_BOOLEAN, 1, &value);
}

static cudnnBackendDescriptor_t finished(struct parts *p, cudnnBackendDescriptor_t d, const char *what)
{
  if (p->e->code || graph_check(cudnnBackendFinalize(d), what, p->e))
    return NULL;
  return d;
}

static cudnnDataType_t type_of(enum dtype t)
{
  return t == DT_F32 ? CUDNN_DATA_FLOAT : t == DT_F16 ? CUDNN_DATA_HALF : CUDNN_DATA_BFLOAT16;
}

static cudnnBackendDescriptor_t tensor(struct parts *p, int64_t id, cudnnDataType_t type, const int64_t dims[4], const int64_t strides[4], bool is_virtual,
                                       bool is_value)
{
  cudnnBackendDescriptor_t d = part(p, CUDNN_BACKEND_TENSOR_DESCRIPTOR);

  set(p, d, CUDNN_ATTR_TENSOR_DATA_TYPE, CUDNN_TYPE_DATA_TYPE, 1, &type);
  set(p, d, CUDNN_ATTR_TENSOR_DIMENSIONS, CUDNN_TYPE_INT64, 4, dims);
  set(p, d, CUDNN_ATTR_TENSOR_STRIDES, CUDNN_TYPE_INT64, 4, strides);
  set_int(p, d, CUDNN_ATTR_TENSOR_UNIQUE_ID, id);
  set_int(p, d, CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT, 16);
  if (is_virtual)
    set_bool(p, d, CUDNN_ATTR_TENSOR_IS_VIRTUAL, true);
  if (is_value)
    set_bool(p, d, CUDNN_ATTR_TENSOR_IS_BY_VALUE, true);
  return finished(p, d, "a tensor");
}

/* (B, H, W, C) as cuDNN names it: B, C, H, W with the strides of channels-last. */
static cudnnBackendDescriptor_t picture(struct parts *p, int64_t id, cudnnDataType_t type, int64_t B, int64_t C, int64_t H, int64_t W, bool is_virtual)
{
  const int64_t dims[4] = {B, C, H, W}, strides[4] = {H * W * C, 1, W * C, C};

  return tensor(p, id, type, dims, strides, is_virtual, false);
}

/* ---- operations ---- */

static cudnnBackendDescriptor_t convolution(struct parts *p, const struct gpu_conv *c, cudnnBackendDescriptor_t x, cudnnBackendDescriptor_t w,
                                            cudnnBackendDescriptor_t y)
{
  const int64_t lo[2] = {c->pad_lo, c->pad_lo}, hi[2] = {c->pad_hi, c->pad_hi}, stride[2] = {c->stride, c->stride}, dilation[2] = {1, 1};
  cudnnBackendDescriptor_t conv = part(p, CUDNN_BACKEND_CONVOLUTION_DESCRIPTOR), op;
  cudnnConvolutionMode_t mode = CUDNN_CROSS_CORRELATION;
  cudnnDataType_t f32 = CUDNN_DATA_FLOAT;
  const float one = 1, zero = 0;

  set(p, conv, CUDNN_ATTR_CONVOLUTION_COMP_TYPE, CUDNN_TYPE_DATA_TYPE, 1, &f32);
  set(p, conv, CUDNN_ATTR_CONVOLUTION_CONV_MODE, CUDNN_TYPE_CONVOLUTION_MODE, 1, &mode);
  set_int(p, conv, CUDNN_ATTR_CONVOLUTION_SPATIAL_DIMS, 2);
  set(p, conv, CUDNN_ATTR_CONVOLUTION_PRE_PADDINGS, CUDNN_TYPE_INT64, 2, lo);
  set(p, conv, CUDNN_ATTR_CONVOLUTION_POST_PADDINGS, CUDNN_TYPE_INT64, 2, hi);
  set(p, conv, CUDNN_ATTR_CONVOLUTION_FILTER_STRIDES, CUDNN_TYPE_INT64, 2, stride);
  set(p, conv, CUDNN_ATTR_CONVOLUTION_DILATIONS, CUDNN_TYPE_INT64, 2, dilation);
  conv = finished(p, conv, "a convolution");
  op = part(p, CUDNN_BACKEND_OPERATION_CONVOLUTION_FORWARD_DESCRIPTOR);
  set_part(p, op, CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_CONV_DESC, conv);
  set_part(p, op, CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_X, x);
  set_part(p, op, CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_W, w);
  set_part(p, op, CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_Y, y);
  set(p, op, CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_ALPHA, CUDNN_TYPE_FLOAT, 1, &one);
  set(p, op, CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_BETA, CUDNN_TYPE_FLOAT, 1, &zero);
  return finished(p, op, "a convolution");
}

static cudnnBackendDescriptor_t sum(struct parts *p, cudnnBackendDescriptor_t x, cudnnBackendDescriptor_t b, cudnnBackendDescriptor_t y)
{
  cudnnBackendDescriptor_t add = part(p, CUDNN_BACKEND_POINTWISE_DESCRIPTOR), op;
  cudnnPointwiseMode_t mode = CUDNN_POINTWISE_ADD;
  cudnnDataType_t f32 = CUDNN_DATA_FLOAT;

  set(p, add, CUDNN_ATTR_POINTWISE_MODE, CUDNN_TYPE_POINTWISE_MODE, 1, &mode);
  set(p, add, CUDNN_ATTR_POINTWISE_MATH_PREC, CUDNN_TYPE_DATA_TYPE, 1, &f32);
  add = finished(p, add, "a sum");
  op = part(p, CUDNN_BACKEND_OPERATION_POINTWISE_DESCRIPTOR);
  set_part(p, op, CUDNN_ATTR_OPERATION_POINTWISE_PW_DESCRIPTOR, add);
  set_part(p, op, CUDNN_ATTR_OPERATION_POINTWISE_XDESC, x);
  set_part(p, op, CUDNN_ATTR_OPERATION_POINTWISE_BDESC, b);
  set_part(p, op, CUDNN_ATTR_OPERATION_POINTWISE_YDESC, y);
  return finished(p, op, "a sum");
}

static cudnnBackendDescriptor_t graph_of(struct parts *p, const struct graph_target *t, const cudnnBackendDescriptor_t *ops, int64_t n)
{
  cudnnBackendDescriptor_t g = part(p, CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR);

  set(p, g, CUDNN_ATTR_OPERATIONGRAPH_OPS, CUDNN_TYPE_BACKEND_DESCRIPTOR, n, ops);
  if (t->handle)
    set(p, g, CUDNN_ATTR_OPERATIONGRAPH_HANDLE, CUDNN_TYPE_HANDLE, 1, &t->handle);
  return finished(p, g, "a graph");
}

static cudnnBackendDescriptor_t conv_graph(struct parts *p, const struct graph_target *t, const struct gpu_conv *c)
{
  cudnnDataType_t io = type_of(c->act), out = type_of(c->y_type);
  const int64_t w_dims[4] = {c->out, c->in, c->kh, c->kw}, w_strides[4] = {c->kh * c->kw * c->in, 1, c->kw * c->in, c->in};
  cudnnBackendDescriptor_t ops[3], x, w, y, now, next;
  int64_t n = 0, id = 100;

  x = picture(p, GRAPH_X, io, c->B, c->in, c->H, c->W, false);
  w = tensor(p, GRAPH_W, io, w_dims, w_strides, false, false);
  y = picture(p, GRAPH_Y, out, c->B, c->out, c->Ho, c->Wo, false);
  now = c->residual || c->bias ? picture(p, id++, CUDNN_DATA_FLOAT, c->B, c->out, c->Ho, c->Wo, true) : y;
  ops[n++] = convolution(p, c, x, w, now);
  if (c->residual) {
    next = c->bias ? picture(p, id++, CUDNN_DATA_FLOAT, c->B, c->out, c->Ho, c->Wo, true) : y;
    ops[n++] = sum(p, now, picture(p, GRAPH_RESIDUAL, out, c->B, c->out, c->Ho, c->Wo, false), next);
    now = next;
  }
  if (c->bias)
    ops[n++] = sum(p, now, picture(p, GRAPH_BIAS, io, 1, c->out, 1, 1, false), y);
  return graph_of(p, t, ops, n);
}

/* (B, T, heads*K): heads side by side. */
static cudnnBackendDescriptor_t heads_of(struct parts *p, int64_t id, const struct gpu_attention *a, int64_t T)
{
  int64_t D = (int64_t)a->heads * a->K;
  const int64_t dims[4] = {a->B, a->heads, T, a->K}, strides[4] = {T * D, a->K, D, 1};

  return tensor(p, id, type_of(a->act), dims, strides, false, false);
}

static cudnnBackendDescriptor_t attention_graph(struct parts *p, const struct graph_target *t, const struct gpu_attention *a)
{
  const int64_t ones[4] = {1, 1, 1, 1};
  cudnnBackendDescriptor_t q = heads_of(p, GRAPH_Q, a, a->T), k = heads_of(p, GRAPH_K, a, a->keys), v = heads_of(p, GRAPH_V, a, a->keys),
                           o = heads_of(p, GRAPH_O, a, a->T), scale = tensor(p, GRAPH_SCALE, CUDNN_DATA_FLOAT, ones, ones, false, true), op;

  op = part(p, CUDNN_BACKEND_OPERATION_SDPA_FWD_DESCRIPTOR);
  set_part(p, op, CUDNN_ATTR_OPERATION_SDPA_FWD_QDESC, q);
  set_part(p, op, CUDNN_ATTR_OPERATION_SDPA_FWD_KDESC, k);
  set_part(p, op, CUDNN_ATTR_OPERATION_SDPA_FWD_VDESC, v);
  set_part(p, op, CUDNN_ATTR_OPERATION_SDPA_FWD_ODESC, o);
  set_part(p, op, CUDNN_ATTR_OPERATION_SDPA_FWD_SCALEDESC, scale);
  op = finished(p, op, "an attention");
  return graph_of(p, t, &op, 1);
}

static cudnnBackendDescriptor_t call_graph(struct parts *p, const struct graph_target *t, const struct call *c)
{
  return c->conv ? conv_graph(p, t, c->conv) : attention_graph(p, t, c->attention);
}

/* ---- engines and plans ---- */

/* cuDNN reports how many elements there are, which may be more than it was asked for and has written. */
static int64_t at_most(int64_t n, int64_t room)
{
  return n < room ? n : room;
}

/* Engine and settings of a configuration, but for one that would split sums by the count of pictures; returns 0 when sums would be split, when another run
 * would give other bits, and when not all of it can be read: a setting that is not seen might split sums. */
static int read_choice(struct parts *p, cudnnBackendDescriptor_t config, struct graph_choice *choice)
{
  cudnnBackendDescriptor_t engine = part(p, CUDNN_BACKEND_ENGINE_DESCRIPTOR), knobs[GRAPH_KNOBS];
  cudnnBackendNumericalNote_t notes[CUDNN_NUMERICAL_NOTE_TYPE_COUNT];
  int64_t n = 0, got = 0;
  int ok = 1;

  *choice = (struct graph_choice){.engine = -1};
  for (int i = 0; i < GRAPH_KNOBS; i++)
    knobs[i] = part(p, CUDNN_BACKEND_KNOB_CHOICE_DESCRIPTOR);
  if (p->e->code ||
      graph_check(cudnnBackendGetAttribute(config, CUDNN_ATTR_ENGINECFG_ENGINE, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &got, &engine), "an engine", p->e) ||
      graph_check(cudnnBackendGetAttribute(engine, CUDNN_ATTR_ENGINE_GLOBAL_INDEX, CUDNN_TYPE_INT64, 1, &got, &choice->engine), "an engine", p->e))
    return 0;
  if (cudnnBackendGetAttribute(engine, CUDNN_ATTR_ENGINE_NUMERICAL_NOTE, CUDNN_TYPE_NUMERICAL_NOTE, CUDNN_NUMERICAL_NOTE_TYPE_COUNT, &n, notes) ==
      CUDNN_STATUS_SUCCESS)
    for (int64_t i = 0; i < at_most(n, CUDNN_NUMERICAL_NOTE_TYPE_COUNT); i++)
      ok = ok && notes[i] != CUDNN_NUMERICAL_NOTE_NONDETERMINISTIC && notes[i] != CUDNN_NUMERICAL_NOTE_REDUCED_PRECISION_REDUCTION &&
           notes[i] != CUDNN_NUMERICAL_NOTE_WINOGRAD && notes[i] != CUDNN_NUMERICAL_NOTE_FFT;
  n = 0;
  if (cudnnBackendGetAttribute(config, CUDNN_ATTR_ENGINECFG_KNOB_CHOICES, CUDNN_TYPE_BACKEND_DESCRIPTOR, GRAPH_KNOBS, &n, knobs) != CUDNN_STATUS_SUCCESS)
    n = 0;
  if (n > GRAPH_KNOBS)
    return 0;
  for (int64_t i = 0; i < n && ok; i++) {
    cudnnBackendKnobType_t type = CUDNN_KNOB_TYPE_COUNTS;
    int64_t value = 0;

    if (graph_check(cudnnBackendGetAttribute(knobs[i], CUDNN_ATTR_KNOB_CHOICE_KNOB_TYPE, CUDNN_TYPE_KNOB_TYPE, 1, &got, &type), "a setting", p->e) ||
        graph_check(cudnnBackendGetAttribute(knobs[i], CUDNN_ATTR_KNOB_CHOICE_KNOB_VALUE, CUDNN_TYPE_INT64, 1, &got, &value), "a setting", p->e))
      return 0;
    ok = ok && !(type == CUDNN_KNOB_TYPE_SPLIT_K_SLC && value > 1) && !((int)type == 0 /* SPLIT_K */ && value > 1) &&
         !(type == CUDNN_KNOB_TYPE_STREAM_K && value > 0);
    if (type == CUDNN_KNOB_TYPE_WORKSPACE)
      value = WORKS_IN_NOTHING;
    choice->knob_type[choice->knobs] = type;
    choice->knob_value[choice->knobs++] = value;
  }
  return ok;
}

static cudnnBackendDescriptor_t config_of(struct parts *p, const struct graph_target *t, cudnnBackendDescriptor_t graph, const struct graph_choice *choice)
{
  cudnnBackendDescriptor_t engine = part(p, CUDNN_BACKEND_ENGINE_DESCRIPTOR), config, knobs[GRAPH_KNOBS];

  set_part(p, engine, CUDNN_ATTR_ENGINE_OPERATION_GRAPH, graph);
  set_int(p, engine, CUDNN_ATTR_ENGINE_GLOBAL_INDEX, choice->engine);
  if (t->device)
    set_part(p, engine, CUDNN_ATTR_ENGINE_DEVICEPROP, t->device);
  engine = finished(p, engine, "an engine");
  for (int i = 0; i < choice->knobs; i++) {
    knobs[i] = part(p, CUDNN_BACKEND_KNOB_CHOICE_DESCRIPTOR);
    set(p, knobs[i], CUDNN_ATTR_KNOB_CHOICE_KNOB_TYPE, CUDNN_TYPE_KNOB_TYPE, 1, &choice->knob_type[i]);
    set_int(p, knobs[i], CUDNN_ATTR_KNOB_CHOICE_KNOB_VALUE, choice->knob_value[i]);
    knobs[i] = finished(p, knobs[i], "a setting");
  }
  config = part(p, CUDNN_BACKEND_ENGINECFG_DESCRIPTOR);
  set_part(p, config, CUDNN_ATTR_ENGINECFG_ENGINE, engine);
  if (choice->knobs)
    set(p, config, CUDNN_ATTR_ENGINECFG_KNOB_CHOICES, CUDNN_TYPE_BACKEND_DESCRIPTOR, choice->knobs, knobs);
  return finished(p, config, "a configuration");
}

/* The last of a plan; on failure d is destroyed. */
MUST_CHECK static int plan_take(struct graph_plan *out, cudnnBackendDescriptor_t d, struct err *e)
{
  int64_t got = 0;
  int r = graph_check(cudnnBackendGetAttribute(d, CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE, CUDNN_TYPE_INT64, 1, &got, &out->workspace), "a plan", e);

  if (!r && out->workspace > GPU_DNN_WORKSPACE)
    r = err_set(e, E_INTERNAL, "a plan wants %lld bytes of working memory, and %d are set aside", (long long)out->workspace, (int)GPU_DNN_WORKSPACE);
  if (r) {
    cudnnBackendDestroyDescriptor(d);
    *out = (struct graph_plan){0};
    return r;
  }
  out->plan = d;
  return 0;
}

MUST_CHECK static int plan_of(struct graph_plan *out, const struct graph_target *t, cudnnBackendDescriptor_t config, struct err *e)
{
  cudnnBackendDescriptor_t d = NULL;
  int r;

  *out = (struct graph_plan){0};
  r = graph_check(cudnnBackendCreateDescriptor(CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR, &d), "a plan", e);
  if (!r)
    r = graph_check(cudnnBackendSetAttribute(d, CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &config), "a plan", e);
  if (!r && t->device)
    r = graph_check(cudnnBackendSetAttribute(d, CUDNN_ATTR_EXECUTION_PLAN_DEVICEPROP, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &t->device), "a plan", e);
  if (!r && t->handle)
    r = graph_check(cudnnBackendSetAttribute(d, CUDNN_ATTR_EXECUTION_PLAN_HANDLE, CUDNN_TYPE_HANDLE, 1, &t->handle), "a plan", e);
  if (!r)
    r = graph_check(cudnnBackendFinalize(d), "compiling a plan", e);
  if (r) {
    if (d)
      cudnnBackendDestroyDescriptor(d);
    return r;
  }
  return plan_take(out, d, e);
}

/* An attribute that is a text, *n bytes as cuDNN counts them, and a NUL behind them. what: "a plan". */
MUST_CHECK static int text_of(cudnnBackendDescriptor_t d, cudnnBackendAttributeName_t name, const char *what, char **text, size_t *n, struct err *e)
{
  int64_t size = 0, got = 0;
  int r = graph_check(cudnnBackendGetAttribute(d, name, CUDNN_TYPE_CHAR, 0, &size, NULL), what, e);

  *text = NULL;
  if (r)
    return r;
  if (size < 1 || size > GRAPH_TEXT_MAX)
    return err_set(e, E_INTERNAL, "cuDNN: %s of %lld bytes", what, (long long)size);
  *text = calloc(1, (size_t)size + 1);
  if (!*text)
    return err_set(e, E_NOMEM, "out of memory for %s", what);
  r = graph_check(cudnnBackendGetAttribute(d, name, CUDNN_TYPE_CHAR, size, &got, *text), what, e);
  if (!r && got != size)
    r = err_set(e, E_INTERNAL, "cuDNN: %s of %lld bytes became one of %lld", what, (long long)size, (long long)got);
  if (r) {
    free(*text);
    *text = NULL;
  }
  *n = (size_t)size;
  return r;
}

int graph_plan_save(const struct graph_plan *p, char **text, size_t *n, struct err *e)
{
  return text_of(p->plan, CUDNN_ATTR_EXECUTION_PLAN_JSON_REPRESENTATION, "a plan", text, n, e);
}

int graph_plan_load(struct graph_plan *out, const struct graph_target *t, const char *text, size_t n, struct err *e)
{
  cudnnBackendDescriptor_t d = NULL;
  int r;

  *out = (struct graph_plan){0};
  (void)nvrtc_find();
  r = graph_check(cudnnBackendCreateDescriptor(CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR, &d), "a plan", e);
  if (!r && t->device)
    r = graph_check(cudnnBackendSetAttribute(d, CUDNN_ATTR_EXECUTION_PLAN_DEVICEPROP, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &t->device), "a plan", e);
  if (!r && t->handle)
    r = graph_check(cudnnBackendSetAttribute(d, CUDNN_ATTR_EXECUTION_PLAN_HANDLE, CUDNN_TYPE_HANDLE, 1, &t->handle), "a plan", e);
  if (!r)
    r = graph_check(cudnnBackendSetAttribute(d, CUDNN_ATTR_EXECUTION_PLAN_JSON_REPRESENTATION, CUDNN_TYPE_CHAR, (int64_t)n, text), "loading a plan", e);
  if (!r)
    r = graph_check(cudnnBackendFinalize(d), "loading a plan", e);
  if (r) {
    if (d)
      cudnnBackendDestroyDescriptor(d);
    return r;
  }
  return plan_take(out, d, e);
}

/* The plan of a graph by an engine and its settings. What e held before is forgotten. */
MUST_CHECK static int plan_by(struct graph_plan *out, const struct graph_target *t, cudnnBackendDescriptor_t graph, const struct graph_choice *choice,
                              struct err *e)
{
  struct parts mine = {.e = e};
  cudnnBackendDescriptor_t config;
  int r;

  *e = (struct err){0};
  config = config_of(&mine, t, graph, choice);
  r = e->code ? e->code : plan_of(out, t, config, e);
  parts_close(&mine);
  return r;
}

/* The first configuration of the heuristics that may be used, compiles, and works in `most` bytes. */
MUST_CHECK static int choose_by(cudnnBackendHeurMode_t mode, struct graph_plan *out, struct parts *p, const struct graph_target *t,
                                cudnnBackendDescriptor_t graph, struct graph_choice *choice, int64_t most)
{
  cudnnBackendDescriptor_t heur = part(p, CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR), configs[ASKED];
  struct err last = {0};
  int64_t n = 0;
  int r;

  set_part(p, heur, CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH, graph);
  set(p, heur, CUDNN_ATTR_ENGINEHEUR_MODE, CUDNN_TYPE_HEUR_MODE, 1, &mode);
  if (t->device)
    set_part(p, heur, CUDNN_ATTR_ENGINEHEUR_DEVICEPROP, t->device);
  heur = finished(p, heur, "the choice of an engine");
  for (int i = 0; i < ASKED; i++)
    configs[i] = part(p, CUDNN_BACKEND_ENGINECFG_DESCRIPTOR);
  if (p->e->code || graph_check(cudnnBackendGetAttribute(heur, CUDNN_ATTR_ENGINEHEUR_RESULTS, CUDNN_TYPE_BACKEND_DESCRIPTOR, ASKED, &n, configs),
                                "the choice of an engine", p->e))
    return p->e->code;
  n = at_most(n, ASKED);
  for (int64_t i = 0; i < n; i++) {
    struct parts mine = {.e = p->e};
    int usable = read_choice(&mine, configs[i], choice);

    parts_close(&mine);
    if (p->e->code)
      return p->e->code;
    if (!usable)
      continue;
    r = plan_by(out, t, graph, choice, &last);
    if (!r && out->workspace <= most)
      return 0;
    if (!r) {
      r = err_set(&last, E_INTERNAL, "a plan wants %lld bytes of working memory for two pictures", (long long)out->workspace);
      graph_plan_close(out);
    }
    if (r == E_NOMEM) /* the next best would change the bits of pictures for want of memory */
      return err_set(p->e, r, "%s", last.msg);
  }
  return err_set(p->e, E_INTERNAL, "cuDNN has no usable engine among %d: %.200s%s", (int)n, last.msg, nvrtc_find());
}

/* Heuristics that know nothing of the shape, as for small pictures on a B300 in cuDNN 9.19, have a second list: slower engines that take anything. */
MUST_CHECK static int choose(struct graph_plan *out, struct parts *p, const struct graph_target *t, cudnnBackendDescriptor_t graph,
                             struct graph_choice *choice, int64_t most)
{
  int r = choose_by(CUDNN_HEUR_MODE_A, out, p, t, graph, choice, most);

  if (r != E_INTERNAL)
    return r;
  *p->e = (struct err){0};
  return choose_by(CUDNN_HEUR_MODE_FALLBACK, out, p, t, graph, choice, most);
}

/* most: bytes that an engine which is chosen here may work in. */
MUST_CHECK static int open_plan(struct graph_plan *out, const struct graph_target *t, const struct call *c, struct graph_choice *choice, int64_t most,
                                struct err *e)
{
  struct parts parts = {.e = e};
  cudnnBackendDescriptor_t graph = call_graph(&parts, t, c);
  int r = e->code;

  *out = (struct graph_plan){0};
  (void)nvrtc_find();
  if (!r)
    r = choice->engine < 0 ? choose(out, &parts, t, graph, choice, most) : plan_by(out, t, graph, choice, e);
  parts_close(&parts);
  return r;
}

/* Whether the engine that was chosen has to be given up, because it does not take the most pictures in the working memory that there is: one that pads the
 * channels of its input works in a share for each. */
MUST_CHECK static int outgrows(int *it_does, const struct graph_target *t, const struct call *c, const struct graph_choice *choice, struct err *e)
{
  struct gpu_attention attention;
  struct gpu_conv conv;
  struct call most = {NULL, NULL};
  struct graph_choice fixed = *choice;
  struct graph_plan p;
  struct err why = {0};
  int r;

  if (c->conv) {
    conv = *c->conv;
    conv.B = GPU_DNN_ROWS;
    most.conv = &conv;
  } else {
    attention = *c->attention;
    attention.B = GPU_DNN_ROWS;
    most.attention = &attention;
  }
  r = open_plan(&p, t, &most, &fixed, GPU_DNN_WORKSPACE, &why);
  graph_plan_close(&p);
  *it_does = r == E_INTERNAL;
  return r && r != E_INTERNAL ? err_set(e, r, "%s", why.msg) : 0;
}

MUST_CHECK static int open_call(struct graph_plan *p, const struct graph_target *t, const struct call *c, struct graph_choice *choice, struct err *e)
{
  int chooses = choice->engine < 0, it_does = 0, r = open_plan(p, t, c, choice, GPU_DNN_WORKSPACE, e);

  if (r || !chooses || p->workspace <= LITTLE)
    return r;
  r = outgrows(&it_does, t, c, choice, e);
  if (!r && !it_does)
    return 0;
  graph_plan_close(p);
  choice->engine = -1;
  return r ? r : open_plan(p, t, c, choice, LITTLE, e);
}

/* What earlier calls left in e is no reason to fail, and e may be NULL. */
MUST_CHECK static int handed_on(const struct err *mine, int r, struct err *e)
{
  return r ? err_set(e, r, "%s", mine->msg) : 0;
}

int graph_conv_open(struct graph_plan *p, const struct graph_target *t, const struct gpu_conv *c, struct graph_choice *choice, struct err *e)
{
  const struct call call = {c, NULL};
  struct err mine = {0};

  return handed_on(&mine, open_call(p, t, &call, choice, &mine), e);
}

int graph_attention_open(struct graph_plan *p, const struct graph_target *t, const struct gpu_attention *a, struct graph_choice *choice, struct err *e)
{
  const struct call call = {NULL, a};
  struct err mine = {0};

  return handed_on(&mine, open_call(p, t, &call, choice, &mine), e);
}

void graph_plan_close(struct graph_plan *p)
{
  if (p->plan)
    cudnnBackendDestroyDescriptor(p->plan);
  *p = (struct graph_plan){0};
}

/* A device by one attribute of its descriptor. */
MUST_CHECK static int device_by(cudnnBackendDescriptor_t *device, cudnnBackendAttributeName_t name, cudnnBackendAttributeType_t type, int64_t n,
                                const void *value, struct err *e)
{
  int r = graph_check(cudnnBackendCreateDescriptor(CUDNN_BACKEND_DEVICEPROP_DESCRIPTOR, device), "a device", e);

  if (r)
    return r;
  r = graph_check(cudnnBackendSetAttribute(*device, name, type, n, value), "a device's description", e);
  if (!r)
    r = graph_check(cudnnBackendFinalize(*device), "a device's description", e);
  if (r) {
    cudnnBackendDestroyDescriptor(*device);
    *device = NULL;
  }
  return r;
}

int graph_device_open(cudnnBackendDescriptor_t *device, const char *json, struct err *e)
{
  return device_by(device, CUDNN_ATTR_DEVICEPROP_JSON_REPRESENTATION, CUDNN_TYPE_CHAR, (int64_t)strlen(json) + 1, json, e);
}

int graph_device_of(cudnnBackendDescriptor_t *device, cudnnHandle_t handle, struct err *e)
{
  return device_by(device, CUDNN_ATTR_DEVICEPROP_HANDLE, CUDNN_TYPE_HANDLE, 1, &handle, e);
}

int graph_device_text(cudnnBackendDescriptor_t device, char **text, struct err *e)
{
  size_t n;

  return text_of(device, CUDNN_ATTR_DEVICEPROP_JSON_REPRESENTATION, "a device's description", text, &n, e);
}
