/*
 * drawing.c - see drawing.h.
 */
#include "server/drawing.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#include "server/audit.h"
#include "server/log.h"
#include "server/metrics.h"

void drawing_refused(struct audit *a, const struct safety_target *t, const char *tenant, const char *id, const struct err *why)
{
  struct audit_style style[POLICY_STYLES_MAX];
  struct audit_record r = {
      .kind = AUDIT_REFUSAL,
      .tenant = t ? safety_target_tenant(t) : tenant,
      .profile = t ? safety_target_profile(t) : "",
      .request_id = id,
      .style = style,
      .n_styles = t ? safety_target_styles(t, style, POLICY_STYLES_MAX) : 0,
      .verdict = "refused",
      .reason = why->msg,
  };
  struct err ignored = {0};
  int code = why->code;

  metric_refuse(code);
  if (code == E_BUSY || code == E_NOTREADY || code == E_CANCEL || code == E_GONE || code == E_TIMEOUT || code == E_FULL)
    return;
  if (audit_note(a, &r, &ignored))
    log_event("a refusal could not be recorded: %s", ignored.msg);
}

static int draw_seed(struct request *q, struct err *e)
{
  uint32_t seed;

  if (q->has_seed)
    return 0;
  if (getrandom(&seed, sizeof seed, 0) != sizeof seed)
    return err_set(e, E_INTERNAL, "no random numbers: %s", strerror(errno));
  q->seed = seed; /* 32 bits: every client and every A1111 user can send it back */
  return 0;
}

/* Draws of all pictures, which share what they can; the job owns them, also after failure. */
MUST_CHECK static int prepare_draws(struct job *j, const struct serving *s, struct draw_params *p, struct err *e)
{
  p->seed = j->pic[0].seed;
  if (draw_prepare(&j->pic[0].draw, s->model, p, e))
    return e->code;
  for (int i = 1; i < j->req.n; i++)
    if (draw_prepare_like(&j->pic[i].draw, j->pic[0].draw, j->pic[i].seed, e))
      return e->code;
  return 0;
}

/* Memory and tokens for the pictures; the job owns them, also after failure. */
static int prepare_pictures(struct job *j, const struct serving *s, struct err *e)
{
  const struct request *q = &j->req;
  size_t bytes = (size_t)q->width * (size_t)q->height * 3;
  struct draw_params p = {
      .prompt = q->prompt,
      .negative = q->negative,
      .prompt_len = q->prompt_len,
      .negative_len = q->negative_len,
      .width = q->width,
      .height = q->height,
      .steps = q->steps,
      .guidance = q->guidance,
      .sampler = j->sampler,
      .karras = j->karras,
      .clip_skip = q->clip_skip,
      .init_rgb = q->init,
      .mask = q->mask,
      .leaves_pixels = q->whole.rgb != NULL,
      .strength = q->strength,
  };

  j->pixels = malloc(bytes * (size_t)q->n);
  if (!j->pixels)
    return err_set(e, E_NOMEM, "out of memory for %d pictures of %dx%d", q->n, q->width, q->height);
  for (int i = 0; i < q->n; i++)
    j->pic[i].rgb = j->pixels + bytes * (size_t)i;
  if (prepare_draws(j, s, &p, e))
    return e->code;
  j->tokens = draw_prompt_tokens(j->pic[0].draw);
  j->steps = draw_step_count(j->pic[0].draw);
  j->work = (double)q->width * q->height * (q->guidance > 1 ? 2 : 1);
  return 0;
}

/* Decodes the body and finds under which safety its pictures are to be drawn. Who may not ask, or cannot be drawn for now, is told so first. */
static int decode_body(struct job *j, const struct drawing *dr, const struct drawing_body *b, const struct serving *s, struct safety *safety,
                       const struct drawing_who *who, int *pending, struct err *e)
{
  struct safety_style style[REQUEST_LORAS_MAX];
  struct err why = {0};
  int n = 0;

  if (!dr->decode(j, &j->first, b, &s->limits, &why))
    for (; n < j->req.n_loras; n++) {
      memcpy(style[n].name, j->req.lora[n].name, sizeof style[n].name);
      style[n].weight = j->req.lora[n].scale;
    }
  if (who->tenant ? safety_resolve_tenant(safety, who->tenant, style, n, &j->target, pending, e)
                  : safety_resolve(safety, who->token, style, n, &j->target, pending, e))
    return e->code;
  if (why.code)
    *e = why;
  return e->code;
}

static int set_sampler(struct job *j, struct err *e)
{
  j->karras = 0;
  if (sampler_find(j->req.sampler, &j->sampler, &j->karras, e)) {
    snprintf(e->field, sizeof e->field, "sampler");
    return e->code;
  }
  if (j->req.karras >= 0)
    j->karras = j->req.karras;
  if (j->karras && !sampler_has_karras(j->sampler))
    return err_field(e, E_ARG, "karras", "karras must be false: sampler %s has no Karras form", sampler_name(j->sampler));
  return 0;
}

static void set_styles(struct job *j)
{
  j->styles[0] = 0;
  for (int i = 0, at = 0; i < j->req.n_loras; i++)
    at += snprintf(j->styles + at, sizeof j->styles - (size_t)at, "%s%s:%g", i ? " " : "", j->req.lora[i].name, (double)j->req.lora[i].scale);
}

int drawing_read(struct job *j, const struct drawing *dr, const struct drawing_body *b, const struct serving *s, struct safety *safety,
                 const struct drawing_who *who, int *pending, struct err *e)
{
  j->surface = dr->surface;
  if (decode_body(j, dr, b, s, safety, who, pending, e) || set_sampler(j, e))
    return e->code;
  set_styles(j);
  if (who->seed && !j->req.has_seed) {
    j->req.seed = *who->seed;
    j->req.has_seed = 1;
  }
  if (draw_seed(&j->req, e))
    return e->code;
  for (int i = 0; i < j->req.n; i++)
    j->pic[i].seed = j->req.seed + (uint64_t)i;
  return 0;
}

int drawing_has_first(const struct job *j)
{
  return j->first.file[FIRST_INIT].p != NULL;
}

int drawing_prepare(struct job *j, const struct serving *s, struct err *e)
{
  int r = first_decode(&j->req, &j->first, &s->limits, e);

  first_close(&j->first);
  return r ? r : prepare_pictures(j, s, e);
}
