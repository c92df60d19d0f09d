/*
 * tokenizer.c - the CLIP byte-pair tokenizer; see tokenizer.h. Called by prompt.c, pipeline.c and the command line.
 *
 * Source of the method: transformers' CLIPTokenizerFast. Its steps, in its order, with what is easy to get wrong:
 *   1. NFC; then \s+ to one space; then lower case, one character at a time (so a final sigma stays sigma, and U+0130
 *      becomes two characters). Both come before the special tokens are searched: <|ENDOFTEXT|> is one.
 *   2. Special tokens cut the text. The split pattern sees the pieces between them.
 *   3. A word is turned into bytes, a byte into the printable character that stands for it, the last one with </w>.
 *   4. The pair with the lowest rank merges first, the leftmost of equals; one pair at a time.
 * Steps 1 and the character classes are in unicode.c.
 *
 * Cost: O(n log n) for n bytes of any content: merging uses a heap because one word may be the whole text.
 *
 * Invariants after open: ids are exactly 0 .. size-1; both parts and the result of every merge are ids; ranks are unique.
 * Threads: nothing is written after open.
 */
#include "models/tokenizer.h"

#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>

#include "base/json_load.h"
#include "models/unicode.h"

#define WORD_END "</w>"
#define BOS "<|startoftext|>"
#define EOS "<|endoftext|>"

enum {
  MAX_FILE = 4 << 20,     /* bytes; the files of CLIP have 1 MB and 0.5 MB */
  MAX_TOKENS = 1 << 18,   /* CLIP: 49,408 */
  MAX_TOKEN = 256,        /* bytes of one token; CLIP: 34 */
  MAX_TEXT = 16 << 20     /* bytes of one text: positions fit 32 bits with every expansion */
};

/* One slot of the table of merges, open addressing with linear probing. */
struct merge {
  uint64_t key;   /* left id in the high half, right id in the low half */
  int32_t rank;   /* -1: the slot is free */
  int32_t id;     /* of the merged token */
};

struct tokenizer {
  json_t *vocab;                /* token -> id; jansson's object is the hash table for strings */
  int32_t size, bos, eos;
  int32_t byte_id[2][256];      /* [is last of its word][byte] */
  struct merge *merge;          /* mask + 1 slots, a power of two, at most half full */
  size_t mask;
};

/* ---- opening ---- */

static size_t hash_pair(uint64_t key)
{
  key = (key ^ key >> 32) * 0x9e3779b97f4a7c15u;
  return (size_t)(key ^ key >> 29);
}

/* The slot that holds the pair, or the free one where it would go. */
static struct merge *find_merge(const struct tokenizer *t, int32_t left, int32_t right)
{
  uint64_t key = (uint64_t)left << 32 | (uint32_t)right;
  size_t i = hash_pair(key) & t->mask;

  while (t->merge[i].rank >= 0 && t->merge[i].key != key)
    i = (i + 1) & t->mask;
  return &t->merge[i];
}

static int32_t find_token(const struct tokenizer *t, const char *token)
{
  const json_t *v = json_object_get(t->vocab, token);

  return v ? (int32_t)json_integer_value(v) : -1;
}

/* A token as it may stand in a message: ASCII, bounded. */
static const char *show_token(char out[40], const char *token)
{
  size_t i;

  for (i = 0; i < 36 && token[i]; i++)
    out[i] = token[i] > ' ' && token[i] < 127 ? token[i] : '?';
  out[i] = 0;
  return out;
}

/* Every entry is a token of sane length and an id; the ids are 0 .. size-1, each once. */
static int check_vocab(const struct tokenizer *t, const char *name, unsigned char *seen, struct err *e)
{
  char shown[40];
  const char *token;
  json_t *v;

  json_object_foreach(t->vocab, token, v) {
    json_int_t id = json_integer_value(v);
    size_t n = strlen(token);

    if (!n || n > MAX_TOKEN)
      return err_field(e, E_FILE, "vocab.json", "%s: a token has %zu bytes; allowed are 1 to %d", name, n, MAX_TOKEN);
    if (!json_is_integer(v))
      return err_field(e, E_FILE, "vocab.json", "%s: the id of %s is not an integer", name, show_token(shown, token));
    if (id < 0 || id >= t->size)
      return err_field(e, E_FILE, "vocab.json", "%s: %s has id %lld, but the ids of %d tokens are 0 to %d", name,
                       show_token(shown, token), (long long)id, t->size, t->size - 1);
    if (seen[id])
      return err_field(e, E_FILE, "vocab.json", "%s: %s has id %lld, which another token has too", name,
                       show_token(shown, token), (long long)id);
    seen[id] = 1;
  }
  return 0;
}

static int load_vocab(struct tokenizer *t, const char *p, size_t n, const char *name, struct err *e)
{
  json_error_t je;
  unsigned char *seen;
  size_t count;
  int r;

  if (n > MAX_FILE)
    return err_field(e, E_FILE, "vocab.json", "%s: larger than %d bytes", name, MAX_FILE);
  t->vocab = json_load_whole(p, n, JSON_REJECT_DUPLICATES, &je);
  if (!t->vocab && json_error_code(&je) == json_error_out_of_memory)
    return err_set(e, E_NOMEM, "%s: no memory to read it", name);
  if (!t->vocab)
    return err_field(e, E_FILE, "vocab.json", "%s: line %d: %s", name, je.line, je.text);
  count = json_object_size(t->vocab);
  if (!json_is_object(t->vocab) || !count || count > MAX_TOKENS)
    return err_field(e, E_FILE, "vocab.json", "%s: must be an object of 1 to %d tokens", name, MAX_TOKENS);
  t->size = (int32_t)count;

  seen = calloc(count, 1);
  if (!seen)
    return err_set(e, E_NOMEM, "out of memory for %zu tokens", count);
  r = check_vocab(t, name, seen, e);
  free(seen);
  if (r)
    return r;

  t->bos = find_token(t, BOS);
  t->eos = find_token(t, EOS);
  if (t->bos < 0 || t->eos < 0)
    return err_field(e, E_FILE, "vocab.json", "%s: has no %s", name, t->bos < 0 ? BOS : EOS);
  return 0;
}

/* Which id starts off each byte: bytes that print as themselves in Latin-1 stand for themselves, the others for U+0100 and
 * up in order (GPT-2's bytes_to_unicode). A byte without a token becomes the unknown token, which is the end mark. */
static void load_bytes(struct tokenizer *t)
{
  int32_t next = 256;

  for (int b = 0; b < 256; b++) {
    int is_self = (b >= 33 && b <= 126) || (b >= 161 && b != 173);
    char token[8 + sizeof WORD_END] = {0};
    utf8proc_ssize_t n = utf8proc_encode_char(is_self ? b : next++, (utf8proc_uint8_t *)token);
    int32_t id = find_token(t, token);

    t->byte_id[0][b] = id < 0 ? t->eos : id;
    memcpy(token + n, WORD_END, sizeof WORD_END);
    id = find_token(t, token);
    t->byte_id[1][b] = id < 0 ? t->eos : id;
  }
}

/* One line "left right" of merges.txt becomes the merge of that rank. */
static int add_merge(struct tokenizer *t, const char *line, size_t n, int32_t rank, const char *name, size_t number,
                     struct err *e)
{
  char left[2 * MAX_TOKEN + 2], right[MAX_TOKEN + 1];
  const char *space = memchr(line, ' ', n);
  size_t nl = space ? (size_t)(space - line) : 0, nr = space ? n - nl - 1 : 0;
  struct merge *m;
  int32_t a, b, c;

  if (!nl || !nr || nl > MAX_TOKEN || nr > MAX_TOKEN || memchr(space + 1, ' ', nr) || memchr(line, 0, n))
    return err_field(e, E_FILE, "merges.txt", "%s: line %zu is not two tokens of at most %d bytes with a space between",
                     name, number, MAX_TOKEN);
  memcpy(left, line, nl);
  left[nl] = 0;
  memcpy(right, space + 1, nr);
  right[nr] = 0;
  a = find_token(t, left);
  b = find_token(t, right);
  memcpy(left + nl, right, nr + 1);
  c = find_token(t, left);
  if (a < 0 || b < 0 || c < 0)
    return err_field(e, E_FILE, "merges.txt", "%s: line %zu: the %s is not in the vocabulary", name, number,
                     a < 0 ? "left token" : b < 0 ? "right token" : "merged token");
  m = find_merge(t, a, b);
  if (m->rank >= 0)
    return err_field(e, E_FILE, "merges.txt", "%s: line %zu repeats an earlier merge", name, number);
  *m = (struct merge){.key = (uint64_t)a << 32 | (uint32_t)b, .rank = rank, .id = c};
  return 0;
}

static int load_merges(struct tokenizer *t, const char *p, size_t n, const char *name, struct err *e)
{
  const char *end = p + n, *q = p, *eol;
  size_t lines = 1, slots = 16, number = 0;
  int32_t rank = 0;
  int r;

  if (n > MAX_FILE)
    return err_field(e, E_FILE, "merges.txt", "%s: larger than %d bytes", name, MAX_FILE);
  while (n && (q = memchr(q, '\n', (size_t)(end - q)))) {
    q++;
    lines++;
  }
  while (slots < 2 * lines)
    slots *= 2;
  t->merge = malloc(slots * sizeof *t->merge);
  if (!t->merge)
    return err_set(e, E_NOMEM, "out of memory for %zu merges", lines);
  t->mask = slots - 1;
  for (size_t i = 0; i < slots; i++)
    t->merge[i] = (struct merge){.rank = -1};

  for (q = p; q < end; q = eol + 1) {
    size_t len;

    eol = memchr(q, '\n', (size_t)(end - q));
    if (!eol)
      eol = end;
    len = (size_t)(eol - q);
    number++;
    if (len && q[len - 1] == '\r')
      len--;
    if (number == 1 && memmem(q, len, "#version", 8))
      continue; /* the first line of published files; OpenAI's own has the file's name before it */
    if (!len && eol + 1 >= end)
      break;
    r = add_merge(t, q, len, rank++, name, number, e);
    if (r)
      return r;
  }
  return 0;
}

static int open_named(struct tokenizer **out, const char *vocab, size_t nvocab, const char *vocab_name, const char *merges,
                      size_t nmerges, const char *merges_name, struct err *e)
{
  struct tokenizer *t = calloc(1, sizeof *t);
  int r;

  *out = NULL;
  if (!t)
    return err_set(e, E_NOMEM, "out of memory for a tokenizer");
  r = load_vocab(t, vocab, nvocab, vocab_name, e);
  if (!r)
    r = load_merges(t, merges, nmerges, merges_name, e);
  if (r) {
    tokenizer_close(t);
    return r;
  }
  load_bytes(t);
  *out = t;
  return 0;
}

int tokenizer_open_memory(struct tokenizer **t, const char *vocab, size_t nvocab, const char *merges, size_t nmerges,
                          struct err *e)
{
  return open_named(t, vocab, nvocab, "vocab.json", merges, nmerges, "merges.txt", e);
}

/* dir/name as malloc'ed bytes. One byte past the limit is read, so that a file that grows or a pipe is refused too. */
static int read_file(const char *dir, const char *name, char *path, size_t npath, char **p, size_t *n, struct err *e)
{
  FILE *f = NULL;
  int r = 0;

  *p = NULL;
  if (snprintf(path, npath, "%s/%s", dir, name) >= (int)npath)
    return err_field(e, E_FILE, name, "the path of the tokenizer's folder is too long");
  f = fopen(path, "rb");
  if (!f)
    return err_field(e, E_FILE, name, "%s: cannot be opened: %m", path);
  *p = malloc(MAX_FILE + 1);
  if (!*p) {
    r = err_set(e, E_NOMEM, "out of memory for %s", path);
    goto out;
  }
  *n = fread(*p, 1, MAX_FILE + 1, f);
  if (ferror(f))
    r = err_field(e, E_FILE, name, "%s: cannot be read: %m", path);
out:
  fclose(f);
  return r;
}

int tokenizer_open(struct tokenizer **t, const char *dir, struct err *e)
{
  char vocab_path[4096], merges_path[4096], *vocab = NULL, *merges = NULL;
  size_t nvocab, nmerges;
  int r;

  *t = NULL;
  r = read_file(dir, "vocab.json", vocab_path, sizeof vocab_path, &vocab, &nvocab, e);
  if (r)
    goto out;
  r = read_file(dir, "merges.txt", merges_path, sizeof merges_path, &merges, &nmerges, e);
  if (r)
    goto out;
  r = open_named(t, vocab, nvocab, vocab_path, merges, nmerges, merges_path, e);
out:
  free(vocab);
  free(merges);
  return r;
}

void tokenizer_close(struct tokenizer *t)
{
  if (!t)
    return;
  json_decref(t->vocab);
  free(t->merge);
  free(t);
}

int32_t tokenizer_bos(const struct tokenizer *t)
{
  return t->bos;
}

int32_t tokenizer_eos(const struct tokenizer *t)
{
  return t->eos;
}

int32_t tokenizer_size(const struct tokenizer *t)
{
  return t->size;
}

int32_t tokenizer_find(const struct tokenizer *t, const char *token)
{
  return find_token(t, token);
}

/* ---- splitting ---- */

static size_t match_ascii(const int32_t *c, size_t n, const char *s)
{
  size_t i;

  for (i = 0; s[i]; i++)
    if (i >= n || c[i] != s[i])
      return 0;
  return i;
}

/* Length of the special token at the start of c, or 0; its id in *id. */
static size_t match_special(const struct tokenizer *t, const int32_t *c, size_t n, int32_t *id)
{
  size_t len;

  if (!n || c[0] != '<')
    return 0;
  *id = t->bos;
  len = match_ascii(c, n, BOS);
  if (len)
    return len;
  *id = t->eos;
  return match_ascii(c, n, EOS);
}

/* Length of the word at the start of c (n >= 1, no white space, no special token there): the split pattern. */
static size_t match_word(const struct tokenizer *t, const int32_t *c, size_t n)
{
  static const char *const suffix[] = {"'s", "'t", "'re", "'ve", "'m", "'ll", "'d"};
  int32_t ignored;
  size_t i = 1;

  for (size_t k = 0; c[0] == '\'' && k < sizeof suffix / sizeof *suffix; k++) {
    size_t len = match_ascii(c, n, suffix[k]);
    if (len)
      return len;
  }
  if (unicode_is_number(c[0]))
    return 1;
  if (unicode_is_letter(c[0])) {
    while (i < n && unicode_is_letter(c[i]))
      i++;
    return i;
  }
  while (i < n && !unicode_is_space(c[i]) && !unicode_is_letter(c[i]) && !unicode_is_number(c[i]) &&
         !match_special(t, c + i, n - i, &ignored))
    i++;
  return i;
}

/* ---- merging ---- */

struct symbol {
  int32_t id;         /* -1: merged into its left neighbour */
  int32_t prev, next; /* positions; -1 at the ends */
};

/* What one call of encode works with; grows to the longest word. */
struct work {
  struct symbol *sym;
  uint64_t *heap;     /* candidate merges: rank in the high half, position of the left symbol in the low half */
  size_t cap, nheap;  /* cap symbols, 3 * cap candidates: one per pair at first, two more per merge */
  int32_t *ids;
  size_t nids, cap_ids;
};

static int reserve(struct work *w, size_t nsym, struct err *e)
{
  void *p;

  if (nsym > w->cap) {
    p = realloc(w->sym, nsym * sizeof *w->sym);
    if (!p)
      goto nomem;
    w->sym = p;
    p = realloc(w->heap, 3 * nsym * sizeof *w->heap);
    if (!p)
      goto nomem;
    w->heap = p;
    w->cap = nsym;
  }
  if (w->cap_ids - w->nids < nsym) {
    size_t cap = 2 * w->cap_ids + nsym + 64;
    p = realloc(w->ids, cap * sizeof *w->ids);
    if (!p)
      goto nomem;
    w->ids = p;
    w->cap_ids = cap;
  }
  return 0;
nomem:
  return err_set(e, E_NOMEM, "out of memory for a word of %zu bytes", nsym);
}

static void heap_push(struct work *w, uint64_t v)
{
  size_t i = w->nheap++;

  for (; i && w->heap[(i - 1) / 2] > v; i = (i - 1) / 2)
    w->heap[i] = w->heap[(i - 1) / 2];
  w->heap[i] = v;
}

static uint64_t heap_pop(struct work *w)
{
  uint64_t top = w->heap[0], v = w->heap[--w->nheap];
  size_t i = 0, k;

  while ((k = 2 * i + 1) < w->nheap) {
    if (k + 1 < w->nheap && w->heap[k + 1] < w->heap[k])
      k++;
    if (w->heap[k] >= v)
      break;
    w->heap[i] = w->heap[k];
    i = k;
  }
  w->heap[i] = v;
  return top;
}

/* The merge of the symbol at pos with its right neighbour, or NULL. */
static const struct merge *merge_at(const struct tokenizer *t, const struct work *w, int32_t pos)
{
  const struct symbol *s = &w->sym[pos];
  const struct merge *m;

  if (s->id < 0 || s->next < 0)
    return NULL;
  m = find_merge(t, s->id, w->sym[s->next].id);
  return m->rank < 0 ? NULL : m;
}

static void push_candidate(const struct tokenizer *t, struct work *w, int32_t pos)
{
  const struct merge *m = pos < 0 ? NULL : merge_at(t, w, pos);

  if (m)
    heap_push(w, (uint64_t)m->rank << 32 | (uint32_t)pos);
}

/* Appends the ids of one word given as its n symbols in w->sym. Ranks are unique, so a candidate is stale exactly when the
 * pair that now stands at its position has another rank or none. */
static void merge_word(const struct tokenizer *t, struct work *w, int32_t n)
{
  w->nheap = 0;
  for (int32_t i = 0; i < n; i++)
    push_candidate(t, w, i);
  while (w->nheap) {
    uint64_t top = heap_pop(w);
    int32_t pos = (int32_t)(uint32_t)top;
    const struct merge *m = merge_at(t, w, pos);
    struct symbol *s = &w->sym[pos], *right;

    if (!m || (uint64_t)m->rank != top >> 32)
      continue;
    right = &w->sym[s->next];
    s->id = m->id;
    right->id = -1;
    s->next = right->next;
    if (s->next >= 0)
      w->sym[s->next].prev = pos;
    push_candidate(t, w, s->prev);
    push_candidate(t, w, pos);
  }
  for (int32_t i = 0; i >= 0; i = w->sym[i].next)
    w->ids[w->nids++] = w->sym[i].id;
}

/* Appends the ids of the word c[0..n), n >= 1. */
static int encode_word(const struct tokenizer *t, struct work *w, const int32_t *c, size_t n, struct err *e)
{
  int32_t k = 0;
  int r = reserve(w, 4 * n, e);

  if (r)
    return r;
  for (size_t i = 0; i < n; i++) {
    utf8proc_uint8_t bytes[4];
    utf8proc_ssize_t len = utf8proc_encode_char(c[i], bytes);

    for (utf8proc_ssize_t j = 0; j < len; j++, k++)
      w->sym[k] = (struct symbol){t->byte_id[i + 1 == n && j + 1 == len][bytes[j]], k - 1, k + 1};
  }
  w->sym[k - 1].next = -1;
  merge_word(t, w, k);
  return 0;
}

int tokenizer_encode(const struct tokenizer *t, const char *text, size_t n, int32_t **ids, size_t *count, struct err *e)
{
  struct work w = {0};
  int32_t *c = NULL, special;
  size_t len, nc;
  int r;

  *ids = NULL;
  *count = 0;
  if (n > MAX_TEXT)
    return err_set(e, E_TOOBIG, "the text has %zu bytes; the limit is %d", n, MAX_TEXT);
  r = unicode_normalize(text, n, &c, &nc, e);
  for (size_t i = 0; !r && i < nc; i += len) {
    if (unicode_is_space(c[i])) {
      len = 1;
    } else if ((len = match_special(t, c + i, nc - i, &special))) {
      r = reserve(&w, 1, e);
      if (!r)
        w.ids[w.nids++] = special;
    } else {
      len = match_word(t, c + i, nc - i);
      r = encode_word(t, &w, c + i, len, e);
    }
  }
  free(c);
  free(w.sym);
  free(w.heap);
  if (r || !w.nids) {
    free(w.ids);
    return r;
  }
  *ids = w.ids;
  *count = w.nids;
  return 0;
}
