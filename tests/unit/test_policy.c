/*
 * test_policy.c - the policy file: what it may say, every refusal with the field it names, paths that lead out, and keys. Threads: none.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

#include "server/policy.h"

static char folder[] = "/var/tmp/test_policy_XXXXXX";

#define HEX "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
#define OTHER "1123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"

static void in_folder(char *out, size_t size, const char *name)
{
  snprintf(out, size, "%s/%s", folder, name);
}

static void write_file(const char *name, const char *text)
{
  char path[256];
  FILE *f;

  in_folder(path, sizeof path, name);
  f = fopen(path, "w");
  assert_non_null(f);
  assert_int_equal(fwrite(text, 1, strlen(text), f), strlen(text));
  assert_int_equal(fclose(f), 0);
}

static struct policy *read_text(const char *text, struct err *e)
{
  struct policy *p = NULL;
  char path[256];

  *e = (struct err){0};
  write_file("policy.json", text);
  in_folder(path, sizeof path, "policy.json");
  if (policy_read(&p, path, e))
    assert_null(p);
  return p;
}

static struct policy *good(const char *text)
{
  struct err e;
  struct policy *p = read_text(text, &e);

  if (!p)
    fail_msg("%s\n  was refused: %s", text, e.msg);
  return p;
}

static void bad(const char *text, const char *field, const char *says)
{
  struct err e;
  struct policy *p = read_text(text, &e);

  if (p)
    fail_msg("%s\n  was accepted", text);
  if (e.code != E_FILE || strcmp(e.field, field) || !strstr(e.msg, says) || !strstr(e.msg, "policy.json"))
    fail_msg("%s\n  gave code %d, field \"%s\", \"%s\"; expected \"%s\", \"...%s...\"", text, e.code, e.field, e.msg, field, says);
}

static void test_everything(void **state)
{
  struct policy *p;
  char here[512];

  (void)state;
  p = good("{\"adapter_dir\": \"inside\", \"require_manifest\": true, \"require_signature\": true, \"public_key\": \"" HEX "\","
           "\"adapters\": {\"safe\": {\"path\": \"safe.safetensors\"}, \"ink\": {\"path\": \"ink\", \"digest\": \"" OTHER "\"}},"
           "\"profiles\": {\"school\": {\"required\": [{\"adapter\": \"safe\", \"weight\": 1.5, \"min_weight\": 1}], \"form\": \"runtime\"},"
           "\"default\": {\"required\": [{\"adapter\": \"safe\"}], \"styles\": [\"ink\"], \"max_style_weight\": 2, \"max_style_norm_ratio\": 3,"
           "\"cancel_threshold\": 0.25, \"on_cancel\": \"project\"}, \"lab\": {\"requires_nothing\": true}},"
           "\"tenants\": {\"us\": {\"key_hash\": \"" HEX "\", \"profile\": \"lab\"}}}");
  assert_true(p->require_manifest && p->require_signature);
  assert_string_equal(p->public_key, HEX);
  assert_non_null(realpath(folder, here));
  assert_int_equal(strncmp(p->adapter_dir, here, strlen(here)), 0);
  assert_string_equal(p->adapter_dir + strlen(here), "/inside");
  assert_int_equal(p->n_adapters, 2);
  assert_int_equal(p->n_profiles, 3);
  assert_string_equal(p->profile[0].name, "default"); /* wherever it stands */
  assert_string_equal(p->profile[1].name, "school");
  assert_string_equal(p->profile[2].name, "lab");
  assert_int_equal(p->profile[0].n_required, 1);
  assert_true(p->profile[0].required[0].weight == 1 && p->profile[0].required[0].min_weight == 1);
  assert_true(p->profile[1].required[0].weight == 1.5f && p->profile[1].required[0].min_weight == 1);
  assert_true(p->profile[0].project && !p->profile[1].project && p->profile[1].form_runtime && !p->profile[0].form_runtime);
  assert_true(p->profile[0].max_style_weight == 2 && p->profile[0].max_style_norm_ratio == 3 && p->profile[0].cancel_threshold == 0.25f);
  assert_true(p->profile[1].max_style_weight == 1.5f && p->profile[1].max_style_norm_ratio == 1 && p->profile[1].cancel_threshold == 0.1f);
  assert_true(p->profile[2].requires_nothing && !p->profile[2].n_required && !p->profile[0].requires_nothing);
  assert_int_equal(p->tenant[0].profile, 2);
  assert_int_equal(strlen(p->digest), 64);
  policy_free(p);
  p = good("{\"profiles\": {\"default\": {\"requires_nothing\": true}}}");
  assert_true(p->require_manifest && !p->require_signature && !p->n_adapters && !p->n_tenants);
  policy_free(p);
}

static int same_limits(const struct policy_limits *l, int concurrency, int queue, int minute, int pictures, float weight, int priority)
{
  return l->concurrency == concurrency && l->queue == queue && l->per_minute == minute && l->pictures_per_minute == pictures && l->weight == weight &&
         l->priority == priority;
}

static void test_limits(void **state)
{
  struct policy *p;

  (void)state;
  p = good("{\"profiles\": {\"default\": {\"requires_nothing\": true}}, \"tenants\": {"
           "\"a\": {\"key_hash\": \"" HEX "\", \"profile\": \"default\", \"limits\": {\"concurrency\": 4, \"queue\": 3, \"per_minute\": 60,"
           "\"pictures_per_minute\": 120, \"weight\": 2.5, \"priority\": -1}},"
           "\"b\": {\"key_hash\": \"" OTHER "\", \"profile\": \"default\"}},"
           "\"keyless\": {\"limits\": {\"per_minute\": 10}}}");
  assert_true(same_limits(&p->tenant[0].limits, 4, 3, 60, 120, 2.5f, -1));
  assert_true(same_limits(&p->tenant[1].limits, 0, 0, 0, 0, 1, 0));
  assert_true(same_limits(&p->keyless, 0, 0, 10, 0, 1, 0));
  policy_free(p);
  p = good("{\"profiles\": {\"default\": {\"requires_nothing\": true}}, \"keyless\": {}}");
  assert_true(same_limits(&p->keyless, 0, 0, 0, 0, 1, 0));
  policy_free(p);
#define KEYLESS(fields) "{\"profiles\": {\"default\": {\"requires_nothing\": true}}, \"keyless\": " fields "}"
  bad(KEYLESS("1"), "keyless", "must be an object");
  bad(KEYLESS("{\"limit\": {}}"), "keyless.limit", "not a field");
  bad(KEYLESS("{\"limits\": []}"), "keyless.limits", "must be an object");
  bad(KEYLESS("{\"limits\": {\"per_second\": 1}}"), "keyless.limits.per_second", "not a field");
  bad(KEYLESS("{\"limits\": {\"concurrency\": 0}}"), "keyless.limits.concurrency", "whole number between 1");
  bad(KEYLESS("{\"limits\": {\"queue\": 1.5}}"), "keyless.limits.queue", "whole number between 1");
  bad(KEYLESS("{\"limits\": {\"per_minute\": 1000001}}"), "keyless.limits.per_minute", "whole number between 1");
  bad(KEYLESS("{\"limits\": {\"pictures_per_minute\": \"9\"}}"), "keyless.limits.pictures_per_minute", "whole number");
  bad(KEYLESS("{\"limits\": {\"weight\": 0}}"), "keyless.limits.weight", "between 0.01 and 100");
  bad(KEYLESS("{\"limits\": {\"priority\": 11}}"), "keyless.limits.priority", "between -10 and 10");
}

#define SAFE "\"adapters\": {\"safe\": {\"path\": \"safe.safetensors\"}}"
#define NEEDS "{\"required\": [{\"adapter\": \"safe\"}]}"
#define LAB "{\"requires_nothing\": true}"

static void test_refusals(void **state)
{
  (void)state;
  bad("", "", "malformed JSON");
  bad("[]", "", "must be an object");
  bad("{\"profiles\": {\"default\": " LAB "}, \"tenant\": {}}", "tenant", "not a field");
  bad("{\"profiles\": {\"default\": " LAB ", \"default\": " LAB "}}", "default", "twice");
  bad("{" SAFE "}", "profiles", "\"default\"");
  bad("{" SAFE ", \"profiles\": {\"other\": " NEEDS "}}", "profiles", "\"default\"");
  bad("{\"profiles\": {\"default\": {}}}", "profiles.default.requires_nothing", "without any safety");
  bad("{\"profiles\": {\"default\": {\"required\": []}}}", "profiles.default.requires_nothing", "without any safety");
  bad("{\"profiles\": {\"default\": {\"requires_nothing\": false}}}", "profiles.default.requires_nothing", "without any safety");
  bad("{\"profiles\": {\"default\": {\"requires_nothing\": 1}}}", "profiles.default.requires_nothing", "true or false");
  bad("{\"profiles\": {\"default\": {\"requires_nothing\": \"true\"}}}", "profiles.default.requires_nothing", "true or false");
  bad("{" SAFE ", \"profiles\": {\"default\": {\"required\": [{\"adapter\": \"safe\"}], \"requires_nothing\": true}}}",
      "profiles.default.requires_nothing", "are required");
  bad("{" SAFE ", \"profiles\": {\"default\": {\"required\": [{\"adapter\": \"safe\"}, {\"adapter\": \"safe\"}]}}}",
      "profiles.default.required[1].adapter", "twice");
  bad("{" SAFE ", \"profiles\": {\"default\": {\"required\": [{\"adapter\": \"none\"}]}}}", "profiles.default.required[0].adapter", "not among");
  bad("{" SAFE ", \"profiles\": {\"default\": {\"required\": [{\"adapter\": \"safe\", \"weight\": 0.5, \"min_weight\": 0.9}]}}}",
      "profiles.default.required[0].weight", "below its min_weight");
  bad("{" SAFE ", \"profiles\": {\"default\": {\"required\": [{\"adapter\": \"safe\", \"weight\": 0}]}}}", "profiles.default.required[0].weight",
      "between");
  bad("{" SAFE ", \"profiles\": {\"default\": {\"required\": [{\"adapter\": \"safe\", \"weight\": -1}]}}}", "profiles.default.required[0].weight",
      "between");
  bad("{" SAFE ", \"profiles\": {\"default\": {\"required\": [{\"adapter\": \"safe\", \"scale\": 1}]}}}", "profiles.default.required[0].scale",
      "not a field");
  bad("{" SAFE ", \"profiles\": {\"default\": {\"required\": {\"adapter\": \"safe\"}}}}", "profiles.default.required", "a list");
  bad("{" SAFE ", \"profiles\": {\"default\": {\"required\": [{\"adapter\": \"safe\"}], \"form\": \"fast\"}}}", "profiles.default.form", "folded");
  bad("{" SAFE ", \"profiles\": {\"default\": {\"required\": [{\"adapter\": \"safe\"}], \"on_cancel\": \"warn\"}}}", "profiles.default.on_cancel",
      "refuse");
  bad("{" SAFE ", \"profiles\": {\"default\": {\"required\": [{\"adapter\": \"safe\"}], \"cancel_threshold\": 1.5}}}",
      "profiles.default.cancel_threshold", "between 0 and 1");
  bad("{" SAFE ", \"profiles\": {\"default\": {\"required\": [{\"adapter\": \"safe\"}], \"require\": []}}}", "profiles.default.require", "not a field");
  bad("{\"adapters\": {\"a b\": {\"path\": \"x\"}}, \"profiles\": {\"default\": " LAB "}}", "adapters.a b", "name of 1 to");
  bad("{\"adapters\": {\"a\": {}}, \"profiles\": {\"default\": " LAB "}}", "adapters.a.path", "text");
  bad("{\"adapters\": {\"a\": {\"path\": \"x\", \"digest\": \"12\"}}, \"profiles\": {\"default\": " LAB "}}", "adapters.a.digest", "64");
  bad("{\"require_signature\": true, \"profiles\": {\"default\": " LAB "}}", "public_key", "64");
  bad("{\"require_signature\": true, \"require_manifest\": false, \"public_key\": \"" HEX "\", \"profiles\": {\"default\": " LAB "}}",
      "require_manifest", "signature");
  bad("{\"adapter_dir\": \"missing\", \"profiles\": {\"default\": " LAB "}}", "adapter_dir", "missing");
}

static void test_styles(void **state)
{
  (void)state;
  bad("{" SAFE ", \"profiles\": {\"default\": {\"required\": [{\"adapter\": \"safe\"}], \"styles\": [\"safe\"]}}}", "adapters.safe.digest", "pinned");
  bad("{\"adapters\": {\"safe\": {\"path\": \"s\", \"digest\": \"" HEX "\"}}, \"profiles\": {\"default\": {\"required\": [{\"adapter\": \"safe\"}],"
      "\"styles\": [\"safe\"]}}}", "profiles.default.styles[0]", "cannot be a style");
  bad("{\"adapters\": {\"safe\": {\"path\": \"s\"}, \"copy\": {\"path\": \"s\", \"digest\": \"" HEX "\"}}, \"profiles\": {\"default\": {\"required\":"
      "[{\"adapter\": \"safe\"}], \"styles\": [\"copy\"]}}}", "profiles.default.styles[0]", "cannot be a style");
  bad("{\"adapters\": {\"safe\": {\"path\": \"s\", \"digest\": \"" HEX "\"}, \"copy\": {\"path\": \"t\", \"digest\": \"" HEX "\"}}, \"profiles\":"
      "{\"default\": " LAB ", \"lab\": {\"requires_nothing\": true, \"styles\": [\"copy\"]}, \"school\": {\"required\": [{\"adapter\": \"safe\"}]}}}",
      "profiles.lab.styles[0]", "school");
  bad("{\"adapters\": {\"i\": {\"path\": \"s\", \"digest\": \"" HEX "\"}}, \"profiles\": {\"default\": {\"requires_nothing\": true, \"styles\":"
      "[\"i\", \"i\"]}}}", "profiles.default.styles[1]", "twice");
}

static void bad_path(const char *path, const char *says)
{
  char text[512];

  snprintf(text, sizeof text, "{\"adapter_dir\": \"inside\", \"adapters\": {\"a\": {\"path\": \"%s\"}}, \"profiles\": {\"default\": " LAB "}}", path);
  bad(text, "adapters.a.path", says);
}

static void test_paths(void **state)
{
  struct err e = {0};
  struct policy *p;
  struct buf b;
  char path[256], link[256];

  (void)state;
  bad_path("/etc/passwd", "relative");
  bad_path("../outside", "leaves it");
  bad_path("x/../../outside", "leaves it");
  bad_path("..", "leaves it");
  write_file("outside", "secret");
  write_file("inside/file", "12345");
  in_folder(link, sizeof link, "inside/link");
  assert_int_equal(symlink("../outside", link), 0);
  bad_path("link", "leads out");
  in_folder(path, sizeof path, "inside-not"); /* a folder whose name begins like ours */
  assert_int_equal(mkdir(path, 0700), 0);
  write_file("inside-not/file", "secret");
  assert_int_equal(unlink(link), 0);
  assert_int_equal(symlink("../inside-not", link), 0);
  bad_path("link/file", "leads out");
  assert_int_equal(unlink(link), 0);
  assert_int_equal(symlink("file", link), 0);
  p = good("{\"adapter_dir\": \"inside\", \"adapters\": {\"a\": {\"path\": \"link\"}}, \"profiles\": {\"default\": " LAB "}}");
  buf_init(&b, 5);
  assert_int_equal(policy_read_file(p, "link", &b, &e), 0); /* a link inside is fine */
  assert_string_equal(b.p, "12345");
  buf_close(&b);
  buf_init(&b, 4);
  assert_int_equal(policy_read_file(p, "file", &b, &e), E_FILE);
  assert_non_null(strstr(e.msg, "at most 4"));
  assert_int_equal(unlink(link), 0); /* swapped after the policy was read */
  assert_int_equal(symlink("../outside", link), 0);
  e.code = 0;
  assert_int_equal(policy_read_file(p, "link", &b, &e), E_FILE);
  assert_non_null(strstr(e.msg, "leads out"));
  e.code = 0;
  assert_int_equal(policy_read_file(p, "none", &b, &e), E_NOTFOUND);
  e.code = 0;
  in_folder(path, sizeof path, "inside/pipe");
  assert_int_equal(mkfifo(path, 0600), 0);
  assert_int_equal(policy_read_file(p, "pipe", &b, &e), E_FILE);
  assert_non_null(strstr(e.msg, "not a file"));
  assert_false(policy_is_folder(p, "file"));
  assert_true(policy_is_folder(p, "."));
  buf_close(&b);
  policy_free(p);
}

static void test_keys(void **state)
{
  /* printf %s key-one | b2sum -l 256 */
  struct policy *p = good("{\"profiles\": {\"default\": " LAB ", \"a\": " LAB ", \"b\": " LAB "}, \"tenants\": {\"one\": {\"profile\": \"a\", \"key_hash\":"
                          "\"28e166c6a720b21a880123b90fdd5253ea6666b44a7e6214917a86cfc6275ac3\"}, \"two\": {\"profile\": \"b\", \"key_hash\":"
                          "\"B0B0B0B0B0B0B0B0B0B0B0B0B0B0B0B0B0B0B0B0B0B0B0B0B0B0B0B0B0B0B0B0\"}}}");
  struct err e = {0};
  const char *tenant;
  int profile;

  (void)state;
  assert_int_equal(policy_authenticate(p, NULL, &profile, &tenant, &e), 0);
  assert_true(profile == 0 && !*tenant);
  assert_int_equal(policy_authenticate(p, "", &profile, &tenant, &e), E_AUTH);
  e.code = 0;
  assert_int_equal(policy_authenticate(p, "key-two", &profile, &tenant, &e), E_AUTH);
  e.code = 0;
  assert_int_equal(policy_authenticate(p, "b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0", &profile, &tenant, &e), E_AUTH);
  e.code = 0;
  assert_int_equal(policy_authenticate(p, "key-one", &profile, &tenant, &e), 0);
  assert_true(profile == 1);
  assert_string_equal(tenant, "one");
  policy_free(p);
  bad("{\"profiles\": {\"default\": " LAB "}, \"tenants\": {\"a\": {\"key_hash\": \"" HEX "\", \"profile\": \"default\"}, \"b\": {\"key_hash\":"
      "\"0123456789ABCDEF0123456789abcdef0123456789abcdef0123456789abcdef\", \"profile\": \"default\"}}}", "tenants.b.key_hash", "\"a\"");
  bad("{\"profiles\": {\"default\": " LAB "}, \"tenants\": {\"a\": {\"key_hash\": \"" HEX "\", \"profile\": \"none\"}}}", "tenants.a.profile", "not among");
  bad("{\"profiles\": {\"default\": " LAB "}, \"tenants\": {\"a\": {\"profile\": \"default\"}}}", "tenants.a.key_hash", "64");
  p = good("{\"profiles\": {\"default\": " LAB "}}");
  assert_int_equal(policy_authenticate(p, "anything", &profile, &tenant, &e), 0); /* without tenants keys mean nothing */
  policy_free(p);
}

static void test_default_path(void **state)
{
  struct err e = {0};
  char path[POLICY_PATH];

  (void)state;
  assert_int_equal(policy_default_path(path, "weights/emoji", &e), 0);
  assert_string_equal(path, "weights/safety/policy.json");
  assert_int_equal(policy_default_path(path, "weights/../weights/emoji/", &e), 0);
  assert_int_equal(policy_default_path(path, folder, &e), E_ARG);
  assert_non_null(strstr(e.msg, "--policy"));
  assert_non_null(strstr(e.msg, "\"requires_nothing\": true"));
}

static int set_up(void **state)
{
  char path[256];

  (void)state;
  if (!mkdtemp(folder))
    return -1;
  in_folder(path, sizeof path, "inside");
  return mkdir(path, 0700);
}

static int tear_down(void **state)
{
  static const char *const names[] = {"inside/pipe", "inside/link", "inside/file", "inside-not/file", "inside-not", "inside", "outside",
                                      "policy.json"};
  char path[256];

  (void)state;
  for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
    in_folder(path, sizeof path, names[i]);
    if (remove(path))
      return -1;
  }
  return rmdir(folder);
}

int main(void)
{
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_everything), cmocka_unit_test(test_limits), cmocka_unit_test(test_refusals), cmocka_unit_test(test_styles),
      cmocka_unit_test(test_paths),      cmocka_unit_test(test_keys),     cmocka_unit_test(test_default_path),
  };

  return cmocka_run_group_tests(tests, set_up, tear_down);
}
