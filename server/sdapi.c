/*
 * sdapi.c - see sdapi.h: pictures, the caller's job at hand, and what clients of A1111 ask about a server.
 *
 * A1111 serves one person; here each caller (a key's tenant, or an address without one) has a world of his own: progress tells of his jobs of this surface,
 * interrupt and skip end them and nobody else's, options cannot be changed, lists show the style adapters that he may use.
 *
 * Threads: decoding on the HTTP thread, pictures' answers on the encoder thread.
 */
#include "server/sdapi.h"

#include <stdlib.h>
#include <string.h>
#include <sys/sysinfo.h>
#include <time.h>

#include "server/encode.h"
#include "server/version.h"

/* ---- pictures ---- */

static int decode_txt2img(struct job *j, struct first *first, const struct drawing_body *b, const struct request_limits *lim, struct err *e)
{
  return sdapi_decode(&j->req, &j->sdapi, first, 0, b->p, b->len, lim, e);
}

static int decode_img2img(struct job *j, struct first *first, const struct drawing_body *b, const struct request_limits *lim, struct err *e)
{
  return sdapi_decode(&j->req, &j->sdapi, first, 1, b->p, b->len, lim, e);
}

/* Also of a request that was interrupted: all that is told of it, and the pictures that there are, as A1111 answers. */
static int encode(struct job *j, const struct serving *s, struct err *e)
{
  struct openai_picture pic[REQUEST_N_MAX];
  struct recipe recipe = encoder_recipe(j, 0, s);
  struct sdapi_result res = {.picture = pic, .n = j->req.n, .req = &j->req, .x = &j->sdapi, .recipe = &recipe, .created = (int64_t)time(NULL)};

  for (int i = 0; i < j->req.n; i++)
    pic[i] = (struct openai_picture){.file = j->file[i].p, .len = j->file[i].len, .seed = j->pic[i].seed, .cut_at = j->pic[i].cut_at};
  return sdapi_encode_result(&j->body, &res, e);
}

const struct surface surface_sdapi = {.name = "sdapi", .encode = encode, .encode_stopped = encode, .encode_error = sdapi_encode_error};

static const struct drawing txt2img = {.surface = &surface_sdapi, .decode = decode_txt2img};
static const struct drawing img2img = {.surface = &surface_sdapi, .decode = decode_img2img};

/* ---- the caller's job at hand ---- */

static int find_caller(struct exchange *x, char caller[FAIR_NAME])
{
  struct safety_target *t;

  if (exchange_target(x, &t, &x->err))
    return x->err.code;
  exchange_caller(x, t, caller);
  safety_target_unref(t);
  return 0;
}

/* job_look with the newest preview instead of the oldest. With wants_preview the next one is asked for. */
static int look(struct jobs *js, struct job *j, uint64_t serial, int wants_preview, struct job_view *v)
{
  struct blob *newest = NULL;

  while (job_look(js, j, serial, newest ? newest->number : 0, wants_preview, v)) {
    if (!v->preview) {
      v->preview = newest;
      return 1;
    }
    blob_unref(newest);
    newest = v->preview;
  }
  blob_unref(newest);
  return 0;
}

static struct sdapi_progress progress_of(const struct job_view *v)
{
  int each = v->pictures ? v->steps / v->pictures : 0;
  int at = v->steps_done < v->steps ? v->steps_done : v->steps; /* pictures of a job are drawn side by side: told as if one after the other */
  int picture = each && at ? (at - 1) / each : 0;

  return (struct sdapi_progress){
      .progress = v->state < JOB_RUNNING ? 0 : sdapi_progress_of(picture, v->pictures, at - picture * each, each),
      .eta_s = v->wait_s,
      .is_skipped = v->ending == CUT_PICTURES,
      .is_interrupted = v->ending == CUT_JOB,
      .job = v->id,
      .started = (int64_t)time(NULL) - (clock_ns() - v->submitted_ns) / 1000000000,
      .n = v->pictures,
      .picture = picture,
      .step = at - picture * each,
      .steps = each,
      .file = v->preview ? v->preview->data : NULL,
      .len = v->preview ? v->preview->len : 0,
      .text = v->state < JOB_RUNNING ? "waiting" : NULL,
  };
}

MUST_CHECK static int query_flag(struct exchange *x, const char *name, int *flag)
{
  return sdapi_decode_flag(flag, name, MHD_lookup_connection_value(x->connection, MHD_GET_ARGUMENT_KIND, name), &x->err);
}

/* How the caller's job at hand stands, all zero when there is none. v is what it borrows from. */
static struct sdapi_progress find_progress(struct exchange *x, const char *caller, int wants_preview, struct job_view *v)
{
  struct sdapi_progress p = {0};
  uint64_t serial;
  struct job *j = job_find_caller(x->h->jobs, caller, &surface_sdapi, &serial);

  if (j && look(x->h->jobs, j, serial, wants_preview, v))
    p = progress_of(v);
  if (!wants_preview)
    p.file = NULL;
  return p;
}

static enum MHD_Result answer_progress(struct exchange *x)
{
  struct sdapi_progress p;
  struct job_view v = {0};
  char caller[FAIR_NAME];
  struct buf b;
  int skips, r;

  if (find_caller(x, caller) || query_flag(x, "skip_current_image", &skips))
    return send_error(x);
  p = find_progress(x, caller, !skips, &v);
  buf_init(&b, 64 << 20);
  r = sdapi_encode_progress(&b, &p, &x->err);
  blob_unref(v.preview);
  if (!r)
    return send_json(x, 200, &b);
  buf_close(&b);
  return send_error(x);
}

/* All that the caller draws or has waiting on this surface ends, with the pictures as they are; what other clients draw goes on. */
static enum MHD_Result answer_interrupt(struct exchange *x)
{
  char caller[FAIR_NAME];

  if (find_caller(x, caller))
    return send_error(x);
  jobs_cut_caller(x->h->jobs, caller, &surface_sdapi);
  return send_text(x, "{}");
}

/* The pictures at hand: those of the caller's request at hand that were begun. What waits behind them goes on. */
static enum MHD_Result answer_skip(struct exchange *x)
{
  char caller[FAIR_NAME];
  uint64_t serial;
  struct job *j;

  if (find_caller(x, caller))
    return send_error(x);
  j = job_find_caller(x->h->jobs, caller, &surface_sdapi, &serial);
  if (j)
    job_cut(x->h->jobs, j, serial, CUT_PICTURES);
  return send_text(x, "null");
}

/* ---- what the server is ---- */

enum { LORAS_MAX = 256 };

/* What the lists are made of, and what it borrows from. */
struct told {
  struct sdapi_server server;
  struct sdapi_sampler sampler[SAMPLER_COUNT];
  struct sdapi_lora lora[LORAS_MAX];
  char name[LORAS_MAX][POLICY_NAME];
};

static void tell_samplers(struct told *t)
{
  for (int i = 0; i < SAMPLER_COUNT; i++) {
    enum sampler_kind k = (enum sampler_kind)i;
    t->sampler[i] = (struct sdapi_sampler){.name = sampler_name(k), .label = sampler_label(k), .has_karras = sampler_has_karras(k)};
  }
  t->server.sampler = t->sampler;
  t->server.n_samplers = SAMPLER_COUNT;
}

/* NULL: x->err says why. The caller frees it. */
static struct told *tell(struct exchange *x)
{
  struct safety_target *who;
  const struct serving *s;
  struct sysinfo info;
  struct told *t;

  if (exchange_target(x, &who, &x->err))
    return NULL;
  s = worker_serving(x->h->worker); /* there, since the safety is */
  t = calloc(1, sizeof *t);
  if (!t) {
    safety_target_unref(who);
    err_set(&x->err, E_NOMEM, "out of memory for a list");
    return NULL;
  }
  t->server = (struct sdapi_server){.lim = &s->limits, .digest = s->info->digest, .filename = s->limits.model, .version = SAFELIGHT_VERSION};
  tell_samplers(t);
  t->server.lora = t->lora;
  t->server.n_loras = safety_profile_styles(worker_safety(x->h->worker), safety_target_profile(who), t->name, LORAS_MAX);
  for (int i = 0; i < t->server.n_loras; i++)
    t->lora[i].name = t->name[i];
  safety_target_unref(who);
  if (!sysinfo(&info)) {
    t->server.memory_total = (int64_t)info.totalram * info.mem_unit;
    t->server.memory_used = t->server.memory_total - (int64_t)info.freeram * info.mem_unit;
  }
  return t;
}

/* The list that the last part of the path names. */
static enum MHD_Result answer_list(struct exchange *x)
{
  struct told *t = tell(x);
  struct buf b;

  if (!t)
    return send_error(x);
  buf_init(&b, 1 << 20);
  (void)!sdapi_encode_list(&b, strrchr(x->route->path, '/') + 1, &t->server, &x->err);
  free(t);
  if (!x->err.code)
    return send_json(x, 200, &b);
  buf_close(&b);
  return send_error(x);
}

/* SD.Next's, which Krita's plugin asks. */
static enum MHD_Result answer_status(struct exchange *x)
{
  struct sdapi_progress p;
  struct job_view v = {0};
  char caller[FAIR_NAME];
  int state, memory, full;
  struct told *t;
  struct buf b;

  if (find_caller(x, caller) || query_flag(x, "state", &state) || query_flag(x, "memory", &memory) || query_flag(x, "full", &full) || !(t = tell(x)))
    return send_error(x);
  p = find_progress(x, caller, 0, &v);
  buf_init(&b, 64 << 10);
  (void)!sdapi_encode_status(&b,
                             &(struct sdapi_status){.server = &t->server,
                                                    .progress = &p,
                                                    .now = (int64_t)time(NULL),
                                                    .up_s = (int64_t)time(NULL) - x->h->worker->serving.loaded_s,
                                                    .has_state = state || full,
                                                    .has_memory = memory || full},
                             &x->err);
  blob_unref(v.preview);
  free(t);
  if (!x->err.code)
    return send_json(x, 200, &b);
  buf_close(&b);
  return send_error(x);
}

/* Gradio's, by which Krita's plugin finds out whether there is a server. */
static enum MHD_Result answer_queue(struct exchange *x)
{
  int waiting = jobs_count(x->h->jobs).waiting;
  char caller[FAIR_NAME];
  struct buf b;

  buf_init(&b, 4096);
  if (!find_caller(x, caller))
    (void)!sdapi_encode_queue(&b, waiting, waiting ? jobs_retry_after(x->h->jobs) : 0, &x->err);
  if (!x->err.code)
    return send_json(x, 200, &b);
  buf_close(&b);
  return send_error(x);
}

/* What A1111 does with other models than the one that draws. */
static enum MHD_Result answer_absent(struct exchange *x)
{
  char caller[FAIR_NAME];

  if (find_caller(x, caller))
    return send_error(x);
  if (strstr(x->route->path, "interrogate"))
    err_set(&x->err, E_ABSENT, "this server cannot describe pictures: it has no interrogator");
  else
    err_set(&x->err, E_ABSENT, "this server cannot enlarge or restore pictures: it has no upscalers and no face restorers; ask for the size that you need");
  return send_error(x);
}

static enum MHD_Result answer_set_options(struct exchange *x)
{
  struct told *t = tell(x);

  if (t)
    (void)!sdapi_decode_options(x->body.p ? x->body.p : "", x->body.len, &t->server, &x->err);
  free(t);
  return x->err.code ? send_error(x) : send_text(x, "null");
}

/* Models and adapters are the operator's: there is nothing to look for. */
static enum MHD_Result answer_refresh(struct exchange *x)
{
  char caller[FAIR_NAME];

  return find_caller(x, caller) ? send_error(x) : send_text(x, "null");
}

static enum MHD_Result answer_png_info(struct exchange *x)
{
  char caller[FAIR_NAME];
  uint8_t *file = NULL;
  struct buf b;
  size_t n;

  buf_init(&b, 8 << 20);
  if (!find_caller(x, caller) && !sdapi_decode_png_info(&file, &n, x->body.p ? x->body.p : "", x->body.len, &x->err))
    (void)!sdapi_encode_png_info(&b, file, n, &x->err);
  free(file);
  if (!x->err.code)
    return send_json(x, 200, &b);
  buf_close(&b);
  return send_error(x);
}

/* ---- routes ---- */

#define ROUTE(verb, name, function, ...) {.path = "/sdapi/v1/" name, .method = verb, .answer = function, .surface = &surface_sdapi, __VA_ARGS__}
#define LIST(name) {.path = "/sdapi/v1/" name, .method = "GET", .answer = answer_list, .surface = &surface_sdapi}

const struct route sdapi_routes[] = {
    ROUTE("POST", "txt2img", answer_images, .body = BODY_JSON, .drawing = &txt2img),
    ROUTE("POST", "img2img", answer_images, .body = BODY_JSON, .takes_files = 1, .drawing = &img2img),
    ROUTE("GET", "progress", answer_progress, .body = BODY_NONE),
    ROUTE("POST", "interrupt", answer_interrupt, .body = BODY_NONE),
    ROUTE("POST", "skip", answer_skip, .body = BODY_NONE),
    LIST("options"),
    ROUTE("POST", "options", answer_set_options, .body = BODY_JSON),
    ROUTE("POST", "refresh-checkpoints", answer_refresh, .body = BODY_NONE),
    ROUTE("POST", "refresh-loras", answer_refresh, .body = BODY_NONE),
    ROUTE("POST", "refresh-vae", answer_refresh, .body = BODY_NONE),
    ROUTE("POST", "refresh-embeddings", answer_refresh, .body = BODY_NONE),
    ROUTE("POST", "interrogate", answer_absent, .body = BODY_NONE, .takes_files = 1),
    ROUTE("POST", "extra-single-image", answer_absent, .body = BODY_NONE, .takes_files = 1),
    ROUTE("POST", "extra-batch-images", answer_absent, .body = BODY_NONE, .takes_files = 1),
    ROUTE("GET", "system-info/status", answer_status, .body = BODY_NONE),
    {.path = "/queue/status", .method = "GET", .answer = answer_queue, .surface = &surface_sdapi},
    ROUTE("POST", "png-info", answer_png_info, .body = BODY_JSON, .takes_files = 1),
    LIST("sd-models"),
    LIST("samplers"),
    LIST("schedulers"),
    LIST("loras"),
    LIST("upscalers"),
    LIST("latent-upscale-modes"),
    LIST("sd-vae"),
    LIST("sd-modules"),
    LIST("embeddings"),
    LIST("hypernetworks"),
    LIST("face-restorers"),
    LIST("realesrgan-models"),
    LIST("prompt-styles"),
    LIST("scripts"),
    LIST("script-info"),
    LIST("extensions"),
    LIST("cmd-flags"),
    LIST("memory"),
};

const int sdapi_n_routes = sizeof sdapi_routes / sizeof *sdapi_routes;
