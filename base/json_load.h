/*
 * json_load.h - JSON texts for what must not be misread: json_loadb that fails when any memory was missing.
 *
 * jansson's lexer ignores that its buffer could not grow and goes on with the next character (lex_save, 2.14). In a process that is short of
 * memory a string of a file may so lose one: a header's metadata or a pattern then means something else and nobody knows, or, when it was a
 * backslash, an assertion ends the program.
 *
 * Called wherever JSON is read: models/, proto/. Threads: any; what ran out is kept per thread.
 */
#ifndef SAFELIGHT_BASE_JSON_LOAD_H
#define SAFELIGHT_BASE_JSON_LOAD_H

#include <jansson.h>

/* json_loadb. When memory was short at any moment: NULL, an empty e->text, and json_error_code(e) is json_error_out_of_memory. e may be NULL. */
json_t *json_load_whole(const char *text, size_t n, size_t flags, json_error_t *e);

#endif
