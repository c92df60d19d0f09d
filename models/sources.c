/*
 * sources.c - see sources.h. Called by the loader thread and by tools. Threads: no state of its own.
 */
#include "models/sources.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/convert.h"

int sources_add(struct model_sources *s, const char *component, struct source *source, struct err *e)
{
  if (s->n == SOURCES_MAX) {
    source_close(source);
    return err_set(e, E_INTERNAL, "a model has at most %d components", SOURCES_MAX);
  }
  snprintf(s->part[s->n].component, sizeof s->part[s->n].component, "%s", component);
  s->part[s->n++].source = source;
  return 0;
}

void sources_close(struct model_sources *s)
{
  for (int i = 0; i < s->n; i++)
    source_close(s->part[i].source);
  *s = (struct model_sources){0};
}

int64_t site_count(const struct site *s)
{
  return s->out * site_columns(s);
}

/* The shape in the checkpoint; its number of dimensions. */
static int site_shape(const struct site *s, int64_t shape[4])
{
  int is_table = s->kind == WEIGHT_TABLE;

  shape[0] = is_table ? s->in : s->out;
  shape[1] = is_table ? s->out : s->in;
  shape[2] = s->kh;
  shape[3] = s->kw;
  return s->kind == WEIGHT_CONV ? 4 : s->kind == WEIGHT_NORM ? 1 : 2;
}

/* One tensor as fp32 in memory of its own. */
static int read_tensor(struct source *s, const char *name, const char *part, int nd, const int64_t *shape, float **out, struct err *e)
{
  struct param p = {0};
  char full[512];
  int64_t count = 1;
  int rc;

  snprintf(full, sizeof full, "%s.%s", name, part);
  rc = source_get(s, full, nd, shape, &p, e);
  if (rc)
    return rc;
  for (int i = 0; i < nd; i++)
    count *= shape[i];
  *out = malloc((size_t)count * sizeof **out);
  if (*out)
    convert_array(*out, DT_F32, p.data, p.type, count);
  else
    rc = err_field(e, E_NOMEM, full, "no memory for tensor \"%s\" in fp32", full);
  param_release(&p);
  return rc;
}

/* The source of the site's component, or NULL; *name: the parameter's name in there. */
static struct source *find_source(const struct model_sources *s, const struct site *site, const char **name)
{
  const char *dot = strchr(site->name, '.');
  size_t len = dot ? (size_t)(dot - site->name) : 0;

  *name = dot ? dot + 1 : "";
  for (int i = 0; i < s->n; i++)
    if (strlen(s->part[i].component) == len && !strncmp(s->part[i].component, site->name, len))
      return s->part[i].source;
  return NULL;
}

int sources_dims(const struct model_sources *s, const struct site *site)
{
  const char *name;
  struct source *source = find_source(s, site, &name);
  char full[512];

  snprintf(full, sizeof full, "%s.weight", name);
  return source ? source_dims(source, full) : 0;
}

int sources_read(const struct model_sources *s, const struct site *site, struct pristine *p, struct err *e)
{
  const char *name;
  struct source *source = find_source(s, site, &name);
  int64_t shape[4];
  int rc, nd = site_shape(site, shape);

  *p = (struct pristine){.count = site_count(site)};
  if (!source)
    return err_field(e, E_INTERNAL, site->name, "%s: its checkpoint is not open", site->name);
  rc = source_unchanged(source, e);
  if (!rc)
    rc = read_tensor(source, name, "weight", nd, shape, &p->w, e);
  if (!rc && site->has_bias)
    rc = read_tensor(source, name, "bias", 1, &site->out, &p->bias, e);
  if (rc)
    pristine_free(p);
  return rc;
}

void pristine_free(struct pristine *p)
{
  free(p->w);
  free(p->bias);
  *p = (struct pristine){0};
}
