/*
 * multipart.c - see multipart.h. Called by the decoders of forms. Threads: pure functions.
 *
 * A delimiter is CRLF, "--" and the boundary; the CRLF belongs to it and not to the data before. The first may stand at the very beginning of the body.
 * Each is searched once from where the last one ended, so that a body costs what its length is.
 */
#include "proto/multipart.h"

#include <stdio.h>
#include <string.h>
#include <strings.h>

enum { BOUNDARY_MAX = 70 }; /* RFC 2046 */

struct delimiter {
  char text[4 + BOUNDARY_MAX + 1]; /* CRLF, --, the boundary */
  size_t len;
};

/* ---- text of headers ---- */

static int is_token_char(char c)
{
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || (c && strchr("!#$%&'*+-.^_`|~", c));
}

static int is_boundary_char(char c)
{
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || (c && strchr("'()+_,-./:=? ", c));
}

static const char *skip_blanks(const char *s, const char *end)
{
  while (s < end && (*s == ' ' || *s == '\t'))
    s++;
  return s;
}

static int span_is(struct multipart_span s, const char *text)
{
  return s.p && s.len == strlen(text) && !strncasecmp(s.p, text, s.len);
}

/* One "; key=value" at s. The value is a token or a quoted string, whose quotes are left out and in which \" is no end; a lone backslash is one,
 * as in the paths that browsers once sent. Returns what follows, s itself when there is no parameter, NULL when it is malformed. */
static const char *read_parameter(const char *s, const char *end, struct multipart_span *key, struct multipart_span *value)
{
  const char *p = skip_blanks(s, end);

  if (p == end || *p != ';')
    return p == end ? s : NULL;
  p = skip_blanks(p + 1, end);
  if (p == end)
    return s; /* a last ';' with nothing behind it */
  *key = (struct multipart_span){p, 0};
  while (p < end && is_token_char(*p))
    p++;
  key->len = (size_t)(p - key->p);
  if (!key->len || p == end || *p++ != '=')
    return NULL;
  if (p < end && *p == '"') {
    *value = (struct multipart_span){++p, 0};
    while (p < end && *p != '"')
      p += *p == '\\' && p + 1 < end && p[1] == '"' ? 2 : 1;
    if (p >= end)
      return NULL;
    value->len = (size_t)(p++ - value->p);
  } else {
    *value = (struct multipart_span){p, 0};
    while (p < end && is_token_char(*p))
      p++;
    value->len = (size_t)(p - value->p);
  }
  return p;
}

/* ---- the boundary ---- */

static int read_boundary(struct delimiter *d, const char *content_type, struct err *e)
{
  static const char form[] = "multipart/form-data";
  const char *s, *next, *end;
  struct multipart_span key, value, found = {NULL, 0};

  if (!content_type || strncasecmp(content_type, form, sizeof form - 1) || is_token_char(content_type[sizeof form - 1]))
    return err_field(e, E_TYPE, "Content-Type", "the body must be multipart/form-data");
  s = content_type + sizeof form - 1;
  end = s + strlen(s);
  for (; (next = read_parameter(s, end, &key, &value)) && next != s; s = next) {
    if (!span_is(key, "boundary"))
      continue;
    if (found.p)
      return err_field(e, E_ARG, "Content-Type", "the Content-Type header names two boundaries");
    found = value;
  }
  if (!next)
    return err_field(e, E_ARG, "Content-Type", "the Content-Type header is malformed");
  if (!found.p)
    return err_field(e, E_ARG, "Content-Type", "the Content-Type header of a form needs a boundary (most clients set the whole header by themselves)");
  for (size_t i = 0; i < found.len; i++)
    if (!is_boundary_char(found.p[i]))
      return err_field(e, E_ARG, "Content-Type", "the boundary has a character that RFC 2046 does not allow");
  if (!found.len || found.len > BOUNDARY_MAX || found.p[found.len - 1] == ' ')
    return err_field(e, E_ARG, "Content-Type", "a boundary has 1 to %d characters, and the last is no space", BOUNDARY_MAX);
  d->len = (size_t)snprintf(d->text, sizeof d->text, "\r\n--%.*s", (int)found.len, found.p);
  return 0;
}

/* What follows a delimiter's text at s: sets *is_last and returns where the part begins, NULL when it is neither the end of the line nor "--". */
static const char *end_of_delimiter(const char *s, const char *end, int *is_last)
{
  *is_last = end - s >= 2 && s[0] == '-' && s[1] == '-';
  if (*is_last)
    s += 2;
  s = skip_blanks(s, end);
  if (*is_last && s == end)
    return s;
  return end - s >= 2 && s[0] == '\r' && s[1] == '\n' ? s + 2 : NULL;
}

/* ---- one part ---- */

static int read_disposition(struct multipart_part *part, const char *s, const char *end, struct err *e)
{
  static const char form[] = "form-data";
  struct multipart_span key, value, *to;
  const char *next;

  if (part->name.p)
    return err_set(e, E_ARG, "a part of the form has two Content-Disposition headers");
  if ((size_t)(end - s) < sizeof form - 1 || strncasecmp(s, form, sizeof form - 1))
    return err_set(e, E_ARG, "the Content-Disposition of each part of a form must be form-data");
  s += sizeof form - 1;
  for (; (next = read_parameter(s, end, &key, &value)) && next != s; s = next) {
    to = span_is(key, "name") ? &part->name : span_is(key, "filename") ? &part->filename : NULL;
    if (!to && span_is(key, "filename*") && !part->filename.p)
      part->filename = value; /* RFC 7578 forbids it; a client that sends it alone means a file */
    if (!to)
      continue;
    if (to == &part->name && to->p)
      return err_set(e, E_ARG, "a part of the form has two names");
    if (value.len > MULTIPART_NAME_MAX)
      return err_set(e, E_ARG, "a name in the form is longer than %d bytes", MULTIPART_NAME_MAX);
    *to = value;
  }
  if (!next || !part->name.p || !part->name.len || part->filename.len > MULTIPART_NAME_MAX)
    return err_set(e, E_ARG, "each part of a form needs a header like Content-Disposition: form-data; name=\"prompt\"");
  return 0;
}

static int read_header(struct multipart_part *part, const char *s, const char *end, struct err *e)
{
  struct multipart_span key = {s, 0}, value;

  while (s < end && is_token_char(*s))
    s++;
  key.len = (size_t)(s - key.p);
  if (!key.len || s == end || *s != ':')
    return err_set(e, E_ARG, "a part of the form has a malformed header; it must look like Content-Disposition: form-data; name=\"prompt\"");
  s = skip_blanks(s + 1, end);
  while (end > s && (end[-1] == ' ' || end[-1] == '\t'))
    end--;
  value = (struct multipart_span){s, (size_t)(end - s)};
  if (span_is(key, "Content-Disposition"))
    return read_disposition(part, s, end, e);
  if (span_is(key, "Content-Type"))
    part->type = value;
  if (span_is(key, "Content-Transfer-Encoding") && !span_is(value, "binary") && !span_is(value, "8bit") && !span_is(value, "7bit"))
    return err_set(e, E_ARG, "a part of the form has a Content-Transfer-Encoding; send its bytes as they are");
  return 0;
}

/* Headers up to the empty line. Sets *data to what follows it. */
static int read_headers(struct multipart_part *part, const char *s, const char *end, const char **data, struct err *e)
{
  const char *limit = end - s > MULTIPART_HEADERS_MAX ? s + MULTIPART_HEADERS_MAX : end, *eol;

  for (;; s = eol + 2) {
    eol = memmem(s, (size_t)(limit - s), "\r\n", 2);
    if (!eol && limit < end)
      return err_set(e, E_ARG, "the headers of a part of the form are longer than %d bytes", MULTIPART_HEADERS_MAX);
    if (!eol)
      return err_set(e, E_ARG, "a part of the form has no empty line between its headers and its data");
    if (eol == s)
      break;
    if (read_header(part, s, eol, e))
      return e->code;
  }
  if (!part->name.p)
    return err_set(e, E_ARG, "each part of a form needs a header like Content-Disposition: form-data; name=\"prompt\"");
  *data = eol + 2;
  return 0;
}

/* ---- the body ---- */

/* The first delimiter, which may lack its CRLF at the very beginning. Returns what follows its text. */
static const char *first_delimiter(const struct delimiter *d, const char *body, size_t len)
{
  const char *s;

  if (len >= d->len - 2 && !memcmp(body, d->text + 2, d->len - 2))
    return body + d->len - 2;
  s = memmem(body, len, d->text, d->len);
  return s ? s + d->len : NULL;
}

static int parse_parts(struct multipart *m, const struct delimiter *d, const char *body, size_t len, struct err *e)
{
  static const char bad[] = "a line of the body begins with the boundary and goes on with something else";
  const char *end = body + len, *s, *stop, *data = NULL;
  int is_last;

  s = first_delimiter(d, body, len);
  if (!s)
    return err_set(e, E_ARG, "the boundary of the Content-Type header does not occur in the body");
  if (!(s = end_of_delimiter(s, end, &is_last)))
    return err_set(e, E_ARG, bad);
  while (!is_last) {
    struct multipart_part *part = &m->part[m->n];
    if (m->n == MULTIPART_PARTS_MAX)
      return err_set(e, E_ARG, "the form has more than %d parts", MULTIPART_PARTS_MAX);
    *part = (struct multipart_part){{NULL, 0}, {NULL, 0}, {NULL, 0}, {NULL, 0}};
    if (!(stop = memmem(s, (size_t)(end - s), d->text, d->len)))
      return err_set(e, E_ARG, "the form is cut off: its closing boundary is missing");
    /* The empty line's CRLF may be the delimiter's too: then the part is empty. */
    if (read_headers(part, s, stop + 2, &data, e))
      return e->code;
    part->data = (struct multipart_span){data, data < stop ? (size_t)(stop - data) : 0};
    m->n++;
    if (!(s = end_of_delimiter(stop + d->len, end, &is_last)))
      return err_set(e, E_ARG, bad);
  }
  return 0;
}

int multipart_parse(struct multipart *m, const char *content_type, const char *body, size_t len, struct err *e)
{
  struct delimiter d;
  int r = read_boundary(&d, content_type, e);

  m->n = 0;
  if (!r)
    r = parse_parts(m, &d, body, len, e);
  if (r)
    m->n = 0;
  return r;
}

const struct multipart_part *multipart_find(const struct multipart *m, const char *name, int from)
{
  size_t len = strlen(name);

  for (int i = from; i < m->n; i++)
    if (m->part[i].name.len == len && !memcmp(m->part[i].name.p, name, len))
      return &m->part[i];
  return NULL;
}
