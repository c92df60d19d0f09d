/*
 * pass.h - passes of be_ops as captured graphs: a step of the UNet is a thousand launches that are the same each time, and one graph launch instead.
 *
 * What a captured graph has fixed is every address and shape that its kernels were launched with. What may change from pass to pass (timesteps,
 * coefficients, low-rank slots, keys and values outside of the pass's own memory) lies in a table in device memory that each replay fills anew.
 *
 * A pass is walked by its caller, op by op, and the backend decides what a walk is for:
 *
 *   COLLECT   every walk starts like this: nothing is launched; what the graph has fixed goes into a digest, what may change into the table
 *             (pinned host memory). At the end a graph of this digest is launched, and the pass is done. When there is none, the caller walks again:
 *   PLAIN     ops are launched one by one, as outside of a pass: the first time that a digest is seen, so that plans, workspaces and
 *             scratch memory are there, and for ever when its capture has failed
 *   CAPTURE   the second time: ops are launched into a graph, which must have the digest of the walk before; then it is launched
 *
 * So a swap of generations finds its graph by itself: factors beside the weights are in the table, replaced weights have addresses of their own
 * and thereby a graph of their own. A graph whose memory has moved is never found again. No graph can run on memory that the walk did not name
 * just now. Nothing is allocated and nobody waits inside a replay; a walk waits for the copy of the table of the pass before the last one.
 * The tables of all graphs are taken when the context is opened: a capture takes no memory of the device either.
 *
 * A rehearsal (be_ops.rehearse) is no mode of a pass but goes on over passes and ops outside of them: every op takes its scratch memory, and has its plan
 * made where that is wanted, and launches nothing.
 *
 * Callers: the C files of be_cuda. Threads: the one that owns the struct cuda.
 */
#ifndef SAFELIGHT_KERNELS_CUDA_PASS_H
#define SAFELIGHT_KERNELS_CUDA_PASS_H

#include <cuda_runtime_api.h>

#include "kernels/backend.h"

enum { PASS_GRAPHS = 48, PASS_TABLE = 1 << 20 /* bytes; SDXL with factors at 700 sites and 64 rows takes half of it */ };

enum pass_mode { PASS_NONE, PASS_COLLECT, PASS_PLAIN, PASS_CAPTURE };

struct pass_digest {
  uint64_t a, b; /* 128 bits, so that no two passes of a process share one */
};

enum pass_state { GRAPH_NONE, GRAPH_SEEN, GRAPH_READY, GRAPH_REFUSED /* it does not capture: always plain */ };

struct pass_graph {
  enum pass_state state;
  struct pass_digest digest;
  cudaGraphExec_t exec;
  size_t table_bytes;
  long used;                  /* when, in passes */
};

struct pass {
  enum pass_mode mode, next;  /* next: what pass_begin starts */
  enum be_rehearsal rehearsal;
  int is_off;                 /* the configuration wants every op launched anew */
  struct pass_digest digest, sought; /* of this walk; of the COLLECT that asked for this CAPTURE */
  const char *own;            /* memory whose addresses belong to the pass */
  size_t own_bytes;
  char *tables;               /* device memory: PASS_TABLE bytes for each graph */
  char *staging[2];           /* pinned; tables on their way */
  cudaEvent_t copied[2];
  int is_copying[2], which;
  size_t filled;              /* bytes of staging[which]; more than PASS_TABLE: too much for a graph */
  char *table;                /* CAPTURE: the graph's */
  struct pass_graph graph[PASS_GRAPHS];
  long clock, replays, captures;
};

struct cuda;

/* Of a context that has its stream and has joined its memory. */
MUST_CHECK int pass_open(struct cuda *c, int is_off, struct err *e);
void pass_close(struct cuda *c); /* takes one whose pass is zeroed */

/* Of device memory. */
size_t pass_bytes(const struct pass *p);

/* be_ops.rehearse, pass_begin and pass_end. */
int cuda_rehearse(struct be *be, enum be_rehearsal what);
MUST_CHECK int cuda_pass_begin(struct be *be, const void *own, size_t own_bytes, struct err *e);
MUST_CHECK int cuda_pass_end(struct be *be, int code, int *again, struct err *e);

/*
 * Called by every op that may be part of a pass, after it has its scratch memory (whose address the pass adds) and before it launches anything.
 * what: a name that no other op has, with static storage. t: its tensors; w: its weight or NULL; more: further numbers that its launches depend
 * on, without padding. Nonzero: the op is done, nothing is to be launched.
 */
MUST_CHECK int pass_skips(struct cuda *c, const char *what, const struct tensor *t, int n, const struct weight *w, const void *more, size_t bytes);
/* Where kernels find `bytes` of table at replay: in *at, or NULL when they are to use their parameters. Before pass_skips. */
void pass_table(struct cuda *c, const void *rows, size_t bytes, const void **at);
/* Whether keys and values at p may lie elsewhere in the next pass. */
int pass_is_foreign(const struct cuda *c, const void *p);
/* 0, or E_INTERNAL inside a pass or a rehearsal, where `what` has no place. */
MUST_CHECK int pass_refuses(struct cuda *c, const char *what, struct err *e);

#endif
