/*
 * adapter_impl.h - what the files of the adapter reader share; nobody else includes it.
 *
 * The way of a file: adapter.c takes its bytes into memory; adapter_read.c sorts its tensors into groups, one per site, by alias and
 * suffix; adapter_scale.c finds the scale of each group; adapter_forms.c turns a group into a delta; adapter_inspect.c describes
 * all that, also for a file that is refused.
 *
 * Invariants: a group has one family of factors, and each of its tensors came under one and the same alias. Threads: none.
 */
#ifndef SAFELIGHT_MODELS_ADAPTER_IMPL_H
#define SAFELIGHT_MODELS_ADAPTER_IMPL_H

#include "models/adapter.h"
#include "models/safetensors.h"

/* ---- names (adapter_names.c) ---- */

/* Whose habit an alias is. */
enum name_style { NAME_DIFFUSERS, NAME_BARE, NAME_PROCESSOR, NAME_PEFT, NAME_KOHYA, NAME_SGM, NAME_LYCORIS, NAME_LDM, NAME_STYLES };

const struct generation *adapter_names_base(const struct adapter_names *n);
/* The site of the first len bytes of alias, or SITE_NONE; *style is set when found. */
int adapter_names_lookup(const struct adapter_names *n, const char *alias, size_t len, enum name_style *style);
/* The alias that looks most like text, for a hint; "" when there are none. The names'. */
const char *adapter_names_nearest(const struct adapter_names *n, const char *text);

/* ---- tensors of a file, by what they are to their site (adapter_read.c) ---- */

enum adapter_role {
  ROLE_DOWN, ROLE_UP, ROLE_MID, ROLE_UP_BIAS,                                /* LoRA, LoCon */
  ROLE_HADA_1A, ROLE_HADA_1B, ROLE_HADA_2A, ROLE_HADA_2B, ROLE_HADA_T1, ROLE_HADA_T2,
  ROLE_KRON_1, ROLE_KRON_1A, ROLE_KRON_1B, ROLE_KRON_2, ROLE_KRON_2A, ROLE_KRON_2B, ROLE_KRON_T2,
  ROLE_DIFF, ROLE_DIFF_B,                                                    /* full differences; DIFF_B also beside factors */
  ROLE_WEIGHT, ROLE_BIAS,                                                    /* overlays */
  ROLE_ALPHA, ROLE_SCALE, ROLE_DORA_SCALE, ROLE_MAGNITUDE,
  ROLES
};

enum adapter_family { FAMILY_LORA, FAMILY_LOHA, FAMILY_LOKR, FAMILY_FULL, FAMILY_OVERLAY, FAMILIES };
const char *adapter_family_name(enum adapter_family f);

struct adapter_group {
  int site;
  enum adapter_family family;
  const struct st_tensor *part[ROLES];
  const char *alias;        /* inside the name of one of its tensors */
  size_t alias_len;
};

struct adapter_groups {
  struct adapter_group *group; /* n entries, ordered by site */
  int n;
  int styles[NAME_STYLES];  /* tensors named in each style */
  int families[FAMILIES];   /* groups of each family */
  int peft_suffix;          /* tensors named lora_A, lora_B */
};

/* How one key resolves. */
struct adapter_key {
  int site;                 /* SITE_NONE: unknown */
  enum adapter_role role;
  enum name_style style;
  size_t alias_len;
};
struct adapter_key adapter_key_resolve(const struct adapter_names *names, const char *key);
/* The alias that looks most like a key that names no layer; "" when there are none. The names'. */
const char *adapter_key_hint(const struct adapter_names *names, const char *key);

/* Sorts all tensors of the file and checks that every group is complete. E_FILE names the tensor. After failure *g is empty; after
 * success adapter_groups_free is due; its tensors point into st. */
MUST_CHECK int adapter_groups_read(struct adapter_groups *g, const struct safetensors *st, const struct adapter_names *names,
                                   struct err *e);
void adapter_groups_free(struct adapter_groups *g);

/* E_FILE: tensor NAME and what is wrong with it. */
int adapter_fail(const struct st_tensor *t, struct err *e, const char *fmt, ...) __attribute__((format(printf, 3, 4)));

/* ---- scale (adapter_scale.c) ---- */

struct adapter_scale; /* adapter_config.json and the metadata of the file */

/* config: adapter_config.json's text, or NULL. E_FILE names the key. On failure *s is NULL. */
MUST_CHECK int adapter_scale_read(struct adapter_scale **s, const struct safetensors *st, const char *config, struct err *e);
void adapter_scale_free(struct adapter_scale *s); /* takes NULL */
/* Fills scale and rule for a group of rank r on the site; r 0: nothing to divide by, only an explicit scale counts. */
MUST_CHECK int adapter_scale_find(const struct adapter_scale *s, const struct adapter_group *g, const struct site *site, int64_t r,
                                  float *scale, enum scale_rule *rule, struct err *e);
const char *adapter_scale_rule_name(enum scale_rule r);
/* 1 when the pattern matches name as PEFT's get_pattern_key means it, 0 when not, -1 when it uses more of the regular
 * expressions than is read here. Exposed for tests. */
int adapter_pattern_match(const char *pattern, const char *name);

/* ---- algebra (adapter_forms.c) ---- */

/* The group as a delta, whose memory belongs to the caller (adapter_delta_free), also after failure. */
MUST_CHECK int adapter_delta_build(struct delta *d, const struct adapter_group *g, const struct site *s,
                                   const struct adapter_scale *scale, const struct adapter_bounds *bounds, struct err *e);
void adapter_delta_free(struct delta *d);

/* ---- bytes (adapter.c) ---- */

/* A weight file and perhaps its adapter_config.json, whole in memory. */
struct adapter_bytes {
  unsigned char *p;
  size_t n;
  char *config;             /* NUL-terminated, or NULL */
  size_t config_n;
  char name[64];
};
MUST_CHECK int adapter_bytes_read(struct adapter_bytes *b, const char *path, size_t max, struct err *e);
void adapter_bytes_free(struct adapter_bytes *b);
MUST_CHECK int adapter_digest(char out[65], const void *p, size_t n, const char *config, struct err *e);
/* "kohya loha", "diffusers", ... */
void adapter_format_name(char out[32], const struct adapter_groups *g, int has_config);

#endif
