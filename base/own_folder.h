/*
 * own_folder.h - where the running program lies: what belongs to it is found from there, in a checkout, an image or wherever it was copied to.
 *
 * Called by kernels/find.c and server/gpu_file.c. Threads: any; no state.
 */
#ifndef SAFELIGHT_BASE_OWN_FOLDER_H
#define SAFELIGHT_BASE_OWN_FOLDER_H

#include <stddef.h>

#include "base/err.h"

/* The folder of the program's file, links resolved, without a slash at its end. E_DEVICE when the system does not say. */
MUST_CHECK int own_folder(char *path, size_t size, struct err *e);

#endif
