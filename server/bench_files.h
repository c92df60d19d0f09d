/*
 * bench_files.h - how long a picture's file takes to write, in each format.
 *
 * Called by bench.c. Threads: none of its own.
 */
#ifndef SAFELIGHT_SERVER_BENCH_FILES_H
#define SAFELIGHT_SERVER_BENCH_FILES_H

#include "base/err.h"

/* Prints a table of milliseconds of processor time and bytes for each of the n pictures at path (PNG, JPEG, WebP); without any, for painted ones of
 * size x size pixels (0: 512): like a photograph, like a drawing, a gradient, noise. */
MUST_CHECK int bench_files(char *const *path, int n, int size, struct err *e);

#endif
