/*
 * admin.c - see admin.h. Beside http.c the only file that includes <microhttpd.h>.
 *
 * One request is one struct visit. Limits: ADMIN_VISITS connections at once, HEADER_BYTES of headers, JSON_BYTES of JSON, admin_upload_mb of one upload at a
 * time. libmicrohttpd's own timeout is off: it would count the time that an action takes. watch.c keeps the clocks: client_s for the headers and for a JSON
 * body, and a second more for every SLOWEST_UPLOAD bytes that the client announced.
 */
#include "server/admin.h"

#include <errno.h>
#include <microhttpd.h>
#include <sodium.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "proto/openai.h"
#include "server/admin_actions.h"
#include "server/admin_socket.h"
#include "server/log.h"
#include "server/page.h"
#include "server/watch.h"

enum { HEADER_BYTES = 32 << 10, JSON_BYTES = 64 << 10, MANIFEST_BYTES = 16 << 20, ANSWER_BYTES = 128 << 20, FORM_BYTES = 64 << 10,
       SLOWEST_UPLOAD = 1 << 20, SWALLOW_MAX = 8 << 20, AUDIT_SHOWN = 100, AUDIT_SHOWN_MAX = 10000 };

struct admin {
  const struct config *cfg;
  struct safety *safety;
  struct audit *audit;
  struct jobs *jobs;
  struct admin_where where;
  char url[PATH_MAX + 8];
  unsigned char token[32];     /* BLAKE2b-256 of the token */
  struct watch watch;
  struct MHD_Daemon *daemon;
  int listen_fd;
  _Atomic int is_uploading;
};

struct visit {
  struct admin *a;
  struct MHD_Connection *connection;
  struct MHD_PostProcessor *form;
  const struct admin_route *route;
  const struct page_file *page; /* it asks for this file of the page */
  struct admin_request q;
  char id[32], method[12], path[128], who[32];
  int64_t start_ns;
  size_t swallowed;
  int holds_upload, status;
  char allow[ADMIN_ALLOW];
  struct err err;
};

static int64_t from_now(int64_t seconds)
{
  return clock_ns() + seconds * 1000000000;
}

static int connection_entry(struct MHD_Connection *c)
{
  const union MHD_ConnectionInfo *info = MHD_get_connection_info(c, MHD_CONNECTION_INFO_SOCKET_CONTEXT);

  return info && info->socket_context ? (int)(intptr_t)info->socket_context - 1 : -1;
}

static const char *header(struct visit *v, const char *name)
{
  return MHD_lookup_connection_value(v->connection, MHD_HEADER_KIND, name);
}

/* ---- who is it ---- */

static int check_peer(struct visit *v)
{
  const union MHD_ConnectionInfo *info = MHD_get_connection_info(v->connection, MHD_CONNECTION_INFO_CONNECTION_FD);
  struct ucred peer;
  socklen_t len = sizeof peer;

  if (!info || getsockopt(info->connect_fd, SOL_SOCKET, SO_PEERCRED, &peer, &len) || len != sizeof peer)
    return err_set(&v->err, E_AUTH, "the peer of the admin socket is unknown");
  snprintf(v->who, sizeof v->who, "uid %lu", (unsigned long)peer.uid);
  if (peer.uid && peer.uid != geteuid())
    return err_set(&v->err, E_AUTH, "%s may not use the admin socket", v->who);
  return 0;
}

/* Whether a name is this machine's, or one that no name server outside knows (it has no dot): not a name that somebody pointed here. */
static int is_local_name(const char *host)
{
  size_t n = *host == '[' ? strcspn(host, "]") + 1 : strcspn(host, ":");

  return !strncmp(host, "127.", 4) || (n == 5 && !strncmp(host, "[::1]", 5)) || (*host != '[' && !memchr(host, '.', n));
}

/* The socket asks for no token, so whoever can make a browser send a request through a tunnel to it could act as the operator: browsers say whose page
 * it was. */
static int check_site(struct visit *v)
{
  const char *origin = header(v, MHD_HTTP_HEADER_ORIGIN), *host = header(v, MHD_HTTP_HEADER_HOST);

  if (host && !is_local_name(host))
    return err_set(&v->err, E_AUTH, "the admin socket is not called %.100s; open it as localhost", host);
  if (origin && (!host || strncmp(origin, "http://", 7) || strcmp(origin + 7, host)))
    return err_set(&v->err, E_AUTH, "a page of %.100s may not use the admin socket", origin);
  return 0;
}

static void hash_token(unsigned char out[32], const char *token)
{
  crypto_generichash(out, 32, (const unsigned char *)token, strlen(token), NULL, 0);
}

static int check_token(struct visit *v)
{
  const char *auth = header(v, MHD_HTTP_HEADER_AUTHORIZATION);
  unsigned char hash[32];

  snprintf(v->who, sizeof v->who, "nobody");
  if (!auth || strncasecmp(auth, "Bearer ", 7))
    return err_set(&v->err, E_AUTH, "the admin port wants Authorization: Bearer and the token of admin_token_file");
  hash_token(hash, auth + 7);
  if (sodium_memcmp(hash, v->a->token, sizeof hash))
    return err_set(&v->err, E_AUTH, "this is not the token of admin_token_file");
  snprintf(v->who, sizeof v->who, "token");
  return 0;
}

/* Strangers are written down. */
static void record_stranger(struct visit *v)
{
  char reason[512];
  struct audit_record r = {.kind = AUDIT_ADMIN, .request_id = v->id, .verdict = "refused", .reason = reason};
  struct err ignored = {0};

  snprintf(reason, sizeof reason, "%s %s by %s: %.200s", v->method, v->path, v->who, v->err.msg);
  if (audit_note(v->a->audit, &r, &ignored))
    log_event("admin: a refusal could not be written down: %s", ignored.msg);
}

/* ---- answers ---- */

static enum MHD_Result send_bytes(struct visit *v, int status, const char *type, struct buf *b)
{
  size_t len;
  char *p = buf_take(b, &len);
  struct MHD_Response *r = MHD_create_response_from_buffer(len, p, MHD_RESPMEM_MUST_FREE);
  enum MHD_Result ret;

  if (!r) {
    free(p);
    return MHD_NO;
  }
  v->status = status;
  (void)MHD_add_response_header(r, MHD_HTTP_HEADER_CONTENT_TYPE, type);
  (void)MHD_add_response_header(r, MHD_HTTP_HEADER_CACHE_CONTROL, "no-store");
  (void)MHD_add_response_header(r, "x-request-id", v->id);
  if (*v->allow)
    (void)MHD_add_response_header(r, MHD_HTTP_HEADER_ALLOW, v->allow);
  if (status == 401)
    (void)MHD_add_response_header(r, MHD_HTTP_HEADER_WWW_AUTHENTICATE, "Bearer");
  watch_phase(&v->a->watch, connection_entry(v->connection), WATCH_SENDING, from_now(v->a->cfg->client_s));
  ret = MHD_queue_response(v->connection, (unsigned)status, r);
  MHD_destroy_response(r);
  return ret;
}

static enum MHD_Result send_error(struct visit *v)
{
  struct err what = v->err, e = {0};
  struct buf b;

  if (what.code == E_FILE)
    what.code = E_ARG; /* the file that the operator named is bad: his to change */
  buf_init(&b, FORM_BYTES);
  if (openai_encode_error(&b, &what, &e)) {
    buf_close(&b);
    return MHD_NO;
  }
  return send_bytes(v, openai_status(what.code), "application/json", &b);
}

static enum MHD_Result send_page(struct visit *v)
{
  const struct page_file *f = v->page;
  const char *seen = header(v, MHD_HTTP_HEADER_IF_NONE_MATCH);
  int same = seen && !strcmp(seen, f->etag);
  struct MHD_Response *r = MHD_create_response_from_buffer(same ? 0 : f->len, (void *)(uintptr_t)f->data, MHD_RESPMEM_PERSISTENT);
  enum MHD_Result ret;

  if (!r)
    return MHD_NO;
  v->status = same ? 304 : 200;
  (void)MHD_add_response_header(r, MHD_HTTP_HEADER_CONTENT_TYPE, page_type(f));
  (void)MHD_add_response_header(r, MHD_HTTP_HEADER_ETAG, f->etag);
  (void)MHD_add_response_header(r, MHD_HTTP_HEADER_CACHE_CONTROL, "no-cache");
  (void)MHD_add_response_header(r, "Content-Security-Policy", PAGE_POLICY);
  (void)MHD_add_response_header(r, "Referrer-Policy", "no-referrer");
  (void)MHD_add_response_header(r, "X-Content-Type-Options", "nosniff");
  if (!v->a->where.is_unix)
    (void)MHD_add_response_header(r, MHD_HTTP_HEADER_WWW_AUTHENTICATE, "Bearer"); /* tells the page to ask for the token */
  watch_phase(&v->a->watch, connection_entry(v->connection), WATCH_SENDING, from_now(v->a->cfg->client_s));
  ret = MHD_queue_response(v->connection, (unsigned)v->status, r);
  MHD_destroy_response(r);
  return ret;
}

/* ---- bodies ---- */

/* Takes the right to upload: one at a time, since each may be large. */
static void take_upload(struct visit *v)
{
  int no = 0;

  v->holds_upload = atomic_compare_exchange_strong(&v->a->is_uploading, &no, 1);
  if (!v->holds_upload)
    err_set(&v->err, E_BUSY, "another adapter is being uploaded");
  else
    buf_init(&v->q.body, (size_t)v->a->cfg->admin_upload_mb << 20);
}

static int is_type(const char *have, const char *want)
{
  size_t n = strlen(want);

  return !strncasecmp(have, want, n) && strchr(" \t;", have[n]); /* strchr finds the NUL too */
}

static enum MHD_Result on_part(void *cls, enum MHD_ValueKind kind, const char *key, const char *filename, const char *type, const char *coding,
                               const char *data, uint64_t off, size_t size)
{
  struct visit *v = cls;

  (void)kind, (void)filename, (void)type, (void)coding, (void)off;
  if (v->err.code)
    return MHD_YES;
  if (!strcmp(key, "adapter"))
    return buf_add(&v->q.body, data, size, &v->err) ? MHD_NO : MHD_YES;
  if (!strcmp(key, "manifest"))
    return buf_add(&v->q.manifest, data, size, &v->err) ? MHD_NO : MHD_YES;
  err_field(&v->err, E_ARG, key, "the form has a part \"%.60s\"; it may have adapter and manifest", key);
  return MHD_NO;
}

/* What kind of body the headers announce, against what the route takes. */
static void expect_body(struct visit *v)
{
  const char *type = header(v, MHD_HTTP_HEADER_CONTENT_TYPE), *coding = header(v, MHD_HTTP_HEADER_CONTENT_ENCODING);
  const char *length = header(v, MHD_HTTP_HEADER_CONTENT_LENGTH);
  int is_json = type && is_type(type, "application/json");

  buf_init(&v->q.body, JSON_BYTES);
  if (v->route->body == BODY_NONE)
    return;
  if (coding && strcasecmp(coding, "identity")) {
    err_set(&v->err, E_TYPE, "send the body without Content-Encoding");
  } else if (is_json) {
    /* as it is */
  } else if (v->route->body == BODY_ADAPTER && type && is_type(type, "application/octet-stream")) {
    v->q.is_upload = 1;
    take_upload(v);
  } else if (v->route->body == BODY_ADAPTER && type && is_type(type, "multipart/form-data")) {
    v->q.is_upload = 1;
    take_upload(v);
    v->form = MHD_create_post_processor(v->connection, FORM_BYTES, on_part, v);
    if (!v->form && !v->err.code)
      err_set(&v->err, E_ARG, "the form has no boundary");
  } else {
    err_set(&v->err, E_TYPE, v->route->body == BODY_JSON ? "send the body as Content-Type: application/json"
                                                         : "send application/json with a path, the file itself as application/octet-stream, or a "
                                                           "multipart/form-data form with the parts adapter and manifest");
  }
  if (!v->err.code && length && strtoull(length, NULL, 10) > v->q.body.max + (v->form ? MANIFEST_BYTES : 0))
    err_set(&v->err, E_TOOBIG, "the body may have at most %zu bytes", v->q.body.max);
  if (!v->err.code && length)
    watch_phase(&v->a->watch, connection_entry(v->connection), WATCH_READING,
                from_now(v->a->cfg->client_s + (int64_t)(strtoull(length, NULL, 10) / SLOWEST_UPLOAD)));
}

static enum MHD_Result take_body(struct visit *v, const char *data, size_t *len)
{
  size_t n = *len;

  *len = 0;
  if (!v->err.code) {
    if (v->form && MHD_post_process(v->form, data, n) != MHD_YES && !v->err.code)
      err_set(&v->err, E_ARG, "the form cannot be read");
    else if (!v->form)
      (void)!buf_add(&v->q.body, data, n, &v->err);
    return MHD_YES;
  }
  v->swallowed += n;
  return v->swallowed > SWALLOW_MAX ? MHD_NO : MHD_YES;
}

/* ---- the way of a request ---- */

static void printable(char *out, size_t size, const char *s)
{
  size_t i;

  for (i = 0; s[i] && i + 1 < size; i++)
    out[i] = s[i] > ' ' && s[i] < 0x7f ? s[i] : '?';
  out[i] = 0;
}

static void read_count(struct visit *v)
{
  const char *n = MHD_lookup_connection_value(v->connection, MHD_GET_ARGUMENT_KIND, "n");
  char *end = NULL;
  long value = n ? strtol(n, &end, 10) : AUDIT_SHOWN;

  if (n && (end == n || *end || value < 1 || value > AUDIT_SHOWN_MAX))
    err_field(&v->err, E_ARG, "n", "n must be a whole number between 1 and %d", AUDIT_SHOWN_MAX);
  else
    v->q.n = (int)value;
}

/* The headers are in: who is it, where to, and may this body come. */
static enum MHD_Result begin(struct admin *a, struct MHD_Connection *c, const char *url, const char *method, void **cls)
{
  struct visit *v = calloc(1, sizeof *v);
  unsigned char random[8];
  const char *expect, *length;

  if (!v)
    return MHD_NO;
  *cls = v;
  v->a = a;
  v->connection = c;
  v->start_ns = clock_ns();
  v->q = (struct admin_request){.safety = a->safety, .audit = a->audit, .jobs = a->jobs, .cfg = a->cfg, .path = v->path, .who = v->who, .id = v->id};
  buf_init(&v->q.body, JSON_BYTES);
  buf_init(&v->q.manifest, MANIFEST_BYTES);
  buf_init(&v->q.out, ANSWER_BYTES);
  randombytes_buf(random, sizeof random);
  memcpy(v->id, "adm_", 4);
  sodium_bin2hex(v->id + 4, sizeof v->id - 4, random, sizeof random);
  printable(v->method, sizeof v->method, method);
  printable(v->path, sizeof v->path, url);
  expect = header(v, MHD_HTTP_HEADER_EXPECT);
  length = header(v, MHD_HTTP_HEADER_CONTENT_LENGTH);
  if (!strcmp(method, "GET") || !strcmp(method, "HEAD"))
    v->page = page_find(PAGE_OPERATOR, url);
  if (a->where.is_unix ? check_peer(v) || check_site(v) : !v->page && check_token(v)) {
    record_stranger(v);
    return send_error(v); /* nothing that a stranger sends is read */
  }
  if (v->page)
    return MHD_YES;
  v->route = admin_route_find(&v->q, method, url, v->allow);
  if (v->route)
    v->allow[0] = 0;
  if (!v->route && *v->allow)
    err_set(&v->err, E_METHOD, "%s does not take %s; it takes %s", v->path, v->method, v->allow);
  else if (!v->route)
    err_set(&v->err, E_NOTFOUND, "there is nothing at %s", v->path);
  else
    read_count(v);
  if (v->route && !v->err.code)
    expect_body(v);
  /* A short body is read to its end, so that the client sees the answer instead of a reset connection. */
  if (v->err.code && (expect || !length || strtoull(length, NULL, 10) > SWALLOW_MAX))
    return send_error(v);
  return MHD_YES;
}

static enum MHD_Result act(struct visit *v)
{
  const char *type;

  if (v->form && MHD_destroy_post_processor(v->form) != MHD_YES)
    err_set(&v->err, E_ARG, "the form ends in the middle");
  v->form = NULL;
  if (!v->err.code && v->q.is_upload && !v->q.body.len)
    err_field(&v->err, E_ARG, "adapter", "the upload holds no adapter");
  if (!v->err.code && v->route->body == BODY_NONE && v->q.body.len && strcmp(v->q.body.p, "{}"))
    err_set(&v->err, E_ARG, "%s takes no body", v->path);
  if (!v->err.code) {
    watch_phase(&v->a->watch, connection_entry(v->connection), WATCH_READING, INT64_MAX); /* it takes as long as it takes */
    (void)!admin_act(v->route, &v->q, &v->err);
  }
  if (v->err.code)
    return send_error(v);
  type = v->q.is_text ? "text/plain; charset=utf-8" : "application/json";
  return send_bytes(v, 200, type, &v->q.out);
}

static enum MHD_Result handle(void *cls, struct MHD_Connection *c, const char *url, const char *method, const char *version, const char *data,
                              size_t *len, void **con_cls)
{
  struct visit *v = *con_cls;

  (void)version;
  thread_self = THREAD_ADMIN;
  if (!v)
    return begin(cls, c, url, method, con_cls);
  if (v->status) { /* answered already */
    *len = 0;
    return MHD_YES;
  }
  return *len ? take_body(v, data, len) : v->err.code ? send_error(v) : v->page ? send_page(v) : act(v);
}

/* ---- what libmicrohttpd tells about connections ---- */

static void on_connection(void *cls, struct MHD_Connection *c, void **ctx, enum MHD_ConnectionNotificationCode what)
{
  struct admin *a = cls;
  const union MHD_ConnectionInfo *info;

  if (what != MHD_CONNECTION_NOTIFY_STARTED) {
    watch_remove(&a->watch, (int)(intptr_t)*ctx - 1);
    return;
  }
  info = MHD_get_connection_info(c, MHD_CONNECTION_INFO_CONNECTION_FD);
  *ctx = (void *)(intptr_t)(watch_add(&a->watch, info->connect_fd, from_now(a->cfg->client_s)) + 1);
}

static void on_completed(void *cls, struct MHD_Connection *c, void **con_cls, enum MHD_RequestTerminationCode code)
{
  struct admin *a = cls;
  struct visit *v = *con_cls;

  watch_phase(&a->watch, connection_entry(c), WATCH_IDLE, from_now(a->cfg->client_s));
  if (!v)
    return;
  *con_cls = NULL;
  if (v->status != 200 || (v->route && v->route->is_change)) /* looking is not worth a line: the page looks every second */
    log_request(&(struct log_request){.id = v->id, .method = v->method, .path = v->path, .status = v->status ? v->status : 499,
                                      .error = v->err.code ? v->err.msg : code == MHD_REQUEST_TERMINATED_COMPLETED_OK ? "" : "the client went away",
                                      .total_ms = (double)(clock_ns() - v->start_ns) / 1e6});
  if (v->form)
    (void)MHD_destroy_post_processor(v->form);
  buf_close(&v->q.body);
  buf_close(&v->q.manifest);
  buf_close(&v->q.out);
  if (v->holds_upload)
    atomic_store(&a->is_uploading, 0);
  free(v);
}

static size_t keep_escapes(void *cls, struct MHD_Connection *c, char *text)
{
  (void)cls, (void)c;
  return strlen(text);
}

static void on_trouble(void *cls, const char *fmt, va_list ap)
{
  char text[256];

  (void)cls;
  vsnprintf(text, sizeof text, fmt, ap);
  text[strcspn(text, "\n")] = 0;
  log_event("admin: %s", text);
}

/* ---- open and close ---- */

static int open_token(struct admin *a, struct err *e)
{
  char token[ADMIN_TOKEN_MAX + 1];
  const char *file = a->cfg->admin_token_file;

  if (a->where.is_unix)
    return *file ? err_field(e, E_ARG, "admin_token_file", "admin_token_file is for an admin port; a Unix socket knows its peers") : 0;
  if (!*file)
    return err_field(e, E_ARG, "admin_token_file", "an admin port needs admin_token_file: every user of this machine can reach it");
  if (admin_token_read(token, file, e))
    return e->code;
  hash_token(a->token, token);
  sodium_memzero(token, sizeof token);
  return 0;
}

static int start(struct admin *a, struct err *e)
{
  a->listen_fd = admin_socket_listen(&a->where, a->url, sizeof a->url, e);
  if (a->listen_fd < 0 || watch_open(&a->watch, NULL, ADMIN_VISITS + 4, e))
    return e->code;
  a->daemon = MHD_start_daemon(MHD_USE_POLL_INTERNAL_THREAD | MHD_USE_THREAD_PER_CONNECTION | MHD_USE_ERROR_LOG, 0, NULL, NULL, handle, a,
                               MHD_OPTION_EXTERNAL_LOGGER, on_trouble, a, MHD_OPTION_LISTEN_SOCKET, a->listen_fd, MHD_OPTION_CONNECTION_LIMIT,
                               (unsigned)ADMIN_VISITS, MHD_OPTION_CONNECTION_MEMORY_LIMIT, (size_t)HEADER_BYTES, MHD_OPTION_CONNECTION_TIMEOUT, 0u,
                               MHD_OPTION_NOTIFY_CONNECTION, on_connection, a, MHD_OPTION_UNESCAPE_CALLBACK, keep_escapes, a,
                               MHD_OPTION_NOTIFY_COMPLETED, on_completed, a, MHD_OPTION_END);
  return a->daemon ? 0 : err_set(e, E_NOMEM, "the admin listener did not start");
}

int admin_open(struct admin **out, const struct config *cfg, struct safety *s, struct audit *audit, struct jobs *jobs, struct err *e)
{
  struct admin_where where;
  struct admin *a;

  *out = NULL;
  if (admin_where_read(&where, cfg->admin, cfg->state, e))
    return e->code;
  if (where.is_off)
    return 0;
  a = calloc(1, sizeof *a);
  if (!a)
    return err_set(e, E_NOMEM, "out of memory for the admin listener");
  a->cfg = cfg;
  a->safety = s;
  a->audit = audit;
  a->jobs = jobs;
  a->where = where;
  a->listen_fd = -1;
  if (sodium_init() < 0)
    err_set(e, E_INTERNAL, "libsodium does not start");
  if (e->code || open_token(a, e) || start(a, e)) {
    admin_close(a);
    return e->code;
  }
  *out = a;
  return 0;
}

void admin_close(struct admin *a)
{
  if (!a)
    return;
  if (a->daemon)
    MHD_stop_daemon(a->daemon); /* closes the listening socket too */
  else if (a->listen_fd >= 0)
    close(a->listen_fd);
  watch_close(&a->watch);
  if (a->where.is_unix && a->listen_fd >= 0)
    unlink(a->where.path);
  free(a);
}

const char *admin_url(const struct admin *a)
{
  return a ? a->url : "off";
}
