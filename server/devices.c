/*
 * devices.c - see devices.h.
 */
#include "server/devices.h"

#include <stddef.h>
#include <string.h>

static const char digits[] = "0123456789", spaces[] = " \t";

/* One number and the spaces around it; *text moves past them. */
static int read_number(const char **text, int *number, struct err *e)
{
  const char *s = *text + strspn(*text, spaces);
  size_t n = strspn(s, digits), after = n + strspn(s + n, spaces);

  if (!n || (s[after] && s[after] != ','))
    return err_field(e, E_ARG, "devices", "devices must be whole numbers with commas between them, such as 0,1, not \"%.80s\"", *text);
  for (size_t i = 0; i < n && *number <= DEVICES_NUMBER_MAX; i++)
    *number = *number * 10 + (s[i] - '0');
  if (*number > DEVICES_NUMBER_MAX)
    return err_field(e, E_ARG, "devices", "a number in devices must be at most %d, not %.*s", DEVICES_NUMBER_MAX, n < 20 ? (int)n : 20, s);
  *text = s + after;
  return 0;
}

int devices_read(struct device_list *l, const char *text, struct err *e)
{
  *l = (struct device_list){.n = 0};
  for (;; text++) { /* past the comma */
    int number = 0;

    if (read_number(&text, &number, e))
      return e->code;
    for (int i = 0; i < l->n; i++)
      if (l->number[i] == number)
        return err_field(e, E_ARG, "devices", "devices names %d twice: each device is used once", number);
    if (l->n == DEVICES_MAX)
      return err_field(e, E_ARG, "devices", "devices may name at most %d", DEVICES_MAX);
    l->number[l->n++] = number;
    if (!*text)
      return 0;
  }
}

int devices_threads(int threads, int n, int i)
{
  int share = threads / n + (i < threads % n);

  return share > 0 ? share : 1;
}
