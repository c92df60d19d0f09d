/*
 * runtime.c - the CUDA runtime of the simulator: memory, streams, events, graphs, errors. See sim.h.
 *
 * A stream is a FIFO whose entries run at once; while a graph is captured they are recorded instead, with copies of their arguments, and
 * run each time the graph is launched. Allocating, waiting and freeing during a capture are errors, as on a device.
 * Device memory has exactly the size that was asked for, so that ASan's red zones begin where it ends, and starts as NaN. While work of one device runs
 * the memory of the others is poisoned: a real device might reach it, slowly, or fail, and no op of ours means to.
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

struct cudasim_stream {
  int device;
  struct cudasim_graph *capture; /* NULL: entries run at once */
};

struct block { /* of device memory */
  struct block *next;
  void *p;
  size_t bytes;
  int device;
};

struct cudasim_event {
  int is_recorded;
};

static int capturing, fail_in, fail_graphs, device_count = 1, current_device;
static int reached; /* the device whose memory is not poisoned */
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

void cudasim_devices(int count)
{
  device_count = count;
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
  *p = (struct cudaDeviceProp){.name = "simulated device", .totalGlobalMem = (size_t)8 << 30, .major = 9, .multiProcessorCount = 132,
                               .l2CacheSize = 60 << 20};
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
  else
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

static int allocate(void **p, size_t bytes)
{
  int r = refused_in_capture("an allocation");

  *p = NULL;
  if (r)
    return r;
  if (fail_in > 0 && --fail_in == 0)
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

int cudaMalloc(void **p, size_t bytes)
{
  struct block *b;
  int r = allocate(p, bytes);

  if (r)
    return r;
  b = malloc(sizeof *b);
  if (!b)
    abort();
  *b = (struct block){blocks, *p, bytes, current_device};
  blocks = b;
  set_reach(b);
  return 0;
}

int cudaFree(void *p)
{
  struct block **at = &blocks, *b;
  int r = release(p);

  if (r || !p)
    return r;
  while (*at && (*at)->p != p)
    at = &(*at)->next;
  b = *at;
  if (!b)
    return cudasim_fail(cudaErrorInvalidValue, "freeing what is no memory of a device");
  *at = b->next;
  free(b);
  return 0;
}

int cudaMallocHost(void **p, size_t bytes)
{
  return allocate(p, bytes);
}

int cudaFreeHost(void *p)
{
  return release(p);
}

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

  (void)kind;
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

int cudaStreamCreateWithFlags(struct cudasim_stream **s, unsigned flags)
{
  (void)flags;
  *s = calloc(1, sizeof **s);
  if (!*s)
    return cudaErrorMemoryAllocation;
  (*s)->device = current_device;
  return cudasim_sticky();
}

int cudaStreamDestroy(struct cudasim_stream *s)
{
  free(s);
  return 0;
}

int cudaStreamSynchronize(struct cudasim_stream *s)
{
  (void)s;
  return refused_in_capture("waiting for a stream");
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
  (void)s;
  e->is_recorded = 1;
  return cudasim_sticky();
}

int cudaEventSynchronize(struct cudasim_event *e)
{
  (void)e;
  return refused_in_capture("waiting for an event");
}

int cudaStreamBeginCapture(struct cudasim_stream *s, enum cudaStreamCaptureMode mode)
{
  (void)mode;
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
