/*
 * find.c - the backend that goes by a name. In a file of its own, because it pulls in every backend with its libraries: a
 * program that uses be_ref alone links without oneDNN.
 *
 * The CUDA backend is safelight-cuda.so in the folder of the program, loaded when the machine has an NVIDIA device and never unloaded: one
 * program runs on every machine, and one without a GPU neither needs nor loads any of CUDA's libraries. Its compiler (compile.h) is loaded from there
 * on any machine, behind safelight-no-driver.so.
 *
 * Called by server/ and tests. Threads: any; no state.
 */
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "base/own_folder.h"
#include "kernels/backend.h"
#include "kernels/compile.h"

/* What lies beside the program: FOLDER/NAME. */
MUST_CHECK static int beside(char *path, size_t size, const char *folder, const char *name, struct err *e)
{
  int n = snprintf(path, size, "%s/%s", folder, name);

  return n > 0 && (size_t)n < size ? 0 : err_set(e, E_DEVICE, "the path of %s is longer than %zu bytes", name, size);
}

/* A function of folder/safelight-cuda.so. who: how the sentences begin. */
MUST_CHECK static int load(void **function, const char *folder, const char *name, const char *who, struct err *e)
{
  char path[4200];
  void *so;
  int r = beside(path, sizeof path, folder, "safelight-cuda.so", e);

  *function = NULL;
  if (r)
    return r;
  if (access(path, F_OK))
    return err_set(e, E_DEVICE, "%s %.300s is missing: `make cuda` builds it", who, path);
  so = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!so)
    return err_set(e, E_DEVICE, "%s a library is missing: %.300s", who, dlerror());
  *function = dlsym(so, name);
  return *function ? 0 : err_set(e, E_DEVICE, "safelight-cuda.so is damaged: %.300s", dlerror());
}

int be_find_cuda_in(const char *folder, const struct be_ops **ops, struct err *e)
{
  int (*find)(size_t table_bytes, const struct be_ops **ops, struct err *e);
  void *function;
  int r = load(&function, folder, "be_cuda_find", "there is a GPU but", e);

  *ops = NULL;
  if (r)
    return r;
  *(void **)&find = function;
  return find(sizeof **ops, ops, e);
}

int be_find_cuda(const struct be_ops **ops, struct err *e)
{
  char folder[4096];
  int r;

  *ops = NULL;
  if (access("/dev/nvidiactl", F_OK) && access("/dev/dxg", F_OK))
    return err_set(e, E_DEVICE, "this machine has no NVIDIA GPU, or its driver is not loaded");
  r = own_folder(folder, sizeof folder, e);
  return r ? r : be_find_cuda_in(folder, ops, e);
}

/* The stand-in has the driver's SONAME: whoever looks for libcuda.so.1 in this process finds it, here or on a machine with a driver. */
int compiler_find(const struct compiler_ops **ops, struct err *e)
{
  int (*find)(size_t table_bytes, const struct compiler_ops **ops, struct err *e);
  char folder[4096], path[4200];
  void *function;
  int r;

  *ops = NULL;
  if ((r = own_folder(folder, sizeof folder, e)) || (r = beside(path, sizeof path, folder, "safelight-no-driver.so", e)))
    return r;
  if (access(path, F_OK))
    return err_set(e, E_DEVICE, "there is no %.300s: `make cuda` builds it", path);
  if (!dlopen(path, RTLD_NOW | RTLD_GLOBAL))
    return err_set(e, E_DEVICE, "what stands in for the driver is damaged: %.300s", dlerror());
  r = load(&function, folder, "be_cuda_compiler", "nothing can be compiled:", e);
  if (r)
    return r;
  *(void **)&find = function;
  return find(sizeof **ops, ops, e);
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
