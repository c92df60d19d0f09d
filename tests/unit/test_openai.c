/*
 * test_openai.c - the OpenAI wire format: every field, its bounds, and the sentence of its refusal. Threads: none.
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

#include "proto/openai.h"

static const struct request_limits limits = {
    .default_size = 128,
    .size_multiple = 8,
    .max_size = 256,
    .default_steps = 20,
    .max_steps = 50,
    .default_guidance = 3,
    .max_guidance = 20,
    .max_n = 4,
    .default_sampler = "dpmpp_2m",
    .model = "emoji",
};

static struct request r;
static struct request_limits lim; /* limits, and what a test's server offers */

static int decode(const char *body, struct err *e)
{
  *e = (struct err){0};
  memset(&r, 0x55, sizeof r); /* nothing may be left as it was */
  return openai_decode(&r, body, strlen(body), &lim, e);
}

static void good(const char *body)
{
  struct err e;

  if (decode(body, &e))
    fail_msg("%s\n  was refused: %s", body, e.msg);
}

/* Refused with this code, this field, and a message that holds this text. */
static void bad_code(const char *body, int code, const char *field, const char *text)
{
  struct err e;

  if (!decode(body, &e))
    fail_msg("%s\n  was accepted", body);
  if (e.code != code || strcmp(e.field, field) || !strstr(e.msg, text))
    fail_msg("%s\n  gave code %d, field \"%s\", \"%s\"; expected %d, \"%s\", \"...%s...\"", body, e.code, e.field, e.msg, code,
             field, text);
}

static void bad(const char *body, const char *field, const char *text)
{
  bad_code(body, E_ARG, field, text);
}

static void test_defaults(void **state)
{
  (void)state;
  good("{\"prompt\":\"a red apple\"}");
  assert_string_equal(r.prompt, "a red apple");
  assert_int_equal(r.prompt_len, 11);
  assert_string_equal(r.negative, "");
  assert_int_equal(r.negative_len, 0);
  assert_string_equal(r.sampler, "dpmpp_2m");
  assert_int_equal(r.karras, -1);
  assert_int_equal(r.width, 128);
  assert_int_equal(r.height, 128);
  assert_int_equal(r.steps, 20);
  assert_int_equal(r.n, 1);
  assert_int_equal(r.clip_skip, 0);
  assert_true(r.guidance == 3.0f);
  assert_int_equal(r.has_seed, 0);
}

static void test_everything(void **state)
{
  (void)state;
  good("{\"prompt\":\"\\u00e9\",\"model\":\"emoji\",\"n\":4,\"size\":\"64x256\",\"seed\":9223372036854775807,\"steps\":50,"
       "\"guidance_scale\":1.5,\"negative_prompt\":\"blue\",\"sampler\":\"Euler a\",\"karras\":true,\"clip_skip\":2,"
       "\"response_format\":\"b64_json\",\"output_format\":\"png\",\"output_compression\":100,\"stream\":false,"
       "\"partial_images\":0,\"quality\":\"standard\",\"style\":\"vivid\",\"background\":\"auto\",\"moderation\":\"low\","
       "\"user\":\"u\",\"metadata\":{\"a\":\"b\"}}");
  assert_string_equal(r.prompt, "\xc3\xa9");
  assert_int_equal(r.n, 4);
  assert_int_equal(r.width, 64);
  assert_int_equal(r.height, 256);
  assert_true(r.seed == INT64_MAX && r.has_seed);
  assert_int_equal(r.steps, 50);
  assert_true(r.guidance == 1.5f);
  assert_string_equal(r.negative, "blue");
  assert_string_equal(r.sampler, "Euler a");
  assert_int_equal(r.karras, 1);
  assert_int_equal(r.clip_skip, 2);
}

static void test_null_is_absent(void **state)
{
  (void)state;
  good("{\"prompt\":\"\",\"model\":null,\"n\":null,\"size\":null,\"seed\":null,\"stream\":null,\"sampler\":null}");
  assert_int_equal(r.n, 1);
  assert_int_equal(r.prompt_len, 0);
  bad("{\"prompt\":null}", "prompt", "string");
}

static void test_prompt(void **state)
{
  static char body[REQUEST_PROMPT_MAX + 64];

  (void)state;
  bad("{}", "prompt", "required");
  bad("{\"prompt\":3}", "prompt", "string");
  bad("{\"prompt\":[\"a\"]}", "prompt", "string");
  bad("{\"prompt\":\"a\",\"negative_prompt\":3}", "negative_prompt", "string");
  for (int over = 0; over < 2; over++) {
    int n = snprintf(body, sizeof body, "{\"prompt\":\"");
    memset(body + n, 'x', REQUEST_PROMPT_MAX + (size_t)over);
    snprintf(body + n + REQUEST_PROMPT_MAX + over, 3, "\"}");
    if (over)
      bad(body, "prompt", "16384 bytes");
    else
      good(body);
  }
}

static void test_bounds(void **state)
{
  (void)state;
  bad("{\"prompt\":\"a\",\"steps\":0}", "steps", "between 1 and 50");
  bad("{\"prompt\":\"a\",\"steps\":51}", "steps", "between 1 and 50");
  bad("{\"prompt\":\"a\",\"steps\":2.5}", "steps", "whole");
  bad("{\"prompt\":\"a\",\"steps\":\"20\"}", "steps", "integer");
  bad("{\"prompt\":\"a\",\"steps\":true}", "steps", "integer");
  bad("{\"prompt\":\"a\",\"steps\":1e300}", "steps", "between");
  bad("{\"prompt\":\"a\",\"n\":0}", "n", "between 1 and 4");
  bad("{\"prompt\":\"a\",\"n\":5}", "n", "between 1 and 4");
  bad("{\"prompt\":\"a\",\"guidance_scale\":20.5}", "guidance_scale", "between 0 and 20");
  bad("{\"prompt\":\"a\",\"guidance_scale\":-1}", "guidance_scale", "between 0 and 20");
  bad("{\"prompt\":\"a\",\"guidance_scale\":\"7\"}", "guidance_scale", "number");
  bad("{\"prompt\":\"a\",\"seed\":-2}", "seed", "between -1");
  bad("{\"prompt\":\"a\",\"seed\":99999999999999999999}", "seed", "between -1");
  bad("{\"prompt\":\"a\",\"clip_skip\":13}", "clip_skip", "between 1 and 12");
  bad("{\"prompt\":\"a\",\"karras\":1}", "karras", "true or false");
  bad("{\"prompt\":\"a\",\"sampler\":7}", "sampler", "string");
  bad("{\"prompt\":\"a\",\"sampler\":\"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\"}", "sampler", "31 bytes");
  good("{\"prompt\":\"a\",\"seed\":-1}");
  assert_int_equal(r.has_seed, 0);
  good("{\"prompt\":\"a\",\"steps\":7.0,\"guidance_scale\":0}");
  assert_int_equal(r.steps, 7);
}

static void test_size(void **state)
{
  static const char *const shapes[] = {"64", "64x", "x64", "64x64x64", " 64x64", "64X64", "-64x64", "64x+64", "axb", ""};
  char body[128];

  (void)state;
  for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
    snprintf(body, sizeof body, "{\"prompt\":\"a\",\"size\":\"%s\"}", shapes[i]);
    bad(body, "size", "WIDTHxHEIGHT");
  }
  bad("{\"prompt\":\"a\",\"size\":64}", "size", "WIDTHxHEIGHT");
  bad("{\"prompt\":\"a\",\"size\":\"100x128\"}", "size", "multiple of 8");
  bad("{\"prompt\":\"a\",\"size\":\"128x264\"}", "size", "between 8 and 256");
  bad("{\"prompt\":\"a\",\"size\":\"0x64\"}", "size", "between 8 and 256");
  bad("{\"prompt\":\"a\",\"size\":\"99999999999999999999x64\"}", "size", "between 8 and 256");
  bad("{\"prompt\":\"a\",\"width\":64}", "height", "together");
  bad("{\"prompt\":\"a\",\"height\":64}", "width", "together");
  bad("{\"prompt\":\"a\",\"width\":60,\"height\":64}", "width", "multiple of 8");
  bad("{\"prompt\":\"a\",\"width\":64,\"height\":512}", "height", "between 1 and 256");
  bad("{\"prompt\":\"a\",\"width\":64,\"height\":64,\"size\":\"auto\"}", "size", "not both");
  good("{\"prompt\":\"a\",\"width\":64,\"height\":72}");
  assert_int_equal(r.width, 64);
  assert_int_equal(r.height, 72);
  good("{\"prompt\":\"a\",\"size\":\"auto\"}");
  assert_int_equal(r.width, 128);
}

static void test_words(void **state)
{
  (void)state;
  bad("{\"prompt\":\"a\",\"response_format\":\"url\"}", "response_format", "keeps no pictures");
  bad("{\"prompt\":\"a\",\"response_format\":\"b64\"}", "response_format", "b64_json");
  bad("{\"prompt\":\"a\",\"output_format\":\"jpeg\"}", "output_format", "png");
  bad("{\"prompt\":\"a\",\"stream\":true}", "stream", "not supported yet");
  bad("{\"prompt\":\"a\",\"stream\":1}", "stream", "true or false");
  bad("{\"prompt\":\"a\",\"partial_images\":2}", "partial_images", "needs stream");
  bad("{\"prompt\":\"a\",\"partial_images\":4}", "partial_images", "between 0 and 3");
  bad("{\"prompt\":\"a\",\"output_compression\":101}", "output_compression", "between 0 and 100");
  bad("{\"prompt\":\"a\",\"quality\":\"best\"}", "quality", "auto|low");
  bad("{\"prompt\":\"a\",\"quality\":\"hd|auto\"}", "quality", "auto|low");
  bad("{\"prompt\":\"a\",\"style\":\"\"}", "style", "vivid");
  bad("{\"prompt\":\"a\",\"background\":\"transparent\"}", "background", "opaque");
  bad("{\"prompt\":\"a\",\"moderation\":\"off\"}", "moderation", "auto|low");
  bad("{\"prompt\":\"a\",\"user\":1}", "user", "string");
  bad("{\"prompt\":\"a\",\"metadata\":1}", "metadata", "object");
  bad_code("{\"prompt\":\"a\",\"model\":\"dall-e-3\"}", E_NOTFOUND, "model", "\"emoji\"");
  bad("{\"prompt\":\"a\",\"model\":1}", "model", "string");
}

/* What a server offers beyond PNG in JSON. */
static void test_offers(void **state)
{
  (void)state;
  lim.offers = REQUEST_OFFERS_FORMATS | REQUEST_OFFERS_URL | REQUEST_OFFERS_STREAM;
  good("{\"prompt\":\"a\",\"output_format\":\"webp\",\"output_compression\":80,\"response_format\":\"url\"}");
  assert_int_equal(r.format, IMAGE_WEBP);
  assert_int_equal(r.quality, 80);
  assert_int_equal(r.reply, REPLY_URL);
  good("{\"prompt\":\"a\",\"output_format\":\"jpeg\",\"output_compression\":0}");
  assert_int_equal(r.format, IMAGE_JPEG);
  assert_int_equal(r.quality, 1);
  assert_int_equal(r.reply, REPLY_JSON);
  good("{\"prompt\":\"a\",\"stream\":true,\"partial_images\":3,\"response_format\":\"b64_json\"}");
  assert_int_equal(r.reply, REPLY_STREAM);
  assert_int_equal(r.previews, 3);
  good("{\"prompt\":\"a\",\"stream\":false,\"partial_images\":0}");
  assert_int_equal(r.reply, REPLY_JSON);
  assert_true(r.format == IMAGE_PNG && r.quality == 0 && r.previews == 0 && r.strength == 1);
  bad("{\"prompt\":\"a\",\"stream\":true,\"response_format\":\"url\"}", "response_format", "b64_json");
  bad("{\"prompt\":\"a\",\"stream\":false,\"partial_images\":1}", "partial_images", "needs stream");
  bad("{\"prompt\":\"a\",\"output_format\":\"gif\"}", "output_format", "png|jpeg|webp");
  bad("{\"prompt\":\"a\",\"strength\":0.5}", "strength", "unknown field");
  lim.offers = 0;
}

/* ---- jobs: the same fields, no stream, a first picture in the JSON ---- */

static struct first first;

static int decode_job(const char *body, struct err *e)
{
  *e = (struct err){0};
  memset(&r, 0x55, sizeof r);
  return openai_decode_job(&r, &first, body, strlen(body), &lim, e);
}

static void bad_job(const char *body, const char *field, const char *text)
{
  struct err e;

  if (!decode_job(body, &e))
    fail_msg("%s\n  was accepted", body);
  if (e.code != E_ARG || strcmp(e.field, field) || !strstr(e.msg, text))
    fail_msg("%s\n  gave field \"%s\", \"%s\"", body, e.field, e.msg);
  assert_null(first.file[FIRST_INIT].p);
}

static void test_jobs(void **state)
{
  struct err e;

  (void)state;
  assert_int_equal(decode_job("{\"prompt\":\"a\",\"partial_images\":2,\"metadata\":{\"k\":1}}", &e), 0);
  assert_int_equal(r.reply, REPLY_URL);
  assert_int_equal(r.previews, 2);
  assert_true(r.width == 128 && r.strength == 1);
  assert_null(first.file[FIRST_INIT].p);
  assert_int_equal(decode_job("{\"prompt\":\"a\",\"image\":\"data:image/png;base64,Zm9v\",\"response_format\":\"b64_json\"}", &e), 0);
  assert_int_equal(r.reply, REPLY_JSON);
  assert_true(r.width == 0 && r.strength == 0.75f); /* first_decode says the size */
  assert_int_equal(first.file[FIRST_INIT].len, 3);
  assert_memory_equal(first.file[FIRST_INIT].p, "foo", 3);
  first_close(&first);
  assert_int_equal(decode_job("{\"prompt\":\"a\",\"mask\":\"Zm9v\",\"image\":\"Zm9v\",\"size\":\"64x64\"}", &e), 0);
  assert_true(r.width == 64 && r.strength == 1);
  first_close(&first);
  assert_int_equal(decode_job("{\"prompt\":\"a\",\"strength\":0.25,\"image\":\"Zm9v\"}", &e), 0);
  assert_true(r.strength == 0.25f);
  first_close(&first);
  bad_job("{\"prompt\":\"a\",\"stream\":true}", "stream", "events");
  bad_job("{\"prompt\":\"a\",\"image\":\"Zm9\"}", "image", "base64");
  bad_job("{\"prompt\":\"a\",\"image\":\"\"}", "image", "base64");
  bad_job("{\"prompt\":\"a\",\"image\":7}", "image", "base64");
  bad_job("{\"prompt\":\"a\",\"image\":\"Zm9v\",\"steps\":0}", "steps", "between"); /* and gives the picture back */
  bad_job("{\"prompt\":\"a\",\"mask\":\"Zm9v\"}", "mask", "needs an image");
  bad_job("{\"prompt\":\"a\",\"strength\":0.5}", "strength", "needs an image");
  bad_job("{\"prompt\":\"a\",\"image\":\"Zm9v\",\"strength\":1.01}", "strength", "between 0 and 1");
  bad_job("{\"prompt\":\"a\",\"image\":\"Zm9v\",\"strength\":0}", "strength", "above 0");
  bad_job("{\"prompt\":\"a\",\"input_fidelity\":\"low\"}", "input_fidelity", "unknown");
  bad_job("{\"prompt\":\"a\",\"safety\":false}", "safety", "policy");
  static char large[OPENAI_METADATA_MAX + 64];
  for (int over = 0; over < 2; over++) { /* {"k":""} takes 8 bytes */
    snprintf(large, sizeof large, "{\"prompt\":\"a\",\"metadata\":{\"k\":\"%0*d\"}}", OPENAI_METADATA_MAX - 8 + over, 0);
    if (over)
      bad_job(large, "metadata", "16384 bytes");
    else
      assert_int_equal(decode_job(large, &e), 0);
  }
}

static void test_unknown_and_safety(void **state)
{
  static const char *const safety[] = {"safety", "safety_checker", "enable_safety_checker", "lora", "adapters", "adapter", "nsfw",
                                       "override_settings", "Safe_Mode"};
  char body[512], name[2 * 200 + 1];
  struct err e;

  (void)state;
  for (size_t i = 0; i < sizeof safety / sizeof *safety; i++) {
    snprintf(body, sizeof body, "{\"prompt\":\"a\",\"%s\":false}", safety[i]);
    bad(body, safety[i], "policy");
    snprintf(body, sizeof body, "{\"prompt\":\"a\",\"%s\":null}", safety[i]);
    bad(body, safety[i], "policy");
  }
  bad("{\"prompt\":\"a\",\"cfg_scale\":7}", "cfg_scale", "guidance_scale");
  bad("{\"prompt\":\"a\",\"tiling\":true}", "tiling", "unknown field");
  /* A long name is cut between characters. */
  memset(name, 0, sizeof name);
  for (int i = 0; i < 200; i++)
    memcpy(name + 2 * i, "\xc3\xa9", 2);
  snprintf(body, sizeof body, "{\"prompt\":\"a\",\"%s\":1}", name);
  assert_int_equal(decode(body, &e), E_ARG);
  assert_int_equal(strlen(e.field), (sizeof e.field - 1) / 2 * 2);
}

static void test_loras(void **state)
{
  (void)state;
  good("{\"prompt\":\"a\",\"loras\":[{\"name\":\"ink\",\"scale\":-0.5},{\"name\":\"wash\"}]}");
  assert_int_equal(r.n_loras, 2);
  assert_string_equal(r.lora[0].name, "ink");
  assert_true(r.lora[0].scale == -0.5f && r.lora[1].scale == 1);
  good("{\"prompt\":\"a\",\"loras\":null}");
  assert_int_equal(r.n_loras, 0);
  bad("{\"prompt\":\"a\",\"loras\":{}}", "loras", "a list");
  bad("{\"prompt\":\"a\",\"loras\":[1,2,3,4,5,6,7,8,9]}", "loras", "at most 8");
  bad("{\"prompt\":\"a\",\"loras\":[\"ink\"]}", "loras[0]", "an object");
  bad("{\"prompt\":\"a\",\"loras\":[{\"scale\":1}]}", "loras[0]", "needs a name");
  bad("{\"prompt\":\"a\",\"loras\":[{\"name\":\"ink\"},{\"name\":\"ink\",\"required\":false}]}", "loras[1]", "nothing else");
  bad("{\"prompt\":\"a\",\"loras\":[{\"name\":\"ink\",\"path\":\"/etc/passwd\"}]}", "loras[0]", "nothing else");
  bad("{\"prompt\":\"a\",\"loras\":[{\"name\":\"ink\",\"scale\":\"1\"}]}", "loras[0]", "a number");
  bad("{\"prompt\":\"a\",\"loras\":[{\"name\":\"ink\",\"scale\":1e300}]}", "loras[0]", "between -100 and 100");
  bad("{\"prompt\":\"a\",\"loras\":[{\"name\":\"ink\",\"scale\":NaN}]}", "", "malformed");
}

static void test_not_json(void **state)
{
  struct err e;

  (void)state;
  bad("", "", "malformed JSON");
  bad("{\"prompt\":\"a\"", "", "malformed JSON at line 1");
  bad("{\"prompt\":\"a\"} x", "", "malformed JSON");
  bad("[1]", "", "object");
  bad("{\"prompt\":\"a\",\"prompt\":\"b\"}", "", "malformed JSON"); /* duplicates */
  bad("{\"prompt\":\"a\\u0000b\"}", "", "malformed JSON");
  bad("{\"prompt\":\"\\ud800\"}", "", "malformed JSON"); /* half a surrogate pair */
  bad("{\"prompt\":\"a\",\"metadata\":{\"x\":99999999999999999999}}", "", "malformed JSON");
  bad("{\"prompt\":\"a\",\"steps\":1e999}", "", "malformed JSON");
  bad("{\"prompt\":\"a\xff\"}", "prompt", "UTF-8 (byte 0xff at offset 12");
  bad("{\"prompt\":\"a\",\"negative_prompt\":\"\xed\xa0\x80\"}", "negative_prompt", "UTF-8"); /* a surrogate */
  bad("{\"prompt\":\"\xc0\xaf\",\"user\":\"\xff\"}", "prompt", "UTF-8");                       /* overlong */
  bad("\xff", "", "the body is not valid UTF-8");
  /* Deep nesting ends in a refusal, not in a stack overflow. */
  char *deep = malloc(1 << 18);
  assert_non_null(deep);
  memset(deep, '[', (1 << 18) - 1);
  deep[(1 << 18) - 1] = 0;
  assert_int_equal(decode(deep, &e), E_ARG);
  free(deep);
}

/* ---- answers ---- */

static void test_result(void **state)
{
  static const char png[] = "\x89PNG any bytes";
  const struct openai_picture pic[2] = {{.file = png, .len = sizeof png - 1, .seed = 7}, {.file = png, .len = 2, .seed = 8}};
  const struct recipe recipe = {.prompt = "p", .negative = "n\"\\", .sampler = "euler", .sampler_label = "Euler", .model = "emoji",
                                .model_digest = "ab", .version = "1", .seed = 7, .steps = 3, .width = 64, .height = 72,
                                .guidance = 2.5f, .generation_id = "7-3fa9c1d2", .generation_digest = "3fa9c1d2", .profile = "default"};
  const struct stage_times times = {.queue = 1, .unet = 2.5, .total = 4};
  struct openai_result res = {pic, 2, 1234, 5, 144, "req_1", &recipe, &times, IMAGE_PNG};
  struct buf b;
  struct err e = {0};
  json_t *j, *d;

  (void)state;
  buf_init(&b, 1 << 16);
  assert_int_equal(openai_encode_result(&b, &res, &e), 0);
  j = json_loads(b.p, JSON_REJECT_DUPLICATES, NULL);
  assert_non_null(j);
  assert_int_equal(json_integer_value(json_object_get(j, "created")), 1234);
  d = json_object_get(j, "data");
  assert_int_equal(json_array_size(d), 2);
  assert_string_equal(json_string_value(json_object_get(json_array_get(d, 0), "b64_json")), "iVBORyBhbnkgYnl0ZXM=");
  assert_string_equal(json_string_value(json_object_get(json_array_get(d, 1), "b64_json")), "iVA=");
  assert_int_equal(json_integer_value(json_object_get(json_array_get(d, 1), "seed")), 8);
  assert_string_equal(json_string_value(json_object_get(j, "size")), "64x72");
  for (size_t i = 0; i < 3; i++) { /* beside each picture and in the whole */
    const json_t *s = json_object_get(i < 2 ? json_array_get(d, i) : j, "safelight");
    assert_string_equal(json_string_value(json_object_get(s, "generation_id")), "7-3fa9c1d2");
    assert_string_equal(json_string_value(json_object_get(s, "generation_digest")), "3fa9c1d2");
    assert_string_equal(json_string_value(json_object_get(s, "profile")), "default");
    assert_true(json_is_false(json_object_get(s, "requires_nothing")));
  }
  assert_int_equal(json_integer_value(json_object_get(json_object_get(j, "usage"), "total_tokens")), 149);
  d = json_object_get(j, "safelight");
  assert_string_equal(json_string_value(json_object_get(d, "negative_prompt")), "n\"\\");
  assert_string_equal(json_string_value(json_object_get(d, "request_id")), "req_1");
  assert_true(json_real_value(json_object_get(json_object_get(d, "times"), "unet_ms")) == 2.5);
  json_decref(j);
  buf_close(&b);
  buf_init(&b, 32); /* the maximum holds */
  assert_int_equal(openai_encode_result(&b, &res, &e), E_TOOBIG);
  buf_close(&b);
}

/* The data of each event of a stream, which must be whole lines of one object. */
static json_t *event_data(const char *text, const char *name)
{
  char head[80];
  json_t *j;

  snprintf(head, sizeof head, "event: %s\ndata: {", name);
  assert_memory_equal(text, head, strlen(head));
  text += strlen(head) - 1;
  assert_string_equal(strchr(text, '\n'), "\n\n"); /* one line, one empty line, nothing else */
  j = json_loadb(text, strcspn(text, "\n"), JSON_REJECT_DUPLICATES, NULL);
  assert_non_null(j);
  return j;
}

static void test_events(void **state)
{
  const struct recipe recipe = {.prompt = "p\n", .negative = "", .sampler = "euler", .sampler_label = "Euler", .model = "emoji",
                                .model_digest = "ab", .version = "1", .seed = 7, .steps = 3, .width = 64, .height = 72};
  const struct stage_times times = {.total = 4};
  struct openai_result res = {NULL, 0, 1234, 5, 144, "req_1", &recipe, &times, IMAGE_JPEG};
  struct openai_event v = {.file = "foo", .len = 3, .format = IMAGE_JPEG, .width = 64, .height = 72, .picture = 1, .created = 99};
  struct err e = {0}, what = {0};
  struct buf b;
  json_t *j;

  (void)state;
  buf_init(&b, 1 << 16);
  assert_int_equal(openai_encode_partial(&b, &v, 2, &e), 0);
  j = event_data(b.p, "image_generation.partial_image");
  assert_string_equal(json_string_value(json_object_get(j, "type")), "image_generation.partial_image");
  assert_string_equal(json_string_value(json_object_get(j, "b64_json")), "Zm9v");
  assert_string_equal(json_string_value(json_object_get(j, "size")), "64x72");
  assert_string_equal(json_string_value(json_object_get(j, "output_format")), "jpeg");
  assert_int_equal(json_integer_value(json_object_get(j, "partial_image_index")), 2);
  assert_int_equal(json_integer_value(json_object_get(j, "picture_index")), 1);
  assert_int_equal(json_integer_value(json_object_get(j, "created_at")), 99);
  json_decref(j);
  b.len = 0;
  v.is_edit = 1;
  assert_int_equal(openai_encode_completed(&b, &v, &res, &e), 0);
  j = event_data(b.p, "image_edit.completed");
  assert_int_equal(json_integer_value(json_object_get(json_object_get(j, "usage"), "total_tokens")), 149);
  assert_int_equal(json_integer_value(json_object_get(j, "seed")), 7);
  assert_null(json_object_get(j, "partial_image_index"));
  json_decref(j);
  b.len = 0;
  err_set(&what, E_BUSY, "two\nlines");
  assert_int_equal(openai_encode_error_event(&b, &what, &e), 0);
  j = event_data(b.p, "error");
  assert_string_equal(json_string_value(json_object_get(json_object_get(j, "error"), "code")), "queue_full");
  json_decref(j);
  buf_close(&b);
}

/* Addresses instead of files. */
static void test_urls(void **state)
{
  const struct openai_picture pic = {.seed = 7, .url = "/v1/files/\"x"};
  const struct recipe recipe = {.prompt = "", .negative = "", .sampler = "", .sampler_label = "", .model = "", .model_digest = "",
                                .version = ""};
  const struct stage_times times = {0};
  struct openai_result res = {&pic, 1, 0, 0, 0, "", &recipe, &times, IMAGE_WEBP};
  struct err e = {0};
  struct buf b;
  json_t *j, *d;

  (void)state;
  buf_init(&b, 1 << 16);
  assert_int_equal(openai_encode_result(&b, &res, &e), 0);
  j = json_loads(b.p, JSON_REJECT_DUPLICATES, NULL);
  d = json_array_get(json_object_get(j, "data"), 0);
  assert_string_equal(json_string_value(json_object_get(d, "url")), "/v1/files/\"x");
  assert_true(json_is_null(json_object_get(d, "b64_json")));
  assert_string_equal(json_string_value(json_object_get(j, "output_format")), "webp");
  json_decref(j);
  buf_close(&b);
}

/* Every length modulo 3, against jansson and a decoder written the other way round. */
static void test_base64(void **state)
{
  const struct recipe recipe = {.prompt = "", .negative = "", .sampler = "", .sampler_label = "", .model = "", .model_digest = "",
                                .version = ""};
  const struct stage_times times = {0};
  char data[10000];
  struct err e = {0};

  (void)state;
  for (size_t i = 0; i < sizeof data; i++)
    data[i] = (char)(i * 2654435761u >> 11);
  for (size_t len = 0; len < sizeof data; len = len < 8 ? len + 1 : len + 1021) {
    const struct openai_picture pic = {.file = data, .len = len};
    struct openai_result res = {&pic, 1, 0, 0, 0, "", &recipe, &times, IMAGE_PNG};
    struct buf b;
    buf_init(&b, 1 << 16);
    assert_int_equal(openai_encode_result(&b, &res, &e), 0);
    json_t *j = json_loads(b.p, 0, NULL);
    const char *s = json_string_value(json_object_get(json_array_get(json_object_get(j, "data"), 0), "b64_json"));
    assert_int_equal(strlen(s), (len + 2) / 3 * 4);
    unsigned bits = 0;
    size_t got = 0;
    for (size_t i = 0; s[i] && s[i] != '='; i++) {
      unsigned c = (unsigned char)s[i];
      unsigned v = c >= 'a' ? c - 'a' + 26 : c >= 'A' ? c - 'A' : c >= '0' ? c - '0' + 52 : c == '+' ? 62 : 63;
      bits = bits << 6 | v;
      if (i % 4) {
        assert_int_equal((unsigned char)data[got], bits >> (6 - 2 * (i % 4)) & 255);
        got++;
      }
    }
    assert_int_equal(got, len);
    json_decref(j);
    buf_close(&b);
  }
}

static void test_errors(void **state)
{
  static const struct {
    int code, status;
  } map[] = {{E_ARG, 400},   {E_AUTH, 401},     {E_NOTFOUND, 404}, {E_METHOD, 405}, {E_TOOBIG, 413},  {E_TYPE, 415},  {E_BUSY, 429},
             {E_NOMEM, 503}, {E_INTERNAL, 500}, {E_POLICY, 503},   {E_DEVICE, 503}, {E_NOTREADY, 503}, {E_TIMEOUT, 504},
             {E_CONFLICT, 422}, {E_FULL, 507}, {E_CRASHED, 500}, {E_GONE, 499}, {E_ABSENT, 501}, {-999, 500}};
  struct err what = {0}, e = {0};
  struct buf b;
  json_t *root, *j;

  (void)state;
  for (size_t i = 0; i < sizeof map / sizeof *map; i++)
    assert_int_equal(openai_status(map[i].code), map[i].status);
  err_field(&what, E_ARG, "size", "a \"quoted\" \n sentence");
  buf_init(&b, 4096);
  assert_int_equal(openai_encode_error(&b, &what, &e), 0);
  root = json_loads(b.p, 0, NULL);
  j = json_object_get(root, "error");
  assert_string_equal(json_string_value(json_object_get(j, "message")), "a \"quoted\" \n sentence");
  assert_string_equal(json_string_value(json_object_get(j, "type")), "invalid_request_error");
  assert_string_equal(json_string_value(json_object_get(j, "param")), "size");
  assert_string_equal(json_string_value(json_object_get(j, "code")), "invalid_value");
  json_decref(root);
  buf_close(&b);
}

static void test_models(void **state)
{
  static const char *const samplers[] = {"ddim", "euler", NULL};
  struct openai_model m = {&limits, 99, samplers, "", "1"};
  struct err e = {0};
  struct buf b;
  json_t *j, *d;

  (void)state;
  buf_init(&b, 4096);
  assert_int_equal(openai_encode_models(&b, NULL, &e), 0);
  assert_string_equal(b.p, "{\"object\":\"list\",\"data\":[]}");
  buf_close(&b);
  assert_int_equal(openai_encode_models(&b, &m, &e), 0);
  j = json_loads(b.p, 0, NULL);
  d = json_array_get(json_object_get(j, "data"), 0);
  assert_string_equal(json_string_value(json_object_get(d, "id")), "emoji");
  assert_string_equal(json_string_value(json_object_get(d, "object")), "model");
  assert_int_equal(json_array_size(json_object_get(json_object_get(d, "safelight"), "samplers")), 2);
  json_decref(j);
  buf_close(&b);
}

int main(void)
{
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_defaults), cmocka_unit_test(test_everything), cmocka_unit_test(test_null_is_absent),
      cmocka_unit_test(test_prompt),   cmocka_unit_test(test_bounds),     cmocka_unit_test(test_size),
      cmocka_unit_test(test_words),    cmocka_unit_test(test_offers),     cmocka_unit_test(test_jobs),
      cmocka_unit_test(test_unknown_and_safety), cmocka_unit_test(test_loras), cmocka_unit_test(test_not_json),
      cmocka_unit_test(test_result),   cmocka_unit_test(test_base64),     cmocka_unit_test(test_errors),
      cmocka_unit_test(test_models),   cmocka_unit_test(test_events),     cmocka_unit_test(test_urls),
  };

  lim = limits;
  return cmocka_run_group_tests(tests, NULL, NULL);
}
