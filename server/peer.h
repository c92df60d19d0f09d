/*
 * peer.h - whose request this is when he shows no key: his address, also behind the operator's own proxies.
 *
 * A forwarded address is believed only when the connection comes from an address on the operator's list, and then it is the last one in X-Forwarded-For that
 * is not itself on the list: what stands before it was written by the client. One host has 2^64 addresses in IPv6, so those count by their /64.
 *
 * Called by http.c, serve.c (reading the list). Threads: pure functions; the list is read-only once read.
 */
#ifndef SAFELIGHT_SERVER_PEER_H
#define SAFELIGHT_SERVER_PEER_H

#include <netinet/in.h>
#include <sys/socket.h>

#include "base/err.h"

enum { PEER_TEXT = 64, PEER_PROXIES_MAX = 16 };

struct peer_list {
  struct in6_addr net[PEER_PROXIES_MAX]; /* IPv4 mapped */
  int bits[PEER_PROXIES_MAX];
  int n;
};

/* "10.0.0.1, 172.16.0.0/12 fd00::/8": numeric addresses and networks, between commas or spaces; "" is none. E_ARG names what is wrong. */
MUST_CHECK int peer_read_list(struct peer_list *l, const char *text, struct err *e);
/* The address to count by as text, "10.1.2.3" or "2001:db8:1:2::/64". forwarded: the X-Forwarded-For header, NULL: none. What is no address of the
 * internet (a Unix socket) is "local". */
void peer_name(char out[PEER_TEXT], const struct sockaddr *a, const char *forwarded, const struct peer_list *proxies);

#endif
