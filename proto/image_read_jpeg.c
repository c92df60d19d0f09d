/*
 * image_read_jpeg.c - JPEG files on libjpeg. See image_read.h.
 *
 * libjpeg reports failure by calling error_exit, which may not return: it jumps back into image_read_jpeg, which holds everything that has to be freed in
 * memory that the jump leaves alone. A warning that pixels were made up (the file is cut off or its codes make no sense) is a failure; one that is about
 * anything else is not. A progressive file may say the whole picture over and over again; its scans are counted.
 *
 * Called by image_read.c. Threads: pure functions.
 */
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <jpeglib.h>

#include <jerror.h>

#include "proto/image_codec.h"

enum { SCANS_MAX = 64 }; /* encoders write about ten */

struct reader {
  struct jpeg_decompress_struct c;
  struct jpeg_error_mgr manager;
  struct jpeg_progress_mgr progress;
  jmp_buf failed;
  struct err *e;
  uint8_t *row;       /* of a picture in four inks */
};

static _Noreturn void on_error(j_common_ptr c)
{
  struct reader *rd = c->client_data;
  char text[JMSG_LENGTH_MAX];

  c->err->format_message(c, text);
  if (c->err->msg_code == JERR_OUT_OF_MEMORY)
    err_set(rd->e, E_NOMEM, "out of memory for a JPEG file");
  else
    err_set(rd->e, E_ARG, "the JPEG file is damaged or of a kind that is not read: %s", text);
  longjmp(rd->failed, 1);
}

static void on_message(j_common_ptr c, int level)
{
  struct reader *rd = c->client_data;

  if (level >= 0)
    return; /* a trace */
  switch (c->err->msg_code) {
  case JWRN_JPEG_EOF:
  case JWRN_HIT_MARKER:
    err_set(rd->e, E_ARG, "the JPEG file is cut off");
    longjmp(rd->failed, 1);
  case JWRN_HUFF_BAD_CODE:
  case JWRN_ARITH_BAD_CODE:
  case JWRN_MUST_RESYNC:
  case JWRN_BOGUS_PROGRESSION:
    on_error(c);
  default:
    break;
  }
}

static void on_progress(j_common_ptr c)
{
  struct reader *rd = c->client_data;

  if (rd->c.input_scan_number > SCANS_MAX) {
    err_set(rd->e, E_ARG, "the JPEG file has more than %d scans", SCANS_MAX);
    longjmp(rd->failed, 1);
  }
}

static void print_nothing(j_common_ptr c)
{
  (void)c;
}

static int read_orientation(const struct jpeg_decompress_struct *c)
{
  static const char head[6] = "Exif\0\0";

  for (jpeg_saved_marker_ptr m = c->marker_list; m; m = m->next)
    if (m->marker == JPEG_APP0 + 1 && m->data_length > sizeof head && !memcmp(m->data, head, sizeof head))
      return exif_orientation(m->data + sizeof head, m->data_length - sizeof head);
  return 1;
}

/* A row of cyan, magenta, yellow and black to RGB; Adobe's files hold them inverted, and practically all files are Adobe's. */
static void inks_to_rgb(uint8_t *rgb, const uint8_t *inks, int w, int is_inverted)
{
  for (int x = 0; x < w; x++)
    for (int k = 0; k < 3; k++) {
      int ink = inks[4 * x + k], black = inks[4 * x + 3];
      if (!is_inverted) {
        ink = 255 - ink;
        black = 255 - black;
      }
      rgb[3 * x + k] = (uint8_t)((ink * black + 127) / 255);
    }
}

/* What may jump out of here. */
static int decode(struct reader *rd, struct image *im, const uint8_t *file, size_t len, const struct image_limits *lim, int *orientation)
{
  struct jpeg_decompress_struct *c = &rd->c;
  int is_inks;

  jpeg_create_decompress(c);
  c->progress = &rd->progress;
  jpeg_mem_src(c, file, len);
  jpeg_save_markers(c, JPEG_APP0 + 1, 0xffff);
  (void)jpeg_read_header(c, TRUE);
  *orientation = read_orientation(c);
  if (image_alloc(im, c->image_width, c->image_height, 3, lim, rd->e))
    return rd->e->code;
  is_inks = c->num_components == 4;
  c->out_color_space = is_inks ? JCS_CMYK : JCS_RGB;
  if (is_inks && !(rd->row = malloc((size_t)im->w * 4)))
    return err_set(rd->e, E_NOMEM, "out of memory for a JPEG file");
  (void)jpeg_start_decompress(c);
  while (c->output_scanline < c->output_height) {
    uint8_t *to = im->px + (size_t)c->output_scanline * (size_t)im->w * 3;
    JSAMPROW row = is_inks ? rd->row : to;
    (void)jpeg_read_scanlines(c, &row, 1);
    if (is_inks)
      inks_to_rgb(to, rd->row, im->w, c->saw_Adobe_marker);
  }
  (void)jpeg_finish_decompress(c);
  return 0;
}

int image_read_jpeg(struct image *im, const uint8_t *file, size_t len, const struct image_limits *lim, int *orientation, struct err *e)
{
  struct err own = {0};
  struct reader *rd = calloc(1, sizeof *rd); /* not a local: what a jump leaves in those is anybody's guess */
  int r;

  if (!rd)
    return err_set(e, E_NOMEM, "out of memory for a JPEG file");
  rd->e = e ? e : &own;
  rd->c.err = jpeg_std_error(&rd->manager);
  rd->c.client_data = rd;
  rd->manager.error_exit = on_error;
  rd->manager.emit_message = on_message;
  rd->manager.output_message = print_nothing;
  rd->progress.progress_monitor = on_progress;
  r = setjmp(rd->failed) ? rd->e->code : decode(rd, im, file, len, lim, orientation);
  jpeg_destroy_decompress(&rd->c);
  free(rd->row);
  free(rd);
  return r;
}
