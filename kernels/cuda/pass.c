/*
 * pass.c - see pass.h. Called by be_cuda.c (the table's entries) and every op. Threads: the one that owns the struct cuda.
 */
#include "kernels/cuda/pass.h"

#include <assert.h>
#include <string.h>

#include "kernels/cuda/cuda.h"

/* ---- the digest of a walk ---- */

/* Two lanes of multiply and fold. Addresses and shapes of one process go in: nobody chooses them to collide. */
static void mix(struct pass_digest *d, uint64_t word)
{
  d->a = (d->a ^ word) * 0x9e3779b97f4a7c15u;
  d->a ^= d->a >> 29;
  d->b = (d->b + word) * 0xd6e8feb86659fd93u;
  d->b ^= d->b >> 32;
}

static void mix_bytes(struct pass_digest *d, const void *p, size_t n)
{
  uint64_t word;

  for (; n >= 8; n -= 8, p = (const char *)p + 8) {
    memcpy(&word, p, 8);
    mix(d, word);
  }
  if (n) {
    word = 0;
    memcpy(&word, p, n);
    mix(d, word);
  }
}

static void mix_tensor(struct pass_digest *d, struct tensor t)
{
  mix(d, (uintptr_t)t.p);
  for (int i = 0; i < 4; i++)
    mix(d, (uint64_t)t.d[i]);
  mix(d, (uint64_t)t.type);
}

static void mix_weight(struct pass_digest *d, const struct weight *w)
{
  mix(d, (uintptr_t)w->w);
  mix(d, (uintptr_t)w->bias);
  mix(d, (uintptr_t)w->bias_f32);
  mix(d, (uintptr_t)w->gamma);
  mix(d, (uint64_t)w->out << 32 ^ (uint64_t)w->in);
  mix(d, (uint64_t)w->kh << 32 ^ (uint64_t)w->kw << 24 ^ (uint64_t)w->stride << 16 ^ (uint64_t)w->pad_lo << 8 ^ (uint64_t)w->pad_hi);
  mix(d, (uint64_t)w->kind << 8 ^ (uint64_t)w->type);
}

static int same(struct pass_digest a, struct pass_digest b)
{
  return a.a == b.a && a.b == b.b;
}

/* ---- graphs ---- */

static void graph_drop(struct pass_graph *g)
{
  if (g->exec)
    (void)cudaGraphExecDestroy(g->exec);
  *g = (struct pass_graph){.state = GRAPH_NONE};
}

/* Where a graph's kernels find what may change. */
static char *table_of(const struct pass *p, const struct pass_graph *g)
{
  return p->tables + (g - p->graph) * PASS_TABLE;
}

static struct pass_graph *graph_find(struct pass *p, struct pass_digest d)
{
  for (int i = 0; i < PASS_GRAPHS; i++)
    if (p->graph[i].state != GRAPH_NONE && same(p->graph[i].digest, d))
      return &p->graph[i];
  return NULL;
}

/* A place for a new digest: an empty one, or that of the graph that was not used for longest, which may still run. */
static struct pass_graph *graph_place(struct cuda *c, struct pass_digest d)
{
  struct pass *p = &c->pass;
  struct pass_graph *best = &p->graph[0];

  for (int i = 1; i < PASS_GRAPHS; i++)
    if (best->state != GRAPH_NONE && (p->graph[i].state == GRAPH_NONE || p->graph[i].used < best->used))
      best = &p->graph[i];
  if (best->state == GRAPH_READY)
    (void)cudaStreamSynchronize(c->stream); /* an error sticks and comes back from the next call */
  graph_drop(best);
  best->digest = d;
  return best;
}

/* ---- open and close ---- */

int pass_open(struct cuda *c, int is_off, struct err *e)
{
  struct pass *p = &c->pass;
  int r;

  *p = (struct pass){.is_off = is_off, .next = PASS_COLLECT};
  r = is_off ? 0 : memory_take(c->memory, c, (size_t)PASS_GRAPHS * PASS_TABLE, (void **)&p->tables, e);
  for (int i = 0; i < 2 && !r && !is_off; i++) {
    r = cuda_check(cudaMallocHost((void **)&p->staging[i], PASS_TABLE), "pinned memory", e);
    if (!r)
      r = cuda_check(cudaEventCreateWithFlags(&p->copied[i], cudaEventDisableTiming), "an event", e);
  }
  return r;
}

size_t pass_bytes(const struct pass *p)
{
  return p->tables ? (size_t)PASS_GRAPHS * PASS_TABLE : 0;
}

void pass_close(struct cuda *c)
{
  struct pass *p = &c->pass;

  for (int i = 0; i < PASS_GRAPHS; i++)
    graph_drop(&p->graph[i]);
  if (p->tables)
    memory_give_own(c->memory, c, p->tables);
  for (int i = 0; i < 2; i++) {
    (void)cudaFreeHost(p->staging[i]);
    if (p->copied[i])
      (void)cudaEventDestroy(p->copied[i]);
  }
  *p = (struct pass){.mode = PASS_NONE};
}

/* ---- what ops call ---- */

int pass_skips(struct cuda *c, const char *what, const struct tensor *t, int n, const struct weight *w, const void *more, size_t bytes)
{
  struct pass *p = &c->pass;

  if (p->rehearsal)
    return 1;
  if (p->mode != PASS_COLLECT && p->mode != PASS_CAPTURE)
    return 0;
  mix(&p->digest, (uintptr_t)what);
  for (int i = 0; i < n; i++)
    mix_tensor(&p->digest, t[i]);
  if (w)
    mix_weight(&p->digest, w);
  mix_bytes(&p->digest, more, bytes);
  return p->mode == PASS_COLLECT;
}

void pass_table(struct cuda *c, const void *rows, size_t bytes, const void **at)
{
  struct pass *p = &c->pass;
  size_t from = p->filled, end = from + (bytes + 15) / 16 * 16;

  *at = NULL;
  if (p->mode != PASS_COLLECT && p->mode != PASS_CAPTURE)
    return;
  p->filled = end;
  mix(&p->digest, bytes);
  if (end > PASS_TABLE)
    return;
  if (p->mode == PASS_COLLECT)
    memcpy(p->staging[p->which] + from, rows, bytes);
  else
    *at = p->table + from;
}

int pass_is_foreign(const struct cuda *c, const void *at)
{
  const struct pass *p = &c->pass;

  return p->mode != PASS_NONE && !((const char *)at >= p->own && (const char *)at < p->own + p->own_bytes);
}

int pass_refuses(struct cuda *c, const char *what, struct err *e)
{
  return c->pass.mode == PASS_NONE && !c->pass.rehearsal ? 0 : err_set(e, E_INTERNAL, "%s inside of a pass or a rehearsal", what);
}

/* ---- the entries of be_ops ---- */

int cuda_rehearse(struct be *be, enum be_rehearsal what)
{
  struct pass *p = &cuda_of(be)->pass;

  assert(p->mode == PASS_NONE);
  p->rehearsal = what;
  return 1;
}

int cuda_pass_begin(struct be *be, const void *own, size_t own_bytes, struct err *e)
{
  struct cuda *c = cuda_of(be);
  struct pass *p = &c->pass;
  int r = 0;

  assert(p->mode == PASS_NONE);
  p->own = own;
  p->own_bytes = own_bytes;
  p->digest = (struct pass_digest){0x243f6a8885a308d3u, (uint64_t)gpu_dnn_epoch(c->dnn)};
  p->filled = 0;
  p->mode = p->is_off || p->rehearsal ? PASS_PLAIN : p->next;
  if (p->mode == PASS_COLLECT && p->is_copying[p->which]) {
    r = cuda_check(cudaEventSynchronize(p->copied[p->which]), "a pass", e);
    p->is_copying[p->which] = 0;
  }
  if (p->mode == PASS_CAPTURE) {
    memory_lock(c->memory);
    r = cuda_check(cudaStreamBeginCapture(c->stream, cudaStreamCaptureModeThreadLocal), "capturing a pass", e);
    if (r)
      memory_unlock(c->memory);
  }
  if (r) { /* the next pass is another one: it collects a table of its own */
    p->mode = PASS_NONE;
    p->next = PASS_COLLECT;
  }
  return r;
}

/* The table of this walk goes to the graph, and the graph to the stream. */
MUST_CHECK static int replay(struct cuda *c, struct pass_graph *g, struct err *e)
{
  struct pass *p = &c->pass;
  int r = 0;

  assert(p->filled == g->table_bytes);
  g->used = ++p->clock;
  if (p->filled)
    r = cuda_check(cudaMemcpyAsync(table_of(p, g), p->staging[p->which], p->filled, cudaMemcpyHostToDevice, c->stream), "the table of a pass", e);
  if (!r)
    r = cuda_check(cudaEventRecord(p->copied[p->which], c->stream), "the table of a pass", e);
  if (r)
    return r;
  p->is_copying[p->which] = 1;
  p->which ^= 1;
  p->replays++;
  return cuda_check(cudaGraphLaunch(g->exec, c->stream), "a captured pass", e);
}

/* After COLLECT: launches the graph, or says how to walk next. */
MUST_CHECK static int end_collect(struct cuda *c, int *again, struct err *e)
{
  struct pass *p = &c->pass;
  struct pass_graph *g = graph_find(p, p->digest);

  if (g && g->state == GRAPH_READY)
    return replay(c, g, e);
  *again = 1;
  p->next = PASS_PLAIN;
  if (!g && p->filled <= PASS_TABLE) {
    g = graph_place(c, p->digest);
    g->state = GRAPH_SEEN;
  } else if (g && g->state == GRAPH_SEEN) {
    g->table_bytes = p->filled;
    p->table = table_of(p, g);
    p->sought = p->digest;
    p->next = PASS_CAPTURE;
  }
  if (g)
    g->used = ++p->clock;
  return 0;
}

/* After CAPTURE: a graph that runs, or a refusal that is remembered; the pass is then walked again. An error of the device comes back there. */
MUST_CHECK static int end_capture(struct cuda *c, int code, int *again, struct err *e)
{
  struct pass *p = &c->pass;
  struct pass_graph *found = graph_find(p, p->sought);
  cudaGraph_t graph = NULL;
  int failed = cudaStreamEndCapture(c->stream, &graph) || !graph || code || !same(p->digest, p->sought);

  memory_unlock(c->memory);
  assert(found && found->state == GRAPH_SEEN);
  if (!failed)
    failed = cudaGraphInstantiate(&found->exec, graph, 0);
  if (graph)
    (void)cudaGraphDestroy(graph);
  if (failed) {
    (void)cudaGetLastError();
    graph_drop(found);
    found->state = GRAPH_REFUSED;
    found->digest = p->sought;
    p->next = PASS_PLAIN;
    *again = 1;
    return 0;
  }
  found->state = GRAPH_READY;
  p->captures++;
  return replay(c, found, e);
}

int cuda_pass_end(struct be *be, int code, int *again, struct err *e)
{
  struct cuda *c = cuda_of(be);
  struct pass *p = &c->pass;
  enum pass_mode mode = p->mode;

  assert(mode != PASS_NONE);
  *again = 0;
  p->mode = PASS_NONE;
  p->next = PASS_COLLECT;
  mix(&p->digest, (uintptr_t)c->scratch); /* where COLLECT has put it: no later walk of these shapes moves it */
  if (mode == PASS_CAPTURE)
    return end_capture(c, code, again, e);
  if (code || mode == PASS_PLAIN)
    return code;
  return end_collect(c, again, e);
}
