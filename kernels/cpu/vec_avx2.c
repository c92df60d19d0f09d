/*
 * vec_avx2.c - vec_body.h for AVX2 with FMA and F16C. See vec.h.
 */
#define VL 8
#define V_TARGET __attribute__((target("avx2,fma,f16c")))
#define V_TABLE vec_avx2
#include "kernels/cpu/vec_body.h"
