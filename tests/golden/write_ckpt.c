/*
 * write_ckpt.c - see write_ckpt.h. Called by the golden tests. Threads: none of its own.
 */
#include "tests/golden/write_ckpt.h"

#include <dirent.h>
#include <errno.h>
#include <ftw.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "base/buf.h"
#include "base/half.h"
#include "models/checkpoint.h"

enum { LINES_MAX = 4096, NAME_BYTES = 160 };

struct entry {
  char name[NAME_BYTES];   /* as the formula knows it */
  char stored[NAME_BYTES]; /* as the file shall call it */
  int nd;
  int64_t shape[4], count;
  int is_1x1;              /* stored as (O, I, 1, 1) */
};

/* ---- the list ---- */

static void rename_old(struct entry *t)
{
  static const char *const names[][2] = {
      {".to_q.", ".query."}, {".to_k.", ".key."}, {".to_v.", ".value."}, {".to_out.0.", ".proj_attn."}};

  for (int i = 0; i < 4; i++) {
    char *at = strstr(t->name, names[i][0]);

    if (at) {
      snprintf(t->stored, sizeof t->stored, "%.*s%s%s", (int)(at - t->name), t->name, names[i][1], at + strlen(names[i][0]));
      t->is_1x1 = t->nd == 2;
    }
  }
}

/* One line "name<TAB>2,3,4". */
static int parse_line(char *line, struct entry *t)
{
  char *tab = strchr(line, '\t'), *s;

  if (!tab || tab - line >= NAME_BYTES)
    return -1;
  memset(t, 0, sizeof *t);
  memcpy(t->name, line, (size_t)(tab - line));
  memcpy(t->stored, t->name, sizeof t->name);
  t->count = 1;
  for (s = tab; (*s == '\t' || *s == ',') && t->nd < 4; t->nd++) {
    t->shape[t->nd] = strtoll(s + 1, &s, 10);
    if (t->shape[t->nd] < 1)
      return -1;
    t->count *= t->shape[t->nd];
  }
  return *s == '\n' || !*s ? 0 : -1;
}

/* *list holds *n entries and is the caller's. */
static int read_list(const char *path, const char *part, const struct ckpt_form *form, struct entry **list, int *n, struct err *e)
{
  FILE *f = fopen(path, "re");
  char line[512];

  *n = 0;
  *list = malloc(LINES_MAX * sizeof **list);
  while (f && *list && *n < LINES_MAX && fgets(line, sizeof line, f)) {
    struct entry *t = &(*list)[*n];

    if (parse_line(line, t))
      break;
    ++*n;
    if (form->old_attention && !strcmp(part, "vae"))
      rename_old(t);
    if (form->no_text_prefix && !strncmp(t->name, "text_model.", 11))
      memmove(t->stored, t->name + 11, sizeof t->name - 11);
  }
  if (!f || !*list || !feof(f)) {
    free(*list);
    *list = NULL;
    err_field(e, E_FILE, path, "%s: cannot be read, or has a bad line after line %d", path, *n);
  }
  if (f)
    fclose(f);
  return *list ? 0 : E_FILE;
}

/* ---- the files ---- */

static const char *type_name(enum dtype t)
{
  return t == DT_F32 ? "F32" : t == DT_F16 ? "F16" : "BF16";
}

/* n entries, every step-th of list, are one file: its header. */
static int make_header(struct buf *b, const struct entry *list, int n, int step, enum dtype type, struct err *e)
{
  size_t at = 0, end;
  int rc = buf_add(b, "\0\0\0\0\0\0\0\0{\"__metadata__\":{\"format\":\"pt\"}", 8 + 31, e);

  for (int i = 0; i < n && !rc; i += step) {
    const struct entry *t = &list[i];

    end = at + (size_t)t->count * dtype_size(type);
    rc = buf_addf(b, e, ",\"%s\":{\"dtype\":\"%s\",\"shape\":[", t->stored, type_name(type));
    for (int d = 0; d < t->nd && !rc; d++)
      rc = buf_addf(b, e, d ? ",%lld" : "%lld", (long long)t->shape[d]);
    if (!rc)
      rc = buf_addf(b, e, "%s],\"data_offsets\":[%zu,%zu]}", t->is_1x1 ? ",1,1" : "", at, end);
    at = end;
  }
  if (!rc)
    rc = buf_add_str(b, "}", e);
  while (!rc && b->len % 8)
    rc = buf_add_str(b, " ", e);
  for (int i = 0; i < 8 && !rc; i++)
    b->p[i] = (char)((b->len - 8) >> 8 * i);
  return rc;
}

static int write_values(FILE *f, const struct entry *t, enum dtype type)
{
  size_t n = (size_t)t->count;
  float *v = malloc(n * sizeof *v);
  int ok;

  if (!v)
    return -1;
  if (type == DT_F32) { /* fp16 values, widened */
    synth_fill(t->name, t->nd, t->shape, DT_F32, v);
    for (size_t i = 0; i < n; i++)
      v[i] = f16_to_f32(f32_to_f16(v[i]));
  } else {
    synth_fill(t->name, t->nd, t->shape, type, v);
  }
  ok = fwrite(v, dtype_size(type), n, f) == n;
  free(v);
  return ok ? 0 : -1;
}

static int write_file(const char *path, const struct entry *list, int n, int step, enum dtype type, struct err *e)
{
  struct buf b;
  FILE *f = NULL;
  int rc;

  buf_init(&b, 8 << 20);
  if ((rc = make_header(&b, list, n, step, type, e)))
    goto out;
  f = fopen(path, "wxe");
  rc = !f || fwrite(b.p, 1, b.len, f) != b.len;
  for (int i = 0; i < n && !rc; i += step)
    rc = write_values(f, &list[i], type);
  if (f && fclose(f))
    rc = -1;
  if (rc)
    rc = err_field(e, E_FILE, path, "%s: cannot be written: %s", path, strerror(errno));
out:
  buf_close(&b);
  return rc;
}

static int write_index(const char *path, const char *stem, const struct entry *list, int n, int shards, struct err *e)
{
  FILE *f = fopen(path, "wxe");

  if (!f)
    return err_field(e, E_FILE, path, "%s: cannot be written: %s", path, strerror(errno));
  fprintf(f, "{\"metadata\":{},\"weight_map\":{");
  for (int i = 0; i < n; i++)
    fprintf(f, "%s\n\"%s\":\"%s-%05d-of-%05d.safetensors\"", i ? "," : "", list[i].stored, stem, i % shards + 1, shards);
  fprintf(f, "}}\n");
  return fclose(f) ? err_field(e, E_FILE, path, "%s: cannot be written: %s", path, strerror(errno)) : 0;
}

static int write_part(const char *tsv, const char *folder, const char *part, const struct ckpt_form *form, struct err *e)
{
  const char *stem = strncmp(part, "text_encoder", 12) ? "diffusion_pytorch_model" : "model";
  struct entry *list;
  char path[640];
  int n, rc;

  if ((rc = read_list(tsv, part, form, &list, &n, e)))
    return rc;
  if (form->shards < 2) {
    snprintf(path, sizeof path, "%s/%s.safetensors", folder, stem);
    rc = write_file(path, list, n, 1, form->type, e);
    goto out;
  }
  for (int i = 0; i < form->shards && !rc; i++) {
    snprintf(path, sizeof path, "%s/%s-%05d-of-%05d.safetensors", folder, stem, i + 1, form->shards);
    rc = write_file(path, list + i, n - i, form->shards, form->type, e);
  }
  snprintf(path, sizeof path, "%s/%s.safetensors.index.json", folder, stem);
  if (!rc)
    rc = write_index(path, stem, list, n, form->shards, e);
out:
  free(list);
  return rc;
}

/* ---- folders ---- */

static int copy_file(const char *from, const char *to, struct err *e)
{
  FILE *in = fopen(from, "re"), *out = in ? fopen(to, "wxe") : NULL;
  char block[8192];
  size_t n;
  int ok = in && out;

  while (ok && (n = fread(block, 1, sizeof block, in)) > 0)
    ok = fwrite(block, 1, n, out) == n;
  ok = ok && !ferror(in);
  if (in)
    fclose(in);
  if (out && fclose(out))
    ok = 0;
  return ok ? 0 : err_field(e, E_FILE, from, "%s: cannot be copied to %s: %s", from, to, strerror(errno));
}

/* Copies the folder; a tensors.tsv becomes the file that it lists. part is the folder's own name, "" for the top. */
static int copy_folder(const char *from, const char *to, const char *part, const struct ckpt_form *form, struct err *e)
{
  DIR *d = opendir(from);
  struct dirent *entry;
  struct stat sb;
  char a[512], b[512];
  int rc = 0;

  if (!d)
    return err_field(e, E_FILE, from, "%s: %s", from, strerror(errno));
  while (!rc && (entry = readdir(d))) {
    if (entry->d_name[0] == '.')
      continue;
    snprintf(a, sizeof a, "%s/%.100s", from, entry->d_name);
    snprintf(b, sizeof b, "%s/%.100s", to, entry->d_name);
    if (stat(a, &sb))
      rc = err_field(e, E_FILE, a, "%s: %s", a, strerror(errno));
    else if (S_ISDIR(sb.st_mode))
      rc = mkdir(b, 0700) ? err_field(e, E_FILE, b, "%s: %s", b, strerror(errno))
                          : copy_folder(a, b, entry->d_name, form, e);
    else if (!strcmp(entry->d_name, "tensors.tsv"))
      rc = write_part(a, to, part, form, e);
    else
      rc = copy_file(a, b, e);
  }
  closedir(d);
  return rc;
}

int ckpt_write(char dir[256], const char *golden, const char *name, const struct ckpt_form *form, struct err *e)
{
  static const struct ckpt_form usual = {.type = DT_F16};
  char from[256];
  int rc;

  snprintf(dir, 256, "%s/safelight-ckpt-XXXXXX", P_tmpdir);
  if (!mkdtemp(dir)) {
    rc = err_field(e, E_FILE, P_tmpdir, "%s: no folder can be made: %s", P_tmpdir, strerror(errno));
    dir[0] = 0;
    return rc;
  }
  snprintf(from, sizeof from, "%.150s/ckpt/%.90s", golden, name);
  rc = copy_folder(from, dir, "", form ? form : &usual, e);
  if (rc) {
    ckpt_remove(dir);
    dir[0] = 0;
  }
  return rc;
}

static int remove_entry(const char *path, const struct stat *sb, int type, struct FTW *where)
{
  (void)sb, (void)type, (void)where;
  return remove(path);
}

void ckpt_remove(const char *dir)
{
  if (dir[0])
    nftw(dir, remove_entry, 8, FTW_DEPTH | FTW_PHYS);
}
