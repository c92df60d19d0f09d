/*
 * request.c - see request.h. Called by the decoders after a failure, and by server/job.c. Threads: plain data.
 */
#include "proto/request.h"

#include <stdlib.h>
#include <string.h>

void request_init(struct request *r, const struct request_limits *lim)
{
  r->prompt_len = r->negative_len = 0;
  r->prompt[0] = r->negative[0] = 0;
  memcpy(r->sampler, lim->default_sampler, sizeof r->sampler);
  r->karras = -1;
  r->width = r->height = 0;
  r->steps = lim->default_steps;
  r->n = 1;
  r->clip_skip = 0;
  r->guidance = lim->default_guidance;
  r->seed = 0;
  r->has_seed = 0;
  r->n_loras = 0;
  r->format = IMAGE_PNG;
  r->quality = 0;
  r->reply = REPLY_JSON;
  r->previews = 0;
  r->init = r->mask = NULL;
  r->whole = (struct request_whole){0};
  r->strength = 1;
}

void request_close(struct request *r)
{
  free(r->init);
  free(r->mask);
  free(r->whole.rgb);
  free(r->whole.mask);
  r->init = r->mask = NULL;
  r->whole = (struct request_whole){0};
}
