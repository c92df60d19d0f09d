/*
 * encode.c - see encode.h.
 */
#include "server/encode.h"

#include <sodium.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "proto/first.h"
#include "server/log.h"
#include "server/metrics.h"
#include "server/surface.h"
#include "server/version.h"

enum { IMAGE_DIGEST = 65 /* 32 bytes in hex */ };

/* What was asked for, which holds from the first step on: it can be read while the device thread still draws. */
static struct recipe asked(const struct job *j, int i, const struct serving *s)
{
  const struct request *q = &j->req;

  return (struct recipe){
      .prompt = q->prompt,
      .negative = q->negative,
      .sampler = sampler_name(j->sampler),
      .sampler_label = sampler_label(j->sampler),
      .model = s->limits.model,
      .model_digest = s->info->digest,
      .version = SAFELIGHT_VERSION,
      .seed = j->pic[i].seed,
      .karras = j->karras,
      .steps = q->steps,
      .width = q->width,
      .height = q->height,
      .clip_skip = q->clip_skip,
      .guidance = q->guidance,
      .strength = q->init ? q->strength : 0,
      .format = q->format,
      .quality = q->quality,
      .generation_id = j->stamp.id,
      .generation_digest = j->stamp.digest,
      .profile = j->stamp.profile,
      .styles = j->styles,
      .requires_nothing = j->stamp.requires_nothing,
  };
}

struct recipe encoder_recipe(const struct job *j, int i, const struct serving *s)
{
  struct recipe r = asked(j, i, s);

  r.cut_at = j->pic[i].cut_at;
  return r;
}

/* What the audit log knows a picture's pixels by. */
static void digest(char text[IMAGE_DIGEST], const uint8_t *rgb, int w, int h)
{
  unsigned char sum[32];

  crypto_generichash(sum, sizeof sum, rgb, (size_t)w * (size_t)h * 3, NULL, 0);
  sodium_bin2hex(text, IMAGE_DIGEST, sum, sizeof sum);
}

/* The file of picture i, and the digest of what it shows: of the whole, where what was drawn is a part of a picture. */
static int encode_file(struct encoder *n, struct job *j, int i, char image[IMAGE_DIGEST], struct err *e)
{
  struct recipe recipe = encoder_recipe(j, i, &n->worker->serving); /* published before the first job was admitted */
  const struct request_whole *whole = &j->req.whole;
  const uint8_t *rgb = j->pic[i].rgb;
  uint8_t *put = NULL;
  int r = 0;

  if (whole->rgb) {
    r = first_put_back(&put, &j->req, rgb, e);
    rgb = put;
    recipe.file_width = whole->width;
    recipe.file_height = whole->height;
  }
  if (!r)
    digest(image, rgb, whole->rgb ? whole->width : recipe.width, whole->rgb ? whole->height : recipe.height);
  r = r ? r : image_encode_picture(n->image, &j->file[i], rgb, &recipe, n->detail, e);
  free(put);
  return r;
}

/* The files go where they are served from for a while. Nobody knows their names before the answer has left, which the audit record comes before. */
static int store_files(struct encoder *n, struct job *j, struct err *e)
{
  struct err why = {0};

  for (int i = 0; i < j->req.n; i++) {
    struct store_file f = {.format = j->req.format, .data = j->file[i].p, .bytes = j->file[i].len};
    if (store_put_file(n->store, &f, &why)) {
      log_event("a picture behind an address cannot be kept: %s", why.msg);
      return err_set(e, why.code, "the server cannot keep the picture, ask for response_format b64_json: %s", why.msg);
    }
    memcpy(j->file_name[i], f.name, sizeof f.name);
    buf_close(&j->file[i]);
  }
  return 0;
}

/* The record of picture i, in the log before the picture is on its way. */
static int record_picture(struct encoder *n, const struct job *j, int i, const char *image, const char *verdict, struct err *e)
{
  struct audit_style style[POLICY_STYLES_MAX];
  struct audit_record r = {
      .kind = AUDIT_IMAGE,
      .tenant = safety_target_tenant(j->target),
      .profile = j->stamp.profile,
      .request_id = j->id,
      .prompt = j->req.prompt,
      .negative = j->req.negative,
      .seed = j->pic[i].seed,
      .model_digest = n->worker->serving.info->digest,
      .generation_id = j->stamp.id,
      .generation_digest = j->stamp.digest,
      .style = style,
      .n_styles = safety_target_styles(j->target, style, POLICY_STYLES_MAX),
      .verdict = verdict,
      .image_digest = image,
  };

  return audit_add(n->audit, &r, e);
}

/* What the log says of picture i. */
static const char *verdict_of(const struct job *j, int i)
{
  if (j->pic[i].cut_at)
    return j->stamp.requires_nothing ? "interrupted, served without safety (evaluation profile)" : "interrupted, served as it was";
  return j->stamp.requires_nothing ? "served without safety (evaluation profile)" : "served";
}

static void count(const struct job *j)
{
  metric_observe_ms(METRIC_STAGE_SECONDS, STAGE_QUEUE, j->times.queue);
  metric_observe_ms(METRIC_STAGE_SECONDS, STAGE_TEXT, j->times.text);
  metric_observe_ms(METRIC_STAGE_SECONDS, STAGE_UNET, j->times.unet);
  metric_observe_ms(METRIC_STAGE_SECONDS, STAGE_VAE, j->times.vae);
  metric_observe_ms(METRIC_STAGE_SECONDS, STAGE_ENCODE, j->times.png);
  metric_add(METRIC_PICTURES, 0, (uint64_t)atomic_load(&j->drawn));
}

static void encode(struct encoder *n, struct job *j)
{
  char image[REQUEST_N_MAX][IMAGE_DIGEST];
  struct err *e = &j->err;
  int64_t t = clock_ns(), audit;
  int r = 0;

  if (j->wants_file && !j->pic[0].has_pixels) /* cut before its first step: there is no file to answer with */
    r = job_stop_reason(e, E_CANCEL);
  for (int i = 0; i < j->req.n && !r; i++)
    if (j->pic[i].has_pixels)
      r = encode_file(n, j, i, image[i], e);
  j->times.png = (double)(clock_ns() - t) / 1e6;
  if (!r && j->req.reply == REPLY_URL && j->surface->gives_urls)
    r = store_files(n, j, e);
  j->times.total = (double)(clock_ns() - j->submitted_ns) / 1e6;
  if (!r && !j->wants_file && j->surface->encode)
    r = j->surface->encode(j, &n->worker->serving, e);
  audit = clock_ns();
  for (int i = 0; i < j->req.n && !r; i++)
    if (j->pic[i].has_pixels)
      r = record_picture(n, j, i, image[i], verdict_of(j, i), e);
  if (!r) {
    metric_observe(METRIC_STAGE_SECONDS, STAGE_AUDIT, clock_ns() - audit);
    count(j);
    return;
  }
  buf_close(&j->body);
  for (int i = 0; i < REQUEST_N_MAX; i++)
    buf_close(&j->file[i]);
}

/* A preview's file, in memory that several readers may share. NULL: there is none. */
static struct blob *preview_blob(struct encoder *n, struct job *j, struct err *e)
{
  struct recipe recipe = asked(j, j->preview_picture, &n->worker->serving);
  struct blob *b = NULL;
  struct buf file;

  buf_init(&file, j->body.max);
  if (!image_encode_picture(n->image, &file, j->preview_rgb, &recipe, IMAGE_PROVENANCE, e))
    b = malloc(sizeof *b + file.len);
  if (b) {
    *b = (struct blob){.refs = 1, .picture = j->preview_picture, .step = j->preview_step, .format = j->req.format, .len = file.len};
    memcpy(b->data, file.p, file.len);
  }
  buf_close(&file);
  return b;
}

/* A preview is a picture that leaves: it is drawn under the same generation, and the first of a job has its record before anybody sees it. */
static void encode_preview(struct encoder *n, struct job *j)
{
  struct err ignored = {0}; /* without a preview the picture goes on */
  char image[IMAGE_DIGEST];
  struct blob *b = NULL;

  if (!j->is_preview_recorded) {
    digest(image, j->preview_rgb, j->req.width, j->req.height);
    j->is_preview_recorded = !record_picture(n, j, j->preview_picture, image, "preview", &ignored);
  }
  if (j->is_preview_recorded)
    b = preview_blob(n, j, &ignored);
  metric_add(METRIC_PREVIEWS, 0, b != NULL);
  job_add_preview(n->jobs, j, b);
}

static void *run(void *arg)
{
  struct encoder *n = arg;
  struct parcel *p;

  thread_self = THREAD_ENCODE;
  while ((p = parcel_next(n->jobs))) {
    if (p->is_preview) {
      encode_preview(n, p->job);
      continue;
    }
    if (!p->job->err.code)
      encode(n, p->job);
    job_finish(n->jobs, p->job);
  }
  return NULL;
}

int encoder_start(struct encoder *n, struct jobs *js, const struct worker *w, struct audit *audit, struct store *store,
                  struct err *e)
{
  const char *metadata = w->cfg->metadata;

  *n = (struct encoder){.jobs = js, .worker = w, .audit = audit, .store = store};
  n->detail = !strcmp(metadata, "full") ? IMAGE_FULL : !strcmp(metadata, "no_prompts") ? IMAGE_NO_PROMPTS : IMAGE_PROVENANCE;
  if (image_open(&n->image, e))
    return e->code;
  if ((!strcmp(w->cfg->png, "small") && image_set_small(n->image, e)) || thread_start(&n->thread, "encoder", run, n, e)) {
    image_close(n->image);
    n->image = NULL;
    return e->code;
  }
  n->is_running = 1;
  return 0;
}

void encoder_join(struct encoder *n)
{
  if (n->is_running)
    pthread_join(n->thread, NULL);
  image_close(n->image);
  *n = (struct encoder){0};
}
