/*
 * digest.c - see digest.h.
 */
#include "models/digest.h"

#include <dirent.h>
#include <fcntl.h>
#include <sodium.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { HASH = 32, CHUNK = 4 << 20, PATH_CAP = 4096 };

static const char *const parts[] = {"", "scheduler", "text_encoder", "tokenizer", "unet", "vae"};

static int counts(const struct dirent *d)
{
  const char *dot = strrchr(d->d_name, '.');

  return dot && d->d_name[0] != '.' && (!strcmp(dot, ".json") || !strcmp(dot, ".txt") || !strcmp(dot, ".safetensors"));
}

/* The hashes of all chunks of p, folded into h in order. Each chunk is hashed by one thread, so the result does not depend on
 * how many there are. */
MUST_CHECK static int fold_bytes(crypto_generichash_state *h, const unsigned char *p, size_t n, struct err *e)
{
  long chunks = (long)((n + CHUNK - 1) / CHUNK);
  unsigned char *sum = malloc((size_t)(chunks ? chunks : 1) * HASH);

  if (!sum)
    return err_set(e, E_NOMEM, "out of memory for a digest");
#pragma omp parallel for schedule(dynamic)
  for (long i = 0; i < chunks; i++) {
    size_t at = (size_t)i * CHUNK;

    crypto_generichash(sum + (size_t)i * HASH, HASH, p + at, n - at < CHUNK ? n - at : CHUNK, NULL, 0);
  }
  crypto_generichash_update(h, sum, (size_t)chunks * HASH);
  free(sum);
  return 0;
}

MUST_CHECK static int fold_file(crypto_generichash_state *h, const char *path, const char *label, struct err *e)
{
  struct stat st;
  void *p = MAP_FAILED;
  char head[PATH_CAP];
  int r = 0, n, fd = open(path, O_RDONLY | O_CLOEXEC);

  if (fd < 0 || fstat(fd, &st)) {
    r = err_field(e, E_FILE, path, "%s: cannot be read: %m", path);
    goto out;
  }
  n = snprintf(head, sizeof head, "%s %lld\n", label, (long long)st.st_size);
  crypto_generichash_update(h, (unsigned char *)head, (size_t)n);
  if (!st.st_size)
    goto out;
  p = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
  if (p == MAP_FAILED) {
    r = err_field(e, E_FILE, path, "%s: cannot be mapped: %m", path);
    goto out;
  }
  r = fold_bytes(h, p, (size_t)st.st_size, e);
out:
  if (p != MAP_FAILED)
    munmap(p, (size_t)st.st_size);
  if (fd >= 0)
    close(fd);
  return r;
}

/* Every weight and config file of one folder, in name order; a folder that is not there adds nothing. */
MUST_CHECK static int fold_folder(crypto_generichash_state *h, const char *dir, const char *part, struct err *e)
{
  char folder[PATH_CAP], path[PATH_CAP + 300], label[400];
  struct dirent **entry = NULL;
  int r = 0, n;

  snprintf(folder, sizeof folder, "%s/%s", dir, part);
  n = scandir(folder, &entry, counts, alphasort);
  for (int i = 0; i < n; i++) {
    snprintf(path, sizeof path, "%s/%s", folder, entry[i]->d_name);
    snprintf(label, sizeof label, "%s/%s", part, entry[i]->d_name);
    if (!r)
      r = fold_file(h, path, label, e);
    free(entry[i]);
  }
  free(entry);
  return r;
}

int digest_model(char out[65], const char *dir, struct err *e)
{
  crypto_generichash_state h;
  unsigned char sum[HASH];

  if (sodium_init() < 0)
    return err_set(e, E_INTERNAL, "libsodium does not start");
  crypto_generichash_init(&h, NULL, 0, HASH);
  for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
    int r = fold_folder(&h, dir, parts[i], e);

    if (r)
      return r;
  }
  crypto_generichash_final(&h, sum, HASH);
  sodium_bin2hex(out, 65, sum, HASH);
  return 0;
}

int digest_text(char out[65], const char *what, const char *text, struct err *e)
{
  crypto_generichash_state h;
  unsigned char sum[HASH];

  if (sodium_init() < 0)
    return err_set(e, E_INTERNAL, "libsodium does not start");
  crypto_generichash_init(&h, NULL, 0, HASH);
  crypto_generichash_update(&h, (const unsigned char *)what, strlen(what) + 1); /* the 0 parts them */
  crypto_generichash_update(&h, (const unsigned char *)text, strlen(text));
  crypto_generichash_final(&h, sum, HASH);
  sodium_bin2hex(out, 65, sum, HASH);
  return 0;
}
