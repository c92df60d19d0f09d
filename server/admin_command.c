/*
 * admin_command.c - `safelight reload` and `safelight admin ...`: the operator's requests from a shell, over the admin listener of a running server.
 *
 * Called by main.c. Threads: none. Exit status: 0 done, 1 refused or not reached (the reason on standard error), 2 wrong usage.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/buf.h"
#include "server/admin_socket.h"
#include "server/audit_db.h"
#include "server/commands.h"
#include "server/config.h"

enum { EXIT_USAGE = 2, ANSWER_MAX = 256 << 20, PIECE = 1 << 16 };

static const char usage[] =
    "usage: safelight reload                          read the safety policy again and rebuild what changed\n"
    "       safelight admin status                    adapters, generations, whether pictures can be drawn\n"
    "       safelight admin generations\n"
    "       safelight admin audit [N]                 the newest N audit records (100)\n"
    "       safelight admin load NAME PATH            take the file at PATH, inside adapter_dir, for the policy's adapter NAME\n"
    "       safelight admin upload NAME FILE          send FILE, with FILE's .manifest.json beside it if there is one\n"
    "       safelight admin activate|rollback PROFILE\n"
    "       safelight admin retire NAME               forget the file of the adapter NAME\n\n"
    "  --state DIR          the server's state folder (" CONFIG_STATE_DEFAULT "), where its socket is\n"
    "  --admin WHERE        unix:PATH, 127.0.0.1:PORT or [::1]:PORT, as the server's own option\n"
    "  --token_file FILE    the token of an admin port\n";

struct options {
  const char *state, *admin, *token_file;
  const char *word[3];
  int words;
};

static int read_options(struct options *o, int argc, char **argv)
{
  *o = (struct options){.state = CONFIG_STATE_DEFAULT, .admin = ""};
  for (int i = 1; i < argc; i++) {
    const char *value = i + 1 < argc ? argv[i + 1] : NULL;
    if (strncmp(argv[i], "--", 2)) {
      if (o->words == 3)
        return -1;
      o->word[o->words++] = argv[i];
      continue;
    }
    if (!value)
      return -1;
    if (!strcmp(argv[i], "--state"))
      o->state = value;
    else if (!strcmp(argv[i], "--admin"))
      o->admin = value;
    else if (!strcmp(argv[i], "--token_file") || !strcmp(argv[i], "--token-file"))
      o->token_file = value;
    else
      return -1;
    i++;
  }
  return 0;
}

/* ---- one exchange ---- */

/* Sends all of it, or as much as the server takes: one that refuses early stops reading and answers. */
static int send_all(int fd, const char *p, size_t n, struct err *e)
{
  while (n) {
    struct pollfd both = {.fd = fd, .events = POLLIN | POLLOUT};
    ssize_t sent;
    if (poll(&both, 1, -1) < 0 && errno != EINTR)
      return err_set(e, E_FILE, "cannot send: %s", strerror(errno));
    if (both.revents & (POLLIN | POLLHUP | POLLERR))
      return 0;
    sent = send(fd, p, n < PIECE ? n : PIECE, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent < 0 && errno != EAGAIN && errno != EINTR)
      return 0; /* the answer says why */
    if (sent > 0) {
      p += sent;
      n -= (size_t)sent;
    }
  }
  return 0;
}

static int read_all(int fd, struct buf *b, struct err *e)
{
  char piece[PIECE];
  ssize_t n;

  while ((n = recv(fd, piece, sizeof piece, 0)) > 0 || (n < 0 && errno == EINTR))
    if (n > 0 && buf_add(b, piece, (size_t)n, e))
      return e->code;
  return n < 0 && !b->len ? err_set(e, E_FILE, "the server closed the connection: %s", strerror(errno)) : 0;
}

/* The status and the start of the body of an answer that ends with the connection. */
static int split_answer(const struct buf *b, int *status, const char **body, struct err *e)
{
  const char *end = b->p ? strstr(b->p, "\r\n\r\n") : NULL;

  if (!end || strncmp(b->p, "HTTP/1.", 7) || b->len < 12)
    return err_set(e, E_FILE, "what answers there is no safelight");
  *status = (int)strtol(b->p + 9, NULL, 10);
  *body = end + 4;
  return 0;
}

/* Sends a request and prints its answer. The body may be NULL. */
static int exchange(const struct options *o, const char *method, const char *path, const char *type, const struct buf *body, struct err *e)
{
  char token[ADMIN_TOKEN_MAX + 1] = "";
  struct admin_where where;
  struct buf head, answer;
  const char *text = "";
  int fd, status = 0, r = -1;

  buf_init(&head, 4096);
  buf_init(&answer, ANSWER_MAX);
  if (admin_where_read(&where, o->admin, o->state, e) || (o->token_file && admin_token_read(token, o->token_file, e)))
    return e->code;
  fd = admin_socket_connect(&where, e);
  if (fd < 0)
    return e->code;
  if (buf_addf(&head, e, "%s %s HTTP/1.1\r\nHost: safelight\r\nConnection: close\r\n", method, path) ||
      (*token && buf_addf(&head, e, "Authorization: Bearer %s\r\n", token)) || (body && buf_addf(&head, e, "Content-Type: %s\r\n", type)) ||
      buf_addf(&head, e, "Content-Length: %zu\r\n\r\n", body ? body->len : 0) || send_all(fd, head.p, head.len, e) ||
      (body && send_all(fd, body->p, body->len, e)) || read_all(fd, &answer, e) || split_answer(&answer, &status, &text, e))
    goto out;
  fprintf(status == 200 ? stdout : stderr, "%s%s", text, *text && text[strlen(text) - 1] == '\n' ? "" : "\n");
  r = status == 200 ? 0 : 1;
out:
  close(fd);
  buf_close(&head);
  buf_close(&answer);
  return e->code ? e->code : r;
}

/* ---- uploads ---- */

static int add_file(struct buf *b, const char *path, struct err *e)
{
  char piece[PIECE];
  ssize_t n;
  int fd = open(path, O_RDONLY | O_CLOEXEC);

  if (fd < 0)
    return err_field(e, errno == ENOENT ? E_NOTFOUND : E_FILE, path, "cannot read %s: %s", path, strerror(errno));
  while ((n = read(fd, piece, sizeof piece)) > 0)
    if (buf_add(b, piece, (size_t)n, e))
      break;
  if (n < 0)
    err_field(e, E_FILE, path, "cannot read %s: %s", path, strerror(errno));
  close(fd);
  return e->code;
}

/* NAME.safetensors has NAME.manifest.json beside it. */
static void manifest_of(char *out, size_t size, const char *path)
{
  static const char ending[] = ".safetensors";
  size_t n = strlen(path), m = sizeof ending - 1;

  snprintf(out, size, "%.*s.manifest.json", (int)(n > m && !strcmp(path + n - m, ending) ? n - m : n), path);
}

static int upload(const struct options *o, const char *url, const char *path, struct err *e)
{
  static const char mark[] = "safelight-7d1c4a90b3e25f68"; /* no part holds it: one is JSON, the other is checked by its digest */
  char beside[PATH_MAX], type[128];
  struct err none = {0};
  struct buf b, manifest;
  int r;

  buf_init(&b, (size_t)16 << 30);
  buf_init(&manifest, 16 << 20);
  manifest_of(beside, sizeof beside, path);
  snprintf(type, sizeof type, "multipart/form-data; boundary=%s", mark);
  r = add_file(&manifest, beside, &none);
  if (r && r != E_NOTFOUND)
    *e = none;
  else if (!r)
    r = buf_addf(&b, e, "--%s\r\nContent-Disposition: form-data; name=\"manifest\"\r\n\r\n%s\r\n", mark, manifest.p ? manifest.p : "");
  if (!e->code && !buf_addf(&b, e, "--%s\r\nContent-Disposition: form-data; name=\"adapter\"; filename=\"adapter\"\r\n"
                                   "Content-Type: application/octet-stream\r\n\r\n", mark) &&
      !add_file(&b, path, e) && !buf_addf(&b, e, "\r\n--%s--\r\n", mark))
    r = exchange(o, "POST", url, type, &b, e);
  buf_close(&b);
  buf_close(&manifest);
  return e->code ? e->code : r;
}

/* ---- commands ---- */

static int load(const struct options *o, const char *url, const char *path, struct err *e)
{
  struct buf b;
  int r;

  buf_init(&b, 1 << 16);
  r = buf_add_str(&b, "{\"path\":", e) || audit_record_quote(&b, path, e) || buf_add_str(&b, "}", e) ? e->code : 0;
  if (!r)
    r = exchange(o, "POST", url, "application/json", &b, e);
  buf_close(&b);
  return r;
}

/* Words after `admin` to a request; EXIT_USAGE when they make none. */
static int run(const struct options *o, struct err *e)
{
  static const char ok[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-";
  const char *verb = o->words ? o->word[0] : "", *name = o->words > 1 ? o->word[1] : "", *file = o->words > 2 ? o->word[2] : NULL;
  char url[256];

  if (strlen(name) > 100 || strspn(name, ok) != strlen(name))
    return err_set(e, E_ARG, "names have letters, digits, dots, dashes and underscores alone");
  if ((!strcmp(verb, "status") || !strcmp(verb, "generations")) && o->words == 1) {
    snprintf(url, sizeof url, "/v1/admin/%s", verb);
    return exchange(o, "GET", url, NULL, NULL, e);
  }
  if (!strcmp(verb, "audit") && o->words <= 2) {
    snprintf(url, sizeof url, "/v1/admin/audit?n=%s", *name ? name : "100");
    return exchange(o, "GET", url, NULL, NULL, e);
  }
  snprintf(url, sizeof url, "/v1/admin/adapters/%s", name);
  if (!strcmp(verb, "load") && file)
    return load(o, url, file, e);
  if (!strcmp(verb, "upload") && file)
    return upload(o, url, file, e);
  if (!strcmp(verb, "retire") && o->words == 2)
    return exchange(o, "DELETE", url, NULL, NULL, e);
  if ((!strcmp(verb, "activate") || !strcmp(verb, "rollback")) && o->words == 2) {
    snprintf(url, sizeof url, "/v1/admin/profiles/%s/%s", name, verb);
    return exchange(o, "POST", url, NULL, NULL, e);
  }
  return EXIT_USAGE;
}

static int finish(int r, const struct err *e)
{
  if (e->code)
    fprintf(stderr, "safelight: %s\n", e->msg);
  if (r == EXIT_USAGE)
    fputs(usage, stderr);
  return e->code ? 1 : r;
}

int admin_main(int argc, char **argv)
{
  struct options o;
  struct err e = {0};
  int bad = read_options(&o, argc, argv);

  if (argc < 2 || !strcmp(argv[1], "--help") || !strcmp(argv[1], "-h")) {
    fputs(usage, stdout);
    return 0;
  }
  return finish(bad ? EXIT_USAGE : run(&o, &e), &e);
}

int reload_main(int argc, char **argv)
{
  struct options o;
  struct err e = {0};
  int bad = read_options(&o, argc, argv);

  if (argc > 1 && (!strcmp(argv[1], "--help") || !strcmp(argv[1], "-h"))) {
    fputs(usage, stdout);
    return 0;
  }
  return finish(bad || o.words ? EXIT_USAGE : exchange(&o, "POST", "/v1/admin/reload", NULL, NULL, &e), &e);
}
