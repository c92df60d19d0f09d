/*
 * unicode.c - see unicode.h. Called by tokenizer.c and prompt.c.
 *
 * utf8proc holds the Unicode data. Its utf8proc_decompose is not used: it sorts a run of combining marks in quadratic time,
 * which a client could make last for a second; here canonical ordering is a counting sort.
 */
#include "models/unicode.h"

#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>

enum { MAX_DECOMPOSED = 8 }; /* code points from one; Unicode's longest canonical decomposition has 4 */

int unicode_check(const char *text, size_t n, struct err *e)
{
  utf8proc_int32_t c;

  for (size_t i = 0; i < n;) {
    utf8proc_ssize_t k = utf8proc_iterate((const utf8proc_uint8_t *)text + i, (utf8proc_ssize_t)(n - i), &c);
    if (k <= 0)
      return err_set(e, E_ARG, "the text is not UTF-8: bad byte at offset %zu", i);
    i += (size_t)k;
  }
  return 0;
}

int unicode_is_space(int32_t c)
{
  return (c >= 9 && c <= 13) || c == 32 || c == 0x85 || c == 0xa0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200a) ||
         c == 0x2028 || c == 0x2029 || c == 0x202f || c == 0x205f || c == 0x3000;
}

int unicode_is_letter(int32_t c)
{
  utf8proc_category_t k = utf8proc_category(c);

  return k >= UTF8PROC_CATEGORY_LU && k <= UTF8PROC_CATEGORY_LO;
}

int unicode_is_number(int32_t c)
{
  utf8proc_category_t k = utf8proc_category(c);

  return k >= UTF8PROC_CATEGORY_ND && k <= UTF8PROC_CATEGORY_NO;
}

static unsigned combining_class(int32_t c)
{
  return (unsigned)utf8proc_get_property(c)->combining_class & 255;
}

/* Canonical ordering: every run of combining marks sorted by class, equals kept in order. tmp holds as many as c. */
static void order_marks(int32_t *c, int32_t *tmp, size_t n)
{
  size_t i = 0, start, count[256];

  while (i < n) {
    if (!combining_class(c[i])) {
      i++;
      continue;
    }
    for (start = i; i < n && combining_class(c[i]); i++)
      ;
    if (i - start < 2)
      continue;
    memset(count, 0, sizeof count);
    for (size_t k = start; k < i; k++)
      count[combining_class(c[k])]++;
    for (size_t k = 0, sum = 0; k < 256; k++) {
      size_t m = count[k];
      count[k] = sum;
      sum += m;
    }
    for (size_t k = start; k < i; k++)
      tmp[count[combining_class(c[k])]++] = c[k];
    memcpy(c + start, tmp, (i - start) * sizeof *c);
  }
}

/* Canonical decomposition of UTF-8 into *c, malloc'ed with twice the room (the second half is scratch). */
static int decompose(const char *text, size_t n, int32_t **c, size_t *count, struct err *e)
{
  size_t cap = 2 * n + MAX_DECOMPOSED, m = 0;
  int32_t *buf = malloc(2 * cap * sizeof *buf), *bigger;

  for (size_t i = 0; buf && i < n;) {
    utf8proc_int32_t cp;
    utf8proc_ssize_t k = utf8proc_iterate((const utf8proc_uint8_t *)text + i, (utf8proc_ssize_t)(n - i), &cp);

    if (k <= 0) {
      free(buf);
      return err_set(e, E_ARG, "the text is not UTF-8: bad byte at offset %zu", i);
    }
    i += (size_t)k;
    if (cap - m < MAX_DECOMPOSED) {
      cap *= 2;
      bigger = realloc(buf, 2 * cap * sizeof *buf);
      if (!bigger)
        free(buf);
      buf = bigger;
      if (!buf)
        break;
    }
    k = utf8proc_decompose_char(cp, buf + m, MAX_DECOMPOSED, UTF8PROC_STABLE | UTF8PROC_COMPOSE, NULL);
    if (k < 0 || k > MAX_DECOMPOSED) {
      free(buf);
      return err_set(e, E_INTERNAL, "U+%04X has a decomposition of %d characters", (unsigned)cp, (int)k);
    }
    m += (size_t)k;
  }
  if (!buf)
    return err_set(e, E_NOMEM, "out of memory for a text of %zu bytes", n);
  order_marks(buf, buf + cap, m);
  *c = buf;
  *count = m;
  return 0;
}

int unicode_normalize(const char *text, size_t n, int32_t **out, size_t *count, struct err *e)
{
  utf8proc_ssize_t m;
  int32_t *c = NULL, *low;
  size_t k = 0;
  int r;

  *out = NULL;
  *count = 0;
  r = decompose(text, n, &c, count, e);
  if (r)
    return r;
  m = utf8proc_normalize_utf32(c, (utf8proc_ssize_t)*count, UTF8PROC_STABLE | UTF8PROC_COMPOSE);
  if (m < 0) {
    free(c);
    return err_set(e, E_INTERNAL, "cannot compose the text: %s", utf8proc_errmsg(m));
  }
  low = malloc((2 * (size_t)m + 1) * sizeof *low);
  if (!low) {
    free(c);
    return err_set(e, E_NOMEM, "out of memory for a text of %zu bytes", n);
  }
  for (utf8proc_ssize_t i = 0; i < m; i++) {
    if (c[i] == 0x130) { /* the one character whose lower case is two */
      low[k++] = 'i';
      low[k++] = 0x307;
    } else {
      low[k++] = utf8proc_tolower(c[i]);
    }
  }
  free(c);
  *out = low;
  *count = k;
  return 0;
}
