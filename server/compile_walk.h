/*
 * compile_walk.h - everything that serving pictures of a size makes a model do, once: on a backend that takes notes, to learn what has to be compiled.
 *
 * It is the engine itself that walks (pipeline.h, batch.h, predict.h), as the daemon uses it: pictures start, step together, are decoded, begin with
 * another picture; a canary is predicted. No list of shapes is kept anywhere.
 *
 * Called by server/compile.c and tests/cudasim/test_outline.c. Threads: the one that owns the model's backend.
 */
#ifndef SAFELIGHT_SERVER_COMPILE_WALK_H
#define SAFELIGHT_SERVER_COMPILE_WALK_H

#include "models/pipeline.h"

/* Reserves the model's memory for width x height pixels and walks: passes of the UNet with every count of rows that up to `batch` pictures at once can
 * have (each has one or two), prompts of 1 to `chunks` chunks of 77 tokens, the VAE both ways. be: what the model was opened on. E_ARG names the
 * bound. */
MUST_CHECK int compile_walk_size(struct model *m, int width, int height, int batch, int chunks, struct err *e);
/* The prediction by which the canary of an adapter's manifest is verified; nothing for a model that has none. */
MUST_CHECK int compile_walk_canary(struct model *m, struct be *be, struct err *e);

#endif
