/*
 * fuzz_config.c - a checkpoint's config files: whatever bytes come, they are read into numbers within their bounds or refused with
 * a sentence that names the file.
 *
 * links: models/config.c models/config_read.c base/json_load.c base/err.c
 */
#include <stdlib.h>
#include <string.h>

#include "models/config.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void must(int ok)
{
  if (!ok)
    abort();
}

static void check_unet(const struct unet_config *c)
{
  int i;

  must(c->levels >= 1 && c->levels <= CONFIG_MAX_LEVELS && c->groups >= 1 && c->channels[0] % 2 == 0);
  must(c->context_dim >= 1 && c->context_dim <= CONFIG_MAX_CHANNELS && c->norm_eps > 0);
  must(!c->add_time_dim || c->add_in_dim > c->add_time_dim);
  for (i = 0; i < c->levels; i++) {
    must(c->channels[i] >= 1 && c->channels[i] <= CONFIG_MAX_CHANNELS && c->channels[i] % c->groups == 0);
    must(c->layers[i] >= 1 && c->layers[i] <= CONFIG_MAX_LAYERS && c->depth[i] >= 1 && c->depth[i] <= CONFIG_MAX_DEPTH);
    must(!c->down_attn[i] || c->channels[i] % c->heads[i] == 0);
    must(!c->up_attn[i] || c->channels[c->levels - 1 - i] % c->heads[c->levels - 1 - i] == 0);
  }
}

static void check_vae(const struct vae_config *c)
{
  int i;

  must(c->levels >= 1 && c->levels <= CONFIG_MAX_LEVELS && c->factor == 1 << (c->levels - 1) && c->scaling_factor > 0);
  for (i = 0; i < c->levels; i++)
    must(c->channels[i] >= 1 && c->channels[i] % c->groups == 0);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
  struct unet_config unet;
  struct vae_config vae;
  struct clip_config clip;
  struct schedule_config schedule;
  struct index_config index;
  struct err e[5] = {{0}};
  char *text = malloc(size ? size : 1); /* its own block, so that reading past the end shows */
  int i, code[5];

  must(text != NULL);
  memcpy(text, data, size);
  code[0] = unet_config_parse(&unet, text, size, "file", &e[0]);
  code[1] = vae_config_parse(&vae, text, size, "file", &e[1]);
  code[2] = clip_config_parse(&clip, text, size, "file", &e[2]);
  code[3] = schedule_config_parse(&schedule, text, size, "file", &e[3]);
  code[4] = index_config_parse(&index, text, size, "file", &e[4]);
  for (i = 0; i < 5; i++)
    must(code[i] == e[i].code && (!code[i] || (code[i] == E_FILE && strstr(e[i].msg, "file"))));
  if (!code[0])
    check_unet(&unet);
  if (!code[1])
    check_vae(&vae);
  if (!code[2])
    must(clip.width % clip.heads == 0 && clip.eos >= 0 && clip.eos < clip.vocab && clip.layers >= 1);
  if (!code[3])
    must(schedule.beta_start > 0 && schedule.beta_end < 1 && schedule.train_steps >= 2);
  free(text);
  return 0;
}
