/*
 * batch.c - see batch.h.
 *
 * Where rows are alone (be_ops.rows_are_alone) a batch sorts its pictures so that those of one size come together and, among them, those of one
 * generation: as many of one size as there is room for go through one pass (step.c), and rows that read the same weights share calls.
 *
 * Elsewhere, on processors, every picture keeps a pass of its own. Two passes side by side on one thread each are faster than one after the other
 * on two threads: a small network's steps are full of work that is too short to share, and threads that share a pass wait for each other at every
 * op. So pictures are handed to lanes of one thread (crew.h); only fewer pictures than threads share these. The bits do not depend on it: no op
 * lets them depend on its threads (kernels/backend.h, rule 5; tests/ops/test_threads.c).
 *
 * Threads: the device thread; crew.c's helpers touch only the draw that they step and its error.
 */
#include "models/batch.h"

#include <assert.h>
#include <stdlib.h>

#include "models/crew.h"
#include "models/draw.h"

/* A picture of the batch in the order in which it is worked on. */
struct entry {
  struct draw *d;
  struct err *err;
};

struct batch {
  struct model *m;
  int rows;                    /* of the UNet that a pass has room for */
  struct crew *crew;           /* NULL where rows are alone */
  int lanes;                   /* with the crew's: passes that run side by side */
  int threads;                 /* of the machine, for steps */
  int leave_free;
  struct entry entry[BATCH_MAX];
};

/* The memory of tensors is rounded up one by one, so that many small rows may take a little more than their share of a few large ones. */
enum { ROUNDING = 64 << 10 };

static int rows_for(const struct model *m, int max_pictures)
{
  int rows = m->be->ops->rows_are_alone ? DRAW_ROWS * max_pictures : DRAW_ROWS;

  return rows < RUN_MAX_ROWS ? rows : RUN_MAX_ROWS;
}

/* More than there are pictures would never work. */
static int helpers_for(const struct model *m, int max_pictures)
{
  int threads = m->be->ops->rows_are_alone ? 1 : m->be->threads;

  return (threads < max_pictures ? threads : max_pictures) - 1;
}

MUST_CHECK static int arena_for(struct model *m, int width, int height, int rows, size_t *bytes, struct err *e)
{
  double macs;
  int r = plan_arena(m, width, height, rows, LANE_STEPS, bytes, &macs, e);

  *bytes += ROUNDING;
  return r;
}

int batch_plan_bytes(struct model *m, int width, int height, int max_pictures, size_t *bytes, struct err *e)
{
  size_t main_bytes, lane;
  double macs;
  int r = arena_for(m, width, height, rows_for(m, max_pictures), bytes, e);

  if (!r)
    r = plan_arena(m, width, height, DRAW_ROWS, m->lane.work ? m->lane.work : LANE_ALL, &main_bytes, &macs, e);
  if (!r)
    r = plan_arena(m, width, height, DRAW_ROWS, LANE_STEPS, &lane, &macs, e);
  if (r)
    return r;
  *bytes = *bytes > main_bytes ? *bytes - main_bytes : 0;
  *bytes += (size_t)helpers_for(m, max_pictures) * lane;
  return 0;
}

int batch_open(struct batch **out, struct model *m, int max_pictures, struct err *e)
{
  struct batch *b;
  size_t bytes;
  int r;

  *out = NULL;
  if (max_pictures < 1 || max_pictures > BATCH_MAX)
    return err_field(e, E_ARG, "batch", "a batch holds 1 to %d pictures; got %d", BATCH_MAX, max_pictures);
  if (!(m->lane.work & LANE_STEPS))
    return err_set(e, E_INTERNAL, "a batch was opened before the model's memory was reserved");
  b = calloc(1, sizeof *b);
  if (!b)
    return err_set(e, E_NOMEM, "out of memory for a batch");
  b->m = m;
  b->threads = m->be->threads;
  b->lanes = 1 + helpers_for(m, max_pictures);
  b->rows = rows_for(m, max_pictures);
  r = arena_for(m, m->reserved_width, m->reserved_height, b->rows, &bytes, e);
  if (!r && bytes > m->lane.arena.size)
    r = lane_reserve(&m->lane, bytes, e);
  if (!r && !m->be->ops->rows_are_alone)
    r = crew_open(&b->crew, m, b->lanes - 1, LANE_STEPS, e);
  if (r) {
    batch_close(b);
    return r;
  }
  *out = b;
  return 0;
}

void batch_close(struct batch *b)
{
  if (!b)
    return;
  crew_close(b->crew);
  free(b);
}

int batch_rows(const struct batch *b)
{
  return b->rows;
}

/* ---- where rows are alone: pictures share a pass ---- */

/* By size, then by generation; equal ones stay as they came. */
static int comes_before(const struct draw *a, const struct draw *b)
{
  if (a->h != b->h)
    return a->h < b->h;
  if (a->w != b->w)
    return a->w < b->w;
  return (uintptr_t)a->g < (uintptr_t)b->g;
}

static void sort(struct entry *entry, int n, int (*before)(const struct draw *a, const struct draw *b))
{
  for (int i = 1; i < n; i++) {
    struct entry mine = entry[i];
    int k = i;

    for (; k > 0 && before(mine.d, entry[k - 1].d); k--)
      entry[k] = entry[k - 1];
    entry[k] = mine;
  }
}

/* n >= 1 pictures of one size in one pass. When that fails as a whole, each is tried alone, so that the one at fault fails alone. */
static void step_together(struct batch *b, const struct entry *entry, int n)
{
  struct err err[RUN_MAX_ROWS] = {{0}};
  struct draw *d[RUN_MAX_ROWS] = {NULL};
  int r;

  for (int i = 0; i < n; i++)
    d[i] = entry[i].d;
  r = step_draws(&b->m->lane, d, n, err);
  for (int i = 0; r && r != E_DEVICE && n > 1 && i < n; i++) {
    err[i] = (struct err){0};
    r = step_draws(&b->m->lane, &d[i], 1, &err[i]) == E_DEVICE ? E_DEVICE : E_INTERNAL;
  }
  for (int i = 0; i < n; i++)
    *entry[i].err = err[i];
}

/* How many of the n pictures from entry on share a pass. */
static int group(const struct batch *b, const struct entry *entry, int n)
{
  int k = 0, rows = 0;

  while (k < n && entry[k].d->h == entry[0].d->h && entry[k].d->w == entry[0].d->w && rows + entry[k].d->rows <= b->rows)
    rows += entry[k++].d->rows;
  return k;
}

static void step_shared(struct batch *b, int n)
{
  sort(b->entry, n, comes_before);
  for (int i = 0, k; i < n; i += k) {
    k = group(b, b->entry + i, n - i);
    step_together(b, b->entry + i, k);
  }
}

/* ---- elsewhere: each picture its own pass, side by side ---- */

/* What a step of this picture costs, in no particular unit: the numbers that go through the network. */
static double cost(const struct draw *d)
{
  return (double)(d->rows * d->h * d->w);
}

static int is_larger(const struct draw *a, const struct draw *b)
{
  return cost(a) > cost(b);
}

/* One picture on one lane; on any thread. */
static void step_one(void *arg, struct lane *l, int i)
{
  struct entry *entry = arg;

  if (step_draws(l, &entry[i].d, 1, entry[i].err))
    assert(entry[i].err->code);
}

/* The largest first, so that the last to be taken are short. Fewer pictures than lanes share the threads evenly; more get one thread each, also
 * when the last round leaves threads idle: the pool of a shared pass would spin for its next one where the others want to work. */
static void step_beside(struct batch *b, int n)
{
  int threads = n > 0 && n < b->lanes ? (b->threads - b->leave_free) / n : b->threads / b->lanes;

  if (n < 1)
    return;
  sort(b->entry, n, is_larger);
  crew_run(b->crew, &b->m->lane, n, threads > 1 ? threads : 1, step_one, b->entry);
}

void batch_leave_free(struct batch *b, int threads)
{
  b->leave_free = threads < 0 ? 0 : threads;
}

/* ---- any ---- */

/* Up to BATCH_MAX pictures. */
static void step_some(struct batch *b, struct draw *const *d, int n, struct err *err)
{
  int count = 0;

  for (int i = 0; i < n; i++) {
    err[i] = (struct err){0};
    if (!d[i]->g || d[i]->step >= d[i]->subject->plan.n)
      (void)err_set(&err[i], E_INTERNAL, "the picture was not started or has no step left");
    else
      b->entry[count++] = (struct entry){d[i], &err[i]};
  }
  if (b->m->be->ops->rows_are_alone)
    step_shared(b, count);
  else
    step_beside(b, count);
}

void batch_step(struct batch *b, struct draw *const *d, int n, struct err *err)
{
  const struct err *device = NULL;

  for (int i = 0; i < n; i += BATCH_MAX)
    step_some(b, d + i, n - i < BATCH_MAX ? n - i : BATCH_MAX, err + i);
  for (int i = 0; i < n && !device; i++)
    device = err[i].code == E_DEVICE ? &err[i] : NULL;
  for (int i = 0; device && i < n; i++)
    if (&err[i] != device)
      err[i] = *device;
}
