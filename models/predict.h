/*
 * predict.h - one prediction of the UNet: a latent, a timestep and a prompt, through a generation, on any lane.
 *
 * A picture's pass (pipeline.c) is planned for serving; this is the same arithmetic for those who want a single epsilon: the canary of an
 * adapter's manifest, and the calibration of a merge, which watches the layers' inputs meanwhile. It has activation memory of its own, so
 * that it may run beside the device thread on a lane of the loader.
 *
 * Called by manifest.c, merge_stats.c. Threads: a predictor belongs to the thread that owns its backend (or lane).
 */
#ifndef SAFELIGHT_MODELS_PREDICT_H
#define SAFELIGHT_MODELS_PREDICT_H

#include "models/pipeline.h"
#include "models/run.h"

struct predictor;

/* h, w: of the latents, in latent pixels. m and be outlive the predictor; be is m's backend or a lane of it. E_ARG for a model with added
 * embeddings (SDXL), whose conditioning a prompt does not give. On failure *p is NULL. */
MUST_CHECK int predictor_new(struct predictor **p, const struct model *m, struct be *be, int h, int w, struct err *e);
void predictor_free(struct predictor *p); /* takes NULL */

/* Floats of one latent: latent_channels * h * w. */
size_t predictor_count(const struct predictor *p);

/* Encodes the prompt (NUL terminated) through g; later predictor_run calls use it. observer: NULL, or sees the text encoder's layers and
 * the keys and values of the UNet. Holds a reference to g until the next predictor_prompt or predictor_free. */
MUST_CHECK int predictor_prompt(struct predictor *p, struct generation *g, const char *prompt, const struct run_observer *observer,
                                struct err *e);
/* out = UNet(latent, t, prompt) through the generation of predictor_prompt: epsilon, or v, by the model. latent and out have
 * predictor_count floats of host memory in torch's order (C, h, w) and may be the same. E_INTERNAL when a value is not finite. */
MUST_CHECK int predictor_run(struct predictor *p, const float *latent, float t, const struct run_observer *observer, float *out,
                             struct err *e);

#endif
