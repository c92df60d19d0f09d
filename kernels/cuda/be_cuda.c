/*
 * be_cuda.c - the CUDA backend: cuBLASLt for linears, cuDNN for convolutions and attention, kernels of our own for the rest.
 *
 * This file holds the table, open and close, lanes, memory and transfers; cuda.h says where everything else is. Activations are bf16, or fp16
 * when the configuration asks for it; every sum is fp32 or wider. The daemon loads all of this as a shared object and looks up be_cuda_find alone (find.c).
 *
 * Errors: memory that is short is E_NOMEM and leaves the backend usable; any other error of the device is E_DEVICE, which sticks.
 * Called through struct be_ops. Threads: see cuda.h.
 */
#include "kernels/cuda/cuda.h"

#include <stdio.h>
#include <stdlib.h>

#include "kernels/convert.h"

extern const struct be_ops be_cuda;
__attribute__((visibility("default"))) int be_cuda_find(size_t table_bytes, const struct be_ops **ops, struct err *e);

_Static_assert((int)DT_F32 == KERN_F32 && (int)DT_F16 == KERN_F16 && (int)DT_BF16 == KERN_BF16 && (int)DT_I32 == KERN_I32 &&
                   (int)DT_U8 == KERN_U8,
               "kernels.h numbers the element types as tensor.h does");

void cuda_use(int device)
{
  static _Thread_local int current = -1;

  if (current != device && !cudaSetDevice(device))
    current = device;
}

int cuda_check(int code, const char *what, struct err *e)
{
  if (!code)
    return 0;
  (void)cudaGetLastError(); /* an allocation that failed is forgotten; what sticks comes back by itself */
  return err_set(e, code == cudaErrorMemoryAllocation ? E_NOMEM : E_DEVICE, "%s: %s", what, cudaGetErrorString(code));
}

static int grow(struct cuda *c, void **p, size_t *have, size_t bytes, struct err *e)
{
  int r;

  if (*p && bytes <= *have)
    return 0;
  memory_give_own(c->memory, c, *p);
  *p = NULL;
  *have = 0;
  r = memory_take(c->memory, c, bytes, p, e);
  if (!r)
    *have = bytes;
  return r;
}

int cuda_scratch(struct cuda *c, size_t bytes, void **p, struct err *e)
{
  int r = grow(c, &c->scratch, &c->scratch_bytes, bytes, e);

  *p = c->scratch;
  return r;
}

int cuda_staging(struct cuda *c, size_t bytes, void **p, struct err *e)
{
  int r = grow(c, &c->staging, &c->staging_bytes, bytes, e);

  *p = c->staging;
  return r;
}

/* ---- open and close ---- */

static void cuda_close(struct be *be)
{
  struct cuda *c = be->priv;

  if (!c)
    return;
  cuda_use(c->device);
  if (c->stream)
    (void)cudaStreamSynchronize(c->stream);
  pass_close(c);
  gpu_dnn_close(c->dnn);
  gpu_blas_close(c->blas);
  if (c->memory) {
    memory_give_own(c->memory, c, c->scratch);
    memory_give_own(c->memory, c, c->staging);
    memory_give_own(c->memory, c, c->count);
    memory_leave(c->memory, c);
  }
  (void)cudaFreeHost(c->count_host);
  if (c->stream) {
    (void)cudaStreamSynchronize(c->stream);
    (void)cudaStreamDestroy(c->stream);
  }
  if (c->owns_memory)
    memory_close(c->memory);
  free(c);
  be->priv = NULL;
  be->plans = NULL;
}

/* What a context has beside its own fields. */
MUST_CHECK static int context_fill(struct cuda *c, int no_capture, struct err *e)
{
  int r = cuda_check(cudaStreamCreateWithFlags(&c->stream, cudaStreamNonBlocking), "a stream", e);

  if (r)
    return r;
  memory_join(c->memory, c);
  if ((r = memory_take(c->memory, c, sizeof *c->count, (void **)&c->count, e)) ||
      (r = cuda_check(cudaMallocHost((void **)&c->count_host, sizeof *c->count_host), "pinned memory", e)) || (r = gpu_blas_open(&c->blas, e)) ||
      (r = gpu_dnn_open(&c->dnn, c->plan_cache, c->plans, e)))
    return r;
  return pass_open(c, no_capture, e);
}

/* Everything of a context on a device that is there. beside: the context that it is a lane of, whose counts of plans it shares; or NULL. */
static int context_new(struct be *be, int device, const struct cuda *beside, const char *plan_cache, int no_capture, struct err *e)
{
  struct cuda *c = calloc(1, sizeof *c);
  int r = 0;

  if (!c)
    return err_set(e, E_NOMEM, "out of memory for the backend");
  be->priv = c;
  *c = (struct cuda){.device = device, .plan_cache = plan_cache, .memory = beside ? beside->memory : NULL, .owns_memory = !beside};
  c->plans = beside ? beside->plans : &c->own_plans;
  be->plans = c->plans;
  cuda_use(device);
  if (!beside)
    r = memory_open(&c->memory, device, e);
  if (!r)
    r = context_fill(c, no_capture, e);
  if (r)
    cuda_close(be);
  return r;
}

static int cuda_open(struct be *be, const struct be_config *cfg, struct err *e)
{
  struct cudaDeviceProp prop;
  char blas[28], dnn[28];
  int count = 0, driver = 0, code = cudaGetDeviceCount(&count), r;

  if (code || count == 0)
    return err_set(e, E_DEVICE, "there is no GPU for the CUDA backend: %s", cudaGetErrorString(code ? code : cudaErrorNoDevice));
  if (cfg->device < 0 || cfg->device >= count)
    return err_field(e, E_ARG, "devices", "there is no GPU %d: the driver offers %d, numbered from 0", cfg->device, count);
  r = context_new(be, cfg->device, NULL, cfg->plan_cache, cfg->no_capture, e);
  if (r)
    return r;
  r = cuda_check(cudaGetDeviceProperties(&prop, cfg->device), "cudaGetDeviceProperties", e);
  if (!r && prop.major < 8)
    r = err_set(e, E_DEVICE, "the GPU %s is too old: compute capability %d.%d, and 8.0 or later is needed", prop.name, prop.major, prop.minor);
  if (r) {
    cuda_close(be);
    return r;
  }
  (void)cudaDriverGetVersion(&driver);
  gpu_blas_version(blas, sizeof blas);
  gpu_dnn_version(dnn, sizeof dnn);
  be->act = cfg->want_f16 ? DT_F16 : DT_BF16;
  be->threads = 1;
  snprintf(be->info, sizeof be->info, "%.36s, %s, %s, driver %u.%u, %s", prop.name, blas, dnn, (unsigned)driver / 1000 % 100,
           (unsigned)driver % 1000 / 10, cfg->want_f16 ? "fp16" : "bf16");
  return 0;
}

static int cuda_open_lane(struct be *lane, struct be *be, int threads, struct err *e)
{
  struct be made = *be;
  int r = context_new(&made, cuda_of(be)->device, cuda_of(be), cuda_of(be)->plan_cache, 1, e); /* a lane's passes are few */

  (void)threads;
  *lane = r ? (struct be){0} : made;
  return r;
}

/* ---- marks: what one stream waits for in another ---- */

struct mark {
  cudaEvent_t event;
};

static int cuda_mark_open(struct be *be, struct mark **m, struct err *e)
{
  int r;

  (void)cuda_of(be);
  *m = calloc(1, sizeof **m);
  if (!*m)
    return err_set(e, E_NOMEM, "out of memory for a mark");
  r = cuda_check(cudaEventCreateWithFlags(&(*m)->event, cudaEventDisableTiming), "an event", e);
  if (r) {
    free(*m);
    *m = NULL;
  }
  return r;
}

static void cuda_mark_close(struct be *be, struct mark *m)
{
  if (!m)
    return;
  (void)cuda_of(be);
  (void)cudaEventDestroy(m->event);
  free(m);
}

static int cuda_mark_set(struct be *be, struct mark *m, struct err *e)
{
  int r = pass_refuses(cuda_of(be), "a mark", e);

  return r ? r : cuda_check(cudaEventRecord(m->event, cuda_of(be)->stream), "a mark", e);
}

/* An event that was never recorded is no obstacle to CUDA either. */
static int cuda_mark_wait(struct be *be, struct mark *m, struct err *e)
{
  int r = pass_refuses(cuda_of(be), "a mark", e);

  return r ? r : cuda_check(cudaStreamWaitEvent(cuda_of(be)->stream, m->event, 0), "a mark", e);
}

/* The device has its own idea of threads. */
static void cuda_set_threads(struct be *be, int threads)
{
  (void)be, (void)threads;
}

/* ---- memory and transfers ---- */

static int cuda_mem_alloc(struct be *be, size_t bytes, void **p, struct err *e)
{
  struct cuda *c = cuda_of(be);

  return memory_take(c->memory, c, bytes, p, e);
}

static void cuda_mem_free(struct be *be, void *p)
{
  memory_give(cuda_of(be)->memory, p);
}

static int cuda_sync(struct be *be, struct err *e)
{
  int r = pass_refuses(cuda_of(be), "sync", e);

  return r ? r : cuda_check(cudaStreamSynchronize(cuda_of(be)->stream), "the GPU", e);
}

static void cuda_memory(struct be *be, struct be_memory *m)
{
  struct cuda *c = cuda_of(be);

  *m = (struct be_memory){.working = c->scratch_bytes + c->staging_bytes + sizeof *c->count + GPU_BLAS_WORKSPACE + GPU_DNN_WORKSPACE + pass_bytes(&c->pass)};
  (void)cudaStreamSynchronize(c->stream); /* an error sticks and comes back from the next call */
  memory_left(c->memory, &m->free, &m->total);
}

static int is_float(enum dtype t)
{
  return t == DT_F32 || t == DT_F16 || t == DT_BF16;
}

/* Integers and bytes are rare: they are converted on the host. */
static int upload_converted(struct be *be, struct tensor dst, const void *src, enum dtype src_type, struct err *e)
{
  void *host = malloc(tensor_bytes(dst));
  int r;

  if (!host)
    return err_set(e, E_NOMEM, "out of memory for %zu bytes", tensor_bytes(dst));
  convert_array(host, dst.type, src, src_type, tensor_count(dst));
  r = cuda_check(cudaMemcpyAsync(dst.p, host, tensor_bytes(dst), cudaMemcpyHostToDevice, cuda_of(be)->stream), "upload", e);
  if (!r)
    r = cuda_sync(be, e);
  free(host);
  return r;
}

static int cuda_upload(struct be *be, struct tensor dst, const void *src, enum dtype src_type, struct err *e)
{
  struct cuda *c = cuda_of(be);
  int64_t n = tensor_count(dst);
  size_t bytes = (size_t)n * dtype_size(src_type);
  int same = dst.type == src_type, r;
  void *to = dst.p;

  if ((r = pass_refuses(c, "upload", e)))
    return r;
  if (!same && (!is_float(dst.type) || !is_float(src_type)))
    return upload_converted(be, dst, src, src_type, e);
  if (!same && (r = cuda_staging(c, bytes, &to, e)))
    return r;
  r = cuda_check(cudaMemcpyAsync(to, src, bytes, cudaMemcpyHostToDevice, c->stream), "upload", e);
  if (!r && !same)
    r = cuda_check(kern_convert(c->stream, dst.p, dst.type, to, src_type, n), "convert", e);
  return r;
}

static int cuda_download(struct be *be, void *dst, enum dtype dst_type, struct tensor src, struct err *e)
{
  struct cuda *c = cuda_of(be);
  int64_t n = tensor_count(src);
  int on_device = dst_type != src.type && is_float(dst_type) && is_float(src.type);
  int on_host = dst_type != src.type && !on_device, r = pass_refuses(c, "download", e);
  size_t bytes = (size_t)n * dtype_size(on_host ? src.type : dst_type);
  void *from = src.p, *to = dst;

  if (r)
    return r;
  if (on_host && !(to = malloc(bytes)))
    return err_set(e, E_NOMEM, "out of memory for %zu bytes", bytes);
  if (on_device) {
    r = cuda_staging(c, bytes, &from, e);
    if (!r)
      r = cuda_check(kern_convert(c->stream, from, dst_type, src.p, src.type, n), "convert", e);
  }
  if (!r)
    r = cuda_check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, c->stream), "download", e);
  if (!r)
    r = cuda_sync(be, e);
  if (on_host) {
    if (!r)
      convert_array(dst, dst_type, to, src.type, n);
    free(to);
  }
  return r;
}

const struct be_ops be_cuda = {
    .name = "cuda",
    .rows_are_alone = 1,
    .open = cuda_open,
    .close = cuda_close,
    .mem_alloc = cuda_mem_alloc,
    .mem_free = cuda_mem_free,
    .upload = cuda_upload,
    .download = cuda_download,
    .sync = cuda_sync,
    .memory = cuda_memory,
    .open_lane = cuda_open_lane,
    .mark_open = cuda_mark_open,
    .mark_close = cuda_mark_close,
    .mark_set = cuda_mark_set,
    .mark_wait = cuda_mark_wait,
    .set_threads = cuda_set_threads,
    .pass_begin = cuda_pass_begin,
    .pass_end = cuda_pass_end,
    .rehearse = cuda_rehearse,
    .weight_load = cuda_weight_load,
    .weight_free = cuda_weight_free,
    .lowrank_load = cuda_lowrank_load,
    .lowrank_free = cuda_lowrank_free,
    .lowrank = cuda_lowrank,
    .conv2d = cuda_conv2d,
    .linear = cuda_linear,
    .groupnorm = cuda_groupnorm,
    .layernorm = cuda_layernorm,
    .attention = cuda_attention,
    .geglu = cuda_geglu,
    .act = cuda_act,
    .add = cuda_add,
    .concat = cuda_concat,
    .upsample2x = cuda_upsample2x,
    .timestep_embed = cuda_timestep_embed,
    .embed = cuda_embed,
    .gather_scale = cuda_gather_scale,
    .sampler_step = cuda_sampler_step,
    .blend = cuda_blend,
    .randn = cuda_randn,
    .to_rgb8 = cuda_to_rgb8,
    .count_nonfinite = cuda_count_nonfinite,
};

/* The table, when it is of the size that the caller knows and there is a GPU to use it on. */
int be_cuda_find(size_t table_bytes, const struct be_ops **ops, struct err *e)
{
  int count = 0, driver = 0, code;

  *ops = NULL;
  if (table_bytes != sizeof be_cuda)
    return err_set(e, E_DEVICE, "safelight-cuda.so belongs to another version of the program");
  code = cudaGetDeviceCount(&count);
  if (code == cudaErrorInsufficientDriver && !cudaDriverGetVersion(&driver) && !driver)
    return err_set(e, E_DEVICE, "there is a GPU but a library is missing: the driver's libcuda.so.1");
  if (code || count == 0)
    return err_set(e, E_DEVICE, "the CUDA driver offers no GPU: %s", cudaGetErrorString(code ? code : cudaErrorNoDevice));
  *ops = &be_cuda;
  return 0;
}
