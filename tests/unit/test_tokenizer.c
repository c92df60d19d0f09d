/*
 * test_tokenizer.c - the tokenizer on a vocabulary small enough to see through: hostile files, limits, edges of the text.
 * What the real vocabulary does is tests/golden/test_tokenizer.c.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "models/tokenizer.h"

/* Ids 0 and 1 are the marks; the letters a and b, "ab", "ab</w>", "abb</w>"; \xc3 and \xa9</w> stand for the two bytes of é. */
static const char vocab[] = "{\"<|startoftext|>\":0,\"<|endoftext|>\":1,\"a\":2,\"b\":3,\"a</w>\":4,\"b</w>\":5,\"ab\":6,"
                            "\"ab</w>\":7,\"abb</w>\":8,\"\xc3\x83\":9,\"\xc2\xa9</w>\":10,\"'</w>\":11,\"'\":12,\"s</w>\":13,"
                            "\"'s</w>\":14,\"!</w>\":15}";
static const char merges[] = "#version: 0.2\na b\na b</w>\nab b</w>\n' s</w>\n";

static struct tokenizer *open_small(void)
{
  struct tokenizer *t;
  struct err e = {0};

  if (tokenizer_open_memory(&t, vocab, sizeof vocab - 1, merges, sizeof merges - 1, &e))
    fail_msg("%s", e.msg);
  return t;
}

/* The ids of text as "2 3 5", for comparison with a string. */
static const char *ids_of(const struct tokenizer *t, const char *text, size_t n, char out[256])
{
  struct err e = {0};
  size_t count, k = 0;
  int32_t *ids;

  if (tokenizer_encode(t, text, n, &ids, &count, &e))
    fail_msg("%s", e.msg);
  *out = 0;
  for (size_t i = 0; i < count; i++)
    k += (size_t)snprintf(out + k, 256 - k, "%s%d", i ? " " : "", ids[i]);
  free(ids);
  return out;
}

#define assert_ids(t, text, want) assert_string_equal(ids_of(t, text, sizeof(text) - 1, (char[256]){0}), want)

static void merges_by_rank_then_position(void **state)
{
  struct tokenizer *t = open_small();

  (void)state;
  assert_ids(t, "a", "4");
  assert_ids(t, "ab", "7");
  assert_ids(t, "AB ab", "7 7");
  assert_ids(t, "abb", "8");      /* a b first (rank 0), then ab b</w> */
  assert_ids(t, "abab", "6 7");
  assert_ids(t, "aab", "2 7");
  assert_ids(t, "ba", "3 4");
  assert_ids(t, "bab", "3 7");
  tokenizer_close(t);
}

static void edges_of_the_text(void **state)
{
  struct tokenizer *t = open_small();
  int32_t *ids = (int32_t *)t;
  struct err e = {0};
  size_t n = 9;

  (void)state;
  assert_int_equal(tokenizer_encode(t, NULL, 0, &ids, &n, &e), 0);
  assert_null(ids);
  assert_int_equal(n, 0);
  assert_int_equal(tokenizer_encode(t, " \t\n\xe3\x80\x80", 6, &ids, &n, &e), 0);
  assert_null(ids);
  assert_ids(t, "\xc3\xa9", "9 10");
  assert_ids(t, "e\xcc\x81", "9 10");     /* composed first */
  assert_ids(t, "E\xcc\x81", "9 10");
  assert_ids(t, "<|endoftext|>", "1");
  assert_ids(t, "<|ENDofText|>a<|startoftext|>", "1 4 0");
  assert_ids(t, "!<|endoftext|>!", "15 1 15");
  assert_ids(t, "a's", "4 14");
  assert_ids(t, "a'", "4 11");
  assert_ids(t, "z", "1");                /* no token for the byte: the unknown token, as transformers has it */
  assert_ids(t, "a\0b", "4 1 5");         /* NUL is a character like others */
  assert_int_equal(tokenizer_bos(t), 0);
  assert_int_equal(tokenizer_eos(t), 1);
  assert_int_equal(tokenizer_size(t), 16);
  assert_int_equal(tokenizer_find(t, "abb</w>"), 8);
  assert_int_equal(tokenizer_find(t, "nothing"), -1);
  assert_int_equal(tokenizer_find(t, ""), -1);
  tokenizer_close(t);
  tokenizer_close(NULL);
}

static void invalid_utf8_is_refused(void **state)
{
  static const struct {
    const char *text;
    size_t n, offset;
  } bad[] = {
      {"\xff", 1, 0},           {"ab\x80", 3, 2},         {"ab\xc3", 3, 2},             {"\xc0\xaf", 2, 0},
      {"a\xed\xa0\x80", 4, 1},  {"\xf4\x90\x80\x80", 4, 0}, {"abc\xe2\x82", 5, 3},      {"\xf8\x88\x80\x80\x80", 5, 0},
  };
  struct tokenizer *t = open_small();

  (void)state;
  for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
    char want[32];
    struct err e = {0};
    int32_t *ids = (int32_t *)t;
    size_t n = 1;

    assert_int_equal(tokenizer_encode(t, bad[i].text, bad[i].n, &ids, &n, &e), E_ARG);
    assert_null(ids);
    assert_int_equal(n, 0);
    snprintf(want, sizeof want, "offset %zu", bad[i].offset);
    if (!strstr(e.msg, want))
      fail_msg("text %zu: \"%s\" does not name %s", i, e.msg, want);
  }
  tokenizer_close(t);
}

/* Each of these files must be refused with E_FILE, the file's name and the reason. */
static void hostile_files_are_refused(void **state)
{
#define MARKS "\"<|startoftext|>\":0,\"<|endoftext|>\":1"
  static const struct {
    const char *vocab, *merges, *file, *reason;
  } bad[] = {
      {"", "", "vocab.json", "line 1"},
      {"[]", "", "vocab.json", "must be an object"},
      {"{}", "", "vocab.json", "must be an object"},
      {"{" MARKS, "", "vocab.json", "line 1"},
      {"{" MARKS ",}", "", "vocab.json", "line 1"},
      {"{" MARKS "} x", "", "vocab.json", "line 1"},
      {"{" MARKS ",\"a\":2,\"a\":3}", "", "vocab.json", "duplicate"},
      {"{" MARKS ",\"a\":1}", "", "vocab.json", "another token"},
      {"{" MARKS ",\"a\":3}", "", "vocab.json", "has id 3, but the ids of 3 tokens are 0 to 2"},
      {"{" MARKS ",\"a\":-1}", "", "vocab.json", "has id -1"},
      {"{" MARKS ",\"a\":4294967298}", "", "vocab.json", "has id 4294967298"},
      {"{" MARKS ",\"a\":1e99}", "", "vocab.json", "not an integer"},
      {"{" MARKS ",\"a\":\"2\"}", "", "vocab.json", "the id of a is not an integer"},
      {"{" MARKS ",\"a\":null}", "", "vocab.json", "not an integer"},
      {"{" MARKS ",\"\":2}", "", "vocab.json", "a token has 0 bytes"},
      {"{" MARKS ",\"\\u0000\":2}", "", "vocab.json", "line 1"},
      {"{" MARKS ",\"\xff\":2}", "", "vocab.json", "line 1"},
      {"{\"<|startoftext|>\":0}", "", "vocab.json", "has no <|endoftext|>"},
      {"{\"<|endoftext|>\":0}", "", "vocab.json", "has no <|startoftext|>"},
      {vocab, "a b\n\na b</w>\n", "merges.txt", "line 2 is not two tokens"},
      {vocab, "ab", "merges.txt", "line 1 is not two tokens"},
      {vocab, "a b c\n", "merges.txt", "line 1 is not two tokens"},
      {vocab, " b\n", "merges.txt", "line 1 is not two tokens"},
      {vocab, "a \n", "merges.txt", "line 1 is not two tokens"},
      {vocab, "a  b\n", "merges.txt", "line 1 is not two tokens"},
      {vocab, "#version: 0.2\na b\na b\n", "merges.txt", "line 3 repeats"},
      {vocab, "x b\n", "merges.txt", "line 1: the left token is not"},
      {vocab, "a x\n", "merges.txt", "line 1: the right token is not"},
      {vocab, "#version: 0.2\na b\nb a\n", "merges.txt", "line 3: the merged token is not"},
      {vocab, "a \xff\n", "merges.txt", "the right token is not"},
      {vocab, "a b\n#version: 0.2\n", "merges.txt", "line 2: the left token is not"},
  };

  (void)state;
  for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
    struct tokenizer *t = (struct tokenizer *)vocab; /* must become NULL */
    struct err e = {0};
    int r = tokenizer_open_memory(&t, bad[i].vocab, strlen(bad[i].vocab), bad[i].merges, strlen(bad[i].merges), &e);

    if (r != E_FILE || t || !strstr(e.msg, bad[i].file) || !strstr(e.msg, bad[i].reason) || strcmp(e.field, bad[i].file))
      fail_msg("case %zu: result %d, field \"%s\", message \"%s\"; wanted \"%s\"", i, r, e.field, e.msg, bad[i].reason);
  }
}

static void sizes_are_bounded(void **state)
{
  size_t n = (4 << 20) + 1;
  char *big = malloc(n), *text = malloc(n * 4 + 1), token[258] = "", line[512];
  struct tokenizer *t;
  struct err e = {0};
  int32_t *ids;
  size_t count;

  (void)state;
  assert_true(big && text);
  memset(big, ' ', n);
  assert_int_equal(tokenizer_open_memory(&t, big, n, merges, sizeof merges - 1, &e), E_FILE);
  assert_non_null(strstr(e.msg, "larger than"));
  e = (struct err){0};
  assert_int_equal(tokenizer_open_memory(&t, vocab, sizeof vocab - 1, big, n, &e), E_FILE);
  assert_non_null(strstr(e.msg, "merges.txt: larger than"));

  /* a token of 257 bytes in either file */
  memset(token, 'q', 257);
  snprintf(line, sizeof line, "{\"<|startoftext|>\":0,\"<|endoftext|>\":1,\"%s\":2}", token);
  e = (struct err){0};
  assert_int_equal(tokenizer_open_memory(&t, line, strlen(line), "", 0, &e), E_FILE);
  assert_non_null(strstr(e.msg, "a token has 257 bytes"));
  snprintf(line, sizeof line, "a %s\n", token);
  e = (struct err){0};
  assert_int_equal(tokenizer_open_memory(&t, vocab, sizeof vocab - 1, line, strlen(line), &e), E_FILE);
  assert_non_null(strstr(e.msg, "line 1 is not two tokens of at most 256 bytes"));

  t = open_small();
  e = (struct err){0};
  memset(text, 'a', n * 4 + 1);
  assert_int_equal(tokenizer_encode(t, text, (16 << 20) + 1, &ids, &count, &e), E_TOOBIG);
  tokenizer_close(t);
  free(big);
  free(text);
}

/* One word of 16 kB and a run of 8,000 combining marks out of order: quadratic code would take seconds under a sanitizer. */
static void long_words_are_whole(void **state)
{
  enum { N = 16384 };
  struct tokenizer *t = open_small();
  char *text = malloc(N);
  struct err e = {0};
  int32_t *ids;
  size_t n;

  (void)state;
  assert_non_null(text);
  for (int i = 0; i < N; i++)
    text[i] = "ab"[i % 2];
  assert_int_equal(tokenizer_encode(t, text, N, &ids, &n, &e), 0);
  assert_int_equal(n, N / 2);
  for (size_t i = 0; i < n; i++)
    assert_int_equal(ids[i], i + 1 < n ? 6 : 7);
  free(ids);

  for (int i = 0; i < N; i += 4)
    memcpy(text + i, "\xcc\x81\xcc\xa7", 4); /* acute (class 230), cedilla (class 202) */
  assert_int_equal(tokenizer_encode(t, text, N, &ids, &n, &e), 0);
  assert_int_equal(n, N);
  free(ids);
  free(text);
  tokenizer_close(t);
}

static void put(const char *path, const char *text)
{
  FILE *f = fopen(path, "wb");

  assert_non_null(f);
  fputs(text, f);
  assert_int_equal(fclose(f), 0);
}

static void folders_open(void **state)
{
  char dir[] = P_tmpdir "/test_tokenizer.XXXXXX", path[64], other[64];
  struct tokenizer *t;
  struct err e = {0};

  (void)state;
  assert_non_null(mkdtemp(dir));
  snprintf(path, sizeof path, "%s/vocab.json", dir);
  snprintf(other, sizeof other, "%s/merges.txt", dir);
  assert_int_equal(tokenizer_open(&t, dir, &e), E_FILE);
  assert_null(t);
  assert_non_null(strstr(e.msg, path));
  assert_string_equal(e.field, "vocab.json");

  put(path, vocab);
  e = (struct err){0};
  assert_int_equal(tokenizer_open(&t, dir, &e), E_FILE);
  assert_non_null(strstr(e.msg, other));

  put(other, "#version: 0.2\r\na b\r\na b</w>\r\n"); /* a checkout on Windows */
  e = (struct err){0};
  assert_int_equal(tokenizer_open(&t, dir, &e), 0);
  assert_ids(t, "ab", "7");
  tokenizer_close(t);

  put(other, "a q\n");
  assert_int_equal(tokenizer_open(&t, dir, &e), E_FILE);
  assert_non_null(strstr(e.msg, other));
  assert_int_equal(unlink(other), 0);
  assert_int_equal(mkdir(other, 0700), 0);
  e = (struct err){0};
  assert_int_equal(tokenizer_open(&t, dir, &e), E_FILE);
  assert_non_null(strstr(e.msg, "merges.txt: cannot be read"));
  rmdir(other);
  unlink(path);
  rmdir(dir);
}

int main(void)
{
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(merges_by_rank_then_position),
      cmocka_unit_test(edges_of_the_text),
      cmocka_unit_test(invalid_utf8_is_refused),
      cmocka_unit_test(hostile_files_are_refused),
      cmocka_unit_test(sizes_are_bounded),
      cmocka_unit_test(long_words_are_whole),
      cmocka_unit_test(folders_open),
  };

  return cmocka_run_group_tests_name("unit tokenizer", tests, NULL, NULL);
}
