/*
 * test_ckpt.c - the tiny checkpoints as the other golden tests see them: what write_ckpt.c writes and models/checkpoint.c reads
 * are the values of the formula's own golden, in every form. Run from the root of the repository.
 */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "base/half.h"
#include "models/checkpoint.h"
#include "models/safetensors.h"
#include "tests/golden/write_ckpt.h"

static float value(const struct param *p, int64_t i)
{
  const uint16_t *h = p->data;
  float f;

  memcpy(&f, (const char *)p->data + (p->type == DT_F32 ? 4 * i : 0), 4);
  return p->type == DT_F32 ? f : p->type == DT_F16 ? f16_to_f32(h[i]) : bf16_to_f32(h[i]);
}

static float golden_value(const struct st_tensor *t, size_t i)
{
  float f;

  memcpy(&f, (const char *)t->data + 4 * i, 4);
  return f;
}

/* Every tensor of the list comes out of the written file, with the golden's numbers where the golden has them. */
static int check_part(const char *dir, const char *checkpoint, const char *part, const struct safetensors *golden, int is_bf16)
{
  char path[512], line[512], name[200], key[256];
  struct source *s;
  struct err e = {0};
  FILE *f;
  int compared = 0;

  snprintf(path, sizeof path, "%s/%s", dir, part);
  if (source_open_files(&s, path, &e))
    fail_msg("%s", e.msg);
  snprintf(path, sizeof path, "tests/golden/ckpt/%s/%s/tensors.tsv", checkpoint, part);
  f = fopen(path, "re");
  assert_non_null(f);
  while (fgets(line, sizeof line, f)) {
    const struct st_tensor *first, *last;
    int64_t shape[4], count = 1;
    struct param p;
    int nd = 0;
    char *at = strchr(line, '\t');

    snprintf(name, sizeof name, "%.*s", (int)(at - line), line);
    for (; *at == '\t' || *at == ','; nd++, count *= shape[nd - 1])
      shape[nd] = strtoll(at + 1, &at, 10);
    if (source_get(s, name, nd, shape, &p, &e))
      fail_msg("%s", e.msg);
    first = st_find(golden, name);
    snprintf(key, sizeof key, "%s.last8", name);
    last = st_find(golden, key);
    for (int64_t i = 0; first && !is_bf16 && i < 8; i++, compared++)
      if (!(value(&p, i) == golden_value(first, (size_t)i)))
        fail_msg("%s: value %d differs", name, (int)i);
    for (int64_t i = 0; last && !is_bf16 && i < 8; i++, compared++)
      if (!(value(&p, count - 8 + i) == golden_value(last, (size_t)i)))
        fail_msg("%s: value %d from the end differs", name, (int)(8 - i));
    param_release(&p);
  }
  fclose(f);
  source_close(s);
  return compared;
}

static void test_forms(void **state)
{
  static const struct ckpt_form forms[] = {{.type = DT_F16},
                                           {.type = DT_F32},
                                           {.type = DT_BF16},
                                           {.type = DT_F16, .old_attention = 1, .no_text_prefix = 1},
                                           {.type = DT_F16, .shards = 3}};
  static const char *const parts[] = {"text_encoder", "unet", "vae"};
  struct safetensors *golden;
  struct err e = {0};
  char dir[256], config[300];

  (void)state;
  if (st_open(&golden, "tests/golden/ckpt/formula.safetensors", &e))
    fail_msg("%s", e.msg);
  for (size_t i = 0; i < sizeof forms / sizeof *forms; i++) {
    int compared = 0;

    if (ckpt_write(dir, "tests/golden", "sd15", &forms[i], &e))
      fail_msg("%s", e.msg);
    for (int p = 0; p < 3; p++)
      compared += check_part(dir, "sd15", parts[p], golden, forms[i].type == DT_BF16);
    assert_int_equal(compared, forms[i].type == DT_BF16 ? 0 : 5 * 16); /* the golden has five tensors; none in bf16 */
    snprintf(config, sizeof config, "%s/unet/config.json", dir);
    assert_int_equal(access(config, R_OK), 0);
    snprintf(config, sizeof config, "%s/unet/tensors.tsv", dir);
    assert_int_not_equal(access(config, F_OK), 0);
    ckpt_remove(dir);
    assert_int_not_equal(access(dir, F_OK), 0);
  }
  st_close(golden);
}

static void test_failure(void **state)
{
  char dir[256];
  struct err e = {0};

  (void)state;
  assert_int_equal(ckpt_write(dir, "tests/golden", "no-such", NULL, &e), E_FILE);
  assert_string_equal(dir, "");
  ckpt_remove(dir);
}

int main(void)
{
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_forms), cmocka_unit_test(test_failure)};

  return cmocka_run_group_tests(tests, NULL, NULL);
}
