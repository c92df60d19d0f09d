/*
 * tiny.c - see tiny.h.
 */
#include "tests/golden/tiny.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "tests/golden/write_ckpt.h"

void must(int r, const struct err *e)
{
  if (r)
    fail_msg("%s: %s", err_name(r), e->msg);
}

/* The golden tokenizer folders hold only what differs; the vocabulary is the bundled model's. */
static void link_vocabulary(const char *dir)
{
  static const char *const files[] = {"vocab.json", "merges.txt"};
  char from[600], to[600], cwd[256];

  assert_non_null(getcwd(cwd, sizeof cwd));
  for (int i = 0; i < 2; i++) {
    snprintf(from, sizeof from, "%s/weights/emoji/tokenizer/%s", cwd, files[i]);
    snprintf(to, sizeof to, "%s/tokenizer/%s", dir, files[i]);
    assert_int_equal(symlink(from, to), 0);
  }
}

void tiny_open(struct tiny *t, const struct be_ops *ops, const struct be_config *cfg, const char *ckpt, const char *golden)
{
  char path[128];
  struct err e = {0};

  *t = (struct tiny){0};
  if (golden) {
    snprintf(path, sizeof path, "tests/golden/%s", golden);
    must(st_open(&t->st, path, &e), &e);
  }
  must(ckpt_write(t->dir, "tests/golden", ckpt, NULL, &e), &e);
  link_vocabulary(t->dir);
  must(be_open(&t->be, ops, cfg, &e), &e);
  must(model_open(&t->m, &t->be, t->dir, &e), &e);
  must(model_reserve(t->m, 128, 128, &e), &e);
}

void tiny_close(struct tiny *t)
{
  model_close(t->m);
  be_close(&t->be);
  ckpt_remove(t->dir);
  st_close(t->st);
}

void tiny_first(uint8_t *rgb, uint8_t *mask, int side)
{
  for (int i = 0; i < side * side * 3; i++)
    rgb[i] = (uint8_t)(i * 7 / 3 % 251);
  for (int i = 0; i < side * side; i++)
    mask[i] = i % side < side / 2 ? 0 : 255;
}

const struct st_tensor *golden_tensor(const struct safetensors *st, const char *group, const char *name)
{
  char full[128];
  const struct st_tensor *t;

  snprintf(full, sizeof full, "%s.%s", group, name);
  t = st_find(st, full);
  if (!t)
    fail_msg("%s is not in %s", full, st_path(st));
  return t;
}

void golden_sampler(struct draw_params *p, const char *name)
{
  char base[64];
  size_t n = strlen(name);
  struct err e = {0};

  p->karras = n > 7 && !strcmp(name + n - 7, "_karras");
  snprintf(base, sizeof base, "%.*s", (int)(p->karras ? n - 7 : n), name);
  must(sampler_find(base, &p->sampler, &p->karras, &e), &e);
}

double golden_psnr(const uint8_t *a, const uint8_t *b, size_t n)
{
  double sum = 0;

  for (size_t i = 0; i < n; i++)
    sum += ((double)a[i] - b[i]) * ((double)a[i] - b[i]);
  return sum > 0 ? 10 * log10(255.0 * 255.0 * (double)n / sum) : 999;
}
