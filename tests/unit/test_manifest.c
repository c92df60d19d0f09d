/*
 * test_manifest.c - models/manifest.c, manifest_probe.c, manifest_write.c, predict.c on the bundled model: what a maker signs verifies on
 * every backend; each member that is changed, a wrong key or no key is noticed and named; and an adapter that does not do what it should
 * (zero, at half or twice its scale, a layer missing, another one under the same name) fails its canary.
 */
#include <fcntl.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>
#include <jansson.h>

#include "models/adapter_write.h"
#include "models/manifest.h"
#include "models/model.h"
#include "models/predict.h"
#include "models/rng.h"

#define SCALE 0.004f /* of the expert: its canary moves by a few percent, as with a trained one */

enum { REF, CPU32, CPU, LANES }; /* the specification, be_cpu in fp32, be_cpu in what it would choose */

static struct be lane[LANES];
static struct model *model[LANES];
static struct adapter *expert;      /* on every q, k, v, out of the UNet's attentions */
static char folder[] = "/var/tmp/safelight-manifest-XXXXXX", path[128], secret[129], public_key[65];
static char *text;                  /* the signed manifest of expert */
static struct manifest_report made; /* what its maker measured */

static void must(int r, const struct err *e)
{
  if (r)
    fail_msg("%s", e->msg);
}

static int is_target(const struct site *s)
{
  static const char *const ends[] = {".to_q", ".to_k", ".to_v", ".to_out.0"};

  for (size_t i = 0; i < sizeof ends / sizeof *ends; i++)
    if (!strncmp(s->name, "unet.", 5) && strstr(s->name, ".attn") && strlen(s->name) > strlen(ends[i]) &&
        !strcmp(s->name + strlen(s->name) - strlen(ends[i]), ends[i]))
      return 1;
  return 0;
}

/* Random factors of rank 4 everywhere. */
static struct adapter *make_expert(const char *name, uint64_t seed, float f)
{
  const struct generation *g = model_base(model[CPU32]);
  struct adapter *a;
  struct err e = {0};
  struct rng r;
  int n = 0, at = 0;

  for (int i = 0; i < g->n; i++)
    n += is_target(&g->site[i]);
  a = adapter_new_lowrank(name, n);
  assert_non_null(a);
  rng_seed(&r, seed);
  for (int i = 0; i < g->n; i++)
    if (is_target(&g->site[i])) {
      assert_int_equal(adapter_set_lowrank(a, at, g, i, 4, &e), 0);
      rng_randn(&r, a->delta[at].down, (size_t)(4 * g->site[i].in));
      rng_randn(&r, a->delta[at].up, (size_t)(4 * g->site[i].out));
      a->delta[at++].scale = f;
    }
  assert_int_equal(adapter_finish(a, g, &e), 0);
  return a;
}

static struct generation *build(int on, const struct adapter *a, float weight, enum generation_form form)
{
  struct adapter_use use = {.adapter = a, .weight = weight, .required = 1};
  struct generation *g = NULL;
  struct err e = {0};

  must(generation_build(&g, model_base(model[on]), model_sources(model[on]), &lane[on], &use, 1, form, NULL, &e), &e);
  return g;
}

static char *read_text(const char *file)
{
  FILE *f = fopen(file, "rb");
  char *p = calloc(1, 1 << 20);
  size_t n;

  assert_non_null(f);
  assert_non_null(p);
  n = fread(p, 1, (1 << 20) - 1, f);
  assert_true(n > 0 && n < (1 << 20) - 1);
  fclose(f);
  return p;
}

static struct manifest *parse(const char *t)
{
  struct manifest *m = NULL;
  struct err e = {0};

  must(manifest_read_text(&m, "x.manifest.json", t, strlen(t), &e), &e);
  return m;
}

static int setup(void **state)
{
  static const char *const prompts[] = {"", "a red apple"};
  const struct be_config one = {.threads = 1}, f32 = {.threads = 1, .force_f32 = 1};
  struct manifest_options o = {.note = "made by a test", .prompt = prompts, .prompts = 2, .secret_key = secret};
  struct generation *g;
  struct err e = {0};

  (void)state;
  if (!mkdtemp(folder) || be_open(&lane[REF], &be_ref, &one, &e) || be_open(&lane[CPU32], &be_cpu, &f32, &e) ||
      be_open(&lane[CPU], &be_cpu, &one, &e) || manifest_keygen(secret, public_key, &e))
    return -1;
  for (int i = 0; i < LANES; i++)
    if (model_open(&model[i], &lane[i], "weights/emoji", &e))
      return -1;
  expert = make_expert("expert", 1, SCALE);
  snprintf(path, sizeof path, "%s/expert.manifest.json", folder);
  g = build(REF, expert, 1, FORM_RUNTIME);
  must(manifest_write(path, expert, model[REF], &lane[REF], g, &o, &made, &e), &e);
  generation_unref(g);
  text = read_text(path);
  return 0;
}

static int teardown(void **state)
{
  (void)state;
  free(text);
  adapter_close(expert);
  for (int i = 0; i < LANES; i++) {
    model_close(model[i]);
    be_close(&lane[i]);
  }
  unlink(path);
  return rmdir(folder);
}

/* ---- what is right ---- */

static void test_round_trip(void **state)
{
  struct manifest *m = NULL;
  struct err e = {0};
  struct stat st;
  char beside[128];

  (void)state;
  must(manifest_read(&m, path, &e), &e);
  must(manifest_check(m, expert, model[CPU], public_key, &e), &e);
  must(manifest_check(m, expert, model[CPU], NULL, &e), &e);
  must(manifest_check(m, expert, model[CPU], "", &e), &e);
  assert_string_equal(manifest_digest(m), expert->digest);
  assert_string_equal(manifest_note(m), "made by a test");
  assert_true(manifest_is_signed(m));
  assert_true(made.error == 0 && made.base_error == 0 && fabs(made.share - 1) <= 1e-12 && made.effect > 0.01 && made.effect < 0.2);
  manifest_free(m);
  assert_int_equal(stat(path, &st), 0);
  assert_true(st.st_size < 40000); /* 23 kB: two probes; a server reads it for every adapter */
  must(manifest_path(beside, sizeof beside, "/a/b.safetensors", &e), &e);
  assert_string_equal(beside, "/a/b.manifest.json");
  must(manifest_path(beside, sizeof beside, "peft/", &e), &e);
  assert_string_equal(beside, "peft.manifest.json");
  assert_int_equal(manifest_path(beside, 8, "peft/", &e), E_ARG);
}

/* Largest error, share and residual on every backend and form. */
static void test_probe_passes(void **state)
{
  struct manifest *m = parse(text);
  struct err e = {0};

  (void)state;
  for (int on = CPU32; on < LANES; on++)
    for (int form = FORM_RUNTIME; form <= FORM_FOLDED; form++) {
      struct generation *g = build(on, expert, 1, (enum generation_form)form);
      struct manifest_report x;

      must(manifest_probe(m, model[on], &lane[on], g, &x, &e), &e);
      print_message("  %s %s %s: error %.2g, base %.2g, effect %.3g, share %.5f, residual %.2g\n", lane[on].ops->name,
                    lane[on].act == DT_F32 ? "fp32" : "bf16", form == FORM_FOLDED ? "folded" : "runtime", x.error, x.base_error, x.effect,
                    x.share, x.residual);
      /* measured: fp32 error 1.4e-6, base 1.8e-6, share off by less than 1e-5, residual 2.1e-5; bf16 error 0.0050, base 0.0048, share off
       * by 0.005, and by 0.009 on other weights */
      if (lane[on].act == DT_F32)
        assert_true(x.error <= 7e-6 && x.base_error <= 7e-6 && fabs(x.share - 1) <= 4e-5 && x.residual <= 8e-5);
      else
        assert_true(x.error <= 0.02 && x.base_error <= 0.02 && fabs(x.share - 1) <= 0.04);
      generation_unref(g);
    }
  manifest_free(m);
}

/* A prediction is what a picture is drawn with: one DDIM step of pipeline.c from the same noise ends where this epsilon leads. */
static void test_prediction_is_the_pictures(void **state)
{
  const struct draw_params p = {.prompt = "a (red:1.3) apple", .prompt_len = 17, .negative = "", .width = 128, .height = 128, .steps = 1,
                                .guidance = 0, .seed = 7, .sampler = SAMPLER_DDIM};
  struct model *m = model[CPU32];
  struct generation *g = build(CPU32, expert, 1, FORM_RUNTIME);
  struct sampler_plan plan = {0};
  struct predictor *pr = NULL;
  struct draw *d = NULL;
  float x[1024], eps[1024], got[1024];
  double worst = 0;
  struct err e = {0};
  struct rng r;

  (void)state;
  assert_int_equal(model_info(m)->vae_factor * 16, 128);
  must(model_reserve(m, 128, 128, &e), &e);
  must(draw_prepare(&d, m, &p, &e) || draw_start(d, model_lane(m), g, &e) || draw_step(d, &e) || draw_latents(d, got, &e), &e);
  draw_close(d);
  must(sampler_plan(&plan, &m->schedule, SAMPLER_DDIM, 0, 1, &e), &e);
  must(predictor_new(&pr, m, &lane[CPU32], 16, 16, &e), &e);
  assert_int_equal(predictor_count(pr), 1024);
  assert_int_equal(predictor_run(pr, x, 1, NULL, eps, &e), E_INTERNAL); /* no prompt yet */
  memset(&e, 0, sizeof e);
  rng_seed(&r, 7);
  rng_randn(&r, x, 1024);
  must(predictor_prompt(pr, g, "a (red:1.3) apple", NULL, &e) || predictor_run(pr, x, plan.step[0].timestep, NULL, eps, &e), &e);
  for (int i = 0; i < 1024; i++) {
    const struct step_coef *c = &plan.step[0].coef;
    float x0 = c->x0_x * x[i] + c->x0_e * eps[i];

    worst = fmax(worst, fabs((double)(c->c_x * x[i] + c->c_x0 * x0 - got[i])));
  }
  print_message("  off by %.2g\n", worst);
  assert_true(worst <= 1e-6); /* 2.4e-7 */
  predictor_free(pr);
  sampler_plan_close(&plan);
  generation_unref(g);
}

/* ---- adapters that do not do what they should ---- */

/* Builds a (under expert's digest) and expects its canary to fail in words that say `says`. */
static void expect_caught(int on, struct adapter *a, enum generation_form form, const char *says, const char *what)
{
  struct manifest *m = parse(text);
  struct manifest_report x;
  struct generation *g;
  struct err e = {0};

  memcpy(a->digest, expert->digest, sizeof a->digest);
  g = build(on, a, 1, form);
  if (manifest_probe(m, model[on], &lane[on], g, &x, &e) != E_FILE)
    fail_msg("%s on %s passed: error %g, share %g, residual %g", what, lane[on].info, x.error, x.share, x.residual);
  print_message("  %-28s %s: error %.2g, share %.4f, residual %.2g\n", what, lane[on].act == DT_F32 ? "fp32" : "bf16", x.error, x.share,
                x.residual);
  assert_string_equal(e.field, "canary");
  if (!strstr(e.msg, says))
    fail_msg("%s: \"%s\" does not say \"%s\"", what, e.msg, says);
  generation_unref(g);
  manifest_free(m);
  adapter_close(a);
}

static void test_wrong_scale_is_caught(void **state)
{
  static const float wrong[] = {0, 0.5f, 2, -1, 0.8f};

  (void)state;
  for (int on = CPU32; on < LANES; on++)
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++)
      for (int form = FORM_RUNTIME; form <= FORM_FOLDED; form++) {
        char what[32];

        snprintf(what, sizeof what, "%g of the scale", (double)wrong[i]);
        expect_caught(on, make_expert("expert", 1, SCALE * wrong[i]), (enum generation_form)form, "times what the manifest says", what);
      }
}

static void test_another_is_caught(void **state)
{
  (void)state;
  for (int on = CPU32; on < LANES; on++)
    expect_caught(on, make_expert("expert", 2, SCALE), FORM_RUNTIME, "times what the manifest says", "another expert");
}

/* One site of 56 without effect, in fp32: residuals of 0.0016 to 0.38, and 5e-4 is allowed. What bf16 cannot see is what adapter_open
 * refuses: a file without that site. */
static void test_missing_site_is_caught(void **state)
{
  (void)state;
  for (int i = 0; i < expert->n; i += 3) {
    struct adapter *a = make_expert("expert", 1, SCALE);
    char what[32];

    a->delta[i].scale = 0;
    snprintf(what, sizeof what, "without site %d", i);
    expect_caught(CPU32, a, FORM_RUNTIME, "missing", what);
  }
}

/* The base itself, other adapters beside it, another weight: not what a canary may run through. */
static void test_generation_must_be_alone(void **state)
{
  struct adapter *other = make_expert("other", 2, SCALE);
  struct adapter_use use[] = {{.adapter = expert, .weight = 1, .required = 1}, {.adapter = other, .weight = 1, .required = 1}};
  struct generation *both = NULL, *half = build(CPU32, expert, 0.5f, FORM_RUNTIME);
  struct manifest *m = parse(text);
  struct err e = {0};

  (void)state;
  must(generation_build(&both, model_base(model[CPU32]), model_sources(model[CPU32]), &lane[CPU32], use, 2, FORM_RUNTIME, NULL, &e), &e);
  assert_int_equal(manifest_probe(m, model[CPU32], &lane[CPU32], both, NULL, &e), E_ARG);
  memset(&e, 0, sizeof e);
  assert_int_equal(manifest_probe(m, model[CPU32], &lane[CPU32], half, NULL, &e), E_ARG);
  memset(&e, 0, sizeof e);
  assert_int_equal(manifest_probe(m, model[CPU32], &lane[CPU32], model_base(model[CPU32]), NULL, &e), E_ARG);
  generation_unref(both);
  generation_unref(half);
  manifest_free(m);
  adapter_close(other);
}

/* ---- manifests that were changed ---- */

/* The member at a path like "canary.probes.0.seed". */
static json_t *find(json_t *root, const char *where, json_t **parent, char *last)
{
  char name[64];
  json_t *v = root;

  while (*where) {
    size_t n = strcspn(where, ".");

    snprintf(name, sizeof name, "%.*s", (int)n, where);
    *parent = v;
    snprintf(last, 64, "%s", name);
    v = json_is_array(v) ? json_array_get(v, (size_t)strtol(name, NULL, 10)) : json_object_get(v, name);
    where += n + (where[n] == '.');
  }
  return v;
}

/* Another value of the same kind: still well-formed, and a lie. */
static json_t *another(const json_t *v)
{
  const char *s = json_string_value(v);
  char *copy;
  json_t *out;
  size_t at;

  if (json_is_integer(v))
    return json_integer(json_integer_value(v) + 1);
  if (json_is_real(v))
    return json_real(json_real_value(v) / 2);
  copy = strdup(s && *s ? s : "x");
  at = strlen(copy) > 3 ? 3 : 0; /* of floats in base64: the upper bits of a mantissa */
  copy[at] = copy[at] == 'a' ? 'b' : 'a';
  out = json_string(copy);
  free(copy);
  return out;
}

/* The manifest with `where` replaced by v (taken over; NULL: removed), signed or with its signature taken off. The caller frees it. */
static char *changed(const char *where, json_t *v, int is_signed)
{
  json_t *root = json_loads(text, 0, NULL), *parent = root;
  char last[64] = "", *out;

  if (!is_signed) {
    json_object_del(root, "signature");
    json_object_del(root, "public_key");
  }
  find(root, where, &parent, last);
  if (json_is_array(parent))
    json_array_set_new(parent, (size_t)strtol(last, NULL, 10), v);
  else if (v)
    json_object_set_new(parent, last, v);
  else
    json_object_del(parent, last);
  out = json_dumps(root, JSON_REAL_PRECISION(17));
  json_decref(root);
  return out;
}

/* Reads, checks and (in fp32) probes; the first failure's code. */
static int verify(const char *t, const char *key, struct err *e)
{
  struct manifest *m = NULL;
  struct generation *g = NULL;
  int r = manifest_read_text(&m, "x.manifest.json", t, strlen(t), e);

  if (!r)
    r = manifest_check(m, expert, model[CPU32], key, e);
  if (!r) {
    g = build(CPU32, expert, 1, FORM_RUNTIME);
    r = manifest_probe(m, model[CPU32], &lane[CPU32], g, NULL, e);
  }
  generation_unref(g);
  manifest_free(m);
  return r;
}

static void test_tampering(void **state)
{
  /* the member, and the field that an unsigned manifest is refused for; NULL: only a signature protects it */
  static const char *const members[][2] = {
      {"format", "format"}, {"name", NULL}, {"note", NULL}, {"digest", "digest"}, {"base.name", NULL}, {"base.digest", "base.digest"},
      {"targets.count", "targets.count"}, {"targets.digest", "targets.digest"}, {"max_rank", "max_rank"}, {"params", "params"},
      {"canary.channels", "canary.probes[0].expected"}, {"canary.height", "canary.probes[0].expected"},
      {"canary.width", "canary.probes[0].expected"}, {"canary.tolerance.f32", NULL}, {"canary.tolerance.bf16", NULL},
      {"canary.probes.0.seed", "canary"}, {"canary.probes.0.timestep", "canary"}, {"canary.probes.1.prompt", "canary"},
      {"canary.probes.0.expected", "canary"}, {"canary.probes.1.base", "canary"}};
  json_t *root = json_loads(text, 0, NULL), *parent;
  char last[64];

  (void)state;
  for (size_t i = 0; i < sizeof members / sizeof *members; i++) {
    json_t *v = find(root, members[i][0], &parent, last);
    char *t = changed(members[i][0], another(v), 1);
    struct err e = {0};

    /* signed: refused with the first look, whatever it is; the structure itself may be noticed first */
    assert_int_equal(verify(t, public_key, &e), E_FILE);
    if (strcmp(e.field, "signature") && (!members[i][1] || strcmp(e.field, members[i][1])))
      fail_msg("%s changed in a signed manifest: the field is \"%s\" (%s)", members[i][0], e.field, e.msg);
    free(t);
    memset(&e, 0, sizeof e);
    t = changed(members[i][0], another(v), 0);
    if (members[i][1]) {
      if (verify(t, NULL, &e) != E_FILE || strcmp(e.field, members[i][1]))
        fail_msg("%s changed: the field is \"%s\" (%s)", members[i][0], e.field, e.msg);
    } else if (verify(t, NULL, &e)) {
      fail_msg("%s changed in an unsigned manifest: %s", members[i][0], e.msg);
    }
    free(t);
  }
  json_decref(root);
}

/* Missing, unknown and of the wrong type, each named. */
static void test_malformed(void **state)
{
  static const char *const required[] = {"format", "name", "digest", "base", "base.name", "base.digest", "targets", "targets.count",
                                         "targets.digest", "max_rank", "params", "canary", "canary.channels", "canary.height",
                                         "canary.width", "canary.tolerance", "canary.tolerance.f32", "canary.tolerance.bf16",
                                         "canary.probes", "canary.probes.0.seed", "canary.probes.0.timestep",
                                         "canary.probes.1.prompt", "canary.probes.0.expected", "canary.probes.1.base"};
  static const char *const unknown[] = {"extra", "base.extra", "targets.extra", "canary.extra", "canary.tolerance.extra",
                                        "canary.probes.0.extra"};
  char *t;

  (void)state;
  for (size_t i = 0; i < sizeof required / sizeof *required; i++)
    for (int pass = 0; pass < 2; pass++) {
      const char *dot = strrchr(required[i], '.'), *name = dot ? dot + 1 : required[i];
      struct err e = {0};

      t = changed(required[i], pass ? json_null() : NULL, 0);
      if (verify(t, NULL, &e) != E_FILE || !strstr(e.field, name) || !strstr(e.msg, "x.manifest.json"))
        fail_msg("%s %s: the field is \"%s\" (%s)", required[i], pass ? "null" : "missing", e.field, e.msg);
      free(t);
    }
  for (size_t i = 0; i < sizeof unknown / sizeof *unknown; i++) {
    struct err e = {0};

    t = changed(unknown[i], json_integer(1), 0);
    if (verify(t, NULL, &e) != E_FILE || !strstr(e.field, "extra"))
      fail_msg("%s: the field is \"%s\" (%s)", unknown[i], e.field, e.msg);
    free(t);
  }
}

static void expect_field(char *t, const char *field)
{
  struct err e = {0};

  if (verify(t, NULL, &e) != E_FILE || strcmp(e.field, field))
    fail_msg("the field is \"%s\", not \"%s\" (%s)", e.field, field, e.msg);
  free(t);
}

/* Bounds: nothing that a maker writes may loosen the reader. */
static void test_bounds(void **state)
{
  json_t *root = json_loads(text, 0, NULL), *parent;
  char last[64];
  const char *good = json_string_value(find(root, "canary.probes.0.expected", &parent, last));
  char *nan = strdup(good), *long_prompt = calloc(1, 3000);

  (void)state;
  memcpy(nan, "AADAfwAAwH8AAMB/", 16); /* three floats of 0x7fc00000: NaN */
  memset(long_prompt, 'a', 2999);
  expect_field(changed("canary.tolerance.f32", json_real(0.5), 0), "canary.tolerance.f32");
  expect_field(changed("canary.tolerance.bf16", json_real(0.5), 0), "canary.tolerance.bf16");
  expect_field(changed("canary.tolerance.bf16", json_real(0), 0), "canary.tolerance.bf16");
  expect_field(changed("canary.tolerance.bf16", json_real(-1), 0), "canary.tolerance.bf16");
  expect_field(changed("canary.height", json_integer(1 << 20), 0), "canary.height");
  expect_field(changed("canary.probes", json_array(), 0), "canary.probes");
  expect_field(changed("canary.probes.0.timestep", json_integer(1000), 0), "canary.probes[0].timestep");
  expect_field(changed("canary.probes.0.timestep", json_integer(-1), 0), "canary.probes[0].timestep");
  expect_field(changed("canary.probes.0.seed", json_real(1.5), 0), "canary.probes[0].seed");
  expect_field(changed("canary.probes.0.expected", json_string(nan), 0), "canary.probes[0].expected");
  expect_field(changed("canary.probes.0.expected", json_string("AAAA"), 0), "canary.probes[0].expected");
  expect_field(changed("canary.probes.0.prompt", json_string(long_prompt), 0), "canary.probes[0].prompt");
  expect_field(changed("digest", json_string("ABCD"), 0), "digest");
  expect_field(changed("name", json_string("a\nb"), 0), "name");
  /* a canary by which the adapter does nothing proves nothing: a zero adapter would pass it */
  expect_field(changed("canary.probes.0.expected", json_incref(find(root, "canary.probes.0.base", &parent, last)), 0), "canary");
  free(nan);
  free(long_prompt);
  json_decref(root);
}

static void test_not_even_json(void **state)
{
  struct manifest *m = (struct manifest *)1;
  char *cut = strdup(text), file[160];
  struct err e = {0};
  int fd;

  (void)state;
  cut[strlen(cut) / 2] = 0;
  assert_int_equal(manifest_read_text(&m, "x", cut, strlen(cut), &e), E_FILE);
  assert_null(m);
  free(cut);
  memset(&e, 0, sizeof e);
  assert_int_equal(manifest_read_text(&m, "x", "", 0, &e), E_FILE);
  memset(&e, 0, sizeof e);
  assert_int_equal(manifest_read_text(&m, "x", "[]", 2, &e), E_FILE);
  memset(&e, 0, sizeof e);
  assert_int_equal(manifest_read_text(&m, "x", "{\"digest\":1,\"digest\":2}", 23, &e), E_FILE); /* which one is meant? */
  assert_non_null(strstr(e.msg, "uplicate"));
  snprintf(file, sizeof file, "%s/none", folder);
  memset(&e, 0, sizeof e);
  assert_int_equal(manifest_read(&m, file, &e), E_FILE);
  assert_null(m);
  assert_int_equal(mkfifo(file, 0600), 0); /* must not hang */
  memset(&e, 0, sizeof e);
  assert_int_equal(manifest_read(&m, file, &e), E_FILE);
  assert_int_equal(unlink(file), 0);
  fd = open(file, O_CREAT | O_WRONLY, 0600);
  assert_true(fd >= 0);
  assert_int_equal(ftruncate(fd, 1 << 30), 0);
  close(fd);
  memset(&e, 0, sizeof e);
  assert_int_equal(manifest_read(&m, file, &e), E_FILE);
  assert_int_equal(unlink(file), 0);
}

/* ---- signatures ---- */

static void test_signatures(void **state)
{
  char other_secret[129], other_public[65], *t;
  const struct manifest_options o = {.note = "someone else", .secret_key = other_secret};
  char file[160], bad[129];
  struct generation *g = build(CPU32, expert, 1, FORM_RUNTIME);
  struct manifest_options wrong = {.secret_key = bad};
  struct err e = {0};

  (void)state;
  /* not signed at all */
  t = changed("note", json_string(""), 0);
  assert_int_equal(verify(t, public_key, &e), E_FILE);
  assert_string_equal(e.field, "signature");
  assert_non_null(strstr(e.msg, "must be signed"));
  memset(&e, 0, sizeof e);
  must(verify(t, NULL, &e), &e);
  free(t);
  /* by someone else: right in itself, and not what was asked for */
  must(manifest_keygen(other_secret, other_public, &e), &e);
  snprintf(file, sizeof file, "%s/other.manifest.json", folder);
  must(manifest_write(file, expert, model[CPU32], &lane[CPU32], g, &o, NULL, &e), &e);
  t = read_text(file);
  must(verify(t, other_public, &e), &e);
  must(verify(t, NULL, &e), &e);
  assert_int_equal(verify(t, public_key, &e), E_FILE);
  assert_string_equal(e.field, "public_key");
  free(t);
  assert_int_equal(unlink(file), 0);
  /* the trusted key's name over the other's signature; a signature from elsewhere; half of one */
  for (int i = 0; i < 3; i++) {
    memset(&e, 0, sizeof e);
    t = i == 0 ? changed("public_key", json_string(other_public), 1) : i == 1 ? changed("signature", json_string(secret), 1)
                                                                               : changed("signature", NULL, 1);
    assert_int_equal(verify(t, public_key, &e), E_FILE);
    assert_string_equal(e.field, "signature");
    free(t);
  }
  /* white space and the order of members are not signed: the text may be formatted again */
  t = changed("note", json_string("made by a test"), 1);
  memset(&e, 0, sizeof e);
  must(verify(t, public_key, &e), &e);
  free(t);
  /* keys that are none */
  snprintf(bad, sizeof bad, "%s", "1234");
  assert_int_equal(manifest_write(file, expert, model[CPU32], &lane[CPU32], g, &wrong, NULL, &e), E_ARG);
  memset(&e, 0, sizeof e);
  memcpy(bad, secret, sizeof bad);
  bad[0] = bad[0] == '0' ? '1' : '0';
  assert_int_equal(manifest_write(file, expert, model[CPU32], &lane[CPU32], g, &wrong, NULL, &e), E_ARG);
  assert_string_equal(e.field, "secret_key");
  assert_int_equal(access(file, F_OK), -1); /* nothing was left behind */
  generation_unref(g);
}

/* A maker whose adapter does nothing on the canary is told so, and gets no manifest. */
static void test_write_refuses(void **state)
{
  struct adapter *faint = make_expert("faint", 3, 1e-5f);
  struct generation *g = build(CPU32, faint, 1, FORM_RUNTIME);
  const struct manifest_options o = {0};
  char file[160];
  struct err e = {0};

  (void)state;
  snprintf(file, sizeof file, "%s/faint.manifest.json", folder);
  assert_int_equal(manifest_write(file, faint, model[CPU32], &lane[CPU32], g, &o, NULL, &e), E_FILE);
  assert_non_null(strstr(e.msg, "proves nothing"));
  assert_int_equal(access(file, F_OK), -1);
  memset(&e, 0, sizeof e);
  assert_int_equal(manifest_write(file, expert, model[CPU32], &lane[CPU32], g, &o, NULL, &e), E_ARG); /* another adapter's generation */
  memset(&e, 0, sizeof e);
  generation_unref(g);
  g = build(CPU32, expert, 1, FORM_RUNTIME);
  assert_int_equal(manifest_write("/var/tmp/no such folder/x", expert, model[CPU32], &lane[CPU32], g, &o, NULL, &e), E_FILE);
  generation_unref(g);
  adapter_close(faint);
}

int main(void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test(test_round_trip),
    cmocka_unit_test(test_probe_passes),
    cmocka_unit_test(test_prediction_is_the_pictures),
    cmocka_unit_test(test_wrong_scale_is_caught),
    cmocka_unit_test(test_another_is_caught),
    cmocka_unit_test(test_missing_site_is_caught),
    cmocka_unit_test(test_generation_must_be_alone),
    cmocka_unit_test(test_tampering),
    cmocka_unit_test(test_malformed),
    cmocka_unit_test(test_bounds),
    cmocka_unit_test(test_not_even_json),
    cmocka_unit_test(test_signatures),
    cmocka_unit_test(test_write_refuses),
  };

  return cmocka_run_group_tests(tests, setup, teardown);
}
