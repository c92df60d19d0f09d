/*
 * fuzz_form.c - forms and base64: whatever bytes come, parts lie within the body in order, and what decodes encodes to the same text. The first byte
 * chooses; a form's boundary is XX, so that the fuzzer need not guess it, or the first line.
 *
 * links: proto/multipart.c proto/base64.c base/buf.c base/err.c
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "proto/base64.h"
#include "proto/multipart.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void must(int ok)
{
  if (!ok)
    abort();
}

static void form(const char *type, const char *body, size_t len)
{
  static struct multipart m;
  const char *at = body;
  struct err e = {0};
  int r = multipart_parse(&m, type, body, len, &e);

  must(r ? (r == E_ARG || r == E_TYPE) && *e.msg && !m.n : m.n >= 0 && m.n <= MULTIPART_PARTS_MAX);
  for (int i = 0; i < m.n; i++) {
    const struct multipart_part *p = &m.part[i];
    must(p->name.p > at && p->name.len > 0 && p->name.len <= MULTIPART_NAME_MAX && p->name.p + p->name.len < p->data.p);
    must(!p->filename.p || (p->filename.p > at && p->filename.p + p->filename.len < p->data.p));
    must(!p->type.p || (p->type.p > at && p->type.p + p->type.len < p->data.p));
    at = p->data.p + p->data.len;
    must(at <= body + len);
    must(multipart_find(&m, "a", i) == NULL || multipart_find(&m, "a", i) >= p);
  }
}

static void text(const char *whole, size_t len)
{
  const char *s = base64_of_url(whole, &len);
  uint8_t *out = malloc(base64_decode_bound(len));
  struct err e = {0};
  struct buf b;
  size_t n, used = 0;

  must(out != NULL);
  buf_init(&b, len + 4);
  if (!base64_decode(out, &n, s, len, &e)) {
    must(n <= base64_decode_bound(len) && !base64_encode(&b, out, n, &e));
    for (size_t i = 0; i < len; i++)
      must(strchr(" \t\r\n", s[i]) || (used < b.len && s[i] == b.p[used++]));
    must(used == b.len);
  } else {
    must(e.code == E_ARG && *e.msg);
  }
  buf_close(&b);
  free(out);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
  char type[512], *body;
  const char *eol;
  size_t len;

  if (!size)
    return 0;
  len = size - 1;
  body = malloc(len ? len : 1); /* its own block, so that reading past the end shows */
  must(body != NULL);
  memcpy(body, data + 1, len);
  eol = memchr(body, '\n', len);
  if (data[0] % 3 == 0) {
    form("multipart/form-data; boundary=XX", body, len);
  } else if (data[0] % 3 == 1 && eol) {
    snprintf(type, sizeof type, "%.*s", (int)(eol - body < 500 ? eol - body : 500), body);
    form(type, eol + 1, len - (size_t)(eol + 1 - body));
  } else {
    text(body, len);
  }
  free(body);
  return 0;
}
