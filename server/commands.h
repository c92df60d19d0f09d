/*
 * commands.h - the subcommands of safelight. main.c calls one with its own argv (argv[0] is the subcommand's name) and exits
 * with what it returns: 0 done, 1 it failed, 2 wrong usage.
 */
#ifndef SAFELIGHT_SERVER_COMMANDS_H
#define SAFELIGHT_SERVER_COMMANDS_H

int serve_main(int argc, char **argv);    /* server/serve.c: the daemon */
int generate_main(int argc, char **argv); /* server/generate.c: a picture without a server */
int audit_main(int argc, char **argv);    /* server/audit_command.c: is the audit log intact, what does it say */
int admin_main(int argc, char **argv);    /* server/admin_command.c: what an operator asks of a running server */
int reload_main(int argc, char **argv);   /* server/admin_command.c: read the policy again */
int adapter_main(int argc, char **argv);  /* server/adapter.c: inspect, merge, extract, verify, sign adapters */
int bench_main(int argc, char **argv);    /* server/bench.c: how fast this machine is */
int compile_main(int argc, char **argv);  /* server/compile.c: plans for a GPU, before it is there */

#endif
