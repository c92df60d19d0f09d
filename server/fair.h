/*
 * fair.h - who comes next: shares between tenants, and within a tenant the work that is most overdue.
 *
 * Between tenants: the higher priority, and among equals start-time fair queueing (Goyal et al., 1996). Every tenant has a virtual time that
 * advances by the work done for it divided by its weight; the least goes next, so that each gets its share however many jobs the others send. Who
 * comes back after a pause starts at the least virtual time of the present ones: idleness is not saved up.
 *
 * Within a tenant: the earliest due time, which job.c sets to arrival + a multiple of the job's own service time. Short jobs pass long
 * ones at once, equal ones keep their order, and a long one's due time passes in the end, so that no stream of short jobs starves it.
 * Every FAIR_ROUND-th of the tenant's choices goes to whoever has waited longest for a turn, so that nobody waits behind a whole picture.
 *
 * Called by job.c (which waiting job starts) and job_desk.c (which pictures share the next step). Threads: plain data, under the caller's lock.
 */
#ifndef SAFELIGHT_SERVER_FAIR_H
#define SAFELIGHT_SERVER_FAIR_H

#include <stdint.h>

enum { FAIR_NAME = 96, FAIR_ROUND = 4 };

struct share {
  char name[FAIR_NAME];   /* "" is free */
  double weight;          /* > 0 */
  int priority;           /* higher goes first, whatever the shares; job.c sets it as the tenant's newest job says */
  double used;            /* virtual time: work / weight */
  double ahead;           /* what the choice in progress has given it already */
  unsigned turns;         /* how often one of its own was chosen */
  int jobs;               /* in the table */
};

/* n entries, at least as many as there can be jobs. */
struct shares {
  struct share *share;
  int n;
};

/* The tenant's share, its count of jobs raised; it takes the weight of the newest job. Never NULL. */
struct share *share_enter(struct shares *s, const char *name, double weight);
void share_leave(struct share *s);             /* takes NULL */
void share_use(struct share *s, double work);  /* work was done for it */

/* One that may be chosen. */
struct turn {
  struct share *share;
  int64_t due_ns;
  uint64_t last;    /* when it had its last turn, by a counter; smaller is longer ago */
  double work;      /* of one turn */
};

/* Whether a goes before b, the next being chosen. The caller raises the turns of the share whose turn it becomes. */
int fair_is_before(const struct turn *a, const struct turn *b);
/* Chooses up to cap of n turns; chosen gets their indices, in the order of choice. Returns how many. */
int fair_choose(const struct turn *t, int n, int cap, int *chosen);

#endif
