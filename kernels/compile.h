/*
 * compile.h - the plans of be_cuda for a GPU that need not be there: which ones a model asks for, and compiling them into a folder.
 *
 * The compiler is a part of safelight-cuda.so, like be_cuda, and is asked in two steps. First a model is opened and drawn with on its outline: a backend
 * that computes nothing, gives out addresses that nobody may follow, and notes which plans be_cuda would ask cuDNN for, by be_cuda's own code. Then run()
 * compiles what was noted. A server whose be_config.plan_cache is that folder finds them where its device has the description's name, compute capability,
 * count of processors and driver, and its cuDNN is of the same version (kernels/cuda/device_id.h); everything else it compiles itself.
 *
 * Callers: server/compile.c. Threads: one owner; run() has threads of its own and returns when they have ended.
 */
#ifndef SAFELIGHT_KERNELS_COMPILE_H
#define SAFELIGHT_KERNELS_COMPILE_H

#include "kernels/backend.h"

struct compiler; /* opaque outside the shared object */

struct compiler_config {
  const char *description; /* of the GPU, in cuDNN's JSON: deploy/devices. Read by open */
  int driver;              /* 0, or the CUDA version of its driver where the description's is another: 12080 for 12.8 */
  const char *folder;      /* that exists, for the plans. Read by run */
  int want_f16;            /* activations in fp16 instead of bf16 */
};

/* One plan is done. */
struct compiler_step {
  const char *plan;        /* for people; valid during the call */
  size_t bytes;            /* of its text on disk */
  int done, plans;         /* so far, and in all */
  int is_found;            /* it was on disk */
  int is_chosen;           /* the heuristics were asked for its class's engine, which was not on disk */
  const struct err *err;   /* NULL, or why there is none */
};

struct compiler_ops {
  const char *(*version)(void); /* of cuDNN, for people */
  /* E_ARG for a description that cuDNN does not take. On failure *c is NULL. */
  MUST_CHECK int (*open)(struct compiler **c, const struct compiler_config *cfg, struct err *e);
  void (*close)(struct compiler *c); /* takes NULL; what was opened on its outline is closed before */
  struct be *(*outline)(struct compiler *c);
  int (*count)(const struct compiler *c); /* plans noted so far, each once */
  void (*name)(const struct compiler *c, int i, char *text, size_t size); /* of one of them, for people */
  /* Compiles them on so many threads. step may be NULL; it is called by one thread at a time. Goes on after a plan that failed, but for a folder that
   * takes none (E_FILE); returns the first failure. */
  MUST_CHECK int (*run)(struct compiler *c, int threads, void (*step)(void *arg, const struct compiler_step *s), void *arg, struct err *e);
};

/* find.c: loads it, with what stands in for the driver. E_DEVICE with one sentence that names the file that is missing. From then on be_find_cuda finds
 * no GPU in this process. */
MUST_CHECK int compiler_find(const struct compiler_ops **ops, struct err *e);

#endif
