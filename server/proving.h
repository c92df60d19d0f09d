/*
 * proving.h - the devices that adapters are proven and generations built on, and how the same work is done on each of them.
 *
 * On GPUs the work is done side by side, a thread for each, since most of it is the device's own (what that saves is not yet measured). On a processor the
 * devices share what the pictures are drawn with: there it is done one after the other, so that the loader takes one thread's worth at most.
 *
 * Called by safety_*.c on the loader thread and by generate.c. Threads: the caller's, who owns the lanes, and those of proving_run, which end before it
 * returns; they have the caller's scheduling.
 */
#ifndef SAFELIGHT_SERVER_PROVING_H
#define SAFELIGHT_SERVER_PROVING_H

#include "models/pipeline.h"
#include "server/devices.h"

struct proving {
  struct model *model;
  struct be *lane;              /* what generations are built and probed through */
  int number;                   /* of the device, for people */
};

/* work(arg, i, e) for each i of the n devices (1 to DEVICES_MAX), returning 0 or e->code; of arg it changes nothing but what is device i's. All are begun where
 * they are done side by side, else those up to the first failure. Returns when all have ended: 0, or the failure of the first device in their order, whose
 * number the sentence names where there are several. E_NOMEM when a thread cannot be started. */
MUST_CHECK int proving_run(const struct proving *on, int n, int (*work)(void *arg, int i, struct err *e), void *arg, struct err *e);

#endif
