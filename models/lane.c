/*
 * lane.c - see lane.h. Called by the server, model.c, batch.c. Threads: as the header says.
 */
#include "models/lane.h"

#include <stdlib.h>

#include "models/model.h"

int lane_reserve(struct lane *l, size_t bytes, struct err *e)
{
  struct be *be = l->be;
  void *base;
  int r;

  be->ops->mem_free(be, l->arena.base);
  arena_init(&l->arena, NULL, 0);
  l->arena.size = 0; /* until there is memory again nothing fits */
  r = be->ops->mem_alloc(be, bytes, &base, e);
  if (!r)
    arena_init(&l->arena, base, bytes);
  return r;
}

void lane_release(struct lane *l)
{
  if (l->arena.base)
    l->be->ops->mem_free(l->be, l->arena.base);
  l->arena.base = NULL;
  be_close(&l->own);
}

int lane_open(struct lane **out, struct model *m, int threads, int work, struct err *e)
{
  struct lane *l;
  double macs;
  size_t bytes;
  int r;

  *out = NULL;
  if (!m->reserved_width)
    return err_set(e, E_INTERNAL, "a lane was opened before the model's memory was reserved");
  r = plan_arena(m, m->reserved_width, m->reserved_height, DRAW_ROWS, work, &bytes, &macs, e);
  if (r)
    return r;
  l = calloc(1, sizeof *l);
  if (!l)
    return err_set(e, E_NOMEM, "out of memory for a lane");
  l->m = m;
  l->be = &l->own;
  l->work = work;
  r = m->be->ops->open_lane(&l->own, m->be, threads, e);
  l->threads = l->own.threads;
  if (!r)
    r = lane_reserve(l, bytes, e);
  if (r) {
    lane_close(l);
    return r;
  }
  *out = l;
  return 0;
}

void lane_close(struct lane *l)
{
  if (!l || l == &l->m->lane)
    return;
  lane_release(l);
  free(l);
}

struct lane *model_lane(struct model *m)
{
  return &m->lane;
}

void lane_use_threads(struct lane *l, int threads)
{
  l->be->ops->set_threads(l->be, threads ? threads : l->threads);
}

size_t lane_bytes(const struct lane *l)
{
  return l->arena.base ? l->arena.size : 0;
}

void lane_memory(struct lane *l, struct be_memory *m)
{
  l->be->ops->memory(l->be, m);
}

int model_reserve_for(struct model *m, int width, int height, int work, struct err *e)
{
  double macs;
  size_t bytes, ends, steps;
  int r = plan_arena(m, width, height, DRAW_ROWS, work, &bytes, &macs, e);

  if (!r)
    r = plan_arena(m, width, height, DRAW_ROWS, LANE_ENDS, &ends, &macs, e);
  if (!r)
    r = plan_arena(m, width, height, DRAW_ROWS, LANE_STEPS, &steps, &macs, e);
  if (!r)
    r = lane_reserve(&m->lane, bytes, e);
  if (r)
    return r;
  m->reserved_ends = ends;
  m->reserved_steps = steps;
  m->lane.work = work;
  m->reserved_width = width;
  m->reserved_height = height;
  return 0;
}

int model_reserve(struct model *m, int width, int height, struct err *e)
{
  return model_reserve_for(m, width, height, LANE_ALL, e);
}
