/*
 * page.c - see page.h.
 */
#include "server/page.h"

#include <string.h>

#include "server/page.inc" /* static const struct page_file page_files[] */

const struct page_file *page_find(const char *path)
{
  const char *name = !strcmp(path, "/") ? "index.html" : !strcmp(path, "/favicon.ico") ? "favicon.svg" : path + 1;

  for (size_t i = 0; i < sizeof page_files / sizeof *page_files; i++)
    if (!strcmp(page_files[i].name, name))
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
