/*
 * memory.c - see memory.h. Called by be_cuda.c and pass.c. Threads: any.
 */
#include "kernels/cuda/memory.h"

#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>

#include "kernels/cuda/cuda.h"

struct memory {
  int device;
  cudaMemPool_t pool;       /* the device's; NULL: it has none */
  cudaStream_t stream;      /* of what is given back */
  cudaEvent_t behind;
  pthread_mutex_t lock;
  struct cuda *first;       /* contexts, linked by next_context */
};

/* What is given back stays with the process: taking it again costs no call into the operating system. */
MUST_CHECK static int keep_all(struct memory *m, struct err *e)
{
  uint64_t most = UINT64_MAX;
  int r = cuda_check(cudaDeviceGetDefaultMemPool(&m->pool, m->device), "the memory pool of the GPU", e);

  return r ? r : cuda_check(cudaMemPoolSetAttribute(m->pool, cudaMemPoolAttrReleaseThreshold, &most), "the memory pool of the GPU", e);
}

int memory_open(struct memory **out, int device, struct err *e)
{
  struct memory *m = calloc(1, sizeof *m);
  struct cudaDeviceProp prop;
  int r;

  *out = NULL;
  if (!m)
    return err_set(e, E_NOMEM, "out of memory for the backend");
  m->device = device;
  pthread_mutex_init(&m->lock, NULL);
  r = cuda_check(cudaGetDeviceProperties(&prop, device), "cudaGetDeviceProperties", e);
  if (!r && prop.memoryPoolsSupported)
    r = keep_all(m, e);
  if (!r)
    r = cuda_check(cudaStreamCreateWithFlags(&m->stream, cudaStreamNonBlocking), "a stream", e);
  if (!r)
    r = cuda_check(cudaEventCreateWithFlags(&m->behind, cudaEventDisableTiming), "an event", e);
  if (r) {
    memory_close(m);
    return r;
  }
  *out = m;
  return 0;
}

void memory_close(struct memory *m)
{
  if (!m)
    return;
  if (m->stream) {
    (void)cudaStreamSynchronize(m->stream);
    (void)cudaStreamDestroy(m->stream);
  }
  if (m->behind)
    (void)cudaEventDestroy(m->behind);
  if (m->pool)
    (void)cudaMemPoolTrimTo(m->pool, 0);
  pthread_mutex_destroy(&m->lock);
  free(m);
}

void memory_lock(struct memory *m)
{
  pthread_mutex_lock(&m->lock);
}

void memory_unlock(struct memory *m)
{
  pthread_mutex_unlock(&m->lock);
}

void memory_join(struct memory *m, struct cuda *c)
{
  memory_lock(m);
  c->next_context = m->first;
  m->first = c;
  memory_unlock(m);
}

void memory_leave(struct memory *m, struct cuda *c)
{
  memory_lock(m);
  for (struct cuda **at = &m->first; *at; at = &(*at)->next_context)
    if (*at == c) {
      *at = c->next_context;
      break;
    }
  memory_unlock(m);
}

/* Short memory may be what the pool keeps in pieces, or what is on its way back: both are worth waiting for, once. */
static int take_pooled(struct memory *m, struct cuda *c, size_t bytes, void **p)
{
  int code = (int)cudaMallocAsync(p, bytes, c->stream);

  if (code != cudaErrorMemoryAllocation)
    return code;
  (void)cudaGetLastError();
  code = (int)cudaStreamSynchronize(m->stream);
  if (!code)
    code = (int)cudaMemPoolTrimTo(m->pool, 0);
  return code ? code : (int)cudaMallocAsync(p, bytes, c->stream);
}

int memory_take(struct memory *m, struct cuda *c, size_t bytes, void **p, struct err *e)
{
  int code;

  *p = NULL;
  bytes = bytes ? bytes : 1;
  if (c->pass.mode == PASS_CAPTURE)
    return err_set(e, E_INTERNAL, "memory was asked for while a pass is captured");
  code = m->pool ? take_pooled(m, c, bytes, p) : (int)cudaMalloc(p, bytes);
  if (code)
    *p = NULL;
  if (code != cudaErrorMemoryAllocation)
    return cuda_check(code, "memory on the GPU", e);
  (void)cudaGetLastError();
  return err_set(e, E_NOMEM, "no %zu bytes are left on the GPU", bytes);
}

void memory_give(struct memory *m, void *p)
{
  if (!p)
    return;
  if (!m->pool) {
    (void)cudaFree(p);
    return;
  }
  memory_lock(m); /* an error sticks and comes back from the next call that can say so */
  for (struct cuda *c = m->first; c; c = c->next_context) {
    (void)cudaEventRecord(m->behind, c->stream);
    (void)cudaStreamWaitEvent(m->stream, m->behind, 0);
  }
  (void)cudaFreeAsync(p, m->stream);
  memory_unlock(m);
}

void memory_give_own(struct memory *m, struct cuda *c, void *p)
{
  if (p)
    (void)(m->pool ? cudaFreeAsync(p, c->stream) : cudaFree(p));
}

void memory_left(struct memory *m, size_t *free, size_t *total)
{
  int code = (int)cudaStreamSynchronize(m->stream);

  if (!code && m->pool)
    code = (int)cudaMemPoolTrimTo(m->pool, 0);
  if (!code)
    code = (int)cudaMemGetInfo(free, total);
  if (code)
    *free = *total = 0;
}
