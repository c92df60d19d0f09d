/*
 * fair.c - see fair.h.
 */
#include "server/fair.h"

#include <assert.h>
#include <stdio.h>
#include <string.h>

struct share *share_enter(struct shares *s, const char *name, double weight)
{
  struct share *found = NULL, *unused = NULL;
  double least = -1;

  for (int i = 0; i < s->n; i++) {
    struct share *p = &s->share[i];
    if (!p->jobs) {
      unused = unused ? unused : p;
    } else if (least < 0 || p->used < least) {
      least = p->used;
    }
    if (*p->name && !strcmp(p->name, name))
      found = p;
  }
  assert(found || unused);
  if (!found) {
    found = unused;
    *found = (struct share){.used = 0};
    snprintf(found->name, sizeof found->name, "%s", name);
  }
  if (!found->jobs++ && found->used < least)
    found->used = least;
  found->weight = weight;
  return found;
}

void share_leave(struct share *s)
{
  if (s)
    s->jobs--;
}

void share_use(struct share *s, double work)
{
  s->used += work / s->weight;
}

int fair_is_before(const struct turn *a, const struct turn *b)
{
  double va = a->share->used + a->share->ahead, vb = b->share->used + b->share->ahead;
  int by_wait = a->share != b->share || a->share->turns % FAIR_ROUND == FAIR_ROUND - 1;

  if (a->share->priority != b->share->priority)
    return a->share->priority > b->share->priority;
  if (a->share != b->share && va != vb)
    return va < vb;
  if (by_wait || a->due_ns == b->due_ns)
    return a->last < b->last;
  return a->due_ns < b->due_ns;
}

static int is_among(const int *chosen, int count, int i)
{
  for (int k = 0; k < count; k++)
    if (chosen[k] == i)
      return 1;
  return 0;
}

int fair_choose(const struct turn *t, int n, int cap, int *chosen)
{
  int count = 0;

  while (count < n && count < cap) {
    int best = -1;
    for (int i = 0; i < n; i++)
      if (!is_among(chosen, count, i) && (best < 0 || fair_is_before(&t[i], &t[best])))
        best = i;
    t[best].share->ahead += t[best].work / t[best].share->weight;
    t[best].share->turns++;
    chosen[count++] = best;
  }
  for (int i = 0; i < n; i++)
    t[i].share->ahead = 0;
  return count;
}
