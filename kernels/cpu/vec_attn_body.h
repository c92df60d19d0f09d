/*
 * vec_attn_body.h - part of vec_body.h: attention of a few queries against all keys of one head in fp32.
 *
 * Flash attention (Dao et al. 2022): keys come in blocks of VEC_ATTN_KEYS, a running maximum and sum per query make the softmax
 * exact in one pass, and only one block of scores exists. Keys lie block by block, each block transposed (K, keys), so
 * that a vector holds neighbouring keys and a query's number is broadcast; values lie row by row.
 */

/* s (4 queries, VEC_ATTN_KEYS) = q kt for one block of keys. */
INLINE void attn_scores(float *s, const float *q, const float *kt, int64_t K)
{
  for (int j = 0; j < VEC_ATTN_KEYS; j += 2 * VL) {
    VEC acc[4][2];

    for (int i = 0; i < 4; i++)
      acc[i][0] = acc[i][1] = V_SET(0.0f);
    for (int64_t k = 0; k < K; k++) {
      VEC k0 = V_LOAD(kt + k * VEC_ATTN_KEYS + j), k1 = V_LOAD(kt + k * VEC_ATTN_KEYS + j + VL);

      for (int i = 0; i < 4; i++) {
        VEC b = V_SET(q[i * K + k]);

        acc[i][0] = V_FMA(b, k0, acc[i][0]);
        acc[i][1] = V_FMA(b, k1, acc[i][1]);
      }
    }
    for (int i = 0; i < 4; i++) {
      V_STORE(s + i * VEC_ATTN_KEYS + j, acc[i][0]);
      V_STORE(s + i * VEC_ATTN_KEYS + j + VL, acc[i][1]);
    }
  }
}

/* o (4 queries, Kp) += p (4, VEC_ATTN_KEYS) v (keys, Kp) over the first `keys` keys. */
INLINE void attn_values(float *o, const float *p, const float *v, int64_t keys, int64_t Kp)
{
  for (int64_t c = 0; c < Kp; c += VL) {
    VEC acc[4];

    for (int i = 0; i < 4; i++)
      acc[i] = V_LOAD(o + i * Kp + c);
    for (int64_t j = 0; j < keys; j++) {
      VEC row = V_LOAD(v + j * Kp + c);

      for (int i = 0; i < 4; i++)
        acc[i] = V_FMA(V_SET(p[i * VEC_ATTN_KEYS + j]), row, acc[i]);
    }
    for (int i = 0; i < 4; i++)
      V_STORE(o + i * Kp + c, acc[i]);
  }
}

/* Turns one row of scores into weights relative to the running maximum; returns the factor for what was summed before. */
INLINE float attn_softmax(float *s, int64_t keys, float scale, float *max, float *sum)
{
  float m = *max, factor;
  VEC total = V_SET(0.0f), mv, av = V_SET(scale);

  for (int64_t j = 0; j < keys; j++) {
    float t = s[j] * scale;

    m = t > m || t != t ? t : m;
  }
  mv = V_SET(m);
  for (int64_t j = 0; j < keys; j += VL) {
    VEC e = v_exp(V_LOAD(s + j) * av - mv);

    V_STORE(s + j, e);
    if (j + VL > keys) { /* keys that are not there weigh nothing */
      for (int64_t i = keys; i < j + VL; i++)
        s[i] = 0.0f;
      e = V_LOAD(s + j);
    }
    total = total + e;
  }
  factor = *max == m ? 1.0f : *max < -3.0e38f ? 0.0f : expf(*max - m);
  *sum = *sum * factor + sum_lanes(total);
  *max = m;
  return factor;
}

V_TARGET static void attention(const struct vec_attn *a, void *o, enum dtype type, int64_t o_stride, const float *q, int nq,
                               int64_t t0, float *work)
{
  float *s = work, *acc = work + VEC_ATTN_QUERIES * VEC_ATTN_KEYS;
  float max[VEC_ATTN_QUERIES], sum[VEC_ATTN_QUERIES];
  int64_t last = a->causal && t0 + nq < a->T ? t0 + nq : a->T;

  memset(acc, 0, (size_t)(VEC_ATTN_QUERIES * a->Kp) * sizeof *acc);
  for (int i = 0; i < VEC_ATTN_QUERIES; i++) {
    max[i] = -INFINITY;
    sum[i] = 0.0f;
  }
  for (int64_t j0 = 0; j0 < last; j0 += VEC_ATTN_KEYS) {
    int64_t keys = last - j0 < VEC_ATTN_KEYS ? last - j0 : VEC_ATTN_KEYS;

    for (int i = 0; i < nq; i += 4)
      attn_scores(s + i * VEC_ATTN_KEYS, q + i * a->K, a->kt + j0 * a->K, a->K);
    for (int i = 0; i < nq; i++) {
      int64_t seen = a->causal && t0 + i + 1 - j0 < keys ? t0 + i + 1 - j0 : keys;
      float factor = 1.0f;

      if (seen > 0)
        factor = attn_softmax(s + i * VEC_ATTN_KEYS, seen, a->scale, &max[i], &sum[i]);
      for (int64_t j = seen > 0 ? seen : 0; j < keys; j++)
        s[i * VEC_ATTN_KEYS + j] = 0.0f;
      if (factor != 1.0f)
        for (int64_t c = 0; c < a->Kp; c += VL)
          V_STORE(acc + i * a->Kp + c, V_LOAD(acc + i * a->Kp + c) * V_SET(factor));
    }
    for (int i = 0; i < nq; i += 4)
      attn_values(acc + i * a->Kp, s + i * VEC_ATTN_KEYS, a->v + j0 * a->Kp, keys, a->Kp);
  }
  for (int i = 0; i < nq; i++) {
    VEC inv = V_SET(1.0f / sum[i]);
    int64_t c = 0;

    for (; c + VL <= a->K; c += VL)
      store(o, i * o_stride + c, type, V_LOAD(acc + i * a->Kp + c) * inv);
    if (c < a->K)
      store_part(o, i * o_stride + c, type, V_LOAD(acc + i * a->Kp + c) * inv, a->K - c);
  }
}
