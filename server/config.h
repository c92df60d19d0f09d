/*
 * config.h - the options of `safelight serve`: one table in config.c says name, type, default, bounds and meaning, and makes
 * the flags, the file format, --help, --print-config and --check from it.
 *
 * Called by serve.c. Threads: filled before any thread starts, read-only after.
 */
#ifndef SAFELIGHT_SERVER_CONFIG_H
#define SAFELIGHT_SERVER_CONFIG_H

#include <stdio.h>

#include "base/err.h"

enum { CONFIG_TEXT = 256 };

#define CONFIG_STATE_DEFAULT "safelight-state"

struct config {
  char host[CONFIG_TEXT];
  int port;
  char model[CONFIG_TEXT];
  char policy[CONFIG_TEXT];
  char name[CONFIG_TEXT];
  char backend[CONFIG_TEXT], activations[CONFIG_TEXT];
  char devices[CONFIG_TEXT]; /* devices.h reads it */
  int threads;
  int size, max_size;
  int steps, max_steps;
  float guidance, max_guidance;
  char sampler[CONFIG_TEXT];
  int max_n;
  int queue, running, batch;
  int deadline_s, drain_s, client_s, alive_s;
  int max_body_kb, max_upload_kb, max_connections;
  char public_url[CONFIG_TEXT];
  char cors_origins[CONFIG_TEXT], trusted_proxies[CONFIG_TEXT];
  int page, log_json, log_prompts;
  char state[CONFIG_TEXT];
  int results_s, results_mb, history_s;
  int audit_prompts;
  char metadata[CONFIG_TEXT], png[CONFIG_TEXT];
  char admin[CONFIG_TEXT], admin_token_file[CONFIG_TEXT];
  int admin_upload_mb;
};

/* What the command line asks for besides values. */
enum config_action { CONFIG_RUN, CONFIG_PRINT, CONFIG_CHECK, CONFIG_HELP };

/* Defaults, then the file of --config FILE if there is one, then the other flags (--name value or --name=value). E_ARG names the option,
 * its bounds, and file and line where there is one. */
MUST_CHECK int config_read(struct config *c, int argc, char **argv, enum config_action *action, struct err *e);

/* One "name = value" file over what c holds. */
MUST_CHECK int config_read_file(struct config *c, const char *path, struct err *e);

void config_defaults(struct config *c);
void config_print(const struct config *c, FILE *out); /* the commented file; reading it back gives c again */
void config_help(FILE *out);

#endif
