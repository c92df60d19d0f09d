/*
 * fuzz_json.c - request bodies: whatever bytes come, openai_decode accepts them within its own bounds or refuses them with a
 * sentence, and the refusal encodes as JSON.
 *
 * links: proto/openai.c proto/openai_encode.c proto/sse.c proto/json_add.c proto/field.c proto/first.c
 * links: proto/request.c proto/base64.c base/buf.c base/err.c base/json_load.c
 */
#include <stdlib.h>
#include <string.h>

#include "proto/openai.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void must(int ok)
{
  if (!ok)
    abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
  static const struct request_limits lim = {.default_size = 128, .size_multiple = 8, .max_size = 256, .default_steps = 20,
                                            .max_steps = 50, .default_guidance = 3, .max_guidance = 20, .max_n = 4,
                                            .default_sampler = "dpmpp_2m", .model = "emoji"};
  static struct request r;
  struct err e = {0}, e2 = {0};
  struct buf b;
  char *body = malloc(size ? size : 1); /* its own block, so that reading past the end shows */

  must(body != NULL);
  memcpy(body, data, size);
  memset(&r, 0x55, sizeof r);
  if (!openai_decode(&r, body, size, &lim, &e)) {
    must(r.prompt_len <= REQUEST_PROMPT_MAX && strlen(r.prompt) == r.prompt_len);
    must(r.negative_len <= REQUEST_PROMPT_MAX && strlen(r.negative) == r.negative_len);
    must(memchr(r.sampler, 0, sizeof r.sampler) != NULL);
    must(r.width >= 8 && r.width <= 256 && r.width % 8 == 0 && r.height >= 8 && r.height <= 256 && r.height % 8 == 0);
    must(r.steps >= 1 && r.steps <= 50 && r.n >= 1 && r.n <= 4 && r.guidance >= 0 && r.guidance <= 20);
    must(r.karras >= -1 && r.karras <= 1 && r.clip_skip >= 0 && r.clip_skip <= REQUEST_CLIP_SKIP_MAX);
  } else {
    must((e.code == E_ARG || e.code == E_NOTFOUND) && *e.msg);
    buf_init(&b, 8192);
    must(!openai_encode_error(&b, &e, &e2));
    must(b.len > 20 && b.p[0] == '{' && b.p[b.len - 1] == '}');
    buf_close(&b);
  }
  free(body);
  return 0;
}
