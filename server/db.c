/*
 * db.c - see db.h. Called by audit_db.c and store_db.c. Threads: the caller's.
 */
#include "server/db.h"

#include <errno.h>
#include <fcntl.h>
#include <sqlite3.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

enum { BUSY_MS = 5000 };

static int is_no_room(int number)
{
  return number == ENOSPC || number == EDQUOT || number == EFBIG;
}

/* errno of the last call that failed on the database (SQLITE_FCNTL_FILE_POINTER) or its log (SQLITE_FCNTL_JOURNAL_POINTER). */
static int last_errno(sqlite3 *sql, int which)
{
  sqlite3_file *file = NULL;
  int number = 0;

  if (sqlite3_file_control(sql, "main", which, &file) != SQLITE_OK || !file || !file->pMethods ||
      file->pMethods->xFileControl(file, SQLITE_FCNTL_LAST_ERRNO, &number) != SQLITE_OK)
    return 0;
  return number;
}

/* ENOSPC is SQLITE_FULL; what else says "no room" (a quota, a limit) comes as an error of the write. sqlite3_system_errno has forgotten it by now. */
static int is_full(sqlite3 *sql)
{
  int code = sqlite3_extended_errcode(sql);

  return code == SQLITE_FULL || (code == SQLITE_IOERR_WRITE && (is_no_room(last_errno(sql, SQLITE_FCNTL_JOURNAL_POINTER)) ||
                                                                is_no_room(last_errno(sql, SQLITE_FCNTL_FILE_POINTER))));
}

int db_fail(const struct db *d, const char *what, struct err *e)
{
  if (d->sql && is_full(d->sql))
    return err_field(e, E_FULL, d->name, "%s %s: the disk is full", what, d->path);
  return err_field(e, E_FILE, d->name, "%s %s: %s", what, d->path, d->sql ? sqlite3_errmsg(d->sql) : "out of memory");
}

int db_exec(struct db *d, const char *sql, const char *what, struct err *e)
{
  return sqlite3_exec(d->sql, sql, NULL, NULL, NULL) == SQLITE_OK ? 0 : db_fail(d, what, e);
}

int db_prepare(struct db *d, sqlite3_stmt **s, const char *sql, struct err *e)
{
  return sqlite3_prepare_v2(d->sql, sql, -1, s, NULL) == SQLITE_OK ? 0 : db_fail(d, "cannot read", e);
}

int db_run(struct db *d, sqlite3_stmt *s, struct err *e)
{
  int r = sqlite3_step(s) == SQLITE_DONE ? 0 : db_fail(d, "cannot write", e);

  sqlite3_reset(s);
  sqlite3_clear_bindings(s);
  return r;
}

int db_read_number(struct db *d, const char *sql, int64_t *value, struct err *e)
{
  sqlite3_stmt *s = NULL;
  int r = 0;

  if (db_prepare(d, &s, sql, e))
    return e->code;
  if (sqlite3_step(s) == SQLITE_ROW)
    *value = sqlite3_column_int64(s, 0);
  else
    r = db_fail(d, "cannot read", e);
  sqlite3_finalize(s);
  return r;
}

const char *db_text(sqlite3_stmt *s, int column)
{
  const char *text = (const char *)sqlite3_column_text(s, column);

  return text ? text : "";
}

void db_roll_back(struct db *d)
{
  if (sqlite3_get_autocommit(d->sql))
    return;
  sqlite3_step(d->rollback);
  sqlite3_reset(d->rollback);
}

int db_check_owner(struct db *d, int32_t application_id, struct err *e)
{
  int64_t tables = 0, id = 0;

  if (db_read_number(d, "SELECT count(*) FROM sqlite_schema", &tables, e) || db_read_number(d, "PRAGMA application_id", &id, e))
    return e->code;
  if (tables && id != application_id)
    return err_field(e, E_FILE, d->name, "%s is another program's database", d->path);
  return 0;
}

/* ---- open and close ---- */

static int open_file(struct db *d, int flags, struct err *e)
{
  if (sqlite3_open_v2(d->path, &d->sql, flags | SQLITE_OPEN_NOMUTEX | SQLITE_OPEN_EXRESCODE, NULL) != SQLITE_OK)
    return db_fail(d, "cannot open", e);
  sqlite3_busy_timeout(d->sql, BUSY_MS);
  return db_exec(d, "PRAGMA trusted_schema = OFF; PRAGMA cell_size_check = ON", "cannot open", e);
}

static int set_path(struct db *d, const char *dir, const char *name, struct err *e)
{
  *d = (struct db){.name = name};
  if ((size_t)snprintf(d->path, sizeof d->path, "%s/%s", dir, name) >= sizeof d->path)
    return err_field(e, E_ARG, "state", "the path of the state folder is too long");
  return 0;
}

int db_open_writer(struct db *d, const char *dir, const char *name, struct err *e)
{
  int fd;

  if (set_path(d, dir, name, e))
    return e->code;
  fd = open(d->path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600); /* made here for its mode, whatever the umask is */
  if (fd < 0)
    return err_field(e, is_no_room(errno) ? E_FULL : E_FILE, name, "cannot write %s: %s", d->path, strerror(errno));
  close(fd);
  if (open_file(d, SQLITE_OPEN_READWRITE, e))
    return e->code;
  return db_exec(d, "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON", "cannot open", e);
}

int db_ready(struct db *d, struct err *e)
{
  return db_prepare(d, &d->rollback, "ROLLBACK", e);
}

int db_open_reader(struct db *d, const char *dir, const char *name, struct err *e)
{
  if (set_path(d, dir, name, e))
    return e->code;
  if (access(d->path, F_OK))
    return err_field(e, E_NOTFOUND, name, "cannot open %s: %s", d->path, strerror(errno));
  return open_file(d, SQLITE_OPEN_READONLY, e);
}

void db_close(struct db *d)
{
  sqlite3_finalize(d->rollback);
  sqlite3_close(d->sql);
  d->rollback = NULL;
  d->sql = NULL;
}
