/*
 * test_ops.c - every op of be_cpu against be_ref, be_ref against the plain definitions, and the harness against planted bugs.
 * See harness.h for the parts.
 *
 *   test_ops [-FILTER]       the tests, or those whose name contains FILTER
 *   test_ops measure [keep]  prints tests/ops/measured.h anew; keep: a number of the present one stays where it is larger
 *   test_ops bench [FILTER]  time, GFLOP/s and GB/s of be_cpu, and how many times faster than be_ref it is
 *
 * Threads: those of the backends.
 */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "tests/ops/harness.h"
#include "tests/ops/measured.h"

enum who { REF, CPU, CPU_F32, WHO_COUNT };
static const char *const who_names[] = {"ref", "cpu", "cpu f32"};
static struct be bes[WHO_COUNT];

struct job {
  char name[96];
  const struct op_case *c;
  const struct bug *bug;
  enum who who;
};

/* A measured error times this is the tolerance. */
static const double margin = 4;

static const struct measured *find_measured(const char *name)
{
  for (size_t i = 0; i < sizeof measured_errors / sizeof *measured_errors; i++)
    if (!strcmp(measured_errors[i].name, name))
      return &measured_errors[i];
  return NULL;
}

static const struct op_case *find_case(const char *name)
{
  for (int i = 0; i < op_case_count; i++)
    if (!strcmp(op_cases[i].name, name))
      return &op_cases[i];
  return NULL;
}

/* The definitions are evaluated one output at a time; past this many multiply-adds that takes too long. Of fewer than 16 normals there is none but
 * torch's, whose bits tests/golden/test_rng.c has. */
static int is_small(const struct problem *p)
{
  return problem_macs(p) < 2e7 && (p->c->op != OP_RANDN || p->c->H * p->c->W * p->c->C >= NORMAL_BLOCK);
}

/* Whether a and b are the same bits, or b's are the beginning of a's. */
static int starts_with(const struct result *a, const struct result *b, size_t pictures)
{
  int same = a->count[0] > 0 && b->count[0] > 0;

  for (int i = 0; i < 2; i++)
    same = same && b->raw_bytes[i] >= a->raw_bytes[i] / pictures &&
           (!a->raw_bytes[i] || !memcmp(a->raw[i], b->raw[i], a->raw_bytes[i] / pictures));
  return same;
}

/* The numbers of one call against be_ref's, or, for be_ref, against the definition. */
static struct measure measure_case(enum who who, const struct problem *p, const struct result *got)
{
  struct result ref = {0};
  struct measure m;
  double *want[2];

  if (who == REF) {
    naive_solve(p, want);
  } else {
    problem_run(&ref, &bes[REF], p, 0xff, 0);
    result_doubles(&ref, want);
  }
  m = result_measure(got, want);
  free(want[0]);
  free(want[1]);
  result_close(&ref);
  return m;
}

/* What an op that computes may always be off by: the last bit of fp32. Ops that only move numbers, or do one sum or product,
 * have none to spare. */
static double last_bit(const struct op_case *c)
{
  return c->op <= OP_ACT || c->op == OP_TIMESTEP || c->op == OP_SAMPLER || c->op == OP_BLEND ? 0x1p-23 : 0;
}

/* A bf16 output that is not near a tie hides an error of the arithmetic, so a measured 0 may be luck: at least what the same
 * op does in fp32 is allowed. */
static void tolerance(const struct measured *m, const struct be *be, enum who who, const struct op_case *c, double *err,
                      double *nmse)
{
  int is_bf16 = be->act == DT_BF16;
  double bit = last_bit(c);

  *err = margin * fmax(bit, who == REF ? m->ref : is_bf16 ? fmax(m->bf16, m->f32) : m->f32);
  *nmse = margin * fmax(bit * bit, who == REF ? m->ref_nmse : is_bf16 ? fmax(m->bf16_nmse, m->f32_nmse) : m->f32_nmse);
}

/* oneDNN's convolutions and matrix products for processors before AVX-512 take working memory of their own at each call. */
static int is_library_heap(const struct be *be, const struct op_case *c)
{
  return (c->op == OP_CONV2D || c->op == OP_LINEAR || (c->op == OP_LOWRANK && c->k)) && strstr(be->info, "oneDNN") && !strstr(be->info, "avx512") &&
         !strstr(be->info, "amx");
}

/* Fills why and returns 0 when anything about the case is wrong. */
static int check_case(struct be *be, enum who who, const struct op_case *c, char *why, size_t size)
{
  const struct measured *known = find_measured(c->name);
  struct problem p;
  struct result one = {0}, two = {0}, three = {0};
  struct measure m = {0, NAN, NAN};
  double err, nmse;
  int ok = 0;

  problem_init(&p, c, 1, be->act == DT_BF16);
  if (!known) {
    snprintf(why, size, "no line in measured.h: run `test_ops measure`");
    goto out;
  }
  tolerance(known, be, who, c, &err, &nmse);
  problem_run(&one, be, &p, 0xff, 0);
  problem_run(&two, be, &p, 0x5a, 1); /* an output that nobody writes is NaN in one and a number in the other */
  if (one.fault[0] || two.fault[0]) {
    snprintf(why, size, "%s", one.fault[0] ? one.fault : two.fault);
    goto out;
  }
  if (who != REF || is_small(&p))
    m = measure_case(who, &p, &one);
  else
    m = (struct measure){1, 0, 0};
  ok = m.same_mask && m.worst <= err && m.nmse <= nmse;
  snprintf(why, size, "error %.2e (at most %.2e), nmse %.2e (at most %.2e)%s", m.worst, err, m.nmse, nmse,
           m.same_mask ? "" : ", NaN or inf at other places");
  if (ok && !starts_with(&one, &two, 1)) {
    ok = 0;
    snprintf(why, size, "another result when repeated");
  }
  if (ok && two.allocs && !is_library_heap(be, c)) {
    ok = 0;
    snprintf(why, size, "%ld heap allocations when repeated", two.allocs);
  }
  if (ok && problem_rows_independent(&p)) {
    if (who == REF || c->op == OP_LOWRANK) { /* any count of rows */
      struct problem first = problem_first(&p);

      problem_run(&three, be, &first, 0xff, 0);
      ok = !three.fault[0] && starts_with(&one, &three, (size_t)p.B);
      result_close(&three);
    }
    problem_change_others(&p, 99);
    problem_run(&three, be, &p, 0xff, 0);
    ok = ok && !three.fault[0] && starts_with(&one, &three, (size_t)p.B);
    if (!ok)
      snprintf(why, size, "the first picture depends on the others %s", three.fault);
  }
out:
  result_close(&one);
  result_close(&two);
  result_close(&three);
  problem_close(&p);
  return ok;
}

static void test_case(void **state)
{
  const struct job *j = *state;
  char why[256];

  if (!check_case(&bes[j->who], j->who, j->c, why, sizeof why))
    fail_msg("%s: %s", j->name, why);
}

/* The harness must notice the bug. That it is content without the bug, the case's own test shows. */
static void test_bug(void **state)
{
  const struct job *j = *state;
  struct be broken = bes[j->who];
  char why[256];

  assert_non_null(j->c);
  if (j->bug->is_heap_bug && alloc_count() == 0)
    skip();
  broken.ops = bug_plant(j->bug, bes[j->who].ops);
  if (check_case(&broken, j->who, j->c, why, sizeof why))
    fail_msg("not noticed by %s: %s", j->c->name, why);
}

/* ---- measure and bench ---- */

static void print_line(const struct op_case *c, const struct measure *m, int keep)
{
  const struct measured *k = keep ? find_measured(c->name) : NULL;
  static const struct measured none;

  k = k ? k : &none;
  printf("    {\"%s\", %.1e, %.1e, %.1e, %.1e, %.1e, %.1e},\n", c->name, fmax(m[REF].worst, k->ref),
         fmax(m[REF].nmse, k->ref_nmse), fmax(m[CPU_F32].worst, k->f32), fmax(m[CPU_F32].nmse, k->f32_nmse), fmax(m[CPU].worst, k->bf16),
         fmax(m[CPU].nmse, k->bf16_nmse));
}

static void print_measured(int keep)
{
  printf("/*\n * measured.h - the measured error of every case, printed by `test_ops measure`. See harness.h.\n *\n"
         " * Error: the largest of any element, relative to its row's RMS; then the normalised mean square. ref: be_ref against\n"
         " * the definition. f32, bf16: be_cpu against be_ref. What rounding the output to bf16 costs does not count.\n"
         " * A test allows four times as much, and at least the last bit of fp32 where an op computes.\n"
         " * Each number is the largest over ONEDNN_MAX_CPU_ISA = AVX512_CORE_AMX, AVX512_CORE_BF16, AVX512_CORE, AVX2, SSE41.\n"
         " * Last with: %s\n *       and: %s\n */\n"
         "#ifndef SAFELIGHT_TESTS_OPS_MEASURED_H\n#define SAFELIGHT_TESTS_OPS_MEASURED_H\n\n"
         "struct measured {\n  const char *name;\n  double ref, ref_nmse, f32, f32_nmse, bf16, bf16_nmse;\n};\n\n"
         "static const struct measured measured_errors[] = {\n",
         bes[CPU].info, bes[CPU_F32].info);
  for (int i = 0; i < op_case_count; i++) {
    struct measure m[WHO_COUNT] = {{0}};

    if (op_cases[i].flags & F_BENCH)
      continue;
    for (int who = 0; who < WHO_COUNT; who++) {
      struct problem p;
      struct result r;

      problem_init(&p, &op_cases[i], 1, bes[who].act == DT_BF16);
      problem_run(&r, &bes[who], &p, 0xff, 0);
      if (r.fault[0])
        fprintf(stderr, "%s on %s: %s\n", op_cases[i].name, who_names[who], r.fault);
      else if (who != REF || is_small(&p))
        m[who] = measure_case((enum who)who, &p, &r);
      result_close(&r);
      problem_close(&p);
    }
    if (bes[CPU].act == DT_F32)
      m[CPU] = (struct measure){0}; /* no bf16 on this machine */
    print_line(&op_cases[i], m, keep);
  }
  printf("};\n\n#endif\n");
}

static void bench(const char *filter)
{
  printf("%s\n%s\n%-36s %10s %9s %8s %12s\n", bes[CPU].info, bes[REF].info, "case", "ms", "GFLOP/s", "GB/s", "times be_ref");
  for (int i = 0; i < op_case_count; i++) {
    struct problem p;
    double cpu, ref;

    if (!strstr(op_cases[i].name, filter))
      continue;
    problem_init(&p, &op_cases[i], 1, 1);
    cpu = problem_time(&bes[CPU], &p, 0.5);
    ref = problem_time(&bes[REF], &p, 0);
    printf("%-36s %10.3f %9.1f %8.1f %12.1f\n", op_cases[i].name, cpu * 1e3, 2e-9 * problem_macs(&p) / cpu,
           1e-9 * problem_bytes(&p, bes[CPU].act == DT_BF16 ? 2 : 4) / cpu, ref / cpu);
    fflush(stdout);
    problem_close(&p);
  }
}

/* ---- putting the list of tests together ---- */

static int add_job(struct CMUnitTest *tests, struct job *jobs, int n, struct job j)
{
  jobs[n] = j;
  tests[n] = (struct CMUnitTest){.name = jobs[n].name, .test_func = j.bug ? test_bug : test_case, .initial_state = &jobs[n]};
  return n + 1;
}

static int run_all(const char *filter)
{
  size_t most = (size_t)(op_case_count + bug_count) * WHO_COUNT;
  struct CMUnitTest *tests = calloc(most, sizeof *tests);
  struct job *jobs = calloc(most, sizeof *jobs);
  int n = 0, failed;

  if (!tests || !jobs)
    abort();
  for (int who = 0; who < WHO_COUNT; who++) {
    if (who == CPU && bes[CPU].act == DT_F32)
      continue; /* this machine has no bf16: CPU_F32 says it all */
    for (int i = 0; i < op_case_count; i++) {
      struct job j = {.c = &op_cases[i], .who = (enum who)who};

      snprintf(j.name, sizeof j.name, "%s: %s", who_names[who], op_cases[i].name);
      if (!(op_cases[i].flags & F_BENCH) && strstr(j.name, filter))
        n = add_job(tests, jobs, n, j);
    }
    for (int i = 0; i < bug_count && who != REF; i++) {
      struct job j = {.c = find_case(bugs[i].case_name), .bug = &bugs[i], .who = (enum who)who};

      snprintf(j.name, sizeof j.name, "%s: planted: %s", who_names[who], bugs[i].name);
      if (strstr(j.name, filter))
        n = add_job(tests, jobs, n, j);
    }
  }
  failed = _cmocka_run_group_tests("ops", tests, (size_t)n, NULL, NULL);
  free(tests);
  free(jobs);
  return failed;
}

int main(int argc, char **argv)
{
  struct err e = {0};
  int rc = 0;

  for (int i = 0; i < WHO_COUNT && !rc; i++)
    rc = be_open(&bes[i], i == REF ? &be_ref : &be_cpu, &(struct be_config){.force_f32 = i == CPU_F32}, &e);
  if (rc)
    fprintf(stderr, "%s\n", e.msg);
  else if (argc > 1 && !strcmp(argv[1], "measure"))
    print_measured(argc > 2);
  else if (argc > 1 && !strcmp(argv[1], "bench"))
    bench(argc > 2 ? argv[2] : "");
  else
    rc = run_all(argc > 1 && argv[1][0] == '-' ? argv[1] + 1 : "");
  for (int i = 0; i < WHO_COUNT; i++)
    be_close(&bes[i]);
  return rc != 0;
}
