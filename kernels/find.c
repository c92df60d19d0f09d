/*
 * find.c - the backend that goes by a name. In a file of its own, because it pulls in every backend with its libraries: a
 * program that uses be_ref alone links without oneDNN.
 *
 * The CUDA backend is safelight-cuda.so in the folder of the program, loaded when the machine has an NVIDIA device and never unloaded: one
 * program runs on every machine, and one without a GPU neither needs nor loads any of CUDA's libraries.
 *
 * Called by server/ and tests. Threads: any; no state.
 */
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "kernels/backend.h"

int be_find_cuda(const struct be_ops **ops, struct err *e)
{
  int (*find)(size_t table_bytes, const struct be_ops **ops, struct err *e);
  char path[4096];
  ssize_t n = readlink("/proc/self/exe", path, sizeof path - 32);
  char *slash;
  void *so;

  *ops = NULL;
  if (access("/dev/nvidiactl", F_OK) && access("/dev/dxg", F_OK))
    return err_set(e, E_DEVICE, "this machine has no NVIDIA GPU, or its driver is not loaded");
  if (n <= 0)
    return err_set(e, E_DEVICE, "the program's own folder is not known, so that safelight-cuda.so is not found");
  path[n] = '\0';
  slash = strrchr(path, '/');
  snprintf(slash ? slash + 1 : path, 32, "safelight-cuda.so");
  if (access(path, F_OK))
    return err_set(e, E_DEVICE, "there is a GPU but no %.300s: `make cuda` builds it", path);
  so = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!so)
    return err_set(e, E_DEVICE, "there is a GPU but a library is missing: %.300s", dlerror());
  *(void **)&find = dlsym(so, "be_cuda_find");
  return find ? find(sizeof **ops, ops, e) : err_set(e, E_DEVICE, "safelight-cuda.so is damaged: %.300s", dlerror());
}

int be_find(const char *name, const struct be_ops **ops, struct err *e)
{
  *ops = NULL;
  if (!strcmp(name, "cuda"))
    return be_find_cuda(ops, e);
  if (!strcmp(name, "auto") && !be_find_cuda(ops, NULL))
    return 0;
  if (!strcmp(name, "auto") || !strcmp(name, "cpu"))
    *ops = &be_cpu;
  else if (!strcmp(name, "ref"))
    *ops = &be_ref;
  return *ops ? 0 : err_field(e, E_ARG, "backend", "unknown backend \"%.40s\": choose auto, cpu, cuda or ref", name);
}
