/*
 * process.h - what this process takes of its machine, as Linux tells in /proc.
 *
 * Called by metrics.c. Threads: any; no state but the time of the start, found once.
 */
#ifndef SAFELIGHT_SERVER_PROCESS_H
#define SAFELIGHT_SERVER_PROCESS_H

#include <stdint.h>

struct process_usage {
  double cpu_s;            /* user and system, of all threads */
  double start_s;          /* seconds since 1970 */
  uint64_t resident, virtual_size; /* bytes */
  uint64_t open_files, max_files;  /* max 0: no limit */
};

/* What cannot be read is 0. */
void process_read(struct process_usage *u);

#endif
