/*
 * adapter_merge.c - `safelight adapter merge`: several experts become one LoRA. The methods and their sources are in models/merge.h. Called
 * by adapter.c.
 */
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/buf.h"
#include "models/adapter_write.h"
#include "models/merge.h"
#include "models/merge_stats.h"
#include "server/adapter.h"

static const char usage[] =
  "usage: safelight adapter merge --method NAME --out FILE [options] EXPERT...\n"
  "      --method NAME      concat         the exact sum; the rank is the sum of the ranks\n"
  "                         weighted       the sum, cut to a rank\n"
  "                         mean           the mean, cut to a rank\n"
  "                         ties           TIES: trim, elect signs, mean of those that agree; cut to a rank\n"
  "                         co-merge       most active weights per expert, by a calibration; experts of one start\n"
  "                         co-merge-rows  the same for rows of the weight changes, cut to a rank\n"
  "  -o, --out FILE         the LoRA that is written\n"
  "      --weight NAME=W    weight of the expert with that name (1); may be given for each\n"
  "      --rank N           of the result, where it is cut (the experts' largest)\n"
  "      --keep X           share that is kept: ties 0.2, co-merge 0.3\n"
  "      --scale X          the merged change times this (1)\n"
  "      --unkept WHAT      co-merge: zero or mean, for weights that nobody keeps (zero)\n"
  "      --prompts FILE     co-merge: calibration prompts, one a line; lines that start with # are left out\n"
  "      --steps N          co-merge: steps of each calibration picture (4)\n"
  "      --seed N           co-merge: of the calibration pictures (1)\n"
  "  -m, --model DIR        the checkpoint that the experts are for (weights/emoji)\n"
  "      --backend NAME     co-merge: auto, cpu, ref (auto); only ref gives the same bytes on every machine\n"
  "      --threads N        0: as many as the machine has\n";

enum {
  OPT_METHOD = 256, OPT_WEIGHT, OPT_RANK, OPT_KEEP, OPT_SCALE, OPT_UNKEPT, OPT_PROMPTS, OPT_STEPS, OPT_SEED, OPT_BACKEND, OPT_THREADS
};

static const struct option long_options[] = {{"method", required_argument, NULL, OPT_METHOD},
                                             {"out", required_argument, NULL, 'o'},
                                             {"weight", required_argument, NULL, OPT_WEIGHT},
                                             {"rank", required_argument, NULL, OPT_RANK},
                                             {"keep", required_argument, NULL, OPT_KEEP},
                                             {"scale", required_argument, NULL, OPT_SCALE},
                                             {"unkept", required_argument, NULL, OPT_UNKEPT},
                                             {"prompts", required_argument, NULL, OPT_PROMPTS},
                                             {"steps", required_argument, NULL, OPT_STEPS},
                                             {"seed", required_argument, NULL, OPT_SEED},
                                             {"model", required_argument, NULL, 'm'},
                                             {"backend", required_argument, NULL, OPT_BACKEND},
                                             {"threads", required_argument, NULL, OPT_THREADS},
                                             {"help", no_argument, NULL, 'h'},
                                             {NULL, 0, NULL, 0}};

enum { PROMPTS_MAX = 100000, PROMPTS_BYTES_MAX = 64 << 20 };

struct options {
  const char *out, *model, *prompts, *backend;
  int has_method, steps, threads;
  uint64_t seed;
  struct merge_options merge;
  const char *weight[MERGE_EXPERTS_MAX]; /* NAME=W, as given */
  int weights;
};

/* Everything a merge holds. */
struct job {
  struct adapter_tool tool;
  struct merge_expert expert[MERGE_EXPERTS_MAX];
  int n;
  struct buf prompts;       /* the file, with the ends of lines zeroed */
  const char **prompt;
  int prompt_count, inputs;
};

MUST_CHECK static int parse_one(struct options *o, int c, struct err *e)
{
  double v = 0;
  int r = 0;

  switch (c) {
  case 'o': o->out = optarg; break;
  case 'm': o->model = optarg; break;
  case OPT_METHOD: r = merge_method_find(optarg, &o->merge.method, e); o->has_method = 1; break;
  case OPT_WEIGHT:
    if (o->weights == MERGE_EXPERTS_MAX)
      r = err_set(e, E_ARG, "--weight is given more than %d times", MERGE_EXPERTS_MAX);
    else
      o->weight[o->weights++] = optarg;
    break;
  case OPT_RANK: r = adapter_tool_number("rank", optarg, 1, 4096, &v, e); o->merge.rank = (int64_t)v; break;
  case OPT_KEEP: r = adapter_tool_number("keep", optarg, 0, 1, &o->merge.keep, e); break;
  case OPT_SCALE: r = adapter_tool_number("scale", optarg, -100, 100, &o->merge.scale, e); break;
  case OPT_UNKEPT:
    o->merge.fill_mean = !strcmp(optarg, "mean");
    if (!o->merge.fill_mean && strcmp(optarg, "zero"))
      r = err_field(e, E_ARG, "unkept", "--unkept must be zero or mean; got \"%.40s\"", optarg);
    break;
  case OPT_PROMPTS: o->prompts = optarg; break;
  case OPT_STEPS: r = adapter_tool_number("steps", optarg, 1, 100, &v, e); o->steps = (int)v; break;
  case OPT_SEED: r = adapter_tool_number("seed", optarg, 0, 4294967295.0, &v, e); o->seed = (uint64_t)v; break;
  case OPT_BACKEND: o->backend = optarg; break;
  case OPT_THREADS: r = adapter_tool_number("threads", optarg, 0, 1024, &v, e); o->threads = (int)v; break;
  case 'h': r = err_set(e, E_ARG, "help"); break;
  default: r = err_set(e, E_ARG, "unknown option"); break;
  }
  return r;
}

MUST_CHECK static int parse(struct options *o, int argc, char **argv, struct err *e)
{
  int c, r = 0;

  while (!r && (c = getopt_long(argc, argv, "o:m:h", long_options, NULL)) != -1)
    r = parse_one(o, c, e);
  if (r)
    return r;
  if (!o->has_method || !o->out || optind == argc)
    return err_set(e, E_ARG, "give a --method, an --out file and at least one expert");
  if (argc - optind > MERGE_EXPERTS_MAX)
    return err_set(e, E_ARG, "at most %d experts", MERGE_EXPERTS_MAX);
  if (merge_needs_counts(o->merge.method) && !o->prompts)
    return err_set(e, E_ARG, "%s calibrates on prompts: give a file with --prompts", merge_method_name(o->merge.method));
  if (o->merge.keep == 0)
    o->merge.keep = o->merge.method == MERGE_TIES ? 0.2 : 0.3;
  return 0;
}

/* ---- inputs ---- */

MUST_CHECK static int open_experts(struct job *j, const struct options *o, char **paths, int n, struct err *e)
{
  for (int i = 0; i < n; i++) {
    struct adapter *a = NULL;
    int r = adapter_open(&a, paths[i], j->tool.names, &j->tool.bounds, e);

    if (r)
      return r;
    j->expert[j->n++] = (struct merge_expert){a, 1};
  }
  for (int i = 0; i < o->weights; i++) {
    const char *name = o->weight[i], *eq = strrchr(name, '=');
    int found = 0, r;
    double w;

    if (!eq)
      return err_field(e, E_ARG, "weight", "--weight must look like NAME=0.5; got \"%.60s\"", name);
    r = adapter_tool_number("weight", eq + 1, -100, 100, &w, e);
    if (r)
      return r;
    for (int k = 0; k < n; k++)
      if (strlen(j->expert[k].a->name) == (size_t)(eq - name) && !strncmp(j->expert[k].a->name, name, (size_t)(eq - name))) {
        j->expert[k].weight = (float)w;
        found = 1;
      }
    if (!found)
      return err_field(e, E_ARG, "weight", "--weight %.60s: no expert has that name; the first is called %s", name,
                       j->expert[0].a->name);
  }
  return 0;
}

/* The file, line by line, in place. */
MUST_CHECK static int read_prompts(struct job *j, const char *path, struct err *e)
{
  char block[65536], *line, *end;
  FILE *f = fopen(path, "re");
  size_t got;
  int r = 0;

  if (!f)
    return err_field(e, E_FILE, "prompts", "%s: cannot be read: %m", path);
  while (!r && (got = fread(block, 1, sizeof block, f)))
    r = buf_add(&j->prompts, block, got, e);
  if (!r && ferror(f))
    r = err_field(e, E_FILE, "prompts", "%s: cannot be read", path);
  fclose(f);
  if (r)
    return r;
  j->prompt = calloc(PROMPTS_MAX, sizeof *j->prompt);
  if (!j->prompt)
    return err_set(e, E_NOMEM, "out of memory for prompts");
  for (line = j->prompts.p; line && *line && j->prompt_count < PROMPTS_MAX; line = end) {
    end = line + strcspn(line, "\n");
    if (*end)
      *end++ = 0;
    line[strcspn(line, "\r")] = 0;
    if (*line && *line != '#')
      j->prompt[j->prompt_count++] = line;
  }
  return j->prompt_count ? 0 : err_field(e, E_FILE, "prompts", "%s: holds no prompt", path);
}

static void show_progress(void *arg, int done, int prompts)
{
  (void)arg;
  if (isatty(STDERR_FILENO))
    fprintf(stderr, "\rcalibration: %d of %d prompts%s", done, prompts, done == prompts ? "\n" : "");
}

MUST_CHECK static int calibrate(struct job *j, const struct options *o, struct merge_counts **counts, struct err *e)
{
  struct merge_calibration k = {.steps = o->steps, .seed = o->seed, .progress = show_progress};
  int r = read_prompts(j, o->prompts, e);

  k.prompt = j->prompt;
  k.prompts = j->prompt_count;
  if (!r)
    r = merge_counts_new(counts, o->merge.method, model_base(j->tool.m), j->expert, j->n, e);
  return r ? r : merge_calibrate(*counts, j->tool.m, &j->tool.be, j->expert, j->n, &k, &j->inputs, e);
}

/* ---- the result ---- */

/* What the file says of its making: method, every input with digest and weight, options, base. */
MUST_CHECK static int write_result(struct job *j, const struct options *o, const struct adapter *a, const struct merge_report *x,
                                   struct err *e)
{
  const struct merge_options *m = &o->merge;
  struct buf inputs, options;
  struct adapter_meta meta[] = {{"safelight.method", merge_method_name(m->method)},
                                {"safelight.inputs", NULL},
                                {"safelight.options", NULL},
                                {"safelight.base", model_info(j->tool.m)->digest}};
  int r = 0;

  buf_init(&inputs, 1 << 20);
  buf_init(&options, 1 << 16);
  for (int i = 0; !r && i < j->n; i++)
    r = buf_addf(&inputs, e, "%s%s %s %.9g", i ? "; " : "", j->expert[i].a->name, j->expert[i].a->digest, (double)j->expert[i].weight);
  if (!r)
    r = buf_addf(&options, e, "scale %.9g", m->scale);
  if (!r && (m->method == MERGE_TIES || merge_needs_counts(m->method)))
    r = buf_addf(&options, e, ", keep %.9g", m->keep);
  if (!r && m->method != MERGE_CONCAT && m->method != MERGE_CO)
    r = buf_addf(&options, e, ", rank %lld, energy kept %.6f", (long long)a->max_rank, x->energy);
  if (!r && merge_needs_counts(m->method))
    r = buf_addf(&options, e, ", unkept %s, %d prompts, %d inputs, %d steps, seed %llu, backend %s", m->fill_mean ? "mean" : "zero",
                 j->prompt_count, j->inputs, o->steps, (unsigned long long)o->seed, j->tool.be.ops->name);
  meta[1].value = inputs.p;
  meta[2].value = options.p;
  if (!r)
    r = adapter_write(o->out, a, model_base(j->tool.m), model_sources(j->tool.m), meta, sizeof meta / sizeof *meta, e);
  buf_close(&inputs);
  buf_close(&options);
  return r;
}

static void report(const struct job *j, const struct options *o, const struct adapter *a, const struct merge_report *x)
{
  double norm = 0;

  for (int i = 0; i < a->n; i++)
    norm += a->delta[i].norm * a->delta[i].norm;
  printf("%s: %s of %d experts, %d sites, rank %lld, %lld numbers, |dW|^2 %.6g\n", o->out, merge_method_name(o->merge.method), j->n, a->n,
         (long long)a->max_rank, (long long)a->params, norm);
  if (o->merge.method == MERGE_CONCAT)
    printf("exact: nothing was cut\n");
  else if (o->merge.method != MERGE_CO)
    printf("the rank holds %.4f of |dW|^2; least at %s: %.4f\n", x->energy, x->worst_site, x->worst);
  if (merge_needs_counts(o->merge.method))
    printf("%d inputs from %d prompts; some expert keeps %.4f of the %s\n", j->inputs, j->prompt_count, x->kept,
           o->merge.method == MERGE_CO ? "weights" : "rows");
}

MUST_CHECK static int merge(struct job *j, const struct options *o, char **paths, int n, struct err *e)
{
  int needs = merge_needs_counts(o->merge.method), r;
  struct merge_counts *counts = NULL;
  struct merge_report x = {0};
  struct adapter *a = NULL;

  if ((r = adapter_tool_open(&j->tool, o->model, needs ? o->backend : "dry", o->threads, e)) || (r = open_experts(j, o, paths, n, e)) ||
      (needs && (r = calibrate(j, o, &counts, e))) ||
      (r = merge_run(&a, model_base(j->tool.m), j->expert, j->n, &o->merge, counts, &x, e)) || (r = write_result(j, o, a, &x, e)))
    goto out;
  report(j, o, a, &x);
out:
  adapter_close(a);
  merge_counts_free(counts);
  return r;
}

int adapter_merge_main(int argc, char **argv)
{
  struct options o = {.model = "weights/emoji", .backend = "auto", .steps = 4, .seed = 1, .merge = {.scale = 1}};
  struct err e = {0};
  struct job *j;
  int r = parse(&o, argc, argv, &e);

  if (r)
    return adapter_tool_usage("merge", usage, &e);
  j = calloc(1, sizeof *j);
  if (!j)
    return adapter_tool_end("merge", err_set(&e, E_NOMEM, "out of memory"), &e);
  buf_init(&j->prompts, PROMPTS_BYTES_MAX);
  r = merge(j, &o, argv + optind, argc - optind, &e);
  for (int i = 0; i < j->n; i++)
    adapter_close((struct adapter *)j->expert[i].a);
  buf_close(&j->prompts);
  free(j->prompt);
  adapter_tool_close(&j->tool);
  free(j);
  return adapter_tool_end("merge", r, &e);
}
