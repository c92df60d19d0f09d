/*
 * convert.h - numbers of one element type as another. The 16-bit formats are those of base/half.h.
 *
 * Arrays need not be aligned. To I32 and U8 numbers are rounded to nearest and clamped to the range; NaN becomes 0.
 *
 * Callers: kernels/ (upload, download, packing of parameters) and tests. Threads: pure functions.
 */
#ifndef SAFELIGHT_KERNELS_CONVERT_H
#define SAFELIGHT_KERNELS_CONVERT_H

#include "kernels/tensor.h"

/* Element i of an array of any type, as fp32 and from fp32. */
float convert_get(const void *p, enum dtype t, int64_t i);
void convert_set(void *p, enum dtype t, int64_t i, float v);

/* Converts n elements; src and dst do not overlap. The same type on both sides is a plain copy. */
void convert_array(void *dst, enum dtype dst_type, const void *src, enum dtype src_type, int64_t n);

#endif
