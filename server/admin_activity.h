/*
 * admin_activity.h - what the server does right now, for the operator's page: accepted jobs, the running batch, how long things took, what was refused.
 *
 * Called by admin_actions.c. Threads: any; the job table's lock is held only while its entries are copied.
 */
#ifndef SAFELIGHT_SERVER_ADMIN_ACTIVITY_H
#define SAFELIGHT_SERVER_ADMIN_ACTIVITY_H

#include "base/buf.h"
#include "server/config.h"
#include "server/job.h"

/* Appends the JSON of GET /v1/admin/activity. E_NOMEM, E_TOOBIG. */
MUST_CHECK int admin_activity(struct buf *out, struct jobs *js, const struct config *cfg, struct err *e);

#endif
