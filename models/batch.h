/*
 * batch.h - one step for many pictures at once.
 *
 * The pictures of a batch may differ in everything: size, prompt length, step, sampler, guidance, generation. The bits of a picture are the
 * same alone and in any batch, in any company, at any place. How that is kept depends on the backend (be_ops.rows_are_alone): where the bits
 * of a row never depend on the number of rows in a call, pictures of one size share one pass of the UNet; elsewhere every picture keeps a
 * pass of its own, and several passes run side by side, each on one thread of the machine.
 *
 * Called by the server's device thread and bench.c. Threads: a batch belongs to the thread that owns the model's main lane; it may start
 * helper threads, which sleep between steps. Nothing is allocated in a step once its shapes have been seen.
 */
#ifndef SAFELIGHT_MODELS_BATCH_H
#define SAFELIGHT_MODELS_BATCH_H

#include "models/pipeline.h"

enum { BATCH_MAX = 64 /* pictures */ };

struct batch;

/* What batch_open takes of the device's memory for up to max_pictures of width x height pixels, beyond what model_reserve took. */
MUST_CHECK int batch_plan_bytes(struct model *m, int width, int height, int max_pictures, size_t *bytes, struct err *e);
/* After model_reserve, for pictures up to the reserved size. max_pictures 1..BATCH_MAX is what one pass has room for; batch_step takes more and
 * then makes several. On failure *b is NULL. */
MUST_CHECK int batch_open(struct batch **b, struct model *m, int max_pictures, struct err *e);
void batch_close(struct batch *b); /* takes NULL; before the model is closed */
int batch_rows(const struct batch *b); /* of the UNet in one pass at most */

/* Other lanes compute on so many threads of the machine just now (0 after batch_open): a pass that more threads share leaves as many free for them.
 * For a processor a shared pass beside other work is slow out of all proportion, because its threads wait for each other at every op. */
void batch_leave_free(struct batch *b, int threads);

/* One step for each of n started draws that are not done; each is there once. err has n entries, which are overwritten: code 0 where the step
 * was done, else that picture has failed and must be closed, while the others live. After E_DEVICE (then in every entry) none may go on. */
void batch_step(struct batch *b, struct draw *const *d, int n, struct err *err);

#endif
