/*
 * generate.c - `safelight generate`: a picture without a server.
 *
 * Loads the checkpoint, draws on the calling thread, writes a file with the same recipe text that the server writes, and shows a
 * progress bar when standard error is a terminal. What it draws is drawn under the default profile of the safety policy, verified as the
 * server verifies it: there is no way around. Called by main.c. Threads: none of its own.
 */
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "models/pipeline.h"
#include "proto/image.h"
#include "server/commands.h"
#include "server/safety_verify.h"
#include "server/version.h"

struct options {
  const char *prompt, *negative, *out, *model, *backend, *sampler, *policy;
  int width, height, steps, karras, clip_skip, threads, quality;
  enum image_format format; /* by the ending of out */
  double guidance;
  long long seed; /* -1: from the clock */
};

static const char usage[] =
  "usage: safelight generate -p PROMPT [options]\n"
  "  -p, --prompt TEXT      what to draw; (word:1.2) weighs a word\n"
  "  -n, --negative TEXT    what to keep away from\n"
  "  -o, --out FILE         where the picture goes: .png, .jpg or .webp (out.png; - for PNG to standard output)\n"
  "  -q, --quality N        1 to 100, of JPEG and WebP; 100 is WebP without loss (90)\n"
  "  -s, --seed N           the same seed gives the same picture (default: from the clock)\n"
  "      --steps N          sampler steps (20)\n"
  "  -g, --guidance X       how strictly to follow the prompt; 1 or less: no guidance (3)\n"
  "      --sampler NAME     ddim, euler, euler_a, dpmpp_2m (dpmpp_2m)\n"
  "      --karras           Karras sigmas\n"
  "      --size WxH         pixels (the model's own size)\n"
  "      --clip-skip N      2: the text encoder's last layer but one\n"
  "  -m, --model DIR        checkpoint in the diffusers layout (weights/emoji)\n"
  "      --policy FILE      the safety policy whose default profile is drawn under (the bundled model's own)\n"
  "      --backend NAME     auto, cpu, cuda, ref (auto)\n"
  "      --threads N        0: as many as the machine has\n";

enum { OPT_STEPS = 256, OPT_SAMPLER, OPT_KARRAS, OPT_SIZE, OPT_CLIP_SKIP, OPT_BACKEND, OPT_THREADS, OPT_POLICY };

static const struct option long_options[] = {{"prompt", required_argument, NULL, 'p'},
                                             {"negative", required_argument, NULL, 'n'},
                                             {"out", required_argument, NULL, 'o'},
                                             {"quality", required_argument, NULL, 'q'},
                                             {"seed", required_argument, NULL, 's'},
                                             {"guidance", required_argument, NULL, 'g'},
                                             {"model", required_argument, NULL, 'm'},
                                             {"steps", required_argument, NULL, OPT_STEPS},
                                             {"sampler", required_argument, NULL, OPT_SAMPLER},
                                             {"karras", no_argument, NULL, OPT_KARRAS},
                                             {"size", required_argument, NULL, OPT_SIZE},
                                             {"clip-skip", required_argument, NULL, OPT_CLIP_SKIP},
                                             {"policy", required_argument, NULL, OPT_POLICY},
                                             {"backend", required_argument, NULL, OPT_BACKEND},
                                             {"threads", required_argument, NULL, OPT_THREADS},
                                             {"help", no_argument, NULL, 'h'},
                                             {NULL, 0, NULL, 0}};

MUST_CHECK static int parse_int(const char *name, const char *s, long long lo, long long hi, long long *out, struct err *e)
{
  char *end;
  long long v = strtoll(s, &end, 10);

  if (end == s || *end || v < lo || v > hi)
    return err_field(e, E_ARG, name, "%s must be a whole number from %lld to %lld; got \"%s\"", name, lo, hi, s);
  *out = v;
  return 0;
}

MUST_CHECK static int parse_size(const char *s, int *w, int *h, struct err *e)
{
  char *end;
  long a = strtol(s, &end, 10), b;

  if (end == s || *end != 'x')
    return err_field(e, E_ARG, "size", "--size must look like 512x512; got \"%s\"", s);
  s = end + 1;
  b = strtol(s, &end, 10);
  if (end == s || *end || a < 1 || b < 1 || a > 4096 || b > 4096)
    return err_field(e, E_ARG, "size", "--size must be from 1x1 to 4096x4096");
  *w = (int)a;
  *h = (int)b;
  return 0;
}

MUST_CHECK static int parse_one(struct options *o, int c, struct err *e)
{
  long long v = 0;
  char *end;
  int r = 0;

  switch (c) {
  case 'p': o->prompt = optarg; break;
  case 'n': o->negative = optarg; break;
  case 'o':
    o->out = optarg;
    o->format = IMAGE_PNG;
    if (strcmp(optarg, "-"))
      r = image_format_of(optarg, &o->format, e);
    break;
  case 'q': r = parse_int("--quality", optarg, 1, 100, &v, e); o->quality = (int)v; break;
  case 'm': o->model = optarg; break;
  case 's': r = parse_int("--seed", optarg, 0, INT64_MAX, &v, e); o->seed = v; break;
  case 'g':
    o->guidance = strtod(optarg, &end);
    if (end == optarg || *end)
      r = err_field(e, E_ARG, "guidance", "--guidance must be a number; got \"%s\"", optarg);
    break;
  case OPT_STEPS: r = parse_int("--steps", optarg, 1, SAMPLER_MAX_STEPS, &v, e); o->steps = (int)v; break;
  case OPT_SAMPLER: o->sampler = optarg; break;
  case OPT_KARRAS: o->karras = 1; break;
  case OPT_SIZE: r = parse_size(optarg, &o->width, &o->height, e); break;
  case OPT_CLIP_SKIP: r = parse_int("--clip-skip", optarg, 1, 64, &v, e); o->clip_skip = (int)v; break;
  case OPT_POLICY: o->policy = optarg; break;
  case OPT_BACKEND: o->backend = optarg; break;
  case OPT_THREADS: r = parse_int("--threads", optarg, 0, 1024, &v, e); o->threads = (int)v; break;
  case 'h': r = err_set(e, E_ARG, "help"); break;
  default: r = err_set(e, E_ARG, "unknown option"); break;
  }
  return r;
}

static double now(void)
{
  struct timespec t;

  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void show_progress(int done, int steps, double started)
{
  enum { WIDTH = 30 };
  char bar[WIDTH + 1];
  int filled = done * WIDTH / steps;

  memset(bar, ' ', WIDTH);
  memset(bar, '=', (size_t)filled);
  bar[WIDTH] = 0;
  fprintf(stderr, "\r[%s] %d/%d  %.1f steps/s ", bar, done, steps, done / (now() - started));
  if (done == steps)
    fputc('\n', stderr);
}

/* The generation of the policy's default profile: every required adapter verified, or no picture. */
MUST_CHECK static int build_generation(struct model *m, struct be *be, const struct policy *p, struct generation **g, struct err *e)
{
  const struct policy_profile *f = &p->profile[0];
  struct adapter *a[POLICY_REQUIRED_MAX] = {0};
  struct adapter_use use[POLICY_REQUIRED_MAX];
  const struct proving on = {.model = m, .lane = be};
  struct verifier v;
  int r = verifier_open(&v, &on, 1, e);

  for (int i = 0; i < f->n_required && !r; i++) {
    r = verifier_adapter(&v, p, f->required[i].adapter, &a[i], e);
    use[i] = (struct adapter_use){.adapter = a[i], .weight = f->required[i].weight, .required = 1};
  }
  if (!r)
    r = generation_build(g, model_base(m), model_sources(m), be, use, f->n_required,
                         !f->n_required ? FORM_BASE : f->form_runtime ? FORM_RUNTIME : FORM_FOLDED, &v.bounds, e);
  for (int i = 0; i < f->n_required; i++)
    adapter_close(a[i]);
  verifier_close(&v);
  return r;
}

MUST_CHECK static int open_policy(const struct options *o, struct policy **p, struct err *e)
{
  char path[POLICY_PATH];

  if (o->policy)
    snprintf(path, sizeof path, "%s", o->policy);
  else if (policy_default_path(path, o->model, e))
    return e->code;
  return policy_read(p, path, e);
}

MUST_CHECK static int draw_picture(struct model *m, struct generation *g, const struct draw_params *p, uint8_t *rgb, struct err *e)
{
  struct draw *d = NULL;
  double started;
  int r;

  r = draw_prepare(&d, m, p, e);
  if (!r)
    r = draw_start(d, model_lane(m), g, e);
  started = now();
  while (!r && draw_step_index(d) < draw_step_count(d)) {
    r = draw_step(d, e);
    if (!r && isatty(STDERR_FILENO))
      show_progress(draw_step_index(d), draw_step_count(d), started);
  }
  if (!r)
    r = draw_decode(d, model_lane(m), rgb, e);
  draw_close(d);
  return r;
}

MUST_CHECK static int write_file(const struct options *o, const struct draw_params *p, const struct model_info *info, const struct policy_profile *profile,
                                 const struct generation *g, const uint8_t *rgb, struct err *e)
{
  struct image_encoder *enc = NULL;
  struct recipe recipe;
  struct buf file;
  FILE *f = NULL;
  int r;

  buf_init(&file, 64 << 20);
  recipe = (struct recipe){.prompt = p->prompt,
                           .negative = p->negative,
                           .sampler = sampler_name(p->sampler),
                           .sampler_label = sampler_label(p->sampler),
                           .karras = p->karras,
                           .steps = p->steps,
                           .width = p->width,
                           .height = p->height,
                           .clip_skip = p->clip_skip,
                           .guidance = p->guidance,
                           .seed = p->seed,
                           .model = info->name,
                           .model_digest = info->digest,
                           .version = SAFELIGHT_VERSION,
                           .generation_digest = g->digest,
                           .profile = profile->name,
                           .requires_nothing = profile->requires_nothing,
                           .format = o->format,
                           .quality = o->quality};
  if ((r = image_open(&enc, e)) || (r = image_encode_picture(enc, &file, rgb, &recipe, IMAGE_FULL, e)))
    goto out;
  f = strcmp(o->out, "-") ? fopen(o->out, "wb") : stdout;
  if (!f || fwrite(file.p, 1, file.len, f) != file.len || fflush(f))
    r = err_field(e, E_FILE, "out", "cannot write %s: %m", o->out);
out:
  if (f && f != stdout && fclose(f) && !r)
    r = err_field(e, E_FILE, "out", "cannot write %s: %m", o->out);
  image_close(enc);
  buf_close(&file);
  return r;
}

/* The parameters of the picture from options and model. */
MUST_CHECK static int to_params(const struct options *o, const struct model_info *info, struct draw_params *p, struct err *e)
{
  *p = (struct draw_params){.prompt = o->prompt,
                            .negative = o->negative,
                            .prompt_len = strlen(o->prompt),
                            .negative_len = strlen(o->negative),
                            .width = o->width ? o->width : info->default_size,
                            .height = o->height ? o->height : info->default_size,
                            .steps = o->steps,
                            .guidance = (float)o->guidance,
                            .seed = o->seed < 0 ? (uint64_t)time(NULL) : (uint64_t)o->seed,
                            .karras = o->karras,
                            .clip_skip = o->clip_skip};
  return sampler_find(o->sampler, &p->sampler, &p->karras, e);
}

MUST_CHECK static int generate(const struct options *o, struct err *e)
{
  struct be_config cfg = {.threads = o->threads};
  const struct be_ops *ops;
  struct draw_params p;
  struct model *m = NULL;
  struct policy *policy = NULL;
  struct generation *g = NULL;
  struct be be = {0};
  uint8_t *rgb = NULL;
  double started = now(), loaded;
  int r;

  if ((r = open_policy(o, &policy, e)) || (r = be_find(o->backend, &ops, e)) || (r = be_open(&be, ops, &cfg, e)) || (r = model_open(&m, &be, o->model, e)) ||
      (r = to_params(o, model_info(m), &p, e)) || (r = model_reserve(m, p.width, p.height, e)) ||
      (r = build_generation(m, &be, policy, &g, e)))
    goto out;
  loaded = now();
  rgb = malloc((size_t)p.width * (size_t)p.height * 3);
  if (!rgb) {
    r = err_set(e, E_NOMEM, "out of memory for the picture");
    goto out;
  }
  if ((r = draw_picture(m, g, &p, rgb, e)) || (r = write_file(o, &p, model_info(m), &policy->profile[0], g, rgb, e)))
    goto out;
  fprintf(stderr, "%s: %dx%d, seed %llu, loaded in %.2f s, drawn in %.2f s\n", o->out, p.width, p.height,
          (unsigned long long)p.seed, loaded - started, now() - loaded);
out:
  free(rgb);
  generation_unref(g);
  policy_free(policy);
  model_close(m);
  be_close(&be);
  return r;
}

int generate_main(int argc, char **argv)
{
  struct options o = {.negative = "", .out = "out.png", .model = "weights/emoji", .backend = "auto", .sampler = "dpmpp_2m",
                      .steps = 20, .guidance = 3, .seed = -1};
  struct err e = {0};
  int c, r = 0;

  while (!r && (c = getopt_long(argc, argv, "p:n:o:q:s:g:m:h", long_options, NULL)) != -1)
    r = parse_one(&o, c, &e);
  if (!r && (optind < argc || !o.prompt))
    r = err_set(&e, E_ARG, "give a prompt: -p \"a red apple\"");
  if (r) {
    if (!strcmp(e.msg, "help")) {
      fputs(usage, stdout);
      return 0;
    }
    fprintf(stderr, "safelight generate: %s\n%s", e.msg, usage);
    return 2;
  }
  r = generate(&o, &e);
  if (r)
    fprintf(stderr, "safelight generate: %s\n", e.msg);
  return r ? 1 : 0;
}
