/*
 * convert.c - see convert.h. Called by the backends to upload, download and pack parameters.
 */
#include "kernels/convert.h"

#include <math.h>
#include <string.h>

#include "base/half.h"

float convert_get(const void *p, enum dtype t, int64_t i)
{
  const char *at = (const char *)p + (size_t)i * dtype_size(t);
  uint16_t h;
  int32_t n;
  float f;

  switch (t) {
  case DT_F32:
    memcpy(&f, at, sizeof f);
    return f;
  case DT_F16:
    memcpy(&h, at, sizeof h);
    return f16_to_f32(h);
  case DT_BF16:
    memcpy(&h, at, sizeof h);
    return bf16_to_f32(h);
  case DT_I32:
    memcpy(&n, at, sizeof n);
    return (float)n;
  case DT_U8:
    return (float)*(const uint8_t *)at;
  }
  return NAN;
}

static int32_t to_int(float v, float lo, int32_t lo_int, float hi, int32_t hi_int)
{
  if (v >= hi)
    return hi_int;
  if (v <= lo)
    return lo_int;
  return v == v ? (int32_t)rintf(v) : 0;
}

void convert_set(void *p, enum dtype t, int64_t i, float v)
{
  char *at = (char *)p + (size_t)i * dtype_size(t);
  uint16_t h;
  int32_t n;

  switch (t) {
  case DT_F32:
    memcpy(at, &v, sizeof v);
    return;
  case DT_F16:
    h = f32_to_f16(v);
    memcpy(at, &h, sizeof h);
    return;
  case DT_BF16:
    h = f32_to_bf16(v);
    memcpy(at, &h, sizeof h);
    return;
  case DT_I32:
    n = to_int(v, -0x1p31f, INT32_MIN, 0x1p31f, INT32_MAX);
    memcpy(at, &n, sizeof n);
    return;
  case DT_U8:
    *(uint8_t *)at = (uint8_t)to_int(v, 0, 0, 255, 255);
    return;
  }
}

void convert_array(void *dst, enum dtype dst_type, const void *src, enum dtype src_type, int64_t n)
{
  if (dst_type == src_type) {
    memcpy(dst, src, (size_t)n * dtype_size(src_type));
    return;
  }
  for (int64_t i = 0; i < n; i++)
    convert_set(dst, dst_type, i, convert_get(src, src_type, i));
}
