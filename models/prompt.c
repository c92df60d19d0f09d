/*
 * prompt.c - prompt weights and chunks; see prompt.h. Called by pipeline.c.
 *
 * Source of the method: stable-diffusion-webui, modules/prompt_parser.py (parse_prompt_attention) and
 * modules/sd_hijack_clip.py (tokenize_line, process_tokens). What is easy to get wrong:
 *   - The text is cut into marks and runs first. A run ends at any of \ ( ) [ ] : and a mark without a partner is text.
 *   - ":1.3)" is one mark; with no round bracket open it is text. A bracket that is never closed weighs to the end.
 *   - Weights multiply in double, inner brackets first, and equal neighbours are then joined.
 *   - Spans are tokenized one by one: a weight in the middle of a word splits the word.
 *   - The search for BREAK sees one run, so its word boundaries are those of the run.
 * Where webui goes wrong this does not follow: BREAK inside brackets is a break too (webui tries to draw the word), a
 * weight that is no number ("(a:1.2.3)") is text (webui fails), and a weight outside PROMPT_MAX_WEIGHT is refused.
 * tools/reference/prompt_weights.py is the executable twin of this file; tests/golden/weighting.json holds it to that.
 *
 * Threads: pure functions.
 */
#include "models/prompt.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "models/unicode.h"

enum { CHUNK_TEXT = PROMPT_CHUNK - 2, COMMA_REACH = 20 };

/* ---- spans ---- */

struct span {
  size_t at, len; /* bytes in the parser's text buffer */
  double weight;
  int is_break;
};

/* The parser: spans in the order of the text, and for each kind of bracket the spans at which one was opened. Every span
 * and every bracket takes at least one byte of the prompt and the text only gets shorter, so all arrays are as long as it
 * allows: BREAK makes two spans of five bytes. */
struct parser {
  char *text;
  size_t ntext;
  struct span *span;
  size_t n;
  size_t *open[2], nopen[2]; /* [0] round, [1] square */
};

static void add_span(struct parser *p, const char *s, size_t n)
{
  memcpy(p->text + p->ntext, s, n);
  p->span[p->n++] = (struct span){.at = p->ntext, .len = n, .weight = 1};
  p->ntext += n;
}

static void close_bracket(struct parser *p, int kind, double factor)
{
  for (size_t i = p->open[kind][--p->nopen[kind]]; i < p->n; i++)
    p->span[i].weight *= factor;
}

/* White space and word characters are the ASCII ones here, as \s and \w of a byte-wise regular expression. */
static int is_space(char c)
{
  return c == ' ' || (c >= '\t' && c <= '\r');
}

static int is_word(char c)
{
  return c == '_' || (c >= '0' && c <= '9') || (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z');
}

static size_t spaces_before(const char *s, size_t n)
{
  size_t k = 0;

  while (k < n && is_space(s[n - k - 1]))
    k++;
  return k;
}

static size_t spaces_after(const char *s, size_t n)
{
  size_t k = 0;

  while (k < n && is_space(s[k]))
    k++;
  return k;
}

/* One run of text: cut at \s*\bBREAK\b\s*. */
static void add_run(struct parser *p, const char *s, size_t n)
{
  static const char word[] = "BREAK";
  const size_t len = sizeof word - 1;
  size_t from = 0, at = 0;
  const char *hit;

  while (at < n && (hit = memmem(s + at, n - at, word, len))) {
    size_t i = (size_t)(hit - s);

    at = i + len;
    if ((i && is_word(s[i - 1])) || (at < n && is_word(s[at])))
      continue;
    add_span(p, s + from, i - from - spaces_before(s + from, i - from));
    p->span[p->n++] = (struct span){.at = p->ntext, .is_break = 1};
    at += spaces_after(s + at, n - at);
    from = at;
  }
  add_span(p, s + from, n - from);
}

/* Length of the mark :\s*([+-]?[.\d]+)\s*\) at s, or 0 when there is none or what stands there is no number. */
static size_t match_weight(const char *s, size_t n, double *weight)
{
  size_t i = 1 + spaces_after(s + 1, n - 1), k = 0;
  char number[64], *end;

  for (; i < n && k + 1 < sizeof number && s[i] && strchr("+-.0123456789", s[i]); i++)
    number[k++] = s[i];
  number[k] = 0;
  *weight = strtod(number, &end);
  i += spaces_after(s + i, n - i);
  return k && !*end && i < n && s[i] == ')' ? i + 1 : 0;
}

/* Length of the run of text at s: up to the next mark. */
static size_t match_run(const char *s, size_t n)
{
  size_t i = 0;

  while (i < n && !(s[i] && strchr("\\()[]:", s[i])))
    i++;
  return i;
}

/* Takes the mark or the run at s; returns its length. */
static size_t parse_one(struct parser *p, const char *s, size_t n)
{
  size_t len = match_run(s, n);
  double weight;

  if (len) {
    add_run(p, s, len);
    return len;
  }
  if (s[0] == '\\') { /* the next mark is literal; a backslash before anything else vanishes */
    int is_mark = n > 1 && s[1] && strchr("\\()[]", s[1]);

    add_span(p, s + 1, is_mark);
    return 1 + (size_t)is_mark;
  }
  if (s[0] == '(' || s[0] == '[') {
    int kind = s[0] == '[';

    p->open[kind][p->nopen[kind]++] = p->n;
    return 1;
  }
  len = s[0] == ':' ? match_weight(s, n, &weight) : 0;
  if (len && p->nopen[0]) {
    close_bracket(p, 0, weight);
  } else if (s[0] == ')' && p->nopen[0]) {
    close_bracket(p, 0, 1.1);
  } else if (s[0] == ']' && p->nopen[1]) {
    close_bracket(p, 1, 1 / 1.1);
  } else {
    add_span(p, s, len ? len : 1);
  }
  return len ? len : 1;
}

/* Equal neighbours become one span; their texts already stand side by side. Refuses weights that would leave the range in
 * which a picture means anything, long before they become infinite. */
static int join_spans(struct parser *p, struct err *e)
{
  size_t k = 0;

  if (!p->n)
    add_span(p, "", 0);
  for (size_t i = 0; i < p->n; i++) {
    const struct span *s = &p->span[i];

    if (!(s->is_break || fabs(s->weight) <= PROMPT_MAX_WEIGHT))
      return err_set(e, E_ARG, "a part of the prompt has weight %g; the limit is %d", s->weight, PROMPT_MAX_WEIGHT);
    if (k && !s->is_break && !p->span[k - 1].is_break && p->span[k - 1].weight == s->weight)
      p->span[k - 1].len += s->len;
    else
      p->span[k++] = *s;
  }
  p->n = k;
  return 0;
}

static void parser_close(struct parser *p)
{
  free(p->text);
  free(p->span);
  free(p->open[0]);
  free(p->open[1]);
}

static int parser_run(struct parser *p, const char *text, size_t n, struct err *e)
{
  int r;

  *p = (struct parser){0};
  if (n > PROMPT_MAX_BYTES)
    return err_set(e, E_ARG, "the prompt has %zu bytes; the limit is %d", n, PROMPT_MAX_BYTES);
  r = unicode_check(text, n, e);
  if (r)
    return r;
  p->text = malloc(n + 1);
  p->span = malloc((n + 1) * sizeof *p->span);
  p->open[0] = malloc((n + 1) * sizeof *p->open[0]);
  p->open[1] = malloc((n + 1) * sizeof *p->open[1]);
  if (!p->text || !p->span || !p->open[0] || !p->open[1])
    return err_set(e, E_NOMEM, "out of memory for a prompt of %zu bytes", n);
  for (size_t i = 0; i < n;)
    i += parse_one(p, text + i, n - i);
  while (p->nopen[0])
    close_bracket(p, 0, 1.1);
  while (p->nopen[1])
    close_bracket(p, 1, 1 / 1.1);
  return join_spans(p, e);
}

int prompt_parse(const char *text, size_t n, struct prompt_span **spans, size_t *count, struct err *e)
{
  struct prompt_span *out = NULL;
  struct parser p;
  int r;

  *spans = NULL;
  *count = 0;
  r = parser_run(&p, text, n, e);
  if (r)
    goto out;
  out = calloc(p.n, sizeof *out);
  for (size_t i = 0; out && i < p.n; i++) {
    const struct span *s = &p.span[i];

    out[i].weight = (float)s->weight;
    out[i].is_break = s->is_break;
    out[i].text = malloc(s->len + 1);
    if (!out[i].text) {
      prompt_spans_free(out, i);
      out = NULL;
      break;
    }
    memcpy(out[i].text, p.text + s->at, s->len);
    out[i].text[s->len] = 0;
  }
  if (!out) {
    r = err_set(e, E_NOMEM, "out of memory for a prompt of %zu bytes", n);
    goto out;
  }
  *spans = out;
  *count = p.n;
out:
  parser_close(&p);
  return r;
}

void prompt_spans_free(struct prompt_span *spans, size_t count)
{
  for (size_t i = 0; i < count; i++)
    free(spans[i].text);
  free(spans);
}

/* ---- chunks ---- */

/* The chunk that is being filled. */
struct filler {
  struct prompt_tokens *p;
  int32_t bos, eos, pad, comma;
  int32_t id[CHUNK_TEXT];
  float weight[CHUNK_TEXT];
  int n, last_comma; /* tokens so far; where the last comma is, or -1 */
};

/* Writes the first n tokens out as a chunk and keeps what follows them as the start of the next one. */
static int end_chunk(struct filler *f, int n, struct err *e)
{
  struct prompt_chunk *c = &f->p->chunk[f->p->n];

  if (f->p->n == PROMPT_MAX_CHUNKS)
    return err_set(e, E_ARG, "the prompt is too long: more than %d chunks of %d tokens", PROMPT_MAX_CHUNKS, CHUNK_TEXT);
  f->p->n++;
  for (int i = 0; i < PROMPT_CHUNK; i++) {
    c->ids[i] = i == 0 ? f->bos : i <= n ? f->id[i - 1] : i == n + 1 ? f->eos : f->pad;
    c->weights[i] = i > 0 && i <= n ? f->weight[i - 1] : 1;
  }
  f->n -= n;
  memmove(f->id, f->id + n, (size_t)f->n * sizeof *f->id);
  memmove(f->weight, f->weight + n, (size_t)f->n * sizeof *f->weight);
  f->last_comma = -1;
  return 0;
}

static int add_token(struct filler *f, int32_t id, float weight, struct err *e)
{
  int r = 0;

  if (id == f->comma)
    f->last_comma = f->n;
  else if (f->n == CHUNK_TEXT && f->last_comma >= 0 && f->n - f->last_comma <= COMMA_REACH)
    r = end_chunk(f, f->last_comma + 1, e);
  if (!r && f->n == CHUNK_TEXT)
    r = end_chunk(f, f->n, e);
  if (r)
    return r;
  f->id[f->n] = id;
  f->weight[f->n++] = weight;
  f->p->tokens++;
  if (weight != 1)
    f->p->is_weighted = 1;
  return 0;
}

static int add_text(struct filler *f, const struct tokenizer *t, const char *text, size_t n, float weight, struct err *e)
{
  int32_t *ids;
  size_t count;
  int r = tokenizer_encode(t, text, n, &ids, &count, e);

  for (size_t i = 0; !r && i < count; i++)
    r = add_token(f, ids[i], weight, e);
  free(ids);
  return r;
}

int prompt_tokenize(struct prompt_tokens *out, const struct tokenizer *t, const char *text, size_t n, int32_t pad,
                    struct err *e)
{
  struct filler f = {.p = out, .bos = tokenizer_bos(t), .eos = tokenizer_eos(t), .pad = pad, .last_comma = -1};
  struct parser p;
  int r;

  *out = (struct prompt_tokens){0};
  f.comma = tokenizer_find(t, ",</w>");
  r = parser_run(&p, text, n, e);
  if (r)
    goto out;
  out->chunk = calloc(PROMPT_MAX_CHUNKS, sizeof *out->chunk);
  if (!out->chunk) {
    r = err_set(e, E_NOMEM, "out of memory for a prompt of %zu bytes", n);
    goto out;
  }
  for (size_t i = 0; !r && i < p.n; i++) {
    const struct span *s = &p.span[i];

    r = s->is_break ? end_chunk(&f, f.n, e) : add_text(&f, t, p.text + s->at, s->len, (float)s->weight, e);
  }
  if (!r && (f.n || !out->n))
    r = end_chunk(&f, f.n, e);
out:
  parser_close(&p);
  if (r)
    prompt_tokens_close(out);
  return r;
}

void prompt_tokens_close(struct prompt_tokens *p)
{
  if (!p)
    return;
  free(p->chunk);
  *p = (struct prompt_tokens){0};
}
