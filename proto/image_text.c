/*
 * image_text.c - the texts in a picture's file: the recipe as A1111 writes it, and where the picture comes from, as XMP. See image.h.
 *
 * Called by image.c. Threads: pure functions.
 */
#include <string.h>

#include "base/utf8.h"
#include "proto/image.h"

/* A1111's quote(): as it is, or a JSON string when the parser of the line would trip over it. */
static int add_value(struct buf *out, const char *s, struct err *e)
{
  if (!strpbrk(s, ",\n:"))
    return buf_add_str(out, s, e);
  if (buf_add_str(out, "\"", e))
    return e->code;
  for (; *s; s++) {
    char two[3] = {'\\', *s, 0};
    if (*s == '\n')
      two[1] = 'n';
    else if (*s != '"' && *s != '\\') {
      two[0] = *s;
      two[1] = 0;
    }
    if (buf_add_str(out, two, e))
      return e->code;
  }
  return buf_add_str(out, "\"", e);
}

static int has(const char *s)
{
  return s && *s;
}

static int add_prompts(struct buf *out, const struct recipe *r, struct err *e)
{
  if (buf_add_str(out, r->prompt, e) || buf_add_str(out, "\n", e))
    return e->code;
  if (*r->negative && (buf_add_str(out, "Negative prompt: ", e) || buf_add_str(out, r->negative, e) || buf_add_str(out, "\n", e)))
    return e->code;
  return 0;
}

/* Which version of the weights made the picture, and under whose rules. */
static int add_generation(struct buf *out, const struct recipe *r, struct err *e)
{
  if (has(r->generation_id) && (buf_add_str(out, ", Generation: ", e) || add_value(out, r->generation_id, e)))
    return e->code;
  if (has(r->generation_digest) && (buf_add_str(out, ", Generation digest: ", e) || add_value(out, r->generation_digest, e)))
    return e->code;
  if (has(r->profile) && (buf_add_str(out, ", Safety profile: ", e) || add_value(out, r->profile, e)))
    return e->code;
  if (r->requires_nothing && buf_add_str(out, ", Safety: " IMAGE_UNSAFE, e))
    return e->code;
  return has(r->styles) && (buf_add_str(out, ", Styles: ", e) || add_value(out, r->styles, e)) ? e->code : 0;
}

int image_parameters(struct buf *out, const struct recipe *r, enum image_detail detail, struct err *e)
{
  if (detail == IMAGE_FULL && add_prompts(out, r, e))
    return e->code;
  if (buf_addf(out, e, "Steps: %d, Sampler: ", r->steps) || add_value(out, r->sampler_label, e) ||
      (r->karras && buf_add_str(out, ", Schedule type: Karras", e)) ||
      buf_addf(out, e, ", CFG scale: %g, Seed: %llu, Size: %dx%d", (double)r->guidance, (unsigned long long)r->seed, r->width,
               r->height) ||
      (*r->model_digest && buf_addf(out, e, ", Model hash: %.10s", r->model_digest)) || buf_add_str(out, ", Model: ", e) ||
      add_value(out, r->model, e) || (r->strength > 0 && buf_addf(out, e, ", Denoising strength: %g", (double)r->strength)) ||
      (r->clip_skip > 1 && buf_addf(out, e, ", Clip skip: %d", r->clip_skip)) ||
      (r->cut_at && buf_addf(out, e, ", Interrupted at step: %d", r->cut_at)) || add_generation(out, r, e))
    return e->code;
  return buf_addf(out, e, ", Version: safelight %s", r->version);
}

/* ---- XMP ---- */

/* Text as an attribute's value: what XML cannot say (most control characters, what is not UTF-8) becomes U+FFFD; white space that a parser
 * would turn into spaces is written as references. */
static int add_escaped(struct buf *out, const char *s, struct err *e)
{
  while (*s) {
    unsigned char c = (unsigned char)*s;
    size_t n = utf8_length(s);
    int r;
    if (c == '&' || c == '<' || c == '>' || c == '"' || c == '\'' || c == '\t' || c == '\n' || c == '\r')
      r = buf_addf(out, e, "&#%d;", c);
    else if (n == 0 || c < 0x20 || c == 0x7f || (n == 3 && (!memcmp(s, "\xef\xbf\xbe", 3) || !memcmp(s, "\xef\xbf\xbf", 3))))
      r = buf_add_str(out, "\xef\xbf\xbd", e);
    else
      r = buf_add(out, s, n, e);
    if (r)
      return r;
    s += n ? n : 1;
  }
  return 0;
}

static int add_property(struct buf *out, const char *name, const char *value, struct err *e)
{
  if (!has(value))
    return 0;
  return buf_addf(out, e, "\n    %s=\"", name) || add_escaped(out, value, e) || buf_add_str(out, "\"", e) ? e->code : 0;
}

int image_xmp(struct buf *out, const struct recipe *r, struct err *e)
{
  static const char head[] =
      "<?xpacket begin=\"\xef\xbb\xbf\" id=\"W5M0MpCehiHzreSzNTczkc9d\"?>\n<x:xmpmeta xmlns:x=\"adobe:ns:meta/\">\n"
      "<rdf:RDF xmlns:rdf=\"http://www.w3.org/1999/02/22-rdf-syntax-ns#\">\n  <rdf:Description rdf:about=\"\"\n"
      "    xmlns:xmp=\"http://ns.adobe.com/xap/1.0/\"\n    xmlns:Iptc4xmpExt=\"http://iptc.org/std/Iptc4xmpExt/2008-02-29/\"\n"
      "    xmlns:safelight=\"" IMAGE_XMP_NAMESPACE "\"\n"
      "    Iptc4xmpExt:DigitalSourceType=\"http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia\"\n"
      "    xmp:CreatorTool=\"safelight ";

  if (buf_add_str(out, head, e) || add_escaped(out, r->version, e) || buf_add_str(out, "\"", e) ||
      add_property(out, "safelight:Model", r->model, e) || add_property(out, "safelight:ModelDigest", r->model_digest, e) ||
      add_property(out, "safelight:GenerationId", r->generation_id, e) ||
      add_property(out, "safelight:GenerationDigest", r->generation_digest, e) || add_property(out, "safelight:Profile", r->profile, e) ||
      add_property(out, "safelight:Safety", r->requires_nothing ? IMAGE_UNSAFE : "", e) ||
      add_property(out, "safelight:Styles", r->styles, e))
    return e->code;
  return buf_add_str(out, "/>\n</rdf:RDF>\n</x:xmpmeta>\n<?xpacket end=\"r\"?>", e);
}
