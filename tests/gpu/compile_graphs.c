/*
 * compile_graphs.c - compiles every cuDNN graph that the models need for GPUs that are not there.
 *
 *   compile_graphs DEVICE.json TABLE   each graph: accepted, engine chosen, kernel compiled; compared with the engines recorded in TABLE
 *   compile_graphs DEVICE.json errors  what cuDNN refuses is a fault of the program, short memory is short memory, and only the rest is the device's; and
 *                                      that no plan wants more working memory than there is, nor splits sums by the count of pictures
 *   compile_graphs DEVICE.json describe    prints the description as cuDNN gives it back; with "card" in place of a file that of the card that is there
 *   compile_graphs DEVICE.json - [WORDS]   prints the lines of the table instead, with workspace and settings; WORDS: of matching graphs alone
 *
 * It proves that graphs are accepted and which engine they get, and nothing about numbers or speed. A graph whose engine differs from the
 * recorded one fails, and so does an engine for Ampere on a Hopper card without a note in the last column: a library that quietly falls back
 * to an older kernel is what this is for. Status 0: all as recorded.
 *
 * Needs cuDNN and a libcuda.so.1 that loads (kernels/cuda/stand_in builds one). Called by tests/gpu/compile. Threads: one.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/cuda/vendor_graph.h"

enum { PLAIN, BIAS, RESIDUAL, F32 };

enum { SMALL = 4096 /* bytes: less than the partial sums of any tile */ };

struct conv_case {
  const char *model;
  int H, in, out, stride, form; /* square pictures, 3x3; H of the input */
};

struct attention_case {
  const char *model;
  int heads, K, T, keys;
};

/* The classes of SD1.5 at 512, SDXL at 1024 and their VAE: each distinct convolution with its fusion, and the first one of the encoder, of pictures. Stride 2
 * pads one side in the VAE alone, which only an encoder has. */
static const struct conv_case convs[] = {
    {"sd15", 64, 4, 320, 1, BIAS},     {"sd15", 64, 320, 320, 1, BIAS},    {"sd15", 64, 320, 320, 1, RESIDUAL},  {"sd15", 64, 640, 320, 1, BIAS},
    {"sd15", 64, 960, 320, 1, BIAS},   {"sd15", 64, 640, 640, 1, BIAS},    {"sd15", 64, 320, 4, 1, F32},         {"sd15", 64, 320, 320, 2, BIAS},
    {"sd15", 32, 320, 640, 1, BIAS},   {"sd15", 32, 640, 640, 1, BIAS},    {"sd15", 32, 640, 640, 1, RESIDUAL},  {"sd15", 32, 960, 640, 1, BIAS},
    {"sd15", 32, 1280, 640, 1, BIAS},  {"sd15", 32, 1920, 640, 1, BIAS},   {"sd15", 32, 1280, 1280, 1, BIAS},    {"sd15", 32, 640, 640, 2, BIAS},
    {"sd15", 16, 640, 1280, 1, BIAS},  {"sd15", 16, 1280, 1280, 1, BIAS},  {"sd15", 16, 1280, 1280, 1, RESIDUAL}, {"sd15", 16, 1920, 1280, 1, BIAS},
    {"sd15", 16, 2560, 1280, 1, BIAS}, {"sd15", 16, 1280, 1280, 2, BIAS},  {"sd15", 8, 1280, 1280, 1, BIAS},     {"sd15", 8, 1280, 1280, 1, RESIDUAL},
    {"sd15", 8, 2560, 1280, 1, BIAS},  {"sdxl", 128, 320, 320, 1, RESIDUAL}, {"sdxl", 128, 960, 320, 1, BIAS},   {"sdxl", 128, 320, 320, 2, BIAS},
    {"sdxl", 64, 640, 640, 1, RESIDUAL}, {"sdxl", 64, 1920, 640, 1, BIAS}, {"sdxl", 32, 1280, 1280, 1, RESIDUAL}, {"sdxl", 32, 2560, 1280, 1, BIAS},
    {"vae", 64, 4, 512, 1, BIAS},      {"vae", 64, 512, 512, 1, RESIDUAL}, {"vae", 128, 512, 512, 1, RESIDUAL},  {"vae", 256, 512, 256, 1, BIAS},
    {"vae", 256, 256, 256, 1, RESIDUAL}, {"vae", 512, 256, 128, 1, BIAS},  {"vae", 512, 128, 128, 1, RESIDUAL},  {"vae", 512, 128, 3, 1, F32},
    {"vae", 1024, 3, 128, 1, BIAS},
};

static const struct attention_case attentions[] = {
    {"sd15", 8, 40, 4096, 4096}, {"sd15", 8, 40, 4096, 77},  {"sd15", 8, 80, 1024, 1024}, {"sd15", 8, 80, 1024, 77},   {"sd15", 8, 160, 256, 256},
    {"sd15", 8, 160, 256, 77},   {"sd15", 8, 160, 64, 64},   {"sd15", 8, 160, 64, 77},    {"sd21", 5, 64, 9216, 9216}, {"sdxl", 10, 64, 4096, 4096},
    {"sdxl", 10, 64, 4096, 77},  {"sdxl", 20, 64, 1024, 1024}, {"sdxl", 20, 64, 1024, 77}, {"vae", 1, 512, 4096, 4096},
};

static char *read_file(const char *path)
{
  FILE *f = fopen(path, "rb");
  char *text = calloc(1, 1 << 16);

  if (!f || !text || !fread(text, 1, (1 << 16) - 1, f)) {
    free(text);
    text = NULL;
  }
  if (f)
    fclose(f);
  return text;
}

static void name_conv(char *name, size_t size, const struct conv_case *c)
{
  snprintf(name, size, "%s conv %d>%d %dx%d s%d%s%s", c->model, c->in, c->out, c->H, c->H, c->stride, c->form == RESIDUAL ? " residual" : "",
           c->form == F32 ? " f32" : "");
}

static void name_attention(char *name, size_t size, const struct attention_case *c)
{
  snprintf(name, size, "%s attention K=%d T=%d keys=%d", c->model, c->K, c->T, c->keys);
}

static int open_convs(struct graph_plan *p, const struct graph_target *t, const struct conv_case *c, int64_t B, struct graph_choice *choice, struct err *e)
{
  static char there;
  int Ho = (c->H + 2 - 3) / c->stride + 1;
  struct gpu_conv v = {.B = B, .H = c->H, .W = c->H, .in = c->in, .Ho = Ho, .Wo = Ho, .out = c->out, .kh = 3, .kw = 3, .stride = c->stride, .pad_lo = 1,
                       .pad_hi = 1, .act = DT_BF16, .y_type = c->form == F32 ? DT_F32 : DT_BF16};

  v.bias = c->form != PLAIN ? &there : NULL;
  v.residual = c->form == RESIDUAL ? &there : NULL;
  return graph_conv_open(p, t, &v, choice, e);
}

static int open_conv(struct graph_plan *p, const struct graph_target *t, const struct conv_case *c, struct graph_choice *choice, struct err *e)
{
  return open_convs(p, t, c, 2, choice, e);
}

static int open_attention(struct graph_plan *p, const struct graph_target *t, const struct attention_case *c, struct graph_choice *choice,
                          struct err *e)
{
  struct gpu_attention a = {.B = 2, .T = c->T, .keys = c->keys, .heads = c->heads, .K = c->K, .act = DT_BF16};

  return graph_attention_open(p, t, &a, choice, e);
}

/* The columns behind device and graph: engine, workspace, settings, note. NULL when there is no such line. */
static const char *line_of(const char *table, const char *device, const char *name)
{
  char line[200];
  const char *at;

  snprintf(line, sizeof line, "%s\t%s\t", device, name);
  at = strstr(table, line);
  return at ? at + strlen(line) : NULL;
}

static int has_note(const char *line)
{
  int tabs = 0;

  while (*line && *line != '\n' && tabs < 3)
    tabs += *line++ == '\t';
  return tabs == 3 && *line && *line != '\n';
}

/* The recorded engine, or -1 when there is none, or when it is an older card's and nobody has written down why that is well. Engines 9 and 41
 * are cuDNN 9.19's kernels for Hopper. */
static long recorded(const char *table, const char *device, const char *name)
{
  const char *line = line_of(table, device, name);
  long engine = line ? strtol(line, NULL, 10) : -1;

  return !line || (!strcmp(device, "h200") && engine != 9 && engine != 41 && !has_note(line)) ? -1 : engine;
}

static int expect(int n, int got, int want, const char *what)
{
  printf("%s %d - %s: %s, expected %s\n", got == want ? "ok" : "not ok", n, what, err_name(got), err_name(want));
  return got != want;
}

/* A plan that was saved comes back with its workspace; a damaged one does not. */
static int check_saved(const struct graph_target *t, int n, const struct graph_plan *p)
{
  struct graph_plan again;
  struct err e = {0};
  char *text;
  size_t bytes;
  int failed = expect(n, graph_plan_save(p, &text, &bytes, &e), 0, "a plan is saved"), r;

  if (failed)
    return 2;
  r = graph_plan_load(&again, t, text, bytes, &e);
  failed = expect(n + 1, r ? r : again.workspace == p->workspace ? 0 : E_INTERNAL, 0, "and loaded");
  if (!r)
    graph_plan_close(&again);
  text[0] = 'x';
  r = graph_plan_load(&again, t, text, bytes, NULL);
  if (!r)
    graph_plan_close(&again);
  failed += expect(n + 2, r != 0, 1, "a damaged one is not");
  free(text);
  return failed;
}

/* Engines that pad the channels of their input work in memory for every picture: one that has not enough for the most pictures is not chosen, and a plan that
 * has not is refused. */
static int check_workspace(const struct graph_target *t, int n)
{
  static const struct conv_case latent = {"sd15", 64, 4, 320, 1, BIAS}, wide = {"sd15", 512, 4, 320, 1, BIAS}, rgb = {"vae", 1024, 3, 128, 1, BIAS};
  struct graph_choice pads = {.engine = -1}, other = {.engine = -1};
  struct graph_plan p = {0};
  struct err e = {0};
  int r = open_conv(&p, t, &latent, &pads, &e), failed;

  failed = expect(n, r ? r : p.workspace > 2 * 64 * 64 * 16 ? 0 : E_INTERNAL, 0, "an engine that pads a small latent");
  graph_plan_close(&p);
  r = open_convs(&p, t, &latent, GPU_DNN_ROWS, &pads, &e);
  failed += expect(n + 1, r, 0, "has the memory for the most pictures");
  graph_plan_close(&p);
  r = open_conv(&p, t, &rgb, &other, &e);
  failed += expect(n + 2, r ? r : p.workspace <= GPU_DNN_WORKSPACE / (GPU_DNN_ROWS / 2) ? 0 : E_INTERNAL, 0, "none that pads is chosen for a large picture");
  graph_plan_close(&p);
  r = open_convs(&p, t, &rgb, GPU_DNN_ROWS, &other, &e);
  failed += expect(n + 3, r, 0, "and the one that is has the memory for the most");
  graph_plan_close(&p);
  r = open_convs(&p, t, &wide, GPU_DNN_ROWS, &pads, &e);
  failed += expect(n + 4, r == E_INTERNAL && strstr(e.msg, "bytes of working memory") ? 0 : E_DEVICE, 0, "a plan that wants more than there is says so");
  graph_plan_close(&p);
  return failed;
}

/* An engine that may split the sums of some tiles takes memory for them with some counts of pictures and not with others: none does. Only those that have the
 * setting are asked, whose kernels are in the library; what a launch takes is SMALL. */
static int check_counts(const struct graph_target *t, int n)
{
  int failed = 0, asked = 0;

  for (int i = 0; i < (int)(sizeof convs / sizeof *convs); i++) {
    struct graph_choice choice = {.engine = -1};
    struct graph_plan p;
    struct err e = {0};
    int has = 0, r = open_conv(&p, t, &convs[i], &choice, &e);

    graph_plan_close(&p);
    for (int k = 0; k < choice.knobs; k++)
      has |= choice.knob_type[k] == CUDNN_KNOB_TYPE_WORKSPACE;
    asked += has;
    for (int B = 1; has && !r && B <= 12; B++) {
      r = open_convs(&p, t, &convs[i], B, &choice, &e);
      if (!r && p.workspace > SMALL) {
        printf("# %s %d>%d %dx%d: %lld bytes for %d pictures\n", convs[i].model, convs[i].in, convs[i].out, convs[i].H, convs[i].H,
               (long long)p.workspace, B);
        failed++;
      }
      graph_plan_close(&p);
    }
    failed += r != 0;
  }
  return expect(n, failed ? E_INTERNAL : 0, 0, "no count of pictures splits sums") + expect(n + 1, asked > 20 ? 0 : E_INTERNAL, 0, "of those that might");
}

/* The codes of errors, and that a plan is never made of an engine that is not there, nor of an error that the caller had before. */
static int check_errors(const struct graph_target *t)
{
  static const struct conv_case plain = {"sd15", 64, 320, 320, 1, BIAS};
  struct conv_case wrong = plain;
  struct graph_choice none = {.engine = 9999}, first = {.engine = -1};
  struct err old = {.code = E_BUSY}, e = {0};
  struct graph_plan p;
  int failed = 0, r;

  printf("1..17\n");
  failed += expect(1, graph_check(CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED, "a test", NULL), E_NOMEM, "no memory of the host");
  failed += expect(2, graph_check(CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED, "a test", NULL), E_NOMEM, "no memory of the device");
  failed += expect(3, graph_check(CUDNN_STATUS_NOT_SUPPORTED_SHAPE, "a test", NULL), E_INTERNAL, "a shape that cuDNN does not take");
  failed += expect(4, graph_check(CUDNN_STATUS_EXECUTION_FAILED_CUDART, "a test", NULL), E_DEVICE, "a failing device");
  failed += expect(5, open_conv(&p, t, &plain, &none, &e), E_INTERNAL, "an engine that is not there");
  wrong.in = 0;
  failed += expect(6, open_conv(&p, t, &wrong, &none, NULL), E_INTERNAL, "a convolution of nothing");
  r = open_conv(&p, t, &plain, &first, &old);
  failed += expect(7, r, 0, "a plan after an older error");
  if (!r) {
    failed += check_saved(t, 8, &p);
    graph_plan_close(&p);
  }
  failed += check_workspace(t, 11);
  failed += check_counts(t, 16);
  return failed != 0;
}

/* The description of a file, or of the card, as cuDNN has it. */
static int describe(const char *json)
{
  cudnnBackendDescriptor_t device = NULL;
  cudnnHandle_t handle = NULL;
  struct err e = {0};
  char *text = NULL;
  int r = json ? graph_device_open(&device, json, &e) : graph_check(cudnnCreate(&handle), "opening", &e);

  if (!r && !json)
    r = graph_device_of(&device, handle, &e);
  if (!r)
    r = graph_device_text(device, &text, &e);
  if (r)
    fprintf(stderr, "compile_graphs: %s\n", e.msg);
  else
    printf("%s\n", text);
  free(text);
  if (device)
    cudnnBackendDestroyDescriptor(device);
  if (handle)
    cudnnDestroy(handle);
  return r != 0;
}

int main(int argc, char **argv)
{
  int convs_n = sizeof convs / sizeof *convs, all = convs_n + (int)(sizeof attentions / sizeof *attentions), failed = 0;
  int errors = argc > 2 && !strcmp(argv[2], "errors"), prints = argc > 2 && !strcmp(argv[2], "-");
  char *json = argc > 1 ? read_file(argv[1]) : NULL, device[64];
  char *table = argc > 2 && !errors && !prints && strcmp(argv[2], "describe") ? read_file(argv[2]) : NULL;
  const char *words = argc > 3 ? argv[3] : "";
  const char *slash = argc > 1 ? strrchr(argv[1], '/') : NULL;
  struct graph_target t = {0};
  struct err e = {0};

  if (argc == 3 && !strcmp(argv[2], "describe") && (json || !strcmp(argv[1], "card"))) {
    failed = describe(json);
    free(json);
    free(table);
    return failed;
  }
  if (!json || argc < 3 || (!errors && !prints && !table) || graph_device_open(&t.device, json, &e)) {
    fprintf(stderr, "compile_graphs: %s\n", e.code ? e.msg : "usage: compile_graphs DEVICE.json TABLE|errors|describe|- [WORDS]\n");
    free(json);
    free(table);
    return 2;
  }
  snprintf(device, sizeof device, "%.60s", slash ? slash + 1 : argv[1]);
  device[strcspn(device, ".")] = '\0';
  if (errors) {
    failed = check_errors(&t);
    all = 0;
  }
  if (table)
    printf("1..%d\n", all);
  for (int i = 0; i < all; i++) {
    struct graph_choice choice = {.engine = -1};
    struct graph_plan p;
    char name[96];
    struct err why = {0};
    long want;
    int r;

    if (i < convs_n)
      name_conv(name, sizeof name, &convs[i]);
    else
      name_attention(name, sizeof name, &attentions[i - convs_n]);
    if (!strstr(name, words))
      continue;
    r = i < convs_n ? open_conv(&p, &t, &convs[i], &choice, &why) : open_attention(&p, &t, &attentions[i - convs_n], &choice, &why);
    want = table ? recorded(table, device, name) : -1;
    if (!table && !r) {
      printf("%s\t%s\t%lld\t%lld", device, name, (long long)choice.engine, (long long)p.workspace);
      for (int k = 0; k < choice.knobs; k++)
        printf("%c%d=%lld", k ? ' ' : '\t', (int)choice.knob_type[k], (long long)choice.knob_value[k]);
      printf("\n");
    }
    if (r && !table)
      fprintf(stderr, "%s\t%s\t%s\n", device, name, why.msg);
    else if (table && !r && choice.engine == want)
      printf("ok %d - %s %s: engine %ld\n", i + 1, device, name, want);
    else if (table)
      printf("not ok %d - %s %s: engine %lld, recorded %ld %s\n", i + 1, device, name, (long long)choice.engine, want, why.msg);
    fflush(stdout);
    failed += r || (table && choice.engine != want);
    if (!r)
      graph_plan_close(&p);
  }
  cudnnBackendDestroyDescriptor(t.device);
  free(json);
  free(table);
  return failed != 0;
}
