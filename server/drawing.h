/*
 * drawing.h - what a body asks for becomes a job: decoded, authorised, resolved to a safety, tokenised.
 *
 * Called by images.c (a request), reader.c (one with a first picture), async.c (a durable job after a restart). Threads: the thread that owns the job.
 */
#ifndef SAFELIGHT_SERVER_DRAWING_H
#define SAFELIGHT_SERVER_DRAWING_H

#include "proto/first.h"
#include "server/job.h"
#include "server/surface.h"

struct audit;

struct drawing_body {
  const char *p;
  size_t len;
  const char *type;   /* Content-Type; NULL: none */
};

/* What a route that draws makes of its body. */
struct drawing {
  const struct surface *surface;
  /* Fills j->req, and first with the pictures in the body, which may borrow from it. After failure first is still to be closed. */
  int (*decode)(struct job *j, struct first *first, const struct drawing_body *b, const struct request_limits *lim, struct err *e);
};

/* Who asks: by a key, or again by the name that a key once showed. */
struct drawing_who {
  const char *token;  /* NULL: none shown */
  const char *tenant; /* when not NULL: the tenant of this name, or who has no key when it is "" */
  const uint64_t *seed; /* that was drawn for it the first time; NULL: there was none */
};

/* j is RESERVED and has its id; j->first may borrow from the body afterwards. Who may not ask, or cannot be drawn for now, is told so first. *pending: a
 * generation is to be composed before it can be drawn. After failure the job is the caller's to release; its target, if there is one, says who asked. Costs no
 * memory to speak of: whoever has limits asks them between the two. */
MUST_CHECK int drawing_read(struct job *j, const struct drawing *dr, const struct drawing_body *b, const struct serving *s, struct safety *safety,
                            const struct drawing_who *who, int *pending, struct err *e);
/* Counts a refusal or failure and notes it in the audit log: what was asked for, and who asked; overload, a full disk and shutdown are nobody's doing. t: as
 * far as it is known, NULL: then the tenant's name. Any thread. */
void drawing_refused(struct audit *a, const struct safety_target *t, const char *tenant, const char *id, const struct err *why);
/* Pixels of the first picture, whose files are closed then, memory and tokens for each picture to be drawn. With a first picture it takes long: on the HTTP
 * thread only without one. */
MUST_CHECK int drawing_prepare(struct job *j, const struct serving *s, struct err *e);
/* Whether there is one. */
int drawing_has_first(const struct job *j);

#endif
