/*
 * vendor_nvrtc.c - see vendor_nvrtc.h.
 */
#include "kernels/cuda/vendor_nvrtc.h"

#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>

#if CUDART_VERSION >= 13000
#define NVRTC "libnvrtc.so.13"
#else
#define NVRTC "libnvrtc.so.12"
#endif

static const char *missing = "";

/* The part that NVRTC looks for by name and version, from the folder of NVRTC itself. */
static void load_builtins(void *nvrtc)
{
  int (*version)(int *major, int *minor);
  const char *slash;
  char path[4096];
  Dl_info info;
  int major = 0, minor = 0;

  *(void **)&version = dlsym(nvrtc, "nvrtcVersion");
  if (!version || version(&major, &minor) || !dladdr(*(void **)&version, &info) || !(slash = strrchr(info.dli_fname, '/')))
    return;
  snprintf(path, sizeof path, "%.*s/libnvrtc-builtins.so.%d.%d", (int)(slash - info.dli_fname), info.dli_fname, major, minor);
  (void)!dlopen(path, RTLD_NOW | RTLD_LOCAL); /* else NVRTC looks for it by itself */
}

static void find_once(void)
{
  void *nvrtc = dlopen(NVRTC, RTLD_NOW | RTLD_LOCAL);

  if (nvrtc)
    load_builtins(nvrtc);
  else
    missing = "; " NVRTC ", which it compiles with, is not found";
}

const char *nvrtc_find(void)
{
  static pthread_once_t once = PTHREAD_ONCE_INIT;

  pthread_once(&once, find_once);
  return missing;
}
