/*
 * config_read.h - a JSON object whose keys are taken one by one, with types and bounds checked.
 *
 * A key that was taken is gone; what is left at the end was not understood (config_done). The first failure sticks: later calls
 * return their default, and config_done reports it. Messages name the file, the key, the value and what would do; err.field is
 * the key, or the file when it is not one JSON object.
 *
 * Called by config.c only. Threads: a reader belongs to its caller.
 */
#ifndef SAFELIGHT_MODELS_CONFIG_READ_H
#define SAFELIGHT_MODELS_CONFIG_READ_H

#include <jansson.h>

#include "base/err.h"

struct config_reader {
  json_t *root;
  const char *file;
  struct err *e;
  int code;
};

/* Parses n bytes: one JSON object, no duplicate keys. E_FILE. After success or failure config_close is due. */
MUST_CHECK int config_open(struct config_reader *r, const char *text, size_t n, const char *file, struct err *e);
void config_close(struct config_reader *r);

/* Missing keys have the default; null is not missing unless it is said so. */
int config_int(struct config_reader *r, const char *key, int def, int lo, int hi);
int config_int_or_null(struct config_reader *r, const char *key, int def, int lo, int hi); /* null means def */
double config_real(struct config_reader *r, const char *key, double def, double lo, double hi); /* null means def */
int config_bool(struct config_reader *r, const char *key, int def);
/* One integer for all n entries, or a list of exactly n. */
void config_ints(struct config_reader *r, const char *key, int n, int *out, int def, int lo, int hi);
/* A list of 1..max integers; returns how many (0 after a failure). Missing: n_def entries of def. */
int config_list(struct config_reader *r, const char *key, int *out, int max, const int *def, int n_def, int lo, int hi);
/* The index of the string (or of "null", or a number or boolean in its JSON spelling) in choices, which are separated by '|'.
 * Missing: def. */
int config_choice(struct config_reader *r, const char *key, const char *choices, int def);
/* The same for a list of n strings; missing: out keeps what it holds. */
void config_choices(struct config_reader *r, const char *key, const char *choices, int n, int *out);
/* Refuses any value that is not among the choices: an option that these networks have in one form only. */
void config_only(struct config_reader *r, const char *key, const char *choices);
/* The place of text among the choices, or -1. */
int config_find_choice(const char *choices, const char *text);
/* Takes keys, separated by '|', that cannot change a picture. */
void config_ignore(struct config_reader *r, const char *keys);
/* Records that key's value does not do, unless something failed before. */
void config_refuse(struct config_reader *r, const char *key, const char *why);
/* When strict, refuses keys that are left, except null, false and names with a leading underscore. 0 or the first failure. */
MUST_CHECK int config_done(struct config_reader *r, int strict);

#endif
