/*
 * openai.h - the OpenAI surface: what its routes make of their bodies. Called by http.c's table of routes. Threads: the HTTP thread.
 */
#ifndef SAFELIGHT_SERVER_OPENAI_H
#define SAFELIGHT_SERVER_OPENAI_H

#include "server/exchange.h"

extern const struct drawing openai_generations; /* POST /v1/images/generations */
extern const struct drawing openai_edits;       /* POST /v1/images/edits */

#endif
