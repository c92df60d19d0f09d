/*
 * image_read_webp.c - WebP files on libwebp. See image_read.h. Called by image_read.c. Threads: pure functions.
 */
#include <webp/decode.h>
#include <webp/mux.h>

#include "proto/image_codec.h"

static int fail(VP8StatusCode code, struct err *e)
{
  switch (code) {
  case VP8_STATUS_OUT_OF_MEMORY: return err_set(e, E_NOMEM, "out of memory for a WebP file");
  case VP8_STATUS_NOT_ENOUGH_DATA:
  case VP8_STATUS_SUSPENDED: return err_set(e, E_ARG, "the WebP file is cut off");
  case VP8_STATUS_UNSUPPORTED_FEATURE: return err_set(e, E_ARG, "the WebP file has a feature that is not read");
  default: return err_set(e, E_ARG, "the WebP file is damaged");
  }
}

static int read_orientation(const uint8_t *file, size_t len)
{
  WebPData data = {file, len}, exif;
  WebPMux *mux = WebPMuxCreate(&data, 0);
  int o = 1;

  if (mux && WebPMuxGetChunk(mux, "EXIF", &exif) == WEBP_MUX_OK)
    o = exif_orientation(exif.bytes, exif.size);
  WebPMuxDelete(mux);
  return o;
}

int image_read_webp(struct image *im, const uint8_t *file, size_t len, const struct image_limits *lim, int *orientation, struct err *e)
{
  WebPDecoderConfig c;
  VP8StatusCode code;

  if (!WebPInitDecoderConfig(&c))
    return err_set(e, E_INTERNAL, "libwebp is another version than its headers");
  if ((code = WebPGetFeatures(file, len, &c.input)) != VP8_STATUS_OK)
    return fail(code, e);
  if (c.input.has_animation)
    return err_set(e, E_ARG, "the WebP file is animated; send a single picture");
  if (image_alloc(im, c.input.width, c.input.height, c.input.has_alpha ? 4 : 3, lim, e))
    return e ? e->code : E_ARG;
  c.output.colorspace = c.input.has_alpha ? MODE_RGBA : MODE_RGB;
  c.output.is_external_memory = 1;
  c.output.u.RGBA.rgba = im->px;
  c.output.u.RGBA.stride = im->w * im->channels;
  c.output.u.RGBA.size = (size_t)im->w * (size_t)im->h * (size_t)im->channels;
  code = WebPDecode(file, len, &c);
  WebPFreeDecBuffer(&c.output);
  if (code != VP8_STATUS_OK)
    return fail(code, e);
  *orientation = read_orientation(file, len);
  return 0;
}
