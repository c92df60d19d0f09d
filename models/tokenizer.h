/*
 * tokenizer.h - the CLIP byte-pair tokenizer, from a checkpoint's vocab.json and merges.txt.
 *
 * Specification: transformers' CLIPTokenizerFast: NFC, whitespace runs to one space, lower case, the split pattern
 *   <|startoftext|> | <|endoftext|> | 's|'t|'re|'ve|'m|'ll|'d | \p{L}+ | \p{N} | [^\s\p{L}\p{N}]+
 * then byte-level BPE with </w> at word ends. Unicode data: utf8proc. Golden: tests/golden (tokenizer).
 *
 * Called by prompt.c and the command line. Threads: immutable after open; any thread may encode.
 */
#ifndef SAFELIGHT_MODELS_TOKENIZER_H
#define SAFELIGHT_MODELS_TOKENIZER_H

#include <stddef.h>
#include <stdint.h>

#include "base/err.h"

struct tokenizer;

/* dir holds vocab.json and merges.txt. E_FILE names the file and what is wrong. On failure *t is NULL. */
MUST_CHECK int tokenizer_open(struct tokenizer **t, const char *dir, struct err *e);
/* The same from bytes in memory (fuzzing). */
MUST_CHECK int tokenizer_open_memory(struct tokenizer **t, const char *vocab, size_t nvocab, const char *merges,
                                     size_t nmerges, struct err *e);
void tokenizer_close(struct tokenizer *t); /* takes NULL */

/* Token ids of text (n bytes of UTF-8, NUL bytes allowed), without begin and end marks. *ids is malloc'ed, the caller frees it;
 * NULL with *count 0 for an empty text. E_ARG for invalid UTF-8 (names the byte offset), E_NOMEM. */
MUST_CHECK int tokenizer_encode(const struct tokenizer *t, const char *text, size_t n, int32_t **ids, size_t *count,
                                struct err *e);

int32_t tokenizer_bos(const struct tokenizer *t);
int32_t tokenizer_eos(const struct tokenizer *t);
int32_t tokenizer_size(const struct tokenizer *t);           /* ids are 0 .. size-1 */
int32_t tokenizer_find(const struct tokenizer *t, const char *token); /* id of e.g. ",</w>", or -1 */

#endif
