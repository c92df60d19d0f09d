/*
 * fuzz_sdapi.c - the bodies of A1111's routes and the files of png-info: whatever bytes come, they are accepted within the server's bounds or refused with
 * a sentence that encodes as JSON. The first byte picks the route.
 *
 * links: proto/sdapi.c proto/sdapi_fields.c proto/sdapi_lists.c proto/sdapi_encode.c proto/sdapi_info.c proto/png_text.c
 * links: proto/openai_encode.c proto/sse.c proto/json_add.c proto/image_text.c proto/field.c proto/first.c proto/request.c proto/base64.c
 * links: base/buf.c base/err.c base/json_load.c
 */
#include <stdlib.h>
#include <string.h>

#include "proto/sdapi.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void must(int ok)
{
  if (!ok)
    abort();
}

static const struct request_limits lim = {.default_size = 128, .size_multiple = 8, .max_size = 256, .default_steps = 20, .max_steps = 50, .default_guidance = 3,
                                          .max_guidance = 20, .max_n = 4, .default_sampler = "dpmpp_2m", .model = "emoji", .offers = REQUEST_OFFERS_FORMATS};

static void check(const struct request *r, const struct sdapi_extra *x, const struct first *f)
{
  must(strlen(r->prompt) == r->prompt_len && r->prompt_len <= REQUEST_PROMPT_MAX && strlen(r->negative) == r->negative_len);
  must(memchr(r->sampler, 0, sizeof r->sampler) != NULL);
  must((r->width >= 8 && r->width <= 256 && r->width % 8 == 0 && r->height >= 8 && r->height <= 256 && r->height % 8 == 0) ||
       (x->is_img2img && !r->width && !r->height));
  must(r->steps >= 1 && r->steps <= 50 && r->n >= 1 && r->n <= 4 && r->n == x->batch_size * x->n_iter && r->guidance >= 0 && r->guidance <= 20);
  must(r->strength >= 0 && r->strength <= 1 && r->n_loras >= 0 && r->n_loras <= REQUEST_LORAS_MAX && !x->is_img2img == !f->file[FIRST_INIT].p);
  must(f->blur_x >= 0 && f->blur_x <= 64 && f->blur_y >= 0 && f->blur_y <= 64 && f->padding >= 0 && f->padding <= FIRST_MAX_SIDE);
  must(!f->is_only_masked || (f->file[FIRST_INIT].p && f->file[FIRST_MASK].p && r->width));
  for (int i = 0; i < r->n_loras; i++)
    must(*r->lora[i].name && strlen(r->lora[i].name) < REQUEST_LORA_NAME && r->lora[i].scale >= -100 && r->lora[i].scale <= 100);
}

/* An answer must be possible for whatever was accepted. */
static void answer(const struct request *r, const struct sdapi_extra *x)
{
  const struct recipe recipe = {.prompt = r->prompt, .negative = r->negative, .sampler = "ddim", .sampler_label = "DDIM", .model = "emoji", .model_digest = "",
                                .version = "", .steps = r->steps, .width = r->width, .height = r->height, .guidance = r->guidance};
  const struct openai_picture pic[4] = {{.file = "x", .len = 1}, {.file = "x", .len = 1}, {.file = "x", .len = 1}, {.file = "x", .len = 1}};
  const struct sdapi_result res = {pic, r->n, r, x, &recipe, 0};
  struct err e = {0};
  struct buf b;

  buf_init(&b, 1 << 22);
  must(!sdapi_encode_result(&b, &res, &e) && b.p[0] == '{' && b.p[b.len - 1] == '}');
  buf_close(&b);
}

static int one(unsigned route, const char *body, size_t len, struct err *e)
{
  static const struct sdapi_server server = {.lim = &lim, .digest = "", .filename = "", .version = ""};
  static struct request r;
  struct sdapi_extra x;
  struct first first;
  uint8_t *file;
  size_t n;
  struct buf b;
  int ret;

  switch (route % 5) {
  case 0: case 1:
    memset(&r, 0x55, sizeof r);
    ret = sdapi_decode(&r, &x, &first, route % 5, body, len, &lim, e);
    if (ret)
      return ret;
    check(&r, &x, &first);
    answer(&r, &x);
    first_close(&first);
    return 0;
  case 2: return sdapi_decode_options(body, len, &server, e);
  case 3:
    ret = sdapi_decode_png_info(&file, &n, body, len, e);
    free(ret ? NULL : file);
    return ret;
  default:
    buf_init(&b, 1 << 20);
    ret = sdapi_encode_png_info(&b, (const uint8_t *)body, len, e);
    buf_close(&b);
    return ret == E_TOOBIG ? E_ARG : ret;
  }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
  struct err e = {0}, e2 = {0};
  struct buf b;
  char *body;

  if (!size)
    return 0;
  body = malloc(size); /* its own block, so that reading past the end shows */
  must(body != NULL);
  memcpy(body, data + 1, size - 1);
  if (one(data[0], body, size - 1, &e)) {
    must(e.code == E_ARG && *e.msg);
    buf_init(&b, 16384);
    must(!sdapi_encode_error(&b, &e, &e2) && b.p[0] == '{' && b.p[b.len - 1] == '}');
    buf_close(&b);
  }
  free(body);
  return 0;
}
