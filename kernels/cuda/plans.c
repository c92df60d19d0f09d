/*
 * plans.c - see plans.h. Called by vendor_blas.c, vendor_dnn.c and pass.c. Threads: one owner.
 */
#include "kernels/cuda/plans.h"

#include <assert.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

struct plan_entry {
  struct plan_entry *next;
  void *value;
  unsigned char key[];
};

void plans_init(struct plans *t, size_t key_bytes, int most, void (*drop)(void *value))
{
  assert(key_bytes % 8 == 0 && most > 0);
  *t = (struct plans){.most = most, .key_bytes = key_bytes, .drop = drop};
}

/* Multiply and fold, word by word: no client chooses the keys' bytes freely. */
static unsigned bucket_of(const struct plans *t, const void *key)
{
  uint64_t h = 0, word;

  for (size_t i = 0; i < t->key_bytes; i += 8) {
    memcpy(&word, (const char *)key + i, 8);
    h = (h ^ word) * 0x9e3779b97f4a7c15u;
    h ^= h >> 32;
  }
  return (unsigned)(h % PLANS_BUCKETS);
}

void *plans_find(const struct plans *t, const void *key)
{
  for (const struct plan_entry *p = t->bucket[bucket_of(t, key)]; p; p = p->next)
    if (!memcmp(p->key, key, t->key_bytes))
      return p->value;
  return NULL;
}

int plans_is_full(const struct plans *t)
{
  return t->n >= t->most;
}

int plans_add(struct plans *t, const void *key, void *value, struct err *e)
{
  struct plan_entry *p = malloc(sizeof *p + t->key_bytes), **at;

  if (!p)
    return err_set(e, E_NOMEM, "out of memory for a plan");
  if (plans_is_full(t)) {
    plans_clear(t);
    t->dropped++;
  }
  memcpy(p->key, key, t->key_bytes);
  p->value = value;
  at = &t->bucket[bucket_of(t, key)];
  p->next = *at;
  *at = p;
  t->n++;
  return 0;
}

void plans_clear(struct plans *t)
{
  for (int i = 0; i < PLANS_BUCKETS; i++)
    for (struct plan_entry *p = t->bucket[i], *next; p; p = next) {
      next = p->next;
      t->drop(p->value);
      free(p);
    }
  memset(t->bucket, 0, sizeof t->bucket);
  t->n = 0;
}
