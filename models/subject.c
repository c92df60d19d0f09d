/*
 * subject.c - what the pictures of one request share; see draw.h. They differ in their seed alone, so that prompts are tokenised and encoded, keys and
 * values kept, and the first picture encoded once for all of them.
 *
 *   subject_prepare    any thread     texts to tokens, the first picture's copy, the sampler's plan
 *   subject_start      a lane         text encoder, keys and values of every cross-attention, the first picture's distribution; or nothing
 *   subject_unref      any thread
 *
 * Called by pipeline.c. Invariants: what subject_start has made is that of one generation on one device, and is finished there before another lane
 * reads it. A picture that was prepared and never started holds it like any other. Threads: as above, and as draw.h says.
 */
#include <assert.h>
#include <stdlib.h>

#include "models/condition.h"
#include "models/draw.h"

int subject_prepare(struct draw *d, const struct draw_params *p, struct err *e)
{
  struct subject *s = calloc(1, sizeof *s);
  int r, skip = 0;

  if (!s)
    return err_set(e, E_NOMEM, "out of memory for a picture");
  atomic_init(&s->refs, 1);
  d->subject = s;
  r = condition_tokenize(&s->tokens[SIDE_PROMPT], d->m, p->prompt, p->prompt_len, "prompt", e);
  if (!r && d->rows > 1)
    r = condition_tokenize(&s->tokens[SIDE_NEGATIVE], d->m, p->negative ? p->negative : "", p->negative_len, "negative_prompt", e);
  if (!r && (p->init_rgb || p->mask))
    r = first_prepare(d, p, &skip, e);
  return r ? r : sampler_plan_from(&s->plan, &d->m->schedule, p->sampler, p->karras, p->steps, skip, e);
}

struct subject *subject_ref(struct subject *s)
{
  atomic_fetch_add_explicit(&s->refs, 1, memory_order_relaxed);
  return s;
}

/* What subject_start has made on the device. */
static void free_slab(struct subject *s)
{
  if (s->mem)
    s->m->be->ops->mem_free(s->m->be, s->mem);
  s->mem = NULL;
}

void subject_unref(struct subject *s)
{
  /* release: our reads come before the freeing; acquire: the freeing comes after everybody's. */
  if (!s || atomic_fetch_sub_explicit(&s->refs, 1, memory_order_acq_rel) != 1)
    return;
  free_slab(s);
  generation_unref(s->g);
  for (int i = 0; i < SIDES; i++)
    prompt_tokens_close(&s->tokens[i]);
  sampler_plan_close(&s->plan);
  free(s->first);
  free(s);
}

/* Lays out the device slab; called once to size it and once to fill in the pointers. */
static size_t lay_out(struct subject *s, const struct model *m, char *mem)
{
  const struct unet_config *u = unet_config(m->unet);
  size_t top = 0;

  for (int i = 0; i < SIDES && s->tokens[i].n; i++) {
    int64_t T = (int64_t)s->tokens[i].n * PROMPT_CHUNK;
    int64_t bytes = (int64_t)unet_context_bytes(m->unet, T, m->be->act);

    s->context[i] = (struct unet_context){draw_place(mem, &top, DT_U8, 1, 1, 1, bytes).p, T};
  }
  if (u->add_time_dim)
    s->pooled = draw_place(mem, &top, DT_F32, 1, 1, 1, u->add_in_dim - 6 * u->add_time_dim);
  return top;
}

size_t subject_bytes(const struct subject *s, const struct model *m)
{
  struct subject sized = {.tokens = {s->tokens[SIDE_PROMPT], s->tokens[SIDE_NEGATIVE]}};

  return lay_out(&sized, m, NULL);
}

MUST_CHECK static int fill(struct draw *d, struct lane *l, struct err *e)
{
  struct subject *s = d->subject;
  struct be *be = l->be;
  struct run run;
  int r = be->ops->mem_alloc(be, lay_out(s, s->m, NULL), &s->mem, e);

  if (r)
    return r;
  lay_out(s, s->m, s->mem);
  run_init(&run, be, &l->arena, s->g, e);
  for (int i = 0; !r && i < SIDES && s->tokens[i].n; i++)
    r = condition_fill(&run, s->m, &s->tokens[i], d->p.clip_skip, &s->context[i]);
  if (!r && s->pooled.d[0])
    r = condition_stand_in(&run, s->pooled);
  if (!r && s->first)
    r = first_encode(d, &run);
  run_reset(&run, 0);
  return r ? r : be->ops->sync(be, e); /* other lanes may start the others */
}

int subject_start(struct draw *d, struct lane *l, struct generation *g, struct err *e)
{
  struct subject *s = d->subject;

  if (!s->g) {
    s->m = l->m;
    s->g = generation_ref(g);
    if (fill(d, l, &s->err)) {
      assert(s->err.code);
      free_slab(s);
    }
  }
  if (s->g != g)
    return err_set(e, E_INTERNAL, "the pictures of one request were to be drawn under two generations");
  return s->err.code ? err_field(e, s->err.code, s->err.field, "%s", s->err.msg) : 0;
}
