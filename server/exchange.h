/*
 * exchange.h - one HTTP request on its way through the files that answer it.
 *
 * http.c brings it to its route and ends it; reply.c writes answers; images.c draws for it and lets it wait for its job; stream.c answers
 * with server-sent events.
 *
 * Waiting. A connection that waits is suspended, and whoever has news wakes it, once: exchange_sleep marks it asleep after suspending,
 * exchange_wake resumes it only when it takes that mark away. A sleeper looks for news once more after it went to sleep. Wakers from other
 * threads that may come more than once (listeners, the end of a stream's job) hold the job table's lock, so that who has taken itself
 * out of their sight under that lock is not touched any more.
 *
 * Called by the files of the HTTP thread only. Threads: the HTTP thread, but for exchange_wake and images_wake.
 */
#ifndef SAFELIGHT_SERVER_EXCHANGE_H
#define SAFELIGHT_SERVER_EXCHANGE_H

#include <microhttpd.h>

#include "server/drawing.h"
#include "server/http.h"
#include "server/log.h"
#include "server/surface.h"
#include "server/trace.h"

struct exchange;

enum { EXCHANGE_PATH_SHOWN = 96, EXCHANGE_ARG_MAX = 80, EXCHANGE_ARGS = 2, EXCHANGE_TOKEN = 256 };

/* How a route's body is to come. */
enum body_kind { BODY_NONE, BODY_JSON, BODY_FORM };

struct route {
  const char *path;     /* up to EXCHANGE_ARGS segments may be "*": exchange.arg gets what stands there */
  const char *method;   /* GET implies HEAD */
  enum MHD_Result (*answer)(struct exchange *x);
  enum body_kind body;
  int takes_files;      /* pictures may lie in the body: max_upload_kb instead of max_body_kb */
  const struct drawing *drawing; /* of a route that draws */
  const struct surface *surface; /* how its errors are written; NULL: as OpenAI's */
};

/* A body that is made while it is sent. */
struct stream {
  struct listener listener;
  int (*produce)(struct exchange *x, struct buf *out); /* appends what there is; 0: that was the last of it */
  struct buf out;
  size_t at;
  int is_over;
  int64_t deadline_ns;
  int seen_previews, seen_steps, seen_state, seen_position;
  int64_t events;                /* how many were sent */
  struct job *job;               /* of an events stream: in the table, not the exchange's own */
  uint64_t serial;
  int is_time;                   /* it was poked: time for a sign of life */
  int is_listening, is_seeking;  /* at the job; for it: looked for again soon */
  int is_last;                   /* the job has left the table: what the store says next is the end */
};

struct exchange {
  struct http *h;
  struct MHD_Connection *connection;
  int watch_at;                  /* the connection's entry */
  int64_t start_ns;
  char id[JOB_ID_MAX + 1];
  struct trace trace;
  char method[12], path[EXCHANGE_PATH_SHOWN];  /* for the log: printable, cut */
  char arg[EXCHANGE_ARGS][EXCHANGE_ARG_MAX];
  const struct route *route;     /* NULL when err is set from the start */
  char allow[48];                /* of a 405: every method that the path takes */
  char token[EXCHANGE_TOKEN];    /* exchange_token: of an Authorization that is not plain */
  const char *file_type;         /* the picture itself is wanted, as this media type; NULL: JSON */
  struct buf body;
  size_t swallowed;
  struct err err;
  int64_t retry_ms;              /* of a 429 whose cause knows better than the queue when to come again; 0: it does not */
  int is_preflight;              /* a browser asks whether a page of another origin may */
  _Atomic int is_asleep;
  int is_done;                   /* job table's lock: its job is DONE and no waker is left */
  _Atomic int is_poked;          /* the watcher says: the client is gone, or time for a sign of life */
  enum MHD_Result (*then)(struct exchange *x); /* what comes when it was woken; NULL: nothing was waited for */
  struct job *job;               /* its own */
  int pending;                   /* a generation is to be composed before it can be drawn */
  enum MHD_Result (*built)(struct exchange *x); /* what comes when its first picture was read */
  struct asked *asked;           /* of the store; native.c */
  struct stream stream;
  int status;
  struct log_request log;        /* what is known of the picture */
  char *prompt;                  /* for the log, when it is wanted */
  struct stage_times times;
};

/* ---- reply.c ---- */

void add_header(struct MHD_Response *r, const char *name, const char *value);
void add_headerf(struct MHD_Response *r, const char *name, const char *fmt, ...) __attribute__((format(printf, 3, 4)));
const char *exchange_header(const struct exchange *x, const char *name); /* of the request; NULL: absent */
int64_t from_now(int seconds);
void exchange_sending(struct exchange *x, size_t len); /* from now on the client has its time to read len bytes */
/* Adds what every answer carries, hands it over and drops it; r NULL: out of memory, type NULL: there is no body. A body of len bytes has its time to
 * be read. */
enum MHD_Result send_answer(struct exchange *x, int status, const char *type, struct MHD_Response *r, size_t len);
/* The buffer's bytes become the answer's; b is empty after. */
struct MHD_Response *response_take(struct buf *b, size_t *len);
enum MHD_Result send_json(struct exchange *x, int status, struct buf *b);
enum MHD_Result send_text(struct exchange *x, const char *json); /* 200 with this JSON */
enum MHD_Result send_error(struct exchange *x);                  /* what x->err says, as the route's surface writes it */

enum MHD_Result send_preflight(struct exchange *x);              /* 204: what pages of other origins may send */

/* ---- images.c ---- */

enum MHD_Result answer_images(struct exchange *x);      /* a route with a drawing: the body is complete */
enum MHD_Result answer_images_done(struct exchange *x); /* its job is DONE and no stream */
/* Why nothing can be drawn now, E_NOTREADY; else what is served, and under which safety. */
MUST_CHECK int images_serving(struct http *h, const struct serving **s, struct safety **safety, struct err *e);
/* Body to job, x->job: RESERVED and complete when built goes on with it, at once or when its first picture was read. A refusal is answered here. */
enum MHD_Result images_build(struct exchange *x, enum MHD_Result (*built)(struct exchange *x));
enum MHD_Result images_refuse(struct exchange *x); /* x->err is the answer; what there is of the job goes */
void images_refused(struct exchange *x); /* x->err and its job, for the audit log */
void images_wake(void *arg);             /* struct job.wake of an exchange's own job */
void images_finish(struct exchange *x);  /* the log learns what the job did; the job is free again */
void images_leave(struct exchange *x);   /* the connection ended, its job perhaps not */
/* Who asks, by the key shown ("" for a wrong form of one; NULL: none). */
const char *exchange_token(struct exchange *x);
/* Who asks, by the policy: a reference, also while his pictures cannot be drawn for want of safety. E_AUTH, E_NOTREADY, E_NOMEM; *t is NULL then. */
MUST_CHECK int exchange_target(struct exchange *x, struct safety_target **t, struct err *e);
/* Whose jobs are his, as struct job has it: the tenant, or the address of who showed no key. */
void exchange_caller(const struct exchange *x, const struct safety_target *t, char caller[FAIR_NAME]);

/* ---- stream.c ---- */

/* Answers with server-sent events from produce. The listener may be listening already. */
enum MHD_Result stream_open(struct exchange *x, int (*produce)(struct exchange *x, struct buf *out));
void stream_wake(struct listener *l);  /* wake of exchange.stream.listener */
void stream_close(struct exchange *x); /* takes one that was never opened */

/* ---- sleeping ---- */

MUST_CHECK int exchange_sleep(struct exchange *x); /* 0: it does not, the server is over and nobody would wake it: the connection is to close */
void exchange_wake(struct exchange *x); /* any thread */

#endif
