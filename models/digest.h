/*
 * digest.h - which weights are these? One digest over every byte of a checkpoint's weight and config files.
 *
 * Two fine-tunes of one architecture have equal headers and sizes, so nothing short of all bytes tells them apart. Files are
 * hashed in chunks of 4 MiB, in parallel (BLAKE2b-256 each), and the chunk hashes with the names and sizes once more.
 *
 * Called by model.c, compose.c. Threads: uses OpenMP while it runs; no state.
 */
#ifndef SAFELIGHT_MODELS_DIGEST_H
#define SAFELIGHT_MODELS_DIGEST_H

#include "base/err.h"

/* 64 hexadecimal digits over *.json, *.txt and *.safetensors in dir's component folders (text_encoder, tokenizer, unet, vae,
 * scheduler) and model_index.json, in name order. E_FILE names a file that cannot be read. */
MUST_CHECK int digest_model(char out[65], const char *dir, struct err *e);

/* The digest of a short text, in the domain `what`: for what has a name and no bytes. */
MUST_CHECK int digest_text(char out[65], const char *what, const char *text, struct err *e);

#endif
