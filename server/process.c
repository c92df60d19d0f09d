/*
 * process.c - see process.h. Reads /proc/self/stat and statm with one read each.
 */
#include "server/process.h"

#include <dirent.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { STAT_START = 19 /* fields of /proc/self/stat after the name, which may hold spaces, to the start time */ };

/* A small file of /proc as text; "" when it cannot be read. */
static void read_text(const char *path, char *out, size_t size)
{
  int fd = open(path, O_RDONLY | O_CLOEXEC);
  ssize_t n = fd < 0 ? 0 : read(fd, out, size - 1);

  out[n > 0 ? n : 0] = 0;
  if (fd >= 0)
    close(fd);
}

static double start_s;

/* The time of the start: what the clock says now, less how long ago the kernel says it was. Found once: a clock that is set must not look like a restart. */
static void find_start(void)
{
  struct timespec now, boot;
  char text[1024], *p;

  read_text("/proc/self/stat", text, sizeof text);
  p = strrchr(text, ')');
  for (int i = 0; p && i <= STAT_START; i++)
    p = strchr(p + 1, ' ');
  if (!p || clock_gettime(CLOCK_REALTIME, &now) || clock_gettime(CLOCK_BOOTTIME, &boot))
    return;
  start_s = (double)now.tv_sec + 1e-9 * (double)now.tv_nsec - (double)boot.tv_sec - 1e-9 * (double)boot.tv_nsec +
         (double)strtoull(p, NULL, 10) / (double)sysconf(_SC_CLK_TCK);
}

static uint64_t count_files(void)
{
  struct stat st;
  uint64_t n = 0;
  DIR *d;

  if (!stat("/proc/self/fd", &st) && st.st_size > 0)
    return (uint64_t)st.st_size; /* since Linux 6.2 the size is the number */
  d = opendir("/proc/self/fd");
  if (!d)
    return 0;
  while (readdir(d))
    n++;
  closedir(d);
  return n > 3 ? n - 3 : 0; /* ".", ".." and the one that reads */
}

void process_read(struct process_usage *u)
{
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  struct rusage r;
  struct rlimit l;
  char text[128], *rest;
  uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);

  pthread_once(&once, find_start);
  *u = (struct process_usage){.start_s = start_s, .open_files = count_files()};
  if (!getrusage(RUSAGE_SELF, &r))
    u->cpu_s = (double)(r.ru_utime.tv_sec + r.ru_stime.tv_sec) + 1e-6 * (double)(r.ru_utime.tv_usec + r.ru_stime.tv_usec);
  if (!getrlimit(RLIMIT_NOFILE, &l) && l.rlim_cur != RLIM_INFINITY)
    u->max_files = l.rlim_cur;
  read_text("/proc/self/statm", text, sizeof text);
  u->virtual_size = strtoull(text, &rest, 10) * page;
  u->resident = strtoull(rest, NULL, 10) * page;
}
