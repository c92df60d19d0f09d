/*
 * admin_activity.c - see admin_activity.h.
 */
#include "server/admin_activity.h"

#include <stdlib.h>
#include <time.h>

#include "proto/admin.h"
#include "server/job_list.h"
#include "server/metrics.h"

enum { JOBS_SHOWN = 200, COUNTS_MAX = 48, HISTOGRAMS_MAX = 24 };

/* What is shown of the metrics table, by the name that the page knows it by; labels: how many values the family's label has, 0 for none. */
struct shown {
  enum metric m;
  const char *name;
  int labels;
};

static const struct shown counts[] = {
    {METRIC_PICTURES, "pictures", 0},   {METRIC_STEPS, "steps", 0},         {METRIC_PREVIEWS, "previews", 0},
    {METRIC_CONNECTIONS, "connections", 0}, {METRIC_IN_FLIGHT, "requests_in_flight", 0}, {METRIC_REFUSALS, "refusals", REFUSAL_COUNT},
    {METRIC_CANCELLED, "cancelled", CANCEL_COUNT}, {METRIC_DURABLE, "durable", DURABLE_COUNT}, {METRIC_DEVICE_BYTES, "device_bytes", MEMORY_COUNT},
};

static const struct shown histograms[] = {
    {METRIC_REQUEST_SECONDS, "request_seconds", SURFACE_COUNT}, {METRIC_STAGE_SECONDS, "stage_seconds", STAGE_COUNT}, {METRIC_STEP_SECONDS, "step_seconds", 0},
    {METRIC_BATCH_SIZE, "batch_size", 0},
};

#define LEN(a) ((int)(sizeof(a) / sizeof *(a)))

/* Room for one answer. */
struct room {
  struct admin_job job[JOBS_SHOWN];
  struct admin_count count[COUNTS_MAX];
  struct admin_histogram histogram[HISTOGRAMS_MAX];
  struct metric_histogram value[HISTOGRAMS_MAX];
};

static struct admin_job show_job(const struct job_glance *g)
{
  static const char *const states[] = {[JOB_PREPARING] = "preparing", [JOB_QUEUED] = "queued", [JOB_RUNNING] = "running", [JOB_DRAWN] = "encoding"};

  return (struct admin_job){.id = g->id, .caller = g->caller, .profile = g->profile, .state = states[g->state], .width = g->width, .height = g->height,
                            .steps = g->steps, .steps_done = g->steps_done, .pictures = g->pictures, .drawn = g->drawn, .position = g->position,
                            .age_s = g->age_s, .wait_s = g->wait_s};
}

static int show_counts(struct admin_count *out)
{
  int n = 0;

  for (int i = 0; i < LEN(counts); i++)
    for (int k = 0; k < (counts[i].labels ? counts[i].labels : 1) && n < COUNTS_MAX; k++)
      out[n++] = (struct admin_count){.name = counts[i].name, .label = counts[i].labels ? metric_label(counts[i].m, k) : "",
                                      .value = metric_value(counts[i].m, k)};
  return n;
}

static int show_histograms(struct room *r)
{
  int n = 0;

  for (int i = 0; i < LEN(histograms); i++)
    for (int k = 0; k < (histograms[i].labels ? histograms[i].labels : 1) && n < HISTOGRAMS_MAX; k++, n++) {
      struct metric_histogram *v = &r->value[n];
      metric_look(histograms[i].m, k, v);
      r->histogram[n] = (struct admin_histogram){.name = histograms[i].name, .label = histograms[i].labels ? metric_label(histograms[i].m, k) : "",
                                                 .bound = v->bound, .count = v->count, .buckets = v->buckets, .sum = v->sum,
                                                 .unit = v->is_seconds ? 1e9 : 1};
    }
  return n;
}

static double now_s(void)
{
  struct timespec t;

  clock_gettime(CLOCK_REALTIME, &t);
  return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

int admin_activity(struct buf *out, struct jobs *js, const struct config *cfg, struct err *e)
{
  struct jobs_count count = jobs_count(js);
  struct room *room = malloc(sizeof *room);
  struct admin_activity a = {.now_s = now_s(), .waiting = count.waiting, .capacity = cfg->queue, .running = (int)metric_value(METRIC_RUNNING, 0),
                             .max_running = count.room, .active = count.active};
  struct job_glance *list = NULL;
  int n;

  if (!room)
    err_set(e, E_NOMEM, "out of memory for the activity");
  if (!room || jobs_list(js, &list, &n, e))
    goto out;
  a.jobs = n < JOBS_SHOWN ? n : JOBS_SHOWN;
  for (int i = 0; i < a.jobs; i++)
    room->job[i] = show_job(&list[i]);
  a.job = room->job;
  a.count = room->count;
  a.counts = show_counts(room->count);
  a.histogram = room->histogram;
  a.histograms = show_histograms(room);
  (void)!admin_encode_activity(out, &a, e);
out:
  free(list);
  free(room);
  return e->code;
}
