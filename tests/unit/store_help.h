/*
 * store_help.h - what the tests of the job store share: a state folder, a clock that stands still, and operations in one line each.
 *
 * Called by test_store.c and test_store_faults.c. Threads: help_now is atomic, the rest belongs to the test.
 */
#ifndef SAFELIGHT_TESTS_UNIT_STORE_HELP_H
#define SAFELIGHT_TESTS_UNIT_STORE_HELP_H

#include <stdatomic.h>

#include "server/store.h"

#define HELP_DAY ((int64_t)86400000)

extern char help_dir[64];
extern _Atomic int64_t help_now;   /* what the store takes for the time, ms */

int help_setup(void **state);      /* a fresh folder, the clock at its start */
int help_teardown(void **state);
const char *help_in_dir(const char *name);
int help_sql(const char *text);    /* runs it on jobs.db behind the store's back: SQLite's code */
int help_count_results(void);      /* files in results/ */

struct store_limits help_limits(void); /* an hour, a week, 1 MB, the test's clock */
struct store *help_open(void);         /* fails the test when it does not open */

/* Each returns 0 or the code. NULL key: none. */
int help_add(struct store *s, const char *id, const char *key, const char *body, int *is_existing);
int help_start(struct store *s, const char *id);
int help_put_back(struct store *s, const char *id);
/* An op that finishes id with n files of `bytes` bytes, whose content follows from id and the file's number. The data lies in a buffer of the helper's
 * that all share. */
void help_finish_op(struct store_op *op, const char *id, int n, size_t bytes);
int help_finish(struct store *s, const char *id, int n, size_t bytes, int *is_existing);
int help_fail(struct store *s, const char *id, enum store_state state, const char *code);
/* out: the caller closes it; zeroed on failure. */
int help_find(struct store *s, const char *id, struct store_job *out);
enum store_state help_state(struct store *s, const char *id);
/* 1 when the file is there and holds what help_finish_op gave it. */
int help_holds(struct store *s, const char *name, const char *id, int n, size_t bytes);

#endif
