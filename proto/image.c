/*
 * image.c - the encoder, and a recipe's picture in the format it asks for. See image.h.
 *
 * Called by server/encode.c and server/generate.c. Threads: an encoder belongs to one thread at a time.
 */
#include "proto/image.h"

#include <libdeflate.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "proto/image_codec.h"

enum { LEVEL_SMALL = 9 }; /* of libdeflate, 1..12 */

int image_open(struct image_encoder **enc, struct err *e)
{
  *enc = calloc(1, sizeof **enc);
  return *enc ? 0 : err_set(e, E_NOMEM, "out of memory for the image encoder");
}

int image_set_small(struct image_encoder *enc, struct err *e)
{
  if (!enc->deflate)
    enc->deflate = libdeflate_alloc_compressor(LEVEL_SMALL);
  return enc->deflate ? 0 : err_set(e, E_NOMEM, "out of memory for the image encoder");
}

void image_close(struct image_encoder *enc)
{
  if (!enc)
    return;
  if (enc->deflate)
    libdeflate_free_compressor(enc->deflate);
  free(enc->scratch);
  free(enc);
}

static const struct {
  enum image_format format;
  const char *ending, *mime;
} formats[] = {
    {IMAGE_PNG, ".png", "image/png"}, {IMAGE_JPEG, ".jpg", "image/jpeg"}, {IMAGE_WEBP, ".webp", "image/webp"}, {IMAGE_JPEG, ".jpeg", "image/jpeg"}};

enum { FORMATS = sizeof formats / sizeof *formats };

const char *image_mime(enum image_format format)
{
  for (int i = 0; i < FORMATS; i++)
    if (formats[i].format == format)
      return formats[i].mime;
  return "application/octet-stream";
}

int image_format_of(const char *name, enum image_format *format, struct err *e)
{
  const char *ending = strrchr(name, '.');

  for (int i = 0; ending && i < FORMATS; i++)
    if (!strcasecmp(ending, formats[i].ending)) {
      *format = formats[i].format;
      return 0;
    }
  return err_set(e, E_ARG, "the file's name must end in .png, .jpg, .jpeg or .webp; got \"%s\"", name);
}

/* The recipe's text, as much of it as detail says and the format has room for. */
static int add_parameters(struct buf *out, const struct recipe *r, enum image_detail detail, struct err *e)
{
  struct err full = {0};
  struct buf exif;
  int code = image_parameters(out, r, detail, e);

  if (code || r->format != IMAGE_JPEG)
    return code;
  buf_init(&exif, EXIF_JPEG_MAX);
  code = exif_write_comment(&exif, out->p, EXIF_JPEG_MAX, &full);
  buf_close(&exif);
  if (code != E_TOOBIG)
    return code ? err_set(e, code, "%s", full.msg) : 0;
  buf_close(out);
  return image_parameters(out, r, IMAGE_NO_PROMPTS, e);
}

int image_encode_picture(struct image_encoder *enc, struct buf *out, const uint8_t *rgb, const struct recipe *r, enum image_detail detail,
                         struct err *e)
{
  int w = r->file_width ? r->file_width : r->width, h = r->file_height ? r->file_height : r->height, code = 0;
  struct image_text t = {NULL, NULL};
  struct buf parameters, xmp;

  buf_init(&parameters, 8 * REQUEST_PROMPT_MAX);
  buf_init(&xmp, 64 << 10);
  if (detail != IMAGE_PROVENANCE)
    code = add_parameters(&parameters, r, detail, e);
  if (!code)
    code = image_xmp(&xmp, r, e);
  t.parameters = parameters.p;
  t.xmp = xmp.p;
  if (!code && r->format == IMAGE_JPEG)
    code = image_encode_jpeg(out, rgb, w, h, r->quality, &t, e);
  else if (!code && r->format == IMAGE_WEBP)
    code = image_encode_webp(out, rgb, w, h, r->quality, &t, e);
  else if (!code)
    code = image_encode_png(enc, out, rgb, w, h, &t, e);
  buf_close(&parameters);
  buf_close(&xmp);
  return code;
}
