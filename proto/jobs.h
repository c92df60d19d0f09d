/*
 * jobs.h - the wire format of native jobs: /v1/jobs, their list and their events. The body of POST is openai_decode_job's.
 *
 *   {"id", "object": "job", "status": queued|running|succeeded|failed|cancelled, "created", "started", "finished", "queue_position",
 *    "estimated_wait_s", "progress": {"step", "steps", "picture", "pictures"}, "metadata", "request", "result", "error"}
 * Times are seconds since 1970 or null. queue_position counts from 0, the next to start; it and estimated_wait_s are null once the job runs. request is
 * the body without metadata, its pictures by their length, null once it is not at hand; progress is null when it is not known. result is what
 * POST /v1/images/generations answers; error is {"message", "param", "code"}.
 *
 * Called by server/. Threads: pure functions.
 */
#ifndef SAFELIGHT_PROTO_JOBS_H
#define SAFELIGHT_PROTO_JOBS_H

#include <stddef.h>
#include <stdint.h>

#include "base/buf.h"
#include "base/err.h"
#include "proto/request.h"

enum jobs_status { JOBS_QUEUED, JOBS_RUNNING, JOBS_SUCCEEDED, JOBS_FAILED, JOBS_CANCELLED, JOBS_STATUSES };

/* "queued" ... */
const char *jobs_status_name(enum jobs_status status);
/* The status of that name; -1 when there is none. */
int jobs_status_find(const char *name);

struct jobs_progress {
  int step, steps;              /* of the picture at hand */
  int picture, pictures;        /* which is at hand, from 0; how many there are; 0: nothing is known */
};

/* All that is told of a job. Strings are borrowed. */
struct jobs_view {
  const char *id;
  enum jobs_status status;
  int64_t created, started, finished; /* seconds since 1970; 0: not yet */
  int queue_position;           /* -1: none */
  double wait_s;                /* estimated; below 0: unknown */
  struct jobs_progress progress;
  const char *body;             /* as received; len bytes, NULL: not at hand */
  size_t len;
  const char *metadata;         /* JSON; NULL: that of the body, when it is at hand */
  const char *result;           /* JSON as openai_encode_result writes it; NULL: none (yet) */
  const struct err *err;        /* why it failed or was cancelled; NULL: it did not */
};

/* Appends the metadata of a body that was decoded before, as JSON; nothing when it has none. */
MUST_CHECK int jobs_metadata(struct buf *out, const char *body, size_t len, struct err *e);

MUST_CHECK int jobs_encode(struct buf *out, const struct jobs_view *v, struct err *e);

/* A list is begun, given any number of jobs, and ended: {"object": "list", "data": [...], "has_more"}. */
MUST_CHECK int jobs_list_begin(struct buf *out, struct err *e);
MUST_CHECK int jobs_list_add(struct buf *out, const struct jobs_view *v, struct err *e);
MUST_CHECK int jobs_list_end(struct buf *out, int has_more, struct err *e);

/* Events, whole: status and result carry the job, step its progress, preview a picture on its way, error what answers have. id as sse_begin. */
MUST_CHECK int jobs_event_status(struct buf *out, int64_t id, const struct jobs_view *v, struct err *e);
MUST_CHECK int jobs_event_step(struct buf *out, int64_t id, const struct jobs_progress *p, struct err *e);
MUST_CHECK int jobs_event_preview(struct buf *out, int64_t id, const struct jobs_progress *p, enum image_format format, const void *file, size_t len,
                                  struct err *e);
MUST_CHECK int jobs_event_result(struct buf *out, int64_t id, const struct jobs_view *v, struct err *e);
MUST_CHECK int jobs_event_error(struct buf *out, int64_t id, const struct err *what, struct err *e);

#endif
