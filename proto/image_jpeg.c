/*
 * image_jpeg.c - JPEG files on libjpeg. See image.h.
 *
 * libjpeg reports failure by calling error_exit, which may not return: it jumps back into image_encode_jpeg, which holds everything that has to be freed in
 * memory that the jump leaves alone. Codes are made for each picture (optimize_coding), which takes a second look at it and saves a few percent.
 *
 * Called by image.c. Threads: pure functions.
 */
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <jpeglib.h>

#include "proto/image_codec.h"

enum { CHUNK = 1 << 15, FULL_COLOUR = 90 /* quality from which on colours have the full resolution */ };

struct writer {
  struct jpeg_compress_struct c;
  struct jpeg_error_mgr manager;
  struct jpeg_destination_mgr to;
  jmp_buf failed;
  struct err *e;
  struct buf *out;
  struct buf exif, xmp; /* markers; empty: none */
  uint8_t chunk[CHUNK]; /* on its way to out */
};

static _Noreturn void on_error(j_common_ptr c)
{
  struct writer *w = c->client_data;
  char text[JMSG_LENGTH_MAX];

  c->err->format_message(c, text);
  err_set(w->e, E_INTERNAL, "the JPEG file cannot be written: %s", text);
  longjmp(w->failed, 1);
}

static void print_nothing(j_common_ptr c)
{
  (void)c;
}

static void start_chunk(j_compress_ptr c)
{
  struct writer *w = c->client_data;

  w->to.next_output_byte = w->chunk;
  w->to.free_in_buffer = CHUNK;
}

static void add_chunk(struct writer *w, size_t n)
{
  if (buf_add(w->out, w->chunk, n, w->e))
    longjmp(w->failed, 1);
}

static boolean on_full(j_compress_ptr c)
{
  add_chunk(c->client_data, CHUNK); /* all of it: libjpeg has not counted down what is left */
  start_chunk(c);
  return TRUE;
}

static void on_end(j_compress_ptr c)
{
  struct writer *w = c->client_data;

  add_chunk(w, CHUNK - w->to.free_in_buffer);
}

/* The APP1 markers, before libjpeg begins: a head that says what it is and ends in a NUL or two, and the data. */
static int make_markers(struct writer *w, const struct image_text *t)
{
  static const char exif[] = "Exif\0", xmp[] = "http://ns.adobe.com/xap/1.0/";

  if (t && t->parameters && (buf_add(&w->exif, exif, sizeof exif, w->e) || exif_write_comment(&w->exif, t->parameters, EXIF_JPEG_MAX, w->e)))
    return w->e->code;
  if (t && t->xmp && (buf_add(&w->xmp, xmp, sizeof xmp, w->e) || buf_add_str(&w->xmp, t->xmp, w->e)))
    return w->e->code;
  return 0;
}

static void set_quality(struct jpeg_compress_struct *c, int quality)
{
  jpeg_set_quality(c, quality, TRUE);
  c->optimize_coding = TRUE;
  if (quality >= FULL_COLOUR)
    c->comp_info[0].h_samp_factor = c->comp_info[0].v_samp_factor = 1;
}

/* What may jump out of here. */
static int encode(struct writer *w, const uint8_t *rgb, int width, int height, int quality)
{
  struct jpeg_compress_struct *c = &w->c;

  jpeg_create_compress(c);
  c->dest = &w->to;
  c->image_width = (JDIMENSION)width;
  c->image_height = (JDIMENSION)height;
  c->input_components = 3;
  c->in_color_space = JCS_RGB;
  jpeg_set_defaults(c);
  set_quality(c, quality);
  jpeg_start_compress(c, TRUE);
  if (w->exif.len)
    jpeg_write_marker(c, JPEG_APP0 + 1, (const JOCTET *)w->exif.p, (unsigned)w->exif.len);
  if (w->xmp.len)
    jpeg_write_marker(c, JPEG_APP0 + 1, (const JOCTET *)w->xmp.p, (unsigned)w->xmp.len);
  while (c->next_scanline < c->image_height) {
    JSAMPROW row = (JSAMPROW)(rgb + (size_t)c->next_scanline * (size_t)width * 3); /* libjpeg does not write to it */
    (void)jpeg_write_scanlines(c, &row, 1);
  }
  jpeg_finish_compress(c);
  return 0;
}

int image_encode_jpeg(struct buf *out, const uint8_t *rgb, int w, int h, int quality, const struct image_text *text, struct err *e)
{
  struct err own = {0};
  struct writer *wr;
  int r;

  if (w < 1 || h < 1 || w > IMAGE_MAX_SIDE || h > IMAGE_MAX_SIDE)
    return err_set(e, E_INTERNAL, "a picture of %dx%d cannot be encoded", w, h);
  wr = calloc(1, sizeof *wr); /* not a local: what a jump leaves in those is anybody's guess */
  if (!wr)
    return err_set(e, E_NOMEM, "out of memory for a JPEG file");
  wr->e = e ? e : &own;
  wr->out = out;
  buf_init(&wr->exif, 0xffff - 2);
  buf_init(&wr->xmp, 0xffff - 2);
  wr->c.err = jpeg_std_error(&wr->manager);
  wr->c.client_data = wr;
  wr->manager.error_exit = on_error;
  wr->manager.output_message = print_nothing;
  wr->to.init_destination = start_chunk;
  wr->to.empty_output_buffer = on_full;
  wr->to.term_destination = on_end;
  r = make_markers(wr, text);
  if (!r) {
    r = setjmp(wr->failed) ? wr->e->code : encode(wr, rgb, w, h, quality ? quality : IMAGE_QUALITY);
    jpeg_destroy_compress(&wr->c);
  }
  buf_close(&wr->exif);
  buf_close(&wr->xmp);
  free(wr);
  return r;
}
