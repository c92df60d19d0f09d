/*
 * admin_socket.c - see admin_socket.h.
 *
 * The path of a Unix socket has 107 bytes at most; state folders may be deeper. So its folder is opened first and the socket reached through
 * /proc/self/fd, whose names are short.
 */
#include "server/admin_socket.h"

#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

/* Connections that wait to be accepted. One that finds no room is told EAGAIN at once if its client does not block, as curl does not, so there is
 * room for every client that comes at the same time. */
enum { BACKLOG = 1024 };

/* ---- where ---- */

static int read_address(struct admin_where *w, const char *text, struct err *e)
{
  const char *colon = strrchr(text, ':'), *host = text;
  size_t n = colon ? (size_t)(colon - text) : 0;
  struct addrinfo hints = {.ai_flags = AI_NUMERICHOST | AI_NUMERICSERV, .ai_socktype = SOCK_STREAM}, *a = NULL;
  int is_loopback = 0;

  if (n > 2 && *host == '[' && host[n - 1] == ']') {
    host++;
    n -= 2;
  }
  if (!n || n >= sizeof w->host || strlen(colon + 1) >= sizeof w->port || !colon[1])
    return err_field(e, E_ARG, "admin", "admin must be unix:PATH, 127.0.0.1:PORT, [::1]:PORT or off, not \"%.80s\"", text);
  snprintf(w->host, sizeof w->host, "%.*s", (int)n, host);
  snprintf(w->port, sizeof w->port, "%s", colon + 1);
  if (getaddrinfo(w->host, w->port, &hints, &a))
    return err_field(e, E_ARG, "admin", "admin must be unix:PATH, 127.0.0.1:PORT, [::1]:PORT or off, not \"%.80s\"", text);
  if (a->ai_family == AF_INET)
    is_loopback = (ntohl(((struct sockaddr_in *)(void *)a->ai_addr)->sin_addr.s_addr) >> 24) == 127;
  else if (a->ai_family == AF_INET6)
    is_loopback = IN6_IS_ADDR_LOOPBACK(&((struct sockaddr_in6 *)(void *)a->ai_addr)->sin6_addr);
  freeaddrinfo(a);
  return is_loopback ? 0 : err_field(e, E_ARG, "admin", "admin may listen on this machine alone (127.0.0.1 or ::1), not on %s", w->host);
}

int admin_where_read(struct admin_where *w, const char *text, const char *state, struct err *e)
{
  int n = 0;

  *w = (struct admin_where){0};
  if (!strcmp(text, "off")) {
    w->is_off = 1;
    return 0;
  }
  w->is_unix = !*text || !strncmp(text, "unix:", 5);
  if (!w->is_unix)
    return read_address(w, text, e);
  if (*text && !text[5])
    return err_field(e, E_ARG, "admin", "admin names no path after unix:");
  n = *text ? snprintf(w->path, sizeof w->path, "%s", text + 5) : snprintf(w->path, sizeof w->path, "%s/admin.sock", state);
  return n < (int)sizeof w->path ? 0 : err_field(e, E_ARG, "admin", "the path of the admin socket is too long");
}

/* ---- the Unix socket ---- */

/* The address of path, through its folder when it is long; *folder is then an open file for the caller to close, else -1. */
static int unix_address(struct sockaddr_un *a, const char *path, int *folder, struct err *e)
{
  const char *name = strrchr(path, '/');
  char dir[PATH_MAX];

  *a = (struct sockaddr_un){.sun_family = AF_UNIX};
  *folder = -1;
  if (strlen(path) < sizeof a->sun_path) {
    memcpy(a->sun_path, path, strlen(path) + 1);
    return 0;
  }
  if (!name || strlen(name) > 64)
    return err_field(e, E_ARG, "admin", "the name of the admin socket is too long");
  snprintf(dir, sizeof dir, "%.*s", (int)(name - path), path);
  *folder = open(*dir ? dir : "/", O_PATH | O_DIRECTORY | O_CLOEXEC);
  if (*folder < 0)
    return err_field(e, E_FILE, "admin", "cannot open the folder %s: %s", dir, strerror(errno));
  snprintf(a->sun_path, sizeof a->sun_path, "/proc/self/fd/%d%.64s", *folder, name);
  return 0;
}

static int unix_try(const struct sockaddr_un *a)
{
  int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

  if (fd >= 0 && connect(fd, (const struct sockaddr *)a, sizeof *a)) {
    int why = errno;
    close(fd);
    errno = why;
    return -1;
  }
  return fd;
}

/* Removes what a killed server left: a socket that nobody listens at. Anything else stays. */
static int clear_path(const struct sockaddr_un *a, const char *path, struct err *e)
{
  struct stat st;
  int fd;

  if (lstat(a->sun_path, &st))
    return 0;
  if (!S_ISSOCK(st.st_mode))
    return err_field(e, E_ARG, "admin", "%s is there and is no socket", path);
  fd = unix_try(a);
  if (fd >= 0) {
    close(fd);
    return err_field(e, E_ARG, "admin", "another server listens at %s", path);
  }
  unlink(a->sun_path);
  return 0;
}

static int unix_listen(const char *path, struct err *e)
{
  struct sockaddr_un a;
  int folder, fd = -1;

  if (unix_address(&a, path, &folder, e))
    return -1;
  if (clear_path(&a, path, e))
    goto out;
  fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  /* Nobody can connect before listen(), so the mode is right in time whatever the umask is. */
  if (fd < 0 || bind(fd, (const struct sockaddr *)&a, sizeof a) || chmod(a.sun_path, 0600) || listen(fd, BACKLOG)) {
    err_field(e, E_FILE, "admin", "cannot listen at %s: %s", path, strerror(errno));
    if (fd >= 0)
      close(fd);
    fd = -1;
  }
out:
  if (folder >= 0)
    close(folder);
  return fd;
}

static int unix_connect(const char *path, struct err *e)
{
  struct sockaddr_un a;
  int folder, fd;

  if (unix_address(&a, path, &folder, e))
    return -1;
  fd = unix_try(&a);
  if (fd < 0)
    err_field(e, E_NOTFOUND, "admin", "no server answers at %s: %s; --state or --admin says where it is", path, strerror(errno));
  if (folder >= 0)
    close(folder);
  return fd;
}

/* ---- the port ---- */

static struct addrinfo *tcp_address(const struct admin_where *w)
{
  struct addrinfo hints = {.ai_flags = AI_NUMERICHOST | AI_NUMERICSERV, .ai_socktype = SOCK_STREAM}, *a = NULL;

  return getaddrinfo(w->host, w->port, &hints, &a) ? NULL : a;
}

static int tcp_listen(const struct admin_where *w, char *url, size_t size, struct err *e)
{
  struct addrinfo *a = tcp_address(w);
  struct sockaddr_storage got;
  socklen_t len = sizeof got;
  char port[8] = "";
  int on = 1, fd = a ? socket(a->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0) : -1;

  if (fd < 0 || setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on) || bind(fd, a->ai_addr, a->ai_addrlen) || listen(fd, BACKLOG) ||
      getsockname(fd, (struct sockaddr *)&got, &len) ||
      getnameinfo((struct sockaddr *)&got, len, NULL, 0, port, sizeof port, NI_NUMERICSERV)) {
    err_field(e, E_ARG, "admin", "cannot listen on %s port %s: %s", w->host, w->port, strerror(errno));
    if (fd >= 0)
      close(fd);
    fd = -1;
  }
  if (a)
    freeaddrinfo(a);
  snprintf(url, size, strchr(w->host, ':') ? "http://[%s]:%s" : "http://%s:%s", w->host, port);
  return fd;
}

static int tcp_connect(const struct admin_where *w, struct err *e)
{
  struct addrinfo *a = tcp_address(w);
  int fd = a ? socket(a->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0) : -1;

  if (fd < 0 || connect(fd, a->ai_addr, a->ai_addrlen)) {
    err_field(e, E_NOTFOUND, "admin", "no server answers at %s port %s: %s", w->host, w->port, strerror(errno));
    if (fd >= 0)
      close(fd);
    fd = -1;
  }
  if (a)
    freeaddrinfo(a);
  return fd;
}

int admin_socket_listen(const struct admin_where *w, char *url, size_t size, struct err *e)
{
  if (!w->is_unix)
    return tcp_listen(w, url, size, e);
  snprintf(url, size, "unix:%s", w->path);
  return unix_listen(w->path, e);
}

int admin_socket_connect(const struct admin_where *w, struct err *e)
{
  if (w->is_off) {
    err_field(e, E_ARG, "admin", "admin is off");
    return -1;
  }
  return w->is_unix ? unix_connect(w->path, e) : tcp_connect(w, e);
}

int admin_token_read(char token[ADMIN_TOKEN_MAX + 1], const char *path, struct err *e)
{
  int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  ssize_t n = 0;
  struct stat st;

  if (fd < 0)
    return err_field(e, E_ARG, "admin_token_file", "cannot read %s: %s", path, strerror(errno));
  if (fstat(fd, &st) || st.st_mode & (S_IRWXG | S_IRWXO))
    err_field(e, E_ARG, "admin_token_file", "others may read %s: chmod 600 %s", path, path);
  else if ((n = read(fd, token, ADMIN_TOKEN_MAX)) < 0)
    err_field(e, E_ARG, "admin_token_file", "cannot read %s: %s", path, strerror(errno));
  close(fd);
  if (e->code)
    return e->code;
  token[n] = 0;
  token[strcspn(token, "\r\n")] = 0;
  if (strlen(token) < ADMIN_TOKEN_MIN)
    return err_field(e, E_ARG, "admin_token_file", "the first line of %s must have at least %d bytes: `openssl rand -hex 32` makes a good one", path,
                     ADMIN_TOKEN_MIN);
  return 0;
}
