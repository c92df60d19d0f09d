/*
 * activations.h - the number format that the operator chose for activations (option `activations`), towards backends.
 *
 * A backend gives what it can and says what that was; anything but what was asked for by name is refused, since pictures and memory depend on it.
 *
 * Called by device_load.c. Threads: any; no state.
 */
#ifndef SAFELIGHT_SERVER_ACTIVATIONS_H
#define SAFELIGHT_SERVER_ACTIVATIONS_H

#include "kernels/backend.h"

/* word: auto, bf16, fp16 or fp32; config.c lets no other through. */
void activations_ask(struct be_config *bc, const char *word);
/* After be_open with that: E_ARG with the field "activations" when be computes in something else. */
MUST_CHECK int activations_check(const struct be *be, const char *word, struct err *e);

#endif
