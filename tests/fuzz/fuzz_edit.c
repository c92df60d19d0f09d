/*
 * fuzz_edit.c - the forms of POST /v1/images/edits: whatever parts come, openai_decode_edit accepts them within its bounds or refuses them with a sentence
 * that encodes as JSON; what it keeps of the files lies in the body.
 *
 * links: proto/openai_edit.c proto/multipart.c proto/openai.c proto/openai_encode.c proto/sse.c proto/json_add.c proto/field.c proto/first.c
 * links: proto/request.c proto/base64.c base/buf.c base/err.c base/json_load.c
 */
#include <stdlib.h>
#include <string.h>

#include "proto/multipart.h"
#include "proto/openai.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void must(int ok)
{
  if (!ok)
    abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
  static const struct request_limits lim = {.default_size = 128, .size_multiple = 8, .max_size = 256, .default_steps = 20, .max_steps = 50,
                                            .default_guidance = 3, .max_guidance = 20, .max_n = 4, .default_sampler = "dpmpp_2m", .model = "emoji",
                                            .offers = REQUEST_OFFERS_FORMATS | REQUEST_OFFERS_URL | REQUEST_OFFERS_STREAM};
  static struct request r;
  static struct multipart form;
  struct first first;
  struct err e = {0}, e2 = {0};
  struct buf b;
  char *body = malloc(size ? size : 1);

  must(body != NULL);
  memcpy(body, data, size);
  memset(&r, 0x55, sizeof r);
  if (!multipart_parse(&form, "multipart/form-data; boundary=b", body, size, &e) && !openai_decode_edit(&r, &first, &form, &lim, &e)) {
    must(strlen(r.prompt) == r.prompt_len && r.prompt_len <= REQUEST_PROMPT_MAX && r.strength >= 0 && r.strength <= 1 && r.n >= 1 && r.n <= 4);
    must((!r.width && !r.height) || (r.width >= 8 && r.width <= 256 && r.height >= 8 && r.height <= 256));
    for (int i = 0; i < FIRST_FILES; i++) {
      const char *p = (const char *)first.file[i].p;
      must(!p || (p >= body && p + first.file[i].len <= body + size && first.file[i].len && !first.file[i].owned));
    }
    must(first.file[FIRST_INIT].p != NULL);
    first_close(&first);
  } else {
    must(e.code < 0 && *e.msg);
    buf_init(&b, 16384);
    must(!openai_encode_error(&b, &e, &e2));
    buf_close(&b);
  }
  free(body);
  return 0;
}
