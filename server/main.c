/*
 * main.c - the program: picks the subcommand. Nothing below main exits.
 */
#include <stdio.h>
#include <string.h>

#include "server/commands.h"
#include "server/version.h"

static int version_main(int argc, char **argv)
{
  (void)argc, (void)argv;
  printf("safelight %s\n", SAFELIGHT_VERSION);
  return 0;
}

static int help_main(int argc, char **argv);

static const struct {
  const char *name, *help;
  int (*run)(int argc, char **argv);
} commands[] = {
    {"serve", "serve pictures over HTTP", serve_main},
    {"generate", "draw a picture into a file, without a server", generate_main},
    {"audit", "check the audit log, or show its newest records", audit_main},
    {"reload", "have a running server read its safety policy again", reload_main},
    {"admin", "look at and change what a running server draws under", admin_main},
    {"adapter", "inspect, merge, extract, verify and sign adapters", adapter_main},
    {"bench", "measure this machine", bench_main},
    {"compile", "compile plans for a GPU before it is there", compile_main},
    {"version", "print the version", version_main},
    {"help", "print this list", help_main},
};

static int help_main(int argc, char **argv)
{
  (void)argc, (void)argv;
  printf("usage: safelight COMMAND [--OPTION VALUE ...]\n\n");
  for (size_t i = 0; i < sizeof commands / sizeof *commands; i++)
    printf("  %-9s %s\n", commands[i].name, commands[i].help);
  printf("\n`safelight COMMAND --help` lists the options of a command.\n");
  return 0;
}

int main(int argc, char **argv)
{
  const char *name = argc > 1 ? argv[1] : "help";

  if (!strcmp(name, "--help") || !strcmp(name, "-h"))
    name = "help";
  if (!strcmp(name, "--version"))
    name = "version";
  for (size_t i = 0; i < sizeof commands / sizeof *commands; i++)
    if (!strcmp(name, commands[i].name))
      return commands[i].run(argc - 1, argv + 1);
  fprintf(stderr, "safelight: there is no command \"%.80s\"; `safelight help` lists them\n", name);
  return 2;
}
