/*
 * fuzz_headers.c - traceparent, X-Forwarded-For, Access-Control-Request-Headers and the options that list origins and proxies, from any bytes: no read past
 * the end, no result longer than its room, and what is accepted once is accepted again in the form that we write. Threads: none.
 *
 * links: server/trace.c server/cors.c server/peer.c base/err.c
 */
#include <arpa/inet.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "server/cors.h"
#include "server/peer.h"
#include "server/trace.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void must(int ok)
{
  if (!ok)
    abort();
}

static void try_trace(const char *text)
{
  struct trace t, u;
  char header[TRACE_HEADER + 1];

  if (!trace_parse(&t, text))
    return;
  trace_begin(&t, text);
  trace_header(header, &t);
  must(strlen(header) == TRACE_HEADER && trace_parse(&u, header) && !strcmp(u.id, t.id) && !strncmp(text + 3, t.id, TRACE_ID));
}

static void try_cors(const char *text)
{
  char out[CORS_HEADERS_MAX];
  struct err e = {0};
  struct cors c;

  cors_headers(out, text);
  must(strlen(out) < sizeof out && !strpbrk(out, "\r\n"));
  if (!cors_read(&c, text, &e))
    for (int i = 0; i < c.n; i++)
      must(cors_allow(&c, c.origin[i]) && strstr(text, c.origin[i]));
}

static void try_peer(const char *text)
{
  struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
  struct peer_list l;
  struct err e = {0};
  char name[PEER_TEXT];

  must(!peer_read_list(&l, "127.0.0.1 10.0.0.0/8", &e));
  peer_name(name, (struct sockaddr *)&a, text, &l);
  must(strlen(name) >= 3 && strlen(name) < sizeof name);
  if (!peer_read_list(&l, text, &e))
    peer_name(name, (struct sockaddr *)&a, text, &l);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
  char *text = malloc(size + 1);

  must(text != NULL);
  memcpy(text, data, size);
  text[size] = 0;
  try_trace(text);
  try_cors(text);
  try_peer(text);
  free(text);
  return 0;
}
