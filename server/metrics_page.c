/*
 * metrics_page.c - see metrics_page.h.
 */
#include "server/metrics_page.h"

#include "server/metrics.h"
#include "server/safety.h"
#include "server/version.h"

enum { PROFILES_SHOWN = 64 /* as many as a policy may have */ };

static int add_build(struct buf *out, const struct worker *w, struct err *e)
{
  const struct serving *s = worker_serving(w);
  const char *const build[] = {"version", SAFELIGHT_VERSION, "compiler", __VERSION__, NULL};

  if (metrics_encode_head(out, "safelight_build_info", "The program.", "gauge", e) || metrics_encode_info(out, "safelight_build_info", build, e) ||
      metrics_encode_head(out, "safelight_model_info", "The checkpoint that is served, once it is loaded.", "gauge", e))
    return e->code;
  if (!s)
    return 0;
  return metrics_encode_info(out, "safelight_model_info",
                             (const char *const[]){"model", s->limits.model, "digest", s->info->digest, "backend", s->backend, NULL}, e);
}

static int add_generations(struct buf *out, struct safety *s, struct err *e)
{
  struct safety_stamp stamp[PROFILES_SHOWN];
  int n = s ? safety_current(s, stamp, PROFILES_SHOWN) : 0;

  if (metrics_encode_head(out, "safelight_generation_info", "The safety generation that each profile's pictures are drawn under.", "gauge", e))
    return e->code;
  for (int i = 0; i < n; i++)
    if (metrics_encode_info(out, "safelight_generation_info",
                            (const char *const[]){"profile", stamp[i].profile, "id", stamp[i].id, "digest", stamp[i].digest, "requires_nothing",
                                                  stamp[i].requires_nothing ? "yes" : "no", NULL}, e))
      return e->code;
  return 0;
}

int metrics_page(struct buf *out, const struct worker *w, struct err *e)
{
  struct safety *s = worker_safety(w);
  struct err why = {0};

  metric_set(METRIC_READY, 0, s && worker_state(w) == WORKER_READY && !safety_ready(s, &why));
  if (s)
    metric_set(METRIC_SWAPS, 0, (int64_t)safety_swaps(s));
  if (metrics_encode(out, e) || add_build(out, w, e))
    return e->code;
  return add_generations(out, s, e);
}
