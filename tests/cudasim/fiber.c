/*
 * fiber.c - runs a kernel's blocks, a fiber for each thread that has to wait. See sim.h.
 *
 * A fiber runs threads of the block from start to end until one has to wait; then the next fiber goes on with the rest. When nobody can
 * run, whoever has all partners at the same place is released; when that is nobody, the kernel is at fault.
 *
 * x86-64 only, as the project. Threads: one.
 */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "tests/cudasim/sim.h"

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define WITH_ASAN 1
#endif
#endif

enum { MOST_THREADS = 1024, WARP = 32, STACK = 128 << 10, PAGE = 4096 };
enum state { WAITING_TO_START, RUNNING, AT_BARRIER, AT_SHUFFLE, RELEASED, DONE };
enum shuffle { INDEX, XOR, DOWN, WHOLE_WARP };

struct fiber {
  void *sp;             /* NULL: to be prepared */
  char *stack;
  size_t size;          /* of the stack, for ASan: of main_fiber's as well, learnt when the first fiber starts */
  void *fake_stack;
};

struct thread {
  enum state state;
  unsigned x, y, z;
  struct fiber *fiber;  /* while it waits */
  const char *file;     /* where it waits */
  int line;
  uint32_t mask, value, result;
  enum shuffle kind;
  int arg;
};

struct here {
  unsigned thread[3], block[3], threads[3], blocks[3];
};

extern struct here cudasim_here;
void cudasim_barrier(const char *file, int line);
uint32_t cudasim_shuffle(uint32_t mask, uint32_t value, enum shuffle kind, int arg, const char *file, int line);
int cudasim_launch(struct cudasim_stream *s, const unsigned blocks[3], const unsigned threads[3], size_t shared, void (*run)(void *), const void *call,
                   size_t bytes);
void cudasim_switch(void **save, void *load);

struct here cudasim_here;
extern char __start_cudasim_shared[] __attribute__((weak)), __stop_cudasim_shared[] __attribute__((weak)); /* the linker's */

static struct thread threads[MOST_THREADS];
static struct fiber fibers[MOST_THREADS], *idle[MOST_THREADS], main_fiber, *current_fiber;
static struct thread *current;
static int order[MOST_THREADS];
static int thread_count, next_thread, idle_count, done_count, is_block_failed, uses_shared;
static void (*kernel)(void *);
static void *kernel_call;
static uint64_t seed, dice;
static char fault[400];
static int sticky;
static struct cudasim_count counts;

void cudasim_seed(uint64_t s)
{
  seed = s;
}

const char *cudasim_fault(void)
{
  return fault;
}

int cudasim_sticky(void)
{
  return sticky;
}

struct cudasim_count *cudasim_counters(void)
{
  return &counts;
}

void cudasim_reset(void)
{
  fault[0] = '\0';
  sticky = 0;
}

int cudasim_fail(int code, const char *fmt, ...)
{
  va_list ap;

  if (!fault[0]) {
    va_start(ap, fmt);
    vsnprintf(fault, sizeof fault, fmt, ap);
    va_end(ap);
  }
  if (code == cudaErrorLaunchFailure)
    sticky = code;
  return code;
}

/* ---- switching ---- */

__asm__(".text\n"
        ".globl cudasim_switch\n"
        ".type cudasim_switch, @function\n"
        "cudasim_switch:\n"
        "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
        "  movq %rsp, (%rdi)\n"
        "  movq %rsi, %rsp\n"
        "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n"
        "  ret\n"
        ".size cudasim_switch, .-cudasim_switch\n");

static void switch_to(struct fiber *to)
{
  struct fiber *from = current_fiber;

  current_fiber = to;
#ifdef WITH_ASAN
  __sanitizer_start_switch_fiber(&from->fake_stack, to->stack, to->size);
#endif
  cudasim_switch(&from->sp, to->sp);
#ifdef WITH_ASAN
  __sanitizer_finish_switch_fiber(from->fake_stack, NULL, NULL);
#endif
}

#ifdef WITH_ASAN
static void fiber_started(void)
{
  const void *bottom;
  size_t size;

  __sanitizer_finish_switch_fiber(NULL, &bottom, &size);
  main_fiber.stack = (char *)(uintptr_t)bottom;
  main_fiber.size = size;
}
#endif

static void here_is(struct thread *t)
{
  current = t;
  cudasim_here.thread[0] = t->x;
  cudasim_here.thread[1] = t->y;
  cudasim_here.thread[2] = t->z;
}

static void fiber_main(void)
{
#ifdef WITH_ASAN
  fiber_started();
#endif
  for (;;) {
    while (next_thread < thread_count && !is_block_failed) {
      struct thread *t = &threads[order[next_thread++]];

      here_is(t);
      t->state = RUNNING;
      kernel(kernel_call);
      current->state = DONE;
      done_count++;
    }
    current->fiber = NULL;
    idle[idle_count++] = current_fiber;
    switch_to(&main_fiber);
  }
}

static int fiber_prepare(struct fiber *f)
{
  void **top;

  if (!f->stack) {
    char *p = mmap(NULL, STACK + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    if (p == MAP_FAILED || mprotect(p, PAGE, PROT_NONE))
      return -1;
    f->stack = p + PAGE;
    f->size = STACK;
  }
#ifdef WITH_ASAN
  __asan_unpoison_memory_region(f->stack, STACK);
#endif
  top = (void **)(void *)(f->stack + STACK - 32);
  top[0] = (void *)(uintptr_t)fiber_main; /* entered by ret, with the stack as behind a call: 8 beyond a multiple of 16 */
  top[1] = NULL;
  memset(top - 6, 0, 6 * sizeof *top);
  f->sp = top - 6;
  f->fake_stack = NULL;
  return 0;
}

static void give_way(void)
{
  struct thread *me = current;

  me->fiber = current_fiber;
  switch_to(&main_fiber);
  here_is(me);
  me->state = RUNNING;
}

/* ---- what kernels call ---- */

void cudasim_barrier(const char *file, int line)
{
  current->state = AT_BARRIER;
  current->file = file;
  current->line = line;
  give_way();
}

uint32_t cudasim_shuffle(uint32_t mask, uint32_t value, enum shuffle kind, int arg, const char *file, int line)
{
  current->state = AT_SHUFFLE;
  current->file = file;
  current->line = line;
  current->mask = mask;
  current->value = value;
  current->kind = kind;
  current->arg = arg;
  give_way();
  return current->result;
}

/* ---- the scheduler ---- */

static uint64_t roll(void) /* splitmix64 */
{
  uint64_t z = dice += 0x9e3779b97f4a7c15u;

  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return z ^ z >> 31;
}

static void shuffle_order(void)
{
  for (int i = thread_count - 1; seed && i > 0; i--) {
    int j = (int)(roll() % (uint64_t)(i + 1)), t = order[i];

    order[i] = order[j];
    order[j] = t;
  }
}

static const char *base_name(const char *path)
{
  const char *slash = strrchr(path, '/');

  return slash ? slash + 1 : path;
}

static void block_fault(const char *what, const struct thread *t)
{
  const unsigned *b = cudasim_here.block;

  is_block_failed = 1;
  cudasim_fail(cudaErrorLaunchFailure, "%s: block (%u,%u,%u), thread (%u,%u,%u), %s:%d", what, b[0], b[1], b[2], t->x, t->y, t->z,
               t->file ? base_name(t->file) : "?", t->line);
}

/* Whether all lanes of t's mask wait in the same shuffle; a lane that can never come is a fault. */
static int shuffle_complete(const struct thread *t, const struct thread *warp, int lanes)
{
  int complete = 1;

  for (int l = 0; l < WARP; l++) {
    if (!(t->mask >> l & 1))
      continue;
    if (l >= lanes || warp[l].state == DONE) {
      block_fault("a shuffle names a lane that has left", t);
      return 0;
    }
    complete = complete && warp[l].state == AT_SHUFFLE && warp[l].mask == t->mask && warp[l].line == t->line && warp[l].file == t->file &&
               warp[l].kind == t->kind;
  }
  return complete;
}

static uint32_t shuffled(const struct thread *t, const struct thread *warp, int lane)
{
  int from = t->kind == XOR ? lane ^ t->arg : t->kind == DOWN ? lane + t->arg : t->kind == INDEX ? t->arg & (WARP - 1) : lane;

  if (t->kind == DOWN && from >= WARP)
    from = lane;
  if (from < 0 || from >= WARP || !(t->mask >> from & 1)) {
    block_fault("a shuffle reads a lane outside of its mask", t);
    return 0;
  }
  return warp[from].value;
}

/* Releases the shuffles of one warp that have everybody. Returns how many threads that frees. */
static int release_warp(struct thread *warp, int lanes)
{
  int freed = 0;

  for (int l = 0; l < lanes && !is_block_failed; l++) {
    uint32_t mask = warp[l].mask;

    if (warp[l].state != AT_SHUFFLE)
      continue;
    if (!(mask >> l & 1)) {
      block_fault("a lane shuffles outside of its own mask", &warp[l]);
      break;
    }
    if (!shuffle_complete(&warp[l], warp, lanes))
      continue;
    for (int i = 0; i < lanes; i++)
      if (mask >> i & 1)
        warp[i].result = shuffled(&warp[i], warp, i);
    for (int i = 0; i < lanes; i++)
      if (mask >> i & 1) {
        warp[i].state = RELEASED;
        freed++;
      }
  }
  return freed;
}

static int release_barrier(void)
{
  struct thread *first = NULL, *other = NULL;

  for (int i = 0; i < thread_count; i++) {
    struct thread *t = &threads[i];

    if (t->state == AT_BARRIER && !first)
      first = t;
    else if (t->state != AT_BARRIER || (first && (t->line != first->line || t->file != first->file)))
      other = t;
  }
  if (!first)
    return 0;
  if (other) {
    if (other->state == DONE)
      block_fault("a barrier waits for a thread that has left", first);
    else
      block_fault("threads of a block wait at different places", other);
    return 0;
  }
  for (int i = 0; i < thread_count; i++)
    threads[i].state = RELEASED;
  return thread_count;
}

static void resume_released(void)
{
  shuffle_order();
  for (int i = 0; i < thread_count && !is_block_failed; i++) {
    struct thread *t = &threads[order[i]];

    if (t->state == RELEASED)
      switch_to(t->fiber);
  }
}

static int start_threads(void)
{
  while (next_thread < thread_count && !is_block_failed) {
    struct fiber *f;

    if (!idle_count)
      return -1;
    f = idle[--idle_count];
    if (!f->sp && fiber_prepare(f))
      return -1;
    switch_to(f);
  }
  return 0;
}

static void poison_shared(void)
{
  memset(__start_cudasim_shared, 0xff, (size_t)(__stop_cudasim_shared - __start_cudasim_shared));
}

/* Whether anything was written there since. */
static int is_shared_written(void)
{
  const char *from = __start_cudasim_shared, *to = __stop_cudasim_shared;

  return from < to && ((unsigned char)*from != 0xff || memcmp(from, from + 1, (size_t)(to - from) - 1));
}

static void run_block(void)
{
  int freed = 0;

  next_thread = done_count = is_block_failed = 0;
  for (int i = 0; i < thread_count; i++)
    threads[i].state = WAITING_TO_START;
  shuffle_order();
  if (start_threads()) {
    is_block_failed = 1;
    cudasim_fail(cudaErrorLaunchFailure, "the simulator has no memory for its stacks");
  }
  while (done_count < thread_count && !is_block_failed) {
    freed = 0;
    for (int w = 0; w < thread_count && !is_block_failed; w += WARP)
      freed += release_warp(threads + w, thread_count - w < WARP ? thread_count - w : WARP);
    if (!freed && !is_block_failed)
      freed = release_barrier();
    if (!freed && !is_block_failed)
      block_fault("lanes of a warp wait for each other at different places", &threads[0]);
    resume_released();
  }
}

struct launch {
  unsigned blocks[3], threads[3];
  void (*run)(void *);
  _Alignas(16) char call[4096];
};

static void forget_fibers(void)
{
  for (int i = 0; i < MOST_THREADS; i++) {
    fibers[i].sp = NULL;
    idle[i] = &fibers[i];
  }
  idle_count = MOST_THREADS;
}

static int run_launch(void *arg)
{
  struct launch *l = arg;

  if (sticky)
    return sticky;
  if (!idle_count)
    forget_fibers();
  kernel = l->run;
  kernel_call = l->call;
  current_fiber = &main_fiber;
  thread_count = (int)(l->threads[0] * l->threads[1] * l->threads[2]);
  memcpy(cudasim_here.blocks, l->blocks, sizeof l->blocks);
  memcpy(cudasim_here.threads, l->threads, sizeof l->threads);
  for (int i = 0; i < thread_count; i++) {
    threads[i] = (struct thread){.x = (unsigned)i % l->threads[0], .y = (unsigned)i / l->threads[0] % l->threads[1],
                                 .z = (unsigned)i / (l->threads[0] * l->threads[1])};
    order[i] = i;
  }
  dice = seed;
  uses_shared = 1; /* the first block shows whether the others need the poison as well */
  counts.launches++;
  is_block_failed = 0;
  for (unsigned z = 0; z < l->blocks[2]; z++)
    for (unsigned y = 0; y < l->blocks[1]; y++)
      for (unsigned x = 0; x < l->blocks[0] && !is_block_failed; x++) {
        cudasim_here.block[0] = x;
        cudasim_here.block[1] = y;
        cudasim_here.block[2] = z;
        if (uses_shared)
          poison_shared();
        run_block();
        if (x + y + z == 0)
          uses_shared = is_shared_written();
      }
  if (is_block_failed)
    forget_fibers();
  return sticky;
}

int cudasim_launch(struct cudasim_stream *s, const unsigned blocks[3], const unsigned size[3], size_t shared, void (*run)(void *), const void *call,
                   size_t bytes)
{
  struct launch l = {.run = run};

  if (sticky)
    return sticky;
  if (!blocks[0] || !blocks[1] || !blocks[2] || !size[0] || !size[1] || !size[2] || blocks[0] > 0x7fffffffu || blocks[1] > 65535 || blocks[2] > 65535 ||
      size[0] > MOST_THREADS || size[1] > MOST_THREADS || size[2] > 64 || size[0] * size[1] * size[2] > MOST_THREADS || shared > 48 << 10 ||
      bytes > sizeof l.call)
    return cudasim_fail(cudaErrorInvalidConfiguration, "no such launch: %ux%ux%u blocks of %ux%ux%u threads, %zu bytes of shared memory", blocks[0],
                        blocks[1], blocks[2], size[0], size[1], size[2], shared);
  memcpy(l.blocks, blocks, sizeof l.blocks);
  memcpy(l.threads, size, sizeof l.threads);
  memcpy(l.call, call, bytes);
  return cudasim_enqueue(s, run_launch, &l, sizeof l);
}
