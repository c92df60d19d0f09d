/*
 * limits.c - see limits.h.
 *
 * A rate is kept as one time, by the "generic cell rate algorithm": `due`, when all that was taken will be paid for at the allowed rate. A request is let in
 * when due is then no more than a minute ahead. So nothing has to tick, and an entry whose dues are past is as good as none.
 *
 * Entries are a hash table with open addressing. One that is idle (nothing accepted, dues past) may be taken for another name: a search looks at every
 * entry of its window, and takes the first idle one only when the name is not there.
 */
#include "server/limits.h"

#include <sodium.h>
#include <stdlib.h>
#include <string.h>

#include "server/metrics.h"
#include "server/thread.h"

enum { WINDOW = 32, RETRY_FULL_MS = 1000 };

static const int64_t MINUTE_NS = 60000000000;

struct entry {
  char name[LIMITS_NAME];     /* "t:" and a tenant, or "a:" and an address; "": never used */
  int accepted, waiting;
  int64_t requests_due, pictures_due;
};

struct limits {
  struct lock lock;
  struct entry *entry;        /* n, a power of two; lock */
  uint32_t n;
  unsigned char key[crypto_shorthash_KEYBYTES]; /* so that nobody can choose addresses that meet in one window */
};

int limits_open(struct limits **out, int n, struct err *e)
{
  struct limits *l = calloc(1, sizeof *l);
  uint32_t size = WINDOW;

  *out = NULL;
  while (size < (uint32_t)n)
    size *= 2;
  if (l)
    l->entry = calloc(size, sizeof *l->entry);
  if (!l || !l->entry) {
    free(l);
    return err_set(e, E_NOMEM, "out of memory for the limits of %d tenants", n);
  }
  l->n = size;
  lock_init(&l->lock, "limits");
  randombytes_buf(l->key, sizeof l->key);
  *out = l;
  return 0;
}

void limits_close(struct limits *l)
{
  if (!l)
    return;
  lock_fini(&l->lock);
  free(l->entry);
  free(l);
}

static void set_name(char name[LIMITS_NAME], const char *tenant, const char *peer)
{
  const char *s = *tenant ? tenant : peer;
  size_t n = strlen(s);

  if (n > LIMITS_NAME - 3)
    n = LIMITS_NAME - 3;
  memset(name, 0, LIMITS_NAME);
  memcpy(name, *tenant ? "t:" : "a:", 2);
  memcpy(name + 2, s, n);
}

static int is_idle(const struct entry *t, int64_t now)
{
  return !t->accepted && t->requests_due <= now && t->pictures_due <= now;
}

/* The entry of this name; when there is none and make is set an idle one, made his. NULL: none, and no room for one. */
static struct entry *find(struct limits *l, const char name[LIMITS_NAME], int64_t now, int make)
{
  unsigned char hash[crypto_shorthash_BYTES];
  struct entry *idle = NULL;
  uint32_t at;

  HELD(&l->lock);
  crypto_shorthash(hash, (const unsigned char *)name, LIMITS_NAME, l->key);
  memcpy(&at, hash, sizeof at);
  for (uint32_t i = 0; i < WINDOW; i++) {
    struct entry *t = &l->entry[(at + i) & (l->n - 1)];
    if (!memcmp(t->name, name, LIMITS_NAME))
      return t;
    if (!idle && is_idle(t, now))
      idle = t;
  }
  if (!make || !idle)
    return NULL;
  *idle = (struct entry){.accepted = 0};
  memcpy(idle->name, name, LIMITS_NAME);
  return idle;
}

/* When n units at `rate` a minute will be allowed: 0 or less is now, else ns from now. */
static int64_t wait_for(int64_t due, int rate, int n, int64_t now)
{
  return (due > now ? due - now : 0) + n * (MINUTE_NS / rate) - MINUTE_NS;
}

static void charge(int64_t *due, int rate, int n, int64_t now)
{
  *due = (*due > now ? *due : now) + n * (MINUTE_NS / rate);
}

static int refuse_rate(int64_t wait, int64_t *retry_ms, const char *what, int rate, struct err *e)
{
  *retry_ms = wait / 1000000 + 1;
  metric_add(METRIC_REFUSALS, REFUSAL_RATE, 1);
  return err_set(e, E_BUSY, "more than %d %s in a minute; the next is allowed in %.1f s", rate, what, (double)*retry_ms / 1000);
}

static int refuse_count(int64_t *retry_ms, const char *what, int max, struct err *e)
{
  *retry_ms = RETRY_FULL_MS; /* when one of his own is done; nobody knows better than he when that is */
  metric_add(METRIC_REFUSALS, REFUSAL_CONCURRENCY, 1);
  return err_set(e, E_BUSY, "%d of your requests %s already, which is as many as you may have; wait for one to finish", max, what);
}

static int check(const struct entry *t, const struct policy_limits *lim, int n, int64_t now, int64_t *retry_ms, struct err *e)
{
  int64_t wait = lim->per_minute ? wait_for(t->requests_due, lim->per_minute, 1, now) : 0;
  int64_t pictures = lim->pictures_per_minute ? wait_for(t->pictures_due, lim->pictures_per_minute, n, now) : 0;

  if (lim->concurrency && t->accepted >= lim->concurrency)
    return refuse_count(retry_ms, "are accepted", lim->concurrency, e);
  if (lim->queue && t->waiting >= lim->queue)
    return refuse_count(retry_ms, "wait", lim->queue, e);
  if (wait > 0 && wait >= pictures)
    return refuse_rate(wait, retry_ms, "requests", lim->per_minute, e);
  if (pictures > 0)
    return refuse_rate(pictures, retry_ms, "pictures", lim->pictures_per_minute, e);
  return 0;
}

static int is_bounded(const struct policy_limits *lim)
{
  return lim->concurrency || lim->queue || lim->per_minute || lim->pictures_per_minute;
}

int limits_admit(struct limits *l, const struct policy_limits *lim, const char *tenant, const char *peer, int n, int64_t now,
                 struct limits_ticket *ticket, int64_t *retry_ms, struct err *e)
{
  char name[LIMITS_NAME];
  struct entry *t;
  int r = 0;

  *ticket = (struct limits_ticket){0};
  *retry_ms = 0;
  if (lim->pictures_per_minute && n > lim->pictures_per_minute)
    return err_field(e, E_ARG, "n", "n may be at most %d: you may have that many pictures in a minute", lim->pictures_per_minute);
  set_name(name, tenant, peer);
  lock_take(&l->lock);
  t = find(l, name, now, 1);
  if (!t && is_bounded(lim)) {
    *retry_ms = RETRY_FULL_MS;
    metric_add(METRIC_REFUSALS, REFUSAL_CONCURRENCY, 1);
    r = err_set(e, E_BUSY, "too many different clients at once; try again soon");
  } else if (t && !(r = check(t, lim, n, now, retry_ms, e))) {
    t->accepted++;
    t->waiting++;
    if (lim->per_minute)
      charge(&t->requests_due, lim->per_minute, 1, now);
    if (lim->pictures_per_minute)
      charge(&t->pictures_due, lim->pictures_per_minute, n, now);
    ticket->at = (int)(t - l->entry) + 1;
  }
  lock_drop(&l->lock);
  return r;
}

void limits_start(struct limits *l, struct limits_ticket *ticket)
{
  if (!ticket->at || ticket->is_started)
    return;
  ticket->is_started = 1;
  lock_take(&l->lock);
  l->entry[ticket->at - 1].waiting--;
  lock_drop(&l->lock);
}

void limits_done(struct limits *l, struct limits_ticket *ticket)
{
  struct entry *t;

  if (!ticket->at)
    return;
  lock_take(&l->lock);
  t = &l->entry[ticket->at - 1];
  t->accepted--;
  t->waiting -= !ticket->is_started;
  lock_drop(&l->lock);
  *ticket = (struct limits_ticket){0};
}

void limits_count(struct limits *l, const char *tenant, const char *peer, int *accepted, int *waiting)
{
  char name[LIMITS_NAME];
  struct entry *t;

  set_name(name, tenant, peer);
  lock_take(&l->lock);
  t = find(l, name, 0, 0);
  *accepted = t ? t->accepted : 0;
  *waiting = t ? t->waiting : 0;
  lock_drop(&l->lock);
}
