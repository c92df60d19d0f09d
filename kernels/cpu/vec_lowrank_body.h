/*
 * vec_lowrank_body.h - part of vec_body.h: the two halves of a low-rank product, z = down x and y += up z, in fp32.
 *
 * A few rows are worked on together so that a vector of a factor is loaded once for all of them. The shrinking runs along the inputs, one
 * vector of partial sums per row and rank, because ranks are few; the expanding runs along the outputs. The order of each
 * row's sums is the same whatever other rows there are: where rows are missing, the last one is computed again and not used.
 */

#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 8")
#endif

enum { SHRINK_RANKS = VL == 16 ? 4 : 2, EXPAND_ROWS = 4 }; /* as many sums as there are registers for */

/* z (n rows, ldz) of the rows at x[0..VEC_SHRINK_ROWS-1], each of D numbers, a multiple of VL. */
INLINE void shrink_rows(float *z, int64_t ldz, const float *const *x, int64_t n, int64_t D, const float *down, int64_t rank)
{
  for (int64_t j = 0; j < rank; j += SHRINK_RANKS) {
    VEC acc[VEC_SHRINK_ROWS][SHRINK_RANKS];

    UNROLL for (int r = 0; r < VEC_SHRINK_ROWS; r++)
      UNROLL for (int k = 0; k < SHRINK_RANKS; k++)
        acc[r][k] = V_SET(0.0f);
    for (int64_t i = 0; i < D; i += VL) {
      VEC d[SHRINK_RANKS];

      UNROLL for (int k = 0; k < SHRINK_RANKS; k++)
        d[k] = V_LOAD(down + (j + k) * D + i);
      UNROLL for (int r = 0; r < VEC_SHRINK_ROWS; r++) {
        VEC v = V_LOAD(x[r] + i);

        UNROLL for (int k = 0; k < SHRINK_RANKS; k++)
          acc[r][k] = V_FMA(v, d[k], acc[r][k]);
      }
    }
    for (int r = 0; r < n; r++)
      for (int k = 0; k < SHRINK_RANKS && j + k < rank; k++)
        z[r * ldz + j + k] = sum_lanes(acc[r][k]);
  }
}

INLINE void shrink_body(float *z, int64_t ldz, const void *x, enum dtype type, int64_t rows, int64_t in, const float *down,
                        int64_t rank, float *work)
{
  int64_t D = (in + 15) / 16 * 16;

  for (int64_t at = 0; at < rows; at += VEC_SHRINK_ROWS) {
    int64_t n = rows - at < VEC_SHRINK_ROWS ? rows - at : VEC_SHRINK_ROWS;
    const float *p[VEC_SHRINK_ROWS];

    for (int64_t r = 0; r < VEC_SHRINK_ROWS; r++) {
      int64_t row = (at + (r < n ? r : n - 1)) * in, i = 0;

      if (type == DT_F32 && in == D) {
        p[r] = (const float *)x + row;
        continue;
      }
      for (; i + VL <= in; i += VL)
        V_STORE(work + r * D + i, load(x, row + i, type));
      for (; i < D; i += VL)
        V_STORE(work + r * D + i, i < in ? load_part(x, row + i, type, in - i) : V_SET(0.0f));
      p[r] = work + r * D;
    }
    shrink_rows(z + at * ldz, ldz, p, n, D, down, rank);
  }
}

V_TARGET static void shrink(float *z, int64_t ldz, const void *x, enum dtype type, int64_t rows, int64_t in, const float *down,
                            int64_t rank, float *work)
{
  if (type == DT_BF16)
    shrink_body(z, ldz, x, DT_BF16, rows, in, down, rank, work);
  else
    shrink_body(z, ldz, x, DT_F32, rows, in, down, rank, work);
}

/* Outputs c to c + vectors * VL of n <= EXPAND_ROWS rows; part: how many of a single vector are there. */
INLINE void expand_tile(void *y, enum dtype type, const float *z, int64_t ldz, int64_t n, int64_t out, int64_t c, int vectors,
                        int64_t part, const float *up, int64_t ldu, int64_t rank)
{
  VEC acc[EXPAND_ROWS][2];

  UNROLL for (int r = 0; r < EXPAND_ROWS; r++)
    UNROLL for (int v = 0; v < vectors; v++) {
      int64_t at = (r < n ? r : n - 1) * out + c + v * VL;

      acc[r][v] = part < VL ? load_part(y, at, type, part) : load(y, at, type);
    }
  for (int64_t k = 0; k < rank; k++) {
    VEC u[2];

    UNROLL for (int v = 0; v < vectors; v++)
      u[v] = V_LOAD(up + k * ldu + c + v * VL);
    UNROLL for (int r = 0; r < EXPAND_ROWS; r++) {
      VEC s = V_SET(z[(r < n ? r : n - 1) * ldz + k]);

      UNROLL for (int v = 0; v < vectors; v++)
        acc[r][v] = V_FMA(s, u[v], acc[r][v]);
    }
  }
  UNROLL for (int r = 0; r < EXPAND_ROWS; r++)
    UNROLL for (int v = 0; v < vectors; v++) {
      if (r < n && part < VL)
        store_part(y, r * out + c, type, acc[r][v], part);
      else if (r < n)
        store(y, r * out + c + v * VL, type, acc[r][v]);
    }
}

INLINE void expand_body(void *y, enum dtype type, const float *z, int64_t ldz, int64_t rows, int64_t out, const float *up,
                        int64_t rank)
{
  int64_t ldu = (out + 15) / 16 * 16;

  for (int64_t at = 0; at < rows; at += EXPAND_ROWS) {
    int64_t n = rows - at < EXPAND_ROWS ? rows - at : EXPAND_ROWS, c = 0;
    char *p = (char *)y + (size_t)(at * out) * (type == DT_BF16 ? 2 : 4);
    const float *s = z + at * ldz;

    for (; n == EXPAND_ROWS && c + 2 * VL <= out; c += 2 * VL)
      expand_tile(p, type, s, ldz, EXPAND_ROWS, out, c, 2, VL, up, ldu, rank);
    for (; c + VL <= out; c += VL)
      expand_tile(p, type, s, ldz, n, out, c, 1, VL, up, ldu, rank);
    if (c < out)
      expand_tile(p, type, s, ldz, n, out, c, 1, out - c, up, ldu, rank);
  }
}

V_TARGET static void expand(void *y, enum dtype type, const float *z, int64_t ldz, int64_t rows, int64_t out, const float *up,
                            int64_t rank)
{
  if (type == DT_BF16)
    expand_body(y, DT_BF16, z, ldz, rows, out, up, rank);
  else
    expand_body(y, DT_F32, z, ldz, rows, out, up, rank);
}
