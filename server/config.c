/*
 * config.c - see config.h. The table below is the manual. No getenv: what decides how the server runs is on its command line
 * or in its file.
 */
#include "server/config.h"

#include <errno.h>
#include <math.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "server/cors.h"
#include "server/devices.h"
#include "server/peer.h"

enum kind { TEXT, INT, NUMBER, BOOL };

struct option {
  const char *name;
  enum kind kind;
  size_t at;               /* offset in struct config */
  const char *def;
  double min, max;         /* INT and NUMBER: bounds; TEXT: max is the longest in bytes, 0 for CONFIG_TEXT - 1 */
  const char *words;       /* TEXT: "a|b|c" when only these are allowed */
  const char *help;
};

#define AT(f) offsetof(struct config, f)

static const struct option options[] = {
    {"host", TEXT, AT(host), "127.0.0.1", 0, 0, NULL,
     "Address to listen on, numeric: 127.0.0.1 for this machine only, 0.0.0.0 or :: for all interfaces."},
    {"port", INT, AT(port), "8080", 0, 65535, NULL, "Port to listen on; 0 takes a free one, which is printed."},
    {"model", TEXT, AT(model), "weights/emoji", 0, 0, NULL, "Folder of the checkpoint, in the diffusers layout."},
    {"policy", TEXT, AT(policy), "", 0, 0, NULL,
     "The safety policy: which adapters every picture is drawn under. Empty: weights/safety/policy.json for the bundled model; another "
     "model needs one of its own."},
    {"name", TEXT, AT(name), "", 0, 63, NULL, "Name that clients know the model by; empty: the checkpoint's own."},
    {"backend", TEXT, AT(backend), "auto", 0, 0, "auto|cpu|cuda|ref", "What computes: auto is the best that this machine runs."},
    {"activations", TEXT, AT(activations), "auto", 0, 0, "auto|bf16|fp16|fp32",
     "Number format of activations: auto is bf16 where the device computes in it, else fp32. fp16, on GPUs alone, has three bits more than bf16 and ends at "
     "65504: pictures whose numbers go beyond are withheld, as with SDXL's own VAE. fp32 is for processors. What the backend cannot do ends the start."},
    {"devices", TEXT, AT(devices), "0", 0, 0, NULL,
     "Which GPUs draw, such as 0,1: each has a thread and the model's weights of its own, and takes jobs from the one queue. On a processor a list makes as "
     "many engines beside each other, each with its share of the threads and, again, weights of its own."},
    {"threads", INT, AT(threads), "0", 0, 1024, NULL, "Threads that compute, of all devices together; 0: as many as the machine has."},
    {"size", INT, AT(size), "0", 0, 16384, NULL, "Width and height of a picture when the client does not say; 0: the model's own."},
    {"max_size", INT, AT(max_size), "0", 0, 16384, NULL,
     "Longest side of a picture. Memory for it is reserved at start. 0: twice the model's own size."},
    {"steps", INT, AT(steps), "20", 1, 1000, NULL, "Steps when the client does not say."},
    {"max_steps", INT, AT(max_steps), "150", 1, 1000, NULL, "Most steps that a client may ask for."},
    {"guidance", NUMBER, AT(guidance), "0", 0, 100, NULL,
     "guidance_scale when the client does not say; 0: 3 for models under 256 pixels, 7.5 for others."},
    {"max_guidance", NUMBER, AT(max_guidance), "30", 1, 100, NULL, "Largest guidance_scale."},
    {"sampler", TEXT, AT(sampler), "dpmpp_2m", 0, 31, NULL, "Sampler when the client does not say."},
    {"max_n", INT, AT(max_n), "10", 1, 10, NULL, "Most pictures in one request."},
    {"queue", INT, AT(queue), "64", 1, 4096, NULL, "Requests that may wait; one more is answered with 429."},
    {"running", INT, AT(running), "16", 1, 64, NULL,
     "Pictures that are being drawn at once on each device; each holds memory, and a GPU whose memory holds fewer says so at start and draws those. "
     "Whose step is next is chosen anew at every step."},
    {"batch", INT, AT(batch), "0", 0, 64, NULL, "Pictures that make one step together on a device; 0: as many as the backend profits from."},
    {"deadline_s", INT, AT(deadline_s), "600", 1, 86400, NULL, "Seconds a request may take, waiting included; then 504."},
    {"drain_s", INT, AT(drain_s), "30", 0, 86400, NULL,
     "Seconds that accepted requests have to finish after SIGTERM; what is left then gets 503."},
    {"client_s", INT, AT(client_s), "30", 1, 3600, NULL,
     "Seconds a client has to send its request, and a connection may lie idle. Reading an answer may take as long, and one "
     "second more for every 16 kB."},
    {"alive_s", INT, AT(alive_s), "15", 1, 3600, NULL,
     "Seconds between signs of life (a comment) in a stream of events that has no news. Proxies must wait longer than this."},
    {"max_body_kb", INT, AT(max_body_kb), "256", 1, 1 << 20, NULL, "Largest request body in kB; more is 413."},
    {"max_upload_kb", INT, AT(max_upload_kb), "32768", 1, 1 << 20, NULL, "The same for requests that carry pictures."},
    {"max_connections", INT, AT(max_connections), "4000", 1, 100000, NULL, "Open connections; more are closed at once. One takes about 17 kB."},
    {"public_url", TEXT, AT(public_url), "", 0, 0, NULL,
     "What clients call this server, such as https://pictures.example: the addresses of pictures begin with it. Empty: http:// and the Host that the client "
     "sent, which is wrong behind a proxy that speaks TLS."},
    {"cors_origins", TEXT, AT(cors_origins), "", 0, 0, NULL,
     "Origins whose web pages may use this server from a browser, such as https://app.example http://localhost:3000; * is every page, empty none but the "
     "server's own."},
    {"trusted_proxies", TEXT, AT(trusted_proxies), "", 0, 0, NULL,
     "Addresses or networks of reverse proxies whose X-Forwarded-For is believed, such as 127.0.0.1 10.0.0.0/8: who shows no key counts by that address."},
    {"page", BOOL, AT(page), "yes", 0, 0, NULL, "Serve the web page at /."},
    {"log_json", BOOL, AT(log_json), "no", 0, 0, NULL, "One JSON object per request instead of one plain line."},
    {"log_prompts", BOOL, AT(log_prompts), "no", 0, 0, NULL, "Write prompts to the log. They are private: think first."},
    {"state", TEXT, AT(state), CONFIG_STATE_DEFAULT, 1, 0, NULL,
     "Folder for what outlives the process: the audit log, its key, the history of activations. Made when it is missing; one server at a time."},
    {"results_s", INT, AT(results_s), "3600", 1, 31536000, NULL, "Seconds that the pictures of jobs, and those behind urls, are kept."},
    {"results_mb", INT, AT(results_mb), "1024", 1, 1 << 20, NULL, "MB that they may take together; the oldest go earlier when they take more."},
    {"history_s", INT, AT(history_s), "604800", 1, 31536000, NULL, "Seconds that a finished job is known."},
    {"audit_prompts", BOOL, AT(audit_prompts), "no", 0, 0, NULL,
     "Keep prompts in the audit log as they are. no: only keyed hashes, which tell whether two prompts are the same."},
    {"metadata", TEXT, AT(metadata), "full", 0, 0, "full|no_prompts|provenance",
     "What a picture's file tells: full is all that is needed to draw it again, no_prompts leaves the prompts out, provenance leaves everything "
     "out but that a model made it, which one, and under which safety generation: that stays."},
    {"png", TEXT, AT(png), "fast", 0, 0, "fast|small",
     "How PNG files are packed: fast takes a few milliseconds, small takes many times as long for some percent less."},
    {"admin", TEXT, AT(admin), "", 0, 0, NULL,
     "Where the operator's requests come in, apart from the public port: unix:PATH, 127.0.0.1:PORT, [::1]:PORT or off. Empty: unix:STATE/admin.sock. "
     "The Unix socket is for the server's own user and root; a port needs admin_token_file."},
    {"admin_token_file", TEXT, AT(admin_token_file), "", 0, 0, NULL,
     "File whose first line is the token of the admin port, 16 bytes or more; others may not read it."},
    {"admin_upload_mb", INT, AT(admin_upload_mb), "1024", 1, 16384, NULL, "Largest adapter file that may be uploaded, in MB; one at a time."},
};

enum { OPTIONS = sizeof options / sizeof *options };

static const struct option *find_option(const char *name, size_t len)
{
  for (int i = 0; i < OPTIONS; i++) {
    const char *n = options[i].name;
    size_t k = 0;
    /* --max-size and max_size are the same. */
    while (k < len && n[k] && (n[k] == name[k] || (n[k] == '_' && name[k] == '-')))
      k++;
    if (k == len && !n[k])
      return &options[i];
  }
  return NULL;
}

static int set_number(void *at, const struct option *o, const char *value, struct err *e)
{
  char *end;
  double d;

  errno = 0;
  d = strtod(value, &end);
  if (end == value || *end || errno || (o->kind == INT && !(d == floor(d))))
    return err_field(e, E_ARG, o->name, "%s must be %s, not \"%s\"", o->name, o->kind == INT ? "a whole number" : "a number",
                     value);
  if (!(d >= o->min && d <= o->max))
    return err_field(e, E_ARG, o->name, "%s must be between %g and %g, not %s", o->name, o->min, o->max, value);
  if (o->kind == INT)
    *(int *)at = (int)d;
  else
    *(float *)at = (float)d;
  return 0;
}

static int is_word(const char *words, const char *value)
{
  size_t n = strlen(value);

  for (const char *w = words; *w; w += strcspn(w, "|"), w += *w == '|')
    if (strcspn(w, "|") == n && !memcmp(w, value, n))
      return 1;
  return 0;
}

static int set_option(struct config *c, const struct option *o, const char *value, struct err *e)
{
  void *at = (char *)c + o->at;

  if (o->kind == INT || o->kind == NUMBER)
    return set_number(at, o, value, e);
  if (o->kind == BOOL) {
    int yes = is_word("yes|true|on|1", value);
    if (!yes && !is_word("no|false|off|0", value))
      return err_field(e, E_ARG, o->name, "%s must be yes or no, not \"%s\"", o->name, value);
    *(int *)at = yes;
    return 0;
  }
  if (o->words && !is_word(o->words, value))
    return err_field(e, E_ARG, o->name, "%s must be one of %s, not \"%s\"", o->name, o->words, value);
  if (strlen(value) > (o->max > 0 ? (size_t)o->max : CONFIG_TEXT - 1))
    return err_field(e, E_ARG, o->name, "%s must be at most %d bytes long", o->name, o->max > 0 ? (int)o->max : CONFIG_TEXT - 1);
  snprintf(at, CONFIG_TEXT, "%s", value);
  return 0;
}

void config_defaults(struct config *c)
{
  *c = (struct config){0};
  for (int i = 0; i < OPTIONS; i++) {
    struct err e = {0};
    int r = set_option(c, &options[i], options[i].def, &e);
    (void)r; /* tests/unit/test_config.c holds the table to its own bounds */
  }
}

/* "http://" or "https://", something, no slash at the end, nothing that would not stay one word of JSON. */
static int check_public_url(const char *url, struct err *e)
{
  static const char ok[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.-_~:/[]%";
  size_t n = strlen(url), scheme = !strncmp(url, "http://", 7) ? 7 : !strncmp(url, "https://", 8) ? 8 : 0;

  if (!n || (scheme && n > scheme && url[n - 1] != '/' && strspn(url, ok) == n))
    return 0;
  return err_field(e, E_ARG, "public_url", "public_url must begin with http:// or https:// and have no slash at its end, not \"%s\"", url);
}

/* Values that are fine alone and wrong together, and lists, whose readers know what may be in them. */
static int check_together(const struct config *c, struct err *e)
{
  struct cors cors;
  struct peer_list proxies;
  struct device_list devices;

  if (cors_read(&cors, c->cors_origins, e) || peer_read_list(&proxies, c->trusted_proxies, e) ||
      check_public_url(c->public_url, e) || devices_read(&devices, c->devices, e))
    return e->code;
  if (c->steps > c->max_steps)
    return err_field(e, E_ARG, "steps", "steps (%d) must not be more than max_steps (%d)", c->steps, c->max_steps);
  if (c->guidance > c->max_guidance)
    return err_field(e, E_ARG, "guidance", "guidance (%g) must not be more than max_guidance (%g)", (double)c->guidance,
                     (double)c->max_guidance);
  if (c->size && c->max_size && c->size > c->max_size)
    return err_field(e, E_ARG, "size", "size (%d) must not be more than max_size (%d)", c->size, c->max_size);
  return 0;
}

/* Trims spaces on both sides, in place. */
static char *trim(char *s)
{
  size_t n;

  s += strspn(s, " \t\r\n");
  for (n = strlen(s); n && strchr(" \t\r\n", s[n - 1]); n--)
    s[n - 1] = 0;
  return s;
}

static int read_line(struct config *c, char *line, struct err *e)
{
  char *s = trim(line), *eq, *name;
  const struct option *o;

  if (!*s || *s == '#')
    return 0;
  eq = strchr(s, '=');
  if (!eq)
    return err_set(e, E_ARG, "expected name = value, found \"%.80s\"", s);
  *eq = 0;
  name = trim(s);
  o = find_option(name, strlen(name));
  if (!o)
    return err_field(e, E_ARG, "config", "there is no option \"%.80s\"; --print-config lists them", name);
  return set_option(c, o, trim(eq + 1), e);
}

int config_read_file(struct config *c, const char *path, struct err *e)
{
  char line[1024];
  FILE *f = fopen(path, "r");
  int number = 0, r = 0;

  if (!f)
    return err_field(e, E_ARG, "config", "cannot read %s: %s", path, strerror(errno));
  while (!r && fgets(line, sizeof line, f)) {
    number++;
    if (strlen(line) == sizeof line - 1 && line[sizeof line - 2] != '\n')
      r = err_set(e, E_ARG, "the line is longer than %zu bytes", sizeof line - 2);
    else
      r = read_line(c, line, e);
  }
  if (!r && ferror(f))
    r = err_set(e, E_ARG, "read error");
  if (r)
    err_wrap(e, "%s line %d", path, number);
  fclose(f);
  return r;
}

/* Splits "--name=value" or "--name value" at argv[*i]; *i moves past the value. */
static int split_flag(int argc, char **argv, int *i, const char **name, size_t *len, const char **value, struct err *e)
{
  const char *a = argv[*i];

  if (strncmp(a, "--", 2) || !a[2])
    return err_set(e, E_ARG, "unexpected argument \"%.80s\"; options start with --", a);
  *name = a + 2;
  *len = strcspn(*name, "=");
  if ((*name)[*len] == '=')
    *value = *name + *len + 1;
  else if (*i + 1 < argc)
    *value = argv[++*i];
  else
    return err_set(e, E_ARG, "%s needs a value", a);
  return 0;
}

static int is_flag(const char *a, const char *flag)
{
  return !strcmp(a, flag);
}

/* pass 0 reads the file of --config, pass 1 everything else, so that flags win wherever they stand. */
static int read_flags(struct config *c, int argc, char **argv, int pass, enum config_action *action, struct err *e)
{
  const struct option *o;
  const char *name = "", *value = "";
  size_t len = 0;

  for (int i = 1; i < argc; i++) {
    if (is_flag(argv[i], "--print-config") || is_flag(argv[i], "--check") || is_flag(argv[i], "--help") ||
        is_flag(argv[i], "-h")) {
      *action = is_flag(argv[i], "--print-config") ? CONFIG_PRINT : is_flag(argv[i], "--check") ? CONFIG_CHECK : CONFIG_HELP;
      continue;
    }
    if (split_flag(argc, argv, &i, &name, &len, &value, e))
      return e->code;
    if (len == 6 && !memcmp(name, "config", 6)) {
      if (pass == 0 && config_read_file(c, value, e))
        return e->code;
      continue;
    }
    o = find_option(name, len);
    if (!o)
      return err_set(e, E_ARG, "there is no option --%.*s; `safelight serve --help` lists them", (int)(len < 80 ? len : 80),
                     name);
    if (pass == 1 && set_option(c, o, value, e))
      return e->code;
  }
  return 0;
}

int config_read(struct config *c, int argc, char **argv, enum config_action *action, struct err *e)
{
  config_defaults(c);
  *action = CONFIG_RUN;
  if (read_flags(c, argc, argv, 0, action, e) || read_flags(c, argc, argv, 1, action, e))
    return e->code;
  return check_together(c, e);
}

/* Help text folded at 100 columns, each line with the prefix. */
static void print_folded(FILE *out, const char *prefix, const char *text)
{
  size_t room = 100 - strlen(prefix);

  while (*text) {
    size_t n = strlen(text);
    if (n > room)
      for (n = room; n && text[n] != ' '; n--)
        ;
    fprintf(out, "%s%.*s\n", prefix, (int)n, text);
    text += n;
    text += strspn(text, " ");
  }
}

static void print_bounds(FILE *out, const struct option *o)
{
  if (o->words)
    fprintf(out, "%s", o->words);
  else if (o->kind == INT || o->kind == NUMBER)
    fprintf(out, "%g to %g", o->min, o->max);
  else
    fprintf(out, "%s", o->kind == BOOL ? "yes or no" : "text");
}

void config_print(const struct config *c, FILE *out)
{
  fprintf(out, "# The options of `safelight serve`. Read with --config FILE; a flag --name VALUE wins over a line here.\n");
  for (int i = 0; i < OPTIONS; i++) {
    const struct option *o = &options[i];
    const void *at = (const char *)c + o->at;
    fprintf(out, "\n");
    print_folded(out, "# ", o->help);
    fprintf(out, "# ");
    print_bounds(out, o);
    fprintf(out, "; default %s\n%s = ", *o->def ? o->def : "empty", o->name);
    if (o->kind == INT)
      fprintf(out, "%d\n", *(const int *)at);
    else if (o->kind == NUMBER)
      fprintf(out, "%.9g\n", (double)*(const float *)at);
    else if (o->kind == BOOL)
      fprintf(out, "%s\n", *(const int *)at ? "yes" : "no");
    else
      fprintf(out, "%s\n", (const char *)at);
  }
}

void config_help(FILE *out)
{
  fprintf(out, "usage: safelight serve [--config FILE] [--OPTION VALUE ...]\n"
               "       safelight serve --print-config    print the commented configuration\n"
               "       safelight serve --check           check the configuration and stop\n\noptions:\n");
  for (int i = 0; i < OPTIONS; i++) {
    fprintf(out, "  --%s  (", options[i].name);
    print_bounds(out, &options[i]);
    fprintf(out, "; default %s)\n", *options[i].def ? options[i].def : "empty");
    print_folded(out, "      ", options[i].help);
  }
}
