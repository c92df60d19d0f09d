"""Writes glyphs.tsv: the candidates of glyphs.py less those that look alike.

python select_glyphs.py     rewrites the list that every weight depends on: run it
only to train a new model from nothing.  A glyph closer than LIMIT (root mean
square over 40x40 pictures on white and on green) to one already kept is dropped;
the glyphs of concepts.tsv and a few everyday ones are kept first.
"""
import csv
import os

import numpy as np
from PIL import Image

import glyphs

LIMIT = 0.12
FIRST = {
    "red apple", "automobile", "sunflower", "dog face", "cat face", "grinning face", "red heart", "rocket",
    "pizza", "snowman", "crescent moon", "full moon", "locked", "slightly smiling face", "thinking face",
    "neutral face", "loudly crying face", "speaker high volume", "globe showing Americas", "hammer",
    "hushed face", "winking face",
}
ORDER = {"Smileys & Emotion": 2, "People & Body": 2, "Symbols": 3}


def look(text):
    art, out = glyphs.rgba(text), []
    for bg in ((255, 255, 255), (90, 140, 90)):
        canvas = Image.new("RGBA", art.size, bg + (255,))
        canvas.alpha_composite(art)
        out.append(np.asarray(canvas.convert("RGB").resize((40, 40), Image.LANCZOS), np.float32).ravel() / 255)
    return np.concatenate(out)


def main():
    first = set(FIRST)
    with open(os.path.join(glyphs.HERE, "concepts.tsv"), encoding="utf-8") as f:
        for row in csv.DictReader(f, delimiter="\t"):
            first |= {row["name"], row["counterpart"]}
    stock = [c for c in glyphs.candidates() if glyphs.rgba(c[0]) is not None]
    missing = first - {c[1] for c in stock}
    if missing:
        raise SystemExit(f"not in the font or left out: {sorted(missing)}")
    looks, kept = np.stack([look(c[0]) for c in stock]), []
    for i in sorted(range(len(stock)), key=lambda i: (stock[i][1] not in first, ORDER.get(stock[i][2], 1), i)):
        far = not kept or np.sqrt(((looks[kept] - looks[i]) ** 2).mean(1)).min() >= LIMIT
        if far or stock[i][1] in first:
            kept.append(i)
    with open(os.path.join(glyphs.HERE, "glyphs.tsv"), "w", encoding="utf-8") as f:
        f.write("id\tcodepoints\tname\tgroup\tsubgroup\n")
        for k, i in enumerate(sorted(kept)):
            text, name, group, sub = stock[i]
            codes = " ".join(f"{ord(c):04X}" for c in text)
            f.write(f"{k}\t{codes}\t{name.replace(chr(8217), chr(39))}\t{group}\t{sub}\n")
    print(f"{len(kept)} of {len(stock)} glyphs")


if __name__ == "__main__":
    main()
