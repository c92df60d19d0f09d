/*
 * bench.c - what a card does with real dimensions, as one JSON object a line: `make gpu-check` puts the lines into its report.
 *
 *   bench [ARCH [SIZE [BATCHES [STEPS [SWAPS [in-turn]]]]]]   defaults: sd15 512 16 8 200; BATCHES is the largest, and 1, 2, 4, ... come before it
 *
 * Weights are drawn in memory (random: chips are faster on zeros). Times are of the wall, from before a call to the end of the stream's work, medians;
 * the matrix and copy peaks that they are compared with are measured in the same run. Lines: "peak", "lowrank" (a shape of the attention's linears, one
 * result of x or three: what it takes, captured, and what factors of rank 4 and 28 add to it), "step" (captured or not, rank of the adapter, folded or
 * not), "ends" (text encoder, VAE), "same" (a picture alone against the same in the largest batch, bit by bit), "swap" (generations folded and
 * published while pictures are drawn). Status 0: every line was printed and the bits were the same.
 *
 * in-turn: generations are built between pictures on the one thread (the simulator has but one), which measures nothing.
 *
 * Plans are kept in build/gpu-check, when that is there: the second half reads what the first has written.
 *
 * Called by tests/gpu/check. Links kernels/ and models/, nothing of the server. Threads: the device's, and a loader's during "swap".
 */
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "models/batch.h"
#include "models/pipeline.h"
#include "tests/golden/make_adapter.h"

extern const struct be_ops be_cuda;

enum { MOST = 64, WARM = 3, LONGEST = 1000 };

struct setup {
  const char *arch;
  int size, batches, steps, swaps, in_turn;
};

struct rig {
  const struct setup *s;
  struct be be, lane;
  struct model *m;
  struct batch *batch;
  double flops; /* of a step of one picture */
};

static double now(void)
{
  struct timespec t;

  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int by_value(const void *a, const void *b)
{
  double x = *(const double *)a, y = *(const double *)b;

  return (x > y) - (x < y);
}

static double median(double *v, int n)
{
  qsort(v, (size_t)n, sizeof *v, by_value);
  return n % 2 ? v[n / 2] : (v[n / 2 - 1] + v[n / 2]) / 2;
}

/* n numbers from -0.5 to 0.5, or NULL. */
static float *drawn(int64_t n)
{
  float *v = malloc((size_t)n * sizeof *v);
  uint32_t seed = 1;

  for (int64_t i = 0; v && i < n; i++) {
    seed = seed * 1664525u + 1013904223u;
    v[i] = (float)(seed >> 8) * 0x1p-24f - 0.5f;
  }
  return v;
}

/* ---- peaks ---- */

/* The median of some calls of y = x w^T, n in every direction, or of copying as much. */
MUST_CHECK static int peak_of(struct be *be, struct tensor y, struct tensor x, const struct weight *w, int is_copy, double *seconds, struct err *e)
{
  double t[9];
  int r = 0;

  for (int i = -2; i < 9 && !r; i++) {
    double start = now();

    r = is_copy ? be->ops->add(be, y, x, x, e) : be->ops->linear(be, y, x, w, tensor_none(), e);
    if (!r)
      r = be->ops->sync(be, e);
    if (i >= 0)
      t[i] = now() - start;
  }
  *seconds = r ? 0 : median(t, 9);
  return r;
}

MUST_CHECK static int peaks(struct be *be, int n, struct err *e)
{
  struct tensor x = {NULL, {1, 1, n, n}, be->act}, y = x;
  float *v = drawn((int64_t)n * n);
  struct weight *w = NULL;
  double product = 0, copy = 0;
  int r = v ? 0 : err_set(e, E_NOMEM, "out of memory");

  if (!r)
    r = be->ops->weight_load(be, &(struct weight_desc){.kind = WEIGHT_LINEAR, .out = n, .in = n, .w = v}, NULL, &w, e);
  if (!r && !(r = be->ops->mem_alloc(be, tensor_bytes(x), &x.p, e)) && !(r = be->ops->mem_alloc(be, tensor_bytes(y), &y.p, e)) &&
      !(r = be->ops->upload(be, x, v, DT_F32, e)) && !(r = peak_of(be, y, x, w, 0, &product, e)))
    r = peak_of(be, y, x, w, 1, &copy, e);
  if (!r)
    printf("{\"line\": \"peak\", \"n\": %d, \"matrix_tflops\": %.2f, \"copy_gbytes_per_s\": %.1f}\n", n, 2.0 * n * n * n / product / 1e12,
           2.0 * (double)tensor_bytes(x) / copy / 1e9);
  be->ops->mem_free(be, x.p);
  be->ops->mem_free(be, y.p);
  be->ops->weight_free(be, w);
  free(v);
  return r;
}

/* ---- linears of the attention, alone and with factors ---- */

/* The transformer layers of a UNet. Each has q, k and v of one input once, and three linears alone: what follows the attention to itself, and q and what
 * follows of that to the prompt. */
static const struct shape {
  const char *arch;
  int layers, level; /* the side is halved at each level */
  int64_t C;
} shapes[] = {{"sd15", 5, 0, 320},  {"sd15", 5, 1, 640},   {"sd15", 5, 2, 1280}, {"sd15", 1, 3, 1280},
              {"sdxl", 10, 1, 640}, {"sdxl", 60, 2, 1280}, {"emoji", 3, 1, 128}, {"emoji", 4, 2, 192}};

enum { CALLS = 24 /* of a pass */, BUFFERS = 4, RESULTS = 3 };

struct linears {
  struct be *be;
  struct tensor x[BUFFERS], y[BUFFERS]; /* one picture with guidance; y has room for RESULTS */
  struct weight *w;
  struct lowrank *l[2];
};

static void linears_close(struct linears *p)
{
  for (int i = 0; i < BUFFERS; i++) {
    p->be->ops->mem_free(p->be, p->x[i].p);
    p->be->ops->mem_free(p->be, p->y[i].p);
  }
  for (int i = 0; i < 2; i++)
    p->be->ops->lowrank_free(p->be, p->l[i]);
  p->be->ops->weight_free(p->be, p->w);
}

MUST_CHECK static int linears_open(struct linears *p, struct be *be, int64_t T, int64_t C, struct err *e)
{
  int64_t n = 2 * T * C > C * C ? 2 * T * C : C * C;
  float *v = drawn(n);
  int r = v ? 0 : err_set(e, E_NOMEM, "out of memory");

  *p = (struct linears){.be = be};
  if (!r)
    r = be->ops->weight_load(be, &(struct weight_desc){.kind = WEIGHT_LINEAR, .out = C, .in = C, .w = v}, NULL, &p->w, e);
  for (int i = 0; i < 2 && !r; i++)
    r = be->ops->lowrank_load(be, &(struct lowrank_desc){.out = C, .in = C, .rank = i ? 28 : 4, .down = v, .up = v}, &p->l[i], e);
  for (int i = 0; i < BUFFERS && !r; i++) {
    p->x[i] = (struct tensor){NULL, {2, 1, T, C}, be->act};
    p->y[i] = (struct tensor){NULL, {RESULTS * 2, 1, T, C}, be->act};
    (void)((r = be->ops->mem_alloc(be, tensor_bytes(p->x[i]), &p->x[i].p, e)) || (r = be->ops->mem_alloc(be, tensor_bytes(p->y[i]), &p->y[i].p, e)) ||
           (r = be->ops->upload(be, p->x[i], v, DT_F32, e)));
  }
  free(v);
  return r;
}

/* `results` linears of one x, followed by their factors unless l is NULL, CALLS times in a pass; seconds of one time. */
MUST_CHECK static int linears_time(struct linears *p, int results, const struct lowrank *l, int times, double *seconds, struct err *e)
{
  const struct lowrank *const row[RESULTS * 2] = {l, l, l, l, l, l};
  const struct be_ops *o = p->be->ops;
  double t[LONGEST];
  int r = 0;

  for (int k = -WARM; k < times && !r; k++) {
    double from = now();

    for (int again = 1; again && !r;) {
      int code = 0;

      r = o->pass_begin(p->be, NULL, 0, e);
      for (int i = 0; i < CALLS && !r && !code; i++) {
        struct tensor x = p->x[i % BUFFERS], y = tensor_batch(p->y[i % BUFFERS], 0, 2 * results);

        for (int j = 0; j < results && !code; j++)
          code = o->linear(p->be, tensor_batch(y, 2 * j, 2), x, p->w, tensor_none(), e);
        if (!code && l)
          code = o->lowrank(p->be, y, x, row, e);
      }
      if (!r)
        r = o->pass_end(p->be, code, &again, e);
    }
    if (!r)
      r = o->sync(p->be, e);
    if (k >= 0)
      t[k] = (now() - from) / CALLS;
  }
  *seconds = r ? 0 : median(t, times);
  return r;
}

MUST_CHECK static int linears(struct be *be, const struct setup *s, struct err *e)
{
  int r = 0;

  for (size_t i = 0; i < sizeof shapes / sizeof *shapes && !r; i++) {
    int64_t side = s->size / 8 >> shapes[i].level;
    struct linears p;

    if (strcmp(shapes[i].arch, s->arch) != 0)
      continue;
    r = linears_open(&p, be, side * side, shapes[i].C, e);
    for (int results = 1; results <= RESULTS && !r; results += RESULTS - 1) {
      double alone, with[2];

      r = linears_time(&p, results, NULL, s->steps, &alone, e);
      for (int k = 0; k < 2 && !r; k++)
        r = linears_time(&p, results, p.l[k], s->steps, &with[k], e);
      if (!r)
        printf("{\"line\": \"lowrank\", \"arch\": \"%s\", \"rows\": %d, \"channels\": %d, \"results\": %d, \"in_a_step\": %d, \"linear_us\": %.3f, "
               "\"r4_us\": %.3f, \"r28_us\": %.3f}\n",
               s->arch, (int)(2 * side * side), (int)shapes[i].C, results, shapes[i].layers * (results == 1 ? 3 : 1), 1e6 * alone,
               1e6 * (with[0] - alone), 1e6 * (with[1] - alone));
    }
    linears_close(&p);
  }
  return r;
}

/* ---- pictures ---- */

MUST_CHECK static int start(struct rig *r, struct generation *g, int seed, struct draw **d, struct err *e)
{
  const struct draw_params p = {.prompt = "", .negative = "", .width = r->s->size, .height = r->s->size, .steps = LONGEST, .guidance = 7.5f,
                                .seed = (uint64_t)seed, .sampler = SAMPLER_DDIM};
  int code = draw_prepare(d, r->m, &p, e);

  return code ? code : draw_start(*d, model_lane(r->m), g, e);
}

/* One step of all, to the end of the device's work. */
MUST_CHECK static int step(struct rig *r, struct draw **d, int n, double *seconds, struct err *e)
{
  struct err each[MOST];
  double from = now();
  int code = 0;

  batch_step(r->batch, d, n, each);
  for (int i = 0; i < n && !code; i++)
    if (each[i].code)
      code = err_set(e, each[i].code, "%s", each[i].msg);
  if (!code)
    code = r->be.ops->sync(&r->be, e);
  *seconds = now() - from;
  return code;
}

MUST_CHECK static int time_steps(struct rig *r, struct generation *g, int n, double *seconds, struct err *e)
{
  struct draw *d[MOST] = {NULL};
  double t[LONGEST], warm;
  int code = 0, steps = r->s->steps;

  for (int i = 0; i < n && !code; i++)
    code = start(r, g, i, &d[i], e);
  for (int i = 0; i < WARM && !code; i++) /* plans; then the capture; then the first replay */
    code = step(r, d, n, &warm, e);
  for (int i = 0; i < steps && !code; i++)
    code = step(r, d, n, &t[i], e);
  *seconds = code ? 0 : median(t, steps);
  for (int i = 0; i < n; i++)
    draw_close(d[i]);
  return code;
}

static void print_step(const struct rig *r, int captured, int n, int rank, const char *form, double seconds)
{
  printf("{\"line\": \"step\", \"arch\": \"%s\", \"size\": %d, \"captured\": %s, \"pictures\": %d, \"rank\": %d, \"form\": \"%s\", \"ms\": %.4f, "
         "\"picture_steps_per_s\": %.2f, \"tflops\": %.2f}\n",
         r->s->arch, r->s->size, captured ? "true" : "false", n, rank, form, 1e3 * seconds, n / seconds, r->flops * n / seconds / 1e12);
  fflush(stdout);
}

MUST_CHECK static int build(struct rig *r, const char *name, int rank, enum generation_form form, struct generation **g, struct err *e)
{
  const struct adapter_plan plan = {name, rank, 0.01f, DELTA_LOWRANK, "unet", 1};
  struct adapter *a = adapter_make(model_base(r->m), &plan);
  const struct adapter_use use = {.adapter = a, .weight = 1, .required = 1};
  int code = generation_build(g, model_base(r->m), model_sources(r->m), &r->lane, &use, 1, form, NULL, e);

  adapter_close(a);
  return code;
}

/* What an adapter costs a step: beside the weights in two ranks, and folded into them. */
MUST_CHECK static int adapters(struct rig *r, struct err *e)
{
  static const struct {
    int rank;
    enum generation_form form;
    const char *name;
  } cases[] = {{4, FORM_RUNTIME, "runtime"}, {28, FORM_RUNTIME, "runtime"}, {28, FORM_FOLDED, "folded"}};
  int code = 0;

  for (size_t i = 0; i < sizeof cases / sizeof *cases && !code; i++) {
    struct generation *g = NULL;
    double seconds;

    code = build(r, "bench", cases[i].rank, cases[i].form, &g, e);
    for (int n = 1; n <= 8 && n <= r->s->batches && !code; n *= 8) {
      code = time_steps(r, g, n, &seconds, e);
      if (!code)
        print_step(r, 1, n, cases[i].rank, cases[i].name, seconds);
    }
    generation_unref(g);
  }
  return code;
}

MUST_CHECK static int batches(struct rig *r, int captured, int most, struct err *e)
{
  double seconds;
  int code = 0;

  for (int n = 1; n <= most && !code; n *= 2) {
    code = time_steps(r, model_base(r->m), n, &seconds, e);
    if (!code)
      print_step(r, captured, n, 0, "base", seconds);
  }
  return code;
}

/* Both prompts encoded and the noise drawn; the VAE. */
MUST_CHECK static int ends(struct rig *r, struct err *e)
{
  enum { TIMES = 5 };
  const struct draw_params p = {.prompt = "", .negative = "", .width = r->s->size, .height = r->s->size, .steps = 1, .guidance = 7.5f,
                                .sampler = SAMPLER_DDIM};
  uint8_t *rgb = malloc((size_t)r->s->size * (size_t)r->s->size * 3);
  double first[TIMES], last[TIMES], from;
  int code = rgb ? 0 : err_set(e, E_NOMEM, "out of memory");

  for (int i = -1; i < TIMES && !code; i++) {
    struct draw *d = NULL;
    double begun;

    code = draw_prepare(&d, r->m, &p, e);
    from = now();
    if (!code)
      code = draw_start(d, model_lane(r->m), model_base(r->m), e);
    if (!code)
      code = r->be.ops->sync(&r->be, e);
    begun = now() - from;
    if (!code)
      code = draw_step(d, e);
    if (!code)
      code = r->be.ops->sync(&r->be, e);
    from = now();
    if (!code)
      code = draw_decode(d, model_lane(r->m), rgb, e);
    if (i >= 0) {
      first[i] = begun;
      last[i] = now() - from;
    }
    draw_close(d);
  }
  if (!code)
    printf("{\"line\": \"ends\", \"arch\": \"%s\", \"size\": %d, \"start_ms\": %.3f, \"vae_ms\": %.3f}\n", r->s->arch, r->s->size,
           1e3 * median(first, TIMES), 1e3 * median(last, TIMES));
  free(rgb);
  return code;
}

/* Some steps of the first of n pictures, alone or in their company -> its latents. */
MUST_CHECK static int latents(struct rig *r, int n, float *out, struct err *e)
{
  struct draw *d[MOST] = {NULL};
  double seconds;
  int code = 0;

  for (int i = 0; i < n && !code; i++)
    code = start(r, model_base(r->m), 40 + i, &d[i], e);
  for (int i = 0; i < 4 && !code; i++)
    code = step(r, d, n, &seconds, e);
  if (!code)
    code = draw_latents(d[0], out, e);
  for (int i = 0; i < n; i++)
    draw_close(d[i]);
  return code;
}

MUST_CHECK static int same(struct rig *r, struct err *e)
{
  size_t side = (size_t)(r->s->size / model_info(r->m)->vae_factor), count = side * side * (size_t)model_info(r->m)->latent_channels;
  float *alone = calloc(count, sizeof *alone), *among = calloc(count, sizeof *among);
  int code = alone && among ? 0 : err_set(e, E_NOMEM, "out of memory"), equal = 1;

  if (!code)
    code = latents(r, 1, alone, e);
  for (int n = 2; n <= r->s->batches && !code; n *= 2) {
    code = latents(r, n, among, e);
    equal = equal && !memcmp(alone, among, count * sizeof *alone);
  }
  if (!code)
    printf("{\"line\": \"same\", \"arch\": \"%s\", \"largest_batch\": %d, \"bits_equal\": %s}\n", r->s->arch, r->s->batches, equal ? "true" : "false");
  if (!code && !equal)
    code = err_set(e, E_INTERNAL, "the bits of a picture depend on its batch");
  free(alone);
  free(among);
  return code;
}

/* ---- swaps ---- */

struct loader {
  struct rig *r;
  _Atomic(struct generation *) fresh; /* built, not yet taken by the device thread */
  atomic_int done;
  double build_s[LONGEST];
  int built;
  struct err e;
};

static void load_one(struct loader *l, int i)
{
  struct generation *g = NULL;
  double from = now();

  if (build(l->r, i % 2 ? "one" : "two", 8, i % 4 < 2 ? FORM_FOLDED : FORM_RUNTIME, &g, &l->e))
    return;
  l->build_s[l->built++] = now() - from;
  generation_unref(atomic_exchange(&l->fresh, g)); /* nobody drew with the one before */
  if (l->built == l->r->s->swaps)
    atomic_store(&l->done, 1);
}

static void *load(void *arg)
{
  struct loader *l = arg;

  for (int i = 0; i < l->r->s->swaps && !l->e.code; i++)
    load_one(l, i);
  atomic_store(&l->done, 1);
  return NULL;
}

/* Pictures are drawn one after the other, each under the newest generation, while the loader builds and publishes. */
MUST_CHECK static int draw_under_load(struct rig *r, struct loader *l, double *worst, int *steps, int *taken, struct err *e)
{
  struct generation *g = generation_ref(model_base(r->m)), *newer;
  int code = 0;

  while (!code && !atomic_load(&l->done) && !(r->s->in_turn && l->e.code)) {
    struct draw *d = NULL;
    double seconds;

    if (r->s->in_turn)
      load_one(l, l->built);
    newer = atomic_exchange(&l->fresh, NULL);
    if (newer) {
      generation_unref(g);
      g = newer;
      ++*taken;
    }
    code = start(r, g, *steps, &d, e);
    for (int i = 0; i < 4 && !code; i++) {
      code = step(r, &d, 1, &seconds, e);
      if (i == 3 && seconds > *worst) /* its first steps may be captures */
        *worst = seconds;
      ++*steps;
    }
    draw_close(d);
  }
  generation_unref(g);
  return code;
}

MUST_CHECK static int swaps(struct rig *r, struct err *e)
{
  static struct loader l;
  double alone, worst = 0;
  int steps = 0, taken = 0, code = time_steps(r, model_base(r->m), 1, &alone, e);
  pthread_t thread = 0;

  l.r = r;
  if (!code && !r->s->in_turn && pthread_create(&thread, NULL, load, &l))
    code = err_set(e, E_NOMEM, "no thread");
  if (code)
    return code;
  code = draw_under_load(r, &l, &worst, &steps, &taken, e);
  if (!r->s->in_turn)
    pthread_join(thread, NULL);
  generation_unref(atomic_exchange(&l.fresh, NULL));
  if (!code && l.e.code)
    code = err_set(e, l.e.code, "%s", l.e.msg);
  if (!code)
    printf("{\"line\": \"swap\", \"arch\": \"%s\", \"published\": %d, \"drawn_under\": %d, \"steps\": %d, \"step_alone_ms\": %.3f, "
           "\"step_worst_ms\": %.3f, \"build_ms\": %.2f}\n",
           r->s->arch, l.built, taken, steps, 1e3 * alone, 1e3 * worst, 1e3 * median(l.build_s, l.built));
  return code;
}

/* ---- all of it ---- */

MUST_CHECK static int rig_open(struct rig *r, const struct setup *s, int no_capture, struct err *e)
{
  int code;

  *r = (struct rig){.s = s};
  (void)((code = be_open(&r->be, &be_cuda, &(struct be_config){.no_capture = no_capture, .plan_cache = "build/gpu-check"}, e)) ||
         (code = model_open_synthetic(&r->m, &r->be, s->arch, e)) || (code = model_reserve(r->m, s->size, s->size, e)) ||
         (code = batch_open(&r->batch, r->m, s->batches, e)) || (code = r->be.ops->open_lane(&r->lane, &r->be, 0, e)) ||
         (code = model_step_flops(r->m, s->size, s->size, &r->flops, e)));
  return code;
}

static void rig_close(struct rig *r)
{
  batch_close(r->batch);
  model_close(r->m);
  be_close(&r->lane);
  be_close(&r->be);
}

int main(int argc, char **argv)
{
  struct setup s = {.arch = argc > 1 ? argv[1] : "sd15"};
  struct err e = {0};
  struct rig r;
  int code;

  s.size = argc > 2 ? (int)strtol(argv[2], NULL, 10) : 512;
  s.batches = argc > 3 ? (int)strtol(argv[3], NULL, 10) : 16;
  s.steps = argc > 4 ? (int)strtol(argv[4], NULL, 10) : 8;
  s.swaps = argc > 5 ? (int)strtol(argv[5], NULL, 10) : 200;
  s.in_turn = argc > 6 && !strcmp(argv[6], "in-turn");
  if (s.size < 8 || s.batches < 1 || s.batches > MOST / 2 || s.steps < 1 || s.steps > LONGEST - WARM || s.swaps < 1 || s.swaps > LONGEST) {
    fprintf(stderr, "usage: bench [ARCH [SIZE [BATCHES [STEPS [SWAPS [in-turn]]]]]]\n");
    return 2;
  }
  setvbuf(stdout, NULL, _IOLBF, 0);
  code = rig_open(&r, &s, 0, &e);
  if (!code)
    fprintf(stderr, "%s\n", r.be.info);
  (void)(code || (code = peaks(&r.be, s.size > 256 ? 8192 : 128, &e)) || (code = linears(&r.be, &s, &e)) ||
         (code = batches(&r, 1, s.batches, &e)) || (code = adapters(&r, &e)) || (code = ends(&r, &e)) || (code = same(&r, &e)) || (code = swaps(&r, &e)));
  rig_close(&r);
  if (!code) {
    code = rig_open(&r, &s, 1, &e);
    if (!code)
      code = batches(&r, 0, s.batches < 2 ? s.batches : 2, &e);
    rig_close(&r);
  }
  if (code)
    fprintf(stderr, "bench: %s\n", e.msg);
  return code != 0;
}
