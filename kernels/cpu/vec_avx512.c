/*
 * vec_avx512.c - vec_body.h for AVX-512 without bf16 conversion. See vec.h.
 */
#define VL 16
#define V_TARGET __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")))
#define V_TABLE vec_avx512
#include "kernels/cpu/vec_body.h"
