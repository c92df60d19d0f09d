#!/usr/bin/env python3
"""The judge: which emoji is this picture?  Needs only numpy and Pillow.

    judge.py eval                      its own accuracy on rendered glyphs, as JSON
    judge.py name FILE... [--pair]     the five best names for each picture
    judge.py score --manifest TSV      top-1 over rows "file<TAB>left[<TAB>right]", as JSON

A small convolutional network, trained by judge_train.py on rendered glyphs
alone; it never saw a generated picture.  A single emoji is judged on the whole
picture, a pair on its left and right half.  A pair counts as named when both
halves are.  Weights: judge.npz beside this file (fp16, batch norm folded in).
"""
import argparse
import io
import json
import os
import sys

import numpy as np
from PIL import Image, ImageFilter

HERE = os.path.dirname(os.path.abspath(__file__))
SIDE = 64


def names():
    with open(os.path.join(HERE, "glyphs.tsv"), encoding="utf-8") as f:
        next(f)
        return [line.split("\t")[2] for line in f]


def conv(x, w, b, stride):
    """3x3 convolution, padding 1: x (n, h, w, c), w (9c, out)."""
    n, h, wd, c = x.shape
    p = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    ho, wo = h // stride, wd // stride
    cols = [p[:, i:i + h:stride, j:j + wd:stride][:, :ho, :wo] for i in range(3) for j in range(3)]
    return (np.concatenate(cols, -1).reshape(-1, 9 * c) @ w + b).reshape(n, ho, wo, -1)


class Judge:
    def __init__(self, path=os.path.join(HERE, "judge.npz")):
        with np.load(path) as z:
            self.p = {k: z[k].astype(np.float32) for k in z.files}
        self.names = names()
        if self.p["fc.b"].shape[0] != len(self.names):
            raise ValueError(f"{path}: {self.p['fc.b'].shape[0]} classes, glyphs.tsv has {len(self.names)}")

    def logits(self, x):
        """x: (n, 64, 64, 3) float in -1..1."""
        p = self.p
        relu = lambda v: np.maximum(v, 0)
        layer = lambda v, k, s: conv(v, p[k + ".w"], p[k + ".b"], s)
        x = relu(layer(x, "c0", 2))
        for k in ("1", "2", "3"):
            x = relu(layer(x, "d" + k, 2 if k != "3" else 1))
            x = relu(x + layer(relu(layer(x, "r" + k + "a", 1)), "r" + k + "b", 1))
        n, h, w, c = x.shape
        x = x.reshape(n, h // 4, 4, w // 4, 4, c).mean((2, 4)).reshape(n, -1)
        return relu(x @ p["h.w"] + p["h.b"]) @ p["fc.w"] + p["fc.b"]

    def __call__(self, pictures):
        """pictures: 64x64 RGB PIL images -> logits."""
        x = np.stack([np.asarray(i.convert("RGB"), np.float32) for i in pictures]) / 127.5 - 1
        return np.concatenate([self.logits(x[i:i + 64]) for i in range(0, len(x), 64)])


def views(picture, pair):
    """The 64x64 windows the judge looks at."""
    picture = picture.convert("RGB").resize((128, 128), Image.BOX if picture.width % 128 == 0 else Image.LANCZOS)
    if pair:
        return [picture.crop((0, 32, 64, 96)), picture.crop((64, 32, 128, 96))]
    return [picture.resize((SIDE, SIDE), Image.BOX)]


def evaluate(judge, per_glyph, seed=2024):
    """Accuracy on PIL renderings: sizes, backgrounds and blurs that training never drew."""
    import glyphs
    rng = np.random.default_rng(seed)
    pics, want = [], []
    for g, (text, _, _) in enumerate(glyphs.load()):
        for _ in range(per_glyph):
            bg = tuple(int(v) for v in rng.integers(0, 256, 3))
            pic = Image.fromarray(glyphs.render([text], bg, rng, scale=rng.choice([0.86, 0.92, 1.0])))
            pic = pic.filter(ImageFilter.GaussianBlur(float(rng.choice([0, 1.1, 1.7]))))
            if rng.random() < 0.5:
                buf = io.BytesIO()
                pic.save(buf, "JPEG", quality=int(rng.integers(55, 90)))
                pic = Image.open(buf)
            pics += views(pic, False)
            want.append(g)
    got = judge(pics).argmax(1)
    wrong = [i for i in range(len(want)) if got[i] != want[i]]
    return {"pictures": len(want), "top1": 1 - len(wrong) / len(want),
            "chance": 1 / len(judge.names),
            "mistakes": [[judge.names[want[i]], judge.names[got[i]]] for i in wrong[:40]]}


def score(judge, manifest):
    rows = []
    base = os.path.dirname(os.path.abspath(manifest))
    with open(manifest, encoding="utf-8") as f:
        for line in f:
            cells = line.rstrip("\n").split("\t")
            if len(cells) < 2 or cells[0] in ("", "file"):
                continue
            rows.append((cells[0], [c for c in cells[1:3] if c]))
    known = {n: i for i, n in enumerate(judge.names)}
    out, named = [], 0
    for path, want in rows:
        for n in want:
            if n not in known:
                raise ValueError(f"{manifest}: '{n}' is no glyph name")
        pic = Image.open(path if os.path.isabs(path) else os.path.join(base, path))
        y = judge(views(pic, len(want) == 2))
        got = [judge.names[k] for k in y.argmax(1)]
        rank = [int((r > r[known[n]]).sum()) + 1 for r, n in zip(y, want)]
        named += got == want
        out.append({"file": path, "expected": want, "judged": got, "rank": rank, "ok": got == want})
    halves = [r for row in out for r in row["rank"]]
    return {"rows": len(out), "named": named, "top1": named / max(1, len(out)),
            "top5": sum(max(r["rank"]) <= 5 for r in out) / max(1, len(out)),
            "glyphs_top1": sum(r == 1 for r in halves) / max(1, len(halves)),
            "chance": 1 / len(judge.names), "results": out}


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("command", choices=["eval", "name", "score"])
    ap.add_argument("files", nargs="*")
    ap.add_argument("--manifest")
    ap.add_argument("--pair", action="store_true")
    ap.add_argument("--per-glyph", type=int, default=3)
    ap.add_argument("--weights", default=os.path.join(HERE, "judge.npz"))
    a = ap.parse_args()
    judge = Judge(a.weights)
    if a.command == "eval":
        print(json.dumps(evaluate(judge, a.per_glyph)))
    elif a.command == "score":
        print(json.dumps(score(judge, a.manifest)))
    else:
        for path in a.files:
            for k, y in enumerate(judge(views(Image.open(path), a.pair))):
                p = np.exp(y - y.max())
                p /= p.sum()
                side = ("left ", "right ")[k] if a.pair else ""
                print(f"{path} {side}" + ", ".join(f"{judge.names[i]} {p[i]:.2f}" for i in np.argsort(-p)[:5]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
