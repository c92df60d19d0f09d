/*
 * compile.c - `safelight compile`: makes what cuDNN compiles for a GPU before that GPU is there.
 *
 * The model is walked on the compiler's outline (compile_walk.c, kernels/compile.h), every plan that it asked for is compiled into the folder that the
 * daemon keeps its plans in. What is there already is left alone, so that a second run compiles nothing; several may share the folder, with each other
 * and with daemons. Called by main.c. Threads: those of the compiler; progress is written by one at a time.
 */
#include <errno.h>
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "kernels/compile.h"
#include "models/batch.h"
#include "models/prompt.h"
#include "server/commands.h"
#include "server/compile_walk.h"
#include "server/config.h"
#include "server/gpu_file.h"
#include "server/worker.h"

enum { SIZES_MAX = 64, SIDE_MAX = 4096, THREADS_MAX = 256, PATH = 4096, NOTE_EVERY_S = 10 };

struct options {
  const char *device, *model, *arch, *state, *out;
  struct { int width, height; } size[SIZES_MAX];
  int sizes, batch, chunks, driver, want_f16, want_list, threads;
};

static const char usage[] =
  "usage: safelight compile --device NAME [options]\n"
  "Compiles for a GPU that need not be there what cuDNN compiles for this model; a daemon on that GPU finds it and compiles nothing.\n"
  "      --device NAME   the GPU: h200, or the file of its description, ./h200.json (a name that is not known lists those that are)\n"
  "      --driver X.Y    CUDA version of that machine's driver, as nvidia-smi shows it (the description's)\n"
  "      --model DIR     folder of the checkpoint (weights/emoji)\n"
  "      --arch NAME     instead: emoji, sd15, sd21 or sdxl, without a checkpoint\n"
  "      --size WxH|N    pixels of a picture; several with commas or again (the model's own)\n"
  "      --batch N       pictures that make one step together, as the daemon's option (8)\n"
  "      --chunks N      longest prompt, in chunks of 75 tokens (1)\n"
  "      --activations A auto, bf16 or fp16, as the daemon's option (auto, which is bf16)\n"
  "      --state DIR     the daemon's state folder, whose plans/ is filled (safelight-state)\n"
  "      --out DIR       instead: this folder\n"
  "  -j, --threads N     that compile (as many as the machine has)\n"
  "      --list          print what would be compiled instead, one plan a line\n";

enum { OPT_ARCH = 256, OPT_SIZE, OPT_BATCH, OPT_CHUNKS, OPT_ACTIVATIONS, OPT_STATE, OPT_OUT, OPT_LIST, OPT_DRIVER };

/* ---- options ---- */

MUST_CHECK static int parse_int(const char *name, const char *s, long lo, long hi, int *out, struct err *e)
{
  char *end;
  long v = strtol(s, &end, 10);

  if (end == s || *end || v < lo || v > hi)
    return err_field(e, E_ARG, name, "%s must be a whole number from %ld to %ld; got \"%.40s\"", name, lo, hi, s);
  *out = (int)v;
  return 0;
}

/* "12.8" as the runtime numbers it: 12080. */
MUST_CHECK static int parse_driver(const char *s, int *out, struct err *e)
{
  char *end;
  long major = strtol(s, &end, 10), minor = -1;

  if (end != s && *end == '.') {
    s = end + 1;
    minor = strtol(s, &end, 10);
  }
  if (end == s || *end || major < 1 || major > 99 || minor < 0 || minor > 99)
    return err_field(e, E_ARG, "--driver", "--driver must be a version of CUDA such as 12.8 or 13.0");
  *out = (int)(1000 * major + 10 * minor);
  return 0;
}

MUST_CHECK static int parse_activations(const char *s, int *want_f16, struct err *e)
{
  *want_f16 = !strcmp(s, "fp16");
  if (!*want_f16 && strcmp(s, "bf16") && strcmp(s, "auto"))
    return err_field(e, E_ARG, "--activations", "--activations must be auto, bf16 or fp16: a GPU computes in nothing else; got \"%.40s\"", s);
  return 0;
}

/* "512", "768x512", several with commas. */
MUST_CHECK static int parse_sizes(struct options *o, const char *s, struct err *e)
{
  const char *at = s;

  for (;;) {
    char *end;
    long w = strtol(at, &end, 10), h = w;

    if (end != at && *end == 'x') {
      at = end + 1;
      h = strtol(at, &end, 10);
    }
    if (end == at || (*end && *end != ',') || w < 1 || w > SIDE_MAX || h < 1 || h > SIDE_MAX)
      return err_field(e, E_ARG, "--size", "--size must be pixels such as 512 or 768x512, up to %d; got \"%.60s\"", SIDE_MAX, s);
    if (o->sizes == SIZES_MAX)
      return err_field(e, E_ARG, "--size", "more than %d sizes at once", SIZES_MAX);
    o->size[o->sizes].width = (int)w;
    o->size[o->sizes++].height = (int)h;
    if (!*end)
      return 0;
    at = end + 1;
  }
}

MUST_CHECK static int check_together(const struct options *o, struct err *e)
{
  if (!o->device)
    return err_field(e, E_ARG, "--device", "--device NAME is missing: the GPU, such as h200, or the file of its description");
  if (o->model && o->arch)
    return err_field(e, E_ARG, "--arch", "--model and --arch exclude each other");
  if (o->state && o->out)
    return err_field(e, E_ARG, "--out", "--state and --out exclude each other");
  if (o->arch && o->chunks > 1)
    return err_field(e, E_ARG, "--chunks", "--chunks needs --model: without a checkpoint there is no tokenizer");
  return 0;
}

MUST_CHECK static int parse(struct options *o, int argc, char **argv, int *want_help, struct err *e)
{
  static const struct option table[] = {{"device", required_argument, NULL, 'd'},     {"model", required_argument, NULL, 'm'},
                                        {"arch", required_argument, NULL, OPT_ARCH},  {"size", required_argument, NULL, OPT_SIZE},
                                        {"batch", required_argument, NULL, OPT_BATCH}, {"chunks", required_argument, NULL, OPT_CHUNKS},
                                        {"activations", required_argument, NULL, OPT_ACTIVATIONS}, {"state", required_argument, NULL, OPT_STATE},
                                        {"out", required_argument, NULL, OPT_OUT},    {"threads", required_argument, NULL, 'j'},
                                        {"list", no_argument, NULL, OPT_LIST},        {"driver", required_argument, NULL, OPT_DRIVER},
                                        {"help", no_argument, NULL, 'h'},             {NULL, 0, NULL, 0}};
  int c, r = 0;

  while (!r && (c = getopt_long(argc, argv, "j:h", table, NULL)) != -1) {
    switch (c) {
    case 'd': o->device = optarg; break;
    case 'm': o->model = optarg; break;
    case OPT_ARCH: o->arch = optarg; break;
    case OPT_SIZE: r = parse_sizes(o, optarg, e); break;
    case OPT_BATCH: r = parse_int("--batch", optarg, 1, BATCH_MAX, &o->batch, e); break;
    case OPT_CHUNKS: r = parse_int("--chunks", optarg, 1, PROMPT_MAX_CHUNKS, &o->chunks, e); break;
    case OPT_ACTIVATIONS: r = parse_activations(optarg, &o->want_f16, e); break;
    case OPT_STATE: o->state = optarg; break;
    case OPT_OUT: o->out = optarg; break;
    case OPT_LIST: o->want_list = 1; break;
    case OPT_DRIVER: r = parse_driver(optarg, &o->driver, e); break;
    case 'j': r = parse_int("--threads", optarg, 1, THREADS_MAX, &o->threads, e); break;
    case 'h': *want_help = 1; return 0;
    default: r = err_set(e, E_ARG, "unknown option, or one without its value"); break;
    }
  }
  if (!r && optind < argc)
    r = err_set(e, E_ARG, "what is \"%.80s\"?", argv[optind]);
  return r ? r : check_together(o, e);
}

/* ---- files ---- */

MUST_CHECK static int make_folder(const char *path, struct err *e)
{
  if (mkdir(path, 0700) && errno != EEXIST)
    return err_field(e, E_FILE, "--out", "cannot make %.300s: %s", path, strerror(errno));
  return 0;
}

/* The folder for the plans, made if it is missing. */
MUST_CHECK static int open_folder(const struct options *o, char *path, size_t size, struct err *e)
{
  const char *state = o->state ? o->state : CONFIG_STATE_DEFAULT;
  int n = o->out ? snprintf(path, size, "%s", o->out) : snprintf(path, size, "%s/" WORKER_PLANS, state), r = 0;

  if (n < 0 || (size_t)n >= size)
    return err_field(e, E_ARG, "--out", "the path of the folder is longer than %zu bytes", size);
  if (!o->out)
    r = make_folder(state, e);
  if (!r)
    r = make_folder(path, e);
  if (!r && access(path, W_OK | X_OK))
    r = err_field(e, E_FILE, "--out", "cannot write to %.300s: %s", path, strerror(errno));
  return r;
}

/* ---- progress ---- */

struct progress {
  int found, compiled, chosen, failed, is_terminal;
  size_t bytes;
  time_t noted;
};

static void on_step(void *arg, const struct compiler_step *s)
{
  struct progress *p = arg;
  time_t now = time(NULL);

  p->found += !s->err && s->is_found;
  p->compiled += !s->err && !s->is_found;
  p->failed += s->err != NULL;
  p->chosen += s->is_chosen;
  p->bytes += s->bytes;
  if (s->err)
    fprintf(stderr, "%ssafelight compile: %s: %s\n", p->is_terminal ? "\n" : "", s->plan, s->err->msg);
  if (p->is_terminal)
    fprintf(stderr, "\r%d of %d plans, %d compiled, %d failed%s", s->done, s->plans, p->compiled, p->failed, s->done == s->plans ? "\n" : "");
  else if (now - p->noted >= NOTE_EVERY_S)
    fprintf(stderr, "%d of %d plans, %d compiled, %d failed\n", s->done, s->plans, p->compiled, p->failed);
  if (now - p->noted >= NOTE_EVERY_S)
    p->noted = now;
}

static double now_s(void)
{
  struct timespec t;

  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* ---- the command ---- */

/* Notes on the compiler's outline what the model will ask for. */
MUST_CHECK static int walk(const struct options *o, struct be *be, struct err *e)
{
  struct model *m = NULL;
  int r = o->arch ? model_open_architecture(&m, be, o->arch, e) : model_open(&m, be, o->model ? o->model : "weights/emoji", e);

  if (!r && !o->sizes)
    r = compile_walk_size(m, model_info(m)->default_size, model_info(m)->default_size, o->batch, o->chunks, e);
  for (int i = 0; i < o->sizes && !r; i++)
    r = compile_walk_size(m, o->size[i].width, o->size[i].height, o->batch, o->chunks, e);
  if (!r)
    r = compile_walk_canary(m, be, e);
  model_close(m);
  return r;
}

/* Compiles what was noted, and says how it went. */
MUST_CHECK static int fill(const struct options *o, const struct compiler_ops *ops, struct compiler *c, const char *folder, struct err *e)
{
  struct progress p = {.is_terminal = isatty(STDERR_FILENO), .noted = time(NULL)};
  long processors = sysconf(_SC_NPROCESSORS_ONLN);
  int threads = o->threads ? o->threads : processors < 1 ? 1 : processors > THREADS_MAX ? THREADS_MAX : (int)processors, plans = ops->count(c), r;
  double start = now_s();
  struct err first = {0};

  r = ops->run(c, threads, on_step, &p, &first);
  printf("%s for %s: %d plans in %s: %d compiled (%d engines chosen), %d found, %d failed; %.1f MB, %.1f s on %d threads\n", ops->version(), o->device,
         plans, folder, p.compiled, p.chosen, p.found, p.failed, (double)p.bytes / 1e6, now_s() - start, threads);
  if (r == E_FILE)
    return err_set(e, r, "%s", first.msg);
  return r ? err_set(e, r, "%d of %d plans were not made: pictures that need them cannot be drawn on this GPU with %s", p.failed, plans, ops->version()) : 0;
}

static void list(const struct compiler_ops *ops, const struct compiler *c)
{
  char name[160];

  for (int i = 0; i < ops->count(c); i++) {
    ops->name(c, i, name, sizeof name);
    printf("%s\n", name);
  }
}

MUST_CHECK static int compile(const struct options *o, struct err *e)
{
  const struct compiler_ops *ops = NULL;
  struct compiler *c = NULL;
  char folder[PATH], *description = NULL;
  struct compiler_config cfg = {.driver = o->driver, .folder = folder, .want_f16 = o->want_f16};
  int r;

  if ((r = gpu_file_read(&description, o->device, e)) || (r = compiler_find(&ops, e)))
    goto out;
  cfg.description = description;
  r = ops->open(&c, &cfg, e);
  if (r) {
    err_wrap(e, "%.120s", o->device);
    goto out;
  }
  r = walk(o, ops->outline(c), e);
  if (!r && o->want_list) {
    list(ops, c);
  } else if (!r) {
    r = open_folder(o, folder, sizeof folder, e);
    if (!r)
      r = fill(o, ops, c, folder, e);
  }
out:
  if (ops)
    ops->close(c);
  free(description);
  return r;
}

int compile_main(int argc, char **argv)
{
  struct options o = {.batch = WORKER_BATCH, .chunks = 1};
  struct err e = {0};
  int r, want_help = 0;

  r = parse(&o, argc, argv, &want_help, &e);
  if (r || want_help) {
    if (r)
      fprintf(stderr, "safelight compile: %s\n", e.msg);
    fputs(usage, r ? stderr : stdout);
    return r ? 2 : 0;
  }
  r = compile(&o, &e);
  if (r)
    fprintf(stderr, "safelight compile: %s\n", e.msg);
  return r ? 1 : 0;
}
