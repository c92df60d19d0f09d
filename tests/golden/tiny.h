/*
 * tiny.h - a tiny checkpoint of the goldens, written to a folder and opened as a model, for tests that draw whole pictures.
 *
 * Called by test_pipeline.c, test_first.c, test_batch.c. Threads: the test's own.
 */
#ifndef SAFELIGHT_TESTS_GOLDEN_TINY_H
#define SAFELIGHT_TESTS_GOLDEN_TINY_H

#include "models/pipeline.h"
#include "models/safetensors.h"

struct tiny {
  struct safetensors *st;       /* the goldens; NULL without */
  char dir[256];                /* the checkpoint, written for the test */
  struct be be;
  struct model *m;
};

/* Fails the test when r is not 0. */
void must(int r, const struct err *e);
/* ckpt: "sd15" or "sd21"; golden: a file of tests/golden, or NULL. The model is reserved for 128x128 pixels. */
void tiny_open(struct tiny *t, const struct be_ops *ops, const struct be_config *cfg, const char *ckpt, const char *golden);
void tiny_close(struct tiny *t);
/* A picture of side x side pixels to start from, and a mask that keeps its left half. */
void tiny_first(uint8_t *rgb, uint8_t *mask, int side);
/* Tensor "group.name" of a golden; fails the test when it is not there. */
const struct st_tensor *golden_tensor(const struct safetensors *st, const char *group, const char *name);
void golden_sampler(struct draw_params *p, const char *name); /* "euler_karras" */
double golden_psnr(const uint8_t *a, const uint8_t *b, size_t n); /* dB; 999 when equal */

#endif
