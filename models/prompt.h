/*
 * prompt.h - from prompt text to chunks of 77 weighted tokens, with the rules that A1111 made common.
 *
 * (text) 1.1, [text] 1/1.1, (text:1.3), nesting multiplies, \( and \) are literal, BREAK starts a new chunk; chunks hold 75
 * tokens between begin and end marks, and a chunk may be cut at the last comma within 20 tokens. `<lora:...>` tags have no
 * meaning here: adapters are policy, never prompt.
 *
 * Called by pipeline.c. Threads: pure functions. Golden: tests/golden (prompt).
 */
#ifndef SAFELIGHT_MODELS_PROMPT_H
#define SAFELIGHT_MODELS_PROMPT_H

#include "models/tokenizer.h"

enum { PROMPT_CHUNK = 77, PROMPT_MAX_CHUNKS = 16, PROMPT_MAX_BYTES = 16384, PROMPT_MAX_WEIGHT = 100 };

struct prompt_chunk {
  int32_t ids[PROMPT_CHUNK];    /* begin, up to 75 tokens, end, then the pad token */
  float weights[PROMPT_CHUNK];  /* 1 for marks and padding */
};

struct prompt_tokens {
  struct prompt_chunk *chunk;   /* n entries, malloc'ed */
  int n;                        /* >= 1: an empty prompt is one chunk of padding */
  int is_weighted;              /* some weight differs from 1 */
  int tokens;                   /* tokens of the text itself, for usage reports */
};

/* pad: the id after the end mark (the tokenizer's pad token: the end mark itself for SD1.x, 0 = "!" for SD2.x).
 * E_ARG for invalid UTF-8 and for more than PROMPT_MAX_BYTES, PROMPT_MAX_CHUNKS or PROMPT_MAX_WEIGHT, saying the bound; E_NOMEM.
 * On success the caller ends p with prompt_tokens_close; after a failure p is zeroed. */
MUST_CHECK int prompt_tokenize(struct prompt_tokens *p, const struct tokenizer *t, const char *text, size_t n, int32_t pad,
                               struct err *e);
void prompt_tokens_close(struct prompt_tokens *p); /* takes NULL and zeroed */

/* One run of text with one weight, for tests and for the parser's golden. */
struct prompt_span {
  char *text;
  float weight;
  int is_break;
};
MUST_CHECK int prompt_parse(const char *text, size_t n, struct prompt_span **spans, size_t *count, struct err *e);
void prompt_spans_free(struct prompt_span *spans, size_t count);

#endif
