/*
 * image_exif.c - the little of EXIF that concerns us. See image_codec.h. Called by the readers and writers of formats. Threads: pure functions.
 */
#include <string.h>

#include "proto/image_codec.h"

enum { TAG_ORIENTATION = 0x0112, TYPE_SHORT = 3, ENTRY = 12 };

static unsigned get16(const uint8_t *p, int is_little)
{
  return is_little ? (unsigned)p[1] << 8 | p[0] : (unsigned)p[0] << 8 | p[1];
}

static uint32_t get32(const uint8_t *p, int is_little)
{
  return is_little ? get16(p + 2, 1) << 16 | get16(p, 1) : get16(p, 0) << 16 | get16(p + 2, 0);
}

int exif_orientation(const uint8_t *tiff, size_t len)
{
  int is_little;
  uint32_t at;
  unsigned n, value;

  if (len < 8 || (memcmp(tiff, "II*\0", 4) && memcmp(tiff, "MM\0*", 4)))
    return 1;
  is_little = *tiff == 'I';
  at = get32(tiff + 4, is_little);
  if (at > len - 2)
    return 1;
  n = get16(tiff + at, is_little);
  for (size_t i = at + 2; n && i + ENTRY <= len; n--, i += ENTRY) {
    if (get16(tiff + i, is_little) != TAG_ORIENTATION)
      continue;
    value = get16(tiff + i + 8, is_little);
    return get16(tiff + i + 2, is_little) == TYPE_SHORT && value >= 1 && value <= 8 ? (int)value : 1;
  }
  return 1;
}
