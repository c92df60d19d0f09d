/*
 * cors.c - see cors.h. Source: the Fetch standard, sections 3.2.2 and 3.2.3 (WHATWG).
 */
#include "server/cors.h"

#include <stdio.h>
#include <string.h>
#include <strings.h>

static const char token_chars[] = "!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ";

/* What clients of these APIs send. The OpenAI client in a browser adds a family of names that say on what it runs. */
static const char *const sendable[] = {"authorization", "content-type", "accept",        "idempotency-key", "x-request-id",
                                       "traceparent",   "tracestate",   "last-event-id", "cache-control",   "x-requested-with"};
static const char sdk_prefix[] = "x-stainless-";

/* An origin as browsers write it: scheme, host in lower case and port, and nothing after. */
static int is_origin(const char *s, size_t n)
{
  size_t scheme = !strncmp(s, "https://", 8) ? 8 : !strncmp(s, "http://", 7) ? 7 : 0, host, digits;

  if (!scheme || n <= scheme || n >= CORS_ORIGIN)
    return 0;
  s += scheme;
  n -= scheme;
  host = *s == '[' ? strspn(s + 1, "0123456789abcdef:.") + 2 : strspn(s, "abcdefghijklmnopqrstuvwxyz0123456789.-_");
  if (!host || host > n || (*s == '[' && (host < 4 || s[host - 1] != ']')))
    return 0;
  if (host == n)
    return 1;
  digits = strspn(s + host + 1, "0123456789");
  return s[host] == ':' && digits && digits < 6 && host + 1 + digits == n;
}

int cors_read(struct cors *c, const char *list, struct err *e)
{
  *c = (struct cors){.n = 0};
  while (*(list += strspn(list, " \t,"))) {
    size_t n = strcspn(list, " \t,");
    if (n == 1 && *list == '*')
      c->is_any = 1;
    else if (c->n == CORS_ORIGINS_MAX)
      return err_field(e, E_ARG, "cors_origins", "cors_origins may have at most %d entries", CORS_ORIGINS_MAX);
    else if (is_origin(list, n))
      snprintf(c->origin[c->n++], CORS_ORIGIN, "%.*s", (int)n, list);
    else
      return err_field(e, E_ARG, "cors_origins", "cors_origins: \"%.*s\" is not an origin such as https://app.example or http://localhost:3000, in lower "
                       "case and without a path", (int)(n < 100 ? n : 100), list);
    list += n;
  }
  if (c->is_any && c->n)
    return err_field(e, E_ARG, "cors_origins", "cors_origins is either * or a list of origins");
  return 0;
}

const char *cors_allow(const struct cors *c, const char *origin)
{
  if (!origin)
    return NULL;
  if (c->is_any)
    return "*";
  for (int i = 0; i < c->n; i++)
    if (!strcmp(c->origin[i], origin))
      return c->origin[i];
  return NULL;
}

int cors_varies(const struct cors *c)
{
  return c->n > 0;
}

static int is_sendable(const char *name, size_t n)
{
  if (n > sizeof sdk_prefix - 1 && !strncasecmp(name, sdk_prefix, sizeof sdk_prefix - 1))
    return strspn(name, token_chars) >= n;
  for (size_t i = 0; i < sizeof sendable / sizeof *sendable; i++)
    if (strlen(sendable[i]) == n && !strncasecmp(name, sendable[i], n))
      return 1;
  return 0;
}

void cors_headers(char out[CORS_HEADERS_MAX], const char *wanted)
{
  size_t at = 0;

  out[0] = 0;
  while (wanted && *(wanted += strspn(wanted, " \t,"))) {
    size_t n = strcspn(wanted, " \t,");
    if (is_sendable(wanted, n) && at + n + 3 < CORS_HEADERS_MAX)
      at += (size_t)snprintf(out + at, CORS_HEADERS_MAX - at, "%s%.*s", at ? ", " : "", (int)n, wanted);
    wanted += n;
  }
}
