/*
 * page.h - the web page's files, built into the program (tools/embed makes page.inc from server/page/).
 *
 * Called by http.c. Threads: constant data.
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

/* The file that the path asks for ("/" is index.html); NULL when there is none. */
const struct page_file *page_find(const char *path);
const char *page_type(const struct page_file *f); /* content type */

#endif
