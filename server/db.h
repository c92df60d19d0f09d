/*
 * db.h - what the audit log and the job store have in common: how a SQLite file is opened, made durable, asked and given up on.
 *
 * WAL with synchronous=FULL: a commit returns after an fsync of the write-ahead log, so what was committed survives a crash and a power cut. Readers
 * never block the writer. A full disk (also a quota, or a limit on the size of files) is E_FULL and told apart from a damaged file, E_FILE.
 *
 * Called by audit_db.c and store_db.c, which are beside db.c the only files that include <sqlite3.h>. Threads: a struct db belongs to one thread at a
 * time; several may be open on one file, of which one writes.
 */
#ifndef SAFELIGHT_SERVER_DB_H
#define SAFELIGHT_SERVER_DB_H

#include <limits.h>
#include <stdint.h>

#include "base/err.h"

struct sqlite3;
struct sqlite3_stmt;

struct db {
  struct sqlite3 *sql;
  struct sqlite3_stmt *rollback; /* of a writer, by db_ready: to give up must not need memory */
  const char *name;              /* "audit.db": the field of errors */
  char path[PATH_MAX];
};

/* Opens DIR/NAME; name is a constant. A writer's file is made when it is missing, with mode 0600, which SQLite gives its companions too. On failure d is
 * closed by db_close all the same. */
MUST_CHECK int db_open_writer(struct db *d, const char *dir, const char *name, struct err *e);
/* A writer, once its tables are there (a change of them would make SQLite prepare statements again): afterwards db_roll_back needs no memory. */
MUST_CHECK int db_ready(struct db *d, struct err *e);
/* E_NOTFOUND when there is no file. */
MUST_CHECK int db_open_reader(struct db *d, const char *dir, const char *name, struct err *e);
void db_close(struct db *d); /* takes zeroed; every other statement is finalized */

/* E_FILE when the file is some other program's; an empty one is nobody's. The caller writes the id with its tables. */
MUST_CHECK int db_check_owner(struct db *d, int32_t application_id, struct err *e);

MUST_CHECK int db_exec(struct db *d, const char *sql, const char *what, struct err *e); /* what: "cannot write", for the sentence */
MUST_CHECK int db_prepare(struct db *d, struct sqlite3_stmt **s, const char *sql, struct err *e);
MUST_CHECK int db_run(struct db *d, struct sqlite3_stmt *s, struct err *e); /* a bound statement without rows; resets it and clears its bindings */
MUST_CHECK int db_read_number(struct db *d, const char *sql, int64_t *value, struct err *e); /* one whole number that a statement gives */
const char *db_text(struct sqlite3_stmt *s, int column);  /* "" for NULL */
/* Gives up a transaction, if there still is one. After db_ready. */
void db_roll_back(struct db *d);
/* Records what SQLite says went wrong. */
int db_fail(const struct db *d, const char *what, struct err *e);

#endif
