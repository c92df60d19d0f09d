/*
 * device_id.h - which kind of GPU a saved plan is for, and the same from a GPU's description in a text (deploy/devices).
 *
 * A server that finds plans which were made without its GPU has looked for exactly these fields: the name that the driver gives, the compute capability,
 * the count of processors, the version of CUDA that the driver is for. In a description they are "deviceName", "deviceVer" (900 for 9.0),
 * "multiProcessorCount" and "driverVer" (13000 for 13.0). cuDNN 9.19 compares some more when it loads a plan (registers and shared memory of a processor),
 * and takes none that was made for another driver.
 *
 * Callers: vendor_dnn.c, vendor_compile.c. Threads: any; no state.
 */
#ifndef SAFELIGHT_KERNELS_CUDA_DEVICE_ID_H
#define SAFELIGHT_KERNELS_CUDA_DEVICE_ID_H

#include <stdint.h>

#include "base/err.h"

/* Compared byte by byte. */
struct device_id {
  char name[64];
  int32_t major, minor, processors, driver;
};

/* driver: as cudaDriverGetVersion says it. */
void device_id_set(struct device_id *id, const char *name, int major, int minor, int processors, int driver);
/* From a description: JSON whose form cuDNN checks. E_ARG names what is missing. */
MUST_CHECK int device_id_read(struct device_id *id, const char *description, struct err *e);
/* *out: a copy of the description, the caller's, for a machine with another driver; 0: as it is. E_ARG when it names none. */
MUST_CHECK int device_id_with_driver(char **out, const char *description, int driver, struct err *e);

#endif
