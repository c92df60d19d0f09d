/*
 * test_extract.c - models/extract.c and adapter_write.c: what a known LoRA added to a base is found again, at the right sites and with the
 * right energies; and a LoRA that is written is the one that adapter_open reads, with the same bytes every time.
 */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "models/adapter_write.h"
#include "models/extract.h"
#include "models/model.h"
#include "models/rng.h"
#include "models/safetensors.h"

static char folder[] = "/var/tmp/safelight-extract-XXXXXX", path[128];

static int make_folder(void **state)
{
  (void)state;
  return !mkdtemp(folder);
}

static int remove_folder(void **state)
{
  (void)state;
  return rmdir(folder);
}

static const char *in_folder(const char *name)
{
  snprintf(path, sizeof path, "%s/%s", folder, name);
  return path;
}

/* ---- a UNet of four parameters, as tables and as a file ---- */

enum { Q, OUT, CONV, NORM, SITES };

static struct site table[SITES] = {
    {.name = (char *)"unet.a.attn1.to_q", .kind = WEIGHT_LINEAR, .out = 6, .in = 5},
    {.name = (char *)"unet.a.attn2.to_out.0", .kind = WEIGHT_LINEAR, .out = 4, .in = 7, .has_bias = 1},
    {.name = (char *)"unet.conv", .kind = WEIGHT_CONV, .out = 3, .in = 2, .kh = 3, .kw = 3, .stride = 1, .pad_lo = 1, .pad_hi = 1,
     .has_bias = 1},
    {.name = (char *)"unet.norm", .kind = WEIGHT_NORM, .out = 4, .in = 1, .has_bias = 1},
};
static struct generation base = {.site = table, .n = SITES};
static const int64_t counts[SITES] = {30, 28, 54, 4}, outs[SITES] = {6, 4, 3, 4};

struct unet {
  float w[SITES][54], bias[SITES][6];
};

static void random_unet(struct unet *u, uint64_t seed)
{
  struct rng r;

  rng_seed(&r, seed);
  for (int i = 0; i < SITES; i++) {
    rng_randn(&r, u->w[i], 54);
    rng_randn(&r, u->bias[i], 6);
  }
}

/* Writes u as safetensors, and opens it as the component "unet". */
static void open_unet(struct model_sources *s, const struct unet *u, const char *name)
{
  static const char *const shape[SITES] = {"[6,5]", "[4,7]", "[3,2,3,3]", "[4]"};
  char header[2048];
  int len = 0, at = 0, start = 0;
  struct source *source = NULL;
  struct err e = {0};
  FILE *f = fopen(in_folder(name), "wb");
  unsigned char size[8] = {0};

  assert_non_null(f);
  for (int i = 0; i < SITES; i++)
    for (int b = 0; b <= table[i].has_bias; b++) {
      start = at;
      at += 4 * (int)(b ? outs[i] : counts[i]);
      len += snprintf(header + len, sizeof header - (size_t)len, "%s\"%s.%s\":{\"dtype\":\"F32\",\"shape\":", len ? "," : "{",
                      table[i].name + 5, b ? "bias" : "weight");
      len += b ? snprintf(header + len, sizeof header - (size_t)len, "[%d]", (int)outs[i])
               : snprintf(header + len, sizeof header - (size_t)len, "%s", shape[i]);
      len += snprintf(header + len, sizeof header - (size_t)len, ",\"data_offsets\":[%d,%d]}", start, at);
    }
  len += snprintf(header + len, sizeof header - (size_t)len, "}");
  size[0] = (unsigned char)len;
  size[1] = (unsigned char)(len >> 8);
  assert_int_equal(fwrite(size, 1, 8, f), 8);
  assert_int_equal(fwrite(header, 1, (size_t)len, f), len);
  for (int i = 0; i < SITES; i++) {
    assert_int_equal(fwrite(u->w[i], 4, (size_t)counts[i], f), counts[i]);
    if (table[i].has_bias)
      assert_int_equal(fwrite(u->bias[i], 4, (size_t)outs[i], f), outs[i]);
  }
  assert_int_equal(fclose(f), 0);
  if (source_open_file(&source, path, &e) || sources_add(s, "unet", source, &e))
    fail_msg("%s", e.msg);
  unlink(path);
}

/* A product of random factors of this rank times f, added to the site. */
static void tune(struct unet *u, int site, int64_t rank, float f, uint64_t seed)
{
  float up[64], down[64];
  int64_t out = outs[site], columns = counts[site] / out;
  struct rng r;

  rng_seed(&r, seed);
  rng_randn(&r, up, 64);
  rng_randn(&r, down, 64);
  for (int64_t i = 0; i < out; i++)
    for (int64_t c = 0; c < columns; c++)
      for (int64_t k = 0; k < rank; k++)
        u->w[site][i * columns + c] += f * up[i * rank + k] * down[k * columns + c];
}

/* |dW of the adapter - (b - a)| / |b - a| at a site. */
static double off(const struct adapter *x, int site, const struct unet *a, const struct unet *b)
{
  const struct delta *d = adapter_at(x, site);
  int64_t out = outs[site], columns = counts[site] / out;
  double sum = 0, all = 0;

  assert_non_null(d);
  for (int64_t i = 0; i < out; i++)
    for (int64_t c = 0; c < columns; c++) {
      double g = (double)b->w[site][i * columns + c] - (double)a->w[site][i * columns + c];

      all += g * g;
      for (int64_t k = 0; k < d->rank; k++)
        g -= (double)d->up[i * d->rank + k] * (double)d->down[k * columns + c];
      sum += g * g;
    }
  return sqrt(sum / all);
}

static void test_finds_what_was_added(void **state)
{
  struct model_sources pristine = {0}, tuned = {0};
  struct extract_options o = {.rank = 2, .energy = 1, .sites = EXTRACT_ALL};
  struct extract_report x;
  struct adapter *a;
  struct unet was, is;
  struct err e = {0};

  (void)state;
  random_unet(&was, 1);
  is = was;
  tune(&is, Q, 2, 0.1f, 2);
  tune(&is, OUT, 1, 0.1f, 3);
  tune(&is, CONV, 2, 0.1f, 4);
  open_unet(&pristine, &was, "was.safetensors");
  open_unet(&tuned, &is, "is.safetensors");
  if (extract_run(&a, &base, &pristine, &tuned, &o, &x, &e))
    fail_msg("%s", e.msg);
  assert_int_equal(a->n, 3);
  assert_int_equal(x.n, 3);
  for (int i = 0; i < 3; i++) {
    assert_int_equal(x.site[i].site, i);
    assert_true(off(a, i, &was, &is) <= 4e-6); /* 2e-7 to 1e-6: the weights themselves are rounded */
    assert_true(fabs(x.site[i].energy - 1) <= 1e-9);
    assert_true(x.site[i].norm > 0 && x.site[i].relative > 0 && x.site[i].relative < 1);
  }
  assert_true(fabs(x.energy - 1) <= 1e-9 && fabs(x.energy_all - 1) <= 1e-9 && fabs(x.outside) <= 1e-9);
  assert_int_equal(x.unchanged, 0);
  adapter_close(a);
  extract_report_free(&x);

  /* to_out.0 changed by rank 1 (and rounding): an energy of 0.999 takes no more */
  o.energy = 0.999;
  assert_int_equal(extract_run(&a, &base, &pristine, &tuned, &o, &x, &e), 0);
  assert_int_equal(adapter_at(a, OUT)->rank, 1);
  assert_int_equal(adapter_at(a, Q)->rank, 2);
  adapter_close(a);
  extract_report_free(&x);

  /* attention alone: what the convolution changed is outside, and not in the energy of all */
  o = (struct extract_options){.rank = 2, .energy = 1, .sites = EXTRACT_ATTENTION};
  assert_int_equal(extract_run(&a, &base, &pristine, &tuned, &o, &x, &e), 0);
  assert_int_equal(a->n, 2);
  assert_null(adapter_at(a, CONV));
  assert_true(fabs(x.energy - 1) <= 1e-9 && x.outside > 0.05 && fabs(x.energy_all + x.outside - 1) <= 1e-9);
  adapter_close(a);
  extract_report_free(&x);
  sources_close(&pristine);
  sources_close(&tuned);
}

/* Rank 1 of a change with singular values 3 and 1 holds 0.9; biases and norms count against the whole. */
static void test_energies(void **state)
{
  struct model_sources pristine = {0}, tuned = {0};
  const struct extract_options o = {.rank = 1, .energy = 1, .sites = EXTRACT_ATTENTION};
  struct extract_report x;
  struct adapter *a;
  struct unet was = {0}, is;
  struct err e = {0};

  (void)state;
  is = was;
  is.w[Q][0] = 3;
  is.w[Q][6] = -1; /* row 1, column 1 */
  is.bias[OUT][2] = 3;
  is.w[NORM][1] = 1;
  open_unet(&pristine, &was, "was.safetensors");
  open_unet(&tuned, &is, "is.safetensors");
  if (extract_run(&a, &base, &pristine, &tuned, &o, &x, &e))
    fail_msg("%s", e.msg);
  assert_int_equal(a->n, 1);
  assert_int_equal(x.unchanged, 1); /* to_out.0 */
  assert_true(fabs(x.site[0].energy - 0.9) <= 1e-12 && fabs(x.energy - 0.9) <= 1e-12);
  assert_true(fabs(x.energy_all - 9.0 / 20) <= 1e-12 && fabs(x.outside - 0.5) <= 1e-12);
  assert_true(fabs(x.site[0].norm - sqrt(10)) <= 1e-12);
  adapter_close(a);
  extract_report_free(&x);
  sources_close(&tuned);

  /* nothing changed at all */
  tuned = (struct model_sources){0};
  open_unet(&tuned, &was, "same.safetensors");
  assert_int_equal(extract_run(&a, &base, &pristine, &tuned, &o, &x, &e), E_ARG);
  assert_null(a);
  extract_report_free(&x);
  sources_close(&pristine);
  sources_close(&tuned);
}

static void test_missing_tensor(void **state)
{
  struct site more[SITES + 1];
  struct generation larger = {.site = more, .n = SITES + 1};
  struct model_sources pristine = {0}, tuned = {0};
  const struct extract_options o = {.rank = 1, .energy = 1, .sites = EXTRACT_ATTENTION};
  struct extract_report x;
  struct adapter *a;
  struct unet u;
  struct err e = {0};

  (void)state;
  memcpy(more, table, sizeof table);
  more[SITES] = (struct site){.name = (char *)"unet.b.attn1.to_q", .kind = WEIGHT_LINEAR, .out = 2, .in = 2};
  random_unet(&u, 1);
  open_unet(&pristine, &u, "was.safetensors");
  tune(&u, Q, 1, 1, 1);
  open_unet(&tuned, &u, "is.safetensors");
  assert_int_equal(extract_run(&a, &larger, &pristine, &tuned, &o, &x, &e), E_FILE);
  assert_null(a);
  assert_non_null(strstr(e.msg, "b.attn1.to_q.weight"));
  extract_report_free(&x);
  sources_close(&pristine);
  sources_close(&tuned);
}

static void test_open_file(void **state)
{
  struct source *s = (struct source *)1;
  struct err e = {0};

  (void)state;
  assert_int_equal(source_open_file(&s, in_folder("none.safetensors"), &e), E_FILE);
  assert_null(s);
  assert_non_null(strstr(e.msg, "none.safetensors"));
}

/* ---- writing, on the bundled model's sites ---- */

static void *slurp(const char *file, size_t *n)
{
  FILE *f = fopen(file, "rb");
  char *p = test_malloc(1 << 20);

  assert_non_null(f);
  *n = fread(p, 1, 1 << 20, f);
  assert_true(*n > 0 && *n < 1 << 20);
  fclose(f);
  return p;
}

static int ends(const char *s, const char *end)
{
  size_t n = strlen(s), k = strlen(end);

  return n >= k && !strcmp(s + n - k, end);
}

/* A linear, a 1x1 convolution that is a linear here (proj_in), a 3x3 convolution and a layer of the text encoder. */
static struct adapter *one_of_each(const struct generation *g)
{
  static const char *const name[] = {"unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "unet.mid_block.attentions.0.proj_in",
                                     "unet.mid_block.resnets.0.conv1", "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"};
  struct adapter *a = adapter_new_lowrank("each", 4);
  int site[4], at = 0;
  struct err e = {0};
  struct rng r;

  rng_seed(&r, 5);
  for (int i = 0; i < 4; i++) {
    site[i] = generation_find(g, name[i]);
    assert_true(site[i] >= 0);
  }
  for (int s = 0; s < g->n; s++) /* deltas are ordered by site */
    for (int i = 0; i < 4; i++)
      if (site[i] == s) {
        int64_t columns = g->site[s].in * (g->site[s].kind == WEIGHT_CONV ? 9 : 1);

        assert_int_equal(adapter_set_lowrank(a, at, g, s, 3, &e), 0);
        rng_randn(&r, a->delta[at].down, (size_t)(3 * columns));
        rng_randn(&r, a->delta[at].up, (size_t)(3 * g->site[s].out));
        a->delta[at].scale = i ? 1 : 0.25f;
        at++;
      }
  assert_int_equal(at, 4);
  assert_int_equal(adapter_finish(a, g, &e), 0);
  return a;
}

static void expect_shapes(const char *file)
{
  struct safetensors *st;
  struct err e = {0};
  int four = 0;

  assert_int_equal(st_open(&st, file, &e), 0);
  assert_int_equal(st_count(st), 8);
  assert_string_equal(st_metadata(st, "format"), "pt");
  assert_string_equal(st_metadata(st, "safelight.note"), "a \"quoted\" word\n\xc3\xa9");
  for (size_t i = 0; i < st_count(st); i++) {
    const struct st_tensor *t = st_at(st, i);
    int is_conv = strstr(t->name, "conv1") || strstr(t->name, "proj_in");

    assert_int_equal(t->type, ST_F32);
    assert_int_equal(t->nd, is_conv ? 4 : 2);
    assert_int_equal((uintptr_t)((const char *)t->data - (const char *)st_at(st, 0)->data) % 4, 0);
    assert_true(ends(t->name, ".lora_A.weight") || ends(t->name, ".lora_B.weight"));
    assert_int_equal(t->shape[ends(t->name, ".lora_A.weight") ? 0 : 1], 3);
    if (strstr(t->name, "conv1.lora_A"))
      assert_true(t->shape[2] == 3 && t->shape[3] == 3);
    else if (is_conv)
      assert_true(t->shape[2] == 1 && t->shape[3] == 1);
    four += is_conv;
  }
  assert_int_equal(four, 4);
  st_close(st);
}

static void test_write(void **state)
{
  const struct adapter_meta meta[] = {{"safelight.note", "a \"quoted\" word\n\xc3\xa9"}};
  const struct be_config cfg = {.threads = 1};
  struct adapter_names *names = NULL;
  struct adapter_bounds bounds;
  struct adapter *a, *b = NULL;
  struct model *m = NULL;
  struct be dry;
  struct err e = {0};
  size_t n1, n2;
  void *p1, *p2;

  (void)state;
  assert_int_equal(be_open(&dry, &be_dry, &cfg, &e), 0);
  if (model_open(&m, &dry, "weights/emoji", &e) || adapter_names_new(&names, model_base(m), model_layers_per_block(m), &e))
    fail_msg("%s", e.msg);
  a = one_of_each(model_base(m));
  in_folder("each.safetensors");
  if (adapter_write(path, a, model_base(m), model_sources(m), meta, 1, &e))
    fail_msg("%s", e.msg);
  expect_shapes(path);
  p1 = slurp(path, &n1);
  assert_int_equal(adapter_write(path, a, model_base(m), model_sources(m), meta, 1, &e), 0);
  p2 = slurp(path, &n2);
  assert_int_equal(n1, n2);
  assert_memory_equal(p1, p2, n1);
  test_free(p1);
  test_free(p2);

  adapter_bounds_default(&bounds);
  if (adapter_open(&b, path, names, &bounds, &e))
    fail_msg("%s", e.msg);
  assert_string_equal(b->name, "each");
  assert_int_equal(b->n, 4);
  assert_int_equal(b->params, a->params);
  assert_int_equal(b->targets_text, 1);
  assert_int_equal(a->targets_text, 1);
  for (int i = 0; i < 4; i++) {
    const struct delta *x = &a->delta[i], *y = &b->delta[i];
    const struct site *s = &model_base(m)->site[x->site];
    int64_t columns = s->in * (s->kind == WEIGHT_CONV ? 9 : 1);

    assert_int_equal(x->site, y->site);
    assert_int_equal(y->rank, 3);
    assert_true(y->scale == 1);
    assert_memory_equal(x->down, y->down, (size_t)(3 * columns) * sizeof(float));
    for (int64_t j = 0; j < 3 * s->out; j++)
      assert_true(y->up[j] == x->scale * x->up[j]);
    assert_true(fabs(x->norm - y->norm) <= 1e-6 * x->norm);
  }
  adapter_close(b);
  unlink(path);

  /* into a folder that is not there; and what a LoRA cannot say */
  assert_int_equal(adapter_write("/var/tmp/no such folder/x.safetensors", a, model_base(m), NULL, NULL, 0, &e), E_FILE);
  memset(&e, 0, sizeof e);
  a->delta[2].kind = DELTA_DENSE;
  assert_int_equal(adapter_write(in_folder("x.safetensors"), a, model_base(m), NULL, NULL, 0, &e), E_ARG);
  assert_string_equal(e.field, model_base(m)->site[a->delta[2].site].name);
  a->delta[2].kind = DELTA_LOWRANK;
  adapter_close(a);
  adapter_names_free(names);
  model_close(m);
  be_close(&dry);
}

int main(void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test(test_finds_what_was_added), cmocka_unit_test(test_energies), cmocka_unit_test(test_missing_tensor),
    cmocka_unit_test(test_open_file),            cmocka_unit_test(test_write),
  };

  return cmocka_run_group_tests(tests, make_folder, remove_folder);
}
