/*
 * normal.c - normal.h's generator in host memory. Called by be_ref, be_cpu and models/rng.c. Threads: a generator belongs to one.
 */
#include "kernels/normal.h"

static void refill(struct normal_state *s)
{
  for (int i = 0; i < NORMAL_N; i++)
    s->word[i] = normal_twist(s->word[i], s->word[(i + 1) % NORMAL_N], s->word[(i + NORMAL_M) % NORMAL_N]);
  s->next = 0;
}

uint32_t normal_next(struct normal_state *s)
{
  if (s->next == NORMAL_N)
    refill(s);
  return normal_temper(s->word[s->next++]);
}

/* The words of a block lie where its normals go. */
static void block(float *v)
{
  uint32_t word[NORMAL_BLOCK];

  memcpy(word, v, sizeof word);
  for (int j = 0; j < NORMAL_BLOCK / 2; j++)
    normal_pair_f32(word[j], word[j + 8], &v[j], &v[j + 8]);
}

static void draw_words(struct normal_state *s, float *to, size_t n)
{
  for (size_t i = 0; i < n; i++) {
    uint32_t word = normal_next(s);

    memcpy(&to[i], &word, 4);
  }
}

void normal_fill(struct normal_state *s, float *out, size_t n)
{
  uint32_t word[2 * NORMAL_BLOCK];

  if (n < NORMAL_BLOCK) {
    for (size_t i = 0, count = normal_words(n, s->has_kept != 0); i < count; i++)
      word[i] = normal_next(s);
    normal_few(&s->has_kept, &s->kept, word, out, n);
    return;
  }
  draw_words(s, out, n); /* all of them before the first is used */
  for (size_t i = 0; i + NORMAL_BLOCK <= n; i += NORMAL_BLOCK)
    block(out + i);
  if (n % NORMAL_BLOCK) { /* the last 16 anew, over what was there */
    draw_words(s, out + n - NORMAL_BLOCK, NORMAL_BLOCK);
    block(out + n - NORMAL_BLOCK);
  }
}

void normal_fill_pixels(struct normal_state *s, float *y, size_t pixels, size_t C, float scale, float *work)
{
  normal_fill(s, work, pixels * C);
  for (size_t c = 0; c < C; c++)
    for (size_t i = 0; i < pixels; i++)
      y[i * C + c] = scale * work[c * pixels + i];
}
