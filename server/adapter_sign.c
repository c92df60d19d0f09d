/*
 * adapter_sign.c - `safelight adapter verify`, `sign` and `keygen`: manifests from the command line. See models/manifest.h. Called by
 * adapter.c.
 */
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <sodium.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "models/manifest.h"
#include "server/adapter.h"

enum { OPT_MANIFEST = 256, OPT_BACKEND, OPT_PUBLIC_KEY, OPT_SECRET_KEY, OPT_NOTE, OPT_PROMPT, OPT_THREADS };

static const struct option long_options[] = {{"manifest", required_argument, NULL, OPT_MANIFEST},
                                             {"model", required_argument, NULL, 'm'},
                                             {"backend", required_argument, NULL, OPT_BACKEND},
                                             {"public-key", required_argument, NULL, OPT_PUBLIC_KEY},
                                             {"secret-key", required_argument, NULL, OPT_SECRET_KEY},
                                             {"note", required_argument, NULL, OPT_NOTE},
                                             {"prompt", required_argument, NULL, OPT_PROMPT},
                                             {"out", required_argument, NULL, 'o'},
                                             {"threads", required_argument, NULL, OPT_THREADS},
                                             {"help", no_argument, NULL, 'h'},
                                             {NULL, 0, NULL, 0}};

struct options {
  const char *file, *manifest, *model, *backend, *public_key, *secret_key, *note, *out;
  const char *prompt[MANIFEST_PROBES_MAX];
  int prompts, threads;
};

/* Each subcommand takes some of these; accepts lists the values of getopt that it does. */
MUST_CHECK static int parse(struct options *o, int argc, char **argv, const int *accepts, struct err *e)
{
  double v;
  int c, r = 0;

  while (!r && (c = getopt_long(argc, argv, "m:o:h", long_options, NULL)) != -1) {
    int ok = c == 'h';

    for (const int *a = accepts; *a; a++)
      ok |= c == *a;
    if (!ok)
      return err_set(e, E_ARG, "unknown option, or one of another subcommand");
    switch (c) {
    case 'm': o->model = optarg; break;
    case 'o': o->out = optarg; break;
    case OPT_MANIFEST: o->manifest = optarg; break;
    case OPT_BACKEND: o->backend = optarg; break;
    case OPT_PUBLIC_KEY: o->public_key = optarg; break;
    case OPT_SECRET_KEY: o->secret_key = optarg; break;
    case OPT_NOTE: o->note = optarg; break;
    case OPT_PROMPT:
      if (o->prompts == MANIFEST_PROBES_MAX)
        r = err_field(e, E_ARG, "prompt", "a canary has at most %d prompts", MANIFEST_PROBES_MAX);
      else
        o->prompt[o->prompts++] = optarg;
      break;
    case OPT_THREADS: r = adapter_tool_number("threads", optarg, 0, 1024, &v, e); o->threads = (int)v; break;
    default: r = err_set(e, E_ARG, "help"); break;
    }
  }
  if (!r && optind + 1 == argc)
    o->file = argv[optind];
  else if (!r && optind < argc)
    r = err_set(e, E_ARG, "one adapter at a time");
  return r;
}

/* A generation of the adapter alone at weight 1. */
MUST_CHECK static int build_alone(struct generation **g, struct adapter_tool *t, const struct adapter *a, enum generation_form form,
                                  struct err *e)
{
  struct adapter_use use = {.adapter = a, .weight = 1, .required = 1};

  return generation_build(g, model_base(t->m), model_sources(t->m), &t->be, &use, 1, form, &t->bounds, e);
}

/* ---- verify ---- */

static const char verify_usage[] =
  "usage: safelight adapter verify FILE [options]\n"
  "Checks an adapter as the server does before it publishes one: the file, its manifest, the signature, bounds, and with the\n"
  "manifest's canary that it is in effect. The exit status is 0 only when everything holds.\n"
  "      --manifest FILE    (NAME.manifest.json beside it)\n"
  "      --public-key HEX   the manifest must be signed with this key\n"
  "  -m, --model DIR        the checkpoint it is for (weights/emoji)\n"
  "      --backend NAME     auto, cpu, ref (auto)\n"
  "      --threads N        0: as many as the machine has\n";

static void print_probe(const char *form, const struct adapter_tool *t, const struct manifest_report *x)
{
  printf("canary    %s on %s: %.3g from the expected, without it %.3g; it changes %.3g of the prediction, and %.4f of that is in effect"
         " (residual %.3g)\n", form, t->be.ops->name, x->error, x->base_error, x->effect, x->share, x->residual);
}

MUST_CHECK static int probe(const char *name, enum generation_form form, struct adapter_tool *t, const struct adapter *a,
                            const struct manifest *m, struct err *e)
{
  struct manifest_report x = {0};
  struct generation *g = NULL;
  int r = build_alone(&g, t, a, form, e);

  if (!r) {
    r = manifest_probe(m, t->m, &t->be, g, &x, e);
    if (x.effect > 0)
      print_probe(name, t, &x);
  }
  generation_unref(g);
  return r;
}

MUST_CHECK static int verify(const struct options *o, struct err *e)
{
  char beside[4096];
  struct adapter_tool t = {0};
  struct manifest *m = NULL;
  struct adapter *a = NULL;
  int r;

  if ((r = manifest_path(beside, sizeof beside, o->file, e)) || (r = adapter_tool_open(&t, o->model, o->backend, o->threads, e)) ||
      (r = adapter_open(&a, o->file, t.names, &t.bounds, e)))
    goto out;
  printf("adapter   %s: %s, %d sites, rank at most %lld, %lld numbers\ndigest    %s\n", o->file, a->format, a->n, (long long)a->max_rank,
         (long long)a->params, a->digest);
  if ((r = manifest_read(&m, o->manifest ? o->manifest : beside, e)) || (r = manifest_check(m, a, t.m, o->public_key, e)))
    goto out;
  printf("manifest  speaks of this file and of %s%s\n", model_info(t.m)->name,
         !manifest_is_signed(m) ? "; not signed" : o->public_key ? "; signed with the key" : "; signed, by whom was not asked");
  if ((r = probe("runtime", FORM_RUNTIME, &t, a, m, e)) || (r = probe("folded", FORM_FOLDED, &t, a, m, e)))
    goto out;
  printf("verified\n");
out:
  manifest_free(m);
  adapter_close(a);
  adapter_tool_close(&t);
  return r;
}

int adapter_verify_main(int argc, char **argv)
{
  static const int accepts[] = {'m', OPT_MANIFEST, OPT_BACKEND, OPT_PUBLIC_KEY, OPT_THREADS, 0};
  struct options o = {.model = "weights/emoji", .backend = "auto"};
  struct err e = {0};
  int r = parse(&o, argc, argv, accepts, &e);

  if (!r && !o.file)
    r = err_set(&e, E_ARG, "give an adapter");
  if (!r && o.public_key && (strlen(o.public_key) != 64 || strspn(o.public_key, "0123456789abcdef") != 64))
    r = err_set(&e, E_ARG, "--public-key takes 64 hexadecimal digits in lower case");
  if (r)
    return adapter_tool_usage("verify", verify_usage, &e);
  return adapter_tool_end("verify", verify(&o, &e), &e);
}

/* ---- sign ---- */

static const char sign_usage[] =
  "usage: safelight adapter sign FILE [options]\n"
  "Writes the manifest of an adapter: its digest, its base, its sites, and a canary that this machine computes.\n"
  "      --secret-key FILE  sign it, with what keygen wrote (not signed)\n"
  "      --prompt TEXT      of the canary, at most 8 times: name what the adapter acts on (three of our own)\n"
  "      --note TEXT        free text\n"
  "  -o, --out FILE         (NAME.manifest.json beside it)\n"
  "  -m, --model DIR        the checkpoint it is for (weights/emoji)\n"
  "      --backend NAME     what computes the canary: ref is the specification (ref)\n"
  "      --threads N        0: as many as the machine has\n";

/* The first word of a small file. key holds 129 bytes. */
MUST_CHECK static int read_key(char *key, const char *path, struct err *e)
{
  FILE *f = fopen(path, "re");
  size_t n;

  if (!f)
    return err_field(e, E_FILE, "secret-key", "%s: cannot be read: %m", path);
  setvbuf(f, NULL, _IONBF, 0); /* no copy of the key stays behind in a buffer */
  n = fread(key, 1, 128, f);
  fclose(f);
  key[n] = 0;
  if (n != 128 || strspn(key, "0123456789abcdefABCDEF") != 128)
    return err_field(e, E_FILE, "secret-key", "%s: is not a secret key (128 hexadecimal digits)", path);
  return 0;
}

MUST_CHECK static int sign(const struct options *o, struct err *e)
{
  char beside[4096], key[129] = "";
  struct manifest_options mo = {.note = o->note, .prompt = o->prompt, .prompts = o->prompts};
  struct manifest_report x = {0};
  struct adapter_tool t = {0};
  struct generation *g = NULL;
  struct adapter *a = NULL;
  const char *out = o->out ? o->out : beside;
  int r;

  if (o->secret_key) {
    r = read_key(key, o->secret_key, e);
    if (r)
      return r;
    mo.secret_key = key;
  }
  if ((r = manifest_path(beside, sizeof beside, o->file, e)) || (r = adapter_tool_open(&t, o->model, o->backend, o->threads, e)) ||
      (r = adapter_open(&a, o->file, t.names, &t.bounds, e)) || (r = build_alone(&g, &t, a, FORM_RUNTIME, e)) ||
      (r = manifest_write(out, a, t.m, &t.be, g, &mo, &x, e)))
    goto out;
  printf("%s: %s, the canary changes by %.3g of the prediction\n", out, o->secret_key ? "signed" : "not signed", x.effect);
out:
  sodium_memzero(key, sizeof key);
  generation_unref(g);
  adapter_close(a);
  adapter_tool_close(&t);
  return r;
}

int adapter_sign_main(int argc, char **argv)
{
  static const int accepts[] = {'m', 'o', OPT_SECRET_KEY, OPT_NOTE, OPT_PROMPT, OPT_BACKEND, OPT_THREADS, 0};
  struct options o = {.model = "weights/emoji", .backend = "ref"};
  struct err e = {0};
  int r = parse(&o, argc, argv, accepts, &e);

  if (!r && !o.file)
    r = err_set(&e, E_ARG, "give an adapter");
  if (r)
    return adapter_tool_usage("sign", sign_usage, &e);
  return adapter_tool_end("sign", sign(&o, &e), &e);
}

/* ---- keygen ---- */

static const char keygen_usage[] =
  "usage: safelight adapter keygen --out FILE\n"
  "Writes a new secret key, readable by its owner alone, and prints the public key for the policy.\n"
  "  -o, --out FILE         must not exist\n";

MUST_CHECK static int keygen(const char *path, struct err *e)
{
  char secret_key[129], public_key[65];
  int r = manifest_keygen(secret_key, public_key, e), fd;

  if (r)
    return r;
  fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
  if (fd < 0)
    r = err_field(e, E_FILE, "out", "%s: cannot be made: %s", path, strerror(errno));
  else if (write(fd, secret_key, 128) != 128 || write(fd, "\n", 1) != 1 || fsync(fd)) {
    r = err_field(e, E_FILE, "out", "%s: cannot be written: %s", path, strerror(errno));
    unlink(path);
  }
  if (fd >= 0)
    close(fd);
  sodium_memzero(secret_key, sizeof secret_key);
  if (!r)
    printf("%s\n", public_key);
  return r;
}

int adapter_keygen_main(int argc, char **argv)
{
  static const int accepts[] = {'o', 0};
  struct options o = {0};
  struct err e = {0};
  int r = parse(&o, argc, argv, accepts, &e);

  if (!r && (!o.out || o.file))
    r = err_set(&e, E_ARG, "give the file that is written with --out");
  if (r)
    return adapter_tool_usage("keygen", keygen_usage, &e);
  return adapter_tool_end("keygen", keygen(o.out, &e), &e);
}
