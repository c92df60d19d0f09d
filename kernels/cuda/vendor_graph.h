/*
 * vendor_graph.h - a convolution or an attention as a finished cuDNN plan, for the GPU that is there or for one that is only described.
 *
 * Callers: vendor_dnn.c, and tests/gpu/compile_graphs.c, which compiles every graph for GPUs that are not there. Threads: any; no state but vendor_nvrtc.h's.
 */
#ifndef SAFELIGHT_KERNELS_CUDA_VENDOR_GRAPH_H
#define SAFELIGHT_KERNELS_CUDA_VENDOR_GRAPH_H

#include <cudnn.h>

#include "kernels/cuda/dnn.h"

enum { GRAPH_KNOBS = 32, GRAPH_X = 1, GRAPH_W, GRAPH_Y, GRAPH_RESIDUAL, GRAPH_BIAS, GRAPH_Q, GRAPH_K, GRAPH_V, GRAPH_O, GRAPH_SCALE };

/* How an engine and its settings are chosen, by number: another rule has another one, and what was chosen under the old one and kept is not found again. */
enum { GRAPH_RULES = 2 };

enum { GRAPH_TEXT_MAX = 16 << 20 /* bytes of a saved plan */ };

/* Where a plan is to run: one of the two is set. */
struct graph_target {
  cudnnHandle_t handle;
  cudnnBackendDescriptor_t device; /* from graph_device_open */
};

/* An engine with its settings; what fixes the order of sums. engine -1: not chosen yet. */
struct graph_choice {
  int64_t engine, knob_value[GRAPH_KNOBS];
  cudnnBackendKnobType_t knob_type[GRAPH_KNOBS];
  int knobs;
};

struct graph_plan {
  cudnnBackendDescriptor_t plan;
  int64_t workspace;              /* bytes, GPU_DNN_WORKSPACE at most */
};

/* A device from its description in JSON (deploy/devices). Freed with cudnnBackendDestroyDescriptor. */
MUST_CHECK int graph_device_open(cudnnBackendDescriptor_t *device, const char *json, struct err *e);
/* The same of the card that the handle is for. */
MUST_CHECK int graph_device_of(cudnnBackendDescriptor_t *device, cudnnHandle_t handle, struct err *e);
/* A device's description in JSON, as cuDNN has it: freed by the caller, NULL after failure. */
MUST_CHECK int graph_device_text(cudnnBackendDescriptor_t device, char **text, struct err *e);

/* choice->engine -1: takes the first of the heuristics that compiles, splits no sum, is deterministic and keeps to GPU_DNN_WORKSPACE with these pictures and
 * with GPU_DNN_ROWS of them, and says so in *choice, with the settings under which the count of pictures splits no sum either; else exactly that one, and
 * E_INTERNAL when it needs more. Pointers of c and a decide what is fused and are not followed. *p is the caller's, freed with graph_plan_close. */
MUST_CHECK int graph_conv_open(struct graph_plan *p, const struct graph_target *t, const struct gpu_conv *c, struct graph_choice *choice, struct err *e);
MUST_CHECK int graph_attention_open(struct graph_plan *p, const struct graph_target *t, const struct gpu_attention *a, struct graph_choice *choice,
                                    struct err *e);
void graph_plan_close(struct graph_plan *p);

/* A plan as cuDNN's text, *n bytes, freed by the caller; and back, on the kind of device and the version of cuDNN that it was made
 * for: cuDNN checks both. */
MUST_CHECK int graph_plan_save(const struct graph_plan *p, char **text, size_t *n, struct err *e);
MUST_CHECK int graph_plan_load(struct graph_plan *p, const struct graph_target *t, const char *text, size_t n, struct err *e);

/* 0, or the error recorded with cuDNN's own words: E_NOMEM, E_INTERNAL for a graph that cuDNN does not take, E_DEVICE for everything else. */
MUST_CHECK int graph_check(cudnnStatus_t s, const char *what, struct err *e);

#endif
