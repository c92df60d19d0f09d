/*
 * page.h - the files of the web page and of the operator's page, built into the program (tools/embed makes page.inc from server/page/).
 *
 * Called by http.c and admin.c, which serve one page each. Threads: constant data.
 */
#ifndef SAFELIGHT_SERVER_PAGE_H
#define SAFELIGHT_SERVER_PAGE_H

#include <stddef.h>

struct page_file {
  const char *name;            /* "index.html" */
  const unsigned char *data;
  size_t len;
  const char *etag;            /* quoted, changes with the content */
};

/* What both pages may do: their own files, their own server, nothing else. */
#define PAGE_POLICY \
  "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; " \
  "frame-ancestors 'none'"

enum page { PAGE_PUBLIC, PAGE_OPERATOR };

/* The file of this page that the path asks for ("/" is its HTML); NULL when there is none. */
const struct page_file *page_find(enum page page, const char *path);
const char *page_type(const struct page_file *f); /* content type */

#endif
