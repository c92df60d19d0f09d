/*
 * bench_ops.c - where the time of be_cpu goes: every op call of a real UNet step and a real VAE decode, timed in place.
 *
 * Puts a table of timing shims between the networks and be_cpu, draws a picture with weights made in memory, and keeps for each call
 * of a step the shortest of all steps: what other processes steal in one step, another gives back. Prints totals by op,
 * then the shapes that take longest, each with its rate and oneDNN's name for the code.
 *
 *   make && cc -std=c11 -O2 -D_GNU_SOURCE -I. -fopenmp kernels/lab/bench_ops.c build/release/libsafelight.a \
 *     -lmicrohttpd -ljansson -ldeflate -lutf8proc -lsodium -lsqlite3 -ldnnl -lm -lpthread -o build/bench_ops
 *   build/bench_ops [ARCH [SIZE [STEPS [THREADS [f32]]]]]      sd15 512 4 0
 *   build/bench_ops lowrank [THREADS [SECONDS [f32]]]          1 2: low-rank factors beside the linears of SD1.5's attention, each
 *                                                              timed in turn with the linear that it rides on
 *
 * Not part of the product. Threads: one, and those of the backend.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>

#include "kernels/cpu/cpu.h"
#include "kernels/cpu/peak.h"
#include "models/pipeline.h"

enum { MAX_CALLS = 8192, MAX_ROWS = 1024 };

struct call {
  char op[16], shape[72];
  double best, flops, bytes;
};

struct log {
  struct call call[MAX_CALLS];
  int n, at;
};

static struct log step_log, decode_log, other_log, *now = &other_log;

/* With one thread its processor time, so that a busy neighbour counts less; else the clock on the wall. */
static clockid_t which_clock = CLOCK_MONOTONIC;

static double clock_s(void)
{
  struct timespec t;

  clock_gettime(which_clock, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void note(const char *op, const char *shape, double seconds, double flops, double bytes)
{
  struct call *c;

  if (now->at == MAX_CALLS)
    return;
  c = &now->call[now->at++];
  if (now->at > now->n) {
    now->n = now->at;
    snprintf(c->op, sizeof c->op, "%s", op);
    snprintf(c->shape, sizeof c->shape, "%s", shape);
    c->best = seconds;
    c->flops = flops;
    c->bytes = bytes;
  } else if (seconds < c->best) {
    c->best = seconds;
  }
}

static const char *dims(struct tensor t)
{
  static char s[2][40];
  static int k;

  k ^= 1;
  snprintf(s[k], sizeof s[k], "%lldx%lldx%lldx%lld", (long long)t.d[0], (long long)t.d[1], (long long)t.d[2],
           (long long)t.d[3]);
  return s[k];
}

#define TIMED(op, call, flops, bytes, ...)                      \
  do {                                                          \
    char shape_[72];                                            \
    double t_ = clock_s();                                      \
    int rc_ = (call);                                           \
                                                                \
    t_ = clock_s() - t_;                                        \
    snprintf(shape_, sizeof shape_, __VA_ARGS__);               \
    note(op, shape_, t_, flops, bytes);                         \
    return rc_;                                                 \
  } while (0)

static int t_conv2d(struct be *be, struct tensor y, struct tensor x, const struct weight *w, struct tensor r, struct err *e)
{
  double flops = 2.0 * (double)(tensor_rows(y) * w->in * w->out) * w->kh * w->kw;

  TIMED(w->is_linear ? "linear" : "conv", be_cpu.conv2d(be, y, x, w, r, e), flops, 0, "%s>%lld k%d s%d%s", dims(x), (long long)w->out, w->kh,
        w->stride, !r.p ? "" : r.p == y.p ? " +=" : " +r");
}

static int t_linear(struct be *be, struct tensor y, struct tensor x, const struct weight *w, struct tensor r, struct err *e)
{
  TIMED("linear", be_cpu.linear(be, y, x, w, r, e), 2.0 * (double)(tensor_rows(y) * w->in * w->out), 0, "%lldx%lld>%lld%s",
        (long long)tensor_rows(x), (long long)w->in, (long long)w->out, !r.p ? "" : r.p == y.p ? " +=" : " +r");
}

static int t_groupnorm(struct be *be, struct tensor y, struct tensor x, struct tensor t, const struct weight *w, int groups,
                       float eps, int silu, struct err *e)
{
  TIMED("groupnorm", be_cpu.groupnorm(be, y, x, t, w, groups, eps, silu, e), 0, 3.0 * (double)tensor_bytes(x), "%s%s%s",
        dims(x), t.p ? " temb" : "", silu ? " silu" : "");
}

static int t_layernorm(struct be *be, struct tensor y, struct tensor x, const struct weight *w, float eps, struct err *e)
{
  TIMED("layernorm", be_cpu.layernorm(be, y, x, w, eps, e), 0, 2.0 * (double)tensor_bytes(x), "%s", dims(x));
}

static int t_attention(struct be *be, struct tensor o, struct tensor q, const struct kv_row *kv, int heads, float scale,
                       int causal, struct err *e)
{
  double flops = 4.0 * (double)(tensor_count(q) * kv[0].T);

  TIMED("attention", be_cpu.attention(be, o, q, kv, heads, scale, causal, e), flops, 0, "%s heads %d keys %lld", dims(q),
        heads, (long long)kv[0].T);
}

static int t_geglu(struct be *be, struct tensor y, struct tensor x, struct err *e)
{
  TIMED("geglu", be_cpu.geglu(be, y, x, e), 0, 3.0 * (double)tensor_bytes(y), "%s", dims(x));
}

static int t_act(struct be *be, struct tensor y, struct tensor x, enum act_kind kind, struct err *e)
{
  TIMED("act", be_cpu.act(be, y, x, kind, e), 0, 2.0 * (double)tensor_bytes(x), "%s", dims(x));
}

static int t_add(struct be *be, struct tensor y, struct tensor a, struct tensor b, struct err *e)
{
  TIMED("add", be_cpu.add(be, y, a, b, e), 0, 3.0 * (double)tensor_bytes(y), "%s", dims(y));
}

static int t_concat(struct be *be, struct tensor y, struct tensor a, struct tensor b, struct err *e)
{
  TIMED("concat", be_cpu.concat(be, y, a, b, e), 0, 2.0 * (double)tensor_bytes(y), "%s", dims(y));
}

static int t_upsample2x(struct be *be, struct tensor y, struct tensor x, struct err *e)
{
  TIMED("upsample", be_cpu.upsample2x(be, y, x, e), 0, 1.25 * (double)tensor_bytes(y), "%s", dims(y));
}

static int t_timestep_embed(struct be *be, struct tensor y, const float *t, int flip, float shift, struct err *e)
{
  TIMED("timestep", be_cpu.timestep_embed(be, y, t, flip, shift, e), 0, 0, "%s", dims(y));
}

static int t_gather_scale(struct be *be, struct tensor y, struct tensor x, const int *src, const float *scale, struct err *e)
{
  TIMED("gather", be_cpu.gather_scale(be, y, x, src, scale, e), 0, 0, "%s", dims(y));
}

static int t_sampler_step(struct be *be, struct tensor x, struct tensor old, struct tensor model, struct tensor noise,
                          const struct step_coef *coef, struct err *e)
{
  TIMED("sampler", be_cpu.sampler_step(be, x, old, model, noise, coef, e), 0, 0, "%s", dims(x));
}

static int t_to_rgb8(struct be *be, struct tensor y, struct tensor x, struct err *e)
{
  TIMED("rgb8", be_cpu.to_rgb8(be, y, x, e), 0, 0, "%s", dims(x));
}

/* Loading is summed on its own: generating the numbers takes as long again. */
static double load_s, load_params;

static int t_weight_load(struct be *be, const struct weight_desc *d, const struct weight *like, struct weight **w, struct err *e)
{
  double t = clock_s();
  int rc = be_cpu.weight_load(be, d, like, w, e);

  load_s += clock_s() - t;
  load_params += (double)(d->out * (d->kind == WEIGHT_NORM ? 1 : d->in)) * (d->kind == WEIGHT_CONV ? d->kh * d->kw : 1);
  return rc;
}

static int by_time(const void *a, const void *b)
{
  double x = ((const struct call *)a)->best, y = ((const struct call *)b)->best;

  return (x < y) - (x > y);
}

/* Sums equal calls (by op, or by op and shape) and prints them, longest first. */
static void print(const struct log *l, int by_shape, int rows, double peak)
{
  static struct call sum[MAX_ROWS];
  static int count[MAX_ROWS];
  struct call total = {"all", "", 0, 0, 0};
  int n = 0;

  for (int i = 0; i < l->n; i++) {
    const struct call *c = &l->call[i];
    int k = 0;

    while (k < n && (strcmp(sum[k].op, c->op) || (by_shape && strcmp(sum[k].shape, c->shape))))
      k++;
    if (k == n && n < MAX_ROWS) {
      sum[n++] = *c;
      sum[k].bytes = sum[k].flops = sum[k].best = 0;
      count[k] = 0;
    }
    sum[k].best += c->best;
    sum[k].flops += c->flops;
    sum[k].bytes += c->bytes;
    sum[k].op[15] = 0;
    count[k]++;
    total.best += c->best;
    total.flops += c->flops;
  }
  for (int k = 0; k < n; k++) /* the count travels with the row */
    if (by_shape)
      snprintf(sum[k].shape + strlen(sum[k].shape), sizeof sum[k].shape - strlen(sum[k].shape), "  x%d", count[k]);
    else
      snprintf(sum[k].shape, sizeof sum[k].shape, "x%d", count[k]);
  qsort(sum, (size_t)n, sizeof *sum, by_time);
  sum[n < MAX_ROWS ? n : n - 1] = total;
  for (int k = 0; k <= n && k < MAX_ROWS; k++)
    if (k < rows || k == n)
      printf("%-10s %-44s %9.3f ms %5.1f%%  %6.3f TFLOP/s (%2.0f%%)  %6.1f GB/s\n", sum[k].op, sum[k].shape, sum[k].best * 1e3,
             100 * sum[k].best / total.best, sum[k].flops / sum[k].best * 1e-12, 100 * sum[k].flops / sum[k].best / peak,
             sum[k].bytes / sum[k].best * 1e-9);
}

static int fail(const struct err *e)
{
  fprintf(stderr, "%s: %s\n", err_name(e->code), e->msg);
  return 1;
}

/* ---- low-rank factors ---- */

/* The projections of a UNet step at 512x512 with guidance: rows of a picture, inputs, outputs, and how many there are in a step. The
 * keys and values of a prompt are made once per picture: they count nothing. */
static const struct projection {
  int64_t T, in, out;
  int count;
} projections[] = {{4096, 320, 320, 30}, {1024, 640, 640, 30}, {256, 1280, 1280, 30}, {64, 1280, 1280, 6},
                   {77, 768, 320, 0},    {77, 768, 640, 0},    {77, 768, 1280, 0}};

struct riders {
  struct weight *w;
  struct lowrank *l[2];
  struct tensor x, y;
};

static void random_floats(float *p, int64_t n, float gain)
{
  static uint32_t s = 1;

  for (int64_t i = 0; i < n; i++) {
    s = s * 1664525u + 1013904223u;
    p[i] = gain * (float)(int32_t)s * 0x1p-31f;
  }
}

static int riders_open(struct riders *r, struct be *be, const struct projection *p, const int *rank, struct err *e)
{
  int64_t widest = p->in > p->out ? p->in : p->out, n = widest * (2 * p->T > 1280 ? 2 * p->T : 1280);
  float *v = malloc((size_t)n * sizeof *v);
  struct weight_desc wd = {.kind = WEIGHT_LINEAR, .out = p->out, .in = p->in, .w = v, .w_type = DT_F32};
  int rc;

  if (!v)
    return err_set(e, E_NOMEM, "no memory");
  random_floats(v, n, 0.05f);
  rc = be_cpu.weight_load(be, &wd, NULL, &r->w, e);
  for (int i = 0; i < 2 && !rc; i++) {
    struct lowrank_desc ld = {.out = p->out, .in = p->in, .rank = rank[i], .down = v, .up = v + rank[i] * p->in};

    rc = be_cpu.lowrank_load(be, &ld, &r->l[i], e);
  }
  r->x = (struct tensor){NULL, {2, 1, p->T, p->in}, be->act};
  r->y = (struct tensor){NULL, {2, 1, p->T, p->out}, be->act};
  if (!rc)
    rc = be_cpu.mem_alloc(be, tensor_bytes(r->x), &r->x.p, e);
  if (!rc)
    rc = be_cpu.mem_alloc(be, tensor_bytes(r->y), &r->y.p, e);
  if (!rc)
    rc = be_cpu.upload(be, r->x, v, DT_F32, e);
  free(v);
  return rc;
}

static void riders_close(struct riders *r, struct be *be)
{
  be_cpu.weight_free(be, r->w);
  be_cpu.lowrank_free(be, r->l[0]);
  be_cpu.lowrank_free(be, r->l[1]);
  be_cpu.mem_free(be, r->x.p);
  be_cpu.mem_free(be, r->y.p);
}

/* The shortest time of the linear, and of each of the two ranks directly after it. */
static int ride(struct riders *r, struct be *be, double seconds, double *linear, double *lowrank, struct err *e)
{
  double until = clock_s() + seconds, t;
  int rc = 0;

  *linear = lowrank[0] = lowrank[1] = 1e9;
  for (int i = 0; !rc && (i < 6 || clock_s() < until); i++) {
    const struct lowrank *row[2] = {r->l[i % 2], r->l[i % 2]};

    t = clock_s();
    rc = be_cpu.linear(be, r->y, r->x, r->w, tensor_none(), e);
    t = clock_s() - t;
    *linear = t < *linear ? t : *linear;
    t = clock_s();
    rc = rc ? rc : be_cpu.lowrank(be, r->y, r->x, row, e);
    t = clock_s() - t;
    lowrank[i % 2] = t < lowrank[i % 2] ? t : lowrank[i % 2];
  }
  return rc;
}

static int bench_lowrank(const struct be_config *cfg, double seconds, struct err *e)
{
  static const int rank[2] = {4, 28};
  double step[3] = {0, 0, 0}; /* linears, and what each rank adds */
  struct be be = {0};
  int rc = be_open(&be, &be_cpu, cfg, e);

  if (rc)
    return rc;
  if (be.threads == 1)
    which_clock = CLOCK_THREAD_CPUTIME_ID;
  printf("%s%s\n%-22s %9s %9s %9s %9s %9s\n", be.info, be.threads == 1 ? ", processor time" : "", "rows x in > out", "linear ms",
         "r=4 ms", "of it", "r=28 ms", "of it");
  for (size_t i = 0; i < sizeof projections / sizeof *projections && !rc; i++) {
    const struct projection *p = &projections[i];
    struct riders r = {0};
    double linear = 0, add[2] = {0, 0};
    char name[64];

    rc = riders_open(&r, &be, p, rank, e);
    if (!rc)
      rc = ride(&r, &be, seconds, &linear, add, e);
    riders_close(&r, &be);
    snprintf(name, sizeof name, "2x%lld x %lld > %lld", (long long)p->T, (long long)p->in, (long long)p->out);
    printf("%-22s %9.3f %9.3f %8.1f%% %9.3f %8.1f%%\n", name, linear * 1e3, add[0] * 1e3, 100 * add[0] / linear, add[1] * 1e3,
           100 * add[1] / linear);
    step[0] += p->count * linear;
    step[1] += p->count * add[0];
    step[2] += p->count * add[1];
  }
  printf("in a step: %.1f ms of these linears, r=4 adds %.1f ms, r=28 adds %.1f ms\n", step[0] * 1e3, step[1] * 1e3, step[2] * 1e3);
  be_close(&be);
  return rc;
}

int main(int argc, char **argv)
{
  const char *arch = argc > 1 ? argv[1] : "sd15";
  int size = argc > 2 ? atoi(argv[2]) : 512, steps = argc > 3 ? atoi(argv[3]) : 4, threads = argc > 4 ? atoi(argv[4]) : 0;
  struct be_config cfg = {.threads = threads, .force_f32 = argc > 5};
  struct be_ops shims = be_cpu;
  struct draw_params p = {.prompt = "a red apple", .negative = "", .prompt_len = 11, .negative_len = 0, .width = size,
                          .height = size, .steps = steps, .guidance = 7.0f, .seed = 1, .sampler = 0};
  struct be be = {0};
  struct model *m = NULL;
  struct draw *d = NULL;
  struct err e = {0};
  double matmul = 0, conv = 0, t, best_step = 1e9, best_decode = 1e9;
  struct rusage use;
  uint8_t *rgb;

  if (!strcmp(arch, "lowrank")) {
    struct be_config own = {.threads = argc > 2 ? atoi(argv[2]) : 1, .force_f32 = argc > 4};

    return bench_lowrank(&own, argc > 3 ? atof(argv[3]) : 2, &e) ? fail(&e) : 0;
  }
  rgb = malloc((size_t)size * (size_t)size * 3);
  shims.weight_load = t_weight_load;
  shims.conv2d = t_conv2d;
  shims.linear = t_linear;
  shims.groupnorm = t_groupnorm;
  shims.layernorm = t_layernorm;
  shims.attention = t_attention;
  shims.geglu = t_geglu;
  shims.act = t_act;
  shims.add = t_add;
  shims.concat = t_concat;
  shims.upsample2x = t_upsample2x;
  shims.timestep_embed = t_timestep_embed;
  shims.gather_scale = t_gather_scale;
  shims.sampler_step = t_sampler_step;
  shims.to_rgb8 = t_to_rgb8;
  if (!rgb || be_open(&be, &shims, &cfg, &e))
    return fail(&e);
  if (be.threads == 1)
    which_clock = CLOCK_THREAD_CPUTIME_ID;
  printf("%s%s\n", be.info, be.threads == 1 ? ", processor time" : "");
  if (cpu_measure_peaks(&be, &matmul, &conv, &e))
    return fail(&e);
  printf("peaks: matmul %.2f TFLOP/s, conv %.2f TFLOP/s\n", matmul * 1e-12, conv * 1e-12);
  t = clock_s();
  if (model_open_synthetic(&m, &be, arch, &e) || model_reserve(m, size, size, &e))
    return fail(&e);
  printf("model: %.2f s, of which %.2f s to pack %.1f M parameters\n", clock_s() - t, load_s, load_params * 1e-6);
  if (draw_prepare(&d, m, &p, &e) || draw_start(d, model_lane(m), model_base(m), &e))
    return fail(&e);
  for (int i = 0; i < steps; i++) {
    now = &step_log;
    now->at = 0;
    t = clock_s();
    if (draw_step(d, &e))
      return fail(&e);
    t = clock_s() - t;
    best_step = t < best_step ? t : best_step;
  }
  for (int i = 0; i < 2; i++) {
    now = &decode_log;
    now->at = 0;
    t = clock_s();
    if (draw_decode(d, model_lane(m), rgb, &e))
      printf("decode: %s\n", e.msg);
    t = clock_s() - t;
    best_decode = t < best_decode ? t : best_decode;
  }
  printf("\nUNet step: shortest %.2f ms; sum of the shortest calls, by op\n", best_step * 1e3);
  print(&step_log, 0, 100, conv);
  printf("\nby shape\n");
  print(&step_log, 1, 45, conv);
  printf("\nVAE decode: shortest %.2f ms\n", best_decode * 1e3);
  print(&decode_log, 0, 100, conv);
  printf("\nby shape\n");
  print(&decode_log, 1, 20, conv);
  getrusage(RUSAGE_SELF, &use);
  printf("\npeak resident %.2f GB\n", (double)use.ru_maxrss / 1048576);
  draw_close(d);
  model_close(m);
  be_close(&be);
  free(rgb);
  return 0;
}
