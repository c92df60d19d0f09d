/*
 * test_prompt.c - the prompt parser and the chunks on a tiny vocabulary: edges and limits. tests/golden/test_prompt.c has
 * the rules themselves.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "models/prompt.h"

enum { BOS, EOS, PAD, A, B, COMMA };

static struct tokenizer *open_small(void)
{
  static const char vocab[] = "{\"<|startoftext|>\":0,\"<|endoftext|>\":1,\"!</w>\":2,\"a</w>\":3,\"b</w>\":4,\",</w>\":5}";
  struct tokenizer *t;
  struct err e = {0};

  if (tokenizer_open_memory(&t, vocab, sizeof vocab - 1, "", 0, &e))
    fail_msg("%s", e.msg);
  return t;
}

/* The spans as "text=weight|text=weight|BREAK". */
static const char *spans_of(const char *text, size_t n, char out[512])
{
  struct prompt_span *s;
  struct err e = {0};
  size_t count, k = 0;

  if (prompt_parse(text, n, &s, &count, &e))
    fail_msg("%s", e.msg);
  assert_true(count >= 1);
  for (size_t i = 0; i < count; i++) {
    const char *bar = i ? "|" : "";

    if (s[i].is_break)
      k += (size_t)snprintf(out + k, 512 - k, "%sBREAK", bar);
    else
      k += (size_t)snprintf(out + k, 512 - k, "%s%s=%.4g", bar, s[i].text, (double)s[i].weight);
  }
  prompt_spans_free(s, count);
  return out;
}

#define assert_spans(text, want) assert_string_equal(spans_of(text, sizeof(text) - 1, (char[512]){0}), want)

static void spans(void **state)
{
  (void)state;
  assert_spans("", "=1");
  assert_spans("a", "a=1");
  assert_spans("(a)", "a=1.1");
  assert_spans("[a]", "a=0.9091");
  assert_spans("([a])", "a=1");
  assert_spans("((a) b:2)c", "a=2.2| b=2|c=1");
  assert_spans("(a:-1.5)", "a=-1.5");
  assert_spans("(a:0)", "a=0");
  assert_spans("(a :\t+.5 )", "a =0.5");
  assert_spans("(a:1.)", "a=1");
  assert_spans("(a:.)", "a:.=1.1");
  assert_spans("(a:)", "a:=1.1");
  assert_spans("(a:1e2)", "a:1e2=1.1");
  assert_spans("(a:0x2)", "a:0x2=1.1");
  assert_spans("(a:nan)", "a:nan=1.1");
  assert_spans("(a:--1)", "a:--1=1.1");
  assert_spans("(a:1-1)", "a:1-1=1.1");
  assert_spans("a:2)", "a:2)=1");
  assert_spans("[a:2)", "a:2)=0.9091");
  assert_spans("(a:2", "a:2=1.1");
  assert_spans("(a:2]", "a:2]=1.1");
  assert_spans("a)]", "a)]=1");
  assert_spans("((", "=1");
  assert_spans(":", ":=1");
  assert_spans("\\(a\\)", "(a)=1");
  assert_spans("\\", "=1");
  assert_spans("\\\\", "\\=1");
  assert_spans("\\a\\", "a=1");
  assert_spans("(\\))", ")=1.1");
  assert_spans("(a:1.1)(b)", "ab=1.1");
  assert_spans("<lora:x:2>", "<lora:x:2>=1");
}

static void breaks(void **state)
{
  (void)state;
  assert_spans("BREAK", "=1|BREAK|=1");
  assert_spans("a BREAK b", "a=1|BREAK|b=1");
  assert_spans("a\n BREAK\t\tb", "a=1|BREAK|b=1");
  assert_spans("BREAK BREAK", "=1|BREAK|=1|BREAK|=1");
  assert_spans("BREAKBREAK", "BREAKBREAK=1");
  assert_spans("BREAKS BREAK_ 1BREAK aBREAK break", "BREAKS BREAK_ 1BREAK aBREAK break=1");
  assert_spans(",BREAK.", ",=1|BREAK|.=1");
  assert_spans("(a BREAK b:2)", "a=2|BREAK|b=2");
  assert_spans("BREA", "BREA=1");
  assert_spans("xBREAK BREAK", "xBREAK=1|BREAK|=1");
}

static void limits(void **state)
{
  char *text = malloc(PROMPT_MAX_BYTES + 1);
  struct prompt_span *s;
  struct err e = {0};
  size_t n;

  (void)state;
  assert_non_null(text);
  memset(text, 'a', PROMPT_MAX_BYTES + 1);
  assert_int_equal(prompt_parse(text, PROMPT_MAX_BYTES, &s, &n, &e), 0);
  assert_int_equal(n, 1);
  assert_int_equal(strlen(s->text), PROMPT_MAX_BYTES);
  prompt_spans_free(s, n);
  assert_int_equal(prompt_parse(text, PROMPT_MAX_BYTES + 1, &s, &n, &e), E_ARG);
  assert_null(s);
  assert_non_null(strstr(e.msg, "16384"));

  /* brackets that are never closed: 48 of them stay under 100, 49 do not; infinity is refused as well */
  memset(text, '(', PROMPT_MAX_BYTES);
  e = (struct err){0};
  text[48] = 'x';
  assert_int_equal(prompt_parse(text, 49, &s, &n, &e), 0);
  assert_true(s->weight > 97.f && s->weight < 98.f);
  prompt_spans_free(s, n);
  text[48] = '(';
  text[49] = 'x';
  assert_int_equal(prompt_parse(text, 50, &s, &n, &e), E_ARG);
  assert_non_null(strstr(e.msg, "the limit is 100"));
  text[49] = '(';
  text[PROMPT_MAX_BYTES - 1] = 'x';
  e = (struct err){0};
  assert_int_equal(prompt_parse(text, PROMPT_MAX_BYTES, &s, &n, &e), E_ARG);
  e = (struct err){0};
  assert_int_equal(prompt_parse("(a:99999999999999999999)", 24, &s, &n, &e), E_ARG);
  e = (struct err){0};
  assert_int_equal(prompt_parse("(a:-100.5)", 10, &s, &n, &e), E_ARG);
  e = (struct err){0};
  assert_int_equal(prompt_parse("ab\xff", 3, &s, &n, &e), E_ARG);
  assert_non_null(strstr(e.msg, "offset 2"));
  free(text);
}

/* The ids of one chunk as letters: ^ begin, $ end, . padding. */
static const char *chunk_of(const struct prompt_tokens *p, int c, char out[PROMPT_CHUNK + 1])
{
  for (int i = 0; i < PROMPT_CHUNK; i++)
    out[i] = "^$.ab,"[p->chunk[c].ids[i]];
  out[PROMPT_CHUNK] = 0;
  return out;
}

static void assert_chunk(const struct prompt_tokens *p, int c, const char *head)
{
  char got[PROMPT_CHUNK + 1], want[PROMPT_CHUNK + 1];

  memset(want, '.', PROMPT_CHUNK);
  want[PROMPT_CHUNK] = 0;
  memcpy(want, head, strlen(head));
  assert_true(c < p->n);
  assert_string_equal(chunk_of(p, c, got), want);
}

/* Puts token n times at p; returns where the NUL is, for the next call. */
static char *many(char *p, const char *token, int n)
{
  size_t len = strlen(token);

  for (; n > 0; n--, p += len)
    memcpy(p, token, len);
  *p = 0;
  return p;
}

static void tokenize(struct prompt_tokens *p, const struct tokenizer *t, const char *text)
{
  struct err e = {0};

  if (prompt_tokenize(p, t, text, strlen(text), PAD, &e))
    fail_msg("%s", e.msg);
}

static void chunks(void **state)
{
  struct tokenizer *t = open_small();
  struct prompt_tokens p;
  char text[1024], *s;

  (void)state;
  tokenize(&p, t, "");
  assert_int_equal(p.n, 1);
  assert_int_equal(p.tokens, 0);
  assert_int_equal(p.is_weighted, 0);
  assert_chunk(&p, 0, "^$");
  prompt_tokens_close(&p);
  assert_null(p.chunk);

  tokenize(&p, t, "a (b:2) a");
  assert_int_equal(p.tokens, 3);
  assert_int_equal(p.is_weighted, 1);
  assert_chunk(&p, 0, "^aba$");
  for (int i = 0; i < PROMPT_CHUNK; i++)
    assert_true(p.chunk[0].weights[i] == (i == 2 ? 2 : 1));
  prompt_tokens_close(&p);

  tokenize(&p, t, "a BREAK b BREAK");
  assert_int_equal(p.n, 2);
  assert_chunk(&p, 0, "^a$");
  assert_chunk(&p, 1, "^b$");
  prompt_tokens_close(&p);

  tokenize(&p, t, "BREAK");
  assert_int_equal(p.n, 1);
  assert_chunk(&p, 0, "^$");
  prompt_tokens_close(&p);

  s = many(text, "a ", 75);
  tokenize(&p, t, text); /* exactly full: end mark, no padding, no second chunk */
  assert_int_equal(p.n, 1);
  assert_int_equal(p.chunk[0].ids[76], EOS);
  assert_int_equal(p.tokens, 75);
  prompt_tokens_close(&p);

  many(s, "b ", 1);
  tokenize(&p, t, text);
  assert_int_equal(p.n, 2);
  assert_chunk(&p, 1, "^b$");
  prompt_tokens_close(&p);
  prompt_tokens_close(NULL);
  tokenizer_close(t);
}

/* A chunk that overflows is cut behind its last comma when that is at most 20 tokens back. */
static void commas(void **state)
{
  struct tokenizer *t = open_small();
  struct prompt_tokens p;
  char text[1024], *s;

  (void)state;
  s = many(text, "a ", 55);
  s = many(s, ", ", 1);
  many(s, "b ", 20); /* the comma is token 56: 20 from the end */
  tokenize(&p, t, text);
  assert_int_equal(p.n, 2);
  assert_int_equal(p.chunk[0].ids[56], COMMA);
  assert_int_equal(p.chunk[0].ids[57], EOS);
  assert_chunk(&p, 1, "^bbbbbbbbbbbbbbbbbbbb$");
  assert_int_equal(p.tokens, 76);
  prompt_tokens_close(&p);

  s = many(text, "a ", 54);
  s = many(s, ", ", 1);
  many(s, "b ", 21); /* 21 from the end: too far */
  tokenize(&p, t, text);
  assert_int_equal(p.n, 2);
  assert_int_equal(p.chunk[0].ids[75], B);
  assert_chunk(&p, 1, "^b$");
  prompt_tokens_close(&p);

  s = many(text, "a ", 75);
  many(s, ", ", 1); /* a comma that itself overflows moves on alone */
  tokenize(&p, t, text);
  assert_int_equal(p.n, 2);
  assert_chunk(&p, 1, "^,$");
  prompt_tokens_close(&p);
  tokenizer_close(t);
}

static void too_many_chunks(void **state)
{
  struct tokenizer *t = open_small();
  struct prompt_tokens p;
  struct err e = {0};
  char text[8192], *s;

  (void)state;
  s = many(text, "a ", 75 * PROMPT_MAX_CHUNKS);
  tokenize(&p, t, text);
  assert_int_equal(p.n, PROMPT_MAX_CHUNKS);
  prompt_tokens_close(&p);
  many(s, "b ", 1);
  assert_int_equal(prompt_tokenize(&p, t, text, strlen(text), PAD, &e), E_ARG);
  assert_null(p.chunk);
  assert_non_null(strstr(e.msg, "16 chunks of 75 tokens"));

  many(text, "BREAK ", PROMPT_MAX_CHUNKS);
  tokenize(&p, t, text);
  assert_int_equal(p.n, PROMPT_MAX_CHUNKS);
  prompt_tokens_close(&p);
  many(text, "BREAK ", PROMPT_MAX_CHUNKS + 1);
  e = (struct err){0};
  assert_int_equal(prompt_tokenize(&p, t, text, strlen(text), PAD, &e), E_ARG);

  e = (struct err){0};
  assert_int_equal(prompt_tokenize(&p, t, "a \xff", 3, PAD, &e), E_ARG);
  assert_non_null(strstr(e.msg, "offset 2"));
  tokenizer_close(t);
}

int main(void)
{
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(spans),  cmocka_unit_test(breaks), cmocka_unit_test(limits),
      cmocka_unit_test(chunks), cmocka_unit_test(commas), cmocka_unit_test(too_many_chunks),
  };

  return cmocka_run_group_tests_name("unit prompt", tests, NULL, NULL);
}
