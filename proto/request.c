/*
 * request.c - see request.h. Called by the decoders after a failure, and by server/job.c. Threads: plain data.
 */
#include "proto/request.h"

#include <stdlib.h>

void request_close(struct request *r)
{
  free(r->init);
  free(r->mask);
  r->init = r->mask = NULL;
}
