/*
 * safetensors.h - a reader for safetensors files that trusts nothing.
 *
 * The file is mapped, its header is checked completely before any tensor is handed out: header length within the file (and
 * at most 8 MB), valid JSON object, no duplicate name, names of printable ASCII, known dtypes, shapes without overflow,
 * offsets inside the file, matching dtype x shape, and tensors that tile the data: no overlap, no hole, nothing behind the
 * last. Scalars and empty tensors (a dimension of 0) are legal. Values are checked for finiteness when a network asks for
 * them (models/checkpoint.c), since that reads the whole file.
 *
 * Called by checkpoint.c, the adapter loader and the golden tests. Threads: immutable after open; any thread may read.
 * Format: https://github.com/huggingface/safetensors (README, "Format").
 */
#ifndef SAFELIGHT_MODELS_SAFETENSORS_H
#define SAFELIGHT_MODELS_SAFETENSORS_H

#include <stddef.h>
#include <stdint.h>

#include "base/err.h"

enum st_dtype { ST_BOOL, ST_U8, ST_I8, ST_I16, ST_U16, ST_F16, ST_BF16, ST_I32, ST_U32, ST_F32, ST_F64, ST_I64, ST_U64 };

enum { ST_MAX_DIMS = 8 };

struct st_tensor {
  const char *name;             /* owned by the file */
  enum st_dtype type;
  int nd;                       /* 0 for a scalar */
  int64_t shape[ST_MAX_DIMS];
  const void *data;             /* inside the mapping; any alignment */
  size_t bytes;
};

struct safetensors; /* an open file */

/* Maps path and checks its header. On success *out must be closed with st_close and every pointer it hands out lives as
 * long as it does. On failure *out is NULL; E_FILE names the file and, where one is at fault, the tensor (e->field is the
 * tensor, else the file), E_NOMEM when memory is short. The file may be replaced by rename while it is open, but must not be
 * rewritten or cut in place: a mapping that loses its file is a SIGBUS. */
MUST_CHECK int st_open(struct safetensors **out, const char *path, struct err *e);

/* The same checks on bytes in memory (tests, fuzzing); the bytes stay the caller's and must outlive the handle. */
MUST_CHECK int st_open_memory(struct safetensors **out, const void *p, size_t n, const char *label, struct err *e);

void st_close(struct safetensors *st); /* takes NULL */

size_t st_count(const struct safetensors *st);
const struct st_tensor *st_at(const struct safetensors *st, size_t i);                 /* i < st_count; in name order */
const struct st_tensor *st_find(const struct safetensors *st, const char *name);       /* NULL when absent */
const char *st_metadata(const struct safetensors *st, const char *key);                /* value in __metadata__, or NULL */
const char *st_path(const struct safetensors *st);

/* E_FILE when the file itself (not the name) was written to or cut since it was opened: then the mapping is not what was checked, and
 * reading it may kill. Asked before files that stay open for long are read again. */
MUST_CHECK int st_unchanged(const struct safetensors *st, struct err *e);

/* Lets the kernel drop the pages behind a tensor (they come back when read again). For peak memory while loading. */
void st_forget(const struct safetensors *st, const struct st_tensor *t);

/* Index of the first element that is a NaN or an infinity, -1 when there is none (or t holds no F32, F16 or BF16). Reads all
 * of t at the speed of memory. */
int64_t st_nonfinite(const struct st_tensor *t);

/* Copies text that came out of a file for use in an error message: what is not printable ASCII becomes '?', and what does not
 * fit is cut. cap >= 1. */
void st_printable(char *out, size_t cap, const char *s);

const char *st_dtype_name(enum st_dtype t); /* "F32", ... */
size_t st_dtype_size(enum st_dtype t);

#endif
