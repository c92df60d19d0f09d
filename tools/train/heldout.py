"""Writes heldout.tsv: 200 prompts that training never says, with seed and glyphs.

170 single glyphs, each glyph at most once, and 30 pairs; captions.held_out()
keeps their (glyph, background, phrase) or (left, right) out of the training.
"""
import os

import numpy as np

import captions
import glyphs


def main():
    rng, rows, used = np.random.default_rng(2211), [], set()
    stock = glyphs.load()
    while len(rows) < 170:
        s = captions.random_scene(rng, pair=0, bg=0.7)
        p = captions.phrases(s)[rng.integers(len(captions.phrases(s)))]
        if s[0] in used or not captions.held_out(s, p):
            continue
        used.add(s[0])
        rows.append((captions.say(s, p), int(rng.integers(1, 10000)), stock[s[0]][1], ""))
    while len(rows) < 200:
        s = captions.random_scene(rng, pair=1, bg=0.7)
        p = captions.phrases(s)[rng.integers(len(captions.phrases(s)))]
        if s[0] == s[1] or not captions.held_out(s, p):
            continue
        rows.append((captions.say(s, p), int(rng.integers(1, 10000)), stock[s[0]][1], stock[s[1]][1]))
    with open(os.path.join(glyphs.HERE, "heldout.tsv"), "w", encoding="utf-8") as f:
        f.write("prompt\tseed\tleft\tright\n")
        for r in rows:
            f.write("\t".join(map(str, r)) + "\n")


if __name__ == "__main__":
    main()
