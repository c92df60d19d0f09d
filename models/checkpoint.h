/*
 * checkpoint.h - where the parameters of a network come from: files in the diffusers layout, or a formula.
 *
 * A source answers "give me the tensor called NAME with this shape". A file source (one component folder: unet/,
 * text_encoder/, vae/) reads diffusion_pytorch_model.safetensors or model.safetensors, with or without .fp16 in the name, or a
 * sharded set through its *.safetensors.index.json; it knows the aliases of old checkpoints (attention blocks of the VAE named
 * query/key/value/proj_attn, text encoders with or without the "text_model." prefix). A synthetic source draws every tensor
 * from its name by the formula of tools/reference/synth.py, for benchmarks at real dimensions and for tests.
 *
 * Called by clip.c, unet.c, vae.c through generation.c. Threads: a source is not changed by reading; any thread may.
 */
#ifndef SAFELIGHT_MODELS_CHECKPOINT_H
#define SAFELIGHT_MODELS_CHECKPOINT_H

#include <stdint.h>

#include "base/err.h"
#include "kernels/tensor.h"

struct source; /* of parameters */

struct param {
  const void *data;       /* valid until param_release */
  enum dtype type;        /* F32, F16 or BF16 */
  int nd;
  int64_t shape[4];
  void *held;             /* private: heap memory, or the mapped tensor of the file held_in */
  const void *held_in;    /* private */
};

/* dir: the component folder. E_FILE when nothing readable is there; e->field names the file (or tensor). Every header is checked
 * here, values are checked by source_get. On failure *s is NULL. */
MUST_CHECK int source_open_files(struct source **s, const char *dir, struct err *e);
/* The same from one file. */
MUST_CHECK int source_open_file(struct source **s, const char *path, struct err *e);
/* Tensors of the given type drawn from their names when they are asked for (parallel with OpenMP), freed by param_release. */
MUST_CHECK int source_open_synthetic(struct source **s, enum dtype type, struct err *e);
void source_close(struct source *s); /* takes NULL */

/* The tensor `name` (new diffusers naming) of exactly this shape, 1 to 4 dimensions. A (O, I) parameter may be stored as
 * (O, I, 1, 1) and the reverse. E_FILE naming the tensor (e->field) when it is missing, has another shape or type, or holds a
 * value that is not finite. After success the caller releases p; after failure p is zeroed. data may have any alignment. */
MUST_CHECK int source_get(struct source *s, const char *name, int nd, const int64_t *shape, struct param *p, struct err *e);
/* E_FILE when a file of the source was written to since it was opened (st_unchanged). */
MUST_CHECK int source_unchanged(const struct source *s, struct err *e);
int source_has(struct source *s, const char *name); /* 1 when there, aliases included */
int source_dims(struct source *s, const char *name); /* dimensions of the tensor as stored; 0 when it is not there or made by formula */
void param_release(struct param *p);                /* takes zeroed ones; forgets mapped pages */

/* The formula for tensor `name` of this shape (torch layout), rounded to type (F32, F16 or BF16); fills all of out. Used by the
 * synthetic source and by the test that writes checkpoint files. */
void synth_fill(const char *name, int nd, const int64_t *shape, enum dtype type, void *out);

#endif
