/*
 * plan_file.c - see plan_file.h. Called by vendor_dnn.c. Threads: any; several may write the same plan at once, of two GPUs of one kind for example.
 */
#include "kernels/cuda/plan_file.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct header {
  char magic[8];
  uint64_t text_bytes, check; /* of the text */
  uint64_t key_bytes;
  unsigned char key[PLAN_FILE_KEY];
};

static const char magic[8] = "SLPLAN2";

/* FNV-1a (Fowler, Noll, Vo): against damage, not against an enemy, who could as well replace the program. */
static uint64_t hash(const void *p, size_t n)
{
  uint64_t h = 0xcbf29ce484222325u;

  for (size_t i = 0; i < n; i++)
    h = (h ^ ((const unsigned char *)p)[i]) * 0x100000001b3u;
  return h;
}

static int path_of(char *path, size_t size, const char *folder, const void *key, size_t key_bytes)
{
  int n = snprintf(path, size, "%s/%016llx.plan", folder, (unsigned long long)hash(key, key_bytes));

  return n > 0 && (size_t)n < size;
}

static int fits(const struct header *h, const void *key, size_t key_bytes)
{
  return !memcmp(h->magic, magic, sizeof magic) && h->key_bytes == key_bytes && !memcmp(h->key, key, key_bytes) && h->text_bytes > 0 &&
         h->text_bytes <= PLAN_FILE_MOST;
}

char *plan_file_read(const char *folder, const void *key, size_t key_bytes, size_t *n)
{
  char path[4096], *text = NULL;
  struct header h;
  FILE *f;
  int ok = 0;

  *n = 0;
  if (key_bytes > PLAN_FILE_KEY || !path_of(path, sizeof path, folder, key, key_bytes) || !(f = fopen(path, "rb")))
    return NULL;
  if (fread(&h, sizeof h, 1, f) == 1 && fits(&h, key, key_bytes) && (text = malloc((size_t)h.text_bytes)))
    ok = fread(text, (size_t)h.text_bytes, 1, f) == 1 && fgetc(f) == EOF && hash(text, (size_t)h.text_bytes) == h.check;
  fclose(f);
  if (!ok) {
    free(text);
    return NULL;
  }
  *n = (size_t)h.text_bytes;
  return text;
}

int plan_file_write(const char *folder, const void *key, size_t key_bytes, const char *text, size_t n)
{
  struct header h = {.text_bytes = n, .check = hash(text, n), .key_bytes = key_bytes};
  char path[4096], beside[4096 + 32];
  FILE *f;
  int ok;

  if (key_bytes > PLAN_FILE_KEY || n == 0 || n > PLAN_FILE_MOST || !path_of(path, sizeof path, folder, key, key_bytes))
    return 0;
  memcpy(h.magic, magic, sizeof magic);
  memcpy(h.key, key, key_bytes);
  snprintf(beside, sizeof beside, "%s.%ld", path, (long)gettid());
  f = fopen(beside, "wb");
  if (!f)
    return 0;
  ok = fwrite(&h, sizeof h, 1, f) == 1 && fwrite(text, n, 1, f) == 1;
  ok = !fclose(f) && ok && !rename(beside, path);
  if (!ok)
    (void)unlink(beside);
  return ok;
}
