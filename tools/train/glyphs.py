"""Which emoji the bundled model knows, and how they look as pixels.

Reads Unicode's emoji-test.txt (Debian package unicode-data) and the bitmap font
Noto Color Emoji (Debian package fonts-noto-color-emoji).  Used by every other
file here.  Glyph numbers are positions in load_glyphs(); they are stable as long
as the two Debian packages and the rules below are.
"""
import functools
import os

import numpy as np
from PIL import Image, ImageDraw, ImageFont

FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
NAMES = "/usr/share/unicode/emoji/emoji-test.txt"
SIZE = 128
HERE = os.path.dirname(os.path.abspath(__file__))

# Whole parts of emoji-test.txt that are left out: pictures that only a symbol
# table tells apart, or people who differ in hair and skin alone.
SKIP_GROUPS = {"Component", "Flags"}
SKIP_SUBGROUPS = {
    "time", "person", "person-gesture", "person-role", "person-activity",
    "person-sport", "person-resting", "family", "person-symbol", "arrow",
    "religion", "zodiac", "av-symbol", "gender", "math", "punctuation",
    "currency", "keycap", "alphanum", "geometric", "transport-sign",
    "other-symbol", "warning",
}
KEEP = {
    "hourglass done", "alarm clock", "stopwatch", "watch", "mantelpiece clock", "pirate flag",
    "white flag", "chequered flag", "triangular flag", "rainbow flag", "ninja",
    "no one under eighteen", "radioactive", "biohazard", "warning", "recycling symbol",
    "check mark button", "cross mark", "yin yang", "peace symbol", "no entry", "green circle",
    "blue circle", "red question mark", "red exclamation mark", "heavy dollar sign",
    "large orange diamond", "Santa Claus", "baby", "guard", "no smoking", "footprints",
}
# Near-duplicates in meaning or looks of a glyph that stays.
DROP = set("""
mx claus|Mrs. Claus|merman|merperson|troll|busts in silhouette|snowboarder|person bowing|elf
leftwards hand|rightwards hand|palm down hand|palm up hand|leftwards pushing hand|rightwards pushing hand
raised back of hand|hand with fingers splayed|vulcan salute|left-facing fist|right-facing fist
backhand index pointing left|backhand index pointing right|backhand index pointing down|index pointing up
index pointing at the viewer|palms up together|open hands|hand with index finger and thumb crossed
pinching hand|pinched fingers|heart hands|raising hands|love-you gesture|sign of the horns|selfie
oncoming bus|oncoming police car|oncoming taxi|oncoming automobile|railway car|high-speed train
metro|light rail|station|tram car|train|trolleybus|mountain railway|suspension railway|mountain cableway
airplane departure|airplane arrival|motor boat|ferry|timer clock|globe showing Europe-Africa
globe showing Asia-Australia|globe with meridians|waxing crescent moon|waxing gibbous moon|waning gibbous moon
last quarter moon|first quarter moon|waning crescent moon|first quarter moon face|last quarter moon face
new moon|sun behind small cloud|sun behind large cloud|sun behind rain cloud|fog|cloud with rain
cloud with snow|cloud with lightning|hourglass not done|closed mailbox with lowered flag
open mailbox with raised flag|open mailbox with lowered flag|incoming envelope|envelope with arrow|e-mail
yen banknote|euro banknote|pound banknote|card index|bookmark tabs|page with curl|page facing up
spiral notepad|tear-off calendar|ledger|notebook|green book|blue book|orange book|card file box
locked with pen|locked with key|mobile phone with arrow|magnifying glass tilted right|speaker low volume
speaker medium volume|muted speaker|camera with flash|bell with slash|linked paperclips|round pushpin
2nd place medal|3rd place medal|1st place medal|softball|cricket game|field hockey|lacrosse|sunrise over mountains
cityscape at dusk|night with stars|bridge at night|Japanese post office|department store|convenience store
love hotel|heart decoration|growing heart|beating heart|heart exclamation|revolving hearts|pink heart
light blue heart|grey heart|heart suit|mending heart|eye in speech bubble|left speech bubble|dotted line face
kissing face|kissing face with closed eyes|kissing face with smiling eyes|grinning face with big eyes
grinning face with smiling eyes|frowning face with open mouth|anguished face|face with open mouth|tired face
persevering face|disappointed face|slightly frowning face|face with diagonal mouth|shaking face
smiling cat with heart-eyes|cat with tears of joy|cat with wry smile|kissing cat|pouting cat|weary cat
crying cat|hear-no-evil monkey|speak-no-evil monkey|flat shoe|woman’s sandal|man’s shoe|woman’s boot
clinking beer mugs|cut of meat|stuffed flatbread|curry rice|steaming bowl|oden|shallow pan of food
house with garden|houses|office building|kaaba|synagogue|hindu temple|moon viewing ceremony|tanabata tree
pine decoration|guide dog|service dog|two-hump camel|ewe|water buffalo|ox|black cat|black bird|dove|tiger
leopard|rat|hamster|whale|T-Rex|bug|beetle|umbrella|umbrella on ground|umbrella with rain drops|snowman without snow|level slider
control knobs|trackball|computer disk|dvd|musical note|studio microphone|pager|low battery|open file folder
file cabinet|card index dividers|outbox tray|inbox tray|pick|hammer and pick|chart increasing with yen
full moon face|OK button|COOL button|SOS button|folding hand fan|hair pick
""".strip().replace("\n", "|").split("|"))
DROP_WORDS = ("man ", "woman ", " man", " woman", "men ", "women ")


def read_names(path=NAMES):
    """Yield (characters, name, group, subgroup) of every fully qualified emoji."""
    group = sub = ""
    with open(path, encoding="utf-8") as f:
        for line in f:
            if line.startswith("# group:"):
                group = line.split(":", 1)[1].strip()
            elif line.startswith("# subgroup:"):
                sub = line.split(":", 1)[1].strip()
            elif "; fully-qualified" in line:
                codes, rest = line.split(";", 1)
                name = rest.split("#", 1)[1].split(None, 2)[2].strip()
                yield "".join(chr(int(c, 16)) for c in codes.split()), name, group, sub


def candidates():
    out = []
    for text, name, group, sub in read_names():
        if "skin tone" in name or name in DROP:
            continue
        if name not in KEEP:
            if group in SKIP_GROUPS or sub in SKIP_SUBGROUPS:
                continue
            low = " " + name.lower() + " "
            if any(" " + w.strip() + " " in low for w in DROP_WORDS):
                continue
        out.append((text, name, group, sub))
    return out


@functools.lru_cache(None)
def _font():
    return ImageFont.truetype(FONT, 109)


@functools.lru_cache(None)
def rgba(text):
    """The glyph as a square premultiplied-free RGBA image of 136x136."""
    canvas = Image.new("RGBA", (160, 160), (0, 0, 0, 0))
    ImageDraw.Draw(canvas).text((12, 8), text, font=_font(), embedded_color=True)
    box = canvas.getbbox()
    if box is None:
        return None
    art = canvas.crop(box)
    side = 136
    if max(art.size) > side:
        return None
    out = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    out.paste(art, ((side - art.width) // 2, (side - art.height) // 2))
    return out


@functools.lru_cache(None)
def load():
    """The glyphs of glyphs.tsv: a list of (characters, name, group)."""
    out = []
    with open(os.path.join(HERE, "glyphs.tsv"), encoding="utf-8") as f:
        next(f)
        for line in f:
            _, codes, name, group, _ = line.rstrip("\n").split("\t")
            out.append(("".join(chr(int(c, 16)) for c in codes.split()), name, group))
    return out


BACKGROUNDS = {
    "white": (255, 255, 255), "black": (24, 24, 28), "grey": (150, 152, 156),
    "red": (206, 52, 52), "orange": (240, 140, 40), "yellow": (250, 222, 90),
    "green": (92, 176, 88), "blue": (60, 104, 200), "light blue": (160, 210, 246),
    "purple": (136, 84, 176), "pink": (250, 176, 204), "brown": (128, 84, 56),
}


def _paste(canvas, text, side, cx, cy, angle):
    art = rgba(text)
    if angle:
        art = art.rotate(angle, Image.BICUBIC)
    art = art.resize((side, side), Image.LANCZOS)
    canvas.alpha_composite(art, (max(0, round(cx - side / 2)), max(0, round(cy - side / 2))))


def render(texts, background, rng=None, scale=1.0, shift=1.0):
    """One glyph in the middle or two side by side, 128x128x3 uint8.

    rng varies size, place and angle slightly; None draws the canonical picture.
    """
    canvas = Image.new("RGBA", (SIZE, SIZE), tuple(background) + (255,))
    base, centres = (112, [64]) if len(texts) == 1 else (60, [33, 95])
    for text, cx in zip(texts, centres):
        side, dx, dy, angle = base * scale, 0.0, 0.0, 0.0
        if rng is not None:
            side *= rng.uniform(0.93, 1.05)
            reach = 4 if len(texts) == 1 else 1.5
            dx, dy = rng.uniform(-reach, reach, 2) * shift
            angle = rng.uniform(-5, 5)
        _paste(canvas, text, int(round(side)), cx + dx, 64 + dy, angle)
    return np.asarray(canvas.convert("RGB"))
