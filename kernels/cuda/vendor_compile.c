/*
 * vendor_compile.c - kernels/compile.h on cuDNN: the outline's keys, compiled by vendor_dnn.c for a described device.
 *
 * A class of shapes (dnn.h) belongs to one thread, which asks for its two pictures first: that is what the engine is chosen for. Each thread has a
 * struct gpu_dnn of its own; the folder is all that they share. libcuda.so.1 is a stand-in here (stand_in).
 *
 * Called by the program through compiler_find. Threads: those of run().
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/compile.h"
#include "kernels/cuda/device_id.h"
#include "kernels/cuda/outline.h"

__attribute__((visibility("default"))) int be_cuda_compiler(size_t table_bytes, const struct compiler_ops **ops, struct err *e);

enum { MOST_THREADS = 256 };

struct compiler {
  char *description;            /* with the driver that was asked for */
  const char *folder;
  struct outline outline;
};

/* ---- open and close ---- */

static const char *version(void)
{
  static char text[32];

  gpu_dnn_version(text, sizeof text);
  return text;
}

static void compiler_close(struct compiler *c)
{
  if (!c)
    return;
  outline_close(&c->outline);
  free(c->description);
  free(c);
}

static int compiler_open(struct compiler **out, const struct compiler_config *cfg, struct err *e)
{
  struct compiler *c = calloc(1, sizeof *c);
  struct be_plans counts = {0};
  struct gpu_dnn *d = NULL;
  int r;

  *out = NULL;
  if (!c)
    return err_set(e, E_NOMEM, "out of memory for a compiler");
  c->folder = cfg->folder;
  r = device_id_with_driver(&c->description, cfg->description, cfg->driver, e);
  if (!r)
    r = gpu_dnn_open_described(&d, c->description, NULL, &counts, e); /* an impossible one is found before a model is loaded */
  gpu_dnn_close(d);
  if (r) {
    compiler_close(c);
    return r;
  }
  outline_open(&c->outline, cfg->want_f16);
  *out = c;
  return 0;
}

static struct be *compiler_outline(struct compiler *c)
{
  return &c->outline.be;
}

static int compiler_count(const struct compiler *c)
{
  return c->outline.keys;
}

static void compiler_name(const struct compiler *c, int i, char *text, size_t size)
{
  gpu_key_name(text, size, &c->outline.key[i]);
}

/* ---- compiling ---- */

/* What the threads of a run share, under the lock. */
struct job {
  const struct compiler *c;
  const struct gpu_key **key;   /* sorted: a class together, its two pictures first */
  int keys, next, done;
  pthread_mutex_t lock;
  void (*step)(void *arg, const struct compiler_step *s);
  void *arg;
  struct err first;
};

static int same_class(const struct gpu_key *a, const struct gpu_key *b)
{
  struct gpu_key x, y;

  gpu_key_class(&x, a);
  gpu_key_class(&y, b);
  return !memcmp(&x, &y, sizeof x);
}

static int64_t pictures(const struct gpu_key *k)
{
  return k->conv.B ? k->conv.B : k->attention.B;
}

static int order(const void *pa, const void *pb)
{
  const struct gpu_key *a = *(const struct gpu_key *const *)pa, *b = *(const struct gpu_key *const *)pb;
  struct gpu_key x, y;
  int by_class;

  gpu_key_class(&x, a);
  gpu_key_class(&y, b);
  by_class = memcmp(&x, &y, sizeof x);
  if (by_class)
    return by_class;
  if ((pictures(a) == 2) != (pictures(b) == 2))
    return pictures(a) == 2 ? -1 : 1;
  return pictures(a) < pictures(b) ? -1 : pictures(a) > pictures(b);
}

/* The keys of the next class: from *first on, so many. None when the folder takes nothing. */
static int take(struct job *j, int *first)
{
  int n = 0;

  pthread_mutex_lock(&j->lock);
  *first = j->next;
  while (j->first.code != E_FILE && j->next < j->keys && same_class(j->key[j->next], j->key[*first])) {
    j->next++;
    n++;
  }
  pthread_mutex_unlock(&j->lock);
  return n;
}

static void report(struct job *j, const struct gpu_key *k, struct compiler_step *s, const struct err *why)
{
  char name[160];

  gpu_key_name(name, sizeof name, k);
  s->plan = name;
  s->plans = j->keys;
  s->err = why->code ? why : NULL;
  pthread_mutex_lock(&j->lock);
  s->done = ++j->done;
  if (why->code && !j->first.code)
    (void)!err_set(&j->first, why->code, "%s: %s", name, why->msg);
  if (j->step)
    j->step(j->arg, s);
  pthread_mutex_unlock(&j->lock);
}

static void *work(void *arg)
{
  struct job *j = arg;
  struct be_plans counts = {0};
  struct gpu_dnn *d = NULL;
  struct err open = {0};
  int first, n, r = gpu_dnn_open_described(&d, j->c->description, j->c->folder, &counts, &open);

  while ((n = take(j, &first)) > 0)
    for (int i = first; i < first + n; i++) {
      long found = atomic_load(&counts.found), chosen = atomic_load(&counts.chosen);
      struct compiler_step s = {0};
      struct err why = open;

      if (!r && gpu_dnn_prepare(d, j->key[i], &s.bytes, &why))
        s.bytes = 0;
      s.is_found = atomic_load(&counts.found) > found;
      s.is_chosen = atomic_load(&counts.chosen) > chosen;
      report(j, j->key[i], &s, &why);
    }
  gpu_dnn_close(d);
  return NULL;
}

static int compiler_run(struct compiler *c, int threads, void (*step)(void *arg, const struct compiler_step *s), void *arg, struct err *e)
{
  struct job j = {.c = c, .keys = c->outline.keys, .step = step, .arg = arg, .lock = PTHREAD_MUTEX_INITIALIZER};
  pthread_t thread[MOST_THREADS];
  int started = 0;

  if (!j.keys)
    return 0;
  j.key = malloc((size_t)j.keys * sizeof *j.key);
  if (!j.key)
    return err_set(e, E_NOMEM, "out of memory for a list of plans");
  for (int i = 0; i < j.keys; i++)
    j.key[i] = &c->outline.key[i];
  qsort(j.key, (size_t)j.keys, sizeof *j.key, order);
  while (started < threads - 1 && started < MOST_THREADS && !pthread_create(&thread[started], NULL, work, &j))
    started++;
  work(&j); /* this thread works as well: with fewer threads than asked for it takes longer */
  while (started)
    pthread_join(thread[--started], NULL);
  free(j.key);
  return j.first.code ? err_set(e, j.first.code, "%s", j.first.msg) : 0;
}

int be_cuda_compiler(size_t table_bytes, const struct compiler_ops **ops, struct err *e)
{
  static const struct compiler_ops table = {
      .version = version,
      .open = compiler_open,
      .close = compiler_close,
      .outline = compiler_outline,
      .count = compiler_count,
      .name = compiler_name,
      .run = compiler_run,
  };

  *ops = NULL;
  if (table_bytes != sizeof table)
    return err_set(e, E_DEVICE, "safelight-cuda.so belongs to another version of the program");
  *ops = &table;
  return 0;
}
