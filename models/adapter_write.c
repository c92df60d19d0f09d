/*
 * adapter_write.c - see adapter_write.h. Called by the command line and tests. Threads: no state.
 */
#include "models/adapter_write.h"

#include <errno.h>
#include <jansson.h>
#include <sodium.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "models/sources.h"

/* ---- an adapter in memory ---- */

struct adapter *adapter_new_lowrank(const char *name, int n)
{
  struct adapter *a = calloc(1, sizeof *a);

  if (!a)
    return NULL;
  snprintf(a->name, sizeof a->name, "%s", name);
  snprintf(a->format, sizeof a->format, "diffusers");
  a->delta = calloc((size_t)(n ? n : 1), sizeof *a->delta);
  a->n = a->delta ? n : 0;
  if (!a->delta) {
    adapter_close(a);
    return NULL;
  }
  return a;
}

int adapter_set_lowrank(struct adapter *a, int i, const struct generation *base, int site, int64_t rank, struct err *e)
{
  const struct site *s = &base->site[site];
  struct delta *d = &a->delta[i];

  *d = (struct delta){.site = site, .kind = DELTA_LOWRANK, .rank = rank, .scale = 1, .rule = SCALE_NONE};
  d->down = calloc((size_t)(rank * site_columns(s)), sizeof *d->down);
  d->up = calloc((size_t)(s->out * rank), sizeof *d->up);
  return d->down && d->up ? 0 : err_field(e, E_NOMEM, s->name, "%s: out of memory for its factors", s->name);
}

int adapter_finish(struct adapter *a, const struct generation *base, struct err *e)
{
  crypto_generichash_state h;
  unsigned char sum[32];

  if (sodium_init() < 0)
    return err_set(e, E_INTERNAL, "libsodium does not start");
  crypto_generichash_init(&h, NULL, 0, sizeof sum);
  for (int i = 0; i < a->n; i++) {
    struct delta *d = &a->delta[i];
    const struct site *s = &base->site[d->site];
    int64_t down = d->rank * site_columns(s), up = s->out * d->rank;

    a->params += down + up;
    a->max_rank = d->rank > a->max_rank ? d->rank : a->max_rank;
    a->targets_text |= !strncmp(s->name, "text_encoder", 12);
    d->norm = delta_norm(d, s, NULL);
    crypto_generichash_update(&h, (const unsigned char *)s->name, strlen(s->name) + 1);
    crypto_generichash_update(&h, (const unsigned char *)d->down, (size_t)down * sizeof *d->down);
    crypto_generichash_update(&h, (const unsigned char *)d->up, (size_t)up * sizeof *d->up);
  }
  crypto_generichash_final(&h, sum, sizeof sum);
  sodium_bin2hex(a->digest, sizeof a->digest, sum, sizeof sum);
  return 0;
}

/* ---- a file ---- */

struct entry {
  char *name;
  const struct delta *d;
  const struct site *site;
  int is_up;
  int nd;                 /* 2 or 4 */
  size_t bytes;
};

static int by_name(const void *a, const void *b)
{
  return strcmp(((const struct entry *)a)->name, ((const struct entry *)b)->name);
}

MUST_CHECK static int add_entry(struct entry *x, const struct delta *d, const struct site *s, int is_up, int nd, struct err *e)
{
  *x = (struct entry){.d = d, .site = s, .is_up = is_up, .nd = nd};
  x->bytes = sizeof(float) * (size_t)(d->rank * (is_up ? s->out : site_columns(s)));
  if (asprintf(&x->name, "%s.lora_%s.weight", s->name, is_up ? "B" : "A") < 0) {
    x->name = NULL;
    return err_set(e, E_NOMEM, "out of memory for a name");
  }
  return 0;
}

/* Two entries per delta, in name order: the order of the file. */
MUST_CHECK static int list_entries(struct entry *x, const struct adapter *a, const struct generation *base,
                                   const struct model_sources *sources, struct err *e)
{
  int r = 0;

  for (int i = 0; !r && i < a->n; i++) {
    const struct delta *d = &a->delta[i];
    const struct site *s = &base->site[d->site];
    int nd = s->kind == WEIGHT_CONV || (sources && sources_dims(sources, s) == 4) ? 4 : 2;

    if (d->kind != DELTA_LOWRANK || d->bias)
      return err_field(e, E_ARG, s->name, "%s: only low-rank changes without bias can be written as a LoRA", s->name);
    r = add_entry(&x[2 * i], d, s, 0, nd, e);
    if (!r)
      r = add_entry(&x[2 * i + 1], d, s, 1, nd, e);
  }
  if (!r)
    qsort(x, 2 * (size_t)a->n, sizeof *x, by_name);
  return r;
}

static json_t *shape_json(const struct entry *x)
{
  const struct site *s = x->site;
  int64_t rank = x->d->rank, kh = s->kind == WEIGHT_CONV ? s->kh : 1, kw = s->kind == WEIGHT_CONV ? s->kw : 1;

  if (x->nd == 2)
    return x->is_up ? json_pack("[I,I]", (json_int_t)s->out, (json_int_t)rank) : json_pack("[I,I]", (json_int_t)rank, (json_int_t)s->in);
  return x->is_up ? json_pack("[I,I,i,i]", (json_int_t)s->out, (json_int_t)rank, 1, 1)
                  : json_pack("[I,I,I,I]", (json_int_t)rank, (json_int_t)s->in, (json_int_t)kh, (json_int_t)kw);
}

/* The header's JSON, padded with spaces to a multiple of 8 bytes so that the numbers are aligned. */
MUST_CHECK static int make_header(char **out, size_t *len, const struct entry *x, int n, const struct adapter_meta *meta, int n_meta,
                                  struct err *e)
{
  json_t *root = json_object(), *m = json_pack("{s:s}", "format", "pt");
  size_t at = 0, text_len;
  char *text = NULL;
  int ok = m && root;

  for (int i = 0; ok && i < n_meta; i++)
    ok = !json_object_set_new(m, meta[i].key, json_string(meta[i].value));
  ok = !json_object_set_new(root, "__metadata__", m) && ok; /* takes m over in any case */
  for (int i = 0; ok && i < n; i++, at += x[i - 1].bytes)
    ok = !json_object_set_new(root, x[i].name, json_pack("{s:s, s:o, s:[I,I]}", "dtype", "F32", "shape", shape_json(&x[i]), "data_offsets",
                                                         (json_int_t)at, (json_int_t)(at + x[i].bytes)));
  if (ok)
    text = json_dumps(root, JSON_COMPACT);
  json_decref(root);
  text_len = text ? strlen(text) : 0;
  *len = (text_len + 7) / 8 * 8;
  *out = text ? malloc(*len) : NULL;
  if (*out) {
    memset(*out, ' ', *len);
    memcpy(*out, text, text_len);
  }
  free(text);
  return *out ? 0 : err_set(e, E_NOMEM, "out of memory for a header, or its metadata is not UTF-8");
}

/* The file holds little-endian fp32, which is what every machine this runs on has in memory. */
static int write_entry(FILE *f, const struct entry *x)
{
  size_t n = x->bytes / sizeof(float);
  const float *p = x->is_up ? x->d->up : x->d->down;
  int ok = 1;

  if (!x->is_up || x->d->scale == 1)
    return fwrite(p, sizeof *p, n, f) == n;
  for (size_t i = 0; ok && i < n; i++) {
    float v = p[i] * x->d->scale;

    ok = fwrite(&v, sizeof v, 1, f) == 1;
  }
  return ok;
}

MUST_CHECK static int write_file(const char *path, const char *header, size_t len, const struct entry *x, int n, struct err *e)
{
  unsigned char size[8];
  char *part = NULL;
  FILE *f;
  int ok, r = 0;

  if (asprintf(&part, "%s.part", path) < 0)
    return err_set(e, E_NOMEM, "out of memory for a path");
  for (int i = 0; i < 8; i++)
    size[i] = (unsigned char)((uint64_t)len >> 8 * i);
  f = fopen(part, "we");
  ok = f && fwrite(size, 1, sizeof size, f) == sizeof size && fwrite(header, 1, len, f) == len;
  for (int i = 0; ok && i < n; i++)
    ok = write_entry(f, &x[i]);
  ok = ok && !fflush(f) && !fsync(fileno(f));
  if (f && fclose(f))
    ok = 0;
  if (!ok || rename(part, path)) {
    r = err_field(e, E_FILE, path, "%s: cannot be written: %s", path, strerror(errno));
    unlink(part);
  }
  free(part);
  return r;
}

int adapter_write(const char *path, const struct adapter *a, const struct generation *base, const struct model_sources *sources,
                  const struct adapter_meta *meta, int n_meta, struct err *e)
{
  struct entry *x = calloc(2 * (size_t)a->n + 1, sizeof *x);
  char *header = NULL;
  size_t len = 0;
  int r;

  if (!x)
    return err_set(e, E_NOMEM, "out of memory for a file of %d sites", a->n);
  r = list_entries(x, a, base, sources, e);
  if (!r)
    r = make_header(&header, &len, x, 2 * a->n, meta, n_meta, e);
  if (!r)
    r = write_file(path, header, len, x, 2 * a->n, e);
  free(header);
  for (int i = 0; i < 2 * a->n; i++)
    free(x[i].name);
  free(x);
  return r;
}
