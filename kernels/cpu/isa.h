/*
 * isa.h - which instruction set the vector code of be_cpu may use.
 *
 * The answer respects both the processor and oneDNN's own limit (ONEDNN_MAX_CPU_ISA), so that one variable makes the whole
 * backend behave like an older machine: that is how the slower paths are tested. Called once, from open. No state.
 */
#ifndef SAFELIGHT_KERNELS_CPU_ISA_H
#define SAFELIGHT_KERNELS_CPU_ISA_H

enum cpu_isa {
  ISA_BASE,   /* any x86-64: SSE2 */
  ISA_AVX2,   /* AVX2, FMA, F16C */
  ISA_AVX512, /* AVX-512 F, BW, VL, DQ */
  ISA_BF16,   /* and AVX512-BF16 */
  ISA_AMX     /* and AMX tiles for bf16, with the kernel's permission */
};

/* The best set not above limit. Asks the kernel for the AMX tiles when it comes to that (per process, harmless to repeat). */
enum cpu_isa isa_detect(enum cpu_isa limit);

/* "avx512_bf16" and so on. */
const char *isa_name(enum cpu_isa isa);

#endif
