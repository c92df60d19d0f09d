/*
 * attn.c - attention of be_cpu: which kernel, and how heads and queries are split over threads.
 *
 * With at least as many heads (over all pictures) as threads divide evenly, a thread takes whole heads and packs keys and values
 * into memory of its own, which its second-level cache holds. Otherwise (the VAE has one head) all threads pack one head together
 * and share its queries. Either way a head's result depends on that head alone. Callers: be_cpu.c. Threads: the owner's.
 */
#include "kernels/cpu/attn.h"

#include <assert.h>
#include <omp.h>

#include "kernels/cpu/cpu.h"

struct job {
  const struct attn_kernel *kernel;
  struct attn_head head;    /* of picture 0, head 0; the rest is added per item */
  const struct kv_row *kv;
  int64_t B;
  int heads;
  struct attn_sizes sizes;  /* for the longest keys */
  char *scratch;            /* per thread: packed, then work */
};

static size_t round64(size_t n)
{
  return (n + 63) / 64 * 64;
}

static struct attn_head item(const struct job *j, int64_t i)
{
  struct attn_head h = j->head;
  int64_t b = i / j->heads, n = i % j->heads;
  size_t size = dtype_size(h.type), at = (size_t)(b * h.Tq * h.stride + n * h.K) * size;

  h.q += at;
  h.o += at;
  h.k = (const char *)j->kv[b].k + (size_t)(n * h.K) * size;
  h.v = (const char *)j->kv[b].v + (size_t)(n * h.K) * size;
  h.Tk = j->kv[b].T;
  return h;
}

static void whole_heads(const struct job *j, int64_t from, int64_t to, char *mine)
{
  for (int64_t i = from; i < to; i++) {
    struct attn_head h = item(j, i);

    j->kernel->pack(&h, mine, 0, 1);
    j->kernel->run(&h, mine, 0, h.Tq, mine + round64(j->sizes.pack_bytes));
  }
}

static void shared_heads(const struct job *j, int threads)
{
#pragma omp parallel num_threads(threads)
  {
    int me = omp_get_thread_num(), all = omp_get_num_threads();
    char *work = j->scratch + round64(j->sizes.pack_bytes) + (size_t)me * round64(j->sizes.work_bytes);

    for (int64_t i = 0; i < j->B * j->heads; i++) {
      struct attn_head h = item(j, i);
      int64_t from, to;

      j->kernel->pack(&h, j->scratch, me, all);
#pragma omp barrier
      cpu_split(h.Tq, j->sizes.queries, me, all, &from, &to);
      if (from < to)
        j->kernel->run(&h, j->scratch, from, to, work);
#pragma omp barrier
    }
  }
}

int cpu_attention(struct be *be, struct tensor o, struct tensor q, const struct kv_row *kv, int heads, float scale, int causal,
                  struct err *e)
{
  struct cpu *c = cpu_of(be);
  int64_t B = q.d[0], T = q.d[1] * q.d[2], D = q.d[3], longest = 0, items = B * heads;
  struct job j = {c->isa == ISA_AMX && c->act == DT_BF16 ? &attn_amx : &attn_vec,
                  {c->vec, q.p, NULL, NULL, o.p, D, T, 0, D / heads, c->act, scale, causal}, kv, B, heads, {0, 0, 0}, NULL};
  double macs = 0;
  size_t bytes;
  void *scratch;
  int threads, rc;

  assert(heads > 0 && D % heads == 0 && q.type == c->act && o.type == c->act && tensor_count(o) == tensor_count(q));
  for (int64_t b = 0; b < B; b++) {
    assert(kv[b].k && kv[b].v && kv[b].T > 0);
    longest = kv[b].T > longest ? kv[b].T : longest;
    macs += 2.0 * (double)T * (double)kv[b].T * (double)D;
  }
  j.sizes = j.kernel->sizes(longest, D / heads);
  threads = cpu_threads(c, macs / (c->act == DT_BF16 ? 200.0 : 25.0));
  bytes = round64(j.sizes.pack_bytes) + round64(j.sizes.work_bytes);
  rc = cpu_scratch(c, bytes * (size_t)threads, &scratch, e);
  if (rc)
    return rc;
  j.scratch = scratch;
  if (threads == 1) {
    whole_heads(&j, 0, items, j.scratch);
  } else if (items % threads == 0 || items >= 8 * threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int i = 0; i < threads; i++)
      whole_heads(&j, items * i / threads, items * (i + 1) / threads, j.scratch + bytes * (size_t)i);
  } else {
    shared_heads(&j, threads);
  }
  return 0;
}
