/*
 * stage.h - the stage thread of a device: everything of a picture that is not a UNet step, so that it does not hold up the steps of others.
 *
 * Text encoding, the VAE and previews run on a lane of their own beside the device thread's. A picture is here or there, never in both: it comes with
 * pic_send and goes back with pic_return. A preview reads the draw's snapshot only, while the picture goes on; draws are closed here, so
 * that none is closed under its preview.
 *
 * Called by device.c. Threads: its own.
 */
#ifndef SAFELIGHT_SERVER_STAGE_H
#define SAFELIGHT_SERVER_STAGE_H

#include <pthread.h>

#include "models/lane.h"
#include "server/job.h"

struct stage {
  struct jobs *jobs;
  int device;           /* whose */
  struct lane *lane;
  pthread_t thread;
  int is_running;
};

/* Device thread, when the model is loaded: opens the lane, which is the caller's until stage_start. device: its desk (job.h). stage_close after, also after
 * failure. */
MUST_CHECK int stage_open(struct stage *s, struct jobs *js, int device, struct model *m, struct err *e);
MUST_CHECK int stage_start(struct stage *s, struct err *e);
void stage_close(struct stage *s); /* after jobs_end, when no picture is alive; takes a zeroed one */

#endif
