/*
 * adapter_inspect.c - `safelight adapter inspect`: what an adapter file is, and whether a model takes it.
 *
 * Called by adapter.c. Threads: none. Exit status: 0 the file is fit for use, 1 it is refused (the report says why) or cannot be read,
 * 2 wrong usage.
 */
#include <stdio.h>
#include <string.h>

#include "server/adapter.h"

static const char usage[] =
  "usage: safelight adapter inspect FILE [options]\n"
  "  FILE                   a .safetensors file, or a folder with adapter_model.safetensors and adapter_config.json or with\n"
  "                         pytorch_lora_weights.safetensors\n"
  "  -m, --model DIR        the checkpoint that the adapter is for, in the diffusers layout (weights/emoji); norms are then shown as\n"
  "                         shares of its weights\n"
  "      --arch NAME        in place of a checkpoint the shapes of emoji, sd15, sd21 or sdxl\n"
  "      --json             one JSON object\n";

struct options {
  const char *path, *model, *arch;
  int json;
};

MUST_CHECK static int read_options(struct options *o, int argc, char **argv, struct err *e)
{
  *o = (struct options){.model = "weights/emoji"};
  for (int i = 1; i < argc; i++) {
    const char *value = i + 1 < argc ? argv[i + 1] : NULL;

    if (!strcmp(argv[i], "--help") || !strcmp(argv[i], "-h"))
      return err_set(e, E_ARG, "help");
    if (!strcmp(argv[i], "--json")) {
      o->json = 1;
    } else if (argv[i][0] != '-' && !o->path) {
      o->path = argv[i];
    } else if ((!strcmp(argv[i], "--model") || !strcmp(argv[i], "-m")) && value) {
      o->model = value;
      i++;
    } else if (!strcmp(argv[i], "--arch") && value) {
      o->arch = value;
      i++;
    } else {
      return err_field(e, E_ARG, argv[i], "\"%.80s\" is no option, lacks its value, or is a second file", argv[i]);
    }
  }
  return o->path ? 0 : err_field(e, E_ARG, "FILE", "which file?");
}

/* The shapes alone: nothing is computed with the model, so that a file of gigabytes is not packed for it. */
MUST_CHECK static int open_shapes(struct adapter_tool *t, const struct options *o, struct err *e)
{
  const struct be_config cfg = {.threads = 1};
  int r;

  if (!o->arch)
    return adapter_tool_open(t, o->model, "dry", 1, e);
  *t = (struct adapter_tool){0};
  r = be_open(&t->be, &be_dry, &cfg, e);
  if (!r)
    r = model_open_synthetic(&t->m, &t->be, o->arch, e);
  if (!r)
    r = adapter_names_new(&t->names, model_base(t->m), model_layers_per_block(t->m), e);
  return r;
}

int adapter_inspect_main(int argc, char **argv)
{
  struct adapter_tool t = {0};
  struct options o;
  struct err e = {0};
  int r;

  if (read_options(&o, argc, argv, &e))
    return adapter_tool_usage("inspect", usage, &e);
  r = open_shapes(&t, &o, &e);
  if (!r)
    r = adapter_inspect(o.path, t.names, o.arch ? NULL : model_sources(t.m), o.json, stdout, &e);
  adapter_tool_close(&t);
  return adapter_tool_end("inspect", r, &e);
}
