/*
 * test_tokenizer.c - the tokenizer against transformers' CLIPTokenizerFast, and its Unicode tables against those of the
 * tokenizers library (tests/golden/README.md, tokenizer.json and unicode.tsv). Planted bugs in the vocabulary must show.
 *
 * Runs from the root of the repository; an argument names another folder with vocab.json and merges.txt.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>

#include "models/tokenizer.h"
#include "models/unicode.h"

static const char *folder = "weights/emoji/tokenizer";

static json_t *load_strings(void)
{
  json_error_t je;
  json_t *all = json_load_file("tests/golden/tokenizer.json", JSON_ALLOW_NUL, &je);

  if (!all)
    fail_msg("tokenizer.json: line %d: %s", je.line, je.text);
  assert_true(json_is_array(all));
  return all;
}

/* How many of the golden strings get other ids than the golden has. Shows the first few when asked. */
static size_t count_differences(const struct tokenizer *t, const json_t *all, int is_shown)
{
  size_t bad = 0, i;
  json_t *entry;

  json_array_foreach(all, i, entry) {
    const json_t *text = json_object_get(entry, "text"), *want = json_object_get(entry, "fast");
    struct err e = {0};
    size_t n, k = 0;
    int32_t *ids;
    int same;

    assert_true(json_is_string(text) && json_is_array(want));
    same = !tokenizer_encode(t, json_string_value(text), json_string_length(text), &ids, &n, &e);
    same = same && n == json_array_size(want);
    for (; same && k < n; k++)
      same = ids[k] == json_integer_value(json_array_get(want, k));
    if (!same && bad++ < 5 && is_shown)
      print_error("string %zu (%s): %zu ids instead of %zu, first difference near %zu %s\n", i,
                  json_string_value(json_object_get(entry, "kind")), n, json_array_size(want), k, e.msg);
    free(ids);
  }
  return bad;
}

static void all_strings_equal(void **state)
{
  struct tokenizer *t;
  struct err e = {0};
  json_t *all = load_strings();

  (void)state;
  if (tokenizer_open(&t, folder, &e))
    fail_msg("%s", e.msg);
  print_message("%zu strings\n", json_array_size(all));
  assert_true(json_array_size(all) >= 2000);
  assert_int_equal(count_differences(t, all, 1), 0);
  assert_int_equal(tokenizer_size(t), 49408);
  assert_int_equal(tokenizer_bos(t), 49406);
  assert_int_equal(tokenizer_eos(t), 49407);
  assert_int_equal(tokenizer_find(t, ",</w>"), 267);
  tokenizer_close(t);
  json_decref(all);
}

static char *read_all(const char *name, size_t *n)
{
  char path[512], *p = malloc(4 << 20);
  FILE *f;

  snprintf(path, sizeof path, "%s/%s", folder, name);
  f = fopen(path, "rb");
  if (!p || !f)
    fail_msg("cannot read %s", path);
  *n = fread(p, 1, (4 << 20) - 1, f);
  p[*n] = 0;
  fclose(f);
  return p;
}

/* Each changes one thing in the files; the goldens must notice. */
static void planted_bugs_fail(void **state)
{
  size_t nv, nm;
  char *vocab = read_all("vocab.json", &nv), *merges = read_all("merges.txt", &nm), *line, *half, *moved;
  struct tokenizer *t;
  struct err e = {0};
  json_t *all = load_strings(), *ids;

  (void)state;
  /* the merges from rank 24,000 on are lost */
  line = merges;
  for (int i = 0; i < 24000; i++)
    line = strchr(line, '\n') + 1;
  assert_int_equal(tokenizer_open_memory(&t, vocab, nv, merges, (size_t)(line - merges), &e), 0);
  assert_true(count_differences(t, all, 0) > 100);
  tokenizer_close(t);

  /* no planted bug: a file without its version line means the same */
  line = strchr(merges, '\n') + 1;
  assert_int_equal(tokenizer_open_memory(&t, vocab, nv, line, nm - (size_t)(line - merges), &e), 0);
  assert_int_equal(count_differences(t, all, 1), 0);
  tokenizer_close(t);

  /* the first thousand merges come last */
  half = line;
  for (int i = 0; i < 1000; i++)
    half = strchr(half, '\n') + 1;
  moved = malloc(nm);
  assert_non_null(moved);
  memcpy(moved, half, (size_t)(merges + nm - half));
  memcpy(moved + (merges + nm - half), line, (size_t)(half - line));
  assert_int_equal(tokenizer_open_memory(&t, vocab, nv, moved, nm - (size_t)(line - merges), &e), 0);
  assert_true(count_differences(t, all, 0) > 100);
  tokenizer_close(t);
  free(moved);

  /* two tokens swap their ids */
  ids = json_loadb(vocab, nv, 0, NULL);
  assert_non_null(ids);
  json_object_set_new(ids, "red</w>", json_integer(json_integer_value(json_object_get(ids, "blue</w>"))));
  json_object_set_new(ids, "blue</w>", json_integer(736));
  free(vocab);
  vocab = json_dumps(ids, JSON_COMPACT);
  assert_non_null(vocab);
  assert_int_equal(tokenizer_open_memory(&t, vocab, strlen(vocab), merges, nm, &e), 0);
  assert_true(count_differences(t, all, 0) > 100);
  tokenizer_close(t);
  json_decref(ids);

  json_decref(all);
  free(vocab);
  free(merges);
}

enum { POINTS = 0x110000 };

/* Whether c is its own NFC. */
static int is_composed(const char *text, size_t n)
{
  utf8proc_uint8_t *nfc = NULL;
  utf8proc_ssize_t k = utf8proc_map((const utf8proc_uint8_t *)text, (utf8proc_ssize_t)n, &nfc, UTF8PROC_STABLE | UTF8PROC_COMPOSE);
  int same = k == (utf8proc_ssize_t)n && !memcmp(nfc, text, n);

  free(nfc);
  return same;
}

/* Whether the lower case of c is a, or a and b when b is not 0; a 0 stands for c itself. NFC comes first in the function
 * that is tested, so characters that NFC changes are not asked. */
static int same_lower(int32_t c, int32_t a, int32_t b)
{
  char text[4];
  size_t n = (size_t)utf8proc_encode_char(c, (utf8proc_uint8_t *)text), k;
  struct err e = {0};
  int32_t *got;
  int same;

  if (!is_composed(text, n))
    return 1;
  assert_int_equal(unicode_normalize(text, n, &got, &k, &e), 0);
  same = k == (b ? 2 : 1) && got[0] == (a ? a : c) && (!b || got[1] == b);
  free(got);
  return same;
}

/* Reads unicode.tsv: class[c] has a bit for each of L, N, S; low[c] is the first character of the lower case, 0 for c
 * itself; second its second one. */
static void load_table(unsigned char *class, int32_t *low, int32_t *second)
{
  char kind[8];
  unsigned a, b, c;
  char line[128];
  FILE *f = fopen("tests/golden/unicode.tsv", "r");

  assert_non_null(f);
  while (fgets(line, sizeof line, f)) {
    char *p = strchr(line, '\t'), *end;

    assert_non_null(p);
    snprintf(kind, sizeof kind, "%.*s", (int)(p - line), line);
    a = (unsigned)strtoul(p, &end, 16);
    b = (unsigned)strtoul(end, &end, 16);
    c = (unsigned)strtoul(end, NULL, 16);
    assert_true(a < POINTS && b < POINTS && c < POINTS);
    if (!strcmp(kind, "lower")) {
      low[a] = (int32_t)b;
      second[a] = (int32_t)c;
      continue;
    }
    for (; a <= b; a++)
      class[a] |= *kind == 'L' ? 1 : *kind == 'N' ? 2 : *kind == 'S' ? 4 : 8;
  }
  fclose(f);
}

/* Every code point. Only a character that the installed utf8proc does not know yet may differ. */
static void unicode_tables_equal(void **state)
{
  unsigned char *class = calloc(POINTS, 1);
  int32_t *low = calloc(POINTS, sizeof *low), *second = calloc(POINTS, sizeof *second);
  int bad = 0, newer = 0, known = 0;

  (void)state;
  assert_true(class && low && second);
  load_table(class, low, second);
  for (int32_t c = 0; c < POINTS; c++) {
    int got = unicode_is_letter(c) | unicode_is_number(c) << 1 | unicode_is_space(c) << 2, same;

    if (c >= 0xd800 && c < 0xe000)
      continue;
    same = got == class[c] && same_lower(c, low[c], second[c]);
    known += class[c] != 0;
    if (!same && utf8proc_category(c) == UTF8PROC_CATEGORY_CN)
      newer++;
    else if (!same && bad++ < 10)
      print_error("U+%04X: class %d instead of %d, or its lower case is not U+%04X\n", (unsigned)c, got, class[c],
                  (unsigned)low[c]);
  }
  print_message("%d letters, numbers and spaces; %d characters newer than utf8proc's Unicode %s\n", known, newer,
                utf8proc_unicode_version());
  assert_true(known > 130000);
  assert_true(newer < 6000); /* 5004 with Unicode 15.0 against 16.0 */
  assert_int_equal(bad, 0);
  free(class);
  free(low);
  free(second);
}

int main(int argc, char **argv)
{
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(all_strings_equal),
      cmocka_unit_test(planted_bugs_fail),
      cmocka_unit_test(unicode_tables_equal),
  };

  if (argc > 1)
    folder = argv[1];
  return cmocka_run_group_tests_name("golden tokenizer", tests, NULL, NULL);
}
