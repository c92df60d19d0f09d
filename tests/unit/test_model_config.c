/*
 * test_model_config.c - models/config.c: the published configurations are read as they mean, everything else is refused with its name.
 *
 * Run from the root of the repository: the tiny checkpoints' config files have the keys of the published ones.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "models/arch.h"

#define CKPT "tests/golden/ckpt/"

static struct err e;

static void ok(int code)
{
  if (code)
    fail_msg("%s", e.msg);
}

/* ---- what is read ---- */

static void test_unet_sd15(void **state)
{
  struct unet_config c;
  int i;

  (void)state;
  ok(unet_config_load(&c, CKPT "sd15/unet/config.json", &e));
  assert_int_equal(c.levels, 4);
  assert_int_equal(c.context_dim, 64);
  assert_int_equal(c.add_time_dim, 0);
  assert_int_equal(c.sample_size, 16);
  assert_true(c.has_mid && c.flip_sin_to_cos && c.norm_eps == 1e-5 && c.groups == 32);
  for (i = 0; i < 4; i++) {
    assert_int_equal(c.down_attn[i], i < 3);
    assert_int_equal(c.up_attn[i], i > 0);
    assert_int_equal(c.heads[i], 8);
    assert_int_equal(c.depth[i], 1);
    assert_int_equal(c.layers[i], 2);
  }
}

static void test_unet_sdxl(void **state)
{
  static const int heads[] = {2, 4, 8}, depth[] = {1, 2, 3}, attn[] = {0, 1, 1};
  struct unet_config c;
  int i;

  (void)state;
  ok(unet_config_load(&c, CKPT "sdxl/unet/config.json", &e));
  assert_int_equal(c.levels, 3);
  assert_int_equal(c.add_time_dim, 32);
  assert_int_equal(c.add_in_dim, 256);
  for (i = 0; i < 3; i++) {
    assert_int_equal(c.heads[i], heads[i]);
    assert_int_equal(c.depth[i], depth[i]);
    assert_int_equal(c.down_attn[i], attn[i]);
    assert_int_equal(c.up_attn[i], attn[2 - i]);
  }
  ok(unet_config_load(&c, CKPT "sdxl_refiner/unet/config.json", &e));
  assert_int_equal(c.down_attn[3], 0);
  assert_int_equal(c.depth[3], 2); /* the middle block's */
}

static void test_vae(void **state)
{
  struct vae_config c;

  (void)state;
  ok(vae_config_load(&c, CKPT "sd15/vae/config.json", &e));
  assert_true(c.scaling_factor == 0.18215); /* the default: the published file does not say */
  assert_true(c.use_quant_conv && c.use_post_quant_conv && c.mid_attn);
  assert_int_equal(c.factor, 8);
  ok(vae_config_load(&c, CKPT "sdxl/vae/config.json", &e));
  assert_true(c.scaling_factor == 0.13025);
  ok(vae_config_load(&c, CKPT "odd/vae/config.json", &e));
  assert_int_equal(c.factor, 4);
  assert_int_equal(c.layers, 1);
}

static void test_clip(void **state)
{
  struct clip_config c;

  (void)state;
  ok(clip_config_load(&c, CKPT "sd15/text_encoder/config.json", &e));
  assert_int_equal(c.act, ACT_QUICK_GELU);
  assert_int_equal(c.eos, 2);
  assert_int_equal(c.layers, 3);
  assert_int_equal(c.vocab, 49408);
  ok(clip_config_load(&c, CKPT "sd21/text_encoder/config.json", &e));
  assert_int_equal(c.act, ACT_GELU);
  assert_int_equal(c.heads, 2);
}

static void test_schedule(void **state)
{
  struct schedule_config c;

  (void)state;
  ok(schedule_config_load(&c, CKPT "sd15/scheduler/scheduler_config.json", &e));
  assert_true(c.beta_start == 0.00085 && c.beta_end == 0.012 && c.is_scaled_linear && !c.is_v_prediction);
  assert_int_equal(c.spacing, SPACING_DEFAULT);
  assert_int_equal(c.set_alpha_to_one, 0);
  ok(schedule_config_load(&c, CKPT "sd21/scheduler/scheduler_config.json", &e));
  assert_true(c.is_v_prediction);
  ok(schedule_config_load(&c, CKPT "sdxl/scheduler/scheduler_config.json", &e));
  assert_int_equal(c.spacing, SPACING_LEADING);
}

static void test_index(void **state)
{
  struct index_config c;

  (void)state;
  ok(index_config_load(&c, CKPT "sd15/model_index.json", &e));
  assert_true(c.kind == PIPELINE_SD && c.has_text_encoder && !c.has_text_encoder_2);
  ok(index_config_load(&c, "weights/emoji/model_index.json", &e));
  assert_true(c.has_text_encoder);
}

/* `bench --arch emoji` measures the model that ships. */
static void test_arch_is_bundled(void **state)
{
  struct arch a;
  struct unet_config u;
  struct vae_config v;
  struct clip_config t;
  struct schedule_config s;

  (void)state;
  ok(arch_find(&a, "emoji", &e));
  ok(unet_config_load(&u, "weights/emoji/unet/config.json", &e));
  ok(vae_config_load(&v, "weights/emoji/vae/config.json", &e));
  ok(clip_config_load(&t, "weights/emoji/text_encoder/config.json", &e));
  ok(schedule_config_load(&s, "weights/emoji/scheduler/scheduler_config.json", &e));
  assert_memory_equal(&a.unet, &u, sizeof u);
  assert_true(a.vae.scaling_factor > 0); /* measured in training, not part of the architecture */
  a.vae.scaling_factor = v.scaling_factor;
  assert_memory_equal(&a.vae, &v, sizeof v);
  assert_memory_equal(&a.clip, &t, sizeof t);
  assert_memory_equal(&a.schedule, &s, sizeof s);
  assert_int_equal(a.default_size, u.sample_size * v.factor);
  assert_int_equal(arch_find(&a, "sd3", &e), E_ARG);
}

static void test_list_or_number(void **state)
{
  static const char text[] = "{\"block_out_channels\": [32, 64], \"down_block_types\": [\"CrossAttnDownBlock2D\", \"DownBlock2D\"],"
                             "\"up_block_types\": [\"UpBlock2D\", \"CrossAttnUpBlock2D\"], \"layers_per_block\": [1, 3],"
                             "\"transformer_layers_per_block\": [2, 4], \"cross_attention_dim\": [24, 24], \"sample_size\": [8, 9],"
                             "\"num_attention_heads\": [4, 2], \"mid_block_type\": null, \"freq_shift\": 1,"
                             "\"_whatever\": {\"a\": 1}, \"unheard_of\": null, \"nor_this\": false}";
  struct unet_config c;

  (void)state;
  ok(unet_config_parse(&c, text, strlen(text), "x", &e));
  assert_true(c.layers[0] == 1 && c.layers[1] == 3 && c.depth[1] == 4 && c.heads[0] == 4 && c.heads[1] == 2);
  assert_true(c.context_dim == 24 && c.sample_size == 9 && !c.has_mid && c.freq_shift == 1);
}

/* ---- what is refused ---- */

enum kind { UNET, VAE, CLIP, SCHEDULE, INDEX };

static int parse(enum kind kind, const char *text, size_t n)
{
  union {
    struct unet_config unet;
    struct vae_config vae;
    struct clip_config clip;
    struct schedule_config schedule;
    struct index_config index;
  } c;

  e = (struct err){0};
  return kind == UNET       ? unet_config_parse(&c.unet, text, n, "dir/config.json", &e)
         : kind == VAE      ? vae_config_parse(&c.vae, text, n, "dir/config.json", &e)
         : kind == CLIP     ? clip_config_parse(&c.clip, text, n, "dir/config.json", &e)
         : kind == SCHEDULE ? schedule_config_parse(&c.schedule, text, n, "dir/config.json", &e)
                            : index_config_parse(&c.index, text, n, "dir/config.json", &e);
}

static const struct {
  enum kind kind;
  const char *text; /* of the object, without braces */
  const char *key;  /* that the error must name */
} refused[] = {
  {UNET, "\"act_fn\": \"gelu\"", "act_fn"},
  {UNET, "\"addition_embed_type\": \"text\"", "addition_embed_type"},
  {UNET, "\"addition_embed_type\": \"text_time\"", "addition_embed_type"},
  {UNET, "\"attention_head_dim\": 7", "attention_head_dim"},
  {UNET, "\"attention_head_dim\": [8, 8, 8]", "attention_head_dim"},
  {UNET, "\"attention_head_dim\": 0", "attention_head_dim"},
  {UNET, "\"attention_head_dim\": [8, 8, 8, null]", "attention_head_dim"},
  {UNET, "\"block_out_channels\": []", "block_out_channels"},
  {UNET, "\"block_out_channels\": [320, 640, 1280, 1281]", "block_out_channels"},
  {UNET, "\"block_out_channels\": [320, 640, 1280, 32768]", "block_out_channels"},
  {UNET, "\"block_out_channels\": [32, 32, 32, 32, 32, 32, 32, 32, 32]", "block_out_channels"},
  {UNET, "\"block_out_channels\": 320", "block_out_channels"},
  {UNET, "\"center_input_sample\": true", "center_input_sample"},
  {UNET, "\"class_embed_type\": \"timestep\"", "class_embed_type"},
  {UNET, "\"conv_in_kernel\": 1", "conv_in_kernel"},
  {UNET, "\"cross_attention_dim\": [768, 768, 768, 1024]", "cross_attention_dim"},
  {UNET, "\"cross_attention_dim\": null", "cross_attention_dim"},
  {UNET, "\"down_block_types\": [\"DownBlock2D\"]", "down_block_types"},
  {UNET, "\"down_block_types\": [\"DownBlock2D\", \"DownBlock2D\", \"AttnDownBlock2D\", \"DownBlock2D\"]", "down_block_types"},
  {UNET, "\"down_block_types\": \"DownBlock2D\"", "down_block_types"},
  {UNET, "\"dual_cross_attention\": true", "dual_cross_attention"},
  {UNET, "\"encoder_hid_dim_type\": \"text_proj\"", "encoder_hid_dim_type"},
  {UNET, "\"flip_sin_to_cos\": 1", "flip_sin_to_cos"},
  {UNET, "\"freq_shift\": 2", "freq_shift"},
  {UNET, "\"in_channels\": 1e99", "in_channels"},
  {UNET, "\"in_channels\": 4.5", "in_channels"},
  {UNET, "\"in_channels\": \"4\"", "in_channels"},
  {UNET, "\"layers_per_block\": -1", "layers_per_block"},
  {UNET, "\"mid_block_scale_factor\": 1.5", "mid_block_scale_factor"},
  {UNET, "\"mid_block_type\": \"UNetMidBlock2DSimpleCrossAttn\"", "mid_block_type"},
  {UNET, "\"norm_eps\": 0", "norm_eps"},
  {UNET, "\"norm_num_groups\": null", "norm_num_groups"},
  {UNET, "\"num_class_embeds\": 10", "num_class_embeds"},
  {UNET, "\"only_cross_attention\": true", "only_cross_attention"},
  {UNET, "\"resnet_time_scale_shift\": \"scale_shift\"", "resnet_time_scale_shift"},
  {UNET, "\"time_cond_proj_dim\": 256", "time_cond_proj_dim"},
  {UNET, "\"time_embedding_type\": \"fourier\"", "time_embedding_type"},
  {UNET, "\"transformer_layers_per_block\": [1, 2, [3], 4]", "transformer_layers_per_block"},
  {UNET, "\"transformer_layers_per_block\": 1000", "transformer_layers_per_block"},
  {UNET, "\"a_new_option\": 1", "a_new_option"},
  {VAE, "\"act_fn\": \"relu\"", "act_fn"},
  {VAE, "\"block_out_channels\": [64, 65]", "block_out_channels"},
  {VAE, "\"down_block_types\": [\"AttnDownEncoderBlock2D\"]", "down_block_types"},
  {VAE, "\"latents_mean\": [0, 0, 0, 0]", "latents_mean"},
  {VAE, "\"latent_channels\": 0", "latent_channels"},
  {VAE, "\"scaling_factor\": 0", "scaling_factor"},
  {VAE, "\"scaling_factor\": \"big\"", "scaling_factor"},
  {VAE, "\"use_tanh\": true", "use_tanh"},
  {CLIP, "\"hidden_act\": \"gelu_new\"", "hidden_act"},
  {CLIP, "\"num_attention_heads\": 7", "num_attention_heads"},
  {CLIP, "\"eos_token_id\": 50000", "eos_token_id"},
  {CLIP, "\"vocab_size\": 1e9", "vocab_size"},
  {CLIP, "\"model_type\": \"clip\"", "model_type"},
  {CLIP, "\"quantization_config\": {}", "quantization_config"},
  {SCHEDULE, "\"_class_name\": \"FlowMatchEulerDiscreteScheduler\"", "_class_name"},
  {SCHEDULE, "\"beta_schedule\": \"squaredcos_cap_v2\"", "beta_schedule"},
  {SCHEDULE, "\"beta_start\": 0.1, \"beta_end\": 0.01", "beta_end"},
  {SCHEDULE, "\"beta_end\": 1", "beta_end"},
  {SCHEDULE, "\"num_train_timesteps\": 0", "num_train_timesteps"},
  {SCHEDULE, "\"prediction_type\": \"sample\"", "prediction_type"},
  {SCHEDULE, "\"rescale_betas_zero_snr\": true", "rescale_betas_zero_snr"},
  {SCHEDULE, "\"trained_betas\": [0.1]", "trained_betas"},
  {SCHEDULE, "\"thresholding\": true", "thresholding"},
  {INDEX, "\"_class_name\": \"StableDiffusion3Pipeline\"", "_class_name"},
  {INDEX, "\"_class_name\": \"StableDiffusionPipeline\"", "unet"},
  {INDEX, "\"unet\": [\"diffusers\", \"UNet2D\"]", "unet"},
  {INDEX, "\"unet\": [\"diffusers\", \"UNet2DConditionModel\"], \"vae\": [\"diffusers\", \"\"]", "vae"},
  {INDEX, "\"unet\": [\"diffusers\", \"UNet2DConditionModel\"], \"text_encoder\": [\"x\", 5]", "text_encoder"},
};

static void test_refused(void **state)
{
  char text[512];
  size_t i;

  (void)state;
  for (i = 0; i < sizeof refused / sizeof *refused; i++) {
    snprintf(text, sizeof text, "{%s}", refused[i].text);
    if (parse(refused[i].kind, text, strlen(text)) != E_FILE)
      fail_msg("accepted: %s", text);
    if (strcmp(e.field, refused[i].key) || !strstr(e.msg, "dir/config.json") || !strstr(e.msg, refused[i].key))
      fail_msg("%s: names %s: %s", text, e.field, e.msg);
  }
}

static void test_not_json(void **state)
{
  static const char *const texts[] = {"", "[]", "1", "{", "{\"a\": 1, \"a\": 2}", "{\"a\": \"\xff\"}", "{} x"};
  size_t i, kind;

  (void)state;
  for (kind = UNET; kind <= INDEX; kind++)
    for (i = 0; i < sizeof texts / sizeof *texts; i++) {
      assert_int_equal(parse((enum kind)kind, texts[i], strlen(texts[i])), E_FILE);
      assert_string_equal(e.field, "dir/config.json");
    }
}

static void test_files(void **state)
{
  struct vae_config c;
  char path[] = "test_model_config.XXXXXX";
  int fd, i;

  (void)state;
  e = (struct err){0};
  assert_int_equal(vae_config_load(&c, "does/not/exist.json", &e), E_FILE);
  assert_string_equal(e.field, "does/not/exist.json");
  e = (struct err){0};
  assert_int_equal(vae_config_load(&c, "tests", &e), E_FILE); /* a folder */
  fd = mkstemp(path);
  assert_true(fd >= 0);
  for (i = 0; i <= CONFIG_MAX_BYTES / 1024; i++)
    assert_int_equal(dprintf(fd, "%1024s", " "), 1024);
  close(fd);
  e = (struct err){0};
  assert_int_equal(vae_config_load(&c, path, &e), E_FILE);
  assert_non_null(strstr(e.msg, "larger than"));
  unlink(path);
}

/* Every prefix, and every byte changed, of a real file: accepted or refused, never worse (with a sanitizer build). Returns how many
 * were accepted. */
static int mangle(enum kind kind, const char *path)
{
  static const unsigned char bytes[] = {0, '"', '{', '9', 0x80, '-'};
  char text[4096];
  FILE *f = fopen(path, "rb");
  size_t i, j, n;
  int accepted = 0;

  assert_non_null(f);
  n = fread(text, 1, sizeof text, f);
  fclose(f);
  assert_int_equal(parse(kind, text, n), 0);
  for (i = 0; i < n - 1; i++)
    accepted += !parse(kind, text, i);
  for (i = 0; i < n; i++)
    for (j = 0; j < sizeof bytes; j++) {
      char was = text[i];

      text[i] = (char)bytes[j];
      accepted += !parse(kind, text, n);
      text[i] = was;
    }
  return accepted;
}

static void test_mangled(void **state)
{
  (void)state;
  mangle(UNET, CKPT "sdxl/unet/config.json");
  mangle(VAE, CKPT "sdxl/vae/config.json");
  mangle(CLIP, CKPT "sd15/text_encoder/config.json");
  mangle(SCHEDULE, CKPT "sdxl/scheduler/scheduler_config.json");
  mangle(INDEX, CKPT "sd15/model_index.json");
}

int main(void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test(test_unet_sd15),       cmocka_unit_test(test_unet_sdxl),       cmocka_unit_test(test_vae),
    cmocka_unit_test(test_clip),            cmocka_unit_test(test_schedule),        cmocka_unit_test(test_index),
    cmocka_unit_test(test_arch_is_bundled), cmocka_unit_test(test_list_or_number),  cmocka_unit_test(test_refused),
    cmocka_unit_test(test_not_json),        cmocka_unit_test(test_files),           cmocka_unit_test(test_mangled),
  };

  return cmocka_run_group_tests(tests, NULL, NULL);
}
