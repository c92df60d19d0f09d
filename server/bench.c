/*
 * bench.c - `safelight bench`: how fast this machine draws, as a share of what its own matrix units can do.
 *
 * Draws pictures with weights made in memory at an architecture's real dimensions (what the numbers are does not change the time)
 * and measures the machine's matrix and convolution peaks in the same run, so that the result means something on a noisy machine.
 * One picture is drawn first and not counted: it creates the cached primitives. Called by main.c. Threads: none of its own.
 */
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>

#include "kernels/cpu/peak.h"
#include "models/pipeline.h"
#include "server/bench_batch.h"
#include "server/bench_files.h"
#include "server/bench_lora.h"
#include "server/commands.h"

struct options {
  const char *arch, *backend;
  int size, steps, pictures, threads, json, force_f32, lora_rank, files, batch;
};

/* One picture's times, seconds. */
struct times {
  double text, step, vae, total; /* step: the median */
};

struct report {
  struct times t;
  struct lora_cost lora;         /* 0 without --lora-rank */
  struct batch_gain batch;       /* 0 without --batch */
  double matmul_peak, conv_peak; /* FLOP/s; 0 where the backend has none */
  double step_flops;
  double load_s;
  long peak_rss_bytes;
  size_t activation_bytes;
  int width, height;
};

static const char usage[] =
  "usage: safelight bench [options]\n"
  "      --arch NAME     emoji, sd15, sd21 or sdxl (emoji)\n"
  "      --size N        pixels a side (the architecture's own)\n"
  "      --steps N       sampler steps (20)\n"
  "      --pictures N    how many are timed after the first, which is not (5 for emoji, 1 otherwise)\n"
  "      --backend NAME  auto, cpu, cuda, ref (auto)\n"
  "      --threads N     0: as many as the machine has\n"
  "      --f32           keep activations in fp32 where bf16 would be chosen\n"
  "      --lora-rank N   also what an adapter of this rank on every attention projection costs a step\n"
  "      --files [FILE]  instead: how long files of each format take, of the pictures named or of painted ones\n"
  "      --batch N       also how many pictures a second N at once make, against one at a time\n"
  "      --json          one JSON object instead of the table\n";

enum { MAX_STEPS = 1000, MAX_PICTURES = 1000, OPT_F32 = 256, OPT_LORA_RANK, OPT_FILES, OPT_BATCH };

static double now(void)
{
  struct timespec t;

  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

MUST_CHECK static int time_picture(struct model *m, const struct draw_params *p, uint8_t *rgb, struct times *t, struct err *e)
{
  static double step[MAX_STEPS];
  struct draw *d = NULL;
  double start, mark;
  int r;

  if ((r = draw_prepare(&d, m, p, e)))
    goto out;
  start = now();
  if ((r = draw_start(d, model_lane(m), model_base(m), e)))
    goto out;
  t->text = now() - start;
  while (draw_step_index(d) < draw_step_count(d)) {
    int i = draw_step_index(d);

    mark = now();
    if ((r = draw_step(d, e)))
      goto out;
    step[i] = now() - mark;
  }
  t->step = bench_median(step, draw_step_count(d));
  mark = now();
  r = draw_decode(d, model_lane(m), rgb, e);
  t->vae = now() - mark;
  t->total = now() - start;
out:
  draw_close(d);
  return r;
}

/* The picture whose total time is the median of all. */
MUST_CHECK static int time_pictures(struct model *m, const struct draw_params *p, int n, struct times *out, struct err *e)
{
  uint8_t *rgb = malloc((size_t)p->width * (size_t)p->height * 3);
  struct times *t = calloc((size_t)n, sizeof *t);
  double *total = calloc((size_t)n, sizeof *total), mid;
  struct draw_params warm = *p;
  int r;

  if (!rgb || !t || !total) {
    r = err_set(e, E_NOMEM, "out of memory for the benchmark");
    goto out;
  }
  warm.steps = 1;
  r = time_picture(m, &warm, rgb, &t[0], e);
  for (int i = 0; !r && i < n; i++) {
    r = time_picture(m, p, rgb, &t[i], e);
    total[i] = t[i].total;
  }
  if (r)
    goto out;
  mid = bench_median(total, n);
  *out = t[0];
  for (int i = 0; i < n; i++)
    if (t[i].total <= mid && (out->total > mid || t[i].total > out->total))
      *out = t[i];
out:
  free(rgb);
  free(t);
  free(total);
  return r;
}

MUST_CHECK static int measure(const struct options *o, struct be *be, struct report *rep, struct err *e)
{
  struct draw_params p = {.prompt = "", .negative = "", .guidance = 7.5f, .steps = o->steps, .sampler = SAMPLER_DPMPP_2M};
  struct model *m = NULL;
  double start = now();
  struct rusage ru;
  int r;

  if ((r = model_open_synthetic(&m, be, o->arch, e)))
    goto out;
  rep->load_s = now() - start;
  p.width = p.height = rep->width = rep->height = o->size ? o->size : model_info(m)->default_size;
  if ((r = model_plan_bytes(m, p.width, p.height, &rep->activation_bytes, e)) || (r = model_reserve(m, p.width, p.height, e)) ||
      (r = model_step_flops(m, p.width, p.height, &rep->step_flops, e)) || (r = time_pictures(m, &p, o->pictures, &rep->t, e)))
    goto out;
  if (o->lora_rank && (r = bench_lora(&rep->lora, m, be, &p, o->lora_rank, e)))
    goto out;
  if (o->batch && (r = bench_batch(&rep->batch, m, be, &p, o->batch, o->pictures, e)))
    goto out;
  getrusage(RUSAGE_SELF, &ru); /* before the peaks are measured: their matrices are not the model's */
  rep->peak_rss_bytes = ru.ru_maxrss * 1024;
  if (be->ops == &be_cpu)
    r = cpu_measure_peaks(be, &rep->matmul_peak, &rep->conv_peak, e);
out:
  model_close(m);
  return r;
}

static double share(double part, double whole)
{
  return whole > 0 ? part / whole : 0;
}

static void print_json(const struct options *o, const struct be *be, const struct report *r)
{
  char lora[128] = "", batch[192] = "";

  if (o->lora_rank)
    snprintf(lora, sizeof lora, "\"lora_rank\": %d, \"lora_unet_step_ms\": %.3f, \"lora_overhead\": %.4f, ", o->lora_rank,
             1e3 * r->lora.step, r->lora.overhead);
  if (o->batch)
    snprintf(batch, sizeof batch, "\"batch\": %d, \"batch_images_per_s\": %.4f, \"single_images_per_s\": %.4f, \"batch_gain\": %.4f, "
             "\"batch_step_gain\": %.4f, \"batch_bytes\": %zu, ", o->batch, r->batch.together, r->batch.alone, r->batch.gain, r->batch.step_gain,
             r->batch.bytes);
  printf("{\"arch\": \"%s\", \"total_s\": %.4f, \"unet_step_ms\": %.3f, \"text_ms\": %.3f, \"vae_ms\": %.3f, "
         "\"peak_rss_bytes\": %ld, \"activation_bytes\": %zu, \"load_s\": %.2f, \"conv_peak_flops\": %.4g, "
         "\"matmul_peak_flops\": %.4g, \"unet_step_flops\": %.5g, \"unet_share_of_conv_peak\": %.4f, \"images_per_s\": %.4f, "
         "%s%s\"steps\": %d, \"width\": %d, \"height\": %d, \"threads\": %d, \"isa\": \"%s\", \"backend\": \"%s\"}\n",
         o->arch, r->t.total, 1e3 * r->t.step, 1e3 * r->t.text, 1e3 * r->t.vae, r->peak_rss_bytes, r->activation_bytes,
         r->load_s, r->conv_peak, r->matmul_peak, r->step_flops, share(r->step_flops / r->t.step, r->conv_peak),
         1 / r->t.total, lora, batch, o->steps, r->width, r->height, be->threads, be->info, be->ops->name);
}

static void print_table(const struct options *o, const struct be *be, const struct report *r)
{
  printf("%s, %dx%d, %d steps with guidance\n%s: %s, %d threads\n\n", o->arch, r->width, r->height, o->steps, be->ops->name,
         be->info, be->threads);
  printf("  %-28s %10.2f s   %.2f pictures a second\n", "one picture", r->t.total, 1 / r->t.total);
  printf("  %-28s %10.2f ms\n", "  both prompts encoded", 1e3 * r->t.text);
  printf("  %-28s %10.2f ms  %.0f GFLOP, %.2f TFLOP/s\n", "  one UNet step (median)", 1e3 * r->t.step, r->step_flops / 1e9,
         r->step_flops / r->t.step / 1e12);
  if (o->lora_rank)
    printf("  %-28s %10.2f ms  %+.2f %%: rank %d beside %d projections\n", "  the same with an adapter", 1e3 * r->lora.step,
           100 * r->lora.overhead, o->lora_rank, r->lora.sites);
  printf("  %-28s %10.2f ms\n", "  VAE decode", 1e3 * r->t.vae);
  if (o->batch) {
    printf("  %-28s %10.2f     pictures a second, %.2f one at a time: %.2f times as many\n", "pictures at once", r->batch.together,
           r->batch.alone, r->batch.gain);
    printf("  %-28s %10d     of them; their steps alone %.2f times as fast; %.0f MB more activations\n", "", o->batch, r->batch.step_gain,
           (double)r->batch.bytes / 1e6);
  }
  if (r->conv_peak > 0) {
    printf("  %-28s %10.2f TFLOP/s, the UNet reaches %.0f %% of it\n", "convolution peak, same run", r->conv_peak / 1e12,
           100 * share(r->step_flops / r->t.step, r->conv_peak));
    printf("  %-28s %10.2f TFLOP/s\n", "matrix peak, same run", r->matmul_peak / 1e12);
  }
  printf("  %-28s %10.2f s\n", "weights drawn and packed", r->load_s);
  printf("  %-28s %10.0f MB  of them %.0f MB activations\n", "peak memory", (double)r->peak_rss_bytes / 1e6,
         (double)r->activation_bytes / 1e6);
}

MUST_CHECK static int parse_int(const char *name, const char *s, long lo, long hi, int *out, struct err *e)
{
  char *end;
  long v = strtol(s, &end, 10);

  if (end == s || *end || v < lo || v > hi)
    return err_field(e, E_ARG, name, "%s must be a whole number from %ld to %ld; got \"%s\"", name, lo, hi, s);
  *out = (int)v;
  return 0;
}

MUST_CHECK static int parse(struct options *o, int argc, char **argv, int *want_help, struct err *e)
{
  static const struct option table[] = {{"arch", required_argument, NULL, 'a'},     {"size", required_argument, NULL, 's'},
                                        {"steps", required_argument, NULL, 'n'},    {"pictures", required_argument, NULL, 'p'},
                                        {"backend", required_argument, NULL, 'b'},  {"threads", required_argument, NULL, 't'},
                                        {"lora-rank", required_argument, NULL, OPT_LORA_RANK},
                                        {"files", no_argument, NULL, OPT_FILES},
                                        {"batch", required_argument, NULL, OPT_BATCH},
                                        {"f32", no_argument, NULL, OPT_F32},        {"json", no_argument, NULL, 'j'},
                                        {"help", no_argument, NULL, 'h'},           {NULL, 0, NULL, 0}};
  int c, r = 0;

  while (!r && (c = getopt_long(argc, argv, "", table, NULL)) != -1) {
    switch (c) {
    case 'a': o->arch = optarg; break;
    case 'b': o->backend = optarg; break;
    case 's': r = parse_int("--size", optarg, 8, 4096, &o->size, e); break;
    case 'n': r = parse_int("--steps", optarg, 1, MAX_STEPS, &o->steps, e); break;
    case 'p': r = parse_int("--pictures", optarg, 1, MAX_PICTURES, &o->pictures, e); break;
    case 't': r = parse_int("--threads", optarg, 0, 1024, &o->threads, e); break;
    case OPT_LORA_RANK: r = parse_int("--lora-rank", optarg, 1, 1024, &o->lora_rank, e); break;
    case OPT_BATCH: r = parse_int("--batch", optarg, 1, BATCH_MAX, &o->batch, e); break;
    case OPT_F32: o->force_f32 = 1; break;
    case OPT_FILES: o->files = 1; break;
    case 'j': o->json = 1; break;
    case 'h': *want_help = 1; break;
    default: r = err_set(e, E_ARG, "unknown option"); break;
    }
  }
  if (!r && optind < argc && !o->files)
    r = err_set(e, E_ARG, "what is \"%s\"?", argv[optind]);
  if (!o->pictures)
    o->pictures = strcmp(o->arch, "emoji") ? 1 : 5;
  return r;
}

int bench_main(int argc, char **argv)
{
  struct options o = {.arch = "emoji", .backend = "auto", .steps = 20};
  struct be_config cfg = {0};
  const struct be_ops *ops;
  struct report rep = {0};
  struct err e = {0};
  struct be be = {0};
  int r, want_help = 0;

  r = parse(&o, argc, argv, &want_help, &e);
  if (r || want_help) {
    if (r)
      fprintf(stderr, "safelight bench: %s\n", e.msg);
    fputs(usage, r ? stderr : stdout);
    return r ? 2 : 0;
  }
  if (o.files) {
    if ((r = bench_files(argv + optind, argc - optind, o.size, &e)))
      fprintf(stderr, "safelight bench: %s\n", e.msg);
    return r ? 1 : 0;
  }
  cfg.threads = o.threads;
  cfg.force_f32 = o.force_f32;
  if ((r = be_find(o.backend, &ops, &e)) || (r = be_open(&be, ops, &cfg, &e)) || (r = measure(&o, &be, &rep, &e)))
    fprintf(stderr, "safelight bench: %s\n", e.msg);
  else if (o.json)
    print_json(&o, &be, &rep);
  else
    print_table(&o, &be, &rep);
  be_close(&be);
  return r ? 1 : 0;
}
