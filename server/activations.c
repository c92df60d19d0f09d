/*
 * activations.c - see activations.h.
 */
#include "server/activations.h"

#include <string.h>

void activations_ask(struct be_config *bc, const char *word)
{
  bc->force_f32 = !strcmp(word, "fp32");
  bc->want_f16 = !strcmp(word, "fp16");
}

int activations_check(const struct be *be, const char *word, struct err *e)
{
  static const char *const names[] = {[DT_F32] = "fp32", [DT_F16] = "fp16", [DT_BF16] = "bf16"};

  if (!strcmp(word, "auto") || !strcmp(word, names[be->act]))
    return 0;
  return err_field(e, E_ARG, "activations",
                   "activations cannot be %s with the backend %s here: a GPU computes in bf16 or fp16, a processor in fp32, and in bf16 where it has "
                   "AVX512-BF16 or AMX, the backend ref in fp32; auto is %s",
                   word, be->ops->name, names[be->act]);
}
