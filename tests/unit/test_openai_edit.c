/*
 * test_openai_edit.c - POST /v1/images/edits: forms as clients send them, and what is refused of them. Threads: none.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "proto/multipart.h"
#include "proto/openai.h"

static const struct request_limits lim = {.default_size = 128, .size_multiple = 8, .max_size = 256, .default_steps = 20, .max_steps = 50,
                                          .default_guidance = 3, .max_guidance = 20, .max_n = 4, .default_sampler = "dpmpp_2m", .model = "emoji",
                                          .offers = REQUEST_OFFERS_FORMATS | REQUEST_OFFERS_URL | REQUEST_OFFERS_STREAM};
static struct request r;
static struct first first;
static char body[40000];

/* Parts as name, value, name, value, ..., NULL; image and mask are files. */
static int decode(const char *const *parts, struct err *e)
{
  static struct multipart form;
  size_t n = 0;

  *e = (struct err){0};
  for (; *parts; parts += 2)
    n += (size_t)snprintf(body + n, sizeof body - n, "--b\r\nContent-Disposition: form-data; name=\"%s\"%s\r\n\r\n%s\r\n", parts[0],
                          strncmp(parts[0], "image", 5) && strcmp(parts[0], "mask") ? "" : "; filename=\"x.png\"\r\nContent-Type: image/png", parts[1]);
  n += (size_t)snprintf(body + n, sizeof body - n, "--b--\r\n");
  assert_int_equal(multipart_parse(&form, "multipart/form-data; boundary=b", body, n, e), 0);
  memset(&r, 0x55, sizeof r);
  return openai_decode_edit(&r, &first, &form, &lim, e);
}

#define GOOD(...) good((const char *const[]){__VA_ARGS__, NULL})
#define BAD(field, text, ...) bad(field, text, (const char *const[]){__VA_ARGS__, NULL})

static void good(const char *const *parts)
{
  struct err e;

  if (decode(parts, &e))
    fail_msg("%s was refused: %s", parts[0], e.msg);
}

static void bad(const char *field, const char *text, const char *const *parts)
{
  struct err e;

  if (!decode(parts, &e))
    fail_msg("a wrong %s was accepted", field);
  if (e.code != E_ARG || strcmp(e.field, field) || !strstr(e.msg, text))
    fail_msg("gave code %d, field \"%s\", \"%s\"; expected \"%s\", \"%s\"", e.code, e.field, e.msg, field, text);
  assert_null(first.file[FIRST_INIT].p);
}

static void test_edits(void **state)
{
  (void)state;
  GOOD("image", "PICTURE", "prompt", "a cat");
  assert_memory_equal(first.file[FIRST_INIT].p, "PICTURE", 7);
  assert_int_equal(first.file[FIRST_INIT].len, 7);
  assert_null(first.file[FIRST_MASK].p);
  assert_true(first.mask == FIRST_MASK_ALPHA && r.strength == 0.75f && r.width == 0 && r.reply == REPLY_JSON);
  first_close(&first);
  GOOD("prompt", "3", "image[]", "P", "mask", "M", "n", "2", "size", "64x72", "response_format", "url", "user", "7", "quality", "high");
  assert_string_equal(r.prompt, "3"); /* a text that looks like a number stays one */
  assert_true(r.n == 2 && r.width == 64 && r.height == 72 && r.strength == 1 && r.reply == REPLY_URL);
  assert_memory_equal(first.file[FIRST_MASK].p, "M", 1);
  first_close(&first);
  GOOD("image", "P", "prompt", "true", "stream", "true", "partial_images", "2", "seed", "12", "steps", "9", "guidance_scale", "1.5", "negative_prompt", "{}",
       "sampler", "ddim", "karras", "false", "clip_skip", "2", "loras", "[{\"name\":\"ink\"}]", "output_format", "webp", "output_compression", "50",
       "strength", "0.5", "input_fidelity", "high", "metadata", "{\"k\":1}", "model", "emoji");
  assert_true(r.reply == REPLY_STREAM && r.previews == 2 && r.seed == 12 && r.steps == 9 && r.guidance == 1.5f && r.karras == 0 && r.clip_skip == 2 &&
              r.n_loras == 1 && r.format == IMAGE_WEBP && r.quality == 50 && r.strength == 0.5f);
  assert_string_equal(r.negative, "{}");
  first_close(&first);
}

static void test_refused(void **state)
{
  static char long_text[REQUEST_PROMPT_MAX + 2];

  (void)state;
  BAD("image", "required", "prompt", "a");
  BAD("image", "empty", "image", "", "prompt", "a");
  BAD("image", "twice", "image[]", "P", "image[]", "P", "prompt", "a");
  BAD("image", "twice", "image", "P", "image[]", "P", "prompt", "a");
  BAD("prompt", "required", "image", "P");
  BAD("prompt", "twice", "image", "P", "prompt", "a", "prompt", "b");
  BAD("prompt", "UTF-8", "image", "P", "prompt", "\xff");
  BAD("n", "integer", "image", "P", "prompt", "a", "n", "two");
  BAD("n", "integer", "image", "P", "prompt", "a", "n", "");
  BAD("n", "between 1 and 4", "image", "P", "prompt", "a", "n", "5");
  BAD("stream", "true or false", "image", "P", "prompt", "a", "stream", "True");
  BAD("strength", "between 0 and 1", "image", "P", "prompt", "a", "strength", "2");
  BAD("size", "WIDTHxHEIGHT", "image", "P", "prompt", "a", "size", "64");
  BAD("denoising_strength", "strength", "image", "P", "prompt", "a", "denoising_strength", "0.5");
  BAD("safety", "policy", "image", "P", "prompt", "a", "safety", "off");
  BAD("banana", "unknown", "image", "P", "prompt", "a", "banana", "1");
  BAD("loras[0]", "nothing else", "image", "P", "prompt", "a", "loras", "[{\"name\":\"ink\",\"required\":false}]");
  memset(long_text, 'x', sizeof long_text - 1);
  BAD("prompt", "16384", "image", "P", "prompt", long_text);
}

/* What a form can do that JSON cannot: a prompt as a file, NUL bytes. */
static void test_forms(void **state)
{
  static const char file[] = "--b\r\nContent-Disposition: form-data; name=\"image\"\r\n\r\nP\r\n"
                             "--b\r\nContent-Disposition: form-data; name=\"prompt\"; filename=\"p.txt\"\r\n\r\na\r\n--b--\r\n";
  static const char nul[] = "--b\r\nContent-Disposition: form-data; name=\"image\"\r\n\r\nP\r\n"
                            "--b\r\nContent-Disposition: form-data; name=\"prompt\"\r\n\r\na\0b\r\n--b--\r\n";
  static struct multipart form;
  struct err e = {0};

  (void)state;
  assert_int_equal(multipart_parse(&form, "multipart/form-data; boundary=b", file, sizeof file - 1, &e), 0);
  assert_int_equal(openai_decode_edit(&r, &first, &form, &lim, &e), E_ARG);
  assert_string_equal(e.field, "prompt");
  e = (struct err){0};
  assert_int_equal(multipart_parse(&form, "multipart/form-data; boundary=b", nul, sizeof nul - 1, &e), 0);
  assert_int_equal(openai_decode_edit(&r, &first, &form, &lim, &e), E_ARG);
  assert_non_null(strstr(e.msg, "NUL"));
}

int main(void)
{
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_edits), cmocka_unit_test(test_refused), cmocka_unit_test(test_forms)};

  return cmocka_run_group_tests(tests, NULL, NULL);
}
