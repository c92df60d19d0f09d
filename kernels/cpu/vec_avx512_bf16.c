/*
 * vec_avx512_bf16.c - vec_body.h for AVX-512 with the bf16 conversion instructions. See vec.h.
 */
#define VL 16
#define V_TARGET __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))
#define V_TABLE vec_avx512_bf16
#define V_BF16 1
#include "kernels/cpu/vec_body.h"
