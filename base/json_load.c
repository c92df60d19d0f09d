/*
 * json_load.c - see json_load.h.
 *
 * While a text is read, a block of the thread's own stands behind malloc, so large that reading comes to its end whatever malloc says; then the
 * result is thrown away. Its pages are not touched, and so cost nothing, unless memory is short. Invariant: jansson allocates through take()
 * from before main on, in every program that reads model files; nothing of the block is left when json_load_whole returns.
 */
#include "base/json_load.h"

#include <stdint.h>
#include <stdlib.h>

enum { PER_BYTE = 64, AT_LEAST = 1 << 16, ALIGN = 16 }; /* jansson takes some 20 bytes for each of a text that is all structure */

static _Thread_local struct {
  char *p;
  size_t size, used;
  int ran_out;
} reserve;

static void *take(size_t n)
{
  void *p = malloc(n);

  if (p)
    return p;
  reserve.ran_out = 1;
  n = (n + ALIGN - 1) / ALIGN * ALIGN;
  if (!reserve.p || n > reserve.size - reserve.used)
    return NULL;
  reserve.used += n;
  return reserve.p + reserve.used - n;
}

static void give(void *p)
{
  if (!reserve.p || (uintptr_t)p - (uintptr_t)reserve.p >= reserve.size)
    free(p);
}

__attribute__((constructor)) static void start(void)
{
  json_set_alloc_funcs(take, give);
}

/* No words, and the code that says why. */
static json_t *short_of_memory(json_error_t *e)
{
  *e = (json_error_t){.line = -1, .column = -1};
  e->text[JSON_ERROR_TEXT_LENGTH - 1] = json_error_out_of_memory; /* where json_error_code() looks */
  return NULL;
}

json_t *json_load_whole(const char *text, size_t n, size_t flags, json_error_t *e)
{
  json_error_t unwanted;
  json_t *root;

  e = e ? e : &unwanted;
  reserve.ran_out = 0;
  reserve.used = 0;
  reserve.size = n * PER_BYTE + AT_LEAST;
  reserve.p = malloc(reserve.size);
  if (!reserve.p)
    return short_of_memory(e);
  root = json_loadb(text, n, flags, e);
  if (reserve.ran_out) {
    json_decref(root);
    root = short_of_memory(e);
  }
  free(reserve.p);
  reserve.p = NULL;
  return root;
}
