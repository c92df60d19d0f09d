/*
 * backend.c - opening and closing a backend. See backend.h.
 *
 * Called by server/ and tests; the models get an open struct be. Threads: the thread that will own the backend.
 */
#include "kernels/backend.h"

int be_open(struct be *be, const struct be_ops *ops, const struct be_config *cfg, struct err *e)
{
  int r;

  *be = (struct be){.ops = ops};
  r = ops->open(be, cfg, e);
  if (r)
    *be = (struct be){0};
  return r;
}

void be_close(struct be *be)
{
  if (!be || !be->ops)
    return;
  be->ops->close(be);
  *be = (struct be){0};
}

int be_pass_begin(struct be *be, const void *own, size_t own_bytes, struct err *e)
{
  (void)be, (void)own, (void)own_bytes, (void)e;
  return 0;
}

int be_pass_end(struct be *be, int code, int *again, struct err *e)
{
  (void)be, (void)e;
  *again = 0;
  return code;
}

void be_memory_none(struct be *be, struct be_memory *m)
{
  (void)be;
  *m = (struct be_memory){0};
}

int be_rehearse_nothing(struct be *be, enum be_rehearsal what)
{
  (void)be, (void)what;
  return 0;
}

int be_mark_open(struct be *be, struct mark **m, struct err *e)
{
  (void)be, (void)e;
  *m = NULL;
  return 0;
}

void be_mark_close(struct be *be, struct mark *m)
{
  (void)be, (void)m;
}

int be_mark_pass(struct be *be, struct mark *m, struct err *e)
{
  (void)be, (void)m, (void)e;
  return 0;
}
