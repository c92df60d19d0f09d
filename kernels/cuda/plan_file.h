/*
 * plan_file.h - finished plans, and the choices of engines behind them, on disk: a server that starts again does not compile them again (an
 * attention takes a second), and `safelight compile` makes them before there is a server.
 *
 * One file for each, in a folder of the server's own: its name is a hash of what the plan is for (device, library version, shape), which is
 * also in the file and compared, with a checksum over the text. A file that is missing, short, damaged or another's is as good as none: the
 * plan is compiled and written anew. Written beside its place and renamed, so that two servers may share a folder.
 *
 * Callers: vendor_dnn.c. Threads: any; no state.
 */
#ifndef SAFELIGHT_KERNELS_CUDA_PLAN_FILE_H
#define SAFELIGHT_KERNELS_CUDA_PLAN_FILE_H

#include <stddef.h>

enum { PLAN_FILE_KEY = 1024 /* bytes of a key at most */, PLAN_FILE_MOST = 16 << 20 /* bytes of a text */ };

/* The text of the plan for key (n bytes), freed by the caller, or NULL. */
char *plan_file_read(const char *folder, const void *key, size_t key_bytes, size_t *n);
/* Whether it was written; nothing is left behind where it was not. */
int plan_file_write(const char *folder, const void *key, size_t key_bytes, const char *text, size_t n);

#endif
