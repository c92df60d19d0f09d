/*
 * admin.h - the operator's listener: apart from the public one, on a Unix socket (or a loopback port with a token), and never on the public port.
 *
 * Who may come in: over the Unix socket the server's own user and root, by the peer's credentials, beside the socket's mode 0600; over the port whoever
 * shows the token. Everybody else gets 401, and a record in the audit log. The files of the operator's page hold no secret, and over the port they need
 * no token: the page asks for it. Over the Unix socket a browser's request is taken from that page alone, since a tunnel opens it to every page of the
 * operator's browser. One thread per connection, so that an action that takes long (they run on the loader
 * thread) holds up nobody but who asked for it.
 *
 * Called by serve.c on the main thread.
 */
#ifndef SAFELIGHT_SERVER_ADMIN_H
#define SAFELIGHT_SERVER_ADMIN_H

#include "server/audit.h"
#include "server/config.h"
#include "server/job.h"
#include "server/safety.h"

struct admin;

enum { ADMIN_VISITS = 64 /* connections at once, each with its file */ };

/* Listens as cfg->admin says; *a is NULL, without an error, when that is "off". The others outlive it. */
MUST_CHECK int admin_open(struct admin **a, const struct config *cfg, struct safety *s, struct audit *audit, struct jobs *jobs, struct err *e);
void admin_close(struct admin *a); /* takes NULL; waits for actions that are under way */
const char *admin_url(const struct admin *a); /* "unix:PATH" or "http://127.0.0.1:PORT"; "off" for NULL */

#endif
