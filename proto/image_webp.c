/*
 * image_webp.c - WebP files on libwebp. See image.h. Called by image.c. Threads: pure functions.
 */
#include <webp/encode.h>
#include <webp/mux.h>

#include <string.h>

#include "proto/image_codec.h"

enum { LOSSLESS = 100, LOSSLESS_LEVEL = 2 /* of 0..9; higher ones take several times as long for a few percent */ };

static int configure(WebPConfig *c, int quality)
{
  if (!WebPConfigInit(c))
    return 0;
  c->quality = (float)quality;
  return quality != LOSSLESS || WebPConfigLosslessPreset(c, LOSSLESS_LEVEL);
}

/* The picture alone, without text. */
static int encode(WebPMemoryWriter *file, const uint8_t *rgb, int w, int h, int quality, struct err *e)
{
  WebPConfig c;
  WebPPicture p;
  int r = 0;

  if (!configure(&c, quality) || !WebPPictureInit(&p))
    return err_set(e, E_INTERNAL, "libwebp is another version than its headers");
  p.use_argb = c.lossless;
  p.width = w;
  p.height = h;
  p.writer = WebPMemoryWrite;
  p.custom_ptr = file;
  if (!WebPPictureImportRGB(&p, rgb, w * 3) || !WebPEncode(&c, &p))
    r = p.error_code == VP8_ENC_ERROR_OUT_OF_MEMORY || p.error_code == VP8_ENC_ERROR_BITSTREAM_OUT_OF_MEMORY
          ? err_set(e, E_NOMEM, "out of memory for a WebP file")
          : err_set(e, E_INTERNAL, "the WebP file cannot be written: libwebp's error %d", p.error_code);
  WebPPictureFree(&p);
  return r;
}

/* The file with its texts, in all to be freed by WebPDataClear. */
static int add_texts(WebPData *all, const WebPMemoryWriter *file, const struct image_text *t, struct err *e)
{
  WebPData picture = {file->mem, file->size}, exif, xmp;
  WebPMux *mux = WebPMuxNew();
  struct buf comment;
  int r = 0;

  buf_init(&comment, 1 << 20);
  if (t->parameters && exif_write_comment(&comment, t->parameters, comment.max, e)) {
    r = e ? e->code : E_TOOBIG;
    goto out;
  }
  exif = (WebPData){(const uint8_t *)comment.p, comment.len};
  xmp = (WebPData){(const uint8_t *)t->xmp, t->xmp ? strlen(t->xmp) : 0};
  if (!mux || WebPMuxSetImage(mux, &picture, 0) != WEBP_MUX_OK || (comment.len && WebPMuxSetChunk(mux, "EXIF", &exif, 0) != WEBP_MUX_OK) ||
      (xmp.size && WebPMuxSetChunk(mux, "XMP ", &xmp, 0) != WEBP_MUX_OK) || WebPMuxAssemble(mux, all) != WEBP_MUX_OK)
    r = err_set(e, E_NOMEM, "out of memory for a WebP file");
out:
  WebPMuxDelete(mux);
  buf_close(&comment);
  return r;
}

int image_encode_webp(struct buf *out, const uint8_t *rgb, int w, int h, int quality, const struct image_text *text, struct err *e)
{
  WebPMemoryWriter file;
  WebPData all = {NULL, 0};
  int r;

  if (w < 1 || h < 1 || w > IMAGE_MAX_SIDE || h > IMAGE_MAX_SIDE)
    return err_set(e, E_INTERNAL, "a picture of %dx%d cannot be encoded", w, h);
  if (w > WEBP_MAX_DIMENSION || h > WEBP_MAX_DIMENSION)
    return err_set(e, E_ARG, "a WebP picture has at most %d pixels a side; ask for png or jpeg", WEBP_MAX_DIMENSION);
  WebPMemoryWriterInit(&file);
  r = encode(&file, rgb, w, h, quality ? quality : IMAGE_QUALITY, e);
  if (!r && text && (text->parameters || text->xmp)) {
    r = add_texts(&all, &file, text, e);
    if (!r)
      r = buf_add(out, all.bytes, all.size, e);
  } else if (!r) {
    r = buf_add(out, file.mem, file.size, e);
  }
  WebPDataClear(&all);
  WebPMemoryWriterClear(&file);
  return r;
}
