/*
 * adapter_inspect.c - what `safelight adapter inspect` says of a file, also of one that adapter_open refuses.
 *
 * The report is put together first, as JSON, and printed as that or as text, so that both say the same. A refused file's report has the
 * reason and every key that names no layer, each with the alias that looks most like it.
 *
 * Called by server/adapter_inspect.c and tests. Threads: no state.
 */
#include <jansson.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "models/adapter_impl.h"
#include "models/sources.h"

enum { UNKNOWN_MAX = 100 }; /* unknown keys that are listed */

/* What kind of layer a site is, for the coverage. */
enum part { PART_ATTN1, PART_ATTN2, PART_FF, PART_PROJ, PART_CONV, PART_TIME, PART_NORM, PART_TEXT, PARTS };
static const char *const part_names[PARTS] = {"attn1", "attn2", "ff", "proj", "conv", "time", "norm", "text_encoder"};

static enum part part_of(const struct site *s)
{
  if (strncmp(s->name, "unet.", 5))
    return PART_TEXT;
  if (s->kind == WEIGHT_NORM)
    return PART_NORM;
  if (strstr(s->name, ".attn1."))
    return PART_ATTN1;
  if (strstr(s->name, ".attn2."))
    return PART_ATTN2;
  if (strstr(s->name, ".ff."))
    return PART_FF;
  if (strstr(s->name, ".proj_"))
    return PART_PROJ;
  return strstr(s->name, "time_emb") || strstr(s->name, "add_embedding") ? PART_TIME : PART_CONV;
}

/* Sites that an adapter may touch: the rest have no aliases. */
static int is_target(const struct site *s)
{
  return s->kind != WEIGHT_TABLE && (!strncmp(s->name, "unet.", 5) || !strncmp(s->name, "text_encoder", 12));
}

static json_t *coverage(const struct adapter *a, const struct generation *base)
{
  int touched[PARTS] = {0}, of[PARTS] = {0}, i;
  json_t *all = json_object();

  for (i = 0; i < base->n; i++)
    if (is_target(&base->site[i])) {
      of[part_of(&base->site[i])]++;
      touched[part_of(&base->site[i])] += adapter_at(a, i) != NULL;
    }
  for (i = 0; i < PARTS; i++)
    if (of[i])
      json_object_set_new(all, part_names[i], json_pack("{s:i, s:i}", "touched", touched[i], "of", of[i]));
  return all;
}

static const char *kind_of(const struct delta *d)
{
  static const char *const names[] = {[DELTA_LOWRANK] = "low-rank", [DELTA_DENSE] = "dense", [DELTA_DORA] = "dora",
                                      [DELTA_REPLACE] = "replace"};

  return names[d->kind];
}

/* Per kind of delta: how many, and the least and greatest rank. */
static json_t *kinds(const struct adapter *a)
{
  json_t *all = json_object();
  int i;

  for (i = 0; i < a->n; i++) {
    const struct delta *d = &a->delta[i];
    json_t *k = json_object_get(all, kind_of(d));
    json_int_t n = json_integer_value(json_object_get(k, "layers")), lo = json_integer_value(json_object_get(k, "rank_min")),
               hi = json_integer_value(json_object_get(k, "rank_max"));

    lo = n && lo < d->rank ? lo : d->rank;
    hi = n && hi > d->rank ? hi : d->rank;
    json_object_set_new(all, kind_of(d), json_pack("{s:I, s:I, s:I}", "layers", n + 1, "rank_min", lo, "rank_max", hi));
  }
  return all;
}

static json_t *rules(const struct adapter *a)
{
  json_t *all = json_object();
  int i;

  for (i = 0; i < a->n; i++) {
    const char *rule = adapter_scale_rule_name(a->delta[i].rule);

    json_object_set_new(all, rule, json_integer(json_integer_value(json_object_get(all, rule)) + 1));
  }
  return all;
}

static double squares(const float *p, int64_t n)
{
  double sum = 0;
  int64_t i;

  for (i = 0; i < n; i++)
    sum += (double)p[i] * p[i];
  return sum;
}

/* |dW| over all layers and, where the weights are at hand, its share of |W0|; the layer that changes most. sources may be NULL. */
static int norms(json_t *report, const struct adapter *a, const struct generation *base, const struct model_sources *sources,
                 struct err *e)
{
  double dw = 0, w0 = 0, most = -1, norm, share;
  const char *where = "";
  json_t *n;
  int i, code;

  for (i = 0; i < a->n; i++) {
    const struct delta *d = &a->delta[i];
    const struct site *s = &base->site[d->site];
    struct pristine p = {0};

    norm = d->norm;
    share = norm;
    if (sources) {
      code = sources_read(sources, s, &p, e);
      if (code)
        return code;
      norm = d->norm >= 0 ? d->norm : delta_norm(d, s, p.w);
      share = squares(p.w, p.count) > 0 ? norm / sqrt(squares(p.w, p.count)) : 0;
      w0 += squares(p.w, p.count);
      pristine_free(&p);
    }
    dw += norm > 0 ? norm * norm : 0;
    if (share > most) {
      most = share;
      where = s->name;
    }
  }
  n = json_pack("{s:f, s:s}", "dW", sqrt(dw), "largest_at", where);
  json_object_set_new(n, sources ? "largest_relative" : "largest", json_real(most));
  if (sources)
    json_object_set_new(n, "relative", json_real(w0 > 0 ? sqrt(dw / w0) : 0));
  return json_object_set_new(report, "norms", n) ? err_set(e, E_NOMEM, "no memory for a report") : 0;
}

static int describe(json_t *report, const struct adapter *a, const struct generation *base, const struct model_sources *sources,
                    struct err *e)
{
  json_object_set_new(report, "format", json_string(a->format));
  json_object_set_new(report, "layers", json_integer(a->n));
  json_object_set_new(report, "params", json_integer(a->params));
  json_object_set_new(report, "kinds", kinds(a));
  json_object_set_new(report, "scale_rules", rules(a));
  json_object_set_new(report, "coverage", coverage(a, base));
  return norms(report, a, base, sources, e);
}

/* Every key that names no layer, as far as the header can be read at all. */
static void list_unknown(json_t *report, const struct adapter_bytes *b, const struct adapter_names *names)
{
  json_t *list = json_array();
  struct safetensors *st = NULL;
  size_t i, n = 0;

  if (!st_open_memory(&st, b->p, b->n, b->name, NULL))
    json_object_set_new(report, "tensors", json_integer((json_int_t)st_count(st)));
  for (i = 0; st && i < st_count(st); i++) {
    const char *key = st_at(st, i)->name;

    if (adapter_key_resolve(names, key).site != SITE_NONE)
      continue;
    if (n++ < UNKNOWN_MAX)
      json_array_append_new(list, json_pack("{s:s, s:s}", "key", key, "nearest", adapter_key_hint(names, key)));
  }
  if (n) {
    json_object_set(report, "unknown_keys", list);
    json_object_set_new(report, "unknown_count", json_integer((json_int_t)n));
  }
  json_decref(list);
  st_close(st);
}

/* ---- printing ---- */

static double number(const json_t *o, const char *key)
{
  return json_number_value(json_object_get(o, key));
}

static const char *string(const json_t *o, const char *key)
{
  const char *s = json_string_value(json_object_get(o, key));

  return s ? s : "";
}

static void print_described(json_t *r, FILE *out)
{
  json_t *o, *v;
  const char *key;

  fprintf(out, "format    %s, %g layers, %g numbers\n", string(r, "format"), number(r, "layers"), number(r, "params"));
  json_object_foreach(json_object_get(r, "kinds"), key, v) {
    fprintf(out, "factors   %g %s", number(v, "layers"), key);
    if (number(v, "rank_max") > 0)
      fprintf(out, ", rank %g to %g", number(v, "rank_min"), number(v, "rank_max"));
    fprintf(out, "\n");
  }
  fprintf(out, "scale    ");
  json_object_foreach(json_object_get(r, "scale_rules"), key, v)
    fprintf(out, " from %s: %lld", key, (long long)json_integer_value(v));
  fprintf(out, "\ncoverage ");
  json_object_foreach(json_object_get(r, "coverage"), key, v)
    fprintf(out, " %s %g/%g", key, number(v, "touched"), number(v, "of"));
  o = json_object_get(r, "norms");
  fprintf(out, "\nnorm      |dW| %.4g", number(o, "dW"));
  if (json_object_get(o, "relative"))
    fprintf(out, ", %.3g of |W0|; most %.3g at %s\n", number(o, "relative"), number(o, "largest_relative"), string(o, "largest_at"));
  else
    fprintf(out, "; most %.4g at %s\n", number(o, "largest"), string(o, "largest_at"));
}

static void print_text(json_t *r, FILE *out)
{
  json_t *v;
  size_t i;

  fprintf(out, "name      %s\ndigest    %s\n", string(r, "name"), string(r, "digest"));
  if (json_is_true(json_object_get(r, "accepted"))) {
    print_described(r, out);
    return;
  }
  fprintf(out, "REFUSED   %s\n", string(r, "reason"));
  if (!json_object_get(r, "unknown_count"))
    return;
  fprintf(out, "%g of %g tensors name no layer of this model:\n", number(r, "unknown_count"), number(r, "tensors"));
  json_array_foreach(json_object_get(r, "unknown_keys"), i, v)
    fprintf(out, "  %s\n    nearest: %s\n", string(v, "key"), string(v, "nearest"));
  if (number(r, "unknown_count") > UNKNOWN_MAX)
    fprintf(out, "  and %g more\n", number(r, "unknown_count") - UNKNOWN_MAX);
}

static int print_json(const json_t *r, FILE *out, struct err *e)
{
  char *text = json_dumps(r, JSON_INDENT(2));

  if (!text)
    return err_set(e, E_NOMEM, "no memory for a report");
  fprintf(out, "%s\n", text);
  free(text);
  return 0;
}

int adapter_inspect(const char *path, const struct adapter_names *names, const struct model_sources *sources, int as_json, FILE *out,
                    struct err *e)
{
  struct adapter_bounds bounds;
  struct adapter_bytes b;
  struct adapter *a = NULL;
  struct err refused = {0};
  json_t *report;
  char digest[65];
  int code, verdict;

  adapter_bounds_default(&bounds);
  code = adapter_bytes_read(&b, path, bounds.max_bytes, e);
  if (code)
    return code;
  report = json_object();
  if (!report) {
    code = err_set(e, E_NOMEM, "no memory for a report");
    goto out;
  }
  verdict = adapter_open_memory(&a, b.name, b.p, b.n, b.config, names, &bounds, &refused);
  if (verdict && (code = adapter_digest(digest, b.p, b.n, b.config, e)))
    goto out;
  json_object_set_new(report, "name", json_string(b.name));
  json_object_set_new(report, "digest", json_string(a ? a->digest : digest));
  json_object_set_new(report, "accepted", json_boolean(!verdict));
  if (verdict) {
    json_object_set_new(report, "reason", json_string(refused.msg));
    json_object_set_new(report, "field", json_string(refused.field));
    list_unknown(report, &b, names);
  } else {
    code = describe(report, a, adapter_names_base(names), sources, e);
  }
  if (!code && as_json)
    code = print_json(report, out, e);
  else if (!code)
    print_text(report, out);
  if (!code && verdict)
    code = err_field(e, refused.code, refused.field, "%s", refused.msg);
out:
  json_decref(report);
  adapter_close(a);
  adapter_bytes_free(&b);
  return code;
}
