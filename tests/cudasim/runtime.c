/*
 * runtime.c - the CUDA runtime of the simulator: memory, streams, events, graphs, errors. See sim.h.
 *
 * A stream is a FIFO whose entries run at once; while a graph is captured they are recorded instead, with copies of their arguments, and
 * run each time the graph is launched. Allocating, waiting and freeing during a capture are errors, as on a device.
 * Device memory has exactly the size that was asked for, so that ASan's red zones begin where it ends, and starts as NaN. The pool's is no other, and
 * freed at once, so that ASan sees who still uses it; how much a pool that keeps everything would hold is counted. While work of one device runs
 * the memory of the others is poisoned: a real device might reach it, slowly, or fail, and no op of ours means to.
 *
 * What is ordered before what: every stream counts what it was given, and knows of each other one up to which count its own next work comes later (a
 * clock for each stream, which events carry over). The host has such a clock too, from the streams that it waited for.
 */
#include <sanitizer/asan_interface.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/cudasim/sim.h"

struct node {
  int (*run)(void *arg);
  void *arg;
  struct node *next;
};

struct cudasim_graph {
  struct node *first, **end;
};

enum { STREAMS = 64, DEVICES = 8 };

struct clock {
  long at[STREAMS];
};

struct cudasim_stream {
  int device, number;
  struct clock seen;             /* at[number]: what it was given itself */
  struct cudasim_graph *capture; /* NULL: entries run at once */
};

struct cudasim_event {
  struct clock seen;
};

/* Device memory, and pinned memory (device -1). stream: that of the pool's; -1. */
struct block {
  void *p;
  size_t bytes;
  int device, stream;
  struct block *next;
};

static int capturing, fail_in, fail_graphs, fail_captures, device_count = 1, current_device, has_pools = 1;
static int reached; /* the device whose memory is not poisoned */
static size_t refused, pooled;   /* bytes: of the allocation that failed last; in use */
static size_t memory = (size_t)8 << 30, used[DEVICES]; /* of a device; on each */
static struct clock host;
static struct cudasim_stream *streams[STREAMS];
static struct block *blocks;

int cudasim_is_card(void)
{
  return 0;
}

void cudasim_fail_allocation(int n)
{
  fail_in = n;
}

void cudasim_fail_graphs(int n)
{
  fail_graphs = n;
}

void cudasim_fail_captures(int n)
{
  fail_captures = n;
}

void cudasim_memory(size_t bytes)
{
  memory = bytes;
}

void cudasim_devices(int count)
{
  if (count > DEVICES)
    abort();
  device_count = count;
}

void cudasim_pools(int are_there)
{
  has_pools = are_there;
}

struct cudasim_count cudasim_counts(void)
{
  return *cudasim_counters();
}

static int refused_in_capture(const char *what)
{
  return capturing ? cudasim_fail(cudaErrorStreamCaptureUnsupported, "%s while a graph is captured", what) : cudasim_sticky();
}

/* ---- the device ---- */

int cudaGetDeviceCount(int *count)
{
  *count = device_count;
  return device_count ? 0 : cudaErrorNoDevice;
}

int cudaSetDevice(int device)
{
  if (device < 0 || device >= device_count)
    return cudaErrorInvalidValue;
  current_device = device;
  return 0;
}

int cudaGetDeviceProperties(struct cudaDeviceProp *p, int device)
{
  (void)device;
  *p = (struct cudaDeviceProp){.name = "simulated device", .totalGlobalMem = memory, .major = 9, .multiProcessorCount = 132,
                               .l2CacheSize = 60 << 20, .memoryPoolsSupported = has_pools};
  return 0;
}

int cudaRuntimeGetVersion(int *version)
{
  *version = 13000;
  return 0;
}

int cudaDriverGetVersion(int *version)
{
  *version = 13000;
  return 0;
}

const char *cudaGetErrorString(int code)
{
  switch (code) {
  case cudaSuccess:
    return "no error";
  case cudaErrorMemoryAllocation:
    return "out of memory";
  case cudaErrorNoDevice:
    return "no CUDA-capable device is detected";
  case cudaErrorLaunchFailure:
    return "unspecified launch failure";
  case cudaErrorInvalidConfiguration:
    return "invalid configuration argument";
  case cudaErrorStreamCaptureUnsupported:
    return "operation not permitted when stream is capturing";
  }
  return "error";
}

int cudaGetLastError(void)
{
  return cudasim_sticky();
}

/* ---- memory ---- */

static void set_reach(const struct block *b)
{
  if (b->device == reached)
    ASAN_UNPOISON_MEMORY_REGION(b->p, b->bytes);
  else if (b->device >= 0)
    ASAN_POISON_MEMORY_REGION(b->p, b->bytes);
}

/* Work of this device runs next. */
static void reach(int device)
{
  if (device == reached)
    return;
  reached = device;
  for (const struct block *b = blocks; b; b = b->next)
    set_reach(b);
}

/* device -1: pinned memory, which takes none of a device. */
static int allocate(void **p, size_t bytes, int is_pooled, int device)
{
  int r = refused_in_capture("an allocation");

  *p = NULL;
  if (r)
    return r;
  if (refused && refused == bytes) {
    refused = 0;
    return cudaErrorMemoryAllocation;
  }
  refused = 0;
  if (fail_in > 0 && --fail_in == 0) {
    refused = is_pooled ? bytes : 0;
    return cudaErrorMemoryAllocation;
  }
  if (device >= 0 && bytes > memory - used[device])
    return cudaErrorMemoryAllocation;
  if (posix_memalign(p, 256, bytes ? bytes : 1))
    return cudaErrorMemoryAllocation;
  memset(*p, 0xff, bytes);
  cudasim_counters()->allocations++;
  cudasim_counters()->live++;
  return 0;
}

static int release(void *p)
{
  if (p && refused_in_capture("freeing memory") == cudaErrorStreamCaptureUnsupported)
    return cudaErrorStreamCaptureUnsupported;
  cudasim_counters()->live -= p != NULL;
  free(p);
  return 0;
}

static void add_block(void *p, size_t bytes, int device, int stream)
{
  struct block *b = malloc(sizeof *b);

  if (!b)
    abort();
  *b = (struct block){p, bytes, device, stream, blocks};
  blocks = b;
  if (device >= 0)
    used[device] += bytes;
  set_reach(b);
}

/* The block that p lies in or begins. */
static struct block **find_block(const void *p)
{
  struct block **b = &blocks;

  while (*b && !((const char *)p >= (const char *)(*b)->p && (const char *)p < (const char *)(*b)->p + (*b)->bytes))
    b = &(*b)->next;
  return b;
}

static struct block take_block(const void *p)
{
  struct block **b = find_block(p), *it = *b, copy = {NULL, 0, -1, -1, NULL};

  if (it) {
    copy = *it;
    *b = it->next;
    if (copy.device >= 0)
      used[copy.device] -= copy.bytes;
    free(it);
  }
  return copy;
}

int cudaMemGetInfo(size_t *free, size_t *total)
{
  *total = memory;
  *free = memory - used[current_device];
  return refused_in_capture("asking for the memory that is left");
}

int cudaMalloc(void **p, size_t bytes)
{
  int r = allocate(p, bytes, 0, current_device);

  cudasim_counters()->stops++;
  if (!r)
    add_block(*p, bytes, current_device, -1);
  return r;
}

int cudaFree(void *p)
{
  const struct block *b = p ? *find_block(p) : NULL;
  int r;

  cudasim_counters()->stops += p != NULL;
  if (p && (!b || b->p != p))
    return cudasim_fail(cudaErrorInvalidValue, "freeing what is no memory of a device");
  r = release(p);
  if (p && !r)
    (void)take_block(p);
  return r;
}

int cudaMallocHost(void **p, size_t bytes)
{
  int r = allocate(p, bytes, 0, -1);

  cudasim_counters()->stops++;
  if (!r)
    add_block(*p, bytes, -1, -1);
  return r;
}

int cudaFreeHost(void *p)
{
  if (p)
    (void)take_block(p);
  cudasim_counters()->stops += p != NULL;
  return release(p);
}

/* ---- the pool ---- */

int cudaDeviceGetDefaultMemPool(struct cudasim_pool **pool, int device)
{
  static char it;

  (void)device;
  *pool = (struct cudasim_pool *)&it;
  return 0;
}

int cudaMemPoolSetAttribute(struct cudasim_pool *pool, enum cudaMemPoolAttr attr, void *value)
{
  (void)pool, (void)attr, (void)value;
  return 0;
}

int cudaMemPoolTrimTo(struct cudasim_pool *pool, size_t bytes)
{
  (void)pool;
  cudasim_counters()->reserved = (long)(pooled > bytes ? pooled : bytes);
  return refused_in_capture("trimming the pool");
}

int cudaMallocAsync(void **p, size_t bytes, struct cudasim_stream *s)
{
  int r = bytes ? allocate(p, bytes, 1, s->device) : cudasim_fail(cudaErrorInvalidValue, "0 bytes of the pool");

  if (r)
    return r;
  add_block(*p, bytes, s->device, s->number);
  pooled += bytes;
  if ((long)pooled > cudasim_counters()->reserved)
    cudasim_counters()->reserved = (long)pooled;
  return 0;
}

int cudaFreeAsync(void *p, struct cudasim_stream *s)
{
  struct block b = take_block(p);

  if (b.p != p || b.stream < 0)
    return cudasim_fail(cudaErrorInvalidValue, "memory that is not of the pool is given back to it");
  for (int i = 0; i < STREAMS && b.stream != s->number; i++)
    if (streams[i] && s->seen.at[i] < streams[i]->seen.at[i] && host.at[i] < streams[i]->seen.at[i])
      (void)cudasim_fail(cudaErrorInvalidValue, "memory is given back while a stream may still use it");
  pooled -= b.bytes;
  return release(p);
}

/* ---- copies ---- */

struct copy {
  void *dst;
  const void *src;
  size_t bytes;
};

static int run_copy(void *arg)
{
  const struct copy *c = arg;

  memcpy(c->dst, c->src, c->bytes);
  return 0;
}

int cudaMemcpyAsync(void *dst, const void *src, size_t bytes, enum cudaMemcpyKind kind, struct cudasim_stream *s)
{
  struct copy c = {dst, src, bytes};
  const void *of_host = kind == cudaMemcpyHostToDevice ? src : kind == cudaMemcpyDeviceToHost ? dst : NULL;

  cudasim_counters()->pageable += of_host && !*find_block(of_host);
  return cudasim_enqueue(s, run_copy, &c, sizeof c);
}

struct fill {
  void *dst;
  int value;
  size_t bytes;
};

static int run_fill(void *arg)
{
  const struct fill *f = arg;

  memset(f->dst, f->value, f->bytes);
  return 0;
}

int cudaMemsetAsync(void *dst, int value, size_t bytes, struct cudasim_stream *s)
{
  struct fill f = {dst, value, bytes};

  return cudasim_enqueue(s, run_fill, &f, sizeof f);
}

/* ---- streams, events, graphs ---- */

int cudasim_enqueue(struct cudasim_stream *s, int (*run)(void *arg), const void *arg, size_t bytes)
{
  _Alignas(16) char copy[8192];
  struct node *n;

  if (cudasim_sticky())
    return cudasim_sticky();
  if (!s || bytes > sizeof copy)
    return cudasim_fail(cudaErrorInvalidValue, "work on the default stream, or with %zu bytes of arguments", bytes);
  if (s->device != current_device)
    return cudasim_fail(cudaErrorInvalidValue, "work for a stream of device %d while device %d is current", s->device, current_device);
  if (!s->capture) {
    s->seen.at[s->number]++;
    memcpy(copy, arg, bytes);
    reach(s->device);
    return run(copy);
  }
  n = malloc(sizeof *n);
  if (!n || posix_memalign(&n->arg, 16, bytes))
    abort();
  memcpy(n->arg, arg, bytes);
  n->run = run;
  n->next = NULL;
  *s->capture->end = n;
  s->capture->end = &n->next;
  return 0;
}

static void learn(struct clock *c, const struct clock *from)
{
  for (int i = 0; i < STREAMS; i++)
    c->at[i] = from->at[i] > c->at[i] ? from->at[i] : c->at[i];
}

/* A number that a stream had before goes on where that one ended, which the host has waited for. */
int cudaStreamCreateWithFlags(struct cudasim_stream **s, unsigned flags)
{
  int n = 0;

  (void)flags;
  while (n < STREAMS && streams[n])
    n++;
  *s = calloc(1, sizeof **s);
  if (n == STREAMS || !*s)
    abort();
  (*s)->device = current_device;
  (*s)->number = n;
  (*s)->seen = host;
  streams[n] = *s;
  return cudasim_sticky();
}

int cudaStreamDestroy(struct cudasim_stream *s)
{
  learn(&host, &s->seen);
  streams[s->number] = NULL;
  free(s);
  return 0;
}

int cudaStreamSynchronize(struct cudasim_stream *s)
{
  cudasim_counters()->waits++;
  learn(&host, &s->seen);
  return refused_in_capture("waiting for a stream");
}

int cudaStreamWaitEvent(struct cudasim_stream *s, struct cudasim_event *e, unsigned flags)
{
  (void)flags;
  if (s->capture)
    return cudasim_fail(cudaErrorStreamCaptureUnsupported, "a wait for an event from outside of the capture");
  learn(&s->seen, &e->seen);
  return cudasim_sticky();
}

int cudaEventCreateWithFlags(struct cudasim_event **e, unsigned flags)
{
  (void)flags;
  *e = calloc(1, sizeof **e);
  return *e ? 0 : cudaErrorMemoryAllocation;
}

int cudaEventDestroy(struct cudasim_event *e)
{
  free(e);
  return 0;
}

int cudaEventRecord(struct cudasim_event *e, struct cudasim_stream *s)
{
  if (s->capture)
    return cudasim_fail(cudaErrorStreamCaptureUnsupported, "an event of a stream that is captured");
  e->seen = s->seen;
  return cudasim_sticky();
}

int cudaEventSynchronize(struct cudasim_event *e)
{
  learn(&host, &e->seen);
  return refused_in_capture("waiting for an event");
}

int cudaStreamBeginCapture(struct cudasim_stream *s, enum cudaStreamCaptureMode mode)
{
  (void)mode;
  if (fail_captures > 0) {
    fail_captures--;
    return cudaErrorMemoryAllocation;
  }
  s->capture = calloc(1, sizeof *s->capture);
  if (!s->capture)
    return cudaErrorMemoryAllocation;
  s->capture->end = &s->capture->first;
  capturing++;
  return 0;
}

int cudaStreamEndCapture(struct cudasim_stream *s, struct cudasim_graph **g)
{
  *g = s->capture;
  s->capture = NULL;
  capturing--;
  return *g ? 0 : cudaErrorInvalidValue;
}

/* The executable graph takes the nodes over; the graph that it was made from stays, empty. */
int cudaGraphInstantiate(struct cudasim_graph **exec, struct cudasim_graph *g, unsigned long long flags)
{
  (void)flags;
  *exec = NULL;
  if (fail_graphs > 0) {
    fail_graphs--;
    return cudaErrorNotSupported;
  }
  *exec = calloc(1, sizeof **exec);
  if (!*exec)
    return cudaErrorMemoryAllocation;
  cudasim_counters()->graphs++;
  cudasim_counters()->live_graphs++;
  (*exec)->first = g->first;
  g->first = NULL;
  return 0;
}

int cudaGraphLaunch(struct cudasim_graph *exec, struct cudasim_stream *s)
{
  int r = cudasim_sticky();

  if (s->device != current_device)
    return cudasim_fail(cudaErrorInvalidValue, "a graph for device %d while device %d is current", s->device, current_device);
  cudasim_counters()->replays++;
  reach(s->device);
  s->seen.at[s->number]++;
  for (struct node *n = exec->first; n && !r; n = n->next)
    r = n->run(n->arg);
  return r;
}

int cudaGraphDestroy(struct cudasim_graph *g)
{
  struct node *next;

  for (struct node *n = g ? g->first : NULL; n; n = next) {
    next = n->next;
    free(n->arg);
    free(n);
  }
  free(g);
  return 0;
}

int cudaGraphExecDestroy(struct cudasim_graph *g)
{
  cudasim_counters()->live_graphs -= g != NULL;
  return cudaGraphDestroy(g);
}
