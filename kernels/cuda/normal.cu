/*
 * normal.cu - torch's normal numbers on the device, the same bits as in host memory: kernels/normal.h is the arithmetic of both. See kernels.h.
 *
 * A generator's words come one out of the other, 624 at a time and 227 of them side by side: a block for each picture makes the words of a draw and
 * leaves them to a second kernel, which transforms them all at once.
 * Roofline: neither bytes nor arithmetic but latency: three barriers for 624 words, 27 times for a latent of 64x64x4 and 105 for 128x128x4.
 * Share reached: not yet measured.
 */
#include "kernels/cuda/device.cuh"

#include "kernels/normal.h"

enum { THREADS = 256 };
static constexpr int STRETCH = NORMAL_N - NORMAL_M; /* words that need none of the same generation */

/* words (B, count): the next ones of each generator, which moves on. */
static __global__ void __launch_bounds__(THREADS) words_kernel(uint32_t *words, normal_state *states, int64_t n, int64_t room)
{
  __shared__ uint32_t generation[2][NORMAL_N];
  normal_state *s = &states[blockIdx.x];
  int t = (int)threadIdx.x, which = 0, from = (int)s->next;
  int64_t count = (int64_t)normal_words((size_t)n, s->has_kept != 0);
  uint32_t *out = words + (int64_t)blockIdx.x * room;

  for (int i = t; i < NORMAL_N; i += THREADS)
    generation[0][i] = s->word[i];
  __syncthreads();
  for (int64_t done = 0; done < count;) {
    uint32_t *now = generation[which];

    if (from == NORMAL_N) {
      uint32_t *then = now;

      which ^= 1;
      now = generation[which];
      for (int first = 0; first < NORMAL_N; first += STRETCH) {
        int i = first + t, end = first + STRETCH < NORMAL_N ? first + STRETCH : NORMAL_N;

        if (i < end) {
          uint32_t above = i + 1 < NORMAL_N ? then[i + 1] : now[0], far = i < STRETCH ? then[i + NORMAL_M] : now[i - STRETCH];

          now[i] = normal_twist(then[i], above, far);
        }
        __syncthreads();
      }
      from = 0;
    }
    int64_t take = count - done < NORMAL_N - from ? count - done : NORMAL_N - from;

    for (int64_t i = t; i < take; i += THREADS)
      out[done + i] = normal_temper(now[from + i]);
    done += take;
    from += (int)take;
  }
  for (int i = t; i < NORMAL_N; i += THREADS)
    s->word[i] = generation[which][i];
  if (t == 0)
    s->next = (uint32_t)from;
}

/* Number i in torch's order (C, pixels), to its place in ours. */
static __device__ __forceinline__ void put(float *y, int64_t i, int64_t pixels, int64_t C, float v)
{
  y[i % pixels * C + i / pixels] = v;
}

/* A pair to a thread: those of whole blocks of 16, then the eight of the tail, which lies over numbers that were not kept. */
static __global__ void __launch_bounds__(THREADS) many_kernel(float *y, const uint32_t *words, int64_t pixels, int64_t C, int64_t room, float scale)
{
  int64_t n = pixels * C, pairs = n / NORMAL_BLOCK * 8, tail = n % NORMAL_BLOCK ? 8 : 0, kept = tail ? n - NORMAL_BLOCK : n;
  int64_t p = (int64_t)blockIdx.x * THREADS + threadIdx.x;
  const uint32_t *word = words + (int64_t)blockIdx.y * room;
  float a, b;

  y += (int64_t)blockIdx.y * n;
  if (p >= pairs + tail)
    return;
  int64_t at = p < pairs ? p / 8 * NORMAL_BLOCK + p % 8 : n - NORMAL_BLOCK + p - pairs;
  int64_t from = p < pairs ? at : n + p - pairs;

  normal_pair_f32(word[from], word[from + 8], &a, &b);
  if (p >= pairs || at < kept)
    put(y, at, pixels, C, scale * a);
  if (p >= pairs || at + 8 < kept)
    put(y, at + 8, pixels, C, scale * b);
}

/* Fewer than 16, one after the other. */
static __global__ void __launch_bounds__(WARP)
    few_kernel(float *y, const uint32_t *words, normal_state *states, int64_t pixels, int64_t C, int64_t room, float scale)
{
  normal_state *s = &states[blockIdx.x];
  float v[NORMAL_BLOCK];

  if (threadIdx.x > 0)
    return;
  normal_few(&s->has_kept, &s->kept, words + (int64_t)blockIdx.x * room, v, (size_t)(pixels * C));
  for (int64_t i = 0; i < pixels * C; i++)
    put(y + (int64_t)blockIdx.x * pixels * C, i, pixels, C, scale * v[i]);
}

static int64_t room_for(int64_t n)
{
  return n < NORMAL_BLOCK ? 2 * NORMAL_BLOCK : n + NORMAL_BLOCK;
}

size_t kern_randn_bytes(int64_t B, int64_t n)
{
  return (size_t)(B * room_for(n)) * sizeof(uint32_t);
}

int kern_randn(cudaStream_t s, float *y, void *states, int64_t B, int64_t pixels, int64_t C, float scale, void *work)
{
  int64_t n = pixels * C, room = room_for(n), pairs = n / NORMAL_BLOCK * 8 + 8;
  uint32_t *words = static_cast<uint32_t *>(work);
  normal_state *state = static_cast<normal_state *>(states);
  int r = launch(words_kernel, dim3((unsigned)B), THREADS, s, words, state, n, room);

  if (r)
    return r;
  if (n < NORMAL_BLOCK)
    return launch(few_kernel, dim3((unsigned)B), WARP, s, y, (const uint32_t *)words, state, pixels, C, room, scale);
  return launch(many_kernel, dim3((unsigned)div_up(pairs, THREADS), (unsigned)B), THREADS, s, y, (const uint32_t *)words, pixels, C, room, scale);
}
