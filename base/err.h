/*
 * err.h - how every fallible function of Safelight reports failure.
 *
 * A function that can fail returns 0 or a negative E_* and takes a `struct err *` last, which it fills with one sentence
 * that says what to change. The first cause wins: a caller that adds context uses err_wrap(). Nobody below main() exits or
 * prints. The codes map one to one to HTTP statuses (proto/openai.c holds the table).
 *
 * Threads: a struct err belongs to its caller; there is no global error state.
 */
#ifndef SAFELIGHT_BASE_ERR_H
#define SAFELIGHT_BASE_ERR_H

#define MUST_CHECK __attribute__((warn_unused_result))

enum err_code {
  E_OK = 0,
  E_ARG = -1,       /* the request is wrong: 400 */
  E_NOTFOUND = -2,  /* no such route, model, file: 404 */
  E_BUSY = -3,      /* the queue is full: 429 */
  E_NOMEM = -4,     /* this job does not fit now: 503 */
  E_FILE = -5,      /* a file is damaged, lies or lacks something: refuse to start */
  E_POLICY = -6,    /* the safety that policy requires is not live: 503 */
  E_DEVICE = -7,    /* the device failed and will not recover: drain and exit */
  E_CANCEL = -8,    /* the client cancelled: 499 */
  E_INTERNAL = -9,  /* a bug: 500 */
  E_TOOBIG = -10,   /* body or field over its limit: 413 */
  E_METHOD = -11,   /* wrong HTTP method: 405 */
  E_TIMEOUT = -12,  /* the deadline passed: 504 */
  E_TYPE = -13,     /* unsupported media type: 415 */
  E_AUTH = -14,     /* missing or unknown key: 401 */
  E_NOTREADY = -15, /* the model is still loading, or the server is stopping: 503, try again */
  E_CONFLICT = -16, /* an idempotency key that was used with another body: 422 */
  E_FULL = -17,     /* the disk is full: 507 */
  E_CRASHED = -18,  /* of a durable job: the process ended during each attempt to draw it: 500 */
  E_GONE = -19,     /* the client closed the connection: nobody reads the answer */
  E_ABSENT = -20    /* clients of other servers ask for it, and this one cannot do it: 501 */
};

struct err {
  int code;          /* 0 or an E_* */
  char field[128];   /* the request field, file or tensor at fault; "" when none */
  char msg[448];     /* one sentence; always NUL terminated */
};

/* Records code and message unless an earlier cause is there already. Returns the recorded code, so that callers can write
 * `return err_set(e, E_ARG, "...")`. e may be NULL: then only the code is returned. */
int err_set(struct err *e, int code, const char *fmt, ...) __attribute__((format(printf, 3, 4)));

/* The same, naming the field, file or tensor at fault. */
int err_field(struct err *e, int code, const char *field, const char *fmt, ...) __attribute__((format(printf, 4, 5)));

/* Puts "prefix: " before the recorded message; keeps code and field. Returns the recorded code. */
int err_wrap(struct err *e, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

/* The short lower-case name of a code ("arg", "nomem", ...), for logs. */
const char *err_name(int code);

#endif
