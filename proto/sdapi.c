/*
 * sdapi.c - decoding A1111's txt2img and img2img: one table of fields that have an effect, one of those that must not. See sdapi.h.
 *
 * Names, types and defaults are A1111's (modules/api/models.py). The jansson tree lives and dies in sdapi_decode. Threads: pure functions.
 */
#include "proto/sdapi.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "proto/sdapi_fields.h"

enum { BLUR_MAX = 64 };

static int decode_prompt(const struct field_in *f, struct request *r, struct err *e)
{
  return field_text(f, r->prompt, REQUEST_PROMPT_MAX, &r->prompt_len, e);
}

static int decode_negative(const struct field_in *f, struct request *r, struct err *e)
{
  return field_text(f, r->negative, REQUEST_PROMPT_MAX, &r->negative_len, e);
}

static int decode_seed(const struct field_in *f, struct request *r, struct err *e)
{
  int64_t v;

  if (field_int(f, -1, INT64_MAX, &v, e))
    return E_ARG;
  r->has_seed = v >= 0;
  r->seed = v >= 0 ? (uint64_t)v : 0;
  return 0;
}

static int decode_steps(const struct field_in *f, struct request *r, struct err *e)
{
  return field_small(f, 1, f->lim->max_steps, &r->steps, e);
}

static int decode_guidance(const struct field_in *f, struct request *r, struct err *e)
{
  double d;

  if (field_number(f, 0, (double)f->lim->max_guidance, &d, e))
    return E_ARG;
  r->guidance = (float)d;
  return 0;
}

static int decode_width(const struct field_in *f, struct request *r, struct err *e)
{
  return field_get_side(f, &r->width, e);
}

static int decode_height(const struct field_in *f, struct request *r, struct err *e)
{
  return field_get_side(f, &r->height, e);
}

static int decode_batch_size(const struct field_in *f, struct request *r, struct err *e)
{
  (void)r;
  return field_small(f, 1, f->lim->max_n, &((struct sdapi_more *)f->more)->x->batch_size, e);
}

static int decode_n_iter(const struct field_in *f, struct request *r, struct err *e)
{
  (void)r;
  return field_small(f, 1, f->lim->max_n, &((struct sdapi_more *)f->more)->x->n_iter, e);
}

static int decode_sampler_name(const struct field_in *f, struct request *r, struct err *e)
{
  ((struct sdapi_more *)f->more)->has_sampler = 1;
  return field_text(f, r->sampler, REQUEST_SAMPLER_MAX - 1, NULL, e);
}

/* The old name of the same thing, which counts when the new one is not there. */
static int decode_sampler_index(const struct field_in *f, struct request *r, struct err *e)
{
  (void)r;
  return field_text(f, ((struct sdapi_more *)f->more)->sampler_index, REQUEST_SAMPLER_MAX - 1, NULL, e);
}

/* normal and uniform are the same levels for these models; automatic leaves it to the sampler. */
static int decode_scheduler(const struct field_in *f, struct request *r, struct err *e)
{
  static const struct {
    const char *name;
    int karras;
  } known[] = {{"automatic", -1}, {"uniform", 0}, {"normal", 0}, {"karras", 1}};
  const char *s = json_string_value(f->v);

  for (size_t i = 0; s && i < sizeof known / sizeof *known; i++)
    if (!strcasecmp(s, known[i].name)) {
      r->karras = known[i].karras;
      return 0;
    }
  return err_field(e, E_ARG, f->name, "%s must be one of automatic, uniform, normal, karras", f->name);
}

static int decode_clip_skip(const struct field_in *f, struct request *r, struct err *e)
{
  return field_small(f, 1, REQUEST_CLIP_SKIP_MAX, &r->clip_skip, e);
}

static int decode_denoising(const struct field_in *f, struct request *r, struct err *e)
{
  double d;

  (void)r;
  if (field_number(f, 0, 1, &d, e))
    return E_ARG;
  ((struct sdapi_more *)f->more)->x->denoising = (float)d;
  return 0;
}

static int decode_send_images(const struct field_in *f, struct request *r, struct err *e)
{
  (void)r;
  return field_flag(f, &((struct sdapi_more *)f->more)->x->sends_images, e);
}

static int decode_extra_networks(const struct field_in *f, struct request *r, struct err *e)
{
  (void)r;
  return field_flag(f, &((struct sdapi_more *)f->more)->drops_tags, e);
}

/* Which eta a picture has depends on the sampler: judged when that is known. */
static int decode_eta(const struct field_in *f, struct request *r, struct err *e)
{
  struct sdapi_more *m = f->more;

  (void)r;
  m->has_eta = 1;
  return field_number(f, 0, 1, &m->eta, e);
}

/* ---- img2img ---- */

static int decode_init_images(const struct field_in *f, struct request *r, struct err *e)
{
  struct field_in one = *f;

  (void)r;
  if (!json_is_array(f->v) || json_array_size(f->v) != 1)
    return err_field(e, E_ARG, f->name, "%s must be a list of one picture in base64", f->name);
  one.v = json_array_get(f->v, 0);
  return first_take(((struct sdapi_more *)f->more)->first, FIRST_INIT, &one, e);
}

static int decode_mask(const struct field_in *f, struct request *r, struct err *e)
{
  const char *s = json_string_value(f->v);

  (void)r;
  return s && !*s ? 0 : first_take(((struct sdapi_more *)f->more)->first, FIRST_MASK, f, e);
}

/* Both ways, whatever mask_blur_x and mask_blur_y say. */
static int decode_mask_blur(const struct field_in *f, struct request *r, struct err *e)
{
  struct sdapi_more *m = f->more;

  (void)r;
  m->has_blur = 1;
  return field_number(f, 0, BLUR_MAX, &m->blur, e);
}

static int decode_side_blur(const struct field_in *f, float *blur, struct err *e)
{
  double d;

  if (field_number(f, 0, BLUR_MAX, &d, e))
    return E_ARG;
  *blur = (float)d;
  return 0;
}

static int decode_mask_blur_x(const struct field_in *f, struct request *r, struct err *e)
{
  (void)r;
  return decode_side_blur(f, &((struct sdapi_more *)f->more)->first->blur_x, e);
}

static int decode_mask_blur_y(const struct field_in *f, struct request *r, struct err *e)
{
  (void)r;
  return decode_side_blur(f, &((struct sdapi_more *)f->more)->first->blur_y, e);
}

static int decode_padding(const struct field_in *f, struct request *r, struct err *e)
{
  (void)r;
  return field_small(f, 0, FIRST_MAX_SIDE, &((struct sdapi_more *)f->more)->first->padding, e);
}

static int decode_fill(const struct field_in *f, struct request *r, struct err *e)
{
  (void)r;
  return field_small(f, 0, 3, &((struct sdapi_more *)f->more)->fill, e);
}

static int decode_full_res(const struct field_in *f, struct request *r, struct err *e)
{
  (void)r;
  return field_flag(f, &((struct sdapi_more *)f->more)->first->is_only_masked, e);
}

/* An integer in A1111, a boolean for some clients. */
static int decode_mask_invert(const struct field_in *f, struct request *r, struct err *e)
{
  struct first *first = ((struct sdapi_more *)f->more)->first;

  (void)r;
  if (!json_is_boolean(f->v))
    return field_small(f, 0, 1, &first->is_inverted, e);
  first->is_inverted = json_is_true(f->v);
  return 0;
}

static int decode_resize_mode(const struct field_in *f, struct request *r, struct err *e)
{
  static const enum first_fit fits[] = {FIRST_STRETCH, FIRST_CROP, FIRST_FILL};
  int mode;

  (void)r;
  if (field_small(f, 0, 3, &mode, e))
    return E_ARG;
  if (mode == 3)
    return err_field(e, E_ARG, f->name, "resize_mode 3 (latent upscale) is not supported: send 0 (just resize), 1 (crop and resize) or 2 (resize and fill)");
  ((struct sdapi_more *)f->more)->first->fit = fits[mode];
  return 0;
}

static const struct field fields[] = {
    {"prompt", decode_prompt},
    {"negative_prompt", decode_negative},
    {"seed", decode_seed},
    {"steps", decode_steps},
    {"cfg_scale", decode_guidance},
    {"width", decode_width},
    {"height", decode_height},
    {"batch_size", decode_batch_size},
    {"n_iter", decode_n_iter},
    {"sampler_name", decode_sampler_name},
    {"sampler_index", decode_sampler_index},
    {"scheduler", decode_scheduler},
    {"clip_skip", decode_clip_skip},
    {"denoising_strength", decode_denoising},
    {"send_images", decode_send_images},
    {"disable_extra_networks", decode_extra_networks},
    {"eta", decode_eta},
    {"override_settings", sdapi_decode_override},
    {"alwayson_scripts", sdapi_decode_scripts},
};

static const struct field img2img_fields[] = {
    {"init_images", decode_init_images},
    {"mask", decode_mask},
    {"mask_blur", decode_mask_blur},
    {"mask_blur_x", decode_mask_blur_x},
    {"mask_blur_y", decode_mask_blur_y},
    {"inpainting_fill", decode_fill},
    {"inpaint_full_res", decode_full_res},
    {"inpaint_full_res_padding", decode_padding},
    {"inpainting_mask_invert", decode_mask_invert},
    {"resize_mode", decode_resize_mode},
};

#define COUNT(a) (sizeof(a) / sizeof *(a))

static int decode_field(const struct field_in *f, int is_img2img, struct request *r, struct err *e)
{
  const struct field *known = field_find(fields, COUNT(fields), f->name);
  int ret;

  if (!known && is_img2img)
    known = field_find(img2img_fields, COUNT(img2img_fields), f->name);
  if (json_is_null(f->v) && (known || sdapi_is_idle_field(f->name)))
    return 0;
  if (known)
    return known->decode(f, r, e);
  ret = sdapi_check_idle_field(f, e);
  return ret > 0 ? field_unknown(f->name, NULL, e) : ret;
}

/* eta belongs to samplers that add noise: ours have 1 where they do, and 0 for DDIM; the others have none. */
static int check_eta(const struct sdapi_more *m, const struct request *r, struct err *e)
{
  size_t n = strlen(r->sampler);
  int is_ancestral = strcasestr(r->sampler, "ancestral") || (n > 2 && (!strcasecmp(r->sampler + n - 2, " a") || !strcasecmp(r->sampler + n - 2, "_a")));
  int is_ddim = strcasestr(r->sampler, "ddim") != NULL;

  if (m->has_eta && ((is_ancestral && !(m->eta == 1)) || (is_ddim && !(m->eta == 0))))
    return err_field(e, E_ARG, "eta", "eta must be %d with the sampler %s", is_ancestral, r->sampler);
  return 0;
}

static int check_mask(const struct sdapi_more *m, struct err *e)
{
  if (!m->first->file[FIRST_MASK].p) {
    m->first->is_only_masked = 0;
    return 0;
  }
  if (m->fill > 1)
    return err_field(e, E_ARG, "inpainting_fill", "inpainting_fill %d is not supported: send 0 (fill) or 1 (original)", m->fill);
  m->first->is_filled = !m->fill;
  if (m->has_blur)
    m->first->blur_x = m->first->blur_y = (float)m->blur;
  return 0;
}

/* What only the whole tells. */
static int finish(struct request *r, struct sdapi_more *m, const struct request_limits *lim, struct err *e)
{
  int wants_own;

  if (m->x->is_img2img && !m->first->file[FIRST_INIT].p)
    return err_field(e, E_ARG, "init_images", "init_images is required: a list of one picture in base64");
  if (m->x->batch_size * m->x->n_iter > lim->max_n)
    return err_field(e, E_ARG, "batch_size", "batch_size x n_iter must be at most %d pictures", lim->max_n);
  r->n = m->x->batch_size * m->x->n_iter;
  if (!m->has_sampler && *m->sampler_index)
    memcpy(r->sampler, m->sampler_index, sizeof r->sampler);
  if (check_mask(m, e))
    return E_ARG;
  wants_own = m->x->is_img2img && !r->width && !r->height && !m->first->is_only_masked; /* the size of the first picture */
  if (!wants_own) {
    r->width = r->width ? r->width : lim->default_size;
    r->height = r->height ? r->height : lim->default_size;
  }
  if (m->x->is_img2img && !(m->x->denoising > 0))
    return err_field(e, E_ARG, "denoising_strength", "denoising_strength must be above 0: with nothing drawn anew there is nothing to do");
  r->strength = m->x->is_img2img ? m->x->denoising : 1;
  if (check_eta(m, r, e))
    return E_ARG;
  return sdapi_take_tags(r, m->drops_tags, e);
}

static int decode_object(struct request *r, struct sdapi_more *m, json_t *root, const struct request_limits *lim, struct err *e)
{
  const char *name;
  json_t *v;

  request_init(r, lim);
  json_object_foreach(root, name, v) {
    struct field_in f = {name, v, lim, m};
    if (decode_field(&f, m->x->is_img2img, r, e))
      return e->code;
  }
  return finish(r, m, lim, e);
}

int sdapi_decode(struct request *r, struct sdapi_extra *x, struct first *first, int is_img2img, const char *body, size_t len,
                 const struct request_limits *lim, struct err *e)
{
  struct sdapi_more m = {.x = x, .first = first};
  struct err none = {0};
  struct body b;
  int ret;

  e = e ? e : &none;
  *x = (struct sdapi_extra){.is_img2img = is_img2img, .batch_size = 1, .n_iter = 1, .sends_images = 1, .denoising = 0.75f};
  first_init(first);
  first->mask = FIRST_MASK_LIGHT;
  first->blur_x = first->blur_y = 4;
  first->is_only_masked = is_img2img;
  if (body_begin(&b, body, len, e))
    return e->code;
  ret = decode_object(r, &m, b.root, lim, e);
  ret = body_end(&b, ret, e);
  if (ret)
    first_close(first);
  return ret;
}

int sdapi_decode_png_info(uint8_t **file, size_t *n, const char *body, size_t len, struct err *e)
{
  struct err none = {0};
  struct body b;
  struct field_in f = {.name = "image"};
  int ret;

  e = e ? e : &none;
  *file = NULL;
  if (body_begin(&b, body, len, e))
    return e->code;
  f.v = json_object_get(b.root, f.name);
  ret = f.v ? field_file(&f, file, n, e) : err_field(e, E_ARG, f.name, "image is required: a PNG file in base64");
  ret = body_end(&b, ret, e);
  if (ret) {
    free(*file);
    *file = NULL;
  }
  return ret;
}

int sdapi_decode_flag(int *flag, const char *name, const char *query, struct err *e)
{
  static const char *const words[] = {"false", "true", "0", "1", "no", "yes", "off", "on", "f", "t", "n", "y"};

  *flag = 0;
  for (size_t i = 0; query && i < sizeof words / sizeof *words; i++)
    if (!strcasecmp(query, words[i])) {
      *flag = i % 2;
      return 0;
    }
  return query ? err_field(e, E_ARG, name, "%s must be true or false", name) : 0;
}
