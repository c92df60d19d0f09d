/*
 * checkpoint.c - see checkpoint.h.
 *
 * Called by the networks while they are built. Invariants: a parameter that is handed out has exactly the shape that was
 * asked for, a floating type, and finite values only. Old names are translated here and nowhere else, so that the networks
 * know one naming. Threads: a source is not changed by reading; any thread may.
 */
#include "models/checkpoint.h"

#include <errno.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "base/json_load.h"
#include "models/safetensors.h"

/* The published SDXL UNet comes in 2 shards in fp32; 64 leaves room and bounds the open files. */
enum { SHARD_MAX = 64, NAME_BYTES = 256, INDEX_MAX = 8 << 20 };

struct source {
  char *dir;                           /* NULL: synthetic */
  enum dtype type;                     /* of synthetic tensors */
  int count;                           /* files */
  struct safetensors *file[SHARD_MAX];
  char *file_name[SHARD_MAX];          /* within dir; sharded sets only */
};

/* Full precision first: it is what the published pictures were made with. */
static const char *const plain_names[] = {"diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors",
                                          "model.safetensors", "model.fp16.safetensors"};
/* diffusers writes VARIANT behind "index", transformers before it. */
static const char *const index_names[] = {
    "diffusion_pytorch_model.safetensors.index.json", "diffusion_pytorch_model.safetensors.index.fp16.json",
    "diffusion_pytorch_model.fp16.safetensors.index.json", "model.safetensors.index.json", "model.safetensors.index.fp16.json",
    "model.fp16.safetensors.index.json"};

/* The end of a path, so that a long one leaves room for the message. */
static const char *tail(const char *path)
{
  size_t n = strlen(path);

  return n > 160 ? path + n - 160 : path;
}

/* ---- opening ---- */

/* Opens dir/name as the next file. *found is 0 when there is no such directory entry; a dangling link is an entry. */
static int open_file(struct source *s, const char *name, int *found, struct err *e)
{
  struct stat sb;
  char *path;
  int rc = 0;

  if (asprintf(&path, "%s/%s", s->dir, name) < 0)
    return err_set(e, E_NOMEM, "%s: no memory to open it", tail(s->dir));
  *found = lstat(path, &sb) == 0;
  if (*found && !(rc = st_open(&s->file[s->count], path, e)))
    s->count++;
  free(path);
  return rc;
}

/* *index is NULL when there is no such file. */
static int read_index(const struct source *s, const char *name, json_t **index, struct err *e)
{
  struct stat sb;
  json_error_t je;
  char *path, *text = NULL, shown[100];
  FILE *f = NULL;
  size_t n;
  int rc = 0;

  *index = NULL;
  if (asprintf(&path, "%s/%s", s->dir, name) < 0)
    return err_set(e, E_NOMEM, "%s: no memory to open it", tail(s->dir));
  if (lstat(path, &sb))
    goto out;
  f = fopen(path, "re");
  if (!f || fstat(fileno(f), &sb) || !S_ISREG(sb.st_mode) || sb.st_size > INDEX_MAX) {
    rc = err_field(e, E_FILE, tail(path), "%s: not a readable file of at most %d bytes", tail(path), INDEX_MAX);
    goto out;
  }
  text = malloc((size_t)sb.st_size + 1);
  if (!text) {
    rc = err_set(e, E_NOMEM, "%s: no memory to read it", tail(path));
    goto out;
  }
  n = fread(text, 1, (size_t)sb.st_size, f);
  *index = json_load_whole(text, n, JSON_REJECT_DUPLICATES, &je);
  if (!*index && !je.text[0]) /* jansson has no words when memory is short (or calls it a syntax error) */
    rc = err_set(e, E_NOMEM, "%s: no memory to read it", tail(path));
  else if (!*index) {
    st_printable(shown, sizeof shown, je.text);
    rc = err_field(e, E_FILE, tail(path), "%s: not valid JSON: %s at byte %d", tail(path), shown, je.position);
  }
out:
  if (f)
    fclose(f);
  free(text);
  free(path);
  return rc;
}

/* The number of the shard called name, opening it on first sight; or a negative E_*. */
static int open_shard(struct source *s, const char *index_name, const char *name, struct err *e)
{
  static const char plain[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.";
  int found, rc;
  size_t len = name ? strlen(name) : 0;

  for (int i = 0; i < s->count; i++)
    if (name && !strcmp(s->file_name[i], name))
      return i;
  /* The index must not lead out of its folder. */
  if (len < 13 || len > 200 || strspn(name, plain) != len || name[0] == '.' || strcmp(name + len - 12, ".safetensors"))
    return err_field(e, E_FILE, index_name, "%s/%s: names a shard that is not a plain *.safetensors file name", tail(s->dir),
                     index_name);
  if (s->count == SHARD_MAX)
    return err_field(e, E_FILE, index_name, "%s/%s: more than %d shards", tail(s->dir), index_name, SHARD_MAX);
  if (!(s->file_name[s->count] = strdup(name)))
    return err_set(e, E_NOMEM, "%s: no memory to open it", tail(s->dir));
  if ((rc = open_file(s, name, &found, e)))
    return rc;
  if (!found)
    return err_field(e, E_FILE, name, "%s/%s: missing, although %s names it", tail(s->dir), name, index_name);
  return s->count - 1;
}

/* Index and shards must agree both ways: then no tensor is missing, and none is there twice. */
static int open_sharded(struct source *s, const char *index_name, const json_t *index, struct err *e)
{
  json_t *map = json_object_get(index, "weight_map"), *value;
  const char *tensor;
  char shown[NAME_BYTES];
  size_t in_shards = 0;
  int i;

  if (!json_is_object(map) || !json_object_size(map))
    return err_field(e, E_FILE, index_name, "%s/%s: has no weight_map", tail(s->dir), index_name);
  json_object_foreach(map, tensor, value) {
    if ((i = open_shard(s, index_name, json_string_value(value), e)) < 0)
      return i;
    if (!st_find(s->file[i], tensor)) {
      st_printable(shown, sizeof shown, tensor);
      return err_field(e, E_FILE, shown, "%s: tensor \"%.100s\" is missing, although %s puts it there",
                       tail(st_path(s->file[i])), shown, index_name);
    }
  }
  for (i = 0; i < s->count; i++)
    in_shards += st_count(s->file[i]);
  if (in_shards != json_object_size(map))
    return err_field(e, E_FILE, index_name, "%s/%s: lists %zu tensors, but its shards hold %zu", tail(s->dir), index_name,
                     json_object_size(map), in_shards);
  return 0;
}

static int open_any(struct source *s, struct err *e)
{
  int found, rc;
  json_t *index;

  for (size_t i = 0; i < sizeof plain_names / sizeof *plain_names; i++)
    if ((rc = open_file(s, plain_names[i], &found, e)) || found)
      return rc;
  for (size_t i = 0; i < sizeof index_names / sizeof *index_names; i++) {
    if ((rc = read_index(s, index_names[i], &index, e)))
      return rc;
    if (index) {
      rc = open_sharded(s, index_names[i], index, e);
      json_decref(index);
      return rc;
    }
  }
  return err_field(e, E_FILE, tail(s->dir),
                   "%s: holds neither diffusion_pytorch_model.safetensors nor model.safetensors (nor their .fp16 or sharded "
                   "forms; pickled .bin files are never read: convert them)",
                   tail(s->dir));
}

int source_open_files(struct source **out, const char *dir, struct err *e)
{
  struct source *s = calloc(1, sizeof *s);
  int rc;

  *out = NULL;
  if (!s || !(s->dir = strdup(dir)))
    rc = err_set(e, E_NOMEM, "%s: no memory to open it", tail(dir));
  else
    rc = open_any(s, e);
  if (rc)
    source_close(s);
  else
    *out = s;
  return rc;
}

int source_open_file(struct source **out, const char *path, struct err *e)
{
  const char *slash = strrchr(path, '/'), *name = slash ? slash + 1 : path;
  struct source *s = calloc(1, sizeof *s);
  int rc = 0, found = 0;

  *out = NULL;
  if (!s || !(s->dir = slash ? strndup(path, (size_t)(slash - path) + (slash == path)) : strdup(".")))
    rc = err_set(e, E_NOMEM, "%s: no memory to open it", tail(path));
  if (!rc)
    rc = open_file(s, name, &found, e);
  if (!rc && !found)
    rc = err_field(e, E_FILE, tail(path), "%s: there is no such file", tail(path));
  if (rc)
    source_close(s);
  else
    *out = s;
  return rc;
}

int source_open_synthetic(struct source **out, enum dtype type, struct err *e)
{
  struct source *s = NULL;

  *out = NULL;
  if (type != DT_F32 && type != DT_F16 && type != DT_BF16)
    return err_set(e, E_ARG, "synthetic weights are F32, F16 or BF16");
  if (!(s = calloc(1, sizeof *s)))
    return err_set(e, E_NOMEM, "no memory for synthetic weights");
  s->type = type;
  *out = s;
  return 0;
}

int source_unchanged(const struct source *s, struct err *e)
{
  int rc = 0;

  for (int i = 0; !rc && i < s->count; i++)
    rc = st_unchanged(s->file[i], e);
  return rc;
}

void source_close(struct source *s)
{
  if (!s)
    return;
  for (int i = 0; i < SHARD_MAX; i++) {
    st_close(s->file[i]);
    free(s->file_name[i]);
  }
  free(s->dir);
  free(s);
}

/* ---- finding ---- */

static const struct st_tensor *find_exact(const struct source *s, const char *name, const struct safetensors **in)
{
  for (int i = 0; i < s->count; i++) {
    const struct st_tensor *t = st_find(s->file[i], name);

    if (t) {
      *in = s->file[i];
      return t;
    }
  }
  return NULL;
}

/* out = name with the first `from` replaced by `to`; 0 when it does not occur or does not fit. */
static int replace(char out[NAME_BYTES], const char *name, const char *from, const char *to)
{
  const char *at = strstr(name, from);
  int n;

  if (!at)
    return 0;
  n = snprintf(out, NAME_BYTES, "%.*s%s%s", (int)(at - name), name, to, at + strlen(from));
  return n > 0 && n < NAME_BYTES;
}

/* Before diffusers 0.15 the attention blocks of the VAE had names of their own. transformers 5 and some exporters leave the
 * prefix of text encoders out. */
static const struct st_tensor *find(const struct source *s, const char *name, const struct safetensors **in)
{
  static const char *const old[][2] = {
      {".to_q.", ".query."}, {".to_k.", ".key."}, {".to_v.", ".value."}, {".to_out.0.", ".proj_attn."}};
  static const char prefix[] = "text_model.";
  const struct st_tensor *t = find_exact(s, name, in);
  char other[NAME_BYTES];

  for (size_t i = 0; !t && i < sizeof old / sizeof *old; i++)
    if (replace(other, name, old[i][0], old[i][1]))
      t = find_exact(s, other, in);
  if (!t && !strncmp(name, prefix, sizeof prefix - 1))
    t = find_exact(s, name + sizeof prefix - 1, in);
  else if (!t && snprintf(other, sizeof other, "%s%s", prefix, name) < (int)sizeof other)
    t = find_exact(s, other, in);
  return t;
}

int source_has(struct source *s, const char *name)
{
  const struct safetensors *in;

  return !s->dir || find(s, name, &in) != NULL;
}

int source_dims(struct source *s, const char *name)
{
  const struct safetensors *in;
  const struct st_tensor *t = s->dir ? find(s, name, &in) : NULL;

  return t ? t->nd : 0;
}

/* ---- handing out ---- */

static void write_shape(char out[96], int nd, const int64_t *shape)
{
  int at = snprintf(out, 96, "(");

  for (int i = 0; i < nd && at < 80; i++)
    at += snprintf(out + at, (size_t)(96 - at), i ? ", %lld" : "%lld", (long long)shape[i]);
  if (at < 94)
    snprintf(out + at, (size_t)(96 - at), ")");
}

/* (O, I) and (O, I, 1, 1) are the same numbers: a linear and a 1x1 convolution. */
static int shapes_match(int nd, const int64_t *shape, const struct st_tensor *t)
{
  int common = nd < t->nd ? nd : t->nd;
  const int64_t *longer = nd < t->nd ? t->shape : shape;

  if (nd != t->nd && (common != 2 || nd + t->nd != 6 || longer[2] != 1 || longer[3] != 1))
    return 0;
  for (int i = 0; i < common; i++)
    if (shape[i] != t->shape[i])
      return 0;
  return 1;
}

static int get_from_file(struct source *s, const char *name, struct param *p, struct err *e)
{
  const struct safetensors *in = NULL;
  const struct st_tensor *t = find(s, name, &in);
  char have[96], need[96];
  int64_t bad;

  if (!t)
    return err_field(e, E_FILE, name, "%s: tensor \"%s\" is missing; the configuration needs it",
                     tail(s->count == 1 ? st_path(s->file[0]) : s->dir), name);
  if (t->type != ST_F32 && t->type != ST_F16 && t->type != ST_BF16)
    return err_field(e, E_FILE, name, "%s: tensor \"%s\" has dtype %s; weights are F32, F16 or BF16", tail(st_path(in)), name,
                     st_dtype_name(t->type));
  if (!shapes_match(p->nd, p->shape, t)) {
    write_shape(have, t->nd, t->shape);
    write_shape(need, p->nd, p->shape);
    return err_field(e, E_FILE, name, "%s: tensor \"%s\" has shape %s where the configuration needs %s", tail(st_path(in)),
                     name, have, need);
  }
  if ((bad = st_nonfinite(t)) >= 0)
    return err_field(e, E_FILE, name, "%s: tensor \"%s\" holds a value that is not finite (element %lld)", tail(st_path(in)),
                     name, (long long)bad);
  p->data = t->data;
  p->type = t->type == ST_F32 ? DT_F32 : t->type == ST_F16 ? DT_F16 : DT_BF16;
  p->held = (void *)t;
  p->held_in = in;
  return 0;
}

static int get_from_formula(const struct source *s, const char *name, struct param *p, struct err *e)
{
  int64_t bytes = (int64_t)dtype_size(s->type);

  for (int i = 0; i < p->nd; i++)
    if (p->shape[i] < 1 || __builtin_mul_overflow(bytes, p->shape[i], &bytes))
      return err_field(e, E_ARG, name, "tensor \"%s\" has an impossible shape", name);
  if (!(p->held = malloc((size_t)bytes)))
    return err_field(e, E_NOMEM, name, "no memory for tensor \"%s\" of %lld bytes", name, (long long)bytes);
  synth_fill(name, p->nd, p->shape, s->type, p->held);
  p->data = p->held;
  p->type = s->type;
  return 0;
}

int source_get(struct source *s, const char *name, int nd, const int64_t *shape, struct param *p, struct err *e)
{
  int rc;

  memset(p, 0, sizeof *p);
  if (nd < 1 || nd > 4)
    return err_field(e, E_ARG, name, "tensor \"%s\": 1 to 4 dimensions, not %d", name, nd);
  p->nd = nd;
  memcpy(p->shape, shape, (size_t)nd * sizeof *shape);
  rc = s->dir ? get_from_file(s, name, p, e) : get_from_formula(s, name, p, e);
  if (rc)
    memset(p, 0, sizeof *p);
  return rc;
}

void param_release(struct param *p)
{
  if (p->held_in)
    st_forget(p->held_in, p->held);
  else
    free(p->held);
  memset(p, 0, sizeof *p);
}
