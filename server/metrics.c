/*
 * metrics.c - see metrics.h. The table below is the list of what there is; docs/operating.md explains it.
 *
 * A family's cells are one array: label values times (1, or for a histogram its buckets, the one without bound, and the sum). All are uint64_t; a gauge's
 * is an int64_t in two's complement. Durations are summed in whole nanoseconds, so that no sum depends on the order of additions.
 */
#include "server/metrics.h"

#include <assert.h>
#include <inttypes.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include "base/utf8.h"
#include "server/process.h"

enum type { COUNTER, GAUGE, HISTOGRAM };
enum { STATUSES = 26, NS = 1000000000 };

struct family {
  const char *name, *help;
  enum type type;
  const char *label[2];               /* names; NULL: none */
  const char *const *value[2];        /* their values */
  int n[2];                           /* how many, at least 1 */
  const int64_t *bound;               /* HISTOGRAM: upper bounds, in the unit of metric_observe */
  int buckets;
  int is_seconds;                     /* values are nanoseconds and shown as seconds */
  int is_sparse;                      /* cells that are 0 are not shown: there are many, and most never happen */
  int is_by_device;                   /* label[1] is "device": cells of devices that are not there are not shown */
  _Atomic uint64_t *cell;
};

#define LEN(a) ((int)(sizeof(a) / sizeof *(a)))
#define MS(x) ((int64_t)((x) * 1e6))

static const char *const surfaces[SURFACE_COUNT] = {"openai", "sdapi", "native", "page", "ops", "other"};
static const char *const stages[STAGE_COUNT] = {"queue", "text", "unet", "vae", "encode", "audit"};
static const char *const refusals[REFUSAL_COUNT] = {"bad_request", "unauthorized", "too_large",          "queue_full",    "rate_limit",  "concurrency",
                                                    "safety_unavailable", "style", "not_ready", "out_of_memory", "disk_full", "conflict"};
static const char *const cancels[CANCEL_COUNT] = {"disconnect", "client", "deadline", "shutdown"};
static const char *const durables[DURABLE_COUNT] = {"queued", "running", "succeeded", "failed", "cancelled"};
static const char *const memories[MEMORY_COUNT] = {"weights", "activations", "working", "pictures"};

/* The statuses the server sends; the last stands for any other. */
static const int status_of[STATUSES - 1] = {200, 202, 204, 206, 304, 400, 401, 403, 404, 405, 406, 408,
                                            409, 410, 413, 415, 422, 429, 431, 499, 500, 501, 503, 504, 507};
static const char *const statuses[STATUSES] = {"200", "202", "204", "206", "304", "400", "401", "403", "404", "405", "406",  "408",
                                               "409", "410", "413", "415", "422", "429", "431", "499", "500", "501", "503", "504", "507", "other"};

static const int64_t request_bounds[] = {MS(1),   MS(5),    MS(10),   MS(25),   MS(50),    MS(100),   MS(250),   MS(500),
                                         MS(1000), MS(2500), MS(5000), MS(10000), MS(30000), MS(60000), MS(120000), MS(300000)};
static const int64_t stage_bounds[] = {MS(0.5),  MS(1),    MS(2.5),  MS(5),     MS(10),    MS(25),    MS(50),    MS(100),  MS(250),
                                       MS(500), MS(1000), MS(2500), MS(5000), MS(10000), MS(30000), MS(60000), MS(300000)};
static const int64_t step_bounds[] = {MS(1),  MS(2),   MS(5),   MS(10),  MS(20),   MS(30),   MS(50),  MS(75),
                                      MS(100), MS(200), MS(500), MS(1000), MS(2000), MS(5000), MS(10000)};
static const int64_t batch_bounds[] = {1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64};

/* What the devices are called; the numbers of a server without the option until metric_devices. */
static char device_text[DEVICES_MAX][8] = {"0"};
static const char *const device_names[DEVICES_MAX] = {device_text[0],  device_text[1],  device_text[2],  device_text[3],  device_text[4],  device_text[5],
                                                      device_text[6],  device_text[7],  device_text[8],  device_text[9],  device_text[10], device_text[11],
                                                      device_text[12], device_text[13], device_text[14], device_text[15]};
static int devices = 1;

_Static_assert(DEVICES_MAX == 16, "device_names has an entry for each");

#define CELLS(name, n) static _Atomic uint64_t name##_cells[n]
#define HIST_CELLS(name, labels, bounds) static _Atomic uint64_t name##_cells[(labels) * (LEN(bounds) + 2)]

CELLS(requests, SURFACE_COUNT * STATUSES);
HIST_CELLS(request_seconds, SURFACE_COUNT, request_bounds);
CELLS(in_flight, 1);
CELLS(connections, 1);
CELLS(queued, 1);
CELLS(capacity, 1);
CELLS(running, DEVICES_MAX);
HIST_CELLS(stage, STAGE_COUNT, stage_bounds);
HIST_CELLS(step, DEVICES_MAX, step_bounds);
HIST_CELLS(batch, DEVICES_MAX, batch_bounds);
CELLS(steps, DEVICES_MAX);
CELLS(pictures, 1);
CELLS(previews, 1);
CELLS(refusal, REFUSAL_COUNT);
CELLS(cancelled, CANCEL_COUNT);
CELLS(durable, DURABLE_COUNT);
CELLS(swaps, 1);
CELLS(audit_lost, 1);
CELLS(device, MEMORY_COUNT *DEVICES_MAX);
CELLS(ready, 1);

#define PLAIN(id, name_, kind, cells, help_) [id] = {.name = name_, .help = help_, .type = kind, .n = {1, 1}, .cell = cells}
#define LABELLED(id, name_, kind, cells, key, values, help_) \
  [id] = {.name = name_, .help = help_, .type = kind, .label = {key}, .value = {values}, .n = {LEN(values), 1}, .cell = cells}
/* That label alone. */
#define BY_DEVICE .label = {NULL, "device"}, .value = {NULL, device_names}, .n = {1, DEVICES_MAX}, .is_by_device = 1
#define BOUNDS(b) .bound = b, .buckets = LEN(b)

static const struct family families[METRIC_COUNT] = {
    [METRIC_REQUESTS] = {.name = "safelight_requests_total", .help = "Requests by surface and HTTP status; 499: the client went away.", .type = COUNTER,
                         .label = {"surface", "status"}, .value = {surfaces, statuses}, .n = {SURFACE_COUNT, STATUSES}, .is_sparse = 1,
                         .cell = requests_cells},
    [METRIC_REQUEST_SECONDS] = {.name = "safelight_request_seconds", .help = "From a request's headers to the last byte of its answer.",
                                .type = HISTOGRAM, .label = {"surface"}, .value = {surfaces}, .n = {SURFACE_COUNT, 1}, BOUNDS(request_bounds),
                                .is_seconds = 1, .cell = request_seconds_cells},
    PLAIN(METRIC_IN_FLIGHT, "safelight_requests_in_flight", GAUGE, in_flight_cells, "Requests that are not fully answered."),
    PLAIN(METRIC_CONNECTIONS, "safelight_connections", GAUGE, connections_cells, "Open connections of clients."),
    PLAIN(METRIC_QUEUED, "safelight_jobs_queued", GAUGE, queued_cells, "Accepted jobs that wait."),
    PLAIN(METRIC_QUEUE_CAPACITY, "safelight_queue_capacity", GAUGE, capacity_cells, "Jobs that may wait; one more is answered with 429."),
    [METRIC_RUNNING] = {.name = "safelight_pictures_running", .help = "Pictures that are being drawn.", .type = GAUGE, BY_DEVICE, .cell = running_cells},
    [METRIC_STAGE_SECONDS] = {.name = "safelight_stage_seconds", .help = "What a job spends in each stage.", .type = HISTOGRAM, .label = {"stage"},
                              .value = {stages}, .n = {STAGE_COUNT, 1}, BOUNDS(stage_bounds), .is_seconds = 1, .cell = stage_cells},
    [METRIC_STEP_SECONDS] = {.name = "safelight_step_seconds", .help = "One denoising step of a batch.", .type = HISTOGRAM, BY_DEVICE,
                             BOUNDS(step_bounds), .is_seconds = 1, .cell = step_cells},
    [METRIC_BATCH_SIZE] = {.name = "safelight_batch_size", .help = "Pictures that share a denoising step.", .type = HISTOGRAM, BY_DEVICE,
                           BOUNDS(batch_bounds), .cell = batch_cells},
    [METRIC_STEPS] = {.name = "safelight_steps_total", .help = "Denoising steps, counted for each picture.", .type = COUNTER, BY_DEVICE, .cell = steps_cells},
    PLAIN(METRIC_PICTURES, "safelight_pictures_total", COUNTER, pictures_cells, "Pictures that were finished."),
    PLAIN(METRIC_PREVIEWS, "safelight_previews_total", COUNTER, previews_cells, "Previews of unfinished pictures."),
    LABELLED(METRIC_REFUSALS, "safelight_refusals_total", COUNTER, refusal_cells, "reason", refusals, "Requests for pictures that were refused."),
    LABELLED(METRIC_CANCELLED, "safelight_jobs_cancelled_total", COUNTER, cancelled_cells, "by", cancels, "Jobs that ended before they were done."),
    LABELLED(METRIC_DURABLE, "safelight_durable_jobs", GAUGE, durable_cells, "state", durables, "Asynchronous jobs in the store."),
    PLAIN(METRIC_SWAPS, "safelight_swaps_total", COUNTER, swaps_cells, "Safety generations that were published."),
    PLAIN(METRIC_AUDIT_LOST, "safelight_audit_lost_total", COUNTER, audit_lost_cells, "Records of refusals that could not be written."),
    [METRIC_DEVICE_BYTES] = {.name = "safelight_device_memory_planned_bytes", .type = GAUGE,
                             .help = "Memory of the device by plan: set aside at start; pictures: what as many as may run take when all are the largest.",
                             .label = {"what", "device"}, .value = {memories, device_names}, .n = {MEMORY_COUNT, DEVICES_MAX}, .is_by_device = 1,
                             .cell = device_cells},
    PLAIN(METRIC_READY, "safelight_ready", GAUGE, ready_cells, "1 while pictures can be drawn, as /readyz says."),
};

void metric_devices(const int *number, int n)
{
  assert(n >= 1 && n <= DEVICES_MAX);
  for (int i = 0; i < n; i++)
    snprintf(device_text[i], sizeof device_text[i], "%d", number[i]);
  devices = n;
}

/* ---- counting ---- */

/* Cells of one label value. */
static int stride(const struct family *f)
{
  return f->type == HISTOGRAM ? f->buckets + 2 : 1;
}

static _Atomic uint64_t *cell_of(enum metric m, int label, enum type type)
{
  const struct family *f = &families[m];

  assert((unsigned)m < METRIC_COUNT && label >= 0 && label < f->n[0] * f->n[1] && f->type == type);
  return f->cell + (ptrdiff_t)label * stride(f);
}

static void bump(_Atomic uint64_t *c, uint64_t by)
{
  atomic_fetch_add_explicit(c, by, memory_order_relaxed);
}

static uint64_t look(const _Atomic uint64_t *c)
{
  return atomic_load_explicit(c, memory_order_relaxed);
}

void metric_add(enum metric m, int label, uint64_t n)
{
  bump(cell_of(m, label, COUNTER), n);
}

void metric_move(enum metric m, int label, int64_t by)
{
  bump(cell_of(m, label, GAUGE), (uint64_t)by);
}

void metric_set(enum metric m, int label, int64_t value)
{
  atomic_store_explicit(cell_of(m, label, families[m].type == COUNTER ? COUNTER : GAUGE), (uint64_t)value, memory_order_relaxed);
}

/* The cells that a label of the enumeration stands for: `*n` of them from the one returned on. */
static int cells_of(enum metric m, int label, int *n)
{
  *n = families[m].is_by_device ? DEVICES_MAX : 1;
  return label * *n;
}

int64_t metric_value(enum metric m, int label)
{
  uint64_t sum = 0;
  int n, first = cells_of(m, label, &n);

  for (int i = 0; i < n; i++)
    sum += look(cell_of(m, first + i, families[m].type == COUNTER ? COUNTER : GAUGE));
  return (int64_t)sum;
}

const char *metric_label(enum metric m, int label)
{
  const struct family *f = &families[m];

  return f->label[0] && (!f->label[1] || f->is_by_device) && label >= 0 && label < f->n[0] ? f->value[0][label] : NULL;
}

void metric_look(enum metric m, int label, struct metric_histogram *h)
{
  const struct family *f = &families[m];
  int n, first = cells_of(m, label, &n);

  assert(f->buckets <= METRIC_BUCKETS_MAX);
  *h = (struct metric_histogram){.bound = f->bound, .buckets = f->buckets, .is_seconds = f->is_seconds};
  for (int k = 0; k < n; k++) {
    const _Atomic uint64_t *c = cell_of(m, first + k, HISTOGRAM);

    h->sum += look(&c[f->buckets + 1]);
    for (int i = 0; i <= f->buckets; i++)
      h->count[i] += look(&c[i]);
  }
}

void metric_observe(enum metric m, int label, int64_t value)
{
  const struct family *f = &families[m];
  _Atomic uint64_t *c = cell_of(m, label, HISTOGRAM);
  int i = 0;

  if (value < 0)
    value = 0;
  while (i < f->buckets && value > f->bound[i])
    i++;
  bump(&c[f->buckets + 1], (uint64_t)value);
  bump(&c[i], 1);
}

void metric_observe_ms(enum metric m, int label, double ms)
{
  metric_observe(m, label, ms > 0 && ms < 1e12 ? (int64_t)(ms * 1e6) : 0);
}

void metric_request(enum metric_surface s, int status, int64_t ns)
{
  int i = 0;

  while (i < STATUSES - 1 && status_of[i] != status)
    i++;
  metric_add(METRIC_REQUESTS, (int)s * STATUSES + i, 1);
  metric_observe(METRIC_REQUEST_SECONDS, (int)s, ns);
}

enum metric_surface metric_surface_of(const char *path)
{
  static const struct { const char *prefix; enum metric_surface surface; } known[] = {
      {"/v1/jobs", SURFACE_NATIVE}, {"/v1/files", SURFACE_NATIVE}, {"/v1/", SURFACE_OPENAI}, {"/sdapi/", SURFACE_SDAPI}, {"/internal/", SURFACE_SDAPI},
      {"/queue/", SURFACE_SDAPI},
      {"/healthz", SURFACE_OPS},    {"/readyz", SURFACE_OPS},      {"/metrics", SURFACE_OPS},
  };

  for (int i = 0; i < LEN(known); i++)
    if (!strncmp(path, known[i].prefix, strlen(known[i].prefix)))
      return known[i].surface;
  return SURFACE_OTHER;
}

void metric_refuse(int code)
{
  static const struct { int code; enum metric_refusal reason; } reasons[] = {
      {E_ARG, REFUSAL_BAD_REQUEST}, {E_TYPE, REFUSAL_BAD_REQUEST}, {E_AUTH, REFUSAL_UNAUTHORIZED}, {E_TOOBIG, REFUSAL_TOO_LARGE},
      {E_POLICY, REFUSAL_SAFETY},   {E_NOTREADY, REFUSAL_NOT_READY}, {E_NOMEM, REFUSAL_MEMORY},
  };

  for (int i = 0; i < LEN(reasons); i++)
    if (reasons[i].code == code)
      metric_add(METRIC_REFUSALS, (int)reasons[i].reason, 1);
}

/* ---- the text format ---- */

int metrics_encode_head(struct buf *out, const char *name, const char *help, const char *type, struct err *e)
{
  return buf_addf(out, e, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, type);
}

/* A label's value: backslash, quote and newline are escaped, bytes that are no UTF-8 replaced. */
static int add_value(struct buf *out, const char *s, struct err *e)
{
  for (size_t n; *s; s += n ? n : 1) {
    int r;
    n = utf8_length(s);
    if (*s == '\n')
      r = buf_add(out, "\\n", 2, e);
    else if (*s == '"' || *s == '\\')
      r = buf_addf(out, e, "\\%c", *s);
    else
      r = n ? buf_add(out, s, n, e) : buf_add(out, "?", 1, e);
    if (r)
      return r;
  }
  return 0;
}

int metrics_encode_info(struct buf *out, const char *name, const char *const *labels, struct err *e)
{
  int r = buf_add_str(out, name, e);

  for (int i = 0; !r && labels[i]; i += 2) {
    r = buf_addf(out, e, "%s%s=\"", i ? "," : "{", labels[i]);
    if (!r)
      r = add_value(out, labels[i + 1], e);
    if (!r)
      r = buf_add(out, "\"", 1, e);
  }
  return r ? r : buf_add_str(out, labels[0] ? "} 1\n" : " 1\n", e);
}

/* "name_suffix{surface="openai",status="200",le="0.5"} ": the labels of one series. le NULL: none. */
static int add_series(struct buf *out, const struct family *f, int label, const char *suffix, const char *le, struct err *e)
{
  int at[2] = {label / f->n[1], label % f->n[1]};
  const char *before = "{";

  if (buf_addf(out, e, "%s%s", f->name, suffix))
    return e->code;
  for (int k = 0; k < 2; k++) {
    if (!f->label[k])
      continue;
    if (buf_addf(out, e, "%s%s=\"%s\"", before, f->label[k], f->value[k][at[k]]))
      return e->code;
    before = ",";
  }
  if (le && buf_addf(out, e, "%sle=\"%s\"", before, le))
    return e->code;
  return buf_add_str(out, f->label[0] || f->label[1] || le ? "} " : " ", e);
}

static int add_histogram(struct buf *out, const struct family *f, int label, struct err *e)
{
  const _Atomic uint64_t *c = f->cell + (ptrdiff_t)label * stride(f);
  double unit = f->is_seconds ? (double)NS : 1;
  uint64_t sum = 0;
  char le[32];

  for (int i = 0; i <= f->buckets; i++) {
    sum += look(&c[i]);
    if (i < f->buckets)
      snprintf(le, sizeof le, "%g", (double)f->bound[i] / unit);
    else
      snprintf(le, sizeof le, "+Inf");
    if (add_series(out, f, label, "_bucket", le, e) || buf_addf(out, e, "%" PRIu64 "\n", sum))
      return e->code;
  }
  if (add_series(out, f, label, "_sum", NULL, e) || buf_addf(out, e, "%.17g\n", (double)look(&c[f->buckets + 1]) / unit) ||
      add_series(out, f, label, "_count", NULL, e))
    return e->code;
  return buf_addf(out, e, "%" PRIu64 "\n", sum);
}

static int add_family(struct buf *out, const struct family *f, struct err *e)
{
  static const char *const types[] = {"counter", "gauge", "histogram"};

  if (metrics_encode_head(out, f->name, f->help, types[f->type], e))
    return e->code;
  for (int i = 0; i < f->n[0] * f->n[1]; i++) {
    uint64_t v = look(&f->cell[(ptrdiff_t)i * stride(f)]);
    int r = 0;
    if (f->is_by_device && i % f->n[1] >= devices)
      continue;
    if (f->type == HISTOGRAM)
      r = add_histogram(out, f, i, e);
    else if (!f->is_sparse || v)
      r = add_series(out, f, i, "", NULL, e) || buf_addf(out, e, f->type == GAUGE ? "%" PRId64 "\n" : "%" PRIu64 "\n", v);
    if (r)
      return e->code;
  }
  return 0;
}

static int add_process(struct buf *out, struct err *e)
{
  struct process_usage u;

  process_read(&u);
  if (metrics_encode_head(out, "process_cpu_seconds_total", "Processor time, user and system.", "counter", e) ||
      buf_addf(out, e, "process_cpu_seconds_total %.6f\n", u.cpu_s) ||
      metrics_encode_head(out, "process_start_time_seconds", "Start, in seconds since 1970.", "gauge", e) ||
      buf_addf(out, e, "process_start_time_seconds %.3f\n", u.start_s) ||
      metrics_encode_head(out, "process_resident_memory_bytes", "Memory that is resident.", "gauge", e) ||
      buf_addf(out, e, "process_resident_memory_bytes %" PRIu64 "\n", u.resident) ||
      metrics_encode_head(out, "process_virtual_memory_bytes", "Address space in use.", "gauge", e) ||
      buf_addf(out, e, "process_virtual_memory_bytes %" PRIu64 "\n", u.virtual_size) ||
      metrics_encode_head(out, "process_open_fds", "Open files and connections.", "gauge", e) ||
      buf_addf(out, e, "process_open_fds %" PRIu64 "\n", u.open_files) ||
      metrics_encode_head(out, "process_max_fds", "How many files may be open.", "gauge", e))
    return e->code;
  return buf_addf(out, e, "process_max_fds %" PRIu64 "\n", u.max_files);
}

int metrics_encode(struct buf *out, struct err *e)
{
  for (int i = 0; i < METRIC_COUNT; i++)
    if (add_family(out, &families[i], e))
      return e->code;
  return add_process(out, e);
}
