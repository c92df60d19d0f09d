"""Captions: what is said about a picture, which words are kept for the test.

A scene is (left, right, background): glyph numbers, right None for a single
glyph, background a name from glyphs.BACKGROUNDS or None (white, unsaid).
held_out() decides by a hash, so that training and test never share a
(glyph, background, phrase) triple nor an ordered (left, right) pair.
"""
import zlib

import numpy as np

import glyphs

SINGLE = ["{n}", "a {n}", "an emoji of a {n}", "a {n} emoji", "a picture of a {n}", "the {n}"]
SINGLE_BG = ["{n} on a {c} background", "a {n} on a {c} background",
             "an emoji of a {n} on a {c} background", "a {n}, {c} background",
             "a picture of a {n} on a {c} background", "a {n} emoji on {c}"]
PAIR = ["a {n} and a {m}", "{n} and {m}", "a {n} next to a {m}", "emoji of a {n} and a {m}"]
PAIR_BG = ["a {n} and a {m} on a {c} background", "{n} and {m} on a {c} background",
           "a {n} next to a {m} on a {c} background", "a {n} and a {m}, {c} background"]
COLOURS = [c for c in glyphs.BACKGROUNDS]

ALIASES = {
    "automobile": ["red car", "car"], "hot beverage": ["coffee", "cup of coffee"],
    "beer mug": ["beer"], "doughnut": ["donut"], "red heart": ["heart"],
    "wrapped gift": ["gift", "present"], "pile of poo": ["poop"], "jack-o-lantern": ["pumpkin"],
    "lady beetle": ["ladybug"], "sauropod": ["dinosaur"], "water pistol": ["pistol", "gun"],
    "kitchen knife": ["knife"], "drop of blood": ["blood"], "high voltage": ["lightning bolt"],
    "evergreen tree": ["pine tree"], "deciduous tree": ["tree"], "bullet train": ["train"],
    "locomotive": ["steam train"], "red apple": ["apple"], "honeybee": ["bee"],
    "spouting whale": ["whale"], "sport utility vehicle": ["blue car"], "crescent moon": ["moon"],
    "headphone": ["headphones"], "bottle with popping cork": ["champagne"], "delivery truck": ["truck"],
    "articulated lorry": ["lorry"], "closed umbrella": ["umbrella"], "droplet": ["water drop"],
    "sun": ["yellow sun"], "pirate flag": ["jolly roger"], "smiling face with sunglasses": ["cool face"],
    "money bag": ["bag of money"], "bow and arrow": ["bow"], "cocktail glass": ["cocktail"],
    "tiger face": ["tiger"], "flying saucer": ["ufo"], "soccer ball": ["football"],
    "ear of corn": ["corn"], "poultry leg": ["chicken leg"], "ogre": ["red ogre"],
    "hamburger": ["burger"], "mobile phone": ["smartphone"], "light bulb": ["lightbulb"],
    "police car light": ["siren"], "magnifying glass tilted left": ["magnifying glass"],
}


def names(i):
    n = glyphs.load()[i][1]
    return [n] + ALIASES.get(n, [])


def article(text):
    """"a apple" becomes "an apple"."""
    words = text.split(" ")
    for i in range(len(words) - 1):
        if words[i] == "a" and words[i + 1][:1].lower() in "aeiou" and not words[i + 1].startswith(("uni", "one", "ufo")):
            words[i] = "an"
    return " ".join(words)


def held_out(scene, phrase):
    left, right, bg = scene
    key = f"{left}/{bg}/{phrase}" if right is None else f"{left}+{right}"
    return zlib.crc32(key.encode()) % 10 == 0


def phrases(scene):
    left, right, bg = scene
    if right is None:
        return SINGLE if bg is None else SINGLE_BG
    return PAIR if bg is None else PAIR_BG


def say(scene, phrase, rng=None):
    left, right, bg = scene
    pick = (lambda i: names(i)[0] if rng is None or rng.random() < 0.7 else names(i)[rng.integers(len(names(i)))])
    return article(phrase.format(n=pick(left), m=pick(right) if right is not None else "", c=bg))


def train_caption(scene, rng):
    """A caption of the scene that is not kept for the test, or None."""
    all_ = phrases(scene)
    for k in rng.permutation(len(all_)):
        if not held_out(scene, all_[k]):
            return say(scene, all_[k], rng)
    return None


def random_scene(rng, pair=0.3, bg=0.6, weights=None):
    n = len(glyphs.load())
    left = int(rng.choice(n, p=weights)) if weights is not None else int(rng.integers(n))
    right = None
    if rng.random() < pair:
        right = int(rng.integers(n))
    return left, right, COLOURS[rng.integers(len(COLOURS))] if rng.random() < bg else None
