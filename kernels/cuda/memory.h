/*
 * memory.h - device memory of be_cuda's contexts: taken and given back in the order of the streams, so that nobody's kernels are waited for.
 *
 * cudaFree waits for the whole device and cudaMalloc for the driver: a picture that starts, a generation that is retired, would hold up the
 * steps of the others. So memory comes from the device's pool (cudaMallocAsync, in the order of the asking context's stream), which keeps
 * what it was given back. Memory that is freed may still be read by what any context has enqueued, and its owner does not say by which: freeing is put
 * behind all of them, on a stream that does nothing else. The driver's pool was taken, and no list of free slabs of our own, because it
 * already knows which memory is behind which work, splits and joins, and hands over across streams.
 *
 * A context that captures must not be recorded on by others: its capture holds the lock.
 * Devices without pools (some virtual ones) fall back to cudaMalloc and cudaFree.
 *
 * Callers: be_cuda.c, pass.c. Threads: any; the struct is locked.
 */
#ifndef SAFELIGHT_KERNELS_CUDA_MEMORY_H
#define SAFELIGHT_KERNELS_CUDA_MEMORY_H

#include <cuda_runtime_api.h>
#include <stddef.h>

#include "base/err.h"

struct cuda;
struct memory; /* of a backend and its lanes */

/* For contexts of this device, which is current. On failure *m is NULL. */
MUST_CHECK int memory_open(struct memory **m, int device, struct err *e);
/* After every context has left. Takes NULL. */
void memory_close(struct memory *m);
/* c, which has its stream, is one of m's contexts from now on, until memory_leave, which takes one that never joined. */
void memory_join(struct memory *m, struct cuda *c);
void memory_leave(struct memory *m, struct cuda *c);

/* bytes of memory, 256-byte aligned, for what c enqueues from now on; other contexts may use it after a sync or mark of c's. E_NOMEM, with
 * *p NULL, when there is none. */
MUST_CHECK int memory_take(struct memory *m, struct cuda *c, size_t bytes, void **p, struct err *e);
/* Behind everything that is enqueued on any context. Takes NULL. */
void memory_give(struct memory *m, void *p);
/* Behind what c has enqueued: memory that no other context has ever seen. Takes NULL. */
void memory_give_own(struct memory *m, struct cuda *c, void *p);

/* What the device has, and what nobody has after the pool has given back what it keeps; zeros when the device does not say. Waits for what is given back. */
void memory_left(struct memory *m, size_t *free, size_t *total);

/* Around a capture. */
void memory_lock(struct memory *m);
void memory_unlock(struct memory *m);

#endif
