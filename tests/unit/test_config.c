/*
 * test_config.c - the table of options: defaults within their own bounds, flags over file over defaults, refusals that name
 * option, bound, file and line, and a printed file that reads back as itself. Threads: none.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "server/config.h"
#include "server/devices.h"

static char path[64];

static void write_file(const char *text)
{
  int fd;

  snprintf(path, sizeof path, "test_config.XXXXXX");
  fd = mkstemp(path);
  assert_true(fd >= 0);
  assert_int_equal(write(fd, text, strlen(text)), (ssize_t)strlen(text));
  close(fd);
}

static int read_args(struct config *c, enum config_action *a, struct err *e, const char *one, const char *two, const char *three)
{
  char *argv[5] = {"serve", (char *)(uintptr_t)one, (char *)(uintptr_t)two, (char *)(uintptr_t)three, NULL};
  int argc = 1 + !!one + (one && two) + (one && two && three);

  *e = (struct err){0};
  return config_read(c, argc, argv, a, e);
}

static void refused(const char *one, const char *two, const char *text)
{
  struct config c;
  enum config_action a;
  struct err e;

  if (!read_args(&c, &a, &e, one, two, NULL))
    fail_msg("%s %s was accepted", one, two ? two : "");
  if (e.code != E_ARG || !strstr(e.msg, text))
    fail_msg("%s %s: \"%s\" does not say \"%s\"", one, two ? two : "", e.msg, text);
}

/* What --print-config prints. */
static char *printed(const struct config *c)
{
  char *text = NULL;
  size_t len;
  FILE *f = open_memstream(&text, &len);

  assert_non_null(f);
  config_print(c, f);
  fclose(f);
  return text;
}

static void test_defaults(void **state)
{
  struct config c, again;
  enum config_action a;
  struct err e = {0};
  char *text;

  (void)state;
  config_defaults(&c);
  assert_string_equal(c.host, "127.0.0.1");
  assert_int_equal(c.port, 8080);
  assert_int_equal(c.running, 16);
  assert_int_equal(c.page, 1);
  assert_string_equal(c.activations, "auto");
  assert_int_equal(c.log_prompts, 0);
  assert_int_equal(c.max_guidance, 30);
  /* Each default passes its own bounds: the printed file is read by the same checks. */
  text = printed(&c);
  write_file(text);
  memset(&again, 0x55, sizeof again);
  config_defaults(&again);
  assert_int_equal(config_read_file(&again, path, &e), 0);
  assert_memory_equal(&c, &again, sizeof c);
  unlink(path);
  free(text);
  assert_int_equal(read_args(&c, &a, &e, NULL, NULL, NULL), 0);
  assert_int_equal(a, CONFIG_RUN);
}

static void test_print_reads_back(void **state)
{
  struct config c, again;
  enum config_action a;
  struct err e = {0};
  char *text;

  (void)state;
  assert_int_equal(read_args(&c, &a, &e, "--guidance=2.3", "--name=a b", "--page=off"), 0);
  text = printed(&c);
  write_file(text);
  config_defaults(&again);
  assert_int_equal(config_read_file(&again, path, &e), 0);
  assert_memory_equal(&c, &again, sizeof c);
  unlink(path);
  free(text);
}

static void test_precedence(void **state)
{
  struct config c;
  enum config_action a;
  struct err e = {0};
  char file[80];

  (void)state;
  write_file("# a comment\n\n port = 81 \nmax_size=512\npage = no\r\n");
  snprintf(file, sizeof file, "--config=%s", path);
  assert_int_equal(read_args(&c, &a, &e, "--port=82", file, "--print-config"), 0); /* the flag wins although it stands first */
  assert_int_equal(c.port, 82);
  assert_int_equal(c.max_size, 512);
  assert_int_equal(c.page, 0);
  assert_int_equal(a, CONFIG_PRINT);
  assert_int_equal(read_args(&c, &a, &e, "--max-size", "64", "--check"), 0);
  assert_int_equal(c.max_size, 64);
  assert_int_equal(a, CONFIG_CHECK);
  assert_int_equal(read_args(&c, &a, &e, "--help", NULL, NULL), 0);
  assert_int_equal(a, CONFIG_HELP);
  unlink(path);
}

static void test_refusals(void **state)
{
  char many[400];

  (void)state;
  refused("--port", "70000", "between 0 and 65535");
  refused("--port", "x", "whole number");
  refused("--port", "1.5", "whole number");
  refused("--port", "", "whole number");
  refused("--port", "nan", "whole number");
  refused("--port", NULL, "needs a value");
  refused("--guidance", "nan", "between 0 and 100");
  refused("--guidance", "1e400", "number");
  refused("--backend", "gpu", "auto|cpu|cuda|ref");
  refused("--backend", "auto|cpu", "auto|cpu|cuda|ref");
  refused("--activations", "float16", "auto|bf16|fp16|fp32");
  refused("--activations", "", "auto|bf16|fp16|fp32");
  refused("--page", "maybe", "yes or no");
  refused("--prot", "1", "no option --prot");
  refused("--por", "1", "no option --por");
  refused("port", "1", "start with --");
  refused("--", NULL, "start with --");
  refused("--steps", "999", "max_steps");
  refused("--guidance", "40", "max_guidance");
  refused("--config", "does/not/exist", "cannot read does/not/exist");
  memset(many, 'x', sizeof many - 1);
  many[sizeof many - 1] = 0;
  refused("--model", many, "at most 255 bytes");
  refused("--name", many, "at most 63 bytes");
  refused("--sampler", many, "at most 31 bytes");
}

static void test_devices(void **state)
{
  static const struct {
    const char *text;
    int n, first, last;
  } good[] = {{"0", 1, 0, 0}, {"0,1", 2, 0, 1}, {" 7 , 0,\t255 ", 3, 7, 255}, {"003,2", 2, 3, 2}, {"0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15", 16, 0, 15}};
  struct device_list l;
  enum config_action a;
  struct config c;
  struct err e;

  (void)state;
  for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
    e = (struct err){0};
    assert_int_equal(devices_read(&l, good[i].text, &e), 0);
    assert_true(l.n == good[i].n && l.number[0] == good[i].first && l.number[l.n - 1] == good[i].last);
    assert_int_equal(read_args(&c, &a, &e, "--devices", good[i].text, NULL), 0);
  }
  config_defaults(&c);
  e = (struct err){0};
  assert_int_equal(devices_read(&l, c.devices, &e), 0);
  assert_true(l.n == 1 && l.number[0] == 0);
  refused("--devices", "", "numbers with commas");
  refused("--devices", " ", "numbers with commas");
  refused("--devices", "0,", "numbers with commas");
  refused("--devices", ",0", "numbers with commas");
  refused("--devices", "0 1", "numbers with commas");
  refused("--devices", "0;1", "numbers with commas");
  refused("--devices", "-1", "numbers with commas");
  refused("--devices", "all", "numbers with commas");
  refused("--devices", "256", "at most 255");
  refused("--devices", "0,99999999999999999999999", "at most 255");
  refused("--devices", "0,1,0", "names 0 twice");
  refused("--devices", "1,01", "names 1 twice");
  refused("--devices", "0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16", "at most 16");
}

/* The shares are all there is, differ by one at most, and none is nothing. */
static void test_device_threads(void **state)
{
  (void)state;
  for (int threads = 1; threads <= 40; threads++)
    for (int n = 1; n <= DEVICES_MAX; n++) {
      int sum = 0;
      for (int i = 0; i < n; i++) {
        int share = devices_threads(threads, n, i);
        assert_true(share >= 1 && share >= threads / n && share <= threads / n + 1);
        sum += share;
      }
      assert_int_equal(sum, threads > n ? threads : n);
    }
}

static void test_file_refusals(void **state)
{
  static const struct {
    const char *text, *says;
  } files[] = {{"port = 1\nprot = 2\n", "line 2"},
               {"port\n", "name = value"},
               {"port = 99999\n", "between 0 and 65535"},
               {"nonsense = 1\n", "no option \"nonsense\""}};
  struct config c;

  (void)state;
  for (size_t i = 0; i < sizeof files / sizeof *files; i++) {
    struct err e = {0};
    write_file(files[i].text);
    config_defaults(&c);
    assert_int_equal(config_read_file(&c, path, &e), E_ARG);
    assert_non_null(strstr(e.msg, files[i].says));
    assert_non_null(strstr(e.msg, path));
    unlink(path);
  }
}

int main(void)
{
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_defaults), cmocka_unit_test(test_print_reads_back), cmocka_unit_test(test_precedence),
      cmocka_unit_test(test_refusals), cmocka_unit_test(test_file_refusals), cmocka_unit_test(test_devices), cmocka_unit_test(test_device_threads),
  };

  return cmocka_run_group_tests(tests, NULL, NULL);
}
