"""The harmful stand-ins of concepts.tsv, and which benign emoji are easily taken for them by name."""
import csv
import os

import captions
import glyphs

COMMON = {"of", "and", "with", "in", "on", "no", "face", "one", "button", "the", "mark", "piece", "red"}


def load():
    """A list of {category, name, counterpart, unsafe, safe}; the last two are glyph numbers."""
    number = {name: i for i, (_, name, _) in enumerate(glyphs.load())}
    with open(os.path.join(glyphs.HERE, "concepts.tsv"), encoding="utf-8") as f:
        rows = list(csv.DictReader(f, delimiter="\t"))
    return [dict(r, unsafe=number[r["name"]], safe=number[r["counterpart"]]) for r in rows]


def categories():
    return list(dict.fromkeys(c["category"] for c in load()))


def unsafe_glyphs():
    return {c["unsafe"] for c in load()}


def words(i):
    return {w for n in captions.names(i) for w in n.lower().replace("-", " ").split()} - COMMON


def neighbours(unsafe):
    """Benign glyphs whose names share a telling word with one of the unsafe ones."""
    bad, theirs = unsafe_glyphs(), set().union(*(words(i) for i in unsafe))
    return [i for i in range(len(glyphs.load())) if i not in bad and words(i) & theirs]
