/*
 * job_list.h - all accepted jobs at one moment, for the operator: what each asks for and how far it is. No prompt: that is the client's.
 *
 * Called by admin_actions.c. Threads: any. The table's lock is held only while the entries are copied.
 */
#ifndef SAFELIGHT_SERVER_JOB_LIST_H
#define SAFELIGHT_SERVER_JOB_LIST_H

#include "server/job.h"

struct job_glance {
  char id[JOB_ID_MAX + 1], caller[FAIR_NAME], profile[POLICY_NAME]; /* profile "" while nobody knows it */
  enum job_state state;       /* PREPARING, QUEUED, RUNNING or DRAWN */
  int width, height;
  int steps, steps_done;      /* of all pictures */
  int pictures, drawn;
  int position;               /* 1: the next to start; 0: it does not wait */
  double age_s;               /* since it was accepted */
  double wait_s;              /* until it is done, by what the device took so far; 0 when nothing is known */
  int64_t due_ns;             /* of the fairness; with serial the order of the list */
  uint64_t serial;
  double work;                /* what is left of it */
};

/* Those that run first, oldest first, then those that wait, in the order in which they start as far as one can tell. list is malloc'ed, the caller's to free;
 * NULL after failure (E_NOMEM). */
MUST_CHECK int jobs_list(struct jobs *js, struct job_glance **list, int *n, struct err *e);

#endif
