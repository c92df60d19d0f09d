/*
 * admin_actions.c - see admin_actions.h. Everything here goes through safety.h, which does it on the loader thread under the policy: an operator can
 * choose among what the policy allows, and no more.
 */
#include "server/admin_actions.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "proto/admin.h"
#include "server/admin_activity.h"
#include "server/log.h"
#include "server/version.h"

enum { LISTED_MAX = 512, PROFILES_MAX = 64 /* as many as a policy may have */ };

/* ---- what is shown ---- */

static struct admin_adapter show_adapter(const struct safety_adapter_status *s)
{
  return (struct admin_adapter){.name = s->name, .state = adapter_state_name(s->state), .format = s->format, .digest = s->digest, .why = s->why,
                                .sites = s->sites, .required_by = s->required_by, .max_rank = s->max_rank};
}

static struct admin_generation show_generation(const struct safety_generation_status *s)
{
  return (struct admin_generation){.id = s->stamp.id, .digest = s->stamp.digest, .profile = s->stamp.profile,
                                   .requires_nothing = s->stamp.requires_nothing, .is_current = s->is_current, .pins = s->pins, .bytes = s->bytes,
                                   .activated_s = s->activated_s};
}

/* Copies of what there is, LISTED_MAX of each at most. */
struct lists {
  struct safety_adapter_status adapter[LISTED_MAX];
  struct safety_generation_status generation[LISTED_MAX];
  struct admin_adapter shown_adapter[LISTED_MAX];
  struct admin_generation shown_generation[LISTED_MAX];
  struct safety_profile_status profile[PROFILES_MAX];
  struct admin_profile shown_profile[PROFILES_MAX];
  int adapters, generations, profiles;
};

static struct lists *lists_new(struct safety *s, struct err *e)
{
  struct lists *l = malloc(sizeof *l);
  int n;

  if (!l) {
    err_set(e, E_NOMEM, "out of memory for the status");
    return NULL;
  }
  n = safety_adapters(s, l->adapter, LISTED_MAX);
  l->adapters = n < LISTED_MAX ? n : LISTED_MAX;
  n = safety_generations(s, l->generation, LISTED_MAX);
  l->generations = n < LISTED_MAX ? n : LISTED_MAX;
  n = safety_profiles(s, l->profile, PROFILES_MAX);
  l->profiles = n < PROFILES_MAX ? n : PROFILES_MAX;
  for (int i = 0; i < l->profiles; i++)
    l->shown_profile[i] = (struct admin_profile){.name = l->profile[i].name, .generation = l->profile[i].generation, .why = l->profile[i].why};
  for (int i = 0; i < l->adapters; i++)
    l->shown_adapter[i] = show_adapter(&l->adapter[i]);
  for (int i = 0; i < l->generations; i++)
    l->shown_generation[i] = show_generation(&l->generation[i]);
  return l;
}

static int act_status(struct admin_request *q, struct err *e)
{
  struct lists *l = lists_new(q->safety, e);
  struct audit_head head;
  struct err unready = {0};
  int r;

  if (!l)
    return e->code;
  audit_head(q->audit, &head);
  r = safety_ready(q->safety, &unready);
  r = admin_encode_status(&q->out, &(struct admin_status){.version = SAFELIGHT_VERSION, .unready = r ? unready.msg : NULL,
                                                          .swaps = safety_swaps(q->safety), .adapter = l->shown_adapter,
                                                          .generation = l->shown_generation, .adapters = l->adapters,
                                                          .generations = l->generations, .profile = l->shown_profile,
                                                          .profiles = l->profiles, .audit_records = head.seq, .audit_head = head.hash,
                                                          .audit_lost = audit_lost(q->audit)}, e);
  free(l);
  return r;
}

static int act_generations(struct admin_request *q, struct err *e)
{
  struct lists *l = lists_new(q->safety, e);
  int r;

  if (!l)
    return e->code;
  r = admin_encode_generations(&q->out, l->shown_generation, l->generations, e);
  free(l);
  return r;
}

static int act_audit(struct admin_request *q, struct err *e)
{
  char *records;
  int r;

  if (audit_recent(q->audit, q->n, &records, e))
    return e->code;
  r = admin_encode_records(&q->out, records, e);
  free(records);
  return r;
}

static int act_activity(struct admin_request *q, struct err *e)
{
  return admin_activity(&q->out, q->jobs, q->cfg, e);
}

/* ---- what is changed ---- */

/* Answers with the newest state of an adapter by that name. */
static int answer_adapter(struct admin_request *q, const char *name, struct err *e)
{
  struct lists *l = lists_new(q->safety, e);
  const struct admin_adapter *found = NULL;
  int r;

  if (!l)
    return e->code;
  for (int i = 0; i < l->adapters; i++)
    if (!strcmp(l->adapter[i].name, name) && (!found || l->adapter[i].state == ADAPTER_VERIFIED))
      found = &l->shown_adapter[i];
  r = admin_encode_done(&q->out, found, NULL, e);
  free(l);
  return r;
}

static int answer_stamp(struct admin_request *q, const struct safety_stamp *stamp, struct err *e)
{
  struct lists *l = lists_new(q->safety, e);
  const struct admin_generation *found = NULL;
  int r;

  if (!l)
    return e->code;
  for (int i = 0; i < l->generations && !found; i++)
    if (!strcmp(l->generation[i].stamp.id, stamp->id))
      found = &l->shown_generation[i];
  r = admin_encode_done(&q->out, NULL, found, e);
  free(l);
  return r;
}

static int act_load(struct admin_request *q, struct err *e)
{
  struct admin_load l;
  int r;

  if (q->is_upload) {
    r = safety_load(q->safety, q->name, q->name, q->body.p ? q->body.p : "", q->body.len, q->manifest.p, e);
  } else {
    r = admin_decode_load(&l, q->body.p ? q->body.p : "", q->body.len, e);
    if (!r)
      r = safety_load(q->safety, q->name, l.path, NULL, 0, NULL, e);
  }
  return r ? r : answer_adapter(q, q->name, e);
}

static int act_retire(struct admin_request *q, struct err *e)
{
  return safety_retire(q->safety, q->name, e) ? e->code : admin_encode_done(&q->out, NULL, NULL, e);
}

static int act_activate(struct admin_request *q, struct err *e)
{
  struct safety_stamp stamp;

  return safety_activate(q->safety, q->name, &stamp, e) ? e->code : answer_stamp(q, &stamp, e);
}

static int act_rollback(struct admin_request *q, struct err *e)
{
  struct safety_stamp stamp;

  return safety_rollback(q->safety, q->name, &stamp, e) ? e->code : answer_stamp(q, &stamp, e);
}

static int act_reload(struct admin_request *q, struct err *e)
{
  return safety_reload(q->safety, e) ? e->code : admin_encode_done(&q->out, NULL, NULL, e);
}

/* ---- vLLM's routes: style adapters alone ---- */

/* Whether a verified file of that name is held. */
static int is_loaded(struct safety *s, const char *name)
{
  struct err ignored = {0};
  struct lists *l = lists_new(s, &ignored);
  int found = 0;

  for (int i = 0; l && i < l->adapters; i++)
    found |= !strcmp(l->adapter[i].name, name) && (l->adapter[i].state == ADAPTER_VERIFIED || l->adapter[i].state == ADAPTER_LIVE);
  free(l);
  return found;
}

static int check_style(struct admin_request *q, const char *name, struct err *e)
{
  return safety_is_style(q->safety, name) ? 0 : err_field(e, E_ARG, "lora_name", "The policy has no style adapter '%s': no profile lists it among its "
                                                          "styles, or a profile requires it.", name);
}

static int act_load_lora(struct admin_request *q, struct err *e)
{
  struct admin_lora l;

  if (admin_decode_lora(&l, q->body.p ? q->body.p : "", q->body.len, 1, e) || check_style(q, l.name, e))
    return e->code;
  if (!l.in_place && is_loaded(q->safety, l.name))
    return err_field(e, E_ARG, "lora_name", "The lora adapter '%s' has already been loaded. Set 'load_inplace' to replace it.", l.name);
  if (safety_load(q->safety, l.name, l.path, NULL, 0, NULL, e))
    return e->code;
  q->is_text = 1;
  return buf_addf(&q->out, e, "Success: LoRA adapter '%s' added successfully.", l.name);
}

static int act_unload_lora(struct admin_request *q, struct err *e)
{
  struct admin_lora l;

  if (admin_decode_lora(&l, q->body.p ? q->body.p : "", q->body.len, 0, e) || check_style(q, l.name, e))
    return e->code;
  if (!is_loaded(q->safety, l.name))
    return err_field(e, E_NOTFOUND, "lora_name", "The lora adapter '%s' cannot be found.", l.name);
  if (safety_retire(q->safety, l.name, e))
    return e->code;
  q->is_text = 1;
  return buf_addf(&q->out, e, "Success: LoRA adapter '%s' removed successfully.", l.name);
}

/* ---- routes ---- */

static const struct admin_route routes[] = {
    {"GET", "/v1/admin/status", BODY_NONE, 0, act_status},
    {"GET", "/v1/admin/generations", BODY_NONE, 0, act_generations},
    {"GET", "/v1/admin/audit", BODY_NONE, 0, act_audit},
    {"GET", "/v1/admin/activity", BODY_NONE, 0, act_activity},
    {"POST", "/v1/admin/reload", BODY_NONE, 1, act_reload},
    {"POST", "/v1/admin/adapters/*", BODY_ADAPTER, 1, act_load},
    {"DELETE", "/v1/admin/adapters/*", BODY_NONE, 1, act_retire},
    {"POST", "/v1/admin/profiles/*/activate", BODY_NONE, 1, act_activate},
    {"POST", "/v1/admin/profiles/*/rollback", BODY_NONE, 1, act_rollback},
    {"POST", "/v1/load_lora_adapter", BODY_JSON, 1, act_load_lora},
    {"POST", "/v1/unload_lora_adapter", BODY_JSON, 1, act_unload_lora},
};

/* Whether path has the pattern's form; its name then stands in name. */
static int path_matches(const char *pattern, const char *path, char name[POLICY_NAME])
{
  static const char ok[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-";
  size_t head = strcspn(pattern, "*"), n;

  name[0] = 0;
  if (strncmp(pattern, path, head))
    return 0;
  if (!pattern[head])
    return !path[head];
  n = strspn(path + head, ok);
  if (!n || n >= POLICY_NAME || strcmp(path + head + n, pattern + head + 1))
    return 0;
  memcpy(name, path + head, n);
  name[n] = 0;
  return 1;
}

const struct admin_route *admin_route_find(struct admin_request *q, const char *method, const char *path, char allow[ADMIN_ALLOW])
{
  size_t n = 0;

  allow[0] = 0;
  for (size_t i = 0; i < sizeof routes / sizeof *routes; i++) {
    if (!path_matches(routes[i].path, path, q->name))
      continue;
    if (!strcmp(routes[i].method, method))
      return &routes[i];
    n += (size_t)snprintf(allow + n, ADMIN_ALLOW - n, "%s%s", n ? ", " : "", routes[i].method); /* a path has two at most */
  }
  return NULL;
}

static int record(struct admin_request *q, const struct admin_route *r, const char *verdict, const char *why, struct err *e)
{
  char reason[1024];
  struct audit_record a = {.kind = AUDIT_ADMIN, .request_id = q->id, .verdict = verdict, .reason = reason};

  snprintf(reason, sizeof reason, "%s %.200s by %s%s%s", r->method, q->path, q->who, *why ? ": " : "", why);
  return audit_add(q->audit, &a, e);
}

int admin_act(const struct admin_route *r, struct admin_request *q, struct err *e)
{
  struct err late = {0};
  int code;

  if (!r->is_change)
    return r->act(q, e);
  if (record(q, r, "asked", "", e))
    return e->code;
  code = r->act(q, e);
  if (record(q, r, code ? "failed" : "done", code ? e->msg : "", &late))
    log_event("admin: %s %s was %s and could not be written down: %s", r->method, q->path, code ? "refused" : "done", late.msg);
  return code;
}
