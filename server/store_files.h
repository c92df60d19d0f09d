/*
 * store_files.h - the folder STATE/results: one file for each picture that was kept.
 *
 * A name is used once and never again, so that a file is either whole or named by no row of the database; nothing is ever overwritten or renamed.
 *
 * Called by store.c. Threads: the store's own; store_open's before it runs.
 */
#ifndef SAFELIGHT_SERVER_STORE_FILES_H
#define SAFELIGHT_SERVER_STORE_FILES_H

#include "server/store.h"

struct store_folder {
  int fd;
  char path[512];
};

/* Makes DIR/results when it is missing. On failure nothing is open. */
MUST_CHECK int store_folder_open(struct store_folder *f, const char *dir, struct err *e);
void store_folder_close(struct store_folder *f); /* fd -1 is fine */

/* Gives the file its name and digest and writes it durably, its entry in the folder apart. E_FULL, E_FILE: then nothing is left of it. */
MUST_CHECK int store_folder_write(struct store_folder *f, struct store_file *file, struct err *e);
/* Makes the entries durable. */
MUST_CHECK int store_folder_sync(struct store_folder *f, struct err *e);
/* Opens for reading; E_NOTFOUND when it is not there or not `bytes` long. */
MUST_CHECK int store_folder_read(struct store_folder *f, const char *name, size_t bytes, int *fd, struct err *e);
void store_folder_remove(struct store_folder *f, const char *name); /* one that is gone is fine */

/* Removes what is_known does not know; *removed: how many. is_known: 1, 0, or negative with e filled. */
MUST_CHECK int store_folder_clean(struct store_folder *f, int (*is_known)(void *arg, const char *name, struct err *e), void *arg, int *removed, struct err *e);

#endif
