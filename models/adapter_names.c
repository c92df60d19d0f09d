/*
 * adapter_names.c - every name by which some trainer calls a site of the model.
 *
 * The names are made from the model's sites and looked up; a key is never taken apart to guess a site, since underscores and SGM's
 * numbers do not say where they came from. An alias that would stand for two sites stands for none. Embedding tables and the VAE
 * have no aliases: no adapter may touch them.
 *
 * Called by adapter.c and adapter_read.c through adapter_impl.h, and by server/. Threads: immutable once made.
 * Sources: diffusers (state_dict_utils, lora_conversion_utils: the SGM block map), kohya's sd-scripts (networks/lora.py), LyCORIS
 * (kohya.py, wrapper.py), PEFT (save_and_load.py).
 */
#include "models/adapter_impl.h"

#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

enum { STEM_CAP = 320 };

struct entry {
  char *alias;              /* NULL: a free slot */
  int site;
  enum name_style style;
};

struct adapter_names {
  const struct generation *base;
  struct entry *slot;       /* open addressing, cap a power of two, never more than half full */
  size_t cap, n;
};

const struct generation *adapter_names_base(const struct adapter_names *n)
{
  return n->base;
}

/* ---- table ---- */

/* FNV-1a. */
static uint64_t hash(const char *s, size_t len)
{
  uint64_t h = 0xcbf29ce484222325u;

  while (len--)
    h = (h ^ (unsigned char)*s++) * 0x100000001b3u;
  return h;
}

/* The slot that holds the alias, or the free one where it belongs. */
static struct entry *slot_of(const struct adapter_names *n, const char *alias, size_t len)
{
  size_t i = (size_t)hash(alias, len) & (n->cap - 1);

  while (n->slot[i].alias && (strncmp(n->slot[i].alias, alias, len) || n->slot[i].alias[len]))
    i = (i + 1) & (n->cap - 1);
  return &n->slot[i];
}

static int grow(struct adapter_names *n, struct err *e)
{
  struct adapter_names larger = {.base = n->base, .cap = n->cap ? 2 * n->cap : 1024, .n = n->n};
  size_t i;

  if (n->cap && n->n < n->cap / 2)
    return 0;
  larger.slot = calloc(larger.cap, sizeof *larger.slot);
  if (!larger.slot)
    return err_set(e, E_NOMEM, "no memory for %zu names of sites", larger.cap);
  for (i = 0; i < n->cap; i++)
    if (n->slot[i].alias)
      *slot_of(&larger, n->slot[i].alias, strlen(n->slot[i].alias)) = n->slot[i];
  free(n->slot);
  *n = larger;
  return 0;
}

/* What the sites of one pass are added with; the first failure sticks. */
struct adding {
  struct adapter_names *n;
  int site, code;
  struct err *e;
};

__attribute__((format(printf, 3, 4)))
static void add(struct adding *a, enum name_style style, const char *fmt, ...)
{
  struct entry *slot;
  char *alias;
  va_list ap;
  int len;

  if (a->code || (a->code = grow(a->n, a->e)))
    return;
  va_start(ap, fmt);
  len = vasprintf(&alias, fmt, ap);
  va_end(ap);
  if (len < 0) {
    a->code = err_set(a->e, E_NOMEM, "no memory for a name of a site");
    return;
  }
  slot = slot_of(a->n, alias, (size_t)len);
  if (slot->alias) {
    if (slot->site != a->site)
      slot->site = SITE_NONE; /* two sites: neither */
    free(alias);
    return;
  }
  *slot = (struct entry){alias, a->site, style};
  a->n->n++;
}

/* ---- stems ---- */

static void underscore(char *out, const char *dotted)
{
  size_t i;

  for (i = 0; dotted[i] && i + 1 < STEM_CAP; i++)
    out[i] = dotted[i] == '.' ? '_' : dotted[i];
  out[i] = '\0';
}

/* Reads "PREFIX<number>." and moves *s behind it. */
static int take_number(const char **s, const char *prefix, int *number)
{
  size_t n = strlen(prefix);
  char *end;
  long v;

  if (strncmp(*s, prefix, n) || (*s)[n] < '0' || (*s)[n] > '9')
    return 0;
  v = strtol(*s + n, &end, 10);
  if (*end != '.' || v > 10000)
    return 0;
  *number = (int)v;
  *s = end + 1;
  return 1;
}

static const struct {
  const char *diffusers, *sgm;
} resnet_parts[] = {{"norm1", "in_layers.0"}, {"conv1", "in_layers.2"}, {"time_emb_proj", "emb_layers.1"}, {"norm2", "out_layers.0"},
                    {"conv2", "out_layers.3"}, {"conv_shortcut", "skip_connection"}},
  plain_parts[] = {{"conv_in", "input_blocks.0.0"}, {"conv_norm_out", "out.0"}, {"conv_out", "out.2"},
                   {"time_embedding.linear_1", "time_embed.0"}, {"time_embedding.linear_2", "time_embed.2"},
                   {"add_embedding.linear_1", "label_emb.0.0"}, {"add_embedding.linear_2", "label_emb.0.2"}};

/* "in_layers.2" for "conv1"; "" when there is no such part. */
static const char *sgm_part(const char *part)
{
  size_t i;

  for (i = 0; i < sizeof resnet_parts / sizeof *resnet_parts; i++)
    if (!strcmp(part, resnet_parts[i].diffusers))
      return resnet_parts[i].sgm;
  return "";
}

/* SGM counts every resnet (with its attention) and every resampler as one block. layers: resnets of a down block. Returns whether the
 * layer has a name there. */
static int sgm_stem(char *out, const struct generation *base, const char *rest, int layers)
{
  const char *s = rest;
  char name[96];
  size_t i;
  int b, j, n = 0;

  if (take_number(&s, "down_blocks.", &b)) {
    if (take_number(&s, "resnets.", &j))
      n = snprintf(out, STEM_CAP, "input_blocks.%d.0.%s", 1 + b * (layers + 1) + j, sgm_part(s));
    else if (take_number(&s, "attentions.", &j))
      n = snprintf(out, STEM_CAP, "input_blocks.%d.1.%s", 1 + b * (layers + 1) + j, s);
    else if (!strcmp(s, "downsamplers.0.conv"))
      n = snprintf(out, STEM_CAP, "input_blocks.%d.0.op", (b + 1) * (layers + 1));
  } else if (take_number(&s, "up_blocks.", &b)) {
    snprintf(name, sizeof name, "unet.up_blocks.%d.attentions.0.norm", b);
    if (take_number(&s, "resnets.", &j))
      n = snprintf(out, STEM_CAP, "output_blocks.%d.0.%s", b * (layers + 1) + j, sgm_part(s));
    else if (take_number(&s, "attentions.", &j))
      n = snprintf(out, STEM_CAP, "output_blocks.%d.1.%s", b * (layers + 1) + j, s);
    else if (!strcmp(s, "upsamplers.0.conv"))
      n = snprintf(out, STEM_CAP, "output_blocks.%d.%d.conv", b * (layers + 1) + layers,
                   generation_find(base, name) == SITE_NONE ? 1 : 2);
  } else if (take_number(&s, "mid_block.resnets.", &j)) {
    n = snprintf(out, STEM_CAP, "middle_block.%d.%s", 2 * j, sgm_part(s));
  } else if (take_number(&s, "mid_block.attentions.", &j)) {
    n = snprintf(out, STEM_CAP, "middle_block.1.%s", s);
  }
  for (i = 0; !n && i < sizeof plain_parts / sizeof *plain_parts; i++)
    if (!strcmp(rest, plain_parts[i].diffusers))
      n = snprintf(out, STEM_CAP, "%s", plain_parts[i].sgm);
  return n > 0 && n < STEM_CAP && out[n - 1] != '.';
}

/* ---- aliases of one site ---- */

/* diffusers' attention processors of old: attn1.processor.to_q_lora; the suffix table holds "_lora.down.weight". */
static void add_processor(struct adding *a, const char *component, const char *rest)
{
  static const char *const part[] = {".to_q", ".to_k", ".to_v", ".to_out.0"};
  const char *dot;
  size_t i, n;

  for (i = 0; i < sizeof part / sizeof *part; i++) {
    n = strlen(rest) > strlen(part[i]) ? strlen(rest) - strlen(part[i]) : 0;
    dot = rest + n;
    if (!n || strcmp(dot, part[i]) || strncmp(dot - 6, ".attn", 5))
      continue;
    n = strcspn(dot + 1, ".");
    add(a, NAME_PROCESSOR, "%s.%.*s.processor%.*s", component, (int)(dot - rest), rest, (int)n + 1, dot);
    add(a, NAME_PROCESSOR, "%.*s.processor%.*s", (int)(dot - rest), rest, (int)n + 1, dot);
  }
}

static void add_unet(struct adding *a, const char *rest, int layers)
{
  char stem[STEM_CAP], sgm[STEM_CAP];

  underscore(stem, rest);
  add(a, NAME_DIFFUSERS, "unet.%s", rest);
  add(a, NAME_BARE, "%s", rest);
  add(a, NAME_PEFT, "base_model.model.%s", rest);
  add(a, NAME_PEFT, "base_model.model.unet.%s", rest);
  add(a, NAME_KOHYA, "lora_unet_%s", stem);
  add(a, NAME_LYCORIS, "lycoris_%s", stem);
  add(a, NAME_LYCORIS, "lycoris_unet_%s", stem);
  add(a, NAME_LYCORIS, "lora.%s", rest);
  add(a, NAME_LYCORIS, "lora.unet.%s", rest);
  add_processor(a, "unet", rest);
  if (layers < 1 || !sgm_stem(sgm, a->n->base, rest, layers))
    return;
  underscore(stem, sgm);
  add(a, NAME_SGM, "lora_unet_%s", stem);
  add(a, NAME_LYCORIS, "lycoris_%s", stem);
  add(a, NAME_LYCORIS, "lycoris_unet_%s", stem);
  add(a, NAME_LDM, "model.diffusion_model.%s", sgm);
  add(a, NAME_LDM, "diffusion_model.%s", sgm);
}

/* Text encoders of old diffusers: self_attn.to_q_lora for q_proj. */
static void add_text_processor(struct adding *a, const char *component, const char *rest)
{
  static const char *const part[][2] = {{"q_proj", "to_q"}, {"k_proj", "to_k"}, {"v_proj", "to_v"}, {"out_proj", "to_out"}};
  const char *dot = strrchr(rest, '.');
  size_t i;

  for (i = 0; dot && i < sizeof part / sizeof *part; i++)
    if (!strcmp(dot + 1, part[i][0]))
      add(a, NAME_PROCESSOR, "%s.%.*s.%s", component, (int)(dot - rest), rest, part[i][1]);
}

static void add_text(struct adding *a, const char *component, const char *rest)
{
  int second = !strcmp(component, "text_encoder_2");
  char stem[STEM_CAP];

  underscore(stem, rest);
  add(a, NAME_DIFFUSERS, "%s.%s", component, rest);
  add(a, NAME_BARE, "%s", rest);
  add(a, NAME_PEFT, "base_model.model.%s", rest);
  add(a, NAME_PEFT, "base_model.model.%s.%s", component, rest);
  add(a, NAME_KOHYA, "lora_te%d_%s", second ? 2 : 1, stem);
  if (!second)
    add(a, NAME_KOHYA, "lora_te_%s", stem);
  add(a, NAME_LYCORIS, "lycoris_%s", stem);
  add(a, NAME_LYCORIS, "lycoris_te%d_%s", second ? 2 : 1, stem);
  add(a, NAME_LYCORIS, "lora.%s", rest);
  add(a, NAME_LYCORIS, "lora.%s.%s", component, rest);
  add_text_processor(a, component, rest);
}

int adapter_names_new(struct adapter_names **names, const struct generation *base, int layers_per_block, struct err *e)
{
  struct adding a = {.e = e};
  int i;

  *names = NULL;
  a.n = calloc(1, sizeof *a.n);
  if (!a.n)
    return err_set(e, E_NOMEM, "no memory for the names of sites");
  a.n->base = base;
  a.code = grow(a.n, e);
  for (i = 0; i < base->n && !a.code; i++) {
    const char *name = base->site[i].name, *dot = strchr(name, '.');

    a.site = i;
    if (!dot || base->site[i].kind == WEIGHT_TABLE || strlen(name) + 64 > STEM_CAP)
      continue;
    if (!strncmp(name, "unet.", 5))
      add_unet(&a, dot + 1, layers_per_block);
    else if (!strncmp(name, "text_encoder.", 13))
      add_text(&a, "text_encoder", dot + 1);
    else if (!strncmp(name, "text_encoder_2.", 15))
      add_text(&a, "text_encoder_2", dot + 1);
  }
  if (a.code) {
    adapter_names_free(a.n);
    return a.code;
  }
  *names = a.n;
  return 0;
}

void adapter_names_free(struct adapter_names *n)
{
  size_t i;

  if (!n)
    return;
  for (i = 0; i < n->cap; i++)
    free(n->slot[i].alias);
  free(n->slot);
  free(n);
}

/* ---- looking up ---- */

int adapter_names_lookup(const struct adapter_names *n, const char *alias, size_t len, enum name_style *style)
{
  const struct entry *slot = slot_of(n, alias, len);

  if (!slot->alias || slot->site == SITE_NONE)
    return SITE_NONE;
  *style = slot->style;
  return slot->site;
}

int adapter_names_find(const struct adapter_names *n, const char *alias)
{
  enum name_style style;

  return adapter_names_lookup(n, alias, strlen(alias), &style);
}

/* Letters that a and b share at their front, and then at their back. */
static size_t likeness(const char *a, const char *b)
{
  size_t front = 0, back = 0, n = strlen(a), m = strlen(b);

  while (a[front] && a[front] == b[front])
    front++;
  while (back < n - front && back < m - front && a[n - 1 - back] == b[m - 1 - back])
    back++;
  return front + back;
}

const char *adapter_names_nearest(const struct adapter_names *n, const char *text)
{
  const char *best = "";
  size_t i, most = 0;

  for (i = 0; i < n->cap; i++) {
    const char *alias = n->slot[i].alias;
    size_t l = alias && n->slot[i].site != SITE_NONE ? likeness(alias, text) : 0;

    /* of equals the one of the more similar length, then the first in the alphabet: the table's order means nothing */
    if (l > most || (l && l == most && (strlen(alias) < strlen(best) || (strlen(alias) == strlen(best) && strcmp(alias, best) < 0)))) {
      most = l;
      best = alias;
    }
  }
  return best;
}
