/*
 * admin_socket.h - where the admin listener is: a Unix socket in the state folder unless the operator says otherwise, or a loopback port with a token.
 *
 * Called by admin.c (listens) and admin_command.c (connects). Threads: plain functions.
 */
#ifndef SAFELIGHT_SERVER_ADMIN_SOCKET_H
#define SAFELIGHT_SERVER_ADMIN_SOCKET_H

#include <limits.h>
#include <stddef.h>

#include "base/err.h"

enum { ADMIN_TOKEN_MIN = 16, ADMIN_TOKEN_MAX = 512 };

struct admin_where {
  int is_off, is_unix;
  char path[PATH_MAX];       /* Unix */
  char host[64], port[8];    /* TCP: 127.0.0.0/8 or ::1 alone */
};

/* text: "" (STATE/admin.sock), "unix:PATH", "127.0.0.1:PORT", "[::1]:PORT" or "off". */
MUST_CHECK int admin_where_read(struct admin_where *w, const char *text, const char *state, struct err *e);
/* A listening socket, mode 0600 when it is a Unix one; a dead one at the path is replaced. url: how people reach it. -1 after failure. */
int admin_socket_listen(const struct admin_where *w, char *url, size_t size, struct err *e);
/* A connected socket, -1 after failure: E_NOTFOUND when nobody listens. */
int admin_socket_connect(const struct admin_where *w, struct err *e);
/* The first line of a file that nobody else may read; between ADMIN_TOKEN_MIN and ADMIN_TOKEN_MAX bytes. */
MUST_CHECK int admin_token_read(char token[ADMIN_TOKEN_MAX + 1], const char *path, struct err *e);

#endif
