/*
 * adapter.h - `safelight adapter`: one function per subcommand, and what they share. Each takes the command line from its own name on,
 * prints to standard output and errors to standard error, and returns the exit status: 0, 1 when it failed or a check did, 2 for a command
 * line that makes no sense.
 *
 * Called by adapter.c, which holds the table. Threads: none of their own.
 */
#ifndef SAFELIGHT_SERVER_ADAPTER_H
#define SAFELIGHT_SERVER_ADAPTER_H

#include "models/adapter.h"
#include "models/pipeline.h"

int adapter_inspect_main(int argc, char **argv);
int adapter_merge_main(int argc, char **argv);
int adapter_extract_main(int argc, char **argv);
int adapter_verify_main(int argc, char **argv);
int adapter_sign_main(int argc, char **argv);
int adapter_keygen_main(int argc, char **argv);

/* A model, and the names of its sites, to read adapters with. */
struct adapter_tool {
  struct be be;
  struct model *m;
  struct adapter_names *names;
  struct adapter_bounds bounds; /* the defaults */
};
/* backend: "auto", "cpu", "ref", or "dry" for a tool that computes nothing with the model. After failure
 * adapter_tool_close is due as well. */
MUST_CHECK int adapter_tool_open(struct adapter_tool *t, const char *model, const char *backend, int threads, struct err *e);
void adapter_tool_close(struct adapter_tool *t); /* takes a zeroed one */

/* The number in s, from lo to hi; E_ARG names the option. */
MUST_CHECK int adapter_tool_number(const char *option, const char *s, double lo, double hi, double *out, struct err *e);
/* What a subcommand ends with: usage to standard output for "help", an error with it, or an error alone; the exit status. */
int adapter_tool_usage(const char *command, const char *usage, const struct err *e);
int adapter_tool_end(const char *command, int r, const struct err *e);

#endif
