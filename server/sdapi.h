/*
 * sdapi.h - the surface of A1111: /sdapi/v1. proto/sdapi.h has the wire format.
 *
 * Called by http.c (the routes). Threads: the HTTP thread.
 */
#ifndef SAFELIGHT_SERVER_SDAPI_H
#define SAFELIGHT_SERVER_SDAPI_H

#include "server/exchange.h"

extern const struct route sdapi_routes[];
extern const int sdapi_n_routes;

#endif
