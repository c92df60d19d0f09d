/*
 * openai.h - the OpenAI surface: what its routes make of their bodies. Called by http.c's table of routes. Threads: the HTTP thread.
 */
#ifndef SAFELIGHT_SERVER_OPENAI_H
#define SAFELIGHT_SERVER_OPENAI_H

#include "server/exchange.h"

extern const struct drawing openai_generations; /* POST /v1/images/generations */
extern const struct drawing openai_edits;       /* POST /v1/images/edits */

/* Encoder thread: the result of j into its body, with addresses instead of the pictures. */
MUST_CHECK int openai_encode_job(struct job *j, const struct serving *s, const char *const *url, struct err *e);

#endif
