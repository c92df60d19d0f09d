/*
 * adapter_read.c - sorts the tensors of an adapter file into groups, one per site, by alias and suffix.
 *
 * A suffix says what a tensor is to its site; what stands before it must be an alias. Every key must resolve, a site must be named in one
 * way only, and each group must hold exactly the tensors of one family.
 *
 * Called by adapter.c and adapter_inspect.c. Threads: pure functions. Sources of the suffixes: diffusers (loaders), PEFT
 * (save_and_load.py), kohya's sd-scripts, LyCORIS (modules), ComfyUI (weight_adapter).
 */
#include "models/adapter_impl.h"

#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

/* Which styles a suffix goes with. */
enum {
  DOTTED = 1 << NAME_DIFFUSERS | 1 << NAME_BARE | 1 << NAME_PEFT | 1 << NAME_LDM,
  JOINED = 1 << NAME_KOHYA | 1 << NAME_SGM | 1 << NAME_LYCORIS,
  PROCESSOR = 1 << NAME_PROCESSOR,
  ANY = DOTTED | JOINED
};

static const struct suffix {
  const char *text;
  enum adapter_role role;
  int styles;
} suffixes[] = {
    {".lora.down.weight", ROLE_DOWN, DOTTED},
    {".lora.up.weight", ROLE_UP, DOTTED},
    {".lora_linear_layer.down.weight", ROLE_DOWN, DOTTED},
    {".lora_linear_layer.up.weight", ROLE_UP, DOTTED},
    {"_lora.down.weight", ROLE_DOWN, PROCESSOR},
    {"_lora.up.weight", ROLE_UP, PROCESSOR},
    {".lora_A.weight", ROLE_DOWN, ANY},
    {".lora_B.weight", ROLE_UP, ANY},
    {".lora_A.default.weight", ROLE_DOWN, ANY},
    {".lora_B.default.weight", ROLE_UP, ANY},
    {".lora_A", ROLE_DOWN, DOTTED},
    {".lora_B", ROLE_UP, DOTTED},
    {".lora_B.bias", ROLE_UP_BIAS, DOTTED},
    {".lora_B.default.bias", ROLE_UP_BIAS, DOTTED},
    {".lora_down.weight", ROLE_DOWN, ANY},
    {".lora_up.weight", ROLE_UP, ANY},
    {".lora_mid.weight", ROLE_MID, ANY},
    {".hada_w1_a", ROLE_HADA_1A, ANY},
    {".hada_w1_b", ROLE_HADA_1B, ANY},
    {".hada_w2_a", ROLE_HADA_2A, ANY},
    {".hada_w2_b", ROLE_HADA_2B, ANY},
    {".hada_t1", ROLE_HADA_T1, ANY},
    {".hada_t2", ROLE_HADA_T2, ANY},
    {".lokr_w1", ROLE_KRON_1, ANY},
    {".lokr_w1_a", ROLE_KRON_1A, ANY},
    {".lokr_w1_b", ROLE_KRON_1B, ANY},
    {".lokr_w2", ROLE_KRON_2, ANY},
    {".lokr_w2_a", ROLE_KRON_2A, ANY},
    {".lokr_w2_b", ROLE_KRON_2B, ANY},
    {".lokr_t2", ROLE_KRON_T2, ANY},
    {".diff", ROLE_DIFF, ANY},
    {".diff_b", ROLE_DIFF_B, ANY},
    {".w_norm", ROLE_DIFF, ANY},
    {".b_norm", ROLE_DIFF_B, ANY},
    {".alpha", ROLE_ALPHA, ANY},
    {"_lora.alpha", ROLE_ALPHA, PROCESSOR},
    {".scale", ROLE_SCALE, ANY},
    {".dora_scale", ROLE_DORA_SCALE, ANY},
    {".lora_magnitude_vector", ROLE_MAGNITUDE, DOTTED},
    {".lora_magnitude_vector.weight", ROLE_MAGNITUDE, DOTTED},
    {".lora_magnitude_vector.default", ROLE_MAGNITUDE, DOTTED},
    {".lora_magnitude_vector.default.weight", ROLE_MAGNITUDE, DOTTED},
    {".weight", ROLE_WEIGHT, DOTTED},
    {".bias", ROLE_BIAS, DOTTED},
};

/* The roles of each family: those it cannot be without, those it may have. LoKr's alternatives are checked by hand. */
#define BIT(role) (1u << (role))
#define LORA_MUST (BIT(ROLE_DOWN) | BIT(ROLE_UP))
#define LOHA_MUST (BIT(ROLE_HADA_1A) | BIT(ROLE_HADA_1B) | BIT(ROLE_HADA_2A) | BIT(ROLE_HADA_2B))
#define LOKR_ALL (BIT(ROLE_KRON_1) | BIT(ROLE_KRON_1A) | BIT(ROLE_KRON_1B) | BIT(ROLE_KRON_2) | BIT(ROLE_KRON_2A) | BIT(ROLE_KRON_2B))
#define SCALES (BIT(ROLE_ALPHA) | BIT(ROLE_SCALE))

static const struct family {
  const char *name;
  unsigned signs;           /* any of these makes a group belong here */
  unsigned must, may;
} families[] = {
    [FAMILY_LORA] = {"lora", LORA_MUST | BIT(ROLE_MID), LORA_MUST,
                     BIT(ROLE_MID) | BIT(ROLE_UP_BIAS) | BIT(ROLE_DIFF_B) | SCALES | BIT(ROLE_DORA_SCALE) | BIT(ROLE_MAGNITUDE)},
    [FAMILY_LOHA] = {"loha", LOHA_MUST | BIT(ROLE_HADA_T1) | BIT(ROLE_HADA_T2), LOHA_MUST,
                     BIT(ROLE_HADA_T1) | BIT(ROLE_HADA_T2) | BIT(ROLE_DIFF_B) | SCALES | BIT(ROLE_DORA_SCALE)},
    [FAMILY_LOKR] = {"lokr", LOKR_ALL | BIT(ROLE_KRON_T2), 0,
                     LOKR_ALL | BIT(ROLE_KRON_T2) | BIT(ROLE_DIFF_B) | SCALES | BIT(ROLE_DORA_SCALE)},
    [FAMILY_FULL] = {"full", BIT(ROLE_DIFF) | BIT(ROLE_DIFF_B), 0, BIT(ROLE_DIFF) | BIT(ROLE_DIFF_B) | BIT(ROLE_SCALE)},
    [FAMILY_OVERLAY] = {"overlay", BIT(ROLE_WEIGHT) | BIT(ROLE_BIAS), BIT(ROLE_WEIGHT), BIT(ROLE_BIAS)},
};

const char *adapter_family_name(enum adapter_family f)
{
  return families[f].name;
}

int adapter_fail(const struct st_tensor *t, struct err *e, const char *fmt, ...)
{
  char what[300];
  va_list ap;

  va_start(ap, fmt);
  vsnprintf(what, sizeof what, fmt, ap);
  va_end(ap);
  return err_field(e, E_FILE, t->name, "tensor \"%.140s\" %s", t->name, what);
}

struct adapter_key adapter_key_resolve(const struct adapter_names *names, const char *key)
{
  struct adapter_key k = {.site = SITE_NONE};
  size_t n = strlen(key), i;

  for (i = 0; i < sizeof suffixes / sizeof *suffixes; i++) {
    size_t len = strlen(suffixes[i].text);
    enum name_style style;
    int site;

    if (len >= n || strcmp(key + n - len, suffixes[i].text))
      continue;
    site = adapter_names_lookup(names, key, n - len, &style);
    if (site != SITE_NONE && suffixes[i].styles >> style & 1)
      return (struct adapter_key){site, suffixes[i].role, style, n - len};
  }
  return k;
}

const char *adapter_key_hint(const struct adapter_names *names, const char *key)
{
  size_t n = strlen(key), cut = 0, i;
  char alias[256];

  for (i = 0; i < sizeof suffixes / sizeof *suffixes; i++) {
    size_t len = strlen(suffixes[i].text);

    if (len < n && len > cut && !strcmp(key + n - len, suffixes[i].text))
      cut = len;
  }
  snprintf(alias, sizeof alias, "%.*s", (int)(n - cut), key);
  return adapter_names_nearest(names, alias);
}

static int unknown_key(const struct st_tensor *t, const struct adapter_names *names, struct err *e)
{
  return err_field(e, E_FILE, t->name, "tensor \"%.120s\" names no layer of this model in any naming that is known (nearest: \"%.120s\"); "
                   "is the adapter for another base model?", t->name, adapter_key_hint(names, t->name));
}

/* Puts t into its group of the table by site; groups are claimed as they are first named. */
static int put(struct adapter_group *g, const struct adapter_key *k, const struct st_tensor *t, const struct generation *base,
               struct err *e)
{
  int r;

  if (!g->alias) {
    *g = (struct adapter_group){.site = k->site, .alias = t->name, .alias_len = k->alias_len};
  } else if (g->alias_len != k->alias_len || strncmp(g->alias, t->name, k->alias_len)) {
    return adapter_fail(t, e, "names %.80s, which \"%.*s\" names already", base->site[k->site].name,
                        g->alias_len < 100 ? (int)g->alias_len : 100, g->alias);
  }
  r = (int)k->role;
  if (g->part[r])
    return adapter_fail(t, e, "and \"%.120s\" are the same factor of one layer", g->part[r]->name);
  g->part[r] = t;
  return 0;
}

static const struct st_tensor *first_part(const struct adapter_group *g, unsigned of)
{
  int r;

  for (r = 0; r < ROLES; r++)
    if (g->part[r] && of & BIT(r))
      return g->part[r];
  return NULL;
}

static unsigned parts_of(const struct adapter_group *g)
{
  unsigned have = 0;
  int r;

  for (r = 0; r < ROLES; r++)
    have |= g->part[r] ? BIT(r) : 0;
  return have;
}

/* LoKr: each of the two factors whole or as a pair; a core goes with the second pair. */
static int lokr_is_whole(unsigned have)
{
  unsigned one = BIT(ROLE_KRON_1A) | BIT(ROLE_KRON_1B), two = BIT(ROLE_KRON_2A) | BIT(ROLE_KRON_2B);
  int first = have & BIT(ROLE_KRON_1) ? !(have & one) : (have & one) == one;
  int second = have & BIT(ROLE_KRON_2) ? !(have & (two | BIT(ROLE_KRON_T2))) : (have & two) == two;

  return first && second;
}

/* Decides the family of a group and whether it is complete. */
static int check_group(struct adapter_group *g, struct err *e)
{
  unsigned have = parts_of(g);
  const unsigned tucker = BIT(ROLE_HADA_T1) | BIT(ROLE_HADA_T2);
  const struct st_tensor *odd;
  int f;

  for (f = 0; f < FAMILIES; f++)
    if (have & families[f].signs)
      break;
  if (f == FAMILIES)
    return adapter_fail(first_part(g, ~0u), e, "stands alone: there are no factors beside it");
  g->family = (enum adapter_family)f;
  odd = first_part(g, have & ~(families[f].must | families[f].may));
  if (odd)
    return adapter_fail(odd, e, "does not go with the %s factors of the same layer", families[f].name);
  if ((have & families[f].must) != families[f].must)
    return adapter_fail(first_part(g, have), e, "lacks its partner: the %s of this layer is not complete", families[f].name);
  if (f == FAMILY_LOKR && !lokr_is_whole(have))
    return adapter_fail(first_part(g, have & families[f].signs), e,
                        "lacks its partner: lokr needs w1 or w1_a and w1_b, w2 or w2_a and w2_b");
  if (f == FAMILY_LOHA && have & tucker && (have & tucker) != tucker)
    return adapter_fail(first_part(g, have & tucker), e, "lacks its partner: hada_t1 and hada_t2 come together");
  if (have & BIT(ROLE_DORA_SCALE) && have & BIT(ROLE_MAGNITUDE))
    return adapter_fail(g->part[ROLE_DORA_SCALE], e, "is a second magnitude beside lora_magnitude_vector");
  if (have & BIT(ROLE_UP_BIAS) && have & BIT(ROLE_DIFF_B))
    return adapter_fail(g->part[ROLE_DIFF_B], e, "is a second bias beside lora_B.bias");
  return 0;
}

/* Moves the groups that were claimed to the front, checked. */
static int close_groups(struct adapter_groups *g, int sites, struct err *e)
{
  int i, code;

  for (i = 0; i < sites; i++) {
    if (!g->group[i].alias)
      continue;
    code = check_group(&g->group[i], e);
    if (code)
      return code;
    g->families[g->group[i].family]++;
    g->group[g->n] = g->group[i];
    g->n++;
  }
  return 0;
}

int adapter_groups_read(struct adapter_groups *g, const struct safetensors *st, const struct adapter_names *names, struct err *e)
{
  const struct generation *base = adapter_names_base(names);
  size_t i;
  int code = 0;

  *g = (struct adapter_groups){0};
  if (!st_count(st))
    return err_field(e, E_FILE, st_path(st), "%.160s: holds no tensors: an adapter without targets changes nothing", st_path(st));
  g->group = calloc((size_t)base->n + 1, sizeof *g->group); /* by site at first */
  if (!g->group)
    return err_set(e, E_NOMEM, "no memory for the groups of an adapter");
  for (i = 0; i < st_count(st) && !code; i++) {
    const struct st_tensor *t = st_at(st, i);
    struct adapter_key k = adapter_key_resolve(names, t->name);

    if (k.site == SITE_NONE) {
      code = unknown_key(t, names, e);
    } else {
      code = put(&g->group[k.site], &k, t, base, e);
      g->styles[k.style]++;
      g->peft_suffix += strstr(t->name + k.alias_len, "lora_A") || strstr(t->name + k.alias_len, "lora_B");
    }
  }
  if (!code)
    code = close_groups(g, base->n, e);
  if (code)
    adapter_groups_free(g);
  return code;
}

void adapter_groups_free(struct adapter_groups *g)
{
  free(g->group);
  *g = (struct adapter_groups){0};
}
