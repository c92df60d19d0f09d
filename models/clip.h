/*
 * clip.h - the CLIP text encoder (transformers' CLIPTextModel): token ids become the context that the UNet attends to.
 *
 * Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021; MODEL.md.
 * Called by pipeline.c. Threads: the device thread.
 */
#ifndef SAFELIGHT_MODELS_CLIP_H
#define SAFELIGHT_MODELS_CLIP_H

#include "models/config.h"
#include "models/run.h"

struct clip;

/* Adds the encoder's sites to b's generation (component "text_encoder"). On failure *clip is NULL; E_FILE names the tensor. */
MUST_CHECK int clip_new(struct clip **clip, const struct clip_config *c, struct builder *b);
void clip_free(struct clip *clip); /* takes NULL */
const struct clip_config *clip_config(const struct clip *clip);

/*
 * ids: B*T token ids (host), each in the vocabulary, T <= positions.
 * hidden (B, 1, T, D) act: after the final layer norm, the output of layer `layers - clip_skip + 1` where clip_skip is A1111's
 * number: 1 (or 0) the last layer, 2 the one before (diffusers' clip_skip=1). clip_skip <= layers.
 * pooled (B, 1, 1, D) act, or tensor_none(): the final layer norm of the *last* layer at the end mark: the first eos, or, for an
 * encoder whose config says eos_token_id 2, the first of the largest ids (as transformers does for the old CLIP configs).
 * E_ARG for ids or clip_skip out of range.
 */
MUST_CHECK int clip_forward(struct run *r, const struct clip *clip, const int32_t *ids, int clip_skip, struct tensor hidden,
                            struct tensor pooled);

#endif
