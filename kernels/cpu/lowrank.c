/*
 * lowrank.c - low-rank factors beside a linear or a convolution of be_cpu: y += up (down x), picture by picture.
 *
 * This file packs the factors, runs the convolution that a LoCon shrinks with, and cuts the rows of all pictures into blocks for the
 * kernels of lowrank_vec.c and lowrank_amx.c. Every block lies within one picture and every convolution is of one picture, so
 * that neither the other pictures nor their count can change a bit.
 *
 * Callers: the table in be_cpu.c. Threads: the owner's; blocks are split.
 */
#include "kernels/cpu/lowrank.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/cpu/cpu.h"

static int64_t round_up(int64_t n, int64_t unit)
{
  return (n + unit - 1) / unit * unit;
}

void cpu_lowrank_free(struct be *be, struct lowrank *l)
{
  if (!l)
    return;
  free(l->down);
  free(l->up);
  cpu_weight_free(be, l->conv);
  free(l);
}

/* The down convolution with as many outputs as the kernel wants to read. */
static int load_conv(struct be *be, const struct lowrank_desc *d, struct lowrank *l, struct err *e)
{
  size_t filter = (size_t)(d->in * d->kh * d->kw), real = (size_t)d->rank * filter;
  float *padded = calloc((size_t)l->z_width * filter, sizeof *padded);
  struct weight_desc w = {.kind = WEIGHT_CONV, .out = l->z_width, .in = d->in, .kh = d->kh, .kw = d->kw, .stride = d->stride,
                          .pad_lo = d->pad_lo, .pad_hi = d->pad_hi, .w = padded, .w_type = DT_F32};
  int rc;

  if (!padded)
    return err_set(e, E_NOMEM, "no memory for low-rank factors of rank %lld", (long long)d->rank);
  memcpy(padded, d->down, real * sizeof *padded);
  rc = cpu_weight_load(be, &w, NULL, &l->conv, e);
  free(padded);
  return rc;
}

int cpu_lowrank_load(struct be *be, const struct lowrank_desc *d, struct lowrank **out, struct err *e)
{
  const struct cpu *c = cpu_of(be);
  const struct lowrank_kernel *k = c->isa == ISA_AMX && c->act == DT_BF16 ? &lowrank_amx : &lowrank_vec;
  struct lowrank *l = calloc(1, sizeof *l);
  int rc = 0;

  assert(d->out > 0 && d->in > 0 && d->rank > 0 && d->down && d->up);
  assert(d->kh == 0 || (d->kw > 0 && d->stride > 0 && d->pad_lo >= 0 && d->pad_hi >= 0));
  *out = NULL;
  if (!l)
    return err_set(e, E_NOMEM, "no memory for low-rank factors");
  *l = (struct lowrank){.kernel = k, .out = d->out, .in = d->in, .rank = d->rank, .kh = d->kh, .kw = d->kw,
                        .stride = d->stride, .pad_lo = d->pad_lo, .pad_hi = d->pad_hi};
  l->is_linear = d->kh == 0 || (d->kh == 1 && d->kw == 1 && d->stride == 1 && d->pad_lo == 0 && d->pad_hi == 0);
  l->z_width = round_up(d->rank, LOWRANK_RANKS);
  l->up = cpu_memory(k->up_bytes(d->out, d->rank));
  if (l->is_linear)
    l->down = cpu_memory(k->down_bytes(d->in, d->rank));
  if (!l->up || (l->is_linear && !l->down)) {
    rc = err_set(e, E_NOMEM, "no memory for low-rank factors of rank %lld", (long long)d->rank);
  } else {
    k->pack_up(l->up, d->up, d->out, d->rank);
    if (l->is_linear)
      k->pack_down(l->down, d->down, d->in, d->rank);
    else
      rc = load_conv(be, d, l, e);
  }
  if (rc) {
    cpu_lowrank_free(be, l);
    return rc;
  }
  *out = l;
  return 0;
}

/* One call of the op. */
struct job {
  struct cpu *c;
  struct tensor y, x;
  const struct lowrank *const *row;
  int64_t pixels, blocks;   /* of a picture of y */
  size_t work_bytes;        /* of a thread */
  char *work;
  float *z;                 /* of one picture */
};

static struct lowrank_rows rows_of(const struct job *j, int64_t b)
{
  return (struct lowrank_rows){j->c->vec,          j->row[b],  tensor_batch(j->x, b % j->x.d[0], 1).p, j->z,
                               tensor_batch(j->y, b, 1).p, j->x.type, j->y.type, j->pixels};
}

/* Part i of n of the blocks of all pictures with linear factors: each picture's share lies in one piece. */
static void linear_part(const struct job *j, int64_t pictures, int i, int n)
{
  int64_t from, to, at = 0;

  cpu_split(pictures * j->blocks, 1, i, n, &from, &to);
  for (int64_t b = 0; b < j->y.d[0]; b++) {
    int64_t first = from > at ? from - at : 0, last = to - at < j->blocks ? to - at : j->blocks;

    if (!j->row[b] || !j->row[b]->is_linear)
      continue;
    at += j->blocks;
    if (first < last) {
      struct lowrank_rows r = rows_of(j, b);

      j->row[b]->kernel->run(&r, first, last, j->work + (size_t)i * j->work_bytes);
    }
  }
}

/* Picture b with a convolution: all of z, then the expansion. */
static int conv_picture(struct be *be, const struct job *j, int64_t b, struct err *e)
{
  const struct lowrank *l = j->row[b];
  struct tensor z = {j->z, {1, j->y.d[1], j->y.d[2], l->z_width}, DT_F32};
  struct lowrank_rows r = rows_of(j, b);
  int threads = cpu_threads(j->c, (double)(j->pixels * l->out) * (1.0 + (double)l->rank / 16.0)), rc;

  rc = cpu_conv2d(be, z, tensor_batch(j->x, b % j->x.d[0], 1), l->conv, tensor_none(), e);
  if (rc)
    return rc;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int i = 0; i < threads; i++) {
    int64_t from, to;

    cpu_split(j->blocks, 1, i, threads, &from, &to);
    l->kernel->run(&r, from, to, j->work + (size_t)i * j->work_bytes);
  }
  return 0;
}

/* Checks the shapes and adds up what the job needs; *pictures: those with linear factors, *cost: nanoseconds on one thread. */
static void survey(struct job *j, int64_t *pictures, double *cost, size_t *z_bytes)
{
  *pictures = 0;
  *cost = 0;
  *z_bytes = 0;
  for (int64_t b = 0; b < j->y.d[0]; b++) {
    const struct lowrank *l = j->row[b];
    size_t work, z;

    if (!l)
      continue;
    assert(j->x.d[3] == l->in && j->y.d[3] == l->out);
    work = (size_t)round_up((int64_t)l->kernel->work_bytes(l), 64);
    j->work_bytes = work > j->work_bytes ? work : j->work_bytes;
    if (l->is_linear) {
      assert(j->x.d[1] * j->x.d[2] == j->pixels);
      *cost += (double)j->pixels * (double)(l->in + l->out) * (0.1 + (double)l->rank / (l->kernel == &lowrank_amx ? 400.0 : 40.0));
      ++*pictures;
    } else {
      z = (size_t)(j->pixels * l->z_width) * sizeof(float);
      *z_bytes = z > *z_bytes ? z : *z_bytes;
    }
  }
}

int cpu_lowrank(struct be *be, struct tensor y, struct tensor x, const struct lowrank *const *row, struct err *e)
{
  struct cpu *c = cpu_of(be);
  int64_t pixels = y.d[1] * y.d[2], pictures;
  struct job j = {c, y, x, row, pixels, (pixels + LOWRANK_ROWS - 1) / LOWRANK_ROWS, 0, NULL, NULL};
  size_t z_bytes;
  void *scratch;
  double cost;
  int threads, rc;

  assert(x.type == c->act && (y.type == c->act || y.type == DT_F32) && y.d[0] % x.d[0] == 0);
  survey(&j, &pictures, &cost, &z_bytes);
  rc = cpu_scratch(c, j.work_bytes * (size_t)c->threads + z_bytes, &scratch, e);
  if (rc)
    return rc;
  j.work = scratch;
  j.z = (float *)(j.work + j.work_bytes * (size_t)c->threads);
  threads = cpu_threads(c, cost);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int i = 0; i < threads; i++)
    linear_part(&j, pictures, i, threads);
  for (int64_t b = 0; b < y.d[0] && !rc; b++)
    if (row[b] && !row[b]->is_linear)
      rc = conv_picture(be, &j, b, e);
  return rc;
}
