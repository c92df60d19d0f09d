/*
 * page.c - see page.h.
 */
#include "server/page.h"

#include <string.h>

#include "server/page.inc" /* static const struct page_file page_files[] */

/* Whose a file is, by its name: operator.* is the operator's, some are both's, the rest is the public page's. */
static int is_of(enum page page, const char *name)
{
  int is_shared = !strcmp(name, "style.css") || !strcmp(name, "common.js") || !strcmp(name, "favicon.svg");

  return is_shared || !strncmp(name, "operator.", 9) == (page == PAGE_OPERATOR);
}

const struct page_file *page_find(enum page page, const char *path)
{
  const char *index = page == PAGE_OPERATOR ? "operator.html" : "index.html";
  const char *name = !strcmp(path, "/") ? index : !strcmp(path, "/favicon.ico") ? "favicon.svg" : path + 1;

  for (size_t i = 0; i < sizeof page_files / sizeof *page_files; i++)
    if (!strcmp(page_files[i].name, name) && is_of(page, name))
      return &page_files[i];
  return NULL;
}

const char *page_type(const struct page_file *f)
{
  const char *dot = strrchr(f->name, '.');

  if (!strcmp(dot, ".html"))
    return "text/html; charset=utf-8";
  if (!strcmp(dot, ".css"))
    return "text/css; charset=utf-8";
  if (!strcmp(dot, ".js"))
    return "text/javascript; charset=utf-8";
  return "image/svg+xml";
}
