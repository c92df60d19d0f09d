/*
 * adapter_extract.c - `safelight adapter extract`: a LoRA out of a fine-tuned UNet and its base, and how much of the change it holds. See
 * models/extract.h. Called by adapter.c.
 */
#include <getopt.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#include "base/buf.h"
#include "models/adapter_write.h"
#include "models/extract.h"
#include "server/adapter.h"

static const char usage[] =
  "usage: safelight adapter extract --base DIR --tuned DIR|FILE --rank N --out FILE [options]\n"
  "      --base DIR         the checkpoint that was tuned\n"
  "      --tuned DIR|FILE   the tuned checkpoint, its unet folder, or its UNet's .safetensors file\n"
  "      --rank N           at most, per site\n"
  "  -o, --out FILE         the LoRA that is written\n"
  "      --sites WHICH      attn: q, k, v and out of every attention; all: every linear and convolution (attn)\n"
  "      --energy X         take the least rank that holds this share of a site's change (1: always the full rank)\n"
  "      --quiet            no line per site\n";

enum { OPT_BASE = 256, OPT_TUNED, OPT_RANK, OPT_SITES, OPT_ENERGY, OPT_QUIET };

static const struct option long_options[] = {{"base", required_argument, NULL, OPT_BASE},
                                             {"tuned", required_argument, NULL, OPT_TUNED},
                                             {"rank", required_argument, NULL, OPT_RANK},
                                             {"out", required_argument, NULL, 'o'},
                                             {"sites", required_argument, NULL, OPT_SITES},
                                             {"energy", required_argument, NULL, OPT_ENERGY},
                                             {"quiet", no_argument, NULL, OPT_QUIET},
                                             {"help", no_argument, NULL, 'h'},
                                             {NULL, 0, NULL, 0}};

struct options {
  const char *base, *tuned, *out;
  int quiet;
  struct extract_options extract;
};

MUST_CHECK static int parse_one(struct options *o, int c, struct err *e)
{
  double v = 0;
  int r = 0;

  switch (c) {
  case 'o': o->out = optarg; break;
  case OPT_BASE: o->base = optarg; break;
  case OPT_TUNED: o->tuned = optarg; break;
  case OPT_RANK: r = adapter_tool_number("rank", optarg, 1, 4096, &v, e); o->extract.rank = (int64_t)v; break;
  case OPT_SITES:
    o->extract.sites = !strcmp(optarg, "all") ? EXTRACT_ALL : EXTRACT_ATTENTION;
    if (o->extract.sites != EXTRACT_ALL && strcmp(optarg, "attn"))
      r = err_field(e, E_ARG, "sites", "--sites must be attn or all; got \"%.40s\"", optarg);
    break;
  case OPT_ENERGY: r = adapter_tool_number("energy", optarg, 1e-6, 1, &o->extract.energy, e); break;
  case OPT_QUIET: o->quiet = 1; break;
  case 'h': r = err_set(e, E_ARG, "help"); break;
  default: r = err_set(e, E_ARG, "unknown option"); break;
  }
  return r;
}

/* A checkpoint folder, a component folder or a file. */
MUST_CHECK static int open_tuned(struct model_sources *s, const char *path, struct err *e)
{
  struct source *source = NULL;
  char unet[4096];
  struct stat st;
  int r;

  if (stat(path, &st))
    return err_field(e, E_FILE, "tuned", "%s: cannot be read: %m", path);
  if (snprintf(unet, sizeof unet, "%s/unet", path) >= (int)sizeof unet)
    return err_field(e, E_ARG, "tuned", "the path of the tuned model is too long");
  if (!S_ISDIR(st.st_mode))
    r = source_open_file(&source, path, e);
  else
    r = source_open_files(&source, stat(unet, &st) ? path : unet, e);
  return r ? r : sources_add(s, "unet", source, e);
}

static void print_report(const struct options *o, const struct adapter *a, const struct extract_report *x, const struct generation *base)
{
  if (!o->quiet) {
    printf("%-80s %5s %11s %9s %9s\n", "site", "rank", "|dW|", "|dW|/|W|", "captured");
    for (int i = 0; i < x->n; i++)
      printf("%-80s %5lld %11.5g %9.5f %9.6f\n", base->site[x->site[i].site].name, (long long)x->site[i].rank, x->site[i].norm,
             x->site[i].relative, x->site[i].energy);
  }
  printf("%s: %d sites, rank at most %lld, %lld numbers\n", o->out, a->n, (long long)a->max_rank, (long long)a->params);
  printf("captured %.6f of |dW|^2 at these sites, %.6f of all that changed in the UNet\n", x->energy, x->energy_all);
  if (x->outside > 0)
    printf("%.6f of the change lies elsewhere (other layers, norms, biases) and is not in the file\n", x->outside);
  if (x->unchanged)
    printf("%d chosen sites do not differ from the base\n", x->unchanged);
}

MUST_CHECK static int write_result(const struct options *o, const struct adapter *a, const struct extract_report *x, const struct model *m,
                                   struct err *e)
{
  struct adapter_meta meta[] = {{"safelight.method", "extract"}, {"safelight.base", model_info(m)->digest}, {"safelight.options", NULL}};
  struct buf options;
  int r;

  buf_init(&options, 4096);
  r = buf_addf(&options, e, "sites %s, rank %lld, energy %.9g, captured %.6f of these sites, %.6f of the UNet",
               o->extract.sites == EXTRACT_ALL ? "all" : "attn", (long long)o->extract.rank, o->extract.energy, x->energy, x->energy_all);
  meta[2].value = options.p;
  if (!r)
    r = adapter_write(o->out, a, model_base(m), model_sources((struct model *)m), meta, sizeof meta / sizeof *meta, e);
  buf_close(&options);
  return r;
}

MUST_CHECK static int extract(const struct options *o, struct err *e)
{
  struct model_sources tuned = {0};
  struct extract_report x = {0};
  struct adapter_tool t = {0};
  struct adapter *a = NULL;
  int r;

  if ((r = adapter_tool_open(&t, o->base, "dry", 0, e)) || (r = open_tuned(&tuned, o->tuned, e)) ||
      (r = extract_run(&a, model_base(t.m), model_sources(t.m), &tuned, &o->extract, &x, e)) || (r = write_result(o, a, &x, t.m, e)))
    goto out;
  print_report(o, a, &x, model_base(t.m));
out:
  adapter_close(a);
  extract_report_free(&x);
  sources_close(&tuned);
  adapter_tool_close(&t);
  return r;
}

int adapter_extract_main(int argc, char **argv)
{
  struct options o = {.extract = {.energy = 1, .sites = EXTRACT_ATTENTION}};
  struct err e = {0};
  int c, r = 0;

  while (!r && (c = getopt_long(argc, argv, "o:h", long_options, NULL)) != -1)
    r = parse_one(&o, c, &e);
  if (!r && (optind < argc || !o.base || !o.tuned || !o.out || !o.extract.rank))
    r = err_set(&e, E_ARG, "give --base, --tuned, --rank and --out");
  if (r)
    return adapter_tool_usage("extract", usage, &e);
  return adapter_tool_end("extract", extract(&o, &e), &e);
}
