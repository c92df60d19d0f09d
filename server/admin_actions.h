/*
 * admin_actions.h - what an operator may ask for, apart from how it comes and goes: the table of routes and what each does.
 *
 * Called by admin.c. Threads: any of the admin listener's connections; an action may take as long as the loader thread needs.
 */
#ifndef SAFELIGHT_SERVER_ADMIN_ACTIONS_H
#define SAFELIGHT_SERVER_ADMIN_ACTIONS_H

#include "base/buf.h"
#include "server/audit.h"
#include "server/config.h"
#include "server/job.h"
#include "server/safety.h"

/* What a route takes as its body. */
enum admin_body { BODY_NONE, BODY_JSON, BODY_ADAPTER /* JSON, a raw file, or a form with the parts adapter and manifest */ };

struct admin_request {
  struct safety *safety;
  struct audit *audit;
  struct jobs *jobs;
  const struct config *cfg;
  char name[POLICY_NAME];     /* what stands for * in the route's path */
  int n;                      /* ?n= of the audit route */
  int is_upload;              /* body is the adapter file itself */
  struct buf body, manifest;
  struct buf out;             /* the answer */
  int is_text;                /* which is text, not JSON */
  const char *path, *who, *id; /* for the records: the URL, "uid 0" or "token", the request's id */
};

enum { ADMIN_ALLOW = 32 };

struct admin_route {
  const char *method, *path;  /* one * stands for a name at most */
  enum admin_body body;
  int is_change;              /* written down before and after */
  int (*act)(struct admin_request *q, struct err *e);
};

/* The route of a request, with q->name filled; NULL when there is none: allow then lists the methods that the path takes
 * ("POST, DELETE"), or is "". */
const struct admin_route *admin_route_find(struct admin_request *q, const char *method, const char *path, char allow[ADMIN_ALLOW]);
/* Does it. A change that cannot be written down before is not made (E_POLICY). */
MUST_CHECK int admin_act(const struct admin_route *r, struct admin_request *q, struct err *e);

#endif
