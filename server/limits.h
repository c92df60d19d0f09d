/*
 * limits.h - how much of the server one tenant, or one address of those who show no key, has taken, and whether there is more for him.
 *
 * The bounds (struct policy_limits) come with every call, from the policy that the request was resolved under, and the counts stay here: a
 * policy that is read again changes what is allowed at once and forgets nothing that runs. Rates are token buckets of one minute's worth: somebody who was
 * quiet may send a whole minute's requests together, and then one as each becomes due.
 *
 * A ticket is what one accepted request holds. It goes WAITING -> STARTED -> returned, or WAITING -> returned.
 *
 * Called by http.c (admit), job.c (start, done). Threads: any; one leaf lock, held for a look-up.
 */
#ifndef SAFELIGHT_SERVER_LIMITS_H
#define SAFELIGHT_SERVER_LIMITS_H

#include <stdint.h>

#include "base/err.h"
#include "proto/policy.h"

struct limits;

enum { LIMITS_NAME = POLICY_NAME + 2 };

struct limits_ticket {
  int at;             /* entry + 1; 0: nothing is held */
  int is_started;
};

/* Counts for at most n tenants and addresses at a time; those who have nothing running and nothing owed take no room. E_NOMEM. On failure *l is NULL. */
MUST_CHECK int limits_open(struct limits **l, int n, struct err *e);
void limits_close(struct limits *l); /* takes NULL; every ticket is returned */

/*
 * A request for n pictures of tenant, or of the address peer (peer.h) when tenant is "". now: clock_ns(). On success the ticket is held until limits_done.
 * E_BUSY: not now; *retry_ms says when it is worth another try. E_ARG: never, because n alone is more than the pictures of a minute. On failure the ticket
 * is empty and nothing was counted.
 */
MUST_CHECK int limits_admit(struct limits *l, const struct policy_limits *lim, const char *tenant, const char *peer, int n, int64_t now,
                            struct limits_ticket *t, int64_t *retry_ms, struct err *e);
void limits_start(struct limits *l, struct limits_ticket *t); /* it no longer waits; twice is once */
void limits_done(struct limits *l, struct limits_ticket *t);  /* the ticket is empty after; an empty one is fine */

/* What is counted now. */
void limits_count(struct limits *l, const char *tenant, const char *peer, int *accepted, int *waiting);

#endif
