/*
 * audit.c - see audit.h: the state folder, its lock and key, and the thread that writes.
 *
 *      DIR/lock       held with flock(2) as long as a server uses the folder; its process id for people
 *      DIR/audit.key  32 random bytes, mode 0600: the key of the prompts' hashes and of the signed head
 *      DIR/audit.db   see audit_db.h
 *
 * The way of a record: the caller makes its JSON, puts an entry into the queue and waits; the writer takes all that is queued, writes it in one
 * transaction, and wakes everybody. While the disk works the next batch gathers. If the transaction fails everybody in it is told.
 *
 *      what                     who may touch it
 *      db                       the writer alone, once it runs
 *      head of line, counters   under the lock
 *      an entry                 its maker until it is queued, then the writer until is_done; a noted one is the writer's to free
 */
#include "server/audit.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <sodium.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "server/audit_db.h"
#include "server/log.h"
#include "server/metrics.h"
#include "server/thread.h"

enum { NOTES_MAX = 4096, NOTES_BYTES = 16 << 20, RECENT_MAX = 64 << 20 };

struct entry {
  struct entry *next;
  const char *kind;
  struct buf body;
  const char *profile, *digest, *members; /* of an activation; else NULL */
  int64_t number;
  int is_note, is_done;
  struct err err;
};

struct audit {
  char dir[PATH_MAX];
  int lock_fd, keep_prompts, is_running;
  unsigned char prompt_key[AUDIT_KEY], mac_key[AUDIT_KEY];
  struct audit_db *db;
  pthread_t thread;

  struct lock lock;
  pthread_cond_t work, done;
  struct entry *first, **last;
  int notes, is_stopping;
  size_t note_bytes;        /* of the notes that wait */
  struct audit_head head;
  uint64_t lost;
};

/* ---- the state folder ---- */

static int path_in(char out[PATH_MAX], const char *dir, const char *name, struct err *e)
{
  if ((size_t)snprintf(out, PATH_MAX, "%s/%s", dir, name) >= PATH_MAX)
    return err_field(e, E_ARG, "state", "the path of the state folder is too long");
  return 0;
}

static int make_dir(const char *dir, struct err *e)
{
  struct stat st;

  if (!*dir)
    return err_field(e, E_ARG, "state", "state is empty: name a folder for the audit log");
  if (mkdir(dir, 0700) && errno != EEXIST)
    return err_field(e, E_FILE, "state", "cannot make the state folder %s: %s", dir, strerror(errno));
  if (stat(dir, &st))
    return err_field(e, E_FILE, "state", "cannot read the state folder %s: %s", dir, strerror(errno));
  if (!S_ISDIR(st.st_mode))
    return err_field(e, E_FILE, "state", "%s is not a folder", dir);
  if (st.st_mode & (S_IWGRP | S_IWOTH))
    return err_field(e, E_FILE, "state", "others may write to the state folder %s: chmod 700 %s", dir, dir);
  return 0;
}

static int take_lock(int *fd, const char *dir, struct err *e)
{
  char path[PATH_MAX], pid[32] = "";
  ssize_t n;

  if (path_in(path, dir, "lock", e))
    return e->code;
  *fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
  if (*fd < 0)
    return err_field(e, E_FILE, "state", "cannot write to the state folder %s: %s", dir, strerror(errno));
  if (flock(*fd, LOCK_EX | LOCK_NB)) {
    n = read(*fd, pid, sizeof pid - 1);
    if (n > 0)
      pid[strcspn(pid, "\n")] = 0;
    return err_field(e, E_FILE, "state", "the state folder %s is in use by process %s; give each server a folder of its own (--state)", dir,
                     *pid ? pid : "(unknown)");
  }
  n = snprintf(pid, sizeof pid, "%ld\n", (long)getpid());
  if (ftruncate(*fd, 0) || write(*fd, pid, (size_t)n) != n)
    return err_field(e, E_FILE, "state", "cannot write to the state folder %s: %s", dir, strerror(errno));
  return 0;
}

/* Reads audit.key. E_NOTFOUND when there is none. */
static int read_key(const char *dir, unsigned char key[AUDIT_KEY], struct err *e)
{
  unsigned char more;
  char path[PATH_MAX];
  struct stat st;
  int fd, r = 0;

  if (path_in(path, dir, "audit.key", e))
    return e->code;
  fd = open(path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
  if (fd < 0)
    return err_field(e, errno == ENOENT ? E_NOTFOUND : E_FILE, "audit.key", "cannot read %s: %s", path, strerror(errno));
  if (fstat(fd, &st) || st.st_mode & (S_IRWXG | S_IRWXO))
    r = err_field(e, E_FILE, "audit.key", "others may read %s: chmod 600 %s", path, path);
  else if (read(fd, key, AUDIT_KEY) != AUDIT_KEY || read(fd, &more, 1) != 0)
    r = err_field(e, E_FILE, "audit.key", "%s is not %d bytes long: restore it from a backup", path, AUDIT_KEY);
  close(fd);
  return r;
}

/* Made under another name first: a key that is there is whole. */
static int make_key(const char *dir, unsigned char key[AUDIT_KEY], struct err *e)
{
  char path[PATH_MAX], temporary[PATH_MAX];
  int fd, r = 0;

  if (path_in(path, dir, "audit.key", e) || path_in(temporary, dir, "audit.key.new", e))
    return e->code;
  randombytes_buf(key, AUDIT_KEY);
  unlink(temporary);
  fd = open(temporary, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
  if (fd < 0)
    return err_field(e, E_FILE, "audit.key", "cannot write %s: %s", temporary, strerror(errno));
  if (write(fd, key, AUDIT_KEY) != AUDIT_KEY || fsync(fd) || rename(temporary, path))
    r = err_field(e, E_FILE, "audit.key", "cannot write %s: %s", path, strerror(errno));
  close(fd);
  return r;
}

static void derive_keys(struct audit *a, const unsigned char key[AUDIT_KEY])
{
  crypto_kdf_derive_from_key(a->prompt_key, AUDIT_KEY, 1, "slprompt", key);
  crypto_kdf_derive_from_key(a->mac_key, AUDIT_KEY, 2, "sl__head", key);
}

static int open_key(struct audit *a, struct err *e)
{
  unsigned char key[AUDIT_KEY];
  struct err missing = {0};
  char path[PATH_MAX];
  int r = read_key(a->dir, key, &missing);

  if (r == E_NOTFOUND) {
    if (path_in(path, a->dir, "audit.db", e))
      return e->code;
    if (!access(path, F_OK))
      return err_field(e, E_FILE, "audit.key", "%s/audit.key is missing and the audit log is there: restore it from a backup", a->dir);
    r = make_key(a->dir, key, e);
  } else if (r) {
    *e = missing;
  }
  if (!r)
    derive_keys(a, key);
  sodium_memzero(key, sizeof key);
  return r;
}

/* ---- the writer ---- */

static int write_entry(struct audit *a, struct entry *t, struct err *e)
{
  return t->profile ? audit_db_activate(a->db, t->profile, t->digest, t->members, t->body.p, &t->number, e)
                    : audit_db_append(a->db, t->kind, t->body.p, e);
}

/* One transaction for the whole line; err says how it went. */
static void write_batch(struct audit *a, struct entry *line, struct err *err)
{
  int r = audit_db_begin(a->db, err);

  for (struct entry *t = line; t && !r; t = t->next)
    r = write_entry(a, t, err);
  if (!r)
    r = audit_db_commit(a->db, err);
  if (r)
    audit_db_cancel(a->db);
}

/* Wakes or frees everybody of the line. */
static void finish_batch(struct audit *a, struct entry *line, const struct err *err)
{
  struct entry *next;
  int lost = 0;

  lock_take(&a->lock);
  audit_db_head(a->db, &a->head);
  for (struct entry *t = line; t; t = next) {
    next = t->next; /* a waiter's entry is gone once it wakes, but it wakes only when the lock is dropped */
    t->err = *err;
    t->is_done = 1;
    if (!t->is_note)
      continue;
    a->notes--;
    a->note_bytes -= t->body.len;
    lost += !!err->code;
    buf_close(&t->body);
    free(t);
  }
  a->lost += (uint64_t)lost;
  metric_add(METRIC_AUDIT_LOST, 0, (uint64_t)lost);
  pthread_cond_broadcast(&a->done);
  lock_drop(&a->lock);
  if (lost)
    log_event("audit: %d records were lost: %s", lost, err->msg);
}

static void *run(void *arg)
{
  struct audit *a = arg;
  struct entry *line;
  int stop;

  thread_self = THREAD_AUDIT;
  do {
    struct err err = {0};
    lock_take(&a->lock);
    while (!a->first && !a->is_stopping)
      lock_wait(&a->lock, &a->work);
    line = a->first;
    a->first = NULL;
    a->last = &a->first;
    stop = a->is_stopping;
    lock_drop(&a->lock);
    if (line) {
      write_batch(a, line, &err);
      finish_batch(a, line, &err);
    }
  } while (!stop || line); /* what came while the last batch was written is written too */
  return NULL;
}

/* ---- callers ---- */

static void put(struct audit *a, struct entry *t)
{
  HELD(&a->lock);
  *a->last = t;
  a->last = &t->next;
  pthread_cond_signal(&a->work);
}

/* Queues an entry and waits for its end; a failure of the file is a failure of the policy: nothing may leave that is not written down. */
static int put_and_wait(struct audit *a, struct entry *t, struct err *e)
{
  lock_take(&a->lock);
  put(a, t);
  while (!t->is_done)
    lock_wait(&a->lock, &a->done);
  lock_drop(&a->lock);
  return t->err.code ? err_field(e, E_POLICY, "audit", "the audit record could not be written: %.400s", t->err.msg) : 0;
}

static int make_body(const struct audit *a, struct buf *body, const struct audit_record *r, struct err *e)
{
  struct err why = {0};

  buf_init(body, AUDIT_JSON_MAX);
  if (!audit_record_body(body, r, a->keep_prompts ? NULL : a->prompt_key, &why))
    return 0;
  buf_close(body);
  return err_field(e, E_POLICY, "audit", "the audit record could not be made: %.400s", why.msg);
}

int audit_add(struct audit *a, const struct audit_record *r, struct err *e)
{
  struct entry t = {.kind = audit_kind_name(r->kind)};
  int code = make_body(a, &t.body, r, e);

  if (!code)
    code = put_and_wait(a, &t, e);
  buf_close(&t.body);
  return code;
}

int audit_note(struct audit *a, const struct audit_record *r, struct err *e)
{
  struct entry *t = calloc(1, sizeof *t);
  int full;

  if (!t)
    return err_field(e, E_POLICY, "audit", "out of memory for an audit record");
  t->kind = audit_kind_name(r->kind);
  t->is_note = 1;
  if (make_body(a, &t->body, r, e)) {
    free(t);
    return e->code;
  }
  lock_take(&a->lock);
  full = a->notes == NOTES_MAX || a->note_bytes + t->body.len > NOTES_BYTES;
  if (!full) {
    a->notes++;
    a->note_bytes += t->body.len;
    put(a, t);
  }
  a->lost += (uint64_t)full;
  metric_add(METRIC_AUDIT_LOST, 0, (uint64_t)full);
  lock_drop(&a->lock);
  if (!full)
    return 0;
  buf_close(&t->body);
  free(t);
  return err_field(e, E_POLICY, "audit", "too many audit records wait to be written, one more does not fit");
}

int audit_activated(struct audit *a, const char *profile, const char *generation_digest, const char *members_json, int64_t *number, struct err *e)
{
  struct audit_record r = {.kind = AUDIT_ACTIVATION, .profile = profile, .generation_digest = generation_digest, .verdict = "activated"};
  struct entry t = {.kind = audit_kind_name(AUDIT_ACTIVATION), .profile = profile, .digest = generation_digest, .members = members_json};
  struct audit_head head;
  struct err why = {0};
  int code;

  buf_init(&t.body, AUDIT_JSON_MAX / 2);
  *number = 0;
  if (buf_add_str(&t.body, ",\"members\":", &why) || audit_record_quote(&t.body, members_json, &why) || audit_record_body(&t.body, &r, NULL, &why))
    code = err_field(e, E_POLICY, "audit", "the audit record could not be made: %.400s", why.msg);
  else
    code = put_and_wait(a, &t, e);
  buf_close(&t.body);
  if (code)
    return code;
  *number = t.number;
  audit_head(a, &head);
  log_event("audit: activation %lld of profile %s is recorded; record %lld, head %s", (long long)t.number, profile, (long long)head.seq, head.hash);
  return 0;
}

void audit_head(struct audit *a, struct audit_head *head)
{
  lock_take(&a->lock);
  *head = a->head;
  lock_drop(&a->lock);
}

uint64_t audit_lost(struct audit *a)
{
  uint64_t n;

  lock_take(&a->lock);
  n = a->lost;
  lock_drop(&a->lock);
  return n;
}

/* ---- reading: each with a connection of its own, so that nobody waits for the writer ---- */

int audit_last_activation(struct audit *a, const char *profile, int64_t *number, char digest[65], char *members_json, size_t cap, struct err *e)
{
  struct audit_db *d;
  int r = audit_db_open_read(&d, a->dir, e);

  if (!r)
    r = audit_db_last_activation(d, profile, number, digest, members_json, cap, e);
  audit_db_close(d);
  return r;
}

int audit_recent(struct audit *a, int n, char **json, struct err *e)
{
  struct audit_db *d;
  struct buf out;
  size_t len;
  int r;

  *json = NULL;
  buf_init(&out, RECENT_MAX);
  r = audit_db_open_read(&d, a->dir, e);
  if (!r)
    r = audit_db_recent(d, n, &out, e);
  audit_db_close(d);
  if (!r)
    *json = buf_take(&out, &len);
  buf_close(&out);
  return r;
}

int audit_verify(const char *dir, const char *anchor, struct audit_walk *w, struct err *e)
{
  struct audit keys = {0};
  unsigned char key[AUDIT_KEY];
  struct err no_key = {0};
  struct audit_db *d;
  int has_key = !read_key(dir, key, &no_key), r;

  if (has_key)
    derive_keys(&keys, key);
  r = audit_db_open_read(&d, dir, e);
  if (!r)
    r = audit_db_walk(d, has_key ? keys.mac_key : NULL, anchor, w, e);
  audit_db_close(d);
  sodium_memzero(key, sizeof key);
  sodium_memzero(&keys, sizeof keys);
  return r;
}

/* ---- open and close ---- */

int audit_open(struct audit **out, const char *dir, int keep_prompts, struct err *e)
{
  struct audit *a = calloc(1, sizeof *a);

  *out = NULL;
  if (!a)
    return err_set(e, E_NOMEM, "out of memory for the audit log");
  a->lock_fd = -1;
  a->keep_prompts = keep_prompts;
  a->last = &a->first;
  lock_init(&a->lock, "audit");
  pthread_cond_init(&a->work, NULL);
  pthread_cond_init(&a->done, NULL);
  if (sodium_init() < 0) {
    err_set(e, E_INTERNAL, "libsodium does not start");
    goto fail;
  }
  if (strlen(dir) >= sizeof a->dir) {
    err_field(e, E_ARG, "state", "the path of the state folder is too long");
    goto fail;
  }
  memcpy(a->dir, dir, strlen(dir) + 1);
  if (make_dir(dir, e) || take_lock(&a->lock_fd, dir, e) || open_key(a, e) || audit_db_open(&a->db, dir, a->mac_key, e))
    goto fail;
  audit_db_head(a->db, &a->head);
  if (thread_start(&a->thread, "audit", run, a, e))
    goto fail;
  a->is_running = 1;
  *out = a;
  return 0;
fail:
  audit_close(a);
  return e->code;
}

void audit_close(struct audit *a)
{
  if (!a)
    return;
  if (a->is_running) {
    lock_take(&a->lock);
    a->is_stopping = 1;
    pthread_cond_signal(&a->work);
    lock_drop(&a->lock);
    pthread_join(a->thread, NULL);
    log_event("audit: closed at record %lld, head %s", (long long)a->head.seq, a->head.hash);
  }
  audit_db_close(a->db);
  if (a->lock_fd >= 0)
    close(a->lock_fd);
  pthread_cond_destroy(&a->work);
  pthread_cond_destroy(&a->done);
  lock_fini(&a->lock);
  sodium_memzero(a->prompt_key, sizeof a->prompt_key);
  sodium_memzero(a->mac_key, sizeof a->mac_key);
  free(a);
}
