/*
 * card.c - tests/cudasim/sim.h on a real card, so that the simulator's tests run there as they are: what they count and let fail is counted and
 * made to fail between the backend and the CUDA runtime (the linker's --wrap sends the backend's calls through here).
 *
 * What has no meaning on a card does nothing: the order of threads is the card's. Linked to tests/cudasim/test_*.c by `make gpu-programs`.
 * Threads: one, as in sim.h.
 */
#include "tests/cudasim/sim.h"

cudaError_t __real_cudaMalloc(void **p, size_t bytes);
cudaError_t __real_cudaFree(void *p);
cudaError_t __real_cudaMallocHost(void **p, size_t bytes);
cudaError_t __real_cudaFreeHost(void *p);
cudaError_t __real_cudaMallocAsync(void **p, size_t bytes, cudaStream_t s);
cudaError_t __real_cudaFreeAsync(void *p, cudaStream_t s);
cudaError_t __real_cudaStreamSynchronize(cudaStream_t s);
cudaError_t __real_cudaStreamBeginCapture(cudaStream_t s, enum cudaStreamCaptureMode mode);
cudaError_t __real_cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t g, unsigned long long flags);
cudaError_t __real_cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t s);
cudaError_t __real_cudaGraphExecDestroy(cudaGraphExec_t exec);
cudaError_t __wrap_cudaMalloc(void **p, size_t bytes);
cudaError_t __wrap_cudaFree(void *p);
cudaError_t __wrap_cudaMallocHost(void **p, size_t bytes);
cudaError_t __wrap_cudaFreeHost(void *p);
cudaError_t __wrap_cudaMallocAsync(void **p, size_t bytes, cudaStream_t s);
cudaError_t __wrap_cudaFreeAsync(void *p, cudaStream_t s);
cudaError_t __wrap_cudaStreamSynchronize(cudaStream_t s);
cudaError_t __wrap_cudaStreamBeginCapture(cudaStream_t s, enum cudaStreamCaptureMode mode);
cudaError_t __wrap_cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t g, unsigned long long flags);
cudaError_t __wrap_cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t s);
cudaError_t __wrap_cudaGraphExecDestroy(cudaGraphExec_t exec);

static struct cudasim_count count;
static int fail_in, fail_graphs, fail_captures;
static size_t refused; /* bytes of the allocation that failed last */

int cudasim_is_card(void)
{
  return 1;
}

void cudasim_seed(uint64_t seed)
{
  (void)seed;
}

const char *cudasim_fault(void)
{
  cudaError_t e = cudaPeekAtLastError();

  return e == cudaSuccess ? "" : cudaGetErrorString(e);
}

void cudasim_reset(void)
{
  (void)cudaGetLastError();
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

void cudasim_pools(int are_there)
{
  (void)are_there;
}

struct cudasim_count cudasim_counts(void)
{
  return count;
}

static cudaError_t counted(cudaError_t e)
{
  count.allocations += e == cudaSuccess;
  count.live += e == cudaSuccess;
  return e;
}

cudaError_t __wrap_cudaMallocAsync(void **p, size_t bytes, cudaStream_t s)
{
  int again = refused && refused == bytes;

  refused = 0;
  if (again)
    return cudaErrorMemoryAllocation;
  if (fail_in > 0 && --fail_in == 0) {
    refused = bytes;
    return cudaErrorMemoryAllocation;
  }
  return counted(__real_cudaMallocAsync(p, bytes, s));
}

cudaError_t __wrap_cudaFreeAsync(void *p, cudaStream_t s)
{
  count.live -= p != NULL;
  return __real_cudaFreeAsync(p, s);
}

cudaError_t __wrap_cudaStreamSynchronize(cudaStream_t s)
{
  count.waits++;
  return __real_cudaStreamSynchronize(s);
}

cudaError_t __wrap_cudaMalloc(void **p, size_t bytes)
{
  count.stops++;
  if (fail_in > 0 && --fail_in == 0)
    return cudaErrorMemoryAllocation;
  return counted(__real_cudaMalloc(p, bytes));
}

cudaError_t __wrap_cudaMallocHost(void **p, size_t bytes)
{
  count.stops++;
  if (fail_in > 0 && --fail_in == 0)
    return cudaErrorMemoryAllocation;
  return counted(__real_cudaMallocHost(p, bytes));
}

cudaError_t __wrap_cudaFree(void *p)
{
  count.stops += p != NULL;
  count.live -= p != NULL;
  return __real_cudaFree(p);
}

cudaError_t __wrap_cudaFreeHost(void *p)
{
  count.stops += p != NULL;
  count.live -= p != NULL;
  return p ? __real_cudaFreeHost(p) : cudaSuccess;
}

cudaError_t __wrap_cudaStreamBeginCapture(cudaStream_t s, enum cudaStreamCaptureMode mode)
{
  if (fail_captures > 0) {
    fail_captures--;
    return cudaErrorMemoryAllocation;
  }
  return __real_cudaStreamBeginCapture(s, mode);
}

cudaError_t __wrap_cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t g, unsigned long long flags)
{
  cudaError_t e = cudaErrorNotSupported;

  *exec = NULL;
  if (fail_graphs > 0) {
    fail_graphs--;
    return e;
  }
  e = __real_cudaGraphInstantiate(exec, g, flags);
  count.graphs += e == cudaSuccess;
  count.live_graphs += e == cudaSuccess;
  return e;
}

cudaError_t __wrap_cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t s)
{
  count.replays++;
  return __real_cudaGraphLaunch(exec, s);
}

cudaError_t __wrap_cudaGraphExecDestroy(cudaGraphExec_t exec)
{
  count.live_graphs -= exec != NULL;
  return __real_cudaGraphExecDestroy(exec);
}
