/*
 * encode.h - the encoder thread: pixels to files, and files to the answer as the job's surface writes it, off the device thread; previews;
 * and the audit record without which no picture leaves.
 *
 * Called by serve.c. Threads: it owns a job that is drawn until job_finish, and the preview of one that runs until job_add_preview.
 */
#ifndef SAFELIGHT_SERVER_ENCODE_H
#define SAFELIGHT_SERVER_ENCODE_H

#include <pthread.h>

#include "proto/image.h"
#include "server/job.h"
#include "server/worker.h"

struct encoder {
  struct jobs *jobs;
  const struct worker *worker;   /* for the model's name */
  struct audit *audit;
  struct store *store;
  struct image_encoder *image;
  enum image_detail detail;      /* of the files */
  pthread_t thread;
  int is_running;
};

MUST_CHECK int encoder_start(struct encoder *n, struct jobs *js, const struct worker *w, struct audit *audit, struct store *store,
                             struct err *e);
void encoder_join(struct encoder *n); /* after jobs_end and worker_join; takes one that never started */

/* The recipe of picture i of a job that is drawn; strings are borrowed from the job and the model. */
struct recipe encoder_recipe(const struct job *j, int i, const struct serving *s);

#endif
