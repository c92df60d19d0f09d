/*
 * condition.h - from a prompt to what the UNet attends to: tokens, text encoder, emphasis, keys and values.
 *
 * Called by subject.c (pictures) and predict.c (single predictions: canaries, calibration). Threads: condition_tokenize runs on any
 * thread; condition_fill on the one that owns the run's backend.
 */
#ifndef SAFELIGHT_MODELS_CONDITION_H
#define SAFELIGHT_MODELS_CONDITION_H

#include "models/model.h"

/* text, n bytes of UTF-8. A model without a tokenizer (synthetic weights) makes every text the same chunk. E_ARG has `field` as its field.
 * After success prompt_tokens_close is the caller's. */
MUST_CHECK int condition_tokenize(struct prompt_tokens *t, const struct model *m, const char *text, size_t n, const char *field,
                                  struct err *e);
/* Encodes the prompt through the run's generation, chunk by chunk, and fills *c (c->T == t->n * PROMPT_CHUNK). Arena memory
 * is given back. */
MUST_CHECK int condition_fill(struct run *r, const struct model *m, const struct prompt_tokens *t, int clip_skip,
                              struct unet_context *c);
/* Fixed numbers in place of an embedding that nothing here computes (SDXL's, in benchmarks). */
MUST_CHECK int condition_stand_in(struct run *r, struct tensor hidden);

#endif
