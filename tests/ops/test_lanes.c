/*
 * test_lanes.c - two contexts on the same weights: a lane for the loader's thread beside the device's. Results are the same bits through
 * either, what one makes the other may use and free, a weight loaded like another costs the device nothing at first use, and both
 * may run at the same time. `make SAN=thread` runs this program too (tests/run san).
 *
 * Every context has one computing thread: gcc's OpenMP runtime is not built for ThreadSanitizer. Threads: two of its own.
 */
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "kernels/cpu/cpu.h"
#include "tests/ops/harness.h"

enum { SIDE = 12, CH = 64, RANK = 6, PICTURES = 2, NUMBERS = PICTURES * SIDE * SIDE * CH };

static const struct be_config one_thread = {.threads = 1};

/* Fixed numbers in [-1, 1) times gain. */
static void numbers(float *p, int64_t n, uint32_t seed, float gain)
{
  for (int64_t i = 0; i < n; i++) {
    seed = seed * 1664525u + 1013904223u;
    p[i] = gain * (float)(int32_t)seed * 0x1p-31f;
  }
}

/* cmocka's assertions may only fail on the thread that runs the test; elsewhere this counts. */
static atomic_int troubles;

static void must(int rc, const struct err *e)
{
  if (rc && atomic_fetch_add(&troubles, 1) < 5)
    fprintf(stderr, "%s: %s\n", err_name(rc), e->msg);
}

/* One of each kind of parameter. */
struct kit {
  struct weight *conv, *linear, *norm;
  struct lowrank *flat, *loco;
};

static void kit_load(struct kit *k, struct be *be, const struct kit *like, uint32_t seed)
{
  enum { MOST = CH * CH * 9 };
  float *v = malloc(MOST * sizeof *v);
  struct weight_desc conv = {.kind = WEIGHT_CONV, .out = CH, .in = CH, .kh = 3, .kw = 3, .stride = 1, .pad_lo = 1, .pad_hi = 1,
                             .w = v, .w_type = DT_F32, .bias = v, .bias_type = DT_F32};
  struct weight_desc linear = {.kind = WEIGHT_LINEAR, .out = CH, .in = CH, .w = v, .w_type = DT_F32};
  struct weight_desc norm = {.kind = WEIGHT_NORM, .out = CH, .w = v, .w_type = DT_F32, .bias = v + CH, .bias_type = DT_F32};
  struct lowrank_desc flat = {.out = CH, .in = CH, .rank = RANK, .down = v, .up = v + RANK * CH};
  struct lowrank_desc loco = {.out = CH, .in = CH, .rank = RANK, .kh = 3, .kw = 3, .stride = 1, .pad_lo = 1, .pad_hi = 1,
                              .down = v, .up = v + RANK * CH * 9};
  struct err e = {0};

  if (!v)
    abort();
  numbers(v, MOST, seed, 0.1f);
  must(be->ops->weight_load(be, &conv, like ? like->conv : NULL, &k->conv, &e), &e);
  must(be->ops->weight_load(be, &linear, like ? like->linear : NULL, &k->linear, &e), &e);
  must(be->ops->weight_load(be, &norm, like ? like->norm : NULL, &k->norm, &e), &e);
  must(be->ops->lowrank_load(be, &flat, &k->flat, &e), &e);
  must(be->ops->lowrank_load(be, &loco, &k->loco, &e), &e);
  free(v);
}

static void kit_free(struct kit *k, struct be *be)
{
  be->ops->weight_free(be, k->conv);
  be->ops->weight_free(be, k->linear);
  be->ops->weight_free(be, k->norm);
  be->ops->lowrank_free(be, k->flat);
  be->ops->lowrank_free(be, k->loco);
  *k = (struct kit){0};
}

/* The tensors of a context. */
struct bench {
  struct be *be;
  struct tensor x, y;
};

static void bench_open(struct bench *b, struct be *be)
{
  float *v = malloc(NUMBERS * sizeof *v);
  struct err e = {0};

  if (!v)
    abort();
  numbers(v, NUMBERS, 7, 1);
  *b = (struct bench){be, {NULL, {PICTURES, SIDE, SIDE, CH}, be->act}, {NULL, {PICTURES, SIDE, SIDE, CH}, be->act}};
  must(be->ops->mem_alloc(be, tensor_bytes(b->x), &b->x.p, &e), &e);
  must(be->ops->mem_alloc(be, tensor_bytes(b->y), &b->y.p, &e), &e);
  must(be->ops->upload(be, b->x, v, DT_F32, &e), &e);
  free(v);
}

static void bench_close(struct bench *b)
{
  b->be->ops->mem_free(b->be, b->x.p);
  b->be->ops->mem_free(b->be, b->y.p);
}

/* out (NUMBERS): every parameter of the kit applied one after the other. */
static void draw(const struct bench *b, const struct kit *k, float *out)
{
  const struct be_ops *o = b->be->ops;
  const struct lowrank *loco[PICTURES] = {k->loco, NULL}, *flat[PICTURES] = {NULL, k->flat};
  struct tensor x = b->x, y = b->y, none = tensor_none();
  struct err e = {0};

  must(o->conv2d(b->be, y, x, k->conv, none, &e), &e);
  must(o->lowrank(b->be, y, x, loco, &e), &e);
  must(o->groupnorm(b->be, y, y, none, k->norm, 8, 1e-5f, 1, &e), &e);
  must(o->linear(b->be, y, x, k->linear, y, &e), &e);
  must(o->lowrank(b->be, y, x, flat, &e), &e);
  must(o->download(b->be, out, DT_F32, y, &e), &e);
}

static float *new_picture(void)
{
  float *p = calloc(NUMBERS, sizeof *p);

  if (!p)
    abort();
  return p;
}

/* A backend and a lane beside it. */
struct pair {
  struct be be, lane;
  struct bench on_be, on_lane;
};

static const struct {
  const char *name;
  const struct be_ops *ops;
  int force_f32;
} kinds[] = {{"ref", &be_ref, 0}, {"cpu", &be_cpu, 0}, {"cpu f32", &be_cpu, 1}};
enum { KINDS = 3 };

static void pair_open(struct pair *p, int kind)
{
  struct be_config cfg = {.threads = 1, .force_f32 = kinds[kind].force_f32};
  struct err e = {0};

  assert_int_equal(be_open(&p->be, kinds[kind].ops, &cfg, &e), 0);
  assert_int_equal(p->be.ops->open_lane(&p->lane, &p->be, 0, &e), 0);
  assert_ptr_equal(p->lane.ops, p->be.ops);
  assert_int_equal(p->lane.act, p->be.act);
  assert_int_equal(p->lane.threads, 1);
  assert_true(p->lane.priv != p->be.priv);
  bench_open(&p->on_be, &p->be);
  bench_open(&p->on_lane, &p->lane);
}

static void pair_close(struct pair *p)
{
  bench_close(&p->on_be);
  bench_close(&p->on_lane);
  be_close(&p->lane);
  be_close(&p->be);
}

/* ---- one thread ---- */

static void test_same_bits(void **state)
{
  (void)state;
  for (int i = 0; i < KINDS; i++) {
    float *a = new_picture(), *b = new_picture(), *c = new_picture();
    struct kit by_be = {0}, by_lane = {0}, other = {0};
    struct pair p;

    pair_open(&p, i);
    kit_load(&by_be, &p.be, NULL, 1);
    kit_load(&by_lane, &p.lane, &by_be, 1);
    kit_load(&other, &p.lane, NULL, 2);
    draw(&p.on_be, &by_be, a);
    draw(&p.on_lane, &by_be, b);
    draw(&p.on_be, &by_lane, c);
    assert_memory_equal(a, b, NUMBERS * sizeof *a);
    assert_memory_equal(a, c, NUMBERS * sizeof *a);
    draw(&p.on_be, &other, c); /* or the test would not notice ops that do nothing */
    assert_memory_not_equal(a, c, NUMBERS * sizeof *a);
    kit_free(&by_be, &p.lane);
    kit_free(&by_lane, &p.be);
    kit_free(&other, &p.be);
    pair_close(&p);
    free(a);
    free(b);
    free(c);
  }
  assert_int_equal(troubles, 0);
}

/* A lane takes no scratch of the device's: what lies there outlives loads and ops of the lane. */
static void test_scratch(void **state)
{
  struct kit k = {0};
  struct pair p;
  float *a = new_picture();
  struct cpu *c;
  size_t n;

  (void)state;
  pair_open(&p, 1);
  kit_load(&k, &p.be, NULL, 1);
  draw(&p.on_be, &k, a);
  c = cpu_of(&p.be);
  n = c->scratch_bytes;
  assert_true(n > 1000);
  memset(c->scratch, 0xab, n);
  kit_free(&k, &p.be);
  kit_load(&k, &p.lane, NULL, 1);
  draw(&p.on_lane, &k, a);
  assert_int_equal(c->scratch_bytes, n);
  for (size_t i = 0; i < n; i++)
    assert_int_equal(((unsigned char *)c->scratch)[i], 0xab);
  kit_free(&k, &p.lane);
  kit_load(&k, &p.be, NULL, 1); /* the same through the device's context does take it */
  assert_int_not_equal(((unsigned char *)c->scratch)[0], 0xab);
  kit_free(&k, &p.be);
  pair_close(&p);
  free(a);
  assert_int_equal(troubles, 0);
}

/* ---- packing like another weight ---- */

enum { WIDE = 128 }; /* channels of the VAE's layers, whose large pictures want another layout than small ones */

static void load_wide(struct be *be, const struct weight *like, struct weight **w)
{
  float *v = malloc(WIDE * WIDE * 9 * sizeof *v);
  struct weight_desc d = {.kind = WEIGHT_CONV, .out = WIDE, .in = WIDE, .kh = 3, .kw = 3, .stride = 1, .pad_lo = 1, .pad_hi = 1,
                          .w = v, .w_type = DT_F32};
  struct err e = {0};

  if (!v)
    abort();
  numbers(v, WIDE * WIDE * 9, 3, 0.05f);
  must(be->ops->weight_load(be, &d, like, w, &e), &e);
  free(v);
}

static int copies(const struct weight *w)
{
  int n = 1;

  for (struct weight_copy *k = atomic_load(&((struct weight *)(uintptr_t)w)->first.next); k; k = atomic_load(&k->next))
    n++;
  return n;
}

/* A layout that oneDNN chooses for some picture, but not for the one that weights are packed for; NULL: there is none here. */
static const struct dnn_layout *other_layout(struct cpu *c, const struct weight *w)
{
  for (int64_t side = 4; side <= 1024; side *= 2)
    for (int f32 = 0; f32 < 2; f32++) {
      struct dnn_shape s = cpu_typical_shape(c, w);
      const struct dnn_layout *l;
      struct err e = {0};

      s.B = 1;
      s.H = s.W = side;
      s.y_type = f32 ? DT_F32 : s.y_type;
      if (!dnn_layout_for(c->dnn, &s, &l, &e) && l != w->first.layout && dnn_layout_bytes(l) == dnn_layout_bytes(w->first.layout))
        return l;
    }
  return NULL;
}

static void test_like(void **state)
{
  struct weight *base = NULL, *plain = NULL, *like = NULL;
  struct err e = {0};
  struct pair p;
  const struct dnn_layout *l;
  const void *a = NULL, *b = NULL;
  long before;

  (void)state;
  pair_open(&p, 1);
  load_wide(&p.be, NULL, &base);
  assert_int_equal(troubles, 0);
  l = other_layout(cpu_of(&p.be), base);
  if (!l) {
    p.be.ops->weight_free(&p.be, base);
    pair_close(&p);
    skip();
  }
  assert_int_equal(cpu_weight_copy(cpu_of(&p.be), base, l, &a, &e), 0);
  assert_int_equal(copies(base), 2);
  load_wide(&p.lane, NULL, &plain);
  load_wide(&p.lane, base, &like);
  assert_int_equal(troubles, 0);
  assert_int_equal(copies(plain), 1);
  assert_int_equal(copies(like), 2);
  before = alloc_count();
  assert_int_equal(cpu_weight_copy(cpu_of(&p.be), like, l, &b, &e), 0);
  assert_int_equal(alloc_count(), before);
  assert_memory_equal(a, b, dnn_layout_bytes(l)); /* oneDNN's reorder and the packer agree */
  assert_int_equal(cpu_weight_copy(cpu_of(&p.be), plain, l, &b, &e), 0);
  assert_memory_equal(a, b, dnn_layout_bytes(l));
#ifndef SANITIZED
  assert_true(alloc_count() > before); /* without `like` the first use pays */
#endif
  p.be.ops->weight_free(&p.be, base);
  p.be.ops->weight_free(&p.be, plain);
  p.be.ops->weight_free(&p.be, like);
  pair_close(&p);
}

/* ---- two threads ---- */

/* What the two threads of a test share. */
struct stage {
  struct pair p;
  struct kit base;
  float *want[2];            /* with the base kit and with the new one */
  _Atomic(struct kit *) fresh, spent; /* from the loader to the device, and back */
  int rounds;
  pthread_barrier_t gate;
  struct weight *_Atomic raced;
  const struct dnn_layout *layout;
  const void *copy[2];
  const struct dnn_layout *seen[2];
};

static void compare(const float *got, const float *want)
{
  struct err e = {0};

  if (memcmp(got, want, NUMBERS * sizeof *got))
    must(err_set(&e, E_INTERNAL, "another picture than alone"), &e);
}

/* The loader: new kits like the base one, each tried on the lane, handed over, and freed when the device is through with it. */
static void *loader(void *arg)
{
  struct stage *s = arg;
  float *got = new_picture();

  for (int i = 0; i < s->rounds; i++) {
    struct kit *k = calloc(1, sizeof *k), *old;

    if (!k)
      abort();
    kit_load(k, &s->p.lane, &s->base, 2);
    draw(&s->p.on_lane, k, got);
    compare(got, s->want[1]);
    draw(&s->p.on_lane, &s->base, got); /* the base weights are in use on the other side */
    compare(got, s->want[0]);
    atomic_store(&s->fresh, k);
    while (!(old = atomic_exchange(&s->spent, NULL)))
      sched_yield();
    kit_free(old, &s->p.lane);
    free(old);
  }
  free(got);
  return NULL;
}

static void test_side_by_side(void **state)
{
  struct stage s = {.rounds = 25};
  float *got = new_picture();
  pthread_t t;

  (void)state;
  for (int kind = 0; kind < KINDS; kind++) {
    struct kit second = {0};
    int done = 0;

    pair_open(&s.p, kind);
    s.want[0] = new_picture();
    s.want[1] = new_picture();
    kit_load(&s.base, &s.p.be, NULL, 1);
    kit_load(&second, &s.p.be, NULL, 2);
    draw(&s.p.on_be, &s.base, s.want[0]);
    draw(&s.p.on_be, &second, s.want[1]);
    assert_memory_not_equal(s.want[0], s.want[1], NUMBERS * sizeof(float));
    kit_free(&second, &s.p.be);
    assert_int_equal(pthread_create(&t, NULL, loader, &s), 0);
    while (done < s.rounds) {
      struct kit *k = atomic_exchange(&s.fresh, NULL);

      draw(&s.p.on_be, &s.base, got);
      compare(got, s.want[0]);
      if (!k) {
        sched_yield();
        continue;
      }
      draw(&s.p.on_be, k, got);
      compare(got, s.want[1]);
      atomic_store(&s.spent, k);
      done++;
    }
    pthread_join(t, NULL);
    kit_free(&s.base, &s.p.be);
    pair_close(&s.p);
    free(s.want[0]);
    free(s.want[1]);
    assert_int_equal(troubles, 0);
  }
  free(got);
}

/* The layout of a shape that nobody has asked for before round i. */
static const struct dnn_layout *new_layout(struct cpu *c, int i)
{
  struct dnn_shape s = {.B = 64, .H = 1, .W = 1, .in = 32, .out = 64 + 16 * i, .kh = 1, .kw = 1, .stride = 1, .kind = DNN_LINEAR,
                        .x_type = (int32_t)c->act, .y_type = (int32_t)c->act, .threads = 1};
  const struct dnn_layout *l = NULL;
  struct err e = {0};

  must(dnn_layout_for(c->dnn, &s, &l, &e), &e);
  return l;
}

static void *racer(void *arg)
{
  struct stage *s = arg;
  struct err e = {0};

  for (int i = 0; i < s->rounds; i++) {
    pthread_barrier_wait(&s->gate);
    must(cpu_weight_copy(cpu_of(&s->p.lane), atomic_load(&s->raced), s->layout, &s->copy[1], &e), &e);
    s->seen[1] = new_layout(cpu_of(&s->p.lane), i);
    pthread_barrier_wait(&s->gate);
  }
  return NULL;
}

/* Both contexts ask for the same copy of a new weight at the same moment: there is one, it is whole, and both got it. A third load
 * reproduces what is there while it is made. Both ask for a new layout too: equal layouts are the same pointer. */
static void test_copies_race(void **state)
{
  struct stage s = {.rounds = 40};
  struct weight *first = NULL;
  const void *want = NULL;
  struct err e = {0};
  pthread_t t;

  (void)state;
  pair_open(&s.p, 1);
  load_wide(&s.p.be, NULL, &first);
  assert_int_equal(troubles, 0);
  s.layout = other_layout(cpu_of(&s.p.be), first);
  if (!s.layout) {
    s.p.be.ops->weight_free(&s.p.be, first);
    pair_close(&s.p);
    skip();
  }
  assert_int_equal(cpu_weight_copy(cpu_of(&s.p.be), first, s.layout, &want, &e), 0);
  assert_int_equal(pthread_barrier_init(&s.gate, NULL, 2), 0);
  assert_int_equal(pthread_create(&t, NULL, racer, &s), 0);
  for (int i = 0; i < s.rounds; i++) {
    struct weight *w = NULL, *like = NULL;

    load_wide(&s.p.be, NULL, &w);
    atomic_store(&s.raced, w);
    pthread_barrier_wait(&s.gate);
    if (i % 2)
      load_wide(&s.p.be, w, &like);
    must(cpu_weight_copy(cpu_of(&s.p.be), w, s.layout, &s.copy[0], &e), &e);
    s.seen[0] = new_layout(cpu_of(&s.p.be), i);
    pthread_barrier_wait(&s.gate);
    if (troubles || s.copy[0] != s.copy[1] || s.seen[0] != s.seen[1] || copies(w) != 2 || memcmp(s.copy[0], want, dnn_layout_bytes(s.layout)) ||
        (like && copies(like) > 2))
      must(err_set(&e, E_INTERNAL, "round %d: %d copies", i, copies(w)), &e);
    s.p.be.ops->weight_free(&s.p.be, w);
    s.p.be.ops->weight_free(&s.p.be, like);
  }
  pthread_join(t, NULL);
  pthread_barrier_destroy(&s.gate);
  s.p.be.ops->weight_free(&s.p.be, first);
  pair_close(&s.p);
  assert_int_equal(troubles, 0);
}

/* ---- the rest ---- */

static void test_dry_lane(void **state)
{
  struct err e = {0};
  struct be be, lane;
  struct lowrank_desc d = {.out = 8, .in = 8, .rank = 2};
  struct lowrank *l = NULL;
  struct tensor t = {NULL, {1, 1, 4, 8}, DT_BF16};

  (void)state;
  assert_int_equal(be_open(&be, &be_dry, &one_thread, &e), 0);
  be.act = DT_F32;
  assert_int_equal(be.ops->open_lane(&lane, &be, 1, &e), 0);
  assert_int_equal(lane.act, DT_F32);
  assert_int_equal(lane.ops->lowrank_load(&lane, &d, &l, &e), 0);
  assert_non_null(l);
  assert_int_equal(be.ops->lowrank(&be, t, t, NULL, &e), 0);
  be.ops->lowrank_free(&be, l);
  be.ops->lowrank_free(&be, NULL);
  be_close(&lane);
  be_close(&be);
}

/* Memory runs out at every allocation that a load makes: an error each time, nothing half made, and then it works. */
static void test_no_memory(void **state)
{
  (void)state;
  if (alloc_count() == 0)
    skip(); /* a sanitizer has malloc */
  for (int i = 0; i < KINDS; i++) {
    struct pair p;
    int failures = 0, r;

    pair_open(&p, i);
    for (int kh = 0; kh <= 3; kh += 3) {
      float *v = calloc(CH * CH * 9, sizeof *v);
      struct lowrank_desc d = {.out = CH, .in = CH, .rank = RANK, .kh = kh, .kw = kh, .stride = kh ? 1 : 0, .down = v, .up = v};
      struct weight_desc wd = {.kind = kh ? WEIGHT_CONV : WEIGHT_LINEAR, .out = CH, .in = CH, .kh = kh, .kw = kh,
                               .stride = kh ? 1 : 0, .w = v, .w_type = DT_F32};

      if (!v)
        abort();
      for (int what = 0; what < 2; what++) {
        int n = 0;

        do {
          struct lowrank *l = (struct lowrank *)&p;
          struct weight *w = (struct weight *)&p;
          struct err e = {0};

          alloc_fail(++n);
          r = what ? p.lane.ops->weight_load(&p.lane, &wd, NULL, &w, &e) : p.lane.ops->lowrank_load(&p.lane, &d, &l, &e);
          alloc_fail(0);
          assert_true(r == 0 || r == E_NOMEM);
          assert_true((what ? w == NULL : l == NULL) == (r != 0));
          assert_true(r == 0 || e.msg[0]);
          failures += r != 0;
          if (!r && what)
            p.lane.ops->weight_free(&p.lane, w);
          else if (!r)
            p.lane.ops->lowrank_free(&p.lane, l);
        } while (r && n < 50);
        assert_int_equal(r, 0);
      }
      free(v);
    }
    assert_true(failures > 6);
    pair_close(&p);
  }
}

int main(int argc, char **argv)
{
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_same_bits),    cmocka_unit_test(test_scratch),     cmocka_unit_test(test_like),
      cmocka_unit_test(test_side_by_side), cmocka_unit_test(test_copies_race), cmocka_unit_test(test_dry_lane),
      cmocka_unit_test(test_no_memory),
  };

  if (argc > 1) /* a name, perhaps with * in it */
    cmocka_set_test_filter(argv[1]);
  return cmocka_run_group_tests_name("lanes", tests, NULL, NULL);
}
