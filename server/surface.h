/*
 * surface.h - what a wire format contributes to the serving of pictures: how answers and errors are written.
 *
 * Each family of routes (OpenAI's images, A1111's sdapi, native jobs) has one struct surface. Requests of all of them become the same jobs in the
 * same queue.
 *
 * Called by images.c, stream.c, encode.c. Threads: pure functions over a job that the caller owns.
 */
#ifndef SAFELIGHT_SERVER_SURFACE_H
#define SAFELIGHT_SERVER_SURFACE_H

#include "server/job.h"
#include "server/worker.h"

struct surface {
  const char *name;   /* for metrics */
  int gives_urls;     /* with REPLY_URL the encoder puts the files into the store before encode: job.file_name, not job.file */
  /* Encoder thread: j->file holds the pictures' files; appends the JSON answer (of a stream, its last events) to j->body. NULL: the owner takes the files. */
  int (*encode)(struct job *j, const struct serving *s, struct err *e);
  /* HTTP thread: the answer to a request whose own client stopped its job before a picture was begun, into j->body; j->file holds nothing. NULL: such an answer
   * is an error. */
  int (*encode_stopped)(struct job *j, const struct serving *s, struct err *e);
  /* Appends the body of an error answer. */
  int (*encode_error)(struct buf *out, const struct err *what, struct err *e);
  /* HTTP thread: append a whole event of a stream: a preview of the running job, an error. NULL: this surface has no streams. */
  int (*encode_preview)(struct buf *out, const struct job *j, const struct blob *preview, struct err *e);
  int (*encode_error_event)(struct buf *out, const struct err *what, struct err *e);
};

extern const struct surface surface_openai, surface_sdapi;

#endif
