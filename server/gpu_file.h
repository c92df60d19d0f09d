/*
 * gpu_file.h - the descriptions of GPUs that need not be there (deploy/devices), by name or by path.
 *
 * A name, such as h200, is looked for where the program was put: in share/safelight/devices beside its bin folder, as the images have it, or in
 * deploy/devices of the checkout that it was built in. Called by compile.c. Threads: any; no state.
 */
#ifndef SAFELIGHT_SERVER_GPU_FILE_H
#define SAFELIGHT_SERVER_GPU_FILE_H

#include "base/err.h"

/* The text of a description, which the caller frees; *text is NULL after failure. device: a name (letters, digits, - and _ alone), anything else is a
 * path. E_FILE when there is none, which lists the names that there are, or when it cannot be one; E_DEVICE, E_NOMEM. */
MUST_CHECK int gpu_file_read(char **text, const char *device, struct err *e);

#endif
