/*
 * vec_base.c - vec_body.h for SSE2, the floor of x86-64. See vec.h.
 */
#define VL 4
#define V_TARGET __attribute__((target("sse2")))
#define V_TABLE vec_base
#include "kernels/cpu/vec_body.h"
