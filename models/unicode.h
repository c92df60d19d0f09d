/*
 * unicode.h - what the tokenizer and the prompt parser ask of Unicode, on top of utf8proc.
 *
 * Called by tokenizer.c and prompt.c. Threads: pure functions.
 */
#ifndef SAFELIGHT_MODELS_UNICODE_H
#define SAFELIGHT_MODELS_UNICODE_H

#include <stddef.h>
#include <stdint.h>

#include "base/err.h"

/* E_ARG unless the n bytes are UTF-8 (no surrogates, no overlong forms); names the offset of the first bad byte. */
MUST_CHECK int unicode_check(const char *text, size_t n, struct err *e);

/* NFC, then lower case character by character, without context (a final sigma stays sigma). *out is malloc'ed, the caller
 * frees it; NULL after a failure. E_ARG for invalid UTF-8, E_NOMEM. Linear in n for any content. */
MUST_CHECK int unicode_normalize(const char *text, size_t n, int32_t **out, size_t *count, struct err *e);

int unicode_is_space(int32_t c);  /* property White_Space: neither U+001C to U+001F nor U+200B */
int unicode_is_letter(int32_t c); /* categories L* */
int unicode_is_number(int32_t c); /* categories N* */

#endif
