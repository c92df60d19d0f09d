/*
 * test_sdapi.c - A1111's wire format: the fields with an effect, those that must not have one, tags, answers, lists, and png-info. Threads: none.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>
#include <jansson.h>

#include "proto/image.h"
#include "proto/sdapi.h"

static struct request_limits lim = {.default_size = 128, .size_multiple = 8, .max_size = 512, .default_steps = 20, .max_steps = 50, .default_guidance = 3,
                                    .max_guidance = 30, .max_n = 4, .default_sampler = "dpmpp_2m", .model = "emoji", .offers = REQUEST_OFFERS_FORMATS};
static struct request r;
static struct sdapi_extra x;
static struct first first;

static int decode(int is_img2img, const char *body, struct err *e)
{
  *e = (struct err){0};
  memset(&r, 0x55, sizeof r);
  memset(&x, 0x55, sizeof x);
  return sdapi_decode(&r, &x, &first, is_img2img, body, strlen(body), &lim, e);
}

static void good_as(int is_img2img, const char *body)
{
  struct err e;

  if (decode(is_img2img, body, &e))
    fail_msg("%s\n  was refused: %s", body, e.msg);
}

static void good(const char *body)
{
  good_as(0, body);
}

static void bad_as(int is_img2img, const char *body, const char *field, const char *text)
{
  struct err e;

  if (!decode(is_img2img, body, &e))
    fail_msg("%s\n  was accepted", body);
  if (e.code != E_ARG || strcmp(e.field, field) || !strstr(e.msg, text))
    fail_msg("%s\n  gave code %d, field \"%s\", \"%s\"", body, e.code, e.field, e.msg);
  assert_null(first.file[FIRST_INIT].p);
}

static void bad(const char *body, const char *field, const char *text)
{
  bad_as(0, body, field, text);
}

static void test_defaults(void **state)
{
  (void)state;
  good("{}");
  assert_string_equal(r.prompt, "");
  assert_true(r.width == 128 && r.height == 128 && r.steps == 20 && r.n == 1 && r.guidance == 3 && !r.has_seed && r.karras == -1);
  assert_string_equal(r.sampler, "dpmpp_2m");
  assert_true(x.batch_size == 1 && x.n_iter == 1 && x.sends_images && !x.is_img2img && r.strength == 1 && r.format == IMAGE_PNG);
}

/* As sdwebuiapi, Open WebUI and SillyTavern send it. */
static void test_clients(void **state)
{
  (void)state;
  good("{\"enable_hr\":false,\"hr_scale\":2,\"hr_upscaler\":\"Latent\",\"hr_second_pass_steps\":0,\"hr_resize_x\":0,\"hr_resize_y\":0,"
       "\"denoising_strength\":0.7,\"firstphase_width\":0,\"firstphase_height\":0,\"prompt\":\"a\",\"styles\":[],\"seed\":-1,\"subseed\":-1,"
       "\"subseed_strength\":0.0,\"seed_resize_from_h\":0,\"seed_resize_from_w\":0,\"batch_size\":1,\"n_iter\":1,\"steps\":20,\"cfg_scale\":7.0,"
       "\"width\":512,\"height\":512,\"restore_faces\":false,\"tiling\":false,\"do_not_save_samples\":false,\"do_not_save_grid\":false,"
       "\"negative_prompt\":\"\",\"eta\":1.0,\"s_churn\":0,\"s_tmax\":0,\"s_tmin\":0,\"s_noise\":1,\"override_settings\":{},"
       "\"override_settings_restore_afterwards\":true,\"script_args\":[],\"script_name\":null,\"send_images\":true,\"save_images\":false,"
       "\"alwayson_scripts\":{},\"sampler_name\":\"Euler a\",\"sampler_index\":\"Euler a\"}");
  assert_string_equal(r.sampler, "Euler a");
  good("{\"prompt\":\"a\",\"batch_size\":2,\"width\":512,\"height\":256,\"steps\":5,\"negative_prompt\":\"b\"}");
  assert_true(r.n == 2 && r.width == 512 && r.height == 256 && r.steps == 5);
  good("{\"prompt\":\"a\",\"sampler_name\":\"DPM++ 2M\",\"scheduler\":\"Karras\",\"steps\":9,\"cfg_scale\":7,\"width\":512,\"height\":512,"
       "\"restore_faces\":false,\"enable_hr\":false,\"hr_upscaler\":\"Latent\",\"hr_additional_modules\":[],\"clip_skip\":2,"
       "\"override_settings\":{\"CLIP_stop_at_last_layers\":2},\"override_settings_restore_afterwards\":true,\"save_images\":true,"
       "\"send_images\":true,\"do_not_save_grid\":false,\"do_not_save_samples\":false}");
  assert_true(r.karras == 1 && r.clip_skip == 2);
}

static void test_effects(void **state)
{
  (void)state;
  good("{\"prompt\":\"a\",\"seed\":7,\"batch_size\":2,\"n_iter\":2,\"sampler_index\":\"DDIM\",\"scheduler\":\"uniform\",\"send_images\":false}");
  assert_true(r.seed == 7 && r.has_seed && r.n == 4 && x.n_iter == 2 && !x.sends_images && r.karras == 0);
  assert_string_equal(r.sampler, "DDIM");
  good("{\"sampler_name\":\"Euler\",\"sampler_index\":\"DDIM\"}");
  assert_string_equal(r.sampler, "Euler");
  good("{\"override_settings\":{\"samples_format\":\"jpg\",\"jpeg_quality\":60,\"sd_model_checkpoint\":\"emoji.safetensors [abc]\",\"sd_vae\":\"Automatic\","
       "\"save_images_add_number\":true,\"grid_save\":false}}");
  assert_true(r.format == IMAGE_JPEG && r.quality == 60);
  good("{\"alwayson_scripts\":{\"ADetailer\":{\"args\":[false,{\"ad_model\":\"x\"}]},\"controlnet\":{\"args\":[{\"enabled\":false}]},\"y\":{\"args\":[]}}}");
  good("{\"prompt\":null,\"seed\":null,\"width\":null,\"enable_hr\":null,\"styles\":null,\"tiling\":null}");
  good("{\"eta\":0.5,\"sampler_name\":\"Euler\"}"); /* has no noise of its own */
  good("{\"eta\":0,\"sampler_name\":\"DDIM\"}");
}

static void test_refused(void **state)
{
  (void)state;
  bad("{\"steps\":0}", "steps", "between 1 and 50");
  bad("{\"cfg_scale\":31}", "cfg_scale", "between 0 and 30");
  bad("{\"width\":100}", "width", "multiple of 8");
  bad("{\"height\":1024}", "height", "between 1 and 512");
  bad("{\"batch_size\":3,\"n_iter\":2}", "batch_size", "at most 4");
  bad("{\"n_iter\":5}", "n_iter", "between 1 and 4");
  bad("{\"scheduler\":\"exponential\"}", "scheduler", "karras");
  bad("{\"enable_hr\":true}", "enable_hr", "not supported");
  bad("{\"restore_faces\":true}", "restore_faces", "not supported");
  bad("{\"tiling\":1}", "tiling", "not supported");
  bad("{\"subseed_strength\":0.1}", "subseed_strength", "send 0");
  bad("{\"seed_resize_from_w\":64}", "seed_resize_from_w", "send -1");
  bad("{\"s_noise\":1.1}", "s_noise", "send 1");
  bad("{\"s_churn\":\"0\"}", "s_churn", "send 0");
  bad("{\"refiner_checkpoint\":\"xl\"}", "refiner_checkpoint", "not supported");
  bad("{\"script_name\":\"x/y/z plot\"}", "script_name", "not supported");
  bad("{\"styles\":[\"anime\"]}", "styles", "not supported");
  bad("{\"alwayson_scripts\":{\"ADetailer\":{\"args\":[true,{}]}}}", "alwayson_scripts", "\"ADetailer\"");
  bad("{\"alwayson_scripts\":{\"controlnet\":{\"args\":[{\"enabled\":false},{\"image\":\"x\"}]}}}", "alwayson_scripts", "\"controlnet\"");
  bad("{\"infotext\":\"Steps: 3\"}", "infotext", "not supported");
  bad("{\"eta\":0,\"sampler_name\":\"Euler a\"}", "eta", "must be 1");
  bad("{\"eta\":1,\"sampler_name\":\"DDIM\"}", "eta", "must be 0");
  bad("{\"override_settings\":{\"sd_model_checkpoint\":\"emoji2\"}}", "override_settings.sd_model_checkpoint", "\"emoji\"");
  bad("{\"override_settings\":{\"CLIP_stop_at_last_layers\":13}}", "override_settings.CLIP_stop_at_last_layers", "between 1 and 12");
  bad("{\"override_settings\":{\"samples_format\":\"avif\"}}", "override_settings.samples_format", "webp");
  bad("{\"override_settings\":{\"sd_vae\":\"other.pt\"}}", "override_settings.sd_vae", "Automatic");
  bad("{\"override_settings\":{\"emphasis\":\"None\"}}", "emphasis", "override_settings: unknown");
  bad("{\"override_settings\":[]}", "override_settings", "an object");
  bad("{\"mask\":\"Zm9v\"}", "mask", "unknown field");
  bad("{\"banana\":1}", "banana", "unknown field");
  bad("{\"prompt\":\"\xff\"}", "prompt", "UTF-8");
  bad("[]", "", "object");
  bad("{\"seed\":99999999999999999999}", "seed", "between -1");
  bad("{\"subseed\":99999999999999999999}", "", "malformed JSON"); /* no bounds of its own */
  lim.offers = 0;
  bad("{\"override_settings\":{\"samples_format\":\"webp\"}}", "override_settings.samples_format", "png");
  lim.offers = REQUEST_OFFERS_FORMATS;
}

/* No field names, scales or switches off a safety adapter. */
static void test_safety(void **state)
{
  static const char *const names[] = {"safety", "safety_checker", "filter_nsfw", "lora", "loras", "adapters"};
  char body[200];

  (void)state;
  for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
    snprintf(body, sizeof body, "{\"%s\":false}", names[i]);
    bad(body, names[i], "policy");
    snprintf(body, sizeof body, "{\"%s\":null}", names[i]);
    bad(body, names[i], "policy");
    snprintf(body, sizeof body, "{\"override_settings\":{\"%s\":null}}", names[i]);
    bad(body, names[i], "policy");
  }
}

static void test_tags(void **state)
{
  (void)state;
  good("{\"prompt\":\"a <lora:ink:0.5> cat<lora:wash> <lyco:oil:-1:-1><lora:x y:te=2:unet=2>\",\"negative_prompt\":\"<lora:ink:1>\"}");
  assert_string_equal(r.prompt, "a  cat ");
  assert_int_equal(r.prompt_len, 7);
  assert_string_equal(r.negative, "<lora:ink:1>");
  assert_int_equal(r.n_loras, 4);
  assert_string_equal(r.lora[0].name, "ink");
  assert_string_equal(r.lora[3].name, "x y");
  assert_true(r.lora[0].scale == 0.5f && r.lora[1].scale == 1 && r.lora[2].scale == -1 && r.lora[3].scale == 2);
  good("{\"prompt\":\"a <b:c> < lora:x> <lora:> <lora:x (1 < 2)\"}"); /* none of them is a tag */
  assert_string_equal(r.prompt, "a <b:c> < lora:x> <lora:> <lora:x (1 < 2)");
  assert_int_equal(r.n_loras, 0);
  good("{\"prompt\":\"<lora:ink:2>a<hypernet:h:1>\",\"disable_extra_networks\":true}");
  assert_string_equal(r.prompt, "a");
  assert_int_equal(r.n_loras, 0);
  bad("{\"prompt\":\"<lora:ink:much>\"}", "prompt", "<lora:ink:much>");
  bad("{\"prompt\":\"<lora:ink:nan>\"}", "prompt", "WEIGHT");
  bad("{\"prompt\":\"<lora:ink:1e9>\"}", "prompt", "between -100 and 100");
  bad("{\"prompt\":\"<lora:ink:>\"}", "prompt", "WEIGHT");
  bad("{\"prompt\":\"<lora:ink:1:dyn=4>\"}", "prompt", "WEIGHT");
  bad("{\"prompt\":\"<lora:ink:1:0.5>\"}", "prompt", "two weights");
  bad("{\"prompt\":\"<lora::1>\"}", "prompt", "needs a name");
  bad("{\"prompt\":\"<hypernet:h:1>\"}", "prompt", "hypernetworks");
  bad("{\"prompt\":\"<lora:a><lora:a><lora:a><lora:a><lora:a><lora:a><lora:a><lora:a><lora:a>\"}", "prompt", "one too many");
}

static void test_img2img(void **state)
{
  (void)state;
  good_as(1, "{\"init_images\":[\"data:image/png;base64,Zm9v\"],\"denoising_strength\":0.4}");
  assert_true(r.width == 0 && r.height == 0 && r.strength == 0.4f && x.is_img2img);
  assert_memory_equal(first.file[FIRST_INIT].p, "foo", 3);
  assert_string_equal(first.file[FIRST_INIT].field, "init_images");
  assert_true(first.mask == FIRST_MASK_LIGHT && first.fit == FIRST_STRETCH && !first.is_filled);
  first_close(&first);
  good_as(1, "{\"init_images\":[\"Zm9v\"],\"mask\":\"YmFy\",\"mask_blur\":2,\"inpainting_mask_invert\":1,\"resize_mode\":1,\"width\":64,"
             "\"inpainting_fill\":1,\"inpaint_full_res\":false,\"inpaint_full_res_padding\":32,\"initial_noise_multiplier\":1,\"image_cfg_scale\":1.5,"
             "\"include_init_images\":false}");
  assert_true(first.blur_x == 2 && first.blur_y == 2 && first.is_inverted && first.fit == FIRST_CROP && !first.is_filled && !first.is_only_masked);
  assert_true(r.width == 64 && r.height == 128 && r.strength == 0.75f);
  first_close(&first);
  good_as(1, "{\"init_images\":[\"Zm9v\"],\"mask\":\"YmFy\"}");
  assert_true(first.blur_x == 4 && first.blur_y == 4 && first.is_filled && !first.is_inverted);
  assert_true(first.is_only_masked && first.padding == 0 && r.width == 128 && r.height == 128); /* A1111's default; the size is what the part is drawn at */
  first_close(&first);
  good_as(1, "{\"init_images\":[\"Zm9v\"],\"mask\":\"YmFy\",\"inpaint_full_res\":true,\"inpaint_full_res_padding\":32,\"mask_blur_x\":8,\"mask_blur_y\":0,"
             "\"resize_mode\":2}");
  assert_true(first.is_only_masked && first.padding == 32 && first.blur_x == 8 && first.blur_y == 0 && first.fit == FIRST_FILL);
  first_close(&first);
  good_as(1, "{\"init_images\":[\"Zm9v\"],\"mask\":\"YmFy\",\"mask_blur\":3,\"mask_blur_x\":8}"); /* who says it for both means both */
  assert_true(first.blur_x == 3 && first.blur_y == 3);
  first_close(&first);
  good_as(1, "{\"init_images\":[\"Zm9v\"],\"inpaint_full_res\":true,\"inpainting_fill\":2,\"mask\":null}"); /* without a mask: nothing */
  assert_true(!first.is_only_masked && r.width == 0);
  first_close(&first);
  bad_as(1, "{\"init_images\":[\"Zm9v\"],\"mask_blur_x\":65}", "mask_blur_x", "64");
  bad_as(1, "{\"init_images\":[\"Zm9v\"],\"inpaint_full_res_padding\":-1}", "inpaint_full_res_padding", "between 0");
  bad_as(1, "{\"init_images\":[\"Zm9v\"],\"inpaint_full_res\":\"yes\"}", "inpaint_full_res", "true or false");
  bad_as(1, "{\"init_images\":[\"Zm9v\"],\"mask_round\":false}", "mask_round", "send true");
  bad_as(1, "{}", "init_images", "required");
  bad_as(1, "{\"init_images\":[]}", "init_images", "a list of one");
  bad_as(1, "{\"init_images\":[\"Zm9v\",\"Zm9v\"]}", "init_images", "a list of one");
  bad_as(1, "{\"init_images\":\"Zm9v\"}", "init_images", "a list of one");
  bad_as(1, "{\"init_images\":[7]}", "init_images", "base64");
  bad_as(1, "{\"init_images\":[\"Zm9\"]}", "init_images", "base64");
  bad_as(1, "{\"init_images\":[\"Zm9v\"],\"mask\":\"Zm9v\",\"inpainting_fill\":2}", "inpainting_fill", "send 0");
  bad_as(1, "{\"init_images\":[\"Zm9v\"],\"resize_mode\":3}", "resize_mode", "latent upscale");
  bad_as(1, "{\"init_images\":[\"Zm9v\"],\"denoising_strength\":1.5}", "denoising_strength", "between 0 and 1");
  bad_as(1, "{\"init_images\":[\"Zm9v\"],\"denoising_strength\":0}", "denoising_strength", "above 0");
  bad_as(1, "{\"init_images\":[\"Zm9v\"],\"latent_mask\":\"Zm9v\"}", "latent_mask", "not supported");
  bad_as(1, "{\"init_images\":[\"Zm9v\"],\"initial_noise_multiplier\":1.2}", "initial_noise_multiplier", "send 1");
}

/* ---- answers ---- */

static const struct recipe recipe = {.prompt = "a cat", .negative = "b\"\n", .sampler = "euler_a", .sampler_label = "Euler a", .model = "emoji",
                                     .model_digest = "0123456789abcdef", .version = "9", .seed = 7, .steps = 3, .width = 64, .height = 72,
                                     .guidance = 2.5f, .generation_id = "7-3fa9c1d2", .generation_digest = "3fa9c1d2", .profile = "default"};

static const char *text_at(const json_t *j, const char *key)
{
  const char *s = json_string_value(json_object_get(j, key));

  if (!s)
    fail_msg("%s is no string", key);
  return s;
}

static void test_result(void **state)
{
  static const char *const keys[] = {
      "prompt", "all_prompts", "negative_prompt", "all_negative_prompts", "seed", "all_seeds", "subseed", "all_subseeds", "subseed_strength", "width",
      "height", "sampler_name", "cfg_scale", "steps", "batch_size", "restore_faces", "face_restoration_model", "sd_model_name", "sd_model_hash",
      "sd_vae_name", "sd_vae_hash", "seed_resize_from_w", "seed_resize_from_h", "denoising_strength", "extra_generation_params",
      "index_of_first_image", "infotexts", "styles", "job_timestamp", "clip_skip", "is_using_inpainting_conditioning", "version"};
  const struct openai_picture pic[2] = {{.file = "foo", .len = 3, .seed = 7}, {.file = "bar", .len = 3, .seed = 8}};
  const struct openai_picture cut[2] = {{.seed = 7}, {.file = "bar", .len = 3, .seed = 8, .cut_at = 2}};
  struct sdapi_result res = {pic, 2, &r, &x, &recipe, 0}, res_cut = {cut, 2, &r, &x, &recipe, 0};
  struct err e = {0};
  struct buf b;
  json_t *j, *info;

  (void)state;
  good("{\"prompt\":\"a cat<lora:ink:0.5>\",\"batch_size\":2,\"seed\":7}");
  buf_init(&b, 1 << 16);
  assert_int_equal(sdapi_encode_result(&b, &res, &e), 0);
  j = json_loads(b.p, JSON_REJECT_DUPLICATES, NULL);
  assert_non_null(j);
  assert_int_equal(json_array_size(json_object_get(j, "images")), 2);
  assert_string_equal(json_string_value(json_array_get(json_object_get(j, "images"), 1)), "YmFy");
  assert_int_equal(json_integer_value(json_object_get(json_object_get(j, "parameters"), "batch_size")), 2);
  info = json_loads(text_at(j, "info"), JSON_REJECT_DUPLICATES, NULL);
  for (size_t i = 0; i < sizeof keys / sizeof *keys; i++)
    if (!json_object_get(info, keys[i]))
      fail_msg("info has no %s", keys[i]);
  assert_int_equal(json_object_size(info), sizeof keys / sizeof *keys);
  assert_string_equal(text_at(info, "prompt"), "a cat <lora:ink:0.5>"); /* sent again, it draws the same */
  assert_string_equal(text_at(info, "negative_prompt"), "b\"\n");
  assert_int_equal(json_integer_value(json_array_get(json_object_get(info, "all_seeds"), 1)), 8);
  assert_string_equal(text_at(info, "sd_model_hash"), "0123456789");
  assert_string_equal(text_at(info, "job_timestamp"), "19700101000000");
  assert_non_null(strstr(json_string_value(json_array_get(json_object_get(info, "infotexts"), 1)), "Seed: 8, Size: 64x72"));
  json_decref(info);
  json_decref(j);
  b.len = 0; /* interrupted: what there is, and the seeds of all */
  assert_int_equal(sdapi_encode_result(&b, &res_cut, &e), 0);
  assert_memory_equal(b.p, "{\"images\":[\"YmFy\"],", 19);
  j = json_loads(b.p, JSON_REJECT_DUPLICATES, NULL);
  info = json_loads(text_at(j, "info"), JSON_REJECT_DUPLICATES, NULL);
  assert_int_equal(json_array_size(json_object_get(info, "infotexts")), 1);
  assert_non_null(strstr(json_string_value(json_array_get(json_object_get(info, "infotexts"), 0)), "Seed: 8, "));
  assert_non_null(strstr(json_string_value(json_array_get(json_object_get(info, "infotexts"), 0)), ", Interrupted at step: 2, "));
  assert_int_equal(json_array_size(json_object_get(info, "all_seeds")), 2);
  json_decref(info);
  json_decref(j);
  b.len = 0;
  x.sends_images = 0;
  assert_int_equal(sdapi_encode_result(&b, &res, &e), 0);
  assert_memory_equal(b.p, "{\"images\":[],", 13);
  buf_close(&b);
  buf_init(&b, 64);
  assert_int_equal(sdapi_encode_result(&b, &res, &e), E_TOOBIG);
  buf_close(&b);
}

static void test_progress_and_errors(void **state)
{
  struct sdapi_progress p = {.progress = 0.25, .eta_s = 2, .job = "j", .n = 2, .picture = 1, .step = 3, .steps = 20, .file = "foo", .len = 3};
  struct err e = {0}, what = {0};
  struct buf b;
  json_t *j, *s;

  (void)state;
  buf_init(&b, 4096);
  for (int idle = 0; idle < 2; idle++) {
    b.len = 0;
    assert_int_equal(sdapi_encode_progress(&b, &p, &e), 0);
    j = json_loads(b.p, JSON_REJECT_DUPLICATES, NULL);
    assert_non_null(j);
    s = json_object_get(j, "state");
    assert_int_equal(json_object_size(s), 9);
    assert_int_equal(json_integer_value(json_object_get(s, "job_count")), idle ? 0 : 2);
    assert_int_equal(json_integer_value(json_object_get(s, "sampling_step")), idle ? 0 : 3);
    if (idle)
      assert_true(json_is_null(json_object_get(j, "current_image")));
    else
      assert_string_equal(text_at(j, "current_image"), "Zm9v");
    json_decref(j);
    p = (struct sdapi_progress){0};
  }
  struct sdapi_server server = {.lim = &lim, .version = "9", .memory_used = 1 << 29, .memory_total = 1 << 30};
  struct sdapi_progress at = {.job = "j", .n = 2, .step = 3};
  struct sdapi_status st = {.server = &server, .progress = &at, .now = 86400, .up_s = 36 * 3600 + 62, .has_state = 1};
  for (int has_memory = 0; has_memory < 2; has_memory++) {
    b.len = 0;
    st.has_memory = has_memory;
    st.has_state = !has_memory;
    assert_int_equal(sdapi_encode_status(&b, &st, &e), 0);
    j = json_loads(b.p, JSON_REJECT_DUPLICATES, NULL);
    assert_non_null(j);
    assert_string_equal(text_at(j, "uptime"), "36:01:02");
    assert_string_equal(text_at(j, "timestamp"), "1970-01-02 00:00:00");
    assert_string_equal(text_at(json_object_get(j, "version"), "version"), "9");
    assert_true(json_is_null(json_object_get(j, has_memory ? "state" : "memory")) && json_is_null(json_object_get(j, "gpu")));
    s = json_object_get(j, has_memory ? "memory" : "state");
    if (has_memory)
      assert_true(json_real_value(json_object_get(json_object_get(s, "ram"), "free")) == 0.5);
    else
      assert_int_equal(json_integer_value(json_object_get(s, "sampling_step")), 3);
    json_decref(j);
  }
  b.len = 0;
  assert_int_equal(sdapi_encode_queue(&b, 3, 2.5, &e), 0);
  j = json_loads(b.p, JSON_REJECT_DUPLICATES, NULL);
  assert_int_equal(json_integer_value(json_object_get(j, "queue_size")), 3);
  assert_true(json_real_value(json_object_get(j, "queue_eta")) == 2.5 && json_is_null(json_object_get(j, "rank")));
  json_decref(j);
  assert_true(sdapi_progress_of(0, 1, 0, 20) == 0.01 && sdapi_progress_of(1, 2, 10, 20) == 0.76 && sdapi_progress_of(1, 2, 20, 20) == 1);
  b.len = 0;
  err_field(&what, E_ARG, "steps", "steps must be \"less\"");
  assert_int_equal(sdapi_encode_error(&b, &what, &e), 0);
  j = json_loads(b.p, 0, NULL);
  assert_string_equal(text_at(j, "detail"), "steps must be \"less\"");
  assert_string_equal(text_at(j, "error"), "invalid_value");
  assert_string_equal(text_at(j, "param"), "steps");
  assert_non_null(json_object_get(j, "body"));
  json_decref(j);
  buf_close(&b);
}

/* Booleans of a query as A1111 reads them; what it refuses is refused. */
static void test_skip(void **state)
{
  static const char *const yes[] = {"true", "True", "1", "yes", "on", "t", "Y"}, *const no[] = {"false", "False", "0", "no", "off", "f", "N", NULL};
  static const char *const wrong[] = {"", "null", "2", "truee", "tru", " true"};
  struct err e;
  int skips;

  (void)state;
  for (size_t i = 0; i < sizeof yes / sizeof *yes; i++)
    assert_true(!sdapi_decode_flag(&skips, "skip_current_image", yes[i], &e) && skips == 1);
  for (size_t i = 0; i < sizeof no / sizeof *no; i++)
    assert_true(!sdapi_decode_flag(&skips, "skip_current_image", no[i], &e) && skips == 0);
  for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
    e = (struct err){0};
    assert_int_equal(sdapi_decode_flag(&skips, "skip_current_image", wrong[i], &e), E_ARG);
    assert_string_equal(e.field, "skip_current_image");
  }
}

static const struct sdapi_sampler samplers[] = {{"ddim", "DDIM", 0}, {"dpmpp_2m", "DPM++ 2M", 1}};
static const struct sdapi_lora loras[] = {{"ink", NULL}};
static const struct sdapi_server server = {.lim = &lim, .digest = "0123456789abcdef", .filename = "emoji", .version = "9", .sampler = samplers, .n_samplers = 2,
                                           .lora = loras, .n_loras = 1, .memory_used = 1, .memory_total = 3};

static json_t *list(const char *name)
{
  struct err e = {0};
  struct buf b;
  json_t *j;

  buf_init(&b, 1 << 14);
  if (sdapi_encode_list(&b, name, &server, &e))
    fail_msg("%s: %s", name, e.msg);
  j = json_loads(b.p, JSON_REJECT_DUPLICATES, NULL);
  assert_non_null(j);
  buf_close(&b);
  return j;
}

static void test_lists(void **state)
{
  static const char *const empty[] = {"latent-upscale-modes", "sd-vae", "sd-modules", "hypernetworks", "face-restorers", "realesrgan-models", "prompt-styles",
                                      "script-info"};
  struct err e = {0};
  struct buf b;
  json_t *j;

  (void)state;
  for (size_t i = 0; i < sizeof empty / sizeof *empty; i++) {
    j = list(empty[i]);
    assert_true(json_is_array(j) && !json_array_size(j));
    json_decref(j);
  }
  j = list("sd-models");
  assert_string_equal(text_at(json_array_get(j, 0), "title"), "emoji [0123456789]");
  assert_string_equal(text_at(json_array_get(j, 0), "model_name"), "emoji");
  json_decref(j);
  j = list("samplers");
  assert_string_equal(text_at(json_array_get(j, 1), "name"), "DPM++ 2M");
  assert_string_equal(json_string_value(json_array_get(json_object_get(json_array_get(j, 1), "aliases"), 1)), "k_dpmpp_2m");
  json_decref(j);
  j = list("schedulers");
  assert_int_equal(json_array_size(j), 3);
  assert_string_equal(text_at(json_array_get(j, 2), "label"), "Karras");
  json_decref(j);
  j = list("loras");
  assert_string_equal(text_at(json_array_get(j, 0), "alias"), "ink");
  json_decref(j);
  j = list("options");
  assert_string_equal(text_at(j, "samples_format"), "png");
  json_decref(j);
  j = list("memory");
  assert_int_equal(json_integer_value(json_object_get(json_object_get(j, "ram"), "free")), 2);
  json_decref(j);
  for (size_t i = 0; i < 5; i++)
    json_decref(list((const char *const[]){"upscalers", "embeddings", "scripts", "cmd-flags", "options"}[i]));
  buf_init(&b, 4096);
  assert_int_equal(sdapi_encode_list(&b, "interrogate", &server, &e), E_NOTFOUND);
  buf_close(&b);
}

static void test_options(void **state)
{
  static const struct {
    const char *body, *field;
  } cases[] = {{"{\"sd_model_checkpoint\":\"emoji [0123456789]\"}", NULL}, {"{\"sd_model_checkpoint\":\"emoji\",\"samples_format\":\"png\"}", NULL},
               {"{\"CLIP_stop_at_last_layers\":1.0}", NULL}, {"{\"CLIP_stop_at_last_layers\":2}", "CLIP_stop_at_last_layers"},
               {"{\"sd_model_checkpoint\":\"xl\"}", "sd_model_checkpoint"}, {"{\"sd_model_checkpoint\":7}", "sd_model_checkpoint"},
               {"{\"filter_nsfw\":false}", "filter_nsfw"}, {"{\"banana\":1}", "banana"}};

  (void)state;
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    struct err e = {0};
    int ret = sdapi_decode_options(cases[i].body, strlen(cases[i].body), &server, &e);
    assert_int_equal(ret, cases[i].field ? E_ARG : 0);
    assert_string_equal(e.field, cases[i].field ? cases[i].field : "");
  }
  /* What GET says is what POST takes: clients send the whole object back. */
  json_t *j = list("options");
  char *text = json_dumps(j, 0);
  struct err e = {0};
  assert_int_equal(sdapi_decode_options(text, strlen(text), &server, &e), 0);
  free(text);
  json_decref(j);
}

/* ---- png-info: a file of our own, and files that are none ---- */

static void test_png_info(void **state)
{
  static const char *const prompts[] = {"a cat, sitting\nin: two lines", "\xc3\xa9\xe2\x82\xac", "a"};
  uint8_t rgb[3 * 64 * 72] = {0};
  struct image_encoder *enc;
  struct err e = {0};
  struct buf png, out;
  struct recipe p = recipe;

  (void)state;
  assert_int_equal(image_open(&enc, &e), 0);
  buf_init(&png, 1 << 20);
  buf_init(&out, 1 << 16);
  for (size_t i = 0; i < 3; i++) {
    p.prompt = prompts[i];
    p.negative = i < 2 ? "b, c: d" : "";
    p.model = "e:m\"\\";
    png.len = out.len = 0;
    assert_int_equal(image_encode_picture(enc, &png, rgb, &p, IMAGE_FULL, &e), 0);
    assert_int_equal(sdapi_encode_png_info(&out, (const uint8_t *)png.p, png.len, &e), 0);
    json_t *j = json_loads(out.p, JSON_REJECT_DUPLICATES, NULL), *got = json_object_get(j, "parameters");
    assert_non_null(j);
    assert_string_equal(text_at(got, "Prompt"), p.prompt);
    assert_string_equal(text_at(got, "Negative prompt"), p.negative);
    assert_string_equal(text_at(got, "Seed"), "7");
    assert_string_equal(text_at(got, "Size-2"), "72");
    assert_string_equal(text_at(got, "CFG scale"), "2.5");
    assert_string_equal(text_at(got, "Model"), "e:m\"\\");
    assert_string_equal(text_at(j, "info"), text_at(json_object_get(j, "items"), "parameters"));
    json_decref(j);
  }
  for (size_t cut = 0; cut < png.len; cut++) { /* every file that is cut off: refused, unless the text is whole and first */
    out.len = 0;
    e = (struct err){0};
    uint8_t *part = malloc(cut + 1);
    assert_non_null(part);
    memcpy(part, png.p, cut);
    if (sdapi_encode_png_info(&out, part, cut, &e))
      assert_true(e.code == E_ARG && !strcmp(e.field, "image") && !out.len);
    else
      assert_non_null(strstr(out.p, "Euler a"));
    free(part);
  }
  png.p[40]++; /* in the first chunk behind the header, or in its checksum */
  e = (struct err){0};
  out.len = 0;
  assert_int_equal(sdapi_encode_png_info(&out, (const uint8_t *)png.p, png.len, &e), E_ARG);
  buf_close(&png);
  buf_close(&out);
  image_close(enc);
}

static void test_png_info_body(void **state)
{
  static const char good_body[] = "{\"image\":\"data:image/png;base64,Zm9v\"}", *const bad_bodies[] = {"{}", "{\"image\":1}", "{\"image\":\"?\"}", "x"};
  struct err e = {0};
  uint8_t *file;
  size_t n;

  (void)state;
  assert_int_equal(sdapi_decode_png_info(&file, &n, good_body, sizeof good_body - 1, &e), 0);
  assert_int_equal(n, 3);
  free(file);
  for (size_t i = 0; i < 4; i++) {
    e = (struct err){0};
    assert_int_equal(sdapi_decode_png_info(&file, &n, bad_bodies[i], strlen(bad_bodies[i]), &e), E_ARG);
    assert_null(file);
  }
}

int main(void)
{
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_defaults), cmocka_unit_test(test_clients), cmocka_unit_test(test_effects), cmocka_unit_test(test_refused),
      cmocka_unit_test(test_safety), cmocka_unit_test(test_tags), cmocka_unit_test(test_img2img), cmocka_unit_test(test_result),
      cmocka_unit_test(test_progress_and_errors), cmocka_unit_test(test_lists), cmocka_unit_test(test_options), cmocka_unit_test(test_png_info),
      cmocka_unit_test(test_png_info_body), cmocka_unit_test(test_skip),
  };

  return cmocka_run_group_tests(tests, NULL, NULL);
}
