/*
 * test_adapter.c - models/adapter*.c without a library: names, the order of scales, everything that is refused, files and folders, what
 * delta_apply adds, and the report of inspect. The formats themselves are compared with their libraries in tests/golden/test_adapters.c.
 */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>
#include <jansson.h>

#include "base/half.h"
#include "models/adapter_impl.h"

#define D0 "down_blocks.0.attentions.0.transformer_blocks.0"
#define Q "unet." D0 ".attn1.to_q"
#define OUT "unet." D0 ".attn1.to_out.0"
#define CONV "unet.down_blocks.0.resnets.0.conv1"
#define TEXT "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
#define KQ "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"

enum { S_Q, S_OUT, S_CONV, S_NORM, S_DOWN, S_MID, S_UP, S_UP_PLAIN, S_CONV_IN, S_TIME, S_TEXT, S_TEXT2, S_TABLE, S_VAE, S_ATTN_UP, SITES };

/* A model of a few layers, two resnets per block. */
static struct site sites[SITES] = {
    [S_Q] = {.name = (char *)Q, .kind = WEIGHT_LINEAR, .out = 4, .in = 6},
    [S_OUT] = {.name = (char *)OUT, .kind = WEIGHT_LINEAR, .out = 4, .in = 4, .has_bias = 1},
    [S_CONV] = {.name = (char *)CONV, .kind = WEIGHT_CONV, .out = 4, .in = 2, .kh = 3, .kw = 3, .has_bias = 1},
    [S_NORM] = {.name = (char *)"unet.down_blocks.0.resnets.0.norm1", .kind = WEIGHT_NORM, .out = 2, .in = 1, .has_bias = 1},
    [S_DOWN] = {.name = (char *)"unet.down_blocks.1.downsamplers.0.conv", .kind = WEIGHT_CONV, .out = 4, .in = 4, .kh = 3, .kw = 3, .has_bias = 1},
    [S_MID] = {.name = (char *)"unet.mid_block.resnets.1.conv2", .kind = WEIGHT_CONV, .out = 4, .in = 4, .kh = 3, .kw = 3, .has_bias = 1},
    [S_UP] = {.name = (char *)"unet.up_blocks.1.upsamplers.0.conv", .kind = WEIGHT_CONV, .out = 4, .in = 4, .kh = 3, .kw = 3, .has_bias = 1},
    [S_UP_PLAIN] = {.name = (char *)"unet.up_blocks.0.upsamplers.0.conv", .kind = WEIGHT_CONV, .out = 4, .in = 4, .kh = 3, .kw = 3, .has_bias = 1},
    [S_CONV_IN] = {.name = (char *)"unet.conv_in", .kind = WEIGHT_CONV, .out = 4, .in = 4, .kh = 3, .kw = 3, .has_bias = 1},
    [S_TIME] = {.name = (char *)"unet.time_embedding.linear_2", .kind = WEIGHT_LINEAR, .out = 4, .in = 4, .has_bias = 1},
    [S_TEXT] = {.name = (char *)TEXT, .kind = WEIGHT_LINEAR, .out = 4, .in = 4, .has_bias = 1},
    [S_TEXT2] = {.name = (char *)"text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj", .kind = WEIGHT_LINEAR, .out = 6, .in = 6,
                 .has_bias = 1},
    [S_TABLE] = {.name = (char *)"text_encoder.text_model.embeddings.token_embedding", .kind = WEIGHT_TABLE, .out = 4, .in = 8},
    [S_VAE] = {.name = (char *)"vae.encoder.conv_in", .kind = WEIGHT_CONV, .out = 4, .in = 3, .kh = 3, .kw = 3, .has_bias = 1},
    [S_ATTN_UP] = {.name = (char *)"unet.up_blocks.1.attentions.0.norm", .kind = WEIGHT_NORM, .out = 4, .in = 1, .has_bias = 1},
};

static struct generation base = {.site = sites, .n = SITES};
static struct adapter_names *names;
static struct adapter_bounds bounds;
static struct err e;
static char folder[64];

/* ---- files by hand ---- */

/* One tensor: its name, type, shape as JSON and values; floats are put down in the type. n 0: all of `value`. */
struct part {
  const char *name, *type, *shape;
  int count;
  float value;
};

struct image {
  unsigned char p[16384];
  size_t n;
};

static size_t put_number(unsigned char *p, const char *type, float v)
{
  uint16_t h = !strcmp(type, "F16") ? f32_to_f16(v) : f32_to_bf16(v);
  int64_t whole = isfinite(v) ? (int64_t)v : 0;
  double d = v;

  if (!strcmp(type, "F32")) {
    memcpy(p, &v, 4);
    return 4;
  }
  if (!strcmp(type, "F64")) {
    memcpy(p, &d, 8);
    return 8;
  }
  if (!strcmp(type, "I64")) {
    memcpy(p, &whole, 8);
    return 8;
  }
  if (!strcmp(type, "I32")) {
    memcpy(p, &whole, 4);
    return 4;
  }
  memcpy(p, &h, 2);
  return 2;
}

/* metadata: a JSON text for lora_adapter_metadata, or NULL. */
static void make(struct image *f, const struct part *part, const char *metadata)
{
  static unsigned char data[8192];
  json_t *header = json_object();
  size_t at = 0;
  char *text;

  if (metadata)
    json_object_set_new(header, "__metadata__", json_pack("{s:s}", "lora_adapter_metadata", metadata));
  for (; part->name; part++) {
    size_t begin = at;

    for (int i = 0; i < part->count; i++)
      at += put_number(data + at, part->type, part->value * (isfinite(part->value) && part->count > 1 ? 1 + 0.25f * (float)(i % 5) : 1));
    assert_true(at < sizeof data);
    json_object_set_new(header, part->name, json_pack("{s:s, s:o, s:[I,I]}", "dtype", part->type, "shape", json_loads(part->shape, 0, NULL),
                                                      "data_offsets", (json_int_t)begin, (json_int_t)at));
  }
  text = json_dumps(header, JSON_COMPACT);
  f->n = strlen(text);
  for (int i = 0; i < 8; i++)
    f->p[i] = (unsigned char)((uint64_t)f->n >> 8 * i);
  memcpy(f->p + 8, text, f->n);
  memcpy(f->p + 8 + f->n, data, at);
  f->n += 8 + at;
  free(text);
  json_decref(header);
}

static int open_parts(struct adapter **a, const struct part *part, const char *metadata, const char *config)
{
  static struct image f;

  make(&f, part, metadata);
  e = (struct err){0};
  return adapter_open_memory(a, "test", f.p, f.n, config, names, &bounds, &e);
}

#define DOWN(name) {name ".lora_down.weight", "F32", "[2,6]", 12, 0.5f}
#define UP(name) {name ".lora_up.weight", "F32", "[4,2]", 8, 0.25f}
#define PDOWN(name) {name ".lora_A.weight", "F32", "[2,6]", 12, 0.5f}
#define PUP(name) {name ".lora_B.weight", "F32", "[4,2]", 8, 0.25f}
#define END {NULL, NULL, NULL, 0, 0}

/* ---- names ---- */

static void test_names(void **state)
{
  static const struct {
    const char *alias;
    int site;
  } known[] = {
      {Q, S_Q},
      {D0 ".attn1.to_q", S_Q},
      {"base_model.model." D0 ".attn1.to_q", S_Q},
      {"base_model.model.unet." D0 ".attn1.to_q", S_Q},
      {KQ, S_Q},
      {"lycoris_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q", S_Q},
      {"lora." D0 ".attn1.to_q", S_Q},
      {"lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q", S_Q},
      {"model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q", S_Q},
      {"unet." D0 ".attn1.processor.to_q", S_Q},
      {"unet." D0 ".attn1.processor.to_out", S_OUT},
      {D0 ".attn1.processor.to_out", S_OUT},
      {"lora_unet_down_blocks_0_resnets_0_conv1", S_CONV},
      {"lora_unet_input_blocks_1_0_in_layers_2", S_CONV},
      {"lora_unet_input_blocks_1_0_in_layers_0", S_NORM},
      {"lora_unet_input_blocks_6_0_op", S_DOWN},
      {"lora_unet_middle_block_2_out_layers_3", S_MID},
      {"lora_unet_output_blocks_5_2_conv", S_UP},       /* behind an attention */
      {"lora_unet_output_blocks_2_1_conv", S_UP_PLAIN}, /* and where there is none */
      {"lora_unet_input_blocks_0_0", S_CONV_IN},
      {"lora_unet_time_embed_2", S_TIME},
      {"lora_unet_time_embedding_linear_2", S_TIME},
      {TEXT, S_TEXT},
      {"lora_te_text_model_encoder_layers_0_self_attn_q_proj", S_TEXT},
      {"lora_te1_text_model_encoder_layers_0_self_attn_q_proj", S_TEXT},
      {"lora_te2_text_model_encoder_layers_0_self_attn_q_proj", S_TEXT2},
      {"text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj", S_TEXT2},
      {"text_encoder.text_model.encoder.layers.0.self_attn.to_q", S_TEXT},
      {"text_model.encoder.layers.0.self_attn.q_proj", SITE_NONE}, /* either of two */
      {"text_encoder.text_model.embeddings.token_embedding", SITE_NONE},
      {"vae.encoder.conv_in", SITE_NONE},
      {"encoder.conv_in", SITE_NONE},
      {"lora_unet_output_blocks_2_2_conv", SITE_NONE},
      {"lora_unet_input_blocks_2_1_transformer_blocks_0_attn1_to_q", SITE_NONE},
      {"unet", SITE_NONE},
      {"", SITE_NONE},
  };
  size_t i;

  (void)state;
  for (i = 0; i < sizeof known / sizeof *known; i++)
    if (adapter_names_find(names, known[i].alias) != known[i].site)
      fail_msg("\"%s\" is site %d, not %d", known[i].alias, adapter_names_find(names, known[i].alias), known[i].site);
  assert_string_equal(adapter_names_nearest(names, "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_qq"), KQ);
}

/* Without SGM's names when nobody says how many layers a block has. */
static void test_names_plain(void **state)
{
  struct adapter_names *n;

  (void)state;
  assert_int_equal(adapter_names_new(&n, &base, 0, &e), 0);
  assert_int_equal(adapter_names_find(n, "lora_unet_input_blocks_0_0"), SITE_NONE);
  assert_int_equal(adapter_names_find(n, "lora_unet_conv_in"), S_CONV_IN);
  adapter_names_free(n);
  adapter_names_free(NULL);
}

/* ---- scale ---- */

#define CONFIG(more) "{\"peft_type\":\"LORA\",\"bias\":\"none\",\"r\":2,\"lora_alpha\":6" more "}"
#define METADATA "{\"unet.r\":2,\"unet.lora_alpha\":10}"

static void test_scale(void **state)
{
  const struct part scale = {D0 ".attn1.to_q.scale", "F32", "[]", 1, 0.75f}, alpha = {D0 ".attn1.to_q.alpha", "F32", "[1]", 1, 5};
  const struct {
    int scale, alpha;
    const char *metadata, *config;
    float want;
    enum scale_rule rule;
  } rows[] = {
      {0, 0, NULL, NULL, 1, SCALE_NONE},
      {0, 0, NULL, CONFIG(""), 3, SCALE_CONFIG},
      {0, 0, METADATA, NULL, 5, SCALE_METADATA},
      {0, 0, METADATA, CONFIG(""), 5, SCALE_METADATA},
      {0, 1, NULL, NULL, 2.5f, SCALE_ALPHA},
      {0, 1, METADATA, CONFIG(""), 2.5f, SCALE_ALPHA},
      {1, 0, NULL, NULL, 0.75f, SCALE_EXPLICIT},
      {1, 1, METADATA, CONFIG(""), 0.75f, SCALE_EXPLICIT},
      {0, 0, "{\"text_encoder.r\":3,\"text_encoder.lora_alpha\":9}", NULL, 1, SCALE_NONE}, /* of another part */
      {0, 0, "{\"text_encoder.r\":3,\"text_encoder.lora_alpha\":9}", CONFIG(""), 3, SCALE_CONFIG},
      {0, 0, NULL, CONFIG(",\"use_rslora\":true"), 4.2426407f, SCALE_CONFIG},
      {0, 0, NULL, CONFIG(",\"alpha_pattern\":{\"to_k\":1,\"attn1.to_q\":8}"), 4, SCALE_CONFIG},
      {0, 0, NULL, CONFIG(",\"alpha_pattern\":{\"o_q\":8}"), 3, SCALE_CONFIG}, /* a pattern starts where a name does */
      {0, 0, NULL, "{\"peft_type\":\"LORA\",\"r\":7,\"lora_alpha\":6,\"rank_pattern\":{\"attn\\\\d.to_[qk]\":2}}", 3, SCALE_CONFIG},
  };
  size_t i;

  (void)state;
  for (i = 0; i < sizeof rows / sizeof *rows; i++) {
    struct part part[5] = {PDOWN(D0 ".attn1.to_q"), PUP(D0 ".attn1.to_q")};
    struct adapter *a;
    int n = 2;

    if (rows[i].scale)
      part[n++] = scale;
    if (rows[i].alpha)
      part[n++] = alpha;
    if (open_parts(&a, part, rows[i].metadata, rows[i].config))
      fail_msg("row %zu: %s", i, e.msg);
    assert_int_equal(a->n, 1);
    assert_int_equal(a->delta[0].site, S_Q);
    assert_int_equal(a->delta[0].rule, rows[i].rule);
    assert_true(fabsf(a->delta[0].scale - rows[i].want) <= 1e-6f);
    assert_true(adapter_at(a, S_Q) == &a->delta[0]);
    assert_null(adapter_at(a, S_OUT));
    assert_int_equal(a->max_rank, 2);
    assert_int_equal(a->params, 20);
    adapter_close(a);
  }
}

static void test_patterns(void **state)
{
  static const struct {
    const char *pattern, *name;
    int want;
  } rows[] = {
      {"to_q", "a.b.to_q", 1},       {"to_q", "to_q", 1},           {"to_q", "a.into_q", 0},      {"to_q", "a.to_q.b", 0},
      {"b.to_q", "a.b.to_q", 1},     {"to_.", "a.to_k", 1},         {"to_[qk]", "a.to_k", 1},     {"to_[qk]", "a.to_v", 0},
      {"l\\.\\d+\\.q", "l.12.q", 1}, {"l\\.\\d+\\.q", "l..q", 0},   {".*q", "a.b.q", 1},          {"x?y", "a.y", 1},
      {"[0-9]+", "a.31", 1},         {"[a-c]*z", "abcabz", 1},      {"(q|k)", "q", -1},           {"^q", "q", -1},
      {"q$", "q", -1},               {"\\w", "q", -1},              {"[^q]", "x", -1},            {"", "q", -1},
      {"a{2}", "aa", -1},            {"[ab", "a", -1},              {"\\", "a", -1},              {"*", "a", -1},
      {".*.*.*.*.*.*.*.*.*.*x", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", -1}, /* too much work */
  };
  size_t i;

  (void)state;
  for (i = 0; i < sizeof rows / sizeof *rows; i++)
    if (adapter_pattern_match(rows[i].pattern, rows[i].name) != rows[i].want)
      fail_msg("\"%s\" on \"%s\" is not %d", rows[i].pattern, rows[i].name, rows[i].want);
}

/* ---- what is refused ---- */

static const struct refusal {
  struct part part[6];
  const char *metadata, *config;
  const char *field, *says;
  int64_t max_rank;
} refusals[] = {
    {.part = {END}, .field = "test", .says = "holds no tensors"},
    {.part = {DOWN("lora_unet_nowhere"), UP("lora_unet_nowhere")}, .field = "lora_unet_nowhere.lora_down.weight", .says = "nearest"},
    {.part = {DOWN(KQ), UP(KQ), {KQ ".lora_side.weight", "F32", "[1]", 1, 1}}, .field = KQ ".lora_side.weight", .says = "names no layer"},
    {.part = {{"vae.encoder.conv_in.weight", "F32", "[4,3,3,3]", 108, 1}}, .field = "vae.encoder.conv_in.weight", .says = "names no layer"},
    {.part = {{"text_encoder.text_model.embeddings.token_embedding.weight", "F32", "[8,4]", 32, 1}},
     .field = "text_encoder.text_model.embeddings.token_embedding.weight", .says = "names no layer"},
    {.part = {{KQ ".weight", "F32", "[4,6]", 24, 1}}, .field = KQ ".weight", .says = "names no layer"},
    {.part = {DOWN(KQ)}, .field = KQ ".lora_down.weight", .says = "lacks its partner"},
    {.part = {UP(KQ)}, .field = KQ ".lora_up.weight", .says = "lacks its partner"},
    {.part = {DOWN(KQ), UP(KQ), {"lora_unet_conv_in.alpha", "F32", "[]", 1, 1}}, .field = "lora_unet_conv_in.alpha", .says = "stands alone"},
    {.part = {{KQ ".dora_scale", "F32", "[1,6]", 6, 1}}, .field = KQ ".dora_scale", .says = "stands alone"},
    {.part = {{KQ ".lora_down.weight", "F32", "[2,5]", 10, 1}, UP(KQ)}, .field = KQ ".lora_down.weight", .says = "shape (2, 5)"},
    {.part = {{KQ ".lora_down.weight", "F32", "[6]", 6, 1}, UP(KQ)}, .field = KQ ".lora_down.weight", .says = "shape (6)"},
    {.part = {{KQ ".lora_down.weight", "F32", "[2,6,1,2]", 24, 1}, UP(KQ)}, .field = KQ ".lora_down.weight", .says = "shape"},
    {.part = {DOWN(KQ), {KQ ".lora_up.weight", "F32", "[2,4]", 8, 1}}, .field = KQ ".lora_up.weight", .says = "shape (2, 4)"},
    {.part = {DOWN(KQ), {KQ ".lora_up.weight", "F32", "[4,3]", 12, 1}}, .field = KQ ".lora_up.weight", .says = "shape (4, 3)"},
    {.part = {{"lora_unet_conv_in.lora_down.weight", "F32", "[1,4,1,1]", 4, 1}, {"lora_unet_conv_in.lora_up.weight", "F32", "[4,1,1,1]", 4, 1}},
     .field = "lora_unet_conv_in.lora_down.weight", .says = "shape"}, /* 1x1 for 3x3, and no core */
    {.part = {{"lora_unet_conv_in.lora_down.weight", "F32", "[1,4,1,1]", 4, 1}, {"lora_unet_conv_in.lora_up.weight", "F32", "[4,1,1,1]", 4, 1},
              {"lora_unet_conv_in.lora_mid.weight", "F32", "[1,2,3,3]", 18, 1}},
     .field = "lora_unet_conv_in.lora_mid.weight", .says = "shape"},
    {.part = {{KQ ".lora_down.weight", "F32", "[0,6]", 0, 1}, {KQ ".lora_up.weight", "F32", "[4,0]", 0, 1}}, .field = KQ ".lora_down.weight",
     .says = "rank 0"},
    {.part = {DOWN(KQ), UP(KQ)}, .max_rank = 1, .field = KQ ".lora_down.weight", .says = "rank 2; 1 to 1"},
    {.part = {{KQ ".lora_down.weight", "I32", "[2,6]", 12, 1}, UP(KQ)}, .field = KQ ".lora_down.weight", .says = "type I32"},
    {.part = {DOWN(KQ), {KQ ".lora_up.weight", "F64", "[4,2]", 8, 1}}, .field = KQ ".lora_up.weight", .says = "type F64"},
    {.part = {{KQ ".lora_down.weight", "F32", "[2,6]", 12, NAN}, UP(KQ)}, .field = KQ ".lora_down.weight", .says = "not finite"},
    {.part = {DOWN(KQ), {KQ ".lora_up.weight", "F16", "[4,2]", 8, INFINITY}}, .field = KQ ".lora_up.weight", .says = "not finite"},
    {.part = {DOWN(KQ), {KQ ".lora_up.weight", "BF16", "[4,2]", 8, NAN}}, .field = KQ ".lora_up.weight", .says = "not finite"},
    {.part = {{KQ ".lora_down.weight", "F32", "[2,6]", 12, 1e38f}, {KQ ".lora_up.weight", "F32", "[4,2]", 8, 1e38f}}, .field = Q,
     .says = "not finite"},
    {.part = {DOWN(KQ), UP(KQ), {KQ ".alpha", "F32", "[]", 1, 0}}, .field = KQ ".alpha", .says = "positive"},
    {.part = {DOWN(KQ), UP(KQ), {KQ ".alpha", "F32", "[]", 1, -1}}, .field = KQ ".alpha", .says = "positive"},
    {.part = {DOWN(KQ), UP(KQ), {KQ ".alpha", "F16", "[]", 1, NAN}}, .field = KQ ".alpha", .says = "positive"},
    {.part = {DOWN(KQ), UP(KQ), {KQ ".alpha", "F32", "[]", 1, INFINITY}}, .field = KQ ".alpha", .says = "positive"},
    {.part = {DOWN(KQ), UP(KQ), {KQ ".alpha", "F32", "[2]", 2, 1}}, .field = KQ ".alpha", .says = "one number"},
    {.part = {DOWN(KQ), UP(KQ), {KQ ".alpha", "I32", "[]", 1, 1}}, .field = KQ ".alpha", .says = "type I32"},
    {.part = {DOWN(KQ), UP(KQ), {KQ ".scale", "F32", "[]", 1, 0}}, .field = KQ ".scale", .says = "positive"},
    {.part = {DOWN(KQ), UP(KQ), {KQ ".scale", "F32", "[]", 1, 1}, {KQ ".alpha", "F32", "[]", 1, -2}}, .field = KQ ".alpha", .says = "positive"},
    {.part = {DOWN(KQ), UP(KQ), {KQ ".dora_scale", "F32", "[1,6]", 6, INFINITY}}, .field = KQ ".dora_scale", .says = "not finite"},
    {.part = {DOWN(KQ), UP(KQ), {KQ ".dora_scale", "F32", "[1,6]", 6, -1}}, .field = KQ ".dora_scale", .says = "negative"},
    {.part = {DOWN(KQ), UP(KQ), {KQ ".dora_scale", "F32", "[1,5]", 5, 1}}, .field = KQ ".dora_scale", .says = "shape"},
    {.part = {DOWN(KQ), UP(KQ), {KQ ".dora_scale", "F32", "[6]", 6, 1}}, .field = KQ ".dora_scale", .says = "shape"}, /* of which axis? */
    {.part = {DOWN(KQ), UP(KQ), DOWN("lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q")},
     .field = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q.lora_down.weight", .says = "names already"},
    {.part = {DOWN(KQ), UP(KQ), PDOWN(Q), PUP(Q)}, .field = Q ".lora_A.weight", .says = "names already"},
    {.part = {PDOWN(Q), PUP(Q), {Q ".lora.down.weight", "F32", "[2,6]", 12, 1}}, .field = Q ".lora_A.weight", .says = "the same factor"},
    {.part = {PDOWN(Q), PUP(Q), {Q ".weight", "F32", "[4,6]", 24, 1}}, .field = Q ".weight", .says = "does not go with"},
    {.part = {DOWN(KQ), UP(KQ), {KQ ".hada_w1_a", "F32", "[4,2]", 8, 1}}, .field = KQ ".hada_w1_a", .says = "does not go with"},
    {.part = {DOWN(KQ), UP(KQ), {KQ ".diff", "F32", "[4,6]", 24, 1}}, .field = KQ ".diff", .says = "does not go with"},
    {.part = {{KQ ".diff", "F32", "[4,6]", 24, 1}, {KQ ".alpha", "F32", "[]", 1, 1}}, .field = KQ ".alpha", .says = "does not go with"},
    {.part = {{KQ ".diff", "F32", "[6,4]", 24, 1}}, .field = KQ ".diff", .says = "shape"},
    {.part = {{KQ ".diff_b", "F32", "[4]", 4, 1}}, .field = KQ ".diff_b", .says = "has none"},
    {.part = {{"lora_unet_conv_in.diff_b", "F32", "[3]", 3, 1}}, .field = "lora_unet_conv_in.diff_b", .says = "shape"},
    {.part = {{OUT ".bias", "F32", "[4]", 4, 1}}, .field = OUT ".bias", .says = "lacks its partner"},
    {.part = {{OUT ".weight", "F32", "[4,4]", 16, NAN}}, .field = OUT ".weight", .says = "not finite"},
    {.part = {{OUT ".weight", "F32", "[16]", 16, 1}}, .field = OUT ".weight", .says = "shape"},
    {.part = {{"lora_unet_down_blocks_0_resnets_0_norm1.lora_down.weight", "F32", "[1,1]", 1, 1},
              {"lora_unet_down_blocks_0_resnets_0_norm1.lora_up.weight", "F32", "[2,1]", 2, 1}},
     .field = "unet.down_blocks.0.resnets.0.norm1", .says = "is a norm"},
    {.part = {{KQ ".hada_w1_a", "F32", "[4,2]", 8, 1}, {KQ ".hada_w1_b", "F32", "[2,6]", 12, 1}, {KQ ".hada_w2_a", "F32", "[4,2]", 8, 1}},
     .field = KQ ".hada_w1_a", .says = "lacks its partner"},
    {.part = {{KQ ".hada_w1_a", "F32", "[4,2]", 8, 1}, {KQ ".hada_w1_b", "F32", "[2,6]", 12, 1}, {KQ ".hada_w2_a", "F32", "[4,2]", 8, 1},
              {KQ ".hada_w2_b", "F32", "[2,6]", 12, 1}, {KQ ".hada_t1", "F32", "[2,2,1,1]", 4, 1}},
     .field = KQ ".hada_t1", .says = "come together"},
    {.part = {{KQ ".hada_w1_a", "F32", "[4,2]", 8, 1}, {KQ ".hada_w1_b", "F32", "[2,6]", 12, 1}, {KQ ".hada_w2_a", "F32", "[4,3]", 12, 1},
              {KQ ".hada_w2_b", "F32", "[3,6]", 18, 1}},
     .field = KQ ".hada_w2_a", .says = "shape"},
    {.part = {{KQ ".lokr_w1", "F32", "[2,2]", 4, 1}}, .field = KQ ".lokr_w1", .says = "lacks its partner"},
    {.part = {{KQ ".lokr_w1", "F32", "[2,2]", 4, 1}, {KQ ".lokr_w2_a", "F32", "[2,1]", 2, 1}}, .field = KQ ".lokr_w1", .says = "lacks its partner"},
    {.part = {{KQ ".lokr_w1", "F32", "[2,2]", 4, 1}, {KQ ".lokr_w2", "F32", "[2,4]", 8, 1}}, .field = KQ ".lokr_w2", .says = "shape"},
    {.part = {{KQ ".lokr_w1", "F32", "[4,6]", 24, 1}, {KQ ".lokr_w2", "F32", "[2,1]", 2, 1}}, .field = KQ ".lokr_w2", .says = "shape"},
    {.part = {{KQ ".lokr_w1", "F32", "[2,2]", 4, 1}, {KQ ".lokr_w2", "F32", "[0,3]", 0, 1}}, .field = KQ ".lokr_w2", .says = "shape"},
    {.part = {{KQ ".lokr_w1_a", "F32", "[2,1]", 2, 1}, {KQ ".lokr_w1_b", "F32", "[1,2]", 2, 1}, {KQ ".lokr_w2_a", "F32", "[2,2]", 4, 1},
              {KQ ".lokr_w2_b", "F32", "[2,3]", 6, 1}},
     .field = KQ ".lokr_w1_a", .says = "scale is not defined"},
    {.part = {PDOWN("base_model.model." D0 ".attn1.to_q"), PUP("base_model.model." D0 ".attn1.to_q")},
     .field = "base_model.model." D0 ".attn1.to_q.lora_A.weight", .says = "name the folder"},
    {.part = {PDOWN(Q), PUP(Q), {Q ".lora_magnitude_vector", "F32", "[4]", 4, 1}, {Q ".dora_scale", "F32", "[4,1]", 4, 1}},
     .field = Q ".dora_scale", .says = "second magnitude"},
    {.part = {PDOWN(Q), PUP(Q), {Q ".lora_magnitude_vector", "F32", "[6]", 6, 1}}, .field = Q ".lora_magnitude_vector", .says = "shape"},
    {.part = {PDOWN(Q), PUP(Q)}, .config = CONFIG(",\"use_dora\":true"), .field = Q ".lora_A.weight", .says = "use_dora"},
    {.part = {PDOWN(Q), PUP(Q), {Q ".lora_magnitude_vector", "F32", "[4]", 4, 1}}, .config = CONFIG(""), .field = Q ".lora_A.weight",
     .says = "use_dora"},
    {.part = {PDOWN(Q), PUP(Q)}, .config = "{\"r\":4,\"lora_alpha\":4}", .field = Q ".lora_A.weight", .says = "rank 2 where"},
    {.part = {PDOWN(Q), PUP(Q)}, .metadata = "{\"unet.r\":4,\"unet.lora_alpha\":4}", .field = Q ".lora_A.weight", .says = "rank 2 where"},
    {.part = {PDOWN(Q), PUP(Q)}, .config = "{\"r\":2}", .field = "lora_alpha", .says = "missing"},
    {.part = {PDOWN(Q), PUP(Q)}, .config = "{\"lora_alpha\":2}", .field = "r", .says = "missing"},
    {.part = {PDOWN(Q), PUP(Q)}, .metadata = "{\"unet.r\":2}", .field = "unet.lora_alpha", .says = "missing"},
    {.part = {PDOWN(Q), PUP(Q)}, .config = "{\"r\":2,\"lora_alpha\":-4}", .field = "lora_alpha", .says = "from"},
    {.part = {PDOWN(Q), PUP(Q)}, .config = CONFIG(",\"alpha_pattern\":{\"(to_q)\":1}"), .field = "alpha_pattern", .says = "not read"},
    {.part = {PDOWN(Q), PUP(Q)}, .config = CONFIG(",\"alpha_pattern\":{\"to_q\":0}"), .field = "alpha_pattern", .says = "positive"},
    {.part = {PDOWN(Q), PUP(Q)}, .config = CONFIG(",\"rank_pattern\":[2]"), .field = "rank_pattern", .says = "object"},
    {.part = {PDOWN(Q), PUP(Q)}, .config = "{\"peft_type\":\"IA3\",\"r\":2,\"lora_alpha\":4}", .field = "peft_type", .says = "LORA"},
    {.part = {PDOWN(Q), PUP(Q)}, .config = "{\"bias\":\"all\",\"r\":2,\"lora_alpha\":4}", .field = "bias", .says = "none"},
    {.part = {PDOWN(Q), PUP(Q)}, .config = CONFIG(",\"init_lora_weights\":\"pissa\""), .field = "init_lora_weights", .says = "pissa"},
    {.part = {PDOWN(Q), PUP(Q)}, .config = CONFIG(",\"fan_in_fan_out\":true"), .field = "fan_in_fan_out", .says = "not known"},
    {.part = {PDOWN(Q), PUP(Q)}, .config = "[]", .field = "adapter_config.json", .says = "JSON object"},
    {.part = {PDOWN(Q), PUP(Q)}, .config = "{\"r\":2,\"r\":2}", .field = "adapter_config.json", .says = "uplicate"},
    {.part = {PDOWN(Q), PUP(Q)}, .metadata = "{", .field = "lora_adapter_metadata", .says = "line"},
    {.part = {PDOWN(Q), PUP(Q)}, .metadata = "{\"transformer.r\":2}", .field = "transformer.r", .says = "not known"},
};

static void test_refusals(void **state)
{
  size_t i;
  int bad = 0;

  (void)state;
  for (i = 0; i < sizeof refusals / sizeof *refusals; i++) {
    const struct refusal *r = &refusals[i];
    struct adapter *a = (struct adapter *)1;
    int code;

    bounds.max_rank = r->max_rank ? r->max_rank : 1024;
    code = open_parts(&a, r->part, r->metadata, r->config);
    if (code != E_FILE || a || strcmp(e.field, r->field) || !strstr(e.msg, r->says)) {
      print_error("refusal %zu wants \"%s\" at %s: code %d, \"%s\" at %s\n", i, r->says, r->field, code, e.msg, e.field);
      bad++;
      if (!code)
        adapter_close(a);
    }
  }
  bounds.max_rank = 1024;
  assert_int_equal(bad, 0);
}

/* Every prefix of a good file, and a byte too many. */
static void test_truncated(void **state)
{
  static const struct part part[] = {DOWN(KQ), UP(KQ), {KQ ".alpha", "I64", "[]", 1, 2}, END};
  static struct image f;
  struct adapter *a;
  size_t n;

  (void)state;
  make(&f, part, NULL);
  assert_int_equal(adapter_open_memory(&a, "whole", f.p, f.n, NULL, names, &bounds, &e), 0);
  assert_true(a->delta[0].scale == 1 && a->delta[0].rule == SCALE_ALPHA);
  adapter_close(a);
  for (n = 0; n <= f.n + 1; n++) {
    struct err one = {0};

    if (n == f.n)
      continue;
    assert_int_equal(adapter_open_memory(&a, "cut", f.p, n, NULL, names, &bounds, &one), E_FILE);
    assert_null(a);
    assert_true(one.msg[0] && one.field[0]);
  }
}

/* ---- what it adds ---- */

static void test_apply(void **state)
{
  float down[] = {1, 2, 3, 4, 5, 6}, up[] = {1, 0.5f, -1, 2}, bias[] = {10, 20}, w0[] = {1, 1, 1, 2, 2, 2}, w[6], b[2];
  float dense[] = {0, 1, 2, 3, 4, 5}, rows[] = {2, 4}, columns[] = {1, 2, 3};
  const float product[] = {3, 4.5f, 6, 7, 8, 9}; /* up (2, 2) down (2, 3) */
  const struct site s = {.name = (char *)"s", .kind = WEIGHT_LINEAR, .out = 2, .in = 3, .has_bias = 1};
  struct delta d = {.kind = DELTA_LOWRANK, .rank = 2, .down = down, .up = up, .bias = bias, .scale = 2};
  double norm = 0;
  int i;

  (void)state;
  memcpy(w, w0, sizeof w);
  b[0] = b[1] = 1;
  delta_apply(&d, &s, NULL, NULL, -0.5f, w, b);
  for (i = 0; i < 6; i++) {
    assert_true(w[i] == w0[i] - product[i]); /* -0.5 times 2 */
    norm += 4 * (double)product[i] * product[i];
  }
  assert_true(b[0] == -4 && b[1] == -9); /* the bias has no scale of its own */
  assert_true(fabs(delta_norm(&d, &s, NULL) - sqrt(norm)) <= 1e-12 * sqrt(norm));

  d = (struct delta){.kind = DELTA_DENSE, .dense = dense, .scale = 3};
  memcpy(w, w0, sizeof w);
  delta_apply(&d, &s, NULL, NULL, 0.5f, w, NULL);
  for (i = 0; i < 6; i++)
    assert_true(w[i] == w0[i] + 1.5f * dense[i]);
  assert_true(fabs(delta_norm(&d, &s, NULL) - 3 * sqrt(55)) <= 1e-12);

  d = (struct delta){.kind = DELTA_REPLACE, .dense = dense, .bias = bias, .scale = 1};
  memcpy(w, w0, sizeof w);
  b[0] = b[1] = 1;
  delta_apply(&d, &s, w0, b, 1, w, b);
  assert_memory_equal(w, dense, sizeof w);
  assert_true(b[0] == 10 && b[1] == 20);
  assert_true(fabs(delta_norm(&d, &s, w0) - sqrt(1 + 0 + 1 + 1 + 4 + 9)) <= 1e-12);

  /* W0 + 0 * dW has rows of length sqrt(3) and 2 sqrt(3), columns of sqrt(5) */
  memset(up, 0, sizeof up);
  d = (struct delta){.kind = DELTA_DORA, .rank = 2, .down = down, .up = up, .magnitude = rows, .magnitude_per_row = 1, .scale = 1};
  memcpy(w, w0, sizeof w);
  delta_apply(&d, &s, w0, NULL, 1, w, NULL);
  for (i = 0; i < 6; i++)
    assert_true(fabs(w[i] - rows[i / 3] / sqrt(3)) <= 1e-6);
  d.magnitude = columns;
  d.magnitude_per_row = 0;
  memcpy(w, w0, sizeof w);
  delta_apply(&d, &s, w0, NULL, 1, w, NULL);
  for (i = 0; i < 6; i++)
    assert_true(fabs(w[i] - w0[i] * columns[i % 3] / sqrt(5)) <= 1e-6);
  memset(w, 0, sizeof w); /* a direction of no length: no NaN */
  delta_apply(&d, &s, w, NULL, 1, w, NULL);
  for (i = 0; i < 6; i++)
    assert_true(w[i] == 0);
}

/* ---- files and folders ---- */

static const char *at(const char *name)
{
  static char path[128];

  snprintf(path, sizeof path, "%s/%s", folder, name);
  return path;
}

static void write_file(const char *name, const void *p, size_t n)
{
  FILE *f = fopen(at(name), "wb");

  assert_non_null(f);
  assert_int_equal(fwrite(p, 1, n, f), n);
  assert_int_equal(fclose(f), 0);
}

static void expect_path(const char *path, const char *says)
{
  struct adapter *a = (struct adapter *)1;

  e = (struct err){0};
  assert_int_equal(adapter_open(&a, path, names, &bounds, &e), E_FILE);
  assert_null(a);
  assert_true(e.field[0]);
  if (!strstr(e.msg, says))
    fail_msg("\"%s\" does not say \"%s\"", e.msg, says);
}

static void test_files(void **state)
{
  static const struct part part[] = {PDOWN("base_model.model." D0 ".attn1.to_q"), PUP("base_model.model." D0 ".attn1.to_q"), END},
                           plain[] = {PDOWN(Q), PUP(Q), END};
  static struct image f;
  char plain_digest[65];
  struct adapter *a;

  (void)state;
  make(&f, plain, NULL);
  write_file("style.safetensors", f.p, f.n);
  assert_int_equal(adapter_open(&a, at("style.safetensors"), names, &bounds, &e), 0);
  assert_string_equal(a->name, "style");
  assert_string_equal(a->format, "diffusers");
  assert_int_equal(a->targets_text, 0);
  assert_int_equal(strlen(a->digest), 64);
  snprintf(plain_digest, sizeof plain_digest, "%s", a->digest);
  adapter_close(a);
  f.p[f.n - 1] ^= 1; /* every byte counts */
  write_file("other.safetensors", f.p, f.n);
  assert_int_equal(adapter_open(&a, at("other.safetensors"), names, &bounds, &e), 0);
  assert_string_not_equal(a->digest, plain_digest);
  adapter_close(a);

  bounds.max_bytes = f.n - 1;
  expect_path(at("style.safetensors"), "at most");
  adapter_bounds_default(&bounds);
  expect_path(at("absent"), "No such file");
  expect_path("/dev/zero", "no regular file");
  expect_path("/proc/self/status", "changed while it was read"); /* says it is empty, and is not */
  assert_int_equal(mkfifo(at("fifo"), 0600), 0);
  expect_path(at("fifo"), "no regular file");
  write_file("empty", "", 0);
  expect_path(at("empty"), "too few");
  expect_path(folder, "holds neither");

  write_file("pytorch_lora_weights.safetensors", f.p, f.n);
  assert_int_equal(adapter_open(&a, folder, names, &bounds, &e), 0);
  assert_true(a->delta[0].scale == 1);
  adapter_close(a);
  make(&f, part, NULL);
  write_file("adapter_model.safetensors", f.p, f.n);
  expect_path(folder, "holds both");
  assert_int_equal(unlink(at("pytorch_lora_weights.safetensors")), 0);
  expect_path(folder, "adapter_config.json");
  write_file("adapter_config.json", "{\"r\":2,\"lora_alpha\":8}\0x", 24);
  expect_path(folder, "zero byte");
  write_file("adapter_config.json", "{\"r\":2,\"lora_alpha\":8}", 22);
  assert_int_equal(adapter_open(&a, folder, names, &bounds, &e), 0);
  assert_true(a->delta[0].scale == 4 && a->delta[0].rule == SCALE_CONFIG);
  assert_string_equal(a->format, "peft");
  snprintf(plain_digest, sizeof plain_digest, "%s", a->digest);
  adapter_close(a);
  write_file("adapter_config.json", "{\"r\":2,\"lora_alpha\":7}", 22); /* and so does every byte of the configuration */
  assert_int_equal(adapter_open(&a, folder, names, &bounds, &e), 0);
  assert_string_not_equal(a->digest, plain_digest);
  adapter_close(a);
  expect_path(at("adapter_model.safetensors"), "name the folder");
}

/* BLAKE2b-256 as everybody computes it (hashlib.blake2b(digest_size=32)). */
static void test_digest(void **state)
{
  char digest[65];

  (void)state;
  assert_int_equal(adapter_digest(digest, "abc", 3, NULL, &e), 0);
  assert_string_equal(digest, "bddd813c634239723171ef3fee98579b94964e3bb1cb3e427262c8c068d52319");
  assert_int_equal(adapter_digest(digest, "a", 1, "bc", &e), 0);
  assert_string_equal(digest, "bddd813c634239723171ef3fee98579b94964e3bb1cb3e427262c8c068d52319");
}

/* ---- inspect ---- */

static char *inspect(const char *path, int as_json, int want)
{
  char *text = NULL;
  size_t n;
  FILE *out = open_memstream(&text, &n);

  e = (struct err){0};
  assert_non_null(out);
  assert_int_equal(adapter_inspect(path, names, NULL, as_json, out, &e), want);
  assert_int_equal(fclose(out), 0);
  return text;
}

static void expect_says(const char *text, const char *const *says)
{
  for (; *says; says++)
    if (!strstr(text, *says))
      fail_msg("\"%s\" is not in:\n%s", *says, text);
}

static void test_inspect(void **state)
{
  static const struct part good[] = {DOWN(KQ), UP(KQ), {KQ ".alpha", "F32", "[]", 1, 1}, {"lora_unet_conv_in.diff", "F32", "[4,4,3,3]", 144, 0.1f},
                                     END},
                           bad[] = {DOWN(KQ), UP(KQ), DOWN(KQ "q"), UP("lora_unet_conv_inn"), END};
  static struct image f;
  json_t *report;
  char *text;

  (void)state;
  make(&f, good, NULL);
  write_file("good.safetensors", f.p, f.n);
  text = inspect(at("good.safetensors"), 0, 0);
  expect_says(text, (const char *[]){"kohya mixed, 2 layers, 164 numbers", "1 low-rank, rank 2 to 2", "1 dense", "from alpha: 1", "from none: 1",
                                     "attn1 1/2", "conv 1/6", "text_encoder 0/2", "norm      |dW|", NULL});
  free(text);
  text = inspect(at("good.safetensors"), 1, 0);
  report = json_loads(text, 0, NULL);
  assert_non_null(report);
  assert_true(json_is_true(json_object_get(report, "accepted")));
  assert_int_equal(json_integer_value(json_object_get(json_object_get(json_object_get(report, "coverage"), "attn1"), "touched")), 1);
  json_decref(report);
  free(text);

  make(&f, bad, NULL);
  write_file("bad.safetensors", f.p, f.n);
  text = inspect(at("bad.safetensors"), 0, E_FILE);
  expect_says(text, (const char *[]){"REFUSED", "2 of 4 tensors name no layer", KQ "q.lora_down.weight", "nearest: " KQ, "lora_unet_conv_inn.lora_up.weight",
                                     "nearest: lora_unet_conv_in\n", NULL});
  free(text);
  text = inspect(at("bad.safetensors"), 1, E_FILE);
  report = json_loads(text, 0, NULL);
  assert_true(json_is_false(json_object_get(report, "accepted")));
  assert_int_equal(json_array_size(json_object_get(report, "unknown_keys")), 2);
  json_decref(report);
  free(text);
  text = inspect(at("absent"), 1, E_FILE);
  assert_true(!text || !*text);
  free(text);
}

/* ---- */

static int setup(void **state)
{
  (void)state;
  snprintf(folder, sizeof folder, "%s/safelight-adapter-XXXXXX", P_tmpdir);
  adapter_bounds_default(&bounds);
  return !mkdtemp(folder) || adapter_names_new(&names, &base, 2, &e);
}

static int cleanup(void **state)
{
  static const char *const files[] = {"style.safetensors", "other.safetensors", "fifo", "empty", "adapter_model.safetensors", "adapter_config.json",
                                      "good.safetensors", "bad.safetensors", "pytorch_lora_weights.safetensors"};
  size_t i;

  (void)state;
  for (i = 0; i < sizeof files / sizeof *files; i++)
    unlink(at(files[i]));
  adapter_names_free(names);
  return rmdir(folder);
}

int main(void)
{
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_names),    cmocka_unit_test(test_names_plain), cmocka_unit_test(test_scale), cmocka_unit_test(test_patterns),
      cmocka_unit_test(test_refusals), cmocka_unit_test(test_truncated),   cmocka_unit_test(test_apply), cmocka_unit_test(test_files),
      cmocka_unit_test(test_digest),   cmocka_unit_test(test_inspect)};

  return cmocka_run_group_tests(tests, setup, cleanup);
}
