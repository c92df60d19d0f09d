/*
 * harness.h - how the op tests are put together.
 *
 *   cases.c    the table: which op, which shape, which options. Shapes come from real SD1.5, SD2.1, SDXL and emoji layers,
 *              made small, and odd sizes.
 *   problem.c  a case plus a seed becomes numbers: inputs, parameters, step coefficients.
 *   run.c      runs a problem on a backend between guard bands, on poisoned outputs, and measures a result against another.
 *   naive.c    the expected result of a problem by definition, in double, without looking at any backend.
 *   alloc.c    counts heap allocations and lets one fail.
 *   planted.c  backends with one bug each: the harness must find all of them.
 *   measured.h the measured error of each case; a test's tolerance is four times that.
 *   test_ops.c the tests, `measure`, and `bench`. test_backend.c, test_lanes.c: what backends promise besides arithmetic.
 *
 * Callers: tests/ops only. Threads: one.
 */
#ifndef SAFELIGHT_TESTS_OPS_HARNESS_H
#define SAFELIGHT_TESTS_OPS_HARNESS_H

#include "kernels/backend.h"

/* A sanitizer has taken malloc's place: it cannot be counted, and ends the program instead of returning NULL. */
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SANITIZED 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define SANITIZED 1
#endif
#endif

enum op_id {
  OP_CONV2D, OP_LINEAR, OP_LOWRANK, OP_GROUPNORM, OP_LAYERNORM, OP_ATTENTION, OP_GEGLU, OP_ACT, OP_ADD, OP_CONCAT, OP_UPSAMPLE,
  OP_TIMESTEP, OP_EMBED, OP_GATHER, OP_SAMPLER, OP_RGB8, OP_NONFINITE, OP_BLEND, OP_RANDN
};

enum {
  F_BIAS = 1 << 0,
  F_RESIDUAL = 1 << 1,
  F_IN_PLACE = 1 << 2,   /* y is the residual (conv, linear) or the first input (others) */
  F_IN_PLACE2 = 1 << 3,  /* add: y is the second input */
  F_OUT_F32 = 1 << 4,
  F_TEMB = 1 << 5,
  F_SILU = 1 << 6,
  F_CAUSAL = 1 << 7,
  F_RAGGED = 1 << 8,     /* attention: each picture has fewer keys than the one before; the rest of its rows is NaN */
  F_SHARED_KV = 1 << 9,  /* attention: every picture uses the keys of the last */
  F_FLIP = 1 << 10,
  F_NAN = 1 << 11,       /* one NaN and, far away, one +inf in the last picture of the first input */
  F_W_F16 = 1 << 12,     /* parameters are stored as fp16, at an odd address */
  F_W_BF16 = 1 << 13,
  F_X_F32 = 1 << 14,     /* to_rgb8, count_nonfinite: the input is F32 */
  F_NO_NOISE = 1 << 15,  /* sampler_step: no noise tensor at all */
  F_BENCH = 1 << 16,     /* too slow for a test: `bench` only */
  F_MIXED = 1 << 17      /* lowrank: pictures take turns with the first factors, none, and the second ones; else all have the first */
};

struct op_case {
  const char *name;
  enum op_id op;
  int B, H, W, C;    /* the first input, or the output where there is none; a sequence has H 1 and W tokens */
  int out;           /* conv, linear: channels out; concat: channels of the second; embed: rows of the token table */
  int k, stride, lo, hi; /* conv; lowrank: k 0 for factors of a linear */
  int rank;          /* lowrank: of the first factors; the second ones have five more */
  int heads, keys;   /* attention */
  int groups;        /* groupnorm */
  int act;           /* enum act_kind */
  int flags;
  float arg;         /* norms: eps; attention: scale, 0 for 1/sqrt(K); timestep: freq_shift */
  float gain, offset; /* inputs are offset + gain * normal; gain 0 means 1 */
};

extern const struct op_case op_cases[];
extern const int op_case_count;

/* ---- problem.c ---- */

enum slot { Y, X, A, V, OLD, SLOTS }; /* X: blend's mask; A: residual, temb, second input, keys, model; V: values, noise; OLD: randn's state */
enum role { ABSENT, IN, OUT, INOUT };
enum elem { ELEM_ACT, ELEM_F32, ELEM_U8, ELEM_I32 };

struct operand {
  enum role role;
  enum elem elem;
  int64_t d[4];
  float *data; /* IN and INOUT: what it holds before the call */
};

struct problem {
  const struct op_case *c;
  int64_t B;               /* pictures */
  struct operand op[SLOTS];
  struct weight_desc w[2];
  float *w_f32[2], *bias_f32[2]; /* what the descriptors' bytes stand for; lowrank: down and up */
  void *raw[2], *raw_up[2];
  int64_t *keys;           /* attention: T of each picture */
  int64_t *owner;          /* attention: whose keys each picture uses */
  float *t, *scale;
  int32_t *ids;
  int *src;
  struct step_coef *coef;
  struct blend_coef *blend;
  struct lowrank_desc factors[2];
  int *row;                /* lowrank: index into factors for each picture, or -1 */
};

/* Fixed numbers for a case and seed. round_bf16: activations and parameters are representable in bf16. Aborts when out of
 * memory, as everything in a test does. */
void problem_init(struct problem *p, const struct op_case *c, uint64_t seed, int round_bf16);
void problem_close(struct problem *p);
/* New numbers, and other factors, for every picture but the first. */
void problem_change_others(struct problem *p, uint64_t seed);
/* The first picture alone; shares p's memory, not to be closed. */
struct problem problem_first(const struct problem *p);
/* Whether a picture's result depends on that picture alone. */
int problem_rows_independent(const struct problem *p);
int64_t operand_count(const struct operand *o);
/* The operand whose place the output takes, or Y when it has its own. */
enum slot problem_alias(const struct op_case *c);
/* Multiply-adds, and bytes read and written at least once, for `bench`. */
double problem_macs(const struct problem *p);
double problem_bytes(const struct problem *p, size_t act_bytes);

/* ---- run.c ---- */

struct result {
  int64_t count[2], row[2]; /* elements of the outputs, and of their last dimension; count 0: there is none */
  float *v[2];
  void *raw[2];             /* as the backend wrote them */
  size_t raw_bytes[2];
  enum dtype type[2];
  long allocs;              /* heap allocations during the last call */
  char fault[160];          /* "" or what went wrong besides the numbers: an error, a broken guard, a changed input */
};

struct measure {
  int same_mask;  /* NaN, +inf and -inf at the same places */
  double worst;   /* the largest error of an element, relative to the RMS of its row */
  double nmse;    /* sum of squared errors over sum of squares */
  /* The error of a bf16 or fp16 output is its distance from the numbers that round to it: what storing it costs does not count, so
   * that a fault of the arithmetic shows even where it is smaller. */
};

/* poison: the byte that outputs are filled with before the call; 0xff makes NaN of any float. warm: calls the op once before
 * on the same memory, and again on fresh content. */
void problem_run(struct result *r, struct be *be, const struct problem *p, int poison, int warm);
void result_close(struct result *r);
/* Seconds of one call and sync, without the transfers: the best of as many as fit the budget, at least one. NaN: it failed. */
double problem_time(struct be *be, const struct problem *p, double budget_s);

/* want: count[i] numbers for each output i. Rows shorter than 32 are measured against the RMS of the whole. */
struct measure result_measure(const struct result *got, double *const want[2]);
/* out[i]: the result as doubles, allocated; the caller frees both. */
void result_doubles(const struct result *r, double *out[2]);

/* ---- alloc.c ---- */

long alloc_count(void); /* heap allocations so far, of 1 kB and more; always 0 under a sanitizer */
void alloc_fail(long n);  /* the program's own n-th allocation from now on, of any size, fails, once; 0: none does */

/* ---- naive.c ---- */

/* Allocates out[0] (and out[1] for sampler_step and randn); the caller frees both. */
void naive_solve(const struct problem *p, double *out[2]);

/* ---- planted.c ---- */

struct bug {
  const char *name, *case_name; /* what is wrong, and the case that must notice */
  struct be_ops wrong;          /* entries that are not NULL replace the backend's */
  int is_heap_bug;              /* only seen where allocations are counted */
};

extern const struct bug bugs[];
extern const int bug_count;
/* The backend's own table with the bug's entries; stays valid until the next call. */
const struct be_ops *bug_plant(const struct bug *b, const struct be_ops *inner);

#endif
