/*
 * dnn_key.c - what a plan is known by; see dnn.h.
 *
 * Called by vendor_dnn.c, outline.c and the simulator's tests. Threads: any; no state.
 */
#include "kernels/cuda/dnn.h"

#include <stdio.h>
#include <string.h>

_Static_assert(sizeof(struct gpu_key) % 8 == 0, "hashed by words of eight");

/* Stands for a pointer that is there. */
static void *is_there(const void *p)
{
  return p ? (void *)(uintptr_t)1 : NULL;
}

/* Field by field: what lies between fields is compared as well. */
void gpu_key_of_conv(struct gpu_key *k, const struct gpu_conv *c)
{
  memset(k, 0, sizeof *k);
  k->conv.B = c->B;
  k->conv.H = c->H;
  k->conv.W = c->W;
  k->conv.in = c->in;
  k->conv.Ho = c->Ho;
  k->conv.Wo = c->Wo;
  k->conv.out = c->out;
  k->conv.kh = c->kh;
  k->conv.kw = c->kw;
  k->conv.stride = c->stride;
  k->conv.pad_lo = c->pad_lo;
  k->conv.pad_hi = c->pad_hi;
  k->conv.act = c->act;
  k->conv.y_type = c->y_type;
  k->conv.bias = is_there(c->bias);
  k->conv.residual = is_there(c->residual);
}

void gpu_key_of_attention(struct gpu_key *k, const struct gpu_attention *a)
{
  memset(k, 0, sizeof *k);
  k->attention.B = a->B;
  k->attention.T = a->T;
  k->attention.keys = a->keys;
  k->attention.heads = a->heads;
  k->attention.K = a->K;
  k->attention.act = a->act;
}

void gpu_key_class(struct gpu_key *class, const struct gpu_key *k)
{
  memmove(class, k, sizeof *class);
  class->conv.B = k->conv.B ? 2 : 0;
  class->attention.B = k->attention.B ? 2 : 0;
}

static const char *type_name(enum dtype t)
{
  return t == DT_F32 ? "fp32" : t == DT_F16 ? "fp16" : "bf16";
}

void gpu_key_name(char *text, size_t size, const struct gpu_key *k)
{
  const struct gpu_conv *c = &k->conv;
  const struct gpu_attention *a = &k->attention;
  int64_t B = c->B ? c->B : a->B;
  const char *s = B == 1 ? "" : "s";

  if (c->B)
    snprintf(text, size, "convolution %lld>%lld %dx%d of %lldx%lld%s%s, %s%s, %lld picture%s", (long long)c->in, (long long)c->out, c->kw, c->kh,
             (long long)c->W, (long long)c->H, c->stride > 1 ? ", stride 2" : "", c->residual ? ", residual" : "", type_name(c->act),
             c->y_type == c->act ? "" : " to fp32", (long long)B, s);
  else
    snprintf(text, size, "attention of %d head%s of %d, %lld queries, %lld keys, %s, %lld picture%s", a->heads, a->heads == 1 ? "" : "s", a->K,
             (long long)a->T, (long long)a->keys, type_name(a->act), (long long)B, s);
}
