"""Goldens of the tokenizer.

Writes tokenizer.json (strings with their ids) and unicode.tsv (what the tokenizers library takes for a letter, a number or white
space, and its lower case of every code point: CLIPTokenizerFast depends on nothing else but NFC).

The specification is CLIPTokenizerFast. CLIPTokenizer, which diffusers loads, differs on some strings; its ids are recorded where it does.
"""
import json
import os
import random
import unicodedata

import common
import vocabulary
from tokenizers import Regex, normalizers, pre_tokenizers

OUT = os.path.join(common.GOLDEN, "tokenizer.json")
UNICODE = os.path.join(common.GOLDEN, "unicode.tsv")
CODE_POINTS = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]

WORDS = """a an the photo picture painting of in on with and red green blue yellow purple orange black white car sunflower cat dog house tree
castle dragon astronaut horse mars forest river mountain city street night day rain snow fire water glass metal wooden ancient futuristic
tiny giant happy sad portrait landscape watercolour oil digital art trending highly detailed 8k hdr bokeh cinematic lighting studio ghibli
style by Greg Rutkowski Artgerm masterpiece best quality emoji background knife bomb skull rainbow ice-cream café naïve façade jalapeño
photorealistic steampunk cyberpunk bioluminescent mother-of-pearl antidisestablishmentarianism xylophone zzyzx""".split()

# First and last code point of a sample of every script that people prompt in, and some that they do not.
SCRIPTS = {
    "latin-1": (0xC0, 0xFF), "latin-ext": (0x100, 0x24F), "ipa": (0x250, 0x2AF), "greek": (0x370, 0x3FF), "cyrillic": (0x400, 0x4FF),
    "armenian": (0x531, 0x58F), "hebrew": (0x591, 0x5F4), "arabic": (0x600, 0x6FF), "devanagari": (0x900, 0x97F), "bengali": (0x980, 0x9FD),
    "gurmukhi": (0xA01, 0xA76), "gujarati": (0xA81, 0xAFF), "tamil": (0xB82, 0xBFA), "telugu": (0xC00, 0xC3B), "kannada": (0xC80, 0xCF2),
    "malayalam": (0xD00, 0xD3A), "sinhala": (0xD81, 0xDF4), "thai": (0xE01, 0xE5B), "lao": (0xE81, 0xEB9), "tibetan": (0xF00, 0xFDA),
    "myanmar": (0x1000, 0x109F), "georgian": (0x10A0, 0x10FF), "hangul-jamo": (0x1100, 0x11FF), "ethiopic": (0x1200, 0x139F),
    "cherokee": (0x13A0, 0x13FD), "khmer": (0x1780, 0x17F9), "mongolian": (0x1800, 0x18AA), "greek-ext": (0x1F00, 0x1FFE),
    "punctuation": (0x2010, 0x205E), "letterlike": (0x2100, 0x218B), "symbols": (0x2190, 0x23FF), "enclosed": (0x2460, 0x24FF),
    "dingbats": (0x2600, 0x27BF), "kana": (0x3041, 0x30FF), "cjk": (0x4E00, 0x9FFF), "hangul": (0xAC00, 0xD7A3), "cjk-compat": (0xF900, 0xFAD9),
    "presentation": (0xFB00, 0xFBFF), "full-width": (0xFF01, 0xFFEE), "gothic": (0x10330, 0x1034A), "deseret": (0x10400, 0x1044F),
    "maths": (0x1D400, 0x1D7FF), "adlam": (0x1E900, 0x1E959), "cjk-b": (0x20000, 0x2A6D6),
}  # fmt: skip
SPACES = "\t\n\v\f\r \x85\xa0\u1680\u2000\u2003\u2009\u200a\u2028\u2029\u202f\u205f\u3000"
NOT_SPACES = "\u180e\u200b\u200c\u200d\u2060\ufeff\x1c\x1d\x1e\x1f"


def sentence(rng, low=3, high=12):
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))


def assigned(low, high):
    """Assigned code points whose combining class no table disagrees about."""
    return [c for c in range(low, high + 1) if unicodedata.category(chr(c)) not in ("Cn", "Cs", "Co")]


def script_word(rng, points, low=1, high=7):
    return "".join(chr(rng.choice(points)) for _ in range(rng.randint(low, high)))


def english(rng):
    for _ in range(250):
        yield sentence(rng)
    for _ in range(150):
        words = [rng.choice(["(", "((", "[", "", "", ""]) + rng.choice(WORDS) for _ in range(rng.randint(2, 8))]
        ends = [", ", ":1.2), ", ") ", "] ", "; ", " -- ", "!? ", "... ", "/", "_", "#1 ", "@ ", " & ", " + ", "'", '"', "*", "\\", "|", "~"]
        yield "".join(word + rng.choice(ends) for word in words)


def contractions(rng):
    for suffix in ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'S", "'T", "'RE", "'Ve", "'M", "'LL", "'D", "'x", "'", "''s", "’s", "'ſ", "s'"):
        for stem in ("it", "don", "You", "I", "9", "é", "", "!", "東"):
            yield stem + suffix
        yield f"{suffix} {suffix}{suffix}"
        yield f"rock 'n' roll {suffix}tail isn{suffix}"


def scripts(rng):
    for low, high in SCRIPTS.values():
        points = assigned(low, high)
        for _ in range(7):
            yield " ".join(script_word(rng, points) for _ in range(rng.randint(1, 4)))
        yield "a " + script_word(rng, points) + rng.choice(WORDS) + "1" + script_word(rng, points)
    yield "Ünïcödé — “quotes”, «guillemets», ‘single’ … ellipsis • bullet № ™ © ½ ² ₂ Ⅷ"
    yield "ผู้หญิงถือดอกไม้ในสวน"
    yield "東京タワーの写真、夜景。"
    yield "ｆｕｌｌ　ｗｉｄｔｈ　１２３！"
    yield "١٢٣ ۴۵۶ १२३ ๑๒๓ 一二三"


def normal_forms(rng):
    composed = [c for c in CODE_POINTS if unicodedata.decomposition(chr(c)) and "<" not in unicodedata.decomposition(chr(c))]
    composed = [c for c in composed if c != 0x11938]  # decomposes since Unicode 13, which the library's NFC does not know
    for _ in range(90):
        text = "".join(chr(rng.choice(composed)) + rng.choice(["", "x", " "]) for _ in range(rng.randint(1, 3)))
        yield text
        yield unicodedata.normalize("NFD", text)
    marks = "\u0300\u0301\u0302\u0303\u0308\u030a\u0316\u0323\u0327\u0328\u0331\u0345\u05b0\u064b\u093c\u3099"
    for _ in range(80):
        yield "".join(rng.choice("aeiouAEIOUszSZкИんは가") + script_word(rng, [ord(m) for m in marks], 0, 4) for _ in range(rng.randint(1, 3)))
    yield from ("\u0301", "\u0344", "\u1100\u1161\u11a8", "\u1100\u1161", "가\u11a8", "Å Å Å", "Ω Ω", "ﬁ ﬂ ﬃ", "q\u0307\u0323", "q\u0323\u0307", "ḍ\u0307")


def emoji(rng):
    base = [chr(c) for c in range(0x1F300, 0x1F650)] + [chr(c) for c in range(0x1F680, 0x1F6C6)] + [chr(c) for c in range(0x1F900, 0x1FA00)]
    tones = [chr(c) for c in range(0x1F3FB, 0x1F400)]
    yield from ("👩‍🚀", "👨‍👩‍👧‍👦", "🏳️‍🌈", "❤️‍🔥", "1️⃣", "#️⃣", "🇩🇪🇫🇷", "🏴󠁧󠁢󠁳󠁣󠁴󠁿", "☺☺️☺︎", "👍🏽👍🏿", "🧑🏻‍❤️‍💋‍🧑🏿", "a🍎b", "🍎 🍎🍎")
    for _ in range(60):
        yield "".join(rng.choice(base) + rng.choice(["", "", "\ufe0f"]) for _ in range(rng.randint(1, 4)))
    for _ in range(40):
        yield sentence(rng, 1, 3) + rng.choice(["", " "]) + rng.choice(base) + rng.choice(tones) + rng.choice(["", "!", " " + sentence(rng, 1, 2)])
    for _ in range(30):
        yield "\u200d".join(rng.choice(base) + rng.choice(["", *tones]) for _ in range(rng.randint(2, 3)))


def controls(rng):
    for c in [*range(1, 0x20), *range(0x7F, 0xA0), 0xAD, 0x61C, 0x200E, 0x202E, 0x2066, 0xFEFF, 0xFFF9, 0xFFFD, 0xE0001]:
        yield f"a{chr(c)}b {chr(c)} c{chr(c)}"
    yield from ("\ufffd", "a\ufffdb", "\ufffd\ufffd red", "\x7f", "\x1b[31mred\x1b[0m", "soft\u00adhyphen", "\u202eright to left\u202c")


def nul(rng):
    yield from ("\0", "a\0b", "red\0", "\0\0 x \0", "caf\0é")


def spaces(rng):
    yield from ("", " ", "  ", "\t", "\n", "\r\n", " \t \n ", "\u3000", "\xa0", "\x85")
    for c in SPACES + NOT_SPACES:
        yield f"red{c}car"
        yield f"{c}red {c} car{c}{c}"
    for _ in range(30):
        yield "".join(rng.choice(WORDS + [",", "'s", "1"]) + "".join(rng.choice(SPACES) for _ in range(rng.randint(0, 4))) for _ in range(rng.randint(1, 5)))
    for _ in range(30):
        yield rng.choice(["", " "]) + "   ".join(sentence(rng, 1, 2) for _ in range(rng.randint(1, 4))) + rng.choice(["", "  "])


def digits(rng):
    for _ in range(40):
        yield str(rng.randint(0, 10 ** rng.randint(1, 18)))
    for _ in range(40):
        yield rng.choice(["v", "mk", "x", "$", "№", "", "-"]) + f"{rng.uniform(0, 1000):.{rng.randint(0, 4)}f}" + rng.choice(["px", "mm", "%", "°C", "k", "", "th"])
    yield from ("1st 2nd 3rd", "24mm f/1.8", "1,000,000", "3.14159", "0x1F", "²³¹ ½ ⅓ Ⅻ ⓵ ❶", "1e-5", "４２", "𝟘𝟙𝟚", "2026-11-22T13:36")


def cases(rng):
    yield from ("İstanbul", "ISTANBUL", "ıI", "STRASSE Straße ẞ", "ΟΔΟΣ", "Σ", "ΑΣ ΣΑ ΑΣΑ", "ὈΔΥΣΣΕΎΣ", "Ǆ ǅ ǆ", "ŉ ǰ ΐ", "ſ", "K Å Ω", "ﬀ", "Ⅷ ⅷ Ⓐ ⓐ", "𐐀𐐨", "ᲐႠაⴀ", "ꭰᎠ", "ⱯɐȺ", "İ̇", "i̇", "TÜRKİYE'S")
    upper = [c for c in CODE_POINTS if chr(c).lower() != chr(c)]
    for _ in range(60):
        yield script_word(rng, upper, 1, 6)
    for _ in range(60):
        text = sentence(rng, 1, 5)
        yield rng.choice([text.upper(), text.title(), text.swapcase(), "".join(rng.choice([c.upper(), c]) for c in text)])


def markup(rng):
    tags = ["<b>", "</b>", "<br/>", "&amp;", "&lt;", "&#39;", "&nbsp;", "<lora:x:0.8>", "<!-- -->", "<p class='a'>", "{x}", "[[a]]", "%20", "\\n", "\\u0041", "://", "@me", "#tag"]
    for _ in range(60):
        yield "".join(rng.choice(tags) + rng.choice(["", " "]) + rng.choice(WORDS) for _ in range(rng.randint(1, 4)))
    yield from ("https://example.org/a?b=c&d=%C3%A9#e", "SELECT * FROM users; --", "{\"a\": [1, 2]}", "$(rm -rf)", "../../etc/passwd", "^_^ :-) ;P <3 xD", "¯\\_(ツ)_/¯")


def specials(rng):
    start, end = vocabulary.START, vocabulary.END
    yield from (start, end, start + end, end * 3, f"a {end} b", f"a{end}b", f" {start} a", f"{end} ", f" {end}", "<|endoftext", "|endoftext|>", "<|end of text|>")
    yield from ("<|ENDOFTEXT|>", "<|StartOfText|>", "a<|EndOfText|>b", "<|endoftext|", "<<|endoftext|>>", "endoftext", "startoftext", "<|endoftext|>'s", "é<|endoftext|>e\u0301")
    yield from ("<|endoftext|\u0301>", "<\u0338|endoftext|>", "red</w>", "</w>", "red</w>car", "Ġred", "Ċ", "!!!!!!", "a</w>b</w>")
    for _ in range(25):
        yield "".join(rng.choice([start, end, " ", "a", "red ", "!", "<|", "|>", "'s", "é"]) for _ in range(rng.randint(2, 6)))


def singles(rng):
    for c in range(0x20, 0x180):
        yield chr(c)


def anywhere(rng):
    points = assigned(0x20, 0xFFFF) + assigned(0x10000, 0x10FFFF)
    # The combining classes that came after Unicode 11 are left out: the NFC inside the library does not know them.
    known = unicodedata.ucd_3_2_0
    points = [c for c in points if not unicodedata.combining(chr(c)) or known.combining(chr(c))]
    points = [c for c in points if c != 0x11938]
    for _ in range(200):
        yield script_word(rng, points, 1, 6)


def unassigned(rng):
    points = [0x378, 0x530, 0x5FF, 0xDFF, 0x1AFF, 0x2FE0, 0x2FFF, 0xFDD0, 0xFFFE, 0xFFFF, 0x1FFFE, 0x2FA20, 0x3FFFF, 0xE000, 0xF8FF, 0xF0000, 0x10FFFD, 0x10FFFF, 0xE0100]
    for c in points:
        yield chr(c)
        yield f"a{chr(c)}b {chr(c)}{chr(c)} 1{chr(c)}"


def vocabulary_words(rng):
    tokens = sorted(t for t in json.load(open(os.path.join(vocabulary.folder(), "vocab.json"), encoding="utf-8")) if t.isascii() and t.isalpha())
    for _ in range(200):
        yield "".join(rng.choice(tokens) for _ in range(rng.randint(1, 3))) + " " + rng.choice(tokens)


def long(rng):
    yield sentence(rng, 2000, 2000)[:10000]
    yield "".join(rng.choice("etaoinshrdlu") for _ in range(10000))  # one word: quadratic merging takes seconds here
    yield "".join(rng.choice(["🍎", "é", "東", "a", " ", "!", "1", "\u0301"]) for _ in range(3300))
    yield "a" * 5000
    yield "!" * 5000
    yield " " * 5000 + "end"


KINDS = [english, contractions, scripts, normal_forms, emoji, controls, nul, spaces, digits, cases, markup, specials, singles, anywhere, unassigned, vocabulary_words, long]  # fmt: skip


def write_strings():
    fast, slow = vocabulary.fast(), vocabulary.slow()
    seen, lines, differ, counts = set(), [], {}, {}
    for kind in KINDS:
        for text in kind(random.Random(20261122)):
            if text in seen:
                continue
            seen.add(text)
            ids = fast(text, add_special_tokens=False).input_ids
            other = slow(text, add_special_tokens=False).input_ids
            entry = {"kind": kind.__name__, "text": text, "fast": ids}
            if other != ids:
                entry["slow"] = other
                differ[kind.__name__] = differ.get(kind.__name__, 0) + 1
            counts[kind.__name__] = counts.get(kind.__name__, 0) + 1
            lines.append(json.dumps(entry, ensure_ascii=False, separators=(",", ":")))
    with open(OUT, "w", encoding="utf-8", newline="\n") as out:
        out.write("[\n" + ",\n".join(lines) + "\n]\n")
    common.record(
        "tokenizer.json",
        "strings and their ids without start, end, padding and truncation; fast: transformers.CLIPTokenizerFast, the specification; "
        "slow: transformers.CLIPTokenizer without ftfy, only where it differs",
        strings=len(lines),
        by_kind=counts,
        slow_differs=differ,
    )


def members(pattern):
    """Every code point that the library's regular expressions put into a class."""
    split = pre_tokenizers.Split(Regex(pattern), "removed", invert=True)
    found = set()
    for i in range(0, len(CODE_POINTS), 8192):
        for piece, _ in split.pre_tokenize_str("".join(map(chr, CODE_POINTS[i : i + 8192]))):
            found.update(map(ord, piece))
    return sorted(found)


def write_unicode():
    rows = []
    for name, pattern in (("L", r"\p{L}"), ("N", r"\p{N}"), ("S", r"\s")):
        points = members(pattern)
        start = points[0]
        for here, following in zip(points, points[1:] + [-1]):
            if following != here + 1:
                rows.append(f"{name}\t{start:X}\t{here:X}")
                start = following
    lower = normalizers.Lowercase()
    for c in CODE_POINTS:
        to = lower.normalize_str(chr(c))
        if to != chr(c):
            rows.append(f"lower\t{c:X}\t" + " ".join(f"{ord(x):X}" for x in to))
    with open(UNICODE, "w", encoding="ascii", newline="\n") as out:
        out.write("\n".join(rows) + "\n")
    common.record("unicode.tsv", "character classes and lower case as the tokenizers library has them", rows=len(rows))


if __name__ == "__main__":
    write_strings()
    write_unicode()
