/*
 * manifest_write.c - makes a manifest, and the keys that sign it; see manifest.h.
 *
 * Called by `safelight adapter sign` and `keygen`. Invariants: what is written is read back and probed before it replaces anything, so a
 * manifest that its own maker's machine would refuse is never left behind. Threads: the one that owns the backend.
 */
#include <errno.h>
#include <sodium.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "models/manifest_parts.h"
#include "models/predict.h"

enum { DEFAULT_PROMPTS = 3 };

/* From mostly noise to mostly picture: experts act at different times. Prompt i takes timestep i modulo the list. */
static const int timesteps[] = {901, 501, 201};
static const char *const own_prompts[DEFAULT_PROMPTS] = {"", "a red apple", "a person"};

static json_t *floats_json(const float *x, size_t n)
{
  size_t bytes = n * sizeof *x, cap = sodium_base64_encoded_len(bytes, sodium_base64_VARIANT_ORIGINAL);
  char *text = malloc(cap);
  json_t *v = NULL;

  if (text)
    v = json_string(sodium_bin2base64(text, cap, (const unsigned char *)x, bytes, sodium_base64_VARIANT_ORIGINAL));
  free(text);
  return v;
}

/* Appends one probe: both predictions. */
MUST_CHECK static int add_probe(json_t *list, struct predictor *p, const struct model *model, struct generation *g, int i,
                                const char *prompt, struct err *e)
{
  size_t n = predictor_count(p);
  float *y = malloc(2 * n * sizeof *y);
  struct manifest_probe_point point = {.seed = (uint64_t)i + 1, .timestep = (float)timesteps[i % 3], .prompt = (char *)prompt};
  json_t *v;
  int r;

  if (!y)
    return err_set(e, E_NOMEM, "out of memory for a canary");
  r = manifest_predict(p, &point, g, y, e);
  if (!r)
    r = manifest_predict(p, &point, model_base(model), y + n, e);
  if (!r) {
    v = json_pack("{s:i, s:i, s:s, s:o, s:o}", "seed", i + 1, "timestep", timesteps[i % 3], "prompt", prompt, "expected",
                  floats_json(y, n), "base", floats_json(y + n, n));
    if (json_array_append_new(list, v))
      r = err_set(e, E_NOMEM, "out of memory for a canary, or the prompt \"%.60s\" is not UTF-8", prompt);
  }
  free(y);
  return r;
}

MUST_CHECK static int make_canary(json_t **out, const struct model *model, struct be *be, struct generation *g,
                                  const struct manifest_options *o, struct err *e)
{
  int n = o->prompts ? o->prompts : DEFAULT_PROMPTS, r;
  struct predictor *p = NULL;
  json_t *list = json_array();

  *out = NULL;
  r = list ? predictor_new(&p, model, be, MANIFEST_CANARY_SIDE, MANIFEST_CANARY_SIDE, e) : err_set(e, E_NOMEM, "out of memory for a canary");
  for (int i = 0; !r && i < n; i++)
    r = add_probe(list, p, model, g, i, o->prompts ? o->prompt[i] : own_prompts[i], e);
  predictor_free(p);
  if (!r) {
    *out = json_pack("{s:i, s:i, s:i, s:{s:f, s:f}, s:o}", "channels", model_info(model)->latent_channels, "height", MANIFEST_CANARY_SIDE, "width",
                     MANIFEST_CANARY_SIDE, "tolerance", "f32", MANIFEST_TOLERANCE_F32, "bf16", MANIFEST_TOLERANCE_BF16, "probes", list);
    return *out ? 0 : err_set(e, E_NOMEM, "out of memory for a canary");
  }
  json_decref(list);
  return r;
}

/* Puts public_key and signature into root. */
MUST_CHECK static int sign(json_t *root, const char *secret_key, struct err *e)
{
  unsigned char key[crypto_sign_SECRETKEYBYTES], sig[crypto_sign_BYTES], again[crypto_sign_SECRETKEYBYTES];
  unsigned char public_key[crypto_sign_PUBLICKEYBYTES], seed[crypto_sign_SEEDBYTES];
  char hex[2 * sizeof sig + 1], *text = NULL;
  int r = 0;

  if (strlen(secret_key) != 2 * sizeof key || sodium_hex2bin(key, sizeof key, secret_key, 2 * sizeof key, NULL, NULL, NULL)) {
    r = err_field(e, E_ARG, "secret_key", "a secret key is %zu hexadecimal digits", 2 * sizeof key);
    goto out;
  }
  crypto_sign_ed25519_sk_to_seed(seed, key);
  crypto_sign_seed_keypair(public_key, again, seed);
  if (sodium_memcmp(again, key, sizeof key)) { /* the halves do not belong together: signatures would not verify */
    r = err_field(e, E_ARG, "secret_key", "this is not a secret key: its halves do not belong together");
    goto out;
  }
  sodium_bin2hex(hex, sizeof hex, public_key, sizeof public_key);
  if (json_object_set_new(root, "public_key", json_string(hex)) || !(text = manifest_canonical(root))) {
    r = err_set(e, E_NOMEM, "out of memory for a signature");
    goto out;
  }
  crypto_sign_detached(sig, NULL, (const unsigned char *)text, strlen(text), key);
  sodium_bin2hex(hex, sizeof hex, sig, sizeof sig);
  if (json_object_set_new(root, "signature", json_string(hex)))
    r = err_set(e, E_NOMEM, "out of memory for a signature");
out:
  sodium_memzero(key, sizeof key);
  sodium_memzero(again, sizeof again);
  sodium_memzero(seed, sizeof seed);
  free(text);
  return r;
}

/* The manifest's text, a line per member of the upper levels. */
MUST_CHECK static int make_text(char **text, const struct adapter *a, const struct model *model, struct be *be, struct generation *g,
                                const struct manifest_options *o, struct err *e)
{
  const struct model_info *info = model_info(model);
  json_t *canary = NULL, *root = NULL;
  char targets[65];
  int r = make_canary(&canary, model, be, g, o, e);

  *text = NULL;
  if (r)
    return r;
  manifest_targets(targets, a, model_base(model));
  root = json_pack("{s:s, s:s, s:s, s:{s:s, s:s}, s:{s:i, s:s}, s:I, s:I, s:s, s:o}", "format", MANIFEST_FORMAT, "name", a->name, "digest",
                   a->digest, "base", "name", info->name, "digest", info->digest, "targets", "count", a->n, "digest", targets,
                   "max_rank", (json_int_t)a->max_rank, "params", (json_int_t)a->params, "note", o->note ? o->note : "", "canary",
                   canary);
  if (!root)
    r = err_set(e, E_ARG, "out of memory for a manifest, or the note is not UTF-8");
  if (!r && o->secret_key)
    r = sign(root, o->secret_key, e);
  if (!r && !(*text = json_dumps(root, JSON_INDENT(1) | JSON_REAL_PRECISION(17))))
    r = err_set(e, E_NOMEM, "out of memory for a manifest");
  json_decref(root);
  return r;
}

/* Reads the text as a server would and probes with it. */
MUST_CHECK static int prove(const char *path, const char *text, const struct adapter *a, const struct model *model, struct be *be,
                            struct generation *g, struct manifest_report *report, struct err *e)
{
  struct manifest *m = NULL;
  int r = manifest_read_text(&m, path, text, strlen(text), e);

  if (!r)
    r = manifest_check(m, a, model, NULL, e);
  if (!r)
    r = manifest_probe(m, model, be, g, report, e);
  manifest_free(m);
  return r;
}

/* Beside the old file, then over it. */
MUST_CHECK static int replace_file(const char *path, const char *text, struct err *e)
{
  char *part = NULL;
  FILE *f = NULL;
  int ok, r = 0;

  if (asprintf(&part, "%s.part", path) < 0)
    return err_set(e, E_NOMEM, "out of memory for a manifest");
  f = fopen(part, "we");
  ok = f && fputs(text, f) >= 0 && fputc('\n', f) != EOF && !fflush(f) && !fsync(fileno(f));
  if (f && fclose(f))
    ok = 0;
  if (!ok || rename(part, path)) {
    r = err_field(e, E_FILE, path, "%s: cannot be written: %s", path, strerror(errno));
    unlink(part);
  }
  free(part);
  return r;
}

int manifest_write(const char *path, const struct adapter *a, const struct model *model, struct be *be, struct generation *g,
                   const struct manifest_options *o, struct manifest_report *report, struct err *e)
{
  char *text = NULL;
  int r;

  if (sodium_init() < 0)
    return err_set(e, E_INTERNAL, "libsodium does not start");
  if (!model_info(model)->digest[0])
    return err_set(e, E_ARG, "the model has no digest that a manifest could name");
  if (o->prompts < 0 || o->prompts > MANIFEST_PROBES_MAX)
    return err_field(e, E_ARG, "prompts", "a canary has 1 to %d prompts; got %d", MANIFEST_PROBES_MAX, o->prompts);
  if ((r = manifest_check_generation(g, a->digest, e)) || (r = make_text(&text, a, model, be, g, o, e)) ||
      (r = prove(path, text, a, model, be, g, report, e)))
    goto out;
  r = replace_file(path, text, e);
out:
  free(text);
  return r;
}

int manifest_keygen(char secret_key[129], char public_key[65], struct err *e)
{
  unsigned char pk[crypto_sign_PUBLICKEYBYTES], sk[crypto_sign_SECRETKEYBYTES];

  if (sodium_init() < 0)
    return err_set(e, E_INTERNAL, "libsodium does not start");
  crypto_sign_keypair(pk, sk);
  sodium_bin2hex(public_key, 65, pk, sizeof pk);
  sodium_bin2hex(secret_key, 129, sk, sizeof sk);
  sodium_memzero(sk, sizeof sk);
  return 0;
}
