/*
 * networks.h - what the golden tests of the networks share: one tiny checkpoint on one backend, and its golden outputs.
 *
 * A case runs a network on golden inputs and gives its error against the golden output. A planted bug is a function that changes
 * the configurations after they are read, or entries of the backend's table, so that the product's code needs no switch for it.
 *
 * Called by test_networks.c and test_networks_cpu.c. Run from the root of the repository. Threads: none.
 */
#ifndef SAFELIGHT_TESTS_NETWORKS_H
#define SAFELIGHT_TESTS_NETWORKS_H

#include "models/clip.h"
#include "models/safetensors.h"
#include "models/sources.h"
#include "models/unet.h"
#include "models/vae.h"

struct nets {
  const char *name;             /* "sd15", ... */
  struct be_ops ops;            /* the backend's table, perhaps with a bug planted */
  struct be be;
  struct be dry;                /* be_dry with the same activation type, to size the arena */
  struct clip_config clip_config;
  struct unet_config unet_config;
  struct vae_config vae_config;
  int has_clip, has_unet, has_vae; /* what nets_open was asked for */
  struct generation *g;         /* what is drawn with; nets_close lets go of it */
  const struct generation *const *row; /* NULL, or what each row of a UNet pass is drawn with instead */
  int rows;
  struct model_sources sources; /* of the weights of g */
  struct clip *clip;
  struct unet *unet;
  struct vae *vae;
  int wrong_skip, wrong_rows, wrong_ids; /* planted bugs of the caller's side */
  double enough;                /* an error above this ends a check; infinite after nets_open */
};

struct bug {
  const char *name;
  const char *checkpoint, *what; /* which check must notice: see nets_check */
  void (*config)(struct nets *n);
  void (*ops)(struct be_ops *ops);
};

extern const struct bug network_bugs[];
extern const int network_bug_count;

/* Writes the checkpoint once per process (removed by nets_cleanup), loads networks of it ("text", "unet", "vae", "unet text") on the backend.
 * cfg and bug may be NULL. Fails the test on any error. */
void nets_open(struct nets *n, const struct be_ops *ops, const struct be_config *cfg, const char *name, const char *what,
               const struct bug *bug);
/* All networks of sd15 with its weights rounded to bf16. */
void nets_open_bf16(struct nets *n, const struct be_ops *ops);
void nets_close(struct nets *n);
/* Builds the UNet again with what the caller changed in n: must fail with this code and name the tensor or site. */
void nets_expect_failure(struct nets *n, int code, const char *name);
void nets_cleanup(void);
/* The folder of n's checkpoint, as nets_open wrote it. */
const char *nets_dir(const struct nets *n);

/* Of one output, or the worst of many: the largest difference as a share of the largest value, and the root of the mean square of
 * the differences as a share of that of the values. Infinite where there is a NaN. */
struct net_error {
  double max, rms;
};

/* The worst errors of all cases of a golden file; *cases counts them. what: "text", "unet", "vae". */
struct net_error nets_check(struct nets *n, const char *what, int *cases);
/* Of bf16.safetensors: text encoder, UNet and VAE. */
struct net_error nets_check_bf16(struct nets *n, int *cases);

/* Whether a UNet pass over two pictures with prompts of different lengths gives, bit for bit, what two passes over one give. */
int nets_rows_independent(struct nets *n);

/* The UNet on the input `mid` of its golden file, under n->g, against another output. */
struct net_error nets_check_output(struct nets *n, const struct st_tensor *want);

/* One case of lora_sd15.safetensors, under n->g: "text" or one of the UNet. */
struct net_error nets_check_lora(struct nets *n, const char *name);
/* The UNet on `rows` rows of the golden input under row[b], prompts included: (rows, h, w, C) in host memory, test_free'd by the caller;
 * *each: numbers of a row. input: which of the golden's two rows each takes; NULL: row b takes b. */
float *nets_predict(struct nets *n, const struct generation *const *row, const int *input, int rows, size_t *each);

#endif
