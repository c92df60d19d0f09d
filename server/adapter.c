/*
 * adapter.c - `safelight adapter`: picks the subcommand. Called by main.c.
 */
#include "server/adapter.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "server/commands.h"

static const struct {
  const char *name, *help;
  int (*run)(int argc, char **argv);
} commands[] = {
    {"inspect", "say what an adapter file is, and what of it fits the model", adapter_inspect_main},
    {"merge", "make one adapter of several experts", adapter_merge_main},
    {"extract", "make a LoRA of a fine-tuned UNet and its base", adapter_extract_main},
    {"verify", "check an adapter against its manifest, and its effect", adapter_verify_main},
    {"sign", "write the manifest of an adapter, signed with a key", adapter_sign_main},
    {"keygen", "make a key pair for manifests", adapter_keygen_main},
};

int adapter_main(int argc, char **argv)
{
  const char *name = argc > 1 ? argv[1] : "help";

  for (size_t i = 0; i < sizeof commands / sizeof *commands; i++)
    if (!strcmp(name, commands[i].name))
      return commands[i].run(argc - 1, argv + 1);
  if (strcmp(name, "help") && strcmp(name, "--help") && strcmp(name, "-h")) {
    fprintf(stderr, "safelight adapter: there is no subcommand \"%.80s\"; `safelight adapter help` lists them\n", name);
    return 2;
  }
  printf("usage: safelight adapter COMMAND [...]\n\n");
  for (size_t i = 0; i < sizeof commands / sizeof *commands; i++)
    printf("  %-9s %s\n", commands[i].name, commands[i].help);
  printf("\n`safelight adapter COMMAND --help` lists the options of a command.\n");
  return 0;
}

int adapter_tool_open(struct adapter_tool *t, const char *model, const char *backend, int threads, struct err *e)
{
  struct be_config cfg = {.threads = threads};
  const struct be_ops *ops = &be_dry;
  int r;

  *t = (struct adapter_tool){0};
  adapter_bounds_default(&t->bounds);
  if ((strcmp(backend, "dry") && (r = be_find(backend, &ops, e))) || (r = be_open(&t->be, ops, &cfg, e)) ||
      (r = model_open(&t->m, &t->be, model, e)))
    return r;
  return adapter_names_new(&t->names, model_base(t->m), model_layers_per_block(t->m), e);
}

void adapter_tool_close(struct adapter_tool *t)
{
  adapter_names_free(t->names);
  model_close(t->m);
  be_close(&t->be);
}

int adapter_tool_number(const char *option, const char *s, double lo, double hi, double *out, struct err *e)
{
  char *end;

  *out = strtod(s, &end);
  if (end == s || *end || !(*out >= lo && *out <= hi))
    return err_field(e, E_ARG, option, "--%s must be a number from %g to %g; got \"%.40s\"", option, lo, hi, s);
  return 0;
}

int adapter_tool_usage(const char *command, const char *usage, const struct err *e)
{
  if (!strcmp(e->msg, "help")) {
    fputs(usage, stdout);
    return 0;
  }
  fprintf(stderr, "safelight adapter %s: %s\n%s", command, e->msg, usage);
  return 2;
}

int adapter_tool_end(const char *command, int r, const struct err *e)
{
  if (r)
    fprintf(stderr, "safelight adapter %s: %s\n", command, e->msg);
  return r ? 1 : 0;
}
