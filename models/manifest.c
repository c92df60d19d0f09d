/*
 * manifest.c - reads a manifest and holds an adapter against it; see manifest.h. manifest_probe.c runs the canary, manifest_write.c makes
 * one.
 *
 * Called by server/safety.c and the command line. Invariants: a manifest that was read has every member, within bounds, and none that is
 * not known; a signature that is there has been checked against the key that the manifest names. Whether that key is to be trusted is
 * manifest_check's business. Threads: no state.
 */
#include "models/manifest.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <sodium.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/json_load.h"
#include "models/manifest_parts.h"
#include "models/safetensors.h"

/* ---- members ---- */

/* Where in the manifest something is read, for messages: "canary.probes[1]." */
struct place {
  const char *label;
  const json_t *object;
  char path[64];
  struct err *e;
};

MUST_CHECK static int wrong(const struct place *at, const char *name, const char *what)
{
  char field[160];

  snprintf(field, sizeof field, "%s%s", at->path, name);
  if (!field[0]) /* the manifest itself, or a member without a name */
    return err_field(at->e, E_FILE, at->label, "%s: \"\" %s", at->label, what);
  return err_field(at->e, E_FILE, field, "%s: \"%s\" %s", at->label, field, what);
}

/* The members of the object must all be among words ("a|b|c"). */
MUST_CHECK static int check_members(const struct place *at, const char *words)
{
  const char *key;
  const json_t *value;
  char shown[64];

  if (!json_is_object(at->object))
    return wrong(at, "", "must be an object");
  json_object_foreach((json_t *)at->object, key, value) {
    size_t n = strlen(key);
    int known = 0;

    for (const char *w = words; *w && !known; w += strcspn(w, "|"), w += *w == '|')
      known = n == strcspn(w, "|") && !memcmp(w, key, n);
    if (!known) {
      st_printable(shown, sizeof shown, key);
      return wrong(at, shown, "is not a member of a manifest");
    }
  }
  return 0;
}

MUST_CHECK static int get_object(const struct place *at, const char *name, struct place *out, const char *words)
{
  *out = (struct place){.label = at->label, .object = json_object_get(at->object, name), .e = at->e};
  snprintf(out->path, sizeof out->path, "%.40s%.20s.", at->path, name);
  return out->object ? check_members(out, words) : wrong(at, name, "is missing");
}

/* A string of at most cap - 1 bytes of printable text. */
MUST_CHECK static int get_text(const struct place *at, const char *name, size_t cap, const char **out)
{
  const json_t *v = json_object_get(at->object, name);

  *out = json_string_value(v);
  if (!*out)
    return wrong(at, name, v ? "must be a string" : "is missing");
  if (json_string_length(v) >= cap || strlen(*out) != json_string_length(v))
    return wrong(at, name, "is too long");
  return 0;
}

MUST_CHECK static int get_short(const struct place *at, const char *name, char *out, size_t cap)
{
  const char *s;
  int r = get_text(at, name, cap, &s);

  if (r)
    return r;
  for (const char *p = s; *p; p++)
    if ((unsigned char)*p < 32 || *p == 127)
      return wrong(at, name, "holds a control character");
  snprintf(out, cap, "%s", s);
  return 0;
}

/* cap - 1 hexadecimal digits, lower case. */
MUST_CHECK static int get_hex(const struct place *at, const char *name, char *out, size_t cap)
{
  const char *s;
  char what[64];
  int r = get_text(at, name, cap, &s);

  if (!r && (strlen(s) != cap - 1 || strspn(s, "0123456789abcdef") != cap - 1)) {
    snprintf(what, sizeof what, "must be %zu hexadecimal digits in lower case", cap - 1);
    return wrong(at, name, what);
  }
  if (!r)
    memcpy(out, s, cap);
  return r;
}

MUST_CHECK static int get_int(const struct place *at, const char *name, int64_t lo, int64_t hi, int64_t *out)
{
  const json_t *v = json_object_get(at->object, name);
  char what[96];

  if (!json_is_integer(v))
    return wrong(at, name, v ? "must be a whole number" : "is missing");
  *out = json_integer_value(v);
  if (*out < lo || *out > hi) {
    snprintf(what, sizeof what, "must be from %lld to %lld", (long long)lo, (long long)hi);
    return wrong(at, name, what);
  }
  return 0;
}

/* A number above 0 and at most hi. */
MUST_CHECK static int get_real(const struct place *at, const char *name, double hi, double *out)
{
  const json_t *v = json_object_get(at->object, name);
  char what[64];

  if (!json_is_number(v))
    return wrong(at, name, v ? "must be a number" : "is missing");
  *out = json_number_value(v);
  if (!(*out > 0 && *out <= hi)) {
    snprintf(what, sizeof what, "must be above 0 and at most %g", hi);
    return wrong(at, name, what);
  }
  return 0;
}

/* count floats, little endian, base64. */
MUST_CHECK static int get_floats(const struct place *at, const char *name, size_t count, float **out)
{
  size_t bytes = count * sizeof **out, got = 0, room = bytes / 3 * 4 + 8;
  const char *s;
  int r = get_text(at, name, room, &s);

  if (r)
    return r;
  *out = malloc(bytes);
  if (!*out)
    return err_set(at->e, E_NOMEM, "%s: out of memory", at->label);
  if (sodium_base642bin((unsigned char *)*out, bytes, s, strlen(s), NULL, &got, NULL, sodium_base64_VARIANT_ORIGINAL) || got != bytes)
    return wrong(at, name, "does not hold the numbers of one latent in base64");
  for (size_t i = 0; i < count; i++)
    if (!isfinite((*out)[i]))
      return wrong(at, name, "holds a value that is not finite");
  return 0;
}

/* ---- reading ---- */

MUST_CHECK static int read_probe(struct manifest *m, const struct place *at, struct manifest_probe_point *p)
{
  size_t count = (size_t)m->channels * (size_t)m->height * (size_t)m->width;
  const char *prompt;
  int64_t seed, timestep;
  int r;

  if ((r = check_members(at, "seed|timestep|prompt|expected|base")) || (r = get_int(at, "seed", 0, UINT32_MAX, &seed)) ||
      (r = get_int(at, "timestep", 0, MANIFEST_TRAIN_STEPS - 1, &timestep)) ||
      (r = get_text(at, "prompt", MANIFEST_PROMPT_MAX, &prompt)) || (r = get_floats(at, "expected", count, &p->expected)) ||
      (r = get_floats(at, "base", count, &p->base)))
    return r;
  p->seed = (uint64_t)seed;
  p->timestep = (float)timestep;
  p->prompt = strdup(prompt);
  return p->prompt ? 0 : err_set(at->e, E_NOMEM, "%s: out of memory", at->label);
}

MUST_CHECK static int read_canary(struct manifest *m, const struct place *root)
{
  struct place at, tolerance;
  int64_t c, h, w;
  const json_t *list;
  int r;

  if ((r = get_object(root, "canary", &at, "channels|height|width|tolerance|probes")) ||
      (r = get_int(&at, "channels", 1, MANIFEST_CHANNELS_MAX, &c)) || (r = get_int(&at, "height", 1, MANIFEST_SIDE_MAX, &h)) ||
      (r = get_int(&at, "width", 1, MANIFEST_SIDE_MAX, &w)) || (r = get_object(&at, "tolerance", &tolerance, "f32|bf16")) ||
      (r = get_real(&tolerance, "f32", MANIFEST_TOLERANCE_F32, &m->tolerance_f32)) ||
      (r = get_real(&tolerance, "bf16", MANIFEST_TOLERANCE_BF16, &m->tolerance_bf16)))
    return r;
  m->channels = (int)c;
  m->height = (int)h;
  m->width = (int)w;
  list = json_object_get(at.object, "probes");
  if (!json_is_array(list) || !json_array_size(list) || json_array_size(list) > MANIFEST_PROBES_MAX)
    return wrong(&at, "probes", "must be a list of 1 to 8 probes");
  for (size_t i = 0; !r && i < json_array_size(list); i++) {
    struct place one = {.label = at.label, .object = json_array_get(list, i), .e = at.e};

    snprintf(one.path, sizeof one.path, "canary.probes[%zu].", i);
    m->probes++;
    r = read_probe(m, &one, &m->probe[i]);
  }
  return r;
}

/* Whether the signature is the named key's over the text. */
static int signature_is_right(const struct manifest *m)
{
  unsigned char key[crypto_sign_PUBLICKEYBYTES], sig[crypto_sign_BYTES];

  return !sodium_hex2bin(key, sizeof key, m->public_key, 2 * sizeof key, NULL, NULL, NULL) &&
         !sodium_hex2bin(sig, sizeof sig, m->signature, 2 * sizeof sig, NULL, NULL, NULL) &&
         !crypto_sign_verify_detached(sig, (const unsigned char *)m->canonical, strlen(m->canonical), key);
}

MUST_CHECK static int read_signature(struct manifest *m, const struct place *root)
{
  int r;

  if (!json_object_get(root->object, "signature") && !json_object_get(root->object, "public_key"))
    return 0;
  if ((r = get_hex(root, "public_key", m->public_key, sizeof m->public_key)) ||
      (r = get_hex(root, "signature", m->signature, sizeof m->signature)))
    return r;
  if (!signature_is_right(m))
    return wrong(root, "signature", "does not fit the manifest: it was changed, or the signature is another's");
  return 0;
}

char *manifest_canonical(const json_t *root)
{
  json_t *copy = json_copy((json_t *)root); /* shallow: the members themselves are not touched */
  char *text = NULL;

  if (copy) {
    json_object_del(copy, "signature");
    text = json_dumps(copy, JSON_COMPACT | JSON_SORT_KEYS | JSON_REAL_PRECISION(17));
  }
  json_decref(copy);
  return text;
}

MUST_CHECK static int read_root(struct manifest *m, const struct place *root)
{
  struct place base, targets;
  const char *format, *note = "";
  int r;

  if ((r = check_members(root, "format|name|digest|base|targets|max_rank|params|note|canary|public_key|signature")) ||
      (r = get_text(root, "format", 64, &format)))
    return r;
  if (strcmp(format, MANIFEST_FORMAT))
    return wrong(root, "format", "must be \"" MANIFEST_FORMAT "\"");
  if ((r = get_short(root, "name", m->name, sizeof m->name)) || (r = get_hex(root, "digest", m->digest, sizeof m->digest)) ||
      (r = get_object(root, "base", &base, "name|digest")) || (r = get_short(&base, "name", m->base_name, sizeof m->base_name)) ||
      (r = get_hex(&base, "digest", m->base_digest, sizeof m->base_digest)) ||
      (r = get_object(root, "targets", &targets, "count|digest")) || (r = get_int(&targets, "count", 1, 1 << 20, &m->targets)) ||
      (r = get_hex(&targets, "digest", m->targets_digest, sizeof m->targets_digest)) ||
      (r = get_int(root, "max_rank", 0, 1 << 20, &m->max_rank)) || (r = get_int(root, "params", 1, INT64_MAX, &m->params)))
    return r;
  if (json_object_get(root->object, "note") && (r = get_text(root, "note", MANIFEST_NOTE_MAX, &note)))
    return r;
  m->note = strdup(note);
  m->canonical = manifest_canonical(root->object);
  if (!m->note || !m->canonical)
    return err_set(root->e, E_NOMEM, "%s: out of memory", root->label);
  if ((r = read_canary(m, root)))
    return r;
  return read_signature(m, root);
}

int manifest_read_text(struct manifest **out, const char *label, const char *text, size_t n, struct err *e)
{
  struct manifest *m = NULL;
  struct place root = {.e = e};
  json_error_t je = {0};
  json_t *json = NULL;
  char shown[100];
  int r = 0;

  *out = NULL;
  if (sodium_init() < 0)
    return err_set(e, E_INTERNAL, "libsodium does not start");
  m = calloc(1, sizeof *m);
  if (!m)
    return err_set(e, E_NOMEM, "out of memory for a manifest");
  st_printable(m->label, sizeof m->label, label);
  if (n <= MANIFEST_BYTES_MAX)
    json = json_load_whole(text, n, JSON_REJECT_DUPLICATES, &je);
  st_printable(shown, sizeof shown, n > MANIFEST_BYTES_MAX ? "it is too large" : je.text);
  root.label = m->label;
  root.object = json;
  if (!json && json_error_code(&je) == json_error_out_of_memory)
    r = err_set(e, E_NOMEM, "%s: no memory to read it", m->label);
  else if (!json)
    r = err_field(e, E_FILE, m->label, "%s: not valid JSON: %s", m->label, shown);
  else
    r = read_root(m, &root);
  json_decref(json);
  if (!r) {
    *out = m;
    m = NULL;
  }
  manifest_free(m);
  return r;
}

int manifest_read(struct manifest **out, const char *path, struct err *e)
{
  int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK), r = 0; /* a pipe in place of the file must not hold us up */
  char *text = NULL, shown[160];
  struct stat st;
  ssize_t got;
  size_t n = 0;

  *out = NULL;
  st_printable(shown, sizeof shown, path);
  if (fd < 0 || fstat(fd, &st)) {
    r = err_field(e, E_FILE, shown, "%s: cannot be read: %s", shown, strerror(errno));
    goto out;
  }
  if (!S_ISREG(st.st_mode) || st.st_size > MANIFEST_BYTES_MAX) {
    r = err_field(e, E_FILE, shown, "%s: is not a file of at most %d bytes", shown, MANIFEST_BYTES_MAX);
    goto out;
  }
  text = malloc((size_t)st.st_size + 1);
  if (!text) {
    r = err_set(e, E_NOMEM, "%s: out of memory", shown);
    goto out;
  }
  while (n < (size_t)st.st_size && (got = read(fd, text + n, (size_t)st.st_size - n)) > 0)
    n += (size_t)got;
  if (n < (size_t)st.st_size)
    r = err_field(e, E_FILE, shown, "%s: ended after %zu of %lld bytes", shown, n, (long long)st.st_size);
  else
    r = manifest_read_text(out, path, text, n, e);
out:
  free(text);
  if (fd >= 0)
    close(fd);
  return r;
}

void manifest_free(struct manifest *m)
{
  if (!m)
    return;
  for (int i = 0; i < m->probes; i++) {
    free(m->probe[i].prompt);
    free(m->probe[i].expected);
    free(m->probe[i].base);
  }
  free(m->note);
  free(m->canonical);
  free(m);
}

const char *manifest_digest(const struct manifest *m)
{
  return m->digest;
}

const char *manifest_note(const struct manifest *m)
{
  return m->note;
}

int manifest_is_signed(const struct manifest *m)
{
  return m->signature[0] != 0;
}

int manifest_path(char *out, size_t cap, const char *adapter_path, struct err *e)
{
  static const char ending[] = ".safetensors";
  size_t n = strlen(adapter_path), k = sizeof ending - 1;
  int len;

  while (n > 1 && adapter_path[n - 1] == '/')
    n--;
  if (n > k && !memcmp(adapter_path + n - k, ending, k))
    n -= k;
  len = snprintf(out, cap, "%.*s.manifest.json", (int)n, adapter_path);
  if (len < 0 || (size_t)len >= cap)
    return err_set(e, E_ARG, "the path of the adapter is too long");
  return 0;
}

/* ---- checking ---- */

void manifest_targets(char out[65], const struct adapter *a, const struct generation *base)
{
  crypto_generichash_state h;
  unsigned char sum[32];
  char rank[32];

  crypto_generichash_init(&h, NULL, 0, sizeof sum);
  for (int i = 0; i < a->n; i++) {
    const char *name = base->site[a->delta[i].site].name;
    int n = snprintf(rank, sizeof rank, " %lld\n", (long long)a->delta[i].rank);

    crypto_generichash_update(&h, (const unsigned char *)name, strlen(name));
    crypto_generichash_update(&h, (const unsigned char *)rank, (size_t)n);
  }
  crypto_generichash_final(&h, sum, sizeof sum);
  sodium_bin2hex(out, 65, sum, sizeof sum);
}

/* Constant time is not needed for any of these: they are not secrets. */
MUST_CHECK static int differs(const struct manifest *m, const char *field, const char *has, const char *says, struct err *e)
{
  return err_field(e, E_FILE, field, "%s: \"%s\" is %s, but %s", m->label, field, says, has);
}

MUST_CHECK static int check_key(const struct manifest *m, const char *public_key, struct err *e)
{
  if (!public_key || !*public_key)
    return 0;
  if (!manifest_is_signed(m))
    return err_field(e, E_FILE, "signature", "%s: \"signature\" is missing, and the manifest must be signed", m->label);
  if (strcmp(m->public_key, public_key))
    return err_field(e, E_FILE, "public_key", "%s: \"public_key\" is %.16s..., which is not the key that is trusted", m->label,
                     m->public_key);
  return 0;
}

int manifest_check(const struct manifest *m, const struct adapter *a, const struct model *model, const char *public_key, struct err *e)
{
  const char *base = model_info(model)->digest;
  char targets[65], has[128], says[32];
  int r = check_key(m, public_key, e);

  if (r)
    return r;
  if (strcmp(m->digest, a->digest)) {
    snprintf(has, sizeof has, "the adapter's bytes have %.16s...", a->digest);
    return differs(m, "digest", has, m->digest, e);
  }
  if (strcmp(m->base_digest, base)) {
    snprintf(has, sizeof has, "the model is %.40s %.16s...", model_info(model)->name, *base ? base : "without a digest");
    return differs(m, "base.digest", has, m->base_digest, e);
  }
  if (m->targets != a->n) {
    snprintf(has, sizeof has, "the adapter has %d sites", a->n);
    snprintf(says, sizeof says, "%lld", (long long)m->targets);
    return differs(m, "targets.count", has, says, e);
  }
  manifest_targets(targets, a, model_base(model));
  if (strcmp(m->targets_digest, targets)) {
    snprintf(has, sizeof has, "the adapter's sites and ranks have %.16s...", targets);
    return differs(m, "targets.digest", has, m->targets_digest, e);
  }
  if (m->max_rank != a->max_rank) {
    snprintf(has, sizeof has, "the adapter's is %lld", (long long)a->max_rank);
    snprintf(says, sizeof says, "%lld", (long long)m->max_rank);
    return differs(m, "max_rank", has, says, e);
  }
  if (m->params != a->params) {
    snprintf(has, sizeof has, "the adapter's is %lld", (long long)a->params);
    snprintf(says, sizeof says, "%lld", (long long)m->params);
    return differs(m, "params", has, says, e);
  }
  return 0;
}
