/*
 * files.h - bytes that must outlive a power cut: written whole, then fsync of the file, then of its folder.
 *
 * Called by safety_store.c and store_files.c. Threads: any; no state.
 */
#ifndef SAFELIGHT_SERVER_FILES_H
#define SAFELIGHT_SERVER_FILES_H

#include <stddef.h>

#include "base/err.h"

/* -1 with errno. */
MUST_CHECK int files_write_all(int fd, const void *p, size_t n);
/* The folder of this path: its entries are durable only when it is. -1 with errno. */
MUST_CHECK int files_sync_folder(const char *path);
/* A folder of mode 0700; one that is there is fine. */
MUST_CHECK int files_make_folder(const char *path, struct err *e);
/* E_FULL when errno says that there is no room, else E_FILE. */
int files_error(int number);

#endif
