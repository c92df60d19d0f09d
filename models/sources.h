/*
 * sources.h - the pristine weights of a model, for whoever needs them after it was loaded.
 *
 * A model keeps the source of each of its components open for its life: files stay mapped (their pages are let go after every read,
 * so that this costs address space and no memory), synthetic weights are drawn again. Generations with adapters are built from here and
 * never from packed weights, which are rounded to the backend's type.
 *
 * Called by model.c (opens), compose.c, guard.c, the tools that merge and extract (read). Threads: immutable once the model is loaded;
 * any thread may read.
 */
#ifndef SAFELIGHT_MODELS_SOURCES_H
#define SAFELIGHT_MODELS_SOURCES_H

#include "models/generation.h"

enum { SOURCES_MAX = 4 };

struct model_sources {
  struct {
    char component[24];     /* what the names of its sites start with: "unet" */
    struct source *source;
  } part[SOURCES_MAX];
  int n;
};

/* Takes source over, also after failure. */
MUST_CHECK int sources_add(struct model_sources *s, const char *component, struct source *source, struct err *e);
void sources_close(struct model_sources *s); /* takes a zeroed one; leaves one */

/* A site's parameter in fp32, as the checkpoint lays it out (struct weight_desc). */
struct pristine {
  float *w, *bias;          /* bias: NULL when the site has none */
  int64_t count;            /* of w */
};

int64_t site_count(const struct site *s); /* numbers in its weight */

/* Reads the parameter of a site of the base generation. E_FILE when the checkpoint was rewritten in place since it was opened.
 * On success p must be released with pristine_free; on failure it is zeroed. */
MUST_CHECK int sources_read(const struct model_sources *s, const struct site *site, struct pristine *p, struct err *e);
/* How many dimensions the checkpoint stores the site's weight with: a linear of ours may be a 1x1 convolution there (4). 0 when it is not there. */
int sources_dims(const struct model_sources *s, const struct site *site);
void pristine_free(struct pristine *p); /* takes a zeroed one */

#endif
