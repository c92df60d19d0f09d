/*
 * metrics.h - what the server counts, as Prometheus reads it at GET /metrics.
 *
 * All numbers lie in one static table of C11 atomics whose families, labels and buckets are fixed when the program is compiled. Counting is one or two
 * relaxed additions, so that any thread may do it anywhere, under any lock; reading takes no lock either, and can hold up nobody. Numbers of one
 * scrape need not be of one instant, but each counter is monotone, and a histogram's count is the sum of its buckets.
 *
 * Called by everything in server/ that does work worth counting; metrics_page.c puts the page together. Threads: any.
 */
#ifndef SAFELIGHT_SERVER_METRICS_H
#define SAFELIGHT_SERVER_METRICS_H

#include <stdint.h>

#include "base/buf.h"
#include "base/err.h"
#include "server/devices.h"

enum { METRIC_BUCKETS_MAX = 20 };

/* Families; the comment names the label's enumeration, the table in metrics.c the rest. Those "by device" have a cell for each device and label: metric_on. */
enum metric {
  METRIC_REQUESTS,          /* counter: use metric_request() */
  METRIC_REQUEST_SECONDS,   /* histogram, enum metric_surface: the same */
  METRIC_IN_FLIGHT,         /* gauge: requests between first and last byte */
  METRIC_CONNECTIONS,       /* gauge */
  METRIC_QUEUED,            /* gauge: accepted jobs that wait */
  METRIC_QUEUE_CAPACITY,    /* gauge */
  METRIC_RUNNING,           /* gauge, by device: pictures being drawn */
  METRIC_STAGE_SECONDS,     /* histogram, enum metric_stage: once per job and stage */
  METRIC_STEP_SECONDS,      /* histogram, by device: one denoising step of a batch */
  METRIC_BATCH_SIZE,        /* histogram, by device: pictures in a step */
  METRIC_STEPS,             /* counter, by device: steps of pictures: a step of a batch of 8 counts 8 */
  METRIC_PICTURES,          /* counter: pictures finished */
  METRIC_PREVIEWS,          /* counter: previews made */
  METRIC_REFUSALS,          /* counter, enum metric_refusal */
  METRIC_CANCELLED,         /* counter, enum metric_cancel */
  METRIC_DURABLE,           /* gauge, enum metric_durable */
  METRIC_SWAPS,             /* counter */
  METRIC_AUDIT_LOST,        /* counter */
  METRIC_DEVICE_BYTES,      /* gauge, enum metric_memory, by device */
  METRIC_READY,             /* gauge: 1 when /readyz says so */
  METRIC_COUNT
};

enum metric_surface { SURFACE_OPENAI, SURFACE_SDAPI, SURFACE_NATIVE, SURFACE_PAGE, SURFACE_OPS, SURFACE_OTHER, SURFACE_COUNT };
enum metric_stage { STAGE_QUEUE, STAGE_TEXT, STAGE_UNET, STAGE_VAE, STAGE_ENCODE, STAGE_AUDIT, STAGE_COUNT };
enum metric_refusal {
  REFUSAL_BAD_REQUEST, REFUSAL_UNAUTHORIZED, REFUSAL_TOO_LARGE, REFUSAL_QUEUE_FULL, REFUSAL_RATE, REFUSAL_CONCURRENCY, REFUSAL_SAFETY, REFUSAL_STYLE,
  REFUSAL_NOT_READY, REFUSAL_MEMORY, REFUSAL_DISK, REFUSAL_CONFLICT, REFUSAL_COUNT
};
enum metric_cancel { CANCEL_DISCONNECT, CANCEL_CLIENT, CANCEL_DEADLINE, CANCEL_SHUTDOWN, CANCEL_COUNT };
enum metric_durable { DURABLE_QUEUED, DURABLE_RUNNING, DURABLE_SUCCEEDED, DURABLE_FAILED, DURABLE_CANCELLED, DURABLE_COUNT };
enum metric_memory { MEMORY_WEIGHTS, MEMORY_ACTIVATIONS, MEMORY_WORKING, MEMORY_PICTURES, MEMORY_COUNT };

/* Before any other thread counts: the devices, by the numbers that they are shown with. One called 0 unless this is called. */
void metric_devices(const int *number, int n);
/* The label of a family by device: label of its enumeration, 0 without one, on the device'th of them. */
static inline int metric_on(int label, int device)
{
  return label * DEVICES_MAX + device;
}

/* label is of the family's enumeration, 0 for a family without one, or metric_on; another value is a bug and ends the program. */
void metric_add(enum metric m, int label, uint64_t n);        /* a counter */
void metric_move(enum metric m, int label, int64_t by);       /* a gauge, up or down */
void metric_set(enum metric m, int label, int64_t value);     /* a gauge; or a counter that is kept elsewhere and only grows */
/* A histogram. value: nanoseconds where the family's name ends in _seconds, else the thing itself; below 0 counts as 0. */
void metric_observe(enum metric m, int label, int64_t value);
void metric_observe_ms(enum metric m, int label, double ms);  /* the same, of a family of seconds */
/* A request was answered (or was not: 499) after so many ns. */
void metric_request(enum metric_surface s, int status, int64_t ns);
/* The surface that a path belongs to; what is none of ours and no page is "other". */
enum metric_surface metric_surface_of(const char *path);
/* Counts a refusal by its code. E_BUSY is not counted here: who says it counts it, since he alone knows what was full. What is no refusal (a cancelled
 * job, a bug) is not counted. */
void metric_refuse(int code);
/* What a counter or gauge says now, for tests and for the operator's page. Here and below a family by device speaks for all of them together, and label is
 * of its enumeration. */
int64_t metric_value(enum metric m, int label);
/* The name of a label's value, "text"; NULL: the family has no such value, or its cells have more than one label. */
const char *metric_label(enum metric m, int label);

/* What a histogram says now. */
struct metric_histogram {
  const int64_t *bound;          /* [buckets], in the unit of metric_observe */
  int buckets;
  int is_seconds;                /* that unit is nanoseconds */
  uint64_t count[METRIC_BUCKETS_MAX + 1]; /* of each bucket alone; the last one has no bound */
  uint64_t sum;                  /* of all values */
};
void metric_look(enum metric m, int label, struct metric_histogram *h);

/* Appends all families in the text format 0.0.4, and the process's own (memory, processor time, files). E_TOOBIG, E_NOMEM. */
MUST_CHECK int metrics_encode(struct buf *out, struct err *e);
/* Appends a gauge of value 1 whose labels say something: names and values in pairs, NULL at the end. Values are escaped; what is no UTF-8 becomes "?".
 * metrics_encode_head first, once for a name. */
MUST_CHECK int metrics_encode_head(struct buf *out, const char *name, const char *help, const char *type, struct err *e);
MUST_CHECK int metrics_encode_info(struct buf *out, const char *name, const char *const *labels, struct err *e);

#endif
