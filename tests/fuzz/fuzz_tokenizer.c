/*
 * fuzz_tokenizer.c - libFuzzer target: the bytes of vocab.json and merges.txt, and a text, in one input.
 *
 * An input is "vocab NUL merges NUL text", what is missing counts as empty. Files that open are used on the text; the text also goes
 * through the prompt parser and through the tokenizer of a fixed small vocabulary, so that it is exercised when the files
 * are refused. Checked: every id is in range, a failure leaves nothing behind, the sum of spans is bounded by the text.
 *
 * links: base/err.c models/tokenizer.c models/unicode.c models/prompt.c base/json_load.c
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "models/prompt.h"

int LLVMFuzzerTestOneInput(const uint8_t *p, size_t n);

static const char vocab[] = "{\"<|startoftext|>\":0,\"<|endoftext|>\":1,\"a\":2,\"b\":3,\"a</w>\":4,\"b</w>\":5,\"ab\":6,"
                            "\"ab</w>\":7,\"abb</w>\":8,\",</w>\":9}";
static const char merges[] = "#version: 0.2\na b\na b</w>\nab b</w>\n";

static void check(int ok)
{
  if (!ok)
    abort();
}

static void encode(const struct tokenizer *t, const char *text, size_t n)
{
  struct prompt_tokens tokens;
  struct err e = {0};
  int32_t *ids;
  size_t count;
  int r = tokenizer_encode(t, text, n, &ids, &count, &e);

  check(r ? !ids && !count && e.code == r && *e.msg : !ids == !count);
  for (size_t i = 0; i < count; i++)
    check(ids[i] >= 0 && ids[i] < tokenizer_size(t));
  free(ids);

  e = (struct err){0};
  r = prompt_tokenize(&tokens, t, text, n, 0, &e);
  check(r ? !tokens.chunk && e.code == r && *e.msg : tokens.n >= 1 && tokens.n <= PROMPT_MAX_CHUNKS);
  for (int c = 0; c < tokens.n; c++)
    for (int i = 0; i < PROMPT_CHUNK; i++) {
      float w = tokens.chunk[c].weights[i];

      check(w >= -PROMPT_MAX_WEIGHT && w <= PROMPT_MAX_WEIGHT);
      check(tokens.chunk[c].ids[i] >= 0 && tokens.chunk[c].ids[i] < tokenizer_size(t));
    }
  prompt_tokens_close(&tokens);
}

static void parse(const char *text, size_t n)
{
  struct prompt_span *span;
  struct err e = {0};
  size_t count, total = 0;
  int r = prompt_parse(text, n, &span, &count, &e);

  check(r ? !span && e.code == r : count >= 1);
  for (size_t i = 0; i < count; i++)
    total += strlen(span[i].text);
  check(total <= n);
  prompt_spans_free(span, count);
}

/* Cuts the first NUL-terminated part off the input. */
static const char *part(const char **p, size_t *n, size_t *len)
{
  const char *start = *p, *nul = *n ? memchr(start, 0, *n) : NULL;

  *len = nul ? (size_t)(nul - start) : *n;
  *p += *len + (nul != NULL);
  *n -= *len + (nul != NULL);
  return start;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
  static struct tokenizer *fixed;
  const char *p = (const char *)data, *v, *m;
  struct tokenizer *t;
  struct err e = {0};
  size_t nv, nm;
  int r;

  if (!fixed)
    check(!tokenizer_open_memory(&fixed, vocab, sizeof vocab - 1, merges, sizeof merges - 1, &e));
  v = part(&p, &n, &nv);
  m = part(&p, &n, &nm);
  r = tokenizer_open_memory(&t, v, nv, m, nm, &e);
  check(r ? !t && e.code == r && *e.msg : t != NULL);
  if (t)
    encode(t, p, n);
  tokenizer_close(t);
  encode(fixed, p, n);
  parse(p, n);
  return 0;
}
