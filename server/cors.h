/*
 * cors.h - which web pages of other origins may read our answers: those that the operator lists, or all of them, or (by default) none.
 *
 * Credentials in the browser's sense (cookies) are never allowed, so that a listed origin gets nothing but what it can ask for with a key of its own. An
 * origin is compared as a whole; "null", which sandboxed pages and files share, cannot be listed.
 *
 * Called by serve.c (reading the option) and http.c. Threads: pure functions; struct cors is read-only once read.
 */
#ifndef SAFELIGHT_SERVER_CORS_H
#define SAFELIGHT_SERVER_CORS_H

#include "base/err.h"

enum { CORS_ORIGIN = 128, CORS_ORIGINS_MAX = 16, CORS_HEADERS_MAX = 1024 };

#define CORS_METHODS "GET, HEAD, POST, DELETE"
#define CORS_MAX_AGE "600"
/* What a page may read of an answer beside the simple headers. */
#define CORS_EXPOSED \
  "x-request-id, traceparent, Retry-After, retry-after-ms, Location, Server-Timing, X-Safelight-Seed, X-Safelight-Generation, " \
  "X-Safelight-Generation-Digest, X-Safelight-Profile, X-Safelight-Safety"

struct cors {
  char origin[CORS_ORIGINS_MAX][CORS_ORIGIN]; /* "https://app.example" or "http://localhost:3000" */
  int n;
  int is_any;                                 /* "*" */
};

/* "https://a.example, http://localhost:3000", between commas or spaces; "*" alone is everybody, "" nobody. E_ARG says what is wrong. */
MUST_CHECK int cors_read(struct cors *c, const char *list, struct err *e);
/* The value of Access-Control-Allow-Origin for a request from this origin (NULL: the header is not there), NULL when there is to be none. */
const char *cors_allow(const struct cors *c, const char *origin);
/* 1 when answers depend on the origin and must say Vary: Origin. */
int cors_varies(const struct cors *c);
/* Of the names in Access-Control-Request-Headers (NULL: none), those that a page may send, in out. "" when there are none. */
void cors_headers(char out[CORS_HEADERS_MAX], const char *wanted);

#endif
