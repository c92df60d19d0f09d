/*
 * isa.c - asks the processor and the kernel what may be used. Called by be_cpu's open only. Threads: any.
 */
#include "kernels/cpu/isa.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#define ARCH_REQ_XCOMP_PERM 0x1023
#define XFEATURE_XTILEDATA 18

static int has_avx2(void)
{
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

static int has_avx512(void)
{
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq");
}

static int has_f16c(void)
{
  unsigned a, b, c, d;

  return __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
}

static int has_avx512_bf16(void)
{
  unsigned a, b, c, d;

  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
}

/* The tiles are 8 kB of state that Linux grants to a process on request only. */
static int has_amx_bf16(void)
{
  unsigned a, b, c, d;

  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1))
    return 0;
  return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

enum cpu_isa isa_detect(enum cpu_isa limit)
{
  __builtin_cpu_init();
  if (limit < ISA_AVX2 || !has_avx2() || !has_f16c())
    return ISA_BASE;
  if (limit < ISA_AVX512 || !has_avx512())
    return ISA_AVX2;
  if (limit < ISA_BF16 || !has_avx512_bf16())
    return ISA_AVX512;
  if (limit < ISA_AMX || !has_amx_bf16())
    return ISA_BF16;
  return ISA_AMX;
}

const char *isa_name(enum cpu_isa isa)
{
  static const char *const names[] = {"sse2", "avx2", "avx512", "avx512_bf16", "amx_bf16"};

  return names[isa];
}
