/*
 * audit_command.c - `safelight audit verify|show`: the audit log for people, with or without a running server.
 *
 * Called by main.c. Threads: none. Exit status: 0 the chain holds (or the records were shown), 1 it does not, or could not be read, 2 wrong usage.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "server/audit.h"
#include "server/audit_db.h"
#include "server/commands.h"
#include "server/config.h"

enum { EXIT_USAGE = 2, SHOW_DEFAULT = 20, SHOW_MAX = 1000000, SHOW_BYTES = 1 << 30 };

static const char usage[] =
    "usage: safelight audit verify [--state DIR] [--head HASH] [--json]   walk the whole chain of records\n"
    "       safelight audit show [--state DIR] [--n N] [--json]           the newest N records (20), newest first\n\n"
    "  --state DIR   the server's state folder (" CONFIG_STATE_DEFAULT ")\n"
    "  --head HASH   a hash that must be in the chain: a head from the server's log, kept elsewhere. Without it records that were cut off\n"
    "                at the end are found only if audit.key was not in the same hands.\n"
    "  --json        one JSON value\n";

struct options {
  const char *state, *head;
  int n, json;
};

static int read_options(struct options *o, int argc, char **argv)
{
  *o = (struct options){.state = CONFIG_STATE_DEFAULT, .n = SHOW_DEFAULT};
  for (int i = 2; i < argc; i++) {
    const char *value = i + 1 < argc ? argv[i + 1] : NULL;
    if (!strcmp(argv[i], "--json")) {
      o->json = 1;
      continue;
    }
    if (!strcmp(argv[i], "--state") && value)
      o->state = value;
    else if (!strcmp(argv[i], "--head") && value && strlen(value) == 64)
      o->head = value;
    else if (!strcmp(argv[i], "--n") && value && strtol(value, NULL, 10) > 0 && strtol(value, NULL, 10) <= SHOW_MAX)
      o->n = (int)strtol(value, NULL, 10);
    else
      return -1;
    i++;
  }
  return 0;
}

static int verify(const struct options *o, struct err *e)
{
  struct audit_walk w;

  if (audit_verify(o->state, o->head, &w, e))
    return e->code;
  if (o->json) {
    printf("{\"ok\":%s,\"records\":%lld,\"bad\":%lld,\"why\":\"%s\",\"head\":\"%s\",\"head_checked\":%s,\"anchor_found\":%s}\n",
           w.bad ? "false" : "true", (long long)w.count, (long long)w.bad, w.why, w.head.hash, w.is_head_checked ? "true" : "false",
           w.has_anchor ? "true" : "false");
  } else if (w.bad) {
    printf("NOT INTACT: record %lld %s\n%lld records\n", (long long)w.bad, w.why, (long long)w.count);
  } else {
    printf("intact: %lld records\nhead %s\n%s", (long long)w.count, w.head.hash,
           w.is_head_checked ? "" : "audit.key could not be read: records cut off at the end would not show\n");
  }
  return w.bad ? err_field(e, E_FILE, "audit.db", "the audit log in %s is not intact", o->state) : 0;
}

/* A line per record: what json arrays of one-line objects look like when split where records meet. */
static void print_lines(const char *json)
{
  int depth = 0, quoted = 0;

  for (const char *s = json; *s; s++) {
    if (quoted) {
      if (*s == '\\' && s[1])
        putchar(*s++);
      else if (*s == '"')
        quoted = 0;
    } else if (*s == '"') {
      quoted = 1;
    } else if (*s == '[' || *s == '{') {
      if (depth++ == 0)
        continue;
    } else if (*s == ']' || *s == '}') {
      if (--depth == 0)
        break;
    } else if (*s == ',' && depth == 1) {
      putchar('\n');
      continue;
    }
    putchar(*s);
  }
  if (json[0] && json[1] != ']')
    putchar('\n');
}

static int show(const struct options *o, struct err *e)
{
  struct audit_db *d;
  struct buf out;
  int r;

  buf_init(&out, SHOW_BYTES);
  r = audit_db_open_read(&d, o->state, e);
  if (!r)
    r = audit_db_recent(d, o->n, &out, e);
  audit_db_close(d);
  if (!r && o->json)
    puts(out.p);
  else if (!r)
    print_lines(out.p);
  buf_close(&out);
  return r;
}

int audit_main(int argc, char **argv)
{
  const char *what = argc > 1 ? argv[1] : "--help";
  struct options o;
  struct err e = {0};

  if (!strcmp(what, "--help") || !strcmp(what, "-h") || (argc > 2 && !strcmp(argv[2], "--help"))) {
    fputs(usage, stdout);
    return 0;
  }
  if ((strcmp(what, "verify") && strcmp(what, "show")) || read_options(&o, argc, argv)) {
    fputs(usage, stderr);
    return EXIT_USAGE;
  }
  if (!(strcmp(what, "verify") ? show(&o, &e) : verify(&o, &e)))
    return 0;
  fprintf(stderr, "safelight: %s\n", e.msg);
  return 1;
}
