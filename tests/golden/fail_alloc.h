/*
 * fail_alloc.h - lets the Nth allocation of the program fail, to see that nothing is lost then. Linked to every golden test, where it passes
 * everything on until it is asked to fail. Threads: the count is atomic; one test at a time arms it.
 */
#ifndef SAFELIGHT_TESTS_FAIL_ALLOC_H
#define SAFELIGHT_TESTS_FAIL_ALLOC_H

/* 0 under a sanitizer, which has taken malloc's place. */
int fail_alloc_works(void);
/* The allocation after `after` more fails, once. */
void fail_alloc_after(long after);
/* Disarms; 1 when it did fail. */
int fail_alloc_stop(void);

/* Blocks that are allocated now; always 0 under a sanitizer, which counts better. */
long fail_alloc_live(void);

#endif
