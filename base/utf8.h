/*
 * utf8.h - is this UTF-8? Called by what writes JSON and XML by hand. Threads: a pure function.
 */
#ifndef SAFELIGHT_BASE_UTF8_H
#define SAFELIGHT_BASE_UTF8_H

#include <stddef.h>

/* Bytes of the character at s (NUL terminated, not at its end), 0 when it is none: overlong forms, surrogates and what lies beyond U+10FFFF are not. */
static inline size_t utf8_length(const char *text)
{
  const unsigned char *s = (const unsigned char *)text;
  size_t n = *s < 0x80 ? 1 : *s >= 0xc2 && *s < 0xe0 ? 2 : *s >= 0xe0 && *s < 0xf0 ? 3 : *s >= 0xf0 && *s < 0xf5 ? 4 : 0;

  for (size_t i = 1; i < n; i++)
    if ((s[i] & 0xc0) != 0x80)
      return 0;
  if ((*s == 0xe0 && s[1] < 0xa0) || (*s == 0xed && s[1] >= 0xa0) || (*s == 0xf0 && s[1] < 0x90) || (*s == 0xf4 && s[1] >= 0x90))
    return 0;
  return n;
}

#endif
