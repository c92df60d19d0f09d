/*
 * test_ops.c - be_cuda's own sources, in the simulator, through the op tests of tests/ops: every case against be_ref, in bf16 and in fp16, with
 * the harness' guard bands, poisoned outputs and planted bugs. tests/ops/harness.h explains those; sim.h the simulator.
 *
 *   test_ops                 the tests
 *   test_ops case NAME       this case alone
 *   test_ops measure [keep]  prints measured.h anew; keep: a number of the present one stays where it is larger
 *
 * Cases past MOST multiply-adds are left to the card (gpu-check runs this program there): the stand-ins for the vendor's libraries take seconds for
 * them and show nothing new. On the card they are held to what the worst case of their op measured in the simulator. Threads: one.
 */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "tests/cudasim/measured.h"
#include "tests/cudasim/sim.h"
#include "tests/ops/harness.h"

enum who { BF16, F16, WHO_COUNT };
static const char *const who_names[] = {"bf16", "f16"};
static struct be bes[WHO_COUNT], ref;
extern const struct be_ops be_cuda;

struct job {
  char name[96];
  const struct op_case *c;
  const struct bug *bug;
  enum who who;
};

static const double margin = 4, most_macs = 20e6;

static const struct op_case *find_case(const char *name);

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

/* What is known of a case, or of the worst of its op. */
static struct measured known_of(const struct op_case *c)
{
  const struct measured *exact = find_measured(c->name);
  struct measured worst = {.name = c->name};

  if (exact)
    return *exact;
  for (size_t i = 0; i < sizeof measured_errors / sizeof *measured_errors; i++) {
    const struct measured *m = &measured_errors[i];
    const struct op_case *other = find_case(m->name);

    if (!other || other->op != c->op)
      continue;
    worst.bf16 = fmax(worst.bf16, m->bf16);
    worst.bf16_nmse = fmax(worst.bf16_nmse, m->bf16_nmse);
    worst.f16 = fmax(worst.f16, m->f16);
    worst.f16_nmse = fmax(worst.f16_nmse, m->f16_nmse);
  }
  return worst;
}

static int is_left_out(const struct op_case *c)
{
  struct problem p;
  double macs;

  if (c->flags & F_BENCH)
    return 1;
  if (cudasim_is_card())
    return 0;
  problem_init(&p, c, 1, 1);
  macs = problem_macs(&p);
  problem_close(&p);
  return macs > most_macs;
}

/* Whether a and b are the same bits, or b's first are all of a's. */
static int starts_with(const struct result *a, const struct result *b, size_t pictures)
{
  int same = a->count[0] > 0 && b->count[0] > 0;

  for (int i = 0; i < 2; i++)
    same = same && b->raw_bytes[i] >= a->raw_bytes[i] / pictures &&
           (!a->raw_bytes[i] || !memcmp(a->raw[i], b->raw[i], a->raw_bytes[i] / pictures));
  return same;
}

static struct measure measure_against_ref(const struct problem *p, const struct result *got)
{
  struct result want;
  struct measure m;
  double *numbers[2];

  problem_run(&want, &ref, p, 0xff, 0);
  result_doubles(&want, numbers);
  m = result_measure(got, numbers);
  free(numbers[0]);
  free(numbers[1]);
  result_close(&want);
  return m;
}

/* What an op that computes may always be off by: the last bit of fp32. */
static double last_bit(const struct op_case *c)
{
  return c->op <= OP_ACT || c->op == OP_TIMESTEP || c->op == OP_SAMPLER || c->op == OP_BLEND ? 0x1p-23 : 0;
}

/* Fills why and returns 0 when anything about the case is wrong. */
static int check_case(struct be *be, enum who who, const struct op_case *c, char *why, size_t size)
{
  const struct measured known = known_of(c);
  struct result one = {0}, two = {0}, three = {0};
  struct measure m;
  struct problem p;
  double err, nmse, bit = last_bit(c);
  int ok = 0;

  problem_init(&p, c, 1, 1);
  if (!cudasim_is_card() && !find_measured(c->name)) {
    snprintf(why, size, "no line in measured.h: run `test_ops measure`");
    goto out;
  }
  err = margin * fmax(bit, who == BF16 ? known.bf16 : known.f16);
  nmse = margin * fmax(bit * bit, who == BF16 ? known.bf16_nmse : known.f16_nmse);
  cudasim_seed(0);
  problem_run(&one, be, &p, 0xff, 0);
  cudasim_seed(7);
  problem_run(&two, be, &p, 0x5a, 1); /* another order of threads; an output that nobody writes is NaN in one and a number in the other */
  if (one.fault[0] || two.fault[0]) {
    snprintf(why, size, "%s; %s", one.fault[0] ? one.fault : two.fault, cudasim_fault());
    cudasim_reset();
    goto out;
  }
  m = measure_against_ref(&p, &one);
  ok = m.same_mask && m.worst <= err && m.nmse <= nmse;
  snprintf(why, size, "error %.2e (at most %.2e), nmse %.2e (at most %.2e)%s", m.worst, err, m.nmse, nmse,
           m.same_mask ? "" : ", NaN or inf at other places");
  if (ok && !starts_with(&one, &two, 1)) {
    ok = 0;
    snprintf(why, size, "another result when repeated, or with threads in another order");
  }
  if (ok && problem_rows_independent(&p)) {
    struct problem first = problem_first(&p);

    problem_run(&three, be, &first, 0xff, 0); /* any count of rows: rule 5 of backend.h */
    ok = !three.fault[0] && starts_with(&one, &three, (size_t)p.B);
    result_close(&three);
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
  char why[700];

  if (!check_case(&bes[j->who], j->who, j->c, why, sizeof why))
    fail_msg("%s: %s", j->name, why);
}

/* The harness must notice the bug. That it is content without the bug, the case's own test shows. */
static void test_bug(void **state)
{
  const struct job *j = *state;
  struct be broken = bes[j->who];
  char why[700];

  assert_non_null(j->c);
  broken.ops = bug_plant(j->bug, bes[j->who].ops);
  if (check_case(&broken, j->who, j->c, why, sizeof why))
    fail_msg("not noticed by %s: %s", j->c->name, why);
}

static int print_measured(int keep)
{
  printf("/*\n * measured.h - the measured error of be_cuda in the simulator against be_ref, printed by `test_ops measure`. See test_ops.c.\n *\n"
         " * Error: the largest of any element, relative to its row's RMS; then the normalised mean square. What rounding the output to 16 bits\n"
         " * costs does not count. A test allows four times as much, and at least the last bit of fp32 where an op computes.\n */\n"
         "#ifndef SAFELIGHT_TESTS_CUDASIM_MEASURED_H\n#define SAFELIGHT_TESTS_CUDASIM_MEASURED_H\n\n"
         "struct measured {\n  const char *name;\n  double bf16, bf16_nmse, f16, f16_nmse;\n};\n\n"
         "static const struct measured measured_errors[] = {\n");
  for (int i = 0; i < op_case_count; i++) {
    const struct measured *k = keep ? find_measured(op_cases[i].name) : NULL;
    struct measure m[WHO_COUNT];

    if (is_left_out(&op_cases[i]))
      continue;
    for (int who = 0; who < WHO_COUNT; who++) {
      struct problem p;
      struct result r;

      problem_init(&p, &op_cases[i], 1, 1);
      problem_run(&r, &bes[who], &p, 0xff, 0);
      if (r.fault[0])
        fprintf(stderr, "%s on %s: %s; %s\n", op_cases[i].name, who_names[who], r.fault, cudasim_fault());
      m[who] = measure_against_ref(&p, &r);
      result_close(&r);
      problem_close(&p);
    }
    printf("    {\"%s\", %.1e, %.1e, %.1e, %.1e},\n", op_cases[i].name, fmax(m[BF16].worst, k ? k->bf16 : 0),
           fmax(m[BF16].nmse, k ? k->bf16_nmse : 0), fmax(m[F16].worst, k ? k->f16 : 0), fmax(m[F16].nmse, k ? k->f16_nmse : 0));
  }
  printf("};\n\n#endif\n");
  return 0;
}

static int add_job(struct CMUnitTest *tests, struct job *jobs, int n, struct job j)
{
  jobs[n] = j;
  tests[n] = (struct CMUnitTest){.name = jobs[n].name, .test_func = j.bug ? test_bug : test_case, .initial_state = &jobs[n]};
  return n + 1;
}

/* only: NULL, or the one case to run. */
static int run_all(const char *only)
{
  size_t most = (size_t)(op_case_count + bug_count) * WHO_COUNT;
  struct CMUnitTest *tests = calloc(most, sizeof *tests);
  struct job *jobs = calloc(most, sizeof *jobs);
  int n = 0, failed;

  if (!tests || !jobs)
    abort();
  for (int who = 0; who < WHO_COUNT; who++) {
    for (int i = 0; i < op_case_count; i++) {
      struct job j = {.c = &op_cases[i], .who = (enum who)who};

      snprintf(j.name, sizeof j.name, "%s: %s", who_names[who], op_cases[i].name);
      if (only ? !strcmp(only, j.c->name) : !is_left_out(j.c))
        n = add_job(tests, jobs, n, j);
    }
    for (int i = 0; i < bug_count && who == BF16 && !only; i++) {
      struct job j = {.c = find_case(bugs[i].case_name), .bug = &bugs[i], .who = (enum who)who};

      snprintf(j.name, sizeof j.name, "%s: planted: %s", who_names[who], bugs[i].name);
      if (!bugs[i].is_heap_bug && j.c && !is_left_out(j.c)) /* sanitizers take the place of malloc */
        n = add_job(tests, jobs, n, j);
    }
  }
  failed = _cmocka_run_group_tests("cudasim ops", tests, (size_t)n, NULL, NULL);
  free(tests);
  free(jobs);
  return failed;
}

int main(int argc, char **argv)
{
  struct err e = {0};
  int rc = be_open(&ref, &be_ref, &(struct be_config){.threads = 1}, &e);

  for (int i = 0; i < WHO_COUNT && !rc; i++)
    rc = be_open(&bes[i], &be_cuda, &(struct be_config){.want_f16 = i == F16}, &e);
  if (rc)
    fprintf(stderr, "%s\n", e.msg);
  else if (argc > 1 && !strcmp(argv[1], "measure"))
    rc = print_measured(argc > 2);
  else
    rc = run_all(argc > 2 ? argv[2] : NULL);
  for (int i = 0; i < WHO_COUNT; i++)
    be_close(&bes[i]);
  be_close(&ref);
  if (!rc && cudasim_counts().live) {
    fprintf(stderr, "%ld allocations of device memory were not freed\n", cudasim_counts().live);
    rc = 1;
  }
  return rc != 0;
}
