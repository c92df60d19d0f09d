/*
 * encode.c - see encode.h.
 */
#include "server/encode.h"

#include <sodium.h>
#include <string.h>
#include <time.h>

#include "server/version.h"

struct recipe encoder_recipe(const struct job *j, int i, const struct serving *s)
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
      .generation_id = j->stamp.id,
      .generation_digest = j->stamp.digest,
      .profile = j->stamp.profile,
      .styles = j->styles,
      .requires_nothing = j->stamp.requires_nothing,
  };
}

static int encode_png(struct encoder *n, struct job *j, int i, struct buf *out, struct err *e)
{
  const struct serving *s = &n->worker->serving; /* published before the first job was admitted */
  struct recipe recipe = encoder_recipe(j, i, s);

  return image_encode_picture(n->image, out, j->pic[i].rgb, &recipe, n->detail, e);
}

static int encode_json(struct encoder *n, struct job *j, const struct buf *png, struct err *e)
{
  const struct serving *s = &n->worker->serving;
  struct openai_picture pic[REQUEST_N_MAX];
  struct recipe recipe = encoder_recipe(j, 0, s);
  int f = s->info->vae_factor;
  struct openai_result res = {
      .picture = pic,
      .n = j->req.n,
      .created = (int64_t)time(NULL),
      .text_tokens = j->tokens,
      .image_tokens = j->req.n * (j->req.width / f) * (j->req.height / f),
      .request_id = j->id,
      .recipe = &recipe,
      .times = &j->times,
  };

  for (int i = 0; i < j->req.n; i++)
    pic[i] = (struct openai_picture){.file = png[i].p, .len = png[i].len, .seed = j->pic[i].seed};
  return openai_encode_result(&j->body, &res, e);
}

/* The record of picture i, in the log before the picture is on its way. */
static int record_picture(struct encoder *n, const struct job *j, int i, struct err *e)
{
  struct audit_style style[POLICY_STYLES_MAX];
  unsigned char sum[32];
  char image[65];
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
      .verdict = j->stamp.requires_nothing ? "served without safety (evaluation profile)" : "served",
      .image_digest = image,
  };

  crypto_generichash(sum, sizeof sum, j->pic[i].rgb, (size_t)j->req.width * (size_t)j->req.height * 3, NULL, 0);
  sodium_bin2hex(image, sizeof image, sum, sizeof sum);
  return audit_add(n->audit, &r, e);
}

static void encode(struct encoder *n, struct job *j)
{
  struct buf png[REQUEST_N_MAX];
  struct err *e = &j->err;
  int64_t t = clock_ns();
  int r = 0;

  for (int i = 0; i < REQUEST_N_MAX; i++)
    buf_init(&png[i], j->body.max);
  for (int i = 0; i < j->req.n && !r; i++)
    r = encode_png(n, j, i, j->wants_png ? &j->body : &png[i], e);
  j->times.png = (double)(clock_ns() - t) / 1e6;
  j->times.total = (double)(clock_ns() - j->submitted_ns) / 1e6;
  if (!r && !j->wants_png)
    r = encode_json(n, j, png, e);
  for (int i = 0; i < j->req.n && !r; i++)
    r = record_picture(n, j, i, e);
  if (r)
    buf_close(&j->body);
  for (int i = 0; i < REQUEST_N_MAX; i++)
    buf_close(&png[i]);
}

static void *run(void *arg)
{
  struct encoder *n = arg;
  struct job *j;

  thread_self = THREAD_ENCODE;
  while ((j = job_next_drawn(n->jobs))) {
    encode(n, j);
    job_finish(n->jobs, j);
  }
  return NULL;
}

int encoder_start(struct encoder *n, struct jobs *js, const struct worker *w, struct audit *audit, struct err *e)
{
  const char *metadata = w->cfg->metadata;

  *n = (struct encoder){.jobs = js, .worker = w, .audit = audit};
  n->detail = !strcmp(metadata, "full") ? IMAGE_FULL : !strcmp(metadata, "no_prompts") ? IMAGE_NO_PROMPTS : IMAGE_PROVENANCE;
  if (image_open(&n->image, e))
    return e->code;
  if (thread_start(&n->thread, "encoder", run, n, e)) {
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
