/*
 * serve.c - `safelight serve`: start, wait, drain, stop.
 *
 *      thread     file       owns                                  may block on             must never
 *      main       serve.c    configuration, signals                signalfd, eventfd        touch a job or a tensor
 *      http       http.c     connections; RESERVED and DONE jobs   nothing but its epoll    call the device, wait for a job
 *      watch      watch.c    connection clocks                     poll                     touch a job but through job_stop
 *      reader     reader.c   READING jobs                          reading_next             touch a connection, call the device
 *      device     device.c   its backend, its model, the RUNNING   jobs_wait, the device    touch a connection, JSON or a file, another
 *                 (one each) jobs that it took                                              device's lanes, pictures or generations
 *      stage      stage.c    pictures sent to it, a lane beside    stage_next, its lane     touch a connection, JSON or a file
 *                 (one each) its device
 *      encoder    encode.c   DRAWN jobs, previews                  parcel_next, audit, store call the device
 *      audit      audit.c    the audit log                         its queue, the disk      touch a job
 *      store      store.c    durable jobs and files                its queue, the disk      block in a done
 *      async      async.c    the backlog of the last run           the store, room          outlive the drain
 *      loader     safety_*.c adapters, generations on all devices, its inbox, files, audit  touch a RUNNING job, publish what is not
 *                            a lane beside each, PREPARING jobs                             verified and built on every device
 *                            (loader N: a device of its own while it builds on several GPUs, see proving.h)
 *      admin      admin.c    the operator's connections, a thread  the loader, audit        touch a job, decide what policy decides
 *                            for each
 *
 * The HTTP and reader threads may tokenise (draw_prepare) and nothing else of the engine. Locks are leaves (thread.h).
 *
 * Start: listen, load the model, then build the safety adapters over it, so that /readyz can tell all the while. SIGHUP reads the policy
 * again. Stop: SIGTERM or SIGINT lets accepted requests finish within drain_s while new ones get 503; then what is left is ended at its next
 * step, and only when no job is left does the HTTP server stop. A second signal exits at once. Exit status: 0 stopped, 1 could not start, 2
 * wrong usage, 70 the device failed.
 */
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include "server/admin.h"
#include "server/async.h"
#include "server/audit.h"
#include "server/commands.h"
#include "server/config.h"
#include "server/encode.h"
#include "server/http.h"
#include "server/limits.h"
#include "server/log.h"
#include "server/reader.h"
#include "server/store.h"
#include "server/version.h"
#include "server/worker.h"

enum { EXIT_USAGE = 2, EXIT_DEVICE = 70, DRAIN_TICK_MS = 10, LAST_ANSWERS_MS = 2000, TENANTS_COUNTED = 8192,
       SPARE_FILES = 128 + ADMIN_VISITS /* the program's own, and those of the operator's connections */ };

struct server {
  struct config cfg;
  struct device_list devices;
  struct jobs jobs;
  struct limits *limits;
  struct worker worker;
  struct encoder encoder;
  struct reader reader;
  struct http http;
  struct audit *audit;
  struct safety *safety;
  struct admin *admin;
  struct store *store;
  struct async async;
  int signal_fd, event_fd;
};

static int open_signals(struct server *s, struct err *e)
{
  sigset_t set;

  sigemptyset(&set);
  sigaddset(&set, SIGTERM);
  sigaddset(&set, SIGINT);
  sigaddset(&set, SIGHUP);
  sigprocmask(SIG_BLOCK, &set, NULL);
  signal(SIGPIPE, SIG_IGN);
  signal(SIGXFSZ, SIG_IGN); /* a file over its limit is an error of the write, as a full disk is */
  s->signal_fd = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
  s->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (s->signal_fd < 0 || s->event_fd < 0)
    return err_set(e, E_INTERNAL, "cannot watch signals: %s", strerror(errno));
  return 0;
}

/* Every connection is a file, and another one while it reads a picture of the store, if the system allows as many; the soft limit of most is 1024 and may
 * be raised up to the hard one. */
static int raise_file_limit(const struct config *c, struct err *e)
{
  rlim_t need = (rlim_t)c->max_connections + SPARE_FILES, want = need + (rlim_t)c->max_connections;
  struct rlimit l;

  if (getrlimit(RLIMIT_NOFILE, &l) || l.rlim_cur >= want)
    return 0;
  l.rlim_cur = l.rlim_max == RLIM_INFINITY || l.rlim_max > want ? want : l.rlim_max;
  if (l.rlim_cur < need || setrlimit(RLIMIT_NOFILE, &l))
    return err_field(e, E_ARG, "max_connections", "max_connections %d needs %llu open files and the system allows %llu",
                     c->max_connections, (unsigned long long)need, (unsigned long long)l.rlim_max);
  return 0;
}

/* The number of the signal that came within ms, 0 when none did. Also returns early when the worker has news. */
static int wait_signal(struct server *s, int ms)
{
  struct pollfd p[2] = {{.fd = s->signal_fd, .events = POLLIN}, {.fd = s->event_fd, .events = POLLIN}};
  struct signalfd_siginfo info;
  uint64_t count;

  if (poll(p, 2, ms) <= 0)
    return 0;
  if (p[1].revents && read(s->event_fd, &count, sizeof count) < 0)
    return 0;
  if (!p[0].revents || read(s->signal_fd, &info, sizeof info) != sizeof info)
    return 0;
  if (info.ssi_signo == SIGHUP) {
    log_event("SIGHUP: reading the safety policy again");
    if (s->safety)
      safety_reload_later(s->safety);
    return 0;
  }
  return (int)info.ssi_signo;
}

static void print_ready(const struct server *s)
{
  const struct serving *v = worker_serving(&s->worker);
  const char *url = s->http.url, *port = strrchr(url, ':');
  char local[64];

  if (!strncmp(url, "http://0.0.0.0:", 15) || !strncmp(url, "http://[::]:", 12)) {
    snprintf(local, sizeof local, "http://127.0.0.1%s", port);
    url = local;
  }
  printf("model    %s, %dx%d pixels, up to %d\nbackend  %s\n", v->limits.model, v->limits.default_size, v->limits.default_size, v->limits.max_size,
         v->backend);
  for (int i = 0; i < s->worker.devices; i++) {
    const struct device *d = &s->worker.device[i];
    const struct device_plan *p = &d->plan;

    printf("device %d %.1f MB: %.1f of weights, %.1f for activations, %.1f of working memory, up to %.1f for %d pictures at once\n", d->number,
           (double)(p->weights + p->activations + p->working + d->running * p->picture) / 1e6, (double)p->weights / 1e6, (double)p->activations / 1e6,
           (double)p->working / 1e6, (double)(d->running * p->picture) / 1e6, d->running);
  }
  printf("admin    %s\n\nready: open %s/ or\n"
         "  curl -s %s/v1/images/generations -H 'Content-Type: application/json' \\\n"
         "    -H 'Accept: image/png' -d '{\"prompt\":\"a red apple\",\"seed\":1}' -o apple.png\n",
         admin_url(s->admin), url, url);
  fflush(stdout);
}

static void second_signal(int sig)
{
  static const char text[] = "safelight: second signal, leaving at once\n";
  ssize_t n = write(STDERR_FILENO, text, sizeof text - 1);

  (void)n;
  _exit(128 + sig);
}

/* A moment of the drain; a second signal ends it. */
static void wait_tick(struct server *s)
{
  int sig = wait_signal(s, DRAIN_TICK_MS);

  if (sig)
    second_signal(sig);
}

/* Lets accepted requests finish until drain_s is over, then ends them. Returns when no job is left and answers are out. */
static void drain(struct server *s)
{
  int64_t now = clock_ns(), end = now + (int64_t)s->cfg.drain_s * 1000000000, last;
  int left = jobs_count(&s->jobs).active, told = 0;

  http_stopping(&s->http);
  jobs_refuse(&s->jobs);
  async_stop(&s->async);
  if (left || worker_state(&s->worker) != WORKER_FAILED)
    log_event("stopping: %d requests have %d s to finish", left, s->cfg.drain_s);
  while ((left = jobs_count(&s->jobs).active)) {
    if (clock_ns() >= end) {
      if (!told)
        log_event("stopping: %d requests did not finish in time and are ended", left);
      told = 1;
      jobs_stop_all(&s->jobs, E_NOTREADY);
      store_hold_no_more(s->store);
    }
    wait_tick(s);
  }
  store_hold_no_more(s->store);
  last = clock_ns() + (int64_t)LAST_ANSWERS_MS * 1000000;
  while (http_exchanges(&s->http) && clock_ns() < last)
    wait_tick(s);
  http_over(&s->http); /* libmicrohttpd aborts when it is stopped while a connection sleeps, such as one that asks the store just now */
  while (http_asking(&s->http))
    wait_tick(s);
}

/* The model is loaded: the safety manager starts over it, and who may tell it what to do can come. */
static int open_safety(struct server *s, struct err *e)
{
  struct safety_device device[DEVICES_MAX];
  int n = worker_safety_devices(&s->worker, device);

  if (safety_open(&s->safety, &s->cfg, device, n, s->audit, s->event_fd, e) ||
      admin_open(&s->admin, &s->cfg, s->safety, s->audit, &s->jobs, e))
    return e->code;
  worker_set_safety(&s->worker, s->safety);
  if (async_open(&s->async, &s->jobs, &s->worker, s->store, s->audit, e))
    return e->code;
  atomic_store(&s->http.async, &s->async);
  return 0;
}

static int open_store(struct server *s, struct err *e)
{
  struct store_limits limits = {
      .results_ms = (int64_t)s->cfg.results_s * 1000,
      .history_ms = (int64_t)s->cfg.history_s * 1000,
      .results_bytes = (uint64_t)s->cfg.results_mb << 20,
  };

  return store_open(&s->store, s->cfg.state, &limits, e);
}

/* Until a signal, or until the worker failed, which e then says. Returns the exit status. */
static int watch_over(struct server *s, struct err *e)
{
  enum worker_state seen = WORKER_LOADING, state;
  int sig, was_ready = 0;

  for (;;) {
    sig = wait_signal(s, -1);
    state = worker_state(&s->worker);
    if (state != seen && state == WORKER_READY && open_safety(s, e))
      return 1;
    if (s->safety && !was_ready && !safety_ready(s->safety, &(struct err){0})) {
      print_ready(s);
      was_ready = 1;
    }
    if (state == WORKER_FAILED) {
      *e = s->worker.why;
      return seen == WORKER_LOADING ? 1 : EXIT_DEVICE;
    }
    seen = state;
    if (sig) {
      log_event("%s", sig == SIGTERM ? "SIGTERM" : "SIGINT");
      return 0;
    }
  }
}

/* The audit log comes first: who cannot write down what it does does nothing. */
static int open_audit(struct server *s, struct err *e)
{
  struct audit_record start = {.kind = AUDIT_START, .verdict = "started", .reason = "safelight " SAFELIGHT_VERSION};

  return audit_open(&s->audit, s->cfg.state, s->cfg.audit_prompts, e) || audit_add(s->audit, &start, e) ? e->code : 0;
}

/* A policy that cannot be read is found before anything is loaded. */
static int check_policy(const struct config *c, struct err *e)
{
  struct policy *p = NULL;
  char path[POLICY_PATH];

  if (*c->policy)
    snprintf(path, sizeof path, "%s", c->policy);
  else if (policy_default_path(path, c->model, e))
    return e->code;
  if (policy_read(&p, path, e))
    return e->code;
  policy_free(p);
  return 0;
}

static int serve(struct server *s, struct err *e)
{
  int status = 1;

  if (check_policy(&s->cfg, e) || open_signals(s, e) || raise_file_limit(&s->cfg, e) || open_audit(s, e) || open_store(s, e) ||
      devices_read(&s->devices, s->cfg.devices, e) || jobs_open(&s->jobs, s->cfg.queue, s->cfg.running, s->devices.n, e) ||
      limits_open(&s->limits, TENANTS_COUNTED, e))
    goto out;
  s->jobs.limits = s->limits;
  worker_init(&s->worker, &s->cfg, &s->devices, &s->jobs, s->event_fd);
  if (http_open(&s->http, &s->cfg, &s->jobs, &s->worker, s->audit, e)) /* from here on the HTTP thread reads the worker's state */
    goto out;
  printf("safelight %s listens at %s\n", SAFELIGHT_VERSION, s->http.url);
  fflush(stdout);
  if (worker_start(&s->worker, e) || encoder_start(&s->encoder, &s->jobs, &s->worker, s->audit, s->store, e) ||
      reader_start(&s->reader, &s->jobs, &s->worker, e))
    goto out;
  status = watch_over(s, e);
  drain(s);
out:
  if (s->jobs.job)
    jobs_end(&s->jobs);
  worker_join(&s->worker);
  encoder_join(&s->encoder);
  reader_join(&s->reader);
  http_close(&s->http);
  async_close(&s->async);
  store_close(s->store);
  admin_close(s->admin);
  safety_close(s->safety);
  worker_close(&s->worker);
  jobs_close(&s->jobs);
  limits_close(s->limits);
  audit_close(s->audit);
  close(s->signal_fd);
  close(s->event_fd);
  if (!e->code && !status)
    log_event("stopped");
  return status;
}

int serve_main(int argc, char **argv)
{
  static struct server s;
  enum config_action action;
  enum sampler_kind kind;
  struct err e = {0};
  int karras = 0, status;

  thread_self = THREAD_MAIN;
  s.signal_fd = s.event_fd = -1;
  if (config_read(&s.cfg, argc, argv, &action, &e) ||
      (action != CONFIG_HELP && sampler_find(s.cfg.sampler, &kind, &karras, &e))) {
    fprintf(stderr, "safelight: %s\n", e.msg);
    return EXIT_USAGE;
  }
  if (action == CONFIG_HELP) {
    config_help(stdout);
    return 0;
  }
  if (action == CONFIG_PRINT) {
    config_print(&s.cfg, stdout);
    return 0;
  }
  if (action == CONFIG_CHECK) {
    printf("the configuration is fine\n");
    return 0;
  }
  log_open(s.cfg.log_json);
  status = serve(&s, &e);
  if (e.code)
    fprintf(stderr, "safelight: %s\n", e.msg);
  return status;
}
