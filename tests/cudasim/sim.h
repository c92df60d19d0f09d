/*
 * sim.h - the CUDA backend without a GPU: its own .cu files and host code, compiled by clang for the CPU and run one thread after the other.
 *
 *   include/     headers with CUDA's names, in front of the real ones
 *   fiber.c      a block: a fiber for each thread; barriers, shuffles, shared memory full of NaN, and what is wrong with their use
 *   runtime.c    memory of exact size between ASan's red zones, streams, events, graphs, errors
 *   sim_vendor.c kernels/cuda/blas.h and dnn.h as plain loops
 *
 * What it reports (cudaErrorLaunchFailure, with a sentence in cudasim_fault()): a barrier that not all threads of the block reach; different
 * barriers at once; a shuffle, or a product on tensor cores, whose lanes are not all there, or that reads a lane outside of its mask; launches
 * beyond the limits of the hardware; work for a device that is not current; allocations and waits while a graph is captured; memory of the pool that
 * is given back on another stream than it was taken on while what some stream has enqueued is not before that. Errors stick, as on a device, until
 * cudasim_reset().
 * What shows in the numbers: a missing barrier (threads run in an order that the seed picks, and shared memory starts as NaN); memory that
 * nobody wrote (fresh device memory is NaN). What ASan and UBSan end the program for: bounds of device memory and of shared arrays,
 * misaligned vector accesses, device memory freed too early, memory of another device than the one that computes.
 * What it cannot show: speed, races inside a warp, the vendor's libraries.
 *
 * Callers: tests. Threads: one; nothing here is locked.
 */
#ifndef SAFELIGHT_TESTS_CUDASIM_SIM_H
#define SAFELIGHT_TESTS_CUDASIM_SIM_H

#include <cuda_runtime_api.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

struct cudasim_stream;
struct gpu_key;

/* Whether this is a card after all: tests/gpu/card.c stands behind this header there. */
int cudasim_is_card(void);
/* The order in which threads of a block run, until the next call: 0 is ascending, others shuffle at every barrier. */
void cudasim_seed(uint64_t seed);
/* "" or what went wrong; survives until cudasim_reset(). */
const char *cudasim_fault(void);
/* Forgets an error. */
void cudasim_reset(void);
/* The n-th allocation of device memory from now on fails, and so does the same one when it is tried again at once; 0: none. */
void cudasim_fail_allocation(int n);
/* The next n graphs cannot be instantiated. */
void cudasim_fail_graphs(int n);
/* The next n captures cannot begin for want of memory. */
void cudasim_fail_captures(int n);
/* How much memory each device has, but for the vendor libraries' working memory, which the stand-ins do without; 8 GiB at first. */
void cudasim_memory(size_t bytes);
/* How many devices there are said to be; 1 at first. */
void cudasim_devices(int count);
/* Whether devices have memory pools, as they do at first; for backends that are opened later. */
void cudasim_pools(int are_there);

/* Sees the key of every convolution and attention that dnn.h is asked for from now on; NULL: nobody does. */
void cudasim_watch_dnn(void (*see)(const struct gpu_key *k));

struct cudasim_count {
  long launches, allocations, live; /* live: device and pinned allocations that are not freed */
  long stops;     /* calls that wait for all of a device: cudaMalloc, cudaFree and those of pinned memory */
  long waits;     /* of the host for a stream */
  long pageable;  /* copies from or to host memory that is not pinned, which may wait too; 0 on a card */
  long reserved;  /* bytes that the pool holds, used or not; 0 on a card */
  long graphs, replays, live_graphs; /* graphs: instantiated */
};
struct cudasim_count cudasim_counts(void);

/* Between the simulator's own files: runs `run` on a copy of arg, now or when a captured graph is launched. */
int cudasim_enqueue(struct cudasim_stream *s, int (*run)(void *arg), const void *arg, size_t bytes);
int cudasim_sticky(void); /* 0 or the error that every call gives from now on */
struct cudasim_count *cudasim_counters(void);
/* Records a fault; returns its code. */
int cudasim_fail(int code, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

#ifdef __cplusplus
}
#endif

#endif
