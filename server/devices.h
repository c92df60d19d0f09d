/*
 * devices.h - the list of devices that a server draws on, as the option `devices` names them.
 *
 * For CUDA a number is that of a GPU as the driver counts them. On a processor a device is an engine of its own: weights, memory and threads,
 * nothing shared; the number is only its name.
 *
 * Called by config.c (checks), serve.c, device.c (its share of threads). Threads: any; no state.
 */
#ifndef SAFELIGHT_SERVER_DEVICES_H
#define SAFELIGHT_SERVER_DEVICES_H

#include "base/err.h"

enum { DEVICES_MAX = 16, DEVICES_NUMBER_MAX = 255 };

struct device_list {
  int number[DEVICES_MAX];
  int n;                    /* at least 1 */
};

/* "0", "0,1", "2, 0": whole numbers from 0 to DEVICES_NUMBER_MAX, commas between them, each once, in the order in which they are used. E_ARG with the
 * field "devices" says what is wrong; l is undefined then. */
MUST_CHECK int devices_read(struct device_list *l, const char *text, struct err *e);
/* Of so many threads the share of the i-th of n devices: together all of them, and one at least for each. */
int devices_threads(int threads, int n, int i);

#endif
