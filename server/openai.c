/*
 * openai.c - see openai.h, and the answers of that surface. proto/openai.h has the wire format.
 *
 * Threads: decoding on the HTTP thread, answers on the encoder thread; previews on the HTTP thread.
 */
#include "server/openai.h"

#include <time.h>

#include "proto/multipart.h"
#include "server/encode.h"

/* The result as the wire format wants it; pic has room for its pictures. */
static struct openai_result result_of(struct job *j, const struct serving *s, const struct recipe *recipe, const char *const *url,
                                      struct openai_picture *pic)
{
  int f = s->info->vae_factor;

  for (int i = 0; i < j->req.n; i++)
    pic[i] = (struct openai_picture){.file = j->file[i].p, .len = j->file[i].len, .seed = j->pic[i].seed, .url = url ? url[i] : NULL};
  return (struct openai_result){
      .picture = pic,
      .n = j->req.n,
      .created = (int64_t)time(NULL),
      .text_tokens = j->tokens,
      .image_tokens = j->req.n * (j->req.width / f) * (j->req.height / f),
      .request_id = j->id,
      .recipe = recipe,
      .times = &j->times,
      .format = j->req.format,
  };
}

static struct openai_event event_of(const struct job *j, const char *file, size_t len, int picture)
{
  return (struct openai_event){
      .file = file,
      .len = len,
      .format = j->req.format,
      .width = j->req.width,
      .height = j->req.height,
      .picture = picture,
      .is_edit = j->req.init != NULL,
      .created = (int64_t)time(NULL),
  };
}

/* The result with the addresses of files in the store. */
static int encode_urls(struct job *j, const struct serving *s, struct err *e)
{
  char url[REQUEST_N_MAX][JOB_BASE + STORE_NAME + 16];
  const char *urls[REQUEST_N_MAX];

  for (int i = 0; i < j->req.n; i++) {
    snprintf(url[i], sizeof url[i], "%s/v1/files/%s", j->base, j->file_name[i]);
    urls[i] = url[i];
  }
  return openai_encode_job(j, s, urls, e);
}

static int encode(struct job *j, const struct serving *s, struct err *e)
{
  struct openai_picture pic[REQUEST_N_MAX];
  struct recipe recipe = encoder_recipe(j, 0, s);
  struct openai_result res = result_of(j, s, &recipe, NULL, pic);
  int r = 0;

  if (j->req.reply == REPLY_URL)
    return encode_urls(j, s, e);
  if (j->req.reply == REPLY_JSON)
    return openai_encode_result(&j->body, &res, e);
  res.image_tokens /= j->req.n;
  for (int i = 0; i < j->req.n && !r; i++) {
    struct openai_event v = event_of(j, j->file[i].p, j->file[i].len, i);
    recipe = encoder_recipe(j, i, s);
    r = openai_encode_completed(&j->body, &v, &res, e);
  }
  return r;
}

int openai_encode_job(struct job *j, const struct serving *s, const char *const *url, struct err *e)
{
  struct openai_picture pic[REQUEST_N_MAX];
  struct recipe recipe = encoder_recipe(j, 0, s);
  struct openai_result res = result_of(j, s, &recipe, url, pic);

  return openai_encode_result(&j->body, &res, e);
}

static int encode_preview(struct buf *out, const struct job *j, const struct blob *b, struct err *e)
{
  struct openai_event v = event_of(j, b->data, b->len, b->picture);

  return openai_encode_partial(out, &v, b->number - 1, e);
}

const struct surface surface_openai = {
    .name = "openai",
    .gives_urls = 1,
    .encode = encode,
    .encode_error = openai_encode_error,
    .encode_preview = encode_preview,
    .encode_error_event = openai_encode_error_event,
};

static int decode_generation(struct job *j, struct first *first, const struct drawing_body *b, const struct request_limits *lim, struct err *e)
{
  (void)first;
  return openai_decode(&j->req, b->p, b->len, lim, e);
}

const struct drawing openai_generations = {.surface = &surface_openai, .decode = decode_generation};

static int decode_edit(struct job *j, struct first *first, const struct drawing_body *b, const struct request_limits *lim, struct err *e)
{
  struct multipart form;

  return multipart_parse(&form, b->type, b->p, b->len, e) || openai_decode_edit(&j->req, first, &form, lim, e) ? e->code : 0;
}

const struct drawing openai_edits = {.surface = &surface_openai, .decode = decode_edit};
