/*
 * jobs.c - see jobs.h.
 */
#include "proto/jobs.h"

#include <jansson.h>
#include <stdio.h>
#include <string.h>

#include "base/json_load.h"
#include "proto/base64.h"
#include "proto/openai.h"
#include "proto/json_add.h"
#include "proto/sse.h"

static const char *const names[JOBS_STATUSES] = {"queued", "running", "succeeded", "failed", "cancelled"};

const char *jobs_status_name(enum jobs_status status)
{
  return names[status];
}

int jobs_status_find(const char *name)
{
  for (int i = 0; i < JOBS_STATUSES; i++)
    if (!strcmp(name, names[i]))
      return i;
  return -1;
}

static json_t *time_json(int64_t t)
{
  return t ? json_integer((json_int_t)t) : json_null();
}

static json_t *progress_json(const struct jobs_progress *p)
{
  return json_pack("{s:i,s:i,s:i,s:i}", "step", p->step, "steps", p->steps, "picture", p->picture, "pictures", p->pictures);
}

static json_t *progress_or_null(const struct jobs_progress *p)
{
  return p->pictures ? progress_json(p) : json_null();
}

static json_t *error_json(const struct err *what)
{
  return what ? json_pack("{s:o,s:o,s:s}", "message", json_make_text(what->msg), "param", *what->field ? json_make_text(what->field) : json_null(), "code",
                          openai_error_name(what->code, what->field))
              : json_null();
}

/* A picture in the echo of a request: its length stands for it. */
static void shorten(json_t *request, const char *field)
{
  const json_t *v = json_object_get(request, field);
  char text[64];

  if (!json_is_string(v))
    return;
  snprintf(text, sizeof text, "(%zu characters of base64)", json_string_length(v));
  json_object_set_new(request, field, json_string(text));
}

/* The request without what is told elsewhere; metadata is handed over. Both are null when the body is not at hand. */
static void echo(const struct jobs_view *v, json_t **request, json_t **metadata)
{
  json_t *root = v->body ? json_load_whole(v->body, v->len, 0, NULL) : NULL;
  json_t *own = v->metadata && *v->metadata ? json_load_whole(v->metadata, strlen(v->metadata), 0, NULL) : NULL;

  *request = root ? root : json_null();
  *metadata = own || !json_is_object(root) ? own : json_incref(json_object_get(root, "metadata"));
  *metadata = *metadata ? *metadata : json_null();
  if (!json_is_object(root))
    return;
  json_object_del(root, "metadata");
  shorten(root, "image");
  shorten(root, "mask");
}

int jobs_metadata(struct buf *out, const char *body, size_t len, struct err *e)
{
  json_t *root = json_load_whole(body, len, 0, NULL);
  json_t *metadata = json_object_get(root, "metadata");
  int r = 0;

  if (!root)
    r = err_set(e, E_NOMEM, "out of memory for the request's metadata");
  else if (json_is_object(metadata))
    r = json_add_value(out, json_incref(metadata), 0, e);
  json_decref(root);
  return r;
}

int jobs_encode(struct buf *out, const struct jobs_view *v, struct err *e)
{
  struct err none = {0};
  json_t *request, *metadata;

  e = e ? e : &none;
  echo(v, &request, &metadata);
  if (buf_addf(out, e, "{\"result\":%s,", v->result ? v->result : "null")) {
    json_decref(request);
    json_decref(metadata);
    return e->code;
  }
  return json_add_value(out,
                        json_pack("{s:o,s:s,s:s,s:o,s:o,s:o,s:o,s:o,s:o,s:o,s:o,s:o}", "id", json_make_text(v->id), "object", "job", "status",
                                  jobs_status_name(v->status), "created", time_json(v->created), "started", time_json(v->started), "finished",
                                  time_json(v->finished), "queue_position", v->queue_position >= 0 ? json_integer(v->queue_position) : json_null(),
                                  "estimated_wait_s", v->wait_s >= 0 ? json_real(v->wait_s) : json_null(), "progress", progress_or_null(&v->progress),
                                  "metadata", metadata, "request", request, "error", error_json(v->err)),
                        1, e);
}

int jobs_list_begin(struct buf *out, struct err *e)
{
  return buf_add_str(out, "{\"object\":\"list\",\"data\":[", e);
}

int jobs_list_add(struct buf *out, const struct jobs_view *v, struct err *e)
{
  int r = out->p[out->len - 1] == '[' ? 0 : buf_add_str(out, ",", e);

  return r ? r : jobs_encode(out, v, e);
}

int jobs_list_end(struct buf *out, int has_more, struct err *e)
{
  return buf_addf(out, e, "],\"has_more\":%s}", has_more ? "true" : "false");
}

/* ---- events ---- */

static int event_job(struct buf *out, const char *name, int64_t id, const struct jobs_view *v, struct err *e)
{
  int r = sse_begin(out, name, id, e);

  r = r ? r : jobs_encode(out, v, e);
  return r ? r : sse_end(out, e);
}

int jobs_event_status(struct buf *out, int64_t id, const struct jobs_view *v, struct err *e)
{
  return event_job(out, "status", id, v, e);
}

int jobs_event_result(struct buf *out, int64_t id, const struct jobs_view *v, struct err *e)
{
  return event_job(out, "result", id, v, e);
}

int jobs_event_step(struct buf *out, int64_t id, const struct jobs_progress *p, struct err *e)
{
  int r = sse_begin(out, "step", id, e);

  r = r ? r : json_add_value(out, progress_json(p), 0, e);
  return r ? r : sse_end(out, e);
}

int jobs_event_preview(struct buf *out, int64_t id, const struct jobs_progress *p, enum image_format format, const void *file, size_t len, struct err *e)
{
  int r = sse_begin(out, "preview", id, e);

  r = r ? r : buf_add_str(out, "{\"b64_json\":\"", e);
  r = r ? r : base64_encode(out, file, len, e);
  r = r ? r : buf_addf(out, e, "\",\"output_format\":\"%s\",", openai_format_name(format));
  r = r ? r : json_add_value(out, progress_json(p), 1, e);
  return r ? r : sse_end(out, e);
}

int jobs_event_error(struct buf *out, int64_t id, const struct err *what, struct err *e)
{
  int r = sse_begin(out, "error", id, e);

  r = r ? r : openai_encode_error(out, what, e);
  return r ? r : sse_end(out, e);
}
