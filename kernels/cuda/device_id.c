/*
 * device_id.c - see device_id.h. Called by vendor_dnn.c, vendor_compile.c. Threads: any; no state.
 */
#include "kernels/cuda/device_id.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void device_id_set(struct device_id *id, const char *name, int major, int minor, int processors, int driver)
{
  size_t n = strnlen(name, sizeof id->name - 1);

  memset(id, 0, sizeof *id);
  memcpy(id->name, name, n);
  id->major = major;
  id->minor = minor;
  id->processors = processors;
  id->driver = driver;
}

/* What stands behind "field": in a flat object, or NULL. */
static const char *value_of(const char *text, const char *field)
{
  char quoted[40];
  const char *at = text;

  snprintf(quoted, sizeof quoted, "\"%s\"", field);
  while ((at = strstr(at, quoted))) {
    at += strlen(quoted);
    at += strspn(at, " \t\r\n");
    if (*at == ':')
      return at + 1 + strspn(at + 1, " \t\r\n");
  }
  return NULL;
}

MUST_CHECK static int read_number(int *out, const char *text, const char *field, struct err *e)
{
  const char *at = value_of(text, field);
  char *end = NULL;
  long v = at ? strtol(at, &end, 10) : 0;

  if (!at || end == at || v < 1 || v > 1 << 20)
    return err_field(e, E_ARG, field, "the device's description has no \"%s\" that is a number above 0", field);
  *out = (int)v;
  return 0;
}

int device_id_read(struct device_id *id, const char *description, struct err *e)
{
  const char *at = value_of(description, "deviceName");
  size_t n = at && *at == '"' ? strcspn(at + 1, "\"\\") : 0;
  int version = 0, processors = 0, driver = 0, r;
  char name[sizeof id->name];

  if (!n || n >= sizeof name || at[1 + n] != '"')
    return err_field(e, E_ARG, "deviceName", "the device's description has no \"deviceName\" of 1 to %zu characters, as the driver gives it",
                     sizeof name - 1);
  memcpy(name, at + 1, n);
  name[n] = '\0';
  if ((r = read_number(&version, description, "deviceVer", e)) || (r = read_number(&processors, description, "multiProcessorCount", e)) ||
      (r = read_number(&driver, description, "driverVer", e)))
    return r;
  device_id_set(id, name, version / 100, version % 100 / 10, processors, driver);
  return 0;
}

int device_id_with_driver(char **out, const char *description, int driver, struct err *e)
{
  size_t size = strlen(description) + 16, before;
  int old = 0, r = driver ? read_number(&old, description, "driverVer", e) : 0;
  const char *at;

  *out = NULL;
  if (r)
    return r;
  *out = malloc(size);
  if (!*out)
    return err_set(e, E_NOMEM, "out of memory for a description");
  at = driver ? value_of(description, "driverVer") : description;
  before = (size_t)(at - description);
  memcpy(*out, description, before);
  if (driver)
    snprintf(*out + before, size - before, "%d%s", driver, at + strspn(at, "0123456789"));
  else
    snprintf(*out, size, "%s", description);
  return 0;
}
