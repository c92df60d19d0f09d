/*
 * peer.c - see peer.h. All addresses are kept as IPv6, those of IPv4 as ::ffff:a.b.c.d.
 */
#include "server/peer.h"

#include <arpa/inet.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAPPED_BITS = 96, NET_BITS = 64 };

static void map_v4(struct in6_addr *out, const struct in_addr *a)
{
  static const unsigned char prefix[12] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff};

  memcpy(out->s6_addr, prefix, sizeof prefix);
  memcpy(out->s6_addr + sizeof prefix, a, sizeof *a);
}

/* A numeric address of n bytes. Returns its bits (32 or 128), 0 when it is none. */
static int read_address(struct in6_addr *out, const char *s, size_t n)
{
  char text[INET6_ADDRSTRLEN];
  struct in_addr v4;

  if (!n || n >= sizeof text)
    return 0;
  memcpy(text, s, n);
  text[n] = 0;
  if (inet_pton(AF_INET, text, &v4) == 1) {
    map_v4(out, &v4);
    return 32;
  }
  return inet_pton(AF_INET6, text, out) == 1 ? 128 : 0;
}

static int in_net(const struct in6_addr *a, const struct in6_addr *net, int bits)
{
  int bytes = bits / 8, rest = bits % 8;

  if (memcmp(a->s6_addr, net->s6_addr, (size_t)bytes))
    return 0;
  return !rest || ((a->s6_addr[bytes] ^ net->s6_addr[bytes]) & (0xff00 >> rest) & 0xff) == 0;
}

static int is_listed(const struct peer_list *l, const struct in6_addr *a)
{
  for (int i = 0; i < l->n; i++)
    if (in_net(a, &l->net[i], l->bits[i]))
      return 1;
  return 0;
}

static int read_one(struct peer_list *l, const char *s, size_t n, struct err *e)
{
  const char *slash = memchr(s, '/', n);
  char *end = NULL;
  long bits;
  int max;

  if (l->n == PEER_PROXIES_MAX)
    return err_field(e, E_ARG, "trusted_proxies", "trusted_proxies may have at most %d entries", PEER_PROXIES_MAX);
  max = read_address(&l->net[l->n], s, slash ? (size_t)(slash - s) : n);
  bits = slash ? strtol(slash + 1, &end, 10) : max;
  if (!max || bits < 0 || bits > max || (slash && (end == slash + 1 || end != s + n || slash[1] < '0' || slash[1] > '9')))
    return err_field(e, E_ARG, "trusted_proxies", "trusted_proxies: \"%.*s\" is not a numeric address or network such as 10.0.0.1 or 10.0.0.0/8",
                     (int)(n < 60 ? n : 60), s);
  l->bits[l->n++] = (int)bits + (max == 32 ? MAPPED_BITS : 0);
  return 0;
}

int peer_read_list(struct peer_list *l, const char *text, struct err *e)
{
  *l = (struct peer_list){.n = 0};
  while (*(text += strspn(text, " \t,"))) {
    size_t n = strcspn(text, " \t,");
    if (read_one(l, text, n, e))
      return e->code;
    text += n;
  }
  return 0;
}

/* The last address in the header that no proxy of ours has; *a, the nearest that is known, where it ends before or is not an address. */
static void believe(struct in6_addr *a, const char *forwarded, const struct peer_list *proxies)
{
  const char *end = forwarded + strlen(forwarded);

  while (end > forwarded && is_listed(proxies, a)) {
    const char *start = end, *last = end;
    struct in6_addr next;
    while (start > forwarded && start[-1] != ',')
      start--;
    end = start > forwarded ? start - 1 : forwarded;
    start += strspn(start, " \t");
    while (last > start && (last[-1] == ' ' || last[-1] == '\t'))
      last--;
    if (!read_address(&next, start, last > start ? (size_t)(last - start) : 0))
      return;
    *a = next;
  }
}

void peer_name(char out[PEER_TEXT], const struct sockaddr *sa, const char *forwarded, const struct peer_list *proxies)
{
  struct in6_addr a;
  char text[INET6_ADDRSTRLEN];

  if (sa && sa->sa_family == AF_INET) {
    map_v4(&a, &((const struct sockaddr_in *)(const void *)sa)->sin_addr);
  } else if (sa && sa->sa_family == AF_INET6) {
    a = ((const struct sockaddr_in6 *)(const void *)sa)->sin6_addr;
  } else {
    snprintf(out, PEER_TEXT, "local");
    return;
  }
  if (forwarded)
    believe(&a, forwarded, proxies);
  if (IN6_IS_ADDR_V4MAPPED(&a)) {
    inet_ntop(AF_INET, a.s6_addr + 12, text, sizeof text);
    snprintf(out, PEER_TEXT, "%s", text);
    return;
  }
  memset(a.s6_addr + NET_BITS / 8, 0, sizeof a.s6_addr - NET_BITS / 8);
  inet_ntop(AF_INET6, &a, text, sizeof text);
  snprintf(out, PEER_TEXT, "%s/%d", text, NET_BITS);
}
