/*
 * write_ckpt.h - tiny checkpoints for golden tests, written when a test wants them.
 *
 * tests/golden/ckpt/NAME/ holds the configurations and the list of tensors of a checkpoint; the values are a formula
 * (models/synth.c, tools/reference/synth.py). Linked to every golden test. Threads: none.
 */
#ifndef SAFELIGHT_TESTS_WRITE_CKPT_H
#define SAFELIGHT_TESTS_WRITE_CKPT_H

#include "base/err.h"
#include "kernels/tensor.h"

struct ckpt_form {
  enum dtype type;     /* F16; F32: the same values widened; BF16: rounded from fp32 to bf16, as bf16.safetensors has it */
  int old_attention;   /* the VAE's attention as query, key, value, proj_attn with (O, I, 1, 1) weights, as before diffusers 0.15 */
  int no_text_prefix;  /* the text encoder's tensors without "text_model." */
  int shards;          /* 2 or more: that many files and an index; else one file */
};

/* Writes checkpoint `name` in diffusers layout into a fresh folder for temporary files and returns its path in dir; every file
 * beside the tensor lists is copied as it is. golden: where the goldens lie, "tests/golden" from the root of the repository.
 * form NULL: F16, new names, one file. After success the caller removes the folder with ckpt_remove; after failure there is none. */
MUST_CHECK int ckpt_write(char dir[256], const char *golden, const char *name, const struct ckpt_form *form, struct err *e);

/* Removes the folder and all in it. "" is fine. */
void ckpt_remove(const char *dir);

#endif
