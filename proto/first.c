/*
 * first.c - see first.h.
 */
#include "proto/first.h"

#include <stdio.h>
#include <stdlib.h>

void first_init(struct first *f)
{
  *f = (struct first){0};
}

void first_close(struct first *f)
{
  for (int i = 0; i < FIRST_FILES; i++)
    free(f->file[i].owned);
  first_init(f);
}

int first_take(struct first *f, int which, const struct field_in *in, struct err *e)
{
  struct first_file *file = &f->file[which];

  if (file->p)
    return err_field(e, E_ARG, in->name, "%s is there twice", in->name);
  if (field_file(in, &file->owned, &file->len, e))
    return e->code;
  file->p = file->owned;
  snprintf(file->field, sizeof file->field, "%s", in->name);
  return 0;
}
