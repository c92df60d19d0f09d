/*
 * peak.h - what this machine can do at best through oneDNN: the yardstick of `safelight bench`.
 *
 * Callers: server's bench, kernels/lab. Threads: the owner's of be.
 */
#ifndef SAFELIGHT_KERNELS_CPU_PEAK_H
#define SAFELIGHT_KERNELS_CPU_PEAK_H

#include "kernels/backend.h"

/* The best rate, in floating-point operations a second, of large matrix products and of 3x3 convolutions of SD1.5's shapes,
 * with the threads and activation type of be, which is an open be_cpu. About two seconds. E_NOMEM when the matrices
 * (under 100 MB) do not fit; the results are then untouched. */
MUST_CHECK int cpu_measure_peaks(struct be *be, double *matmul_flops, double *conv_flops, struct err *e);

#endif
