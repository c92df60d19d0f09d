/*
 * test_prompt.c - prompt weights and chunks against tools/reference/prompt_weights.py (weighting.json): the spans of
 * prompt_parse, and ids and weights of every chunk. The hidden states of the same prompts belong to the text encoder's test.
 *
 * Runs from the root of the repository; an argument names another folder with vocab.json and merges.txt.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <jansson.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "models/prompt.h"

static const char *folder = "weights/emoji/tokenizer";

static json_t *load(void)
{
  json_error_t je;
  json_t *all = json_load_file("tests/golden/weighting.json", 0, &je);

  if (!all)
    fail_msg("weighting.json: line %d: %s", je.line, je.text);
  assert_true(json_array_size(all) >= 20);
  return all;
}

/* The golden has doubles, the engine rounds them to float once: not even the last bit may differ. */
static int same_weight(float got, const json_t *want)
{
  return json_is_number(want) && got == (float)json_number_value(want);
}

static int same_spans(const char *prompt, const json_t *want)
{
  struct prompt_span *span;
  struct err e = {0};
  size_t n, i;
  json_t *w;
  int same = 1;

  if (prompt_parse(prompt, strlen(prompt), &span, &n, &e))
    fail_msg("\"%s\": %s", prompt, e.msg);
  same = n == json_array_size(want);
  json_array_foreach(want, i, w) {
    const char *text = json_string_value(json_array_get(w, 0));
    int is_break = json_number_value(json_array_get(w, 1)) == -1 && !strcmp(text, "BREAK");

    if (i >= n)
      break;
    same = same && span[i].is_break == is_break &&
           (is_break || (!strcmp(span[i].text, text) && same_weight(span[i].weight, json_array_get(w, 1))));
  }
  if (!same)
    for (i = 0; i < n; i++)
      print_error("  [%s] %.9g%s\n", span[i].text, (double)span[i].weight, span[i].is_break ? " BREAK" : "");
  prompt_spans_free(span, n);
  return same;
}

static void spans_equal(void **state)
{
  json_t *all = load(), *entry;
  size_t i;
  int bad = 0;

  (void)state;
  json_array_foreach(all, i, entry) {
    const char *prompt = json_string_value(json_object_get(entry, "prompt"));

    if (same_spans(prompt, json_object_get(entry, "segments")))
      continue;
    print_error("prompt %zu: \"%s\" has other spans\n", i, prompt);
    bad++;
  }
  json_decref(all);
  assert_int_equal(bad, 0);
}

/* Differences in ids or weights. pad: the engine's; the golden pads with the end mark. */
static int same_chunks(const struct tokenizer *t, const char *prompt, const json_t *want, int32_t pad)
{
  struct prompt_tokens p;
  struct err e = {0};
  int same, is_weighted = 0;

  if (prompt_tokenize(&p, t, prompt, strlen(prompt), pad, &e))
    fail_msg("\"%s\": %s", prompt, e.msg);
  same = p.n == (int)json_array_size(want);
  for (int c = 0; same && c < p.n; c++) {
    const json_t *ids = json_object_get(json_array_get(want, (size_t)c), "ids");
    const json_t *weights = json_object_get(json_array_get(want, (size_t)c), "weights");
    int ended = 0;

    assert_true(json_array_size(ids) == PROMPT_CHUNK && json_array_size(weights) == PROMPT_CHUNK);
    for (size_t i = 0; i < PROMPT_CHUNK; i++) {
      int32_t id = (int32_t)json_integer_value(json_array_get(ids, i));

      same = same && p.chunk[c].ids[i] == (ended ? pad : id) && same_weight(p.chunk[c].weights[i], json_array_get(weights, i));
      ended = ended || id == tokenizer_eos(t);
      is_weighted = is_weighted || p.chunk[c].weights[i] != 1;
    }
  }
  same = same && p.is_weighted == is_weighted;
  prompt_tokens_close(&p);
  return same;
}

static void chunks_equal(void **state)
{
  json_t *all = load(), *entry;
  struct tokenizer *t;
  struct err e = {0};
  size_t i;
  int bad = 0;

  (void)state;
  if (tokenizer_open(&t, folder, &e))
    fail_msg("%s", e.msg);
  json_array_foreach(all, i, entry) {
    const char *prompt = json_string_value(json_object_get(entry, "prompt"));
    const json_t *chunks = json_object_get(entry, "chunks");

    if (same_chunks(t, prompt, chunks, tokenizer_eos(t)) && same_chunks(t, prompt, chunks, 0))
      continue;
    print_error("prompt %zu: \"%s\" has other chunks\n", i, prompt);
    bad++;
  }
  tokenizer_close(t);
  json_decref(all);
  assert_int_equal(bad, 0);
}

int main(int argc, char **argv)
{
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(spans_equal),
      cmocka_unit_test(chunks_equal),
  };

  if (argc > 1)
    folder = argv[1];
  return cmocka_run_group_tests_name("golden prompt", tests, NULL, NULL);
}
