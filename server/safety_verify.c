/*
 * safety_verify.c - see safety_verify.h. Nothing here publishes: what fails leaves no trace but its reason.
 *
 * Called by safety_loader.c, safety_rebuild.c, safety_commands.c, safety_store.c, generate.c. Threads: the one that owns the verifier's lanes.
 */
#include "server/safety_verify.h"

#include <stdio.h>
#include <string.h>

enum { CONFIG_BYTES = 1 << 20, MANIFEST_BYTES = 16 << 20 /* they carry latents */ };

int verifier_open(struct verifier *v, const struct proving *on, int n, struct err *e)
{
  *v = (struct verifier){.on = on, .n = n};
  adapter_bounds_default(&v->bounds);
  return adapter_names_new(&v->names, model_base(on->model), model_layers_per_block(on->model), e);
}

void verifier_close(struct verifier *v)
{
  adapter_names_free(v->names);
  *v = (struct verifier){0};
}

void adapter_files_close(struct adapter_files *b)
{
  buf_close(&b->file);
  buf_close(&b->config);
  buf_close(&b->manifest);
}

/* A file that need not be there. */
static int read_optional(const struct policy *p, const char *path, struct buf *out, struct err *e)
{
  struct err why = {0};

  if (!policy_read_file(p, path, out, &why) || why.code == E_NOTFOUND)
    return 0;
  *e = why;
  return e->code;
}

/* A folder as PEFT or diffusers writes it, by the rules of models/adapter.c. */
static int read_folder(const struct policy *p, const char *path, struct adapter_files *b, struct err *e)
{
  char peft[POLICY_PATH + 48], diffusers[POLICY_PATH + 48], config[POLICY_PATH + 48];
  int is_peft, is_diffusers;

  snprintf(peft, sizeof peft, "%s/adapter_model.safetensors", path);
  snprintf(diffusers, sizeof diffusers, "%s/pytorch_lora_weights.safetensors", path);
  snprintf(config, sizeof config, "%s/adapter_config.json", path);
  is_peft = policy_has(p, peft);
  is_diffusers = policy_has(p, diffusers);
  if (is_peft == is_diffusers)
    return err_field(e, E_FILE, path, "%s: holds %s adapter_model.safetensors %s pytorch_lora_weights.safetensors%s", path,
                     is_peft ? "both" : "neither", is_peft ? "and" : "nor", is_peft ? "; name one of them" : "");
  if (policy_read_file(p, is_peft ? peft : diffusers, &b->file, e) || (is_peft && policy_read_file(p, config, &b->config, e)))
    return e->code;
  if (b->config.p && memchr(b->config.p, 0, b->config.len))
    return err_field(e, E_FILE, config, "%s: holds a zero byte", config);
  return 0;
}

int verifier_read(const struct verifier *v, const struct policy *p, const char *path, struct adapter_files *b, struct err *e)
{
  char manifest[POLICY_PATH + 24];
  int r;

  buf_init(&b->file, v->bounds.max_bytes);
  buf_init(&b->config, CONFIG_BYTES);
  buf_init(&b->manifest, MANIFEST_BYTES);
  if (manifest_path(manifest, sizeof manifest, path, e))
    return e->code;
  r = policy_is_folder(p, path) ? read_folder(p, path, b, e) : policy_read_file(p, path, &b->file, e);
  if (!r)
    r = read_optional(p, manifest, &b->manifest, e);
  if (r)
    adapter_files_close(b);
  return r;
}

static int parse(const struct verifier *v, const char *name, const char *pinned, const struct adapter_files *b,
                 struct adapter **a, struct err *e)
{
  if (adapter_open_memory(a, name, b->file.p ? b->file.p : "", b->file.len, b->config.p, v->names, &v->bounds, e))
    return err_wrap(e, "adapter %s", name);
  if (!*pinned || !strcmp((*a)->digest, pinned))
    return 0;
  err_field(e, E_FILE, "digest", "adapter %s: the file's digest is %.16s..., the policy pins %.16s...", name, (*a)->digest, pinned);
  adapter_close(*a);
  *a = NULL;
  return e->code;
}

/* What is probed on each device. */
struct probe {
  const struct verifier *v;
  const struct manifest *m;     /* or NULL */
  const struct adapter *a;
};

/* The adapter alone at weight 1, as its manifest describes it, on one device. */
static int probe_on(void *arg, int i, struct err *e)
{
  const struct probe *p = arg;
  const struct proving *on = &p->v->on[i];
  struct adapter_use use = {.adapter = p->a, .weight = 1, .required = 1};
  struct generation *g = NULL;
  int r = generation_build(&g, model_base(on->model), model_sources(on->model), on->lane, &use, 1, FORM_RUNTIME, &p->v->bounds, e);

  if (!r && p->m)
    r = manifest_probe(p->m, on->model, on->lane, g, NULL, e);
  generation_unref(g);
  return r;
}

/* What parsing leaves open: the manifest and its signature as the policy requires, norms, and the canary of a manifest. */
static int prove(const struct verifier *v, const struct policy *p, const struct adapter *a, const struct adapter_files *b, struct err *e)
{
  struct manifest *m = NULL;
  int r = 0;

  if (b->manifest.p)
    r = manifest_read_text(&m, a->name, b->manifest.p, b->manifest.len, e);
  else if (p->require_manifest)
    r = err_field(e, E_FILE, "manifest", "there is no manifest beside it, and the policy requires one (`safelight adapter sign` "
                                         "makes one)");
  if (!r && m)
    r = manifest_check(m, a, v->on->model, p->require_signature ? p->public_key : NULL, e);
  if (!r) /* on every device: what holds on one may fail on another that is out of memory, or broken */
    r = proving_run(v->on, v->n, probe_on, &(struct probe){v, m, a}, e);
  manifest_free(m);
  return r ? err_wrap(e, "adapter %s", a->name) : 0;
}

int verifier_check(const struct verifier *v, const struct policy *p, const char *name, const char *pinned, const struct adapter_files *b,
                   struct adapter **a, struct err *e)
{
  *a = NULL;
  if (parse(v, name, pinned, b, a, e))
    return e->code;
  if (!prove(v, p, *a, b, e))
    return 0;
  adapter_close(*a);
  *a = NULL;
  return e->code;
}

int verifier_adapter(const struct verifier *v, const struct policy *p, int i, struct adapter **a, struct err *e)
{
  const struct policy_adapter *d = &p->adapter[i];
  struct adapter_files b;
  int r;

  *a = NULL;
  if (verifier_read(v, p, d->path, &b, e))
    return err_wrap(e, "adapter %s", d->name);
  r = verifier_check(v, p, d->name, d->digest, &b, a, e);
  adapter_files_close(&b);
  return r;
}
