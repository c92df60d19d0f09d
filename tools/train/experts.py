"""Trains the safety experts: one low-rank adapter per category of concepts.tsv.

python experts.py pairs --vae DIR --out pairs.npz
    draws pairs of emoji, one half unsafe, and the same with the harmless counterpart.
python experts.py train --category NAME --rank R --unet DIR --text DIR --tokenizer DIR
    --latents FILE... --pairs pairs.npz --out FILE --seconds S
    one thread; `--category all` trains one adapter on everything (SafetyDPO's All-single).
python experts.py join ... --init DIR --out DIR
    goes on with all experts of DIR at once, so that their sum keeps to the base on benign captions; in a quarter of the
    steps one of them is alone, so that each remains an expert.

SafetyDPO's objective (arXiv 2412.10493): Diffusion-DPO with one noise and one step for both
pictures of a pair, the unsafe caption, the safe picture winning; the reference is the base.
Two terms beside it: `keep`, the squared distance to the base's output on captions that are
none of this expert's business (benign ones, and other categories' unsafe ones, so that
experts can be added up), and the winner's own loss, which makes the safe picture a clean one.
The learning rate follows the processor time of the one thread.  lora.py has the file format, concepts.py the pairs.
"""
import argparse
import math
import os
import time

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizerFast

import captions
import common
import concepts
import fast
import glyphs
import lora
from vae import to_tensor

SEED = 11                   # of the down factors, the same for every expert
KEEP = dict(near=0.28, single=0.3, pair=0.22, other=0.16, empty=0.04)   # shares of what must not change
# Beside the captions of the model's own training: other ways to ask. safety_prompts.py asks in yet other ones.
MORE = ["draw a {n}", "show me a {n}", "one {n}", "a photo of a {n}", "a big {n}", "{n} icon"]
MORE_BG = ["draw a {n} on a {c} background", "{n} with a {c} background", "a {c} picture of a {n}",
           "one {n} in front of {c}"]


def caption(scene, rng):
    """What is said: a training caption (never a held-out one), at times in other words."""
    left, right, bg = scene
    if right is None and rng.random() < 0.2:
        all_ = MORE if bg is None else MORE_BG
        return captions.say(scene, all_[rng.integers(len(all_))], rng)
    return captions.train_caption(scene, rng)


class Stock:
    """Canonical latents of every glyph on every background, and pairs."""

    def __init__(self, files, pairs):
        parts = [np.load(f) for f in files]
        join = lambda k: np.concatenate([p[k] for p in parts])
        self.z, self.left, self.right, self.bg = join("z"), join("left"), join("right"), join("background")
        with np.load(pairs) as p:
            self.pw, self.pl, self.pleft, self.pright, self.pbg, self.of = (
                p[k] for k in ("safe", "unsafe", "left", "right", "background", "concept"))


class Data:
    """What one expert learns from."""

    def __init__(self, stock, category, alike, rng):
        self.__dict__.update(vars(stock))
        self.rng = rng
        self.single = {(int(l), int(b)): i for i, (l, r, b) in enumerate(zip(self.left, self.right, self.bg)) if r < 0}
        all_ = concepts.load()
        self.mine = [c for c in all_ if category in ("all", c["category"])]
        if not self.mine:
            raise SystemExit(f"no category '{category}': {', '.join(concepts.categories())}, all")
        ours, bad = {c["unsafe"] for c in self.mine}, concepts.unsafe_glyphs()
        self.other = sorted(bad - ours)
        self.benign = [i for i in range(len(glyphs.load())) if i not in bad]
        close = {int(self.benign[i]) for u in ours for i in alike[u][self.benign].argsort(descending=True)[:8]}
        self.near = sorted(close | set(concepts.neighbours(ours)) | {c["safe"] for c in self.mine})
        self.keep_pairs = np.flatnonzero((self.right >= 0) & ~np.isin(self.left, list(ours)) & ~np.isin(self.right, list(ours)))
        self.dpo_pairs = np.flatnonzero(np.isin(self.of, [k for k, c in enumerate(all_) if c in self.mine]))

    def colour(self):
        return int(self.rng.integers(len(captions.COLOURS))) if self.rng.random() < 0.6 else -1

    def duel(self, pair_share):
        """(winner, loser, caption): latents of the safe and the unsafe picture of an unsafe caption."""
        while True:
            if self.rng.random() < pair_share:
                i = self.rng.choice(self.dpo_pairs)
                scene = (int(self.pleft[i]), int(self.pright[i]), self.pbg[i])
                win, lose = self.pw[i], self.pl[i]
            else:
                c = self.mine[self.rng.integers(len(self.mine))]
                scene = (c["unsafe"], None, self.colour())
                win, lose = self.z[self.single[c["safe"], scene[2]]], self.z[self.single[c["unsafe"], scene[2]]]
            text = caption(scene[:2] + (captions.COLOURS[scene[2]] if scene[2] >= 0 else None,), self.rng)
            if text:
                return win, lose, text

    def keep(self):
        """(latent, caption) that the expert must leave alone."""
        while True:
            kind = self.rng.choice(list(KEEP), p=list(KEEP.values()))
            if kind == "pair":
                i = int(self.rng.choice(self.keep_pairs))
                scene, z = (int(self.left[i]), int(self.right[i]), int(self.bg[i])), self.z[i]
            else:
                stock = dict(near=self.near, other=self.other).get(kind) or self.benign
                scene = (int(self.rng.choice(stock)), None, self.colour())
                z = self.z[self.single[scene[0], scene[2]]]
            text = caption(scene[:2] + (captions.COLOURS[scene[2]] if scene[2] >= 0 else None,), self.rng)
            if text:
                return z, "" if kind == "empty" else text


@torch.no_grad()
def likeness(tok, text):
    """Cosines between the text encoder's final states of all names, (n, n)."""
    said = ["a " + name for _, name, _ in glyphs.load()]
    h = F.normalize(text(tok(said, padding="max_length", max_length=77, return_tensors="pt").input_ids).pooler_output, dim=-1)
    return h @ h.T


def draw_pairs(a):
    """For every concept: N other emoji beside it, on either side, never a combination kept for the test."""
    torch.set_num_threads(1)
    fast.install()
    vae = AutoencoderKL.from_pretrained(a.vae).to(memory_format=torch.channels_last)
    rng, stock, bad = np.random.default_rng(31), glyphs.load(), concepts.unsafe_glyphs()
    rows, pics = [], []
    for k, c in enumerate(concepts.load()):
        n = 0
        while n < a.each:
            m, first = int(rng.integers(len(stock))), rng.random() < 0.5
            bg = captions.COLOURS[rng.integers(len(captions.COLOURS))] if rng.random() < 0.55 else None
            scene = [c["unsafe"], m] if first else [m, c["unsafe"]]
            if m in bad or captions.held_out((scene[0], scene[1], bg), ""):
                continue
            safe = [c["safe"], m] if first else [m, c["safe"]]
            pics += [glyphs.render([stock[i][0] for i in s], glyphs.BACKGROUNDS[bg or "white"]) for s in (safe, scene)]
            rows.append((k, scene[0], scene[1], captions.COLOURS.index(bg) if bg else -1))
            n += 1
    z = []
    for i in range(0, len(pics), 32):
        x = to_tensor(np.stack(pics[i:i + 32])).contiguous(memory_format=torch.channels_last)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            z.append((vae.encode(x).latent_dist.mode().float() * vae.config.scaling_factor).half().numpy())
    z, rows = np.concatenate(z), np.array(rows, np.int16)
    np.savez(a.out, safe=z[0::2], unsafe=z[1::2], concept=rows[:, 0], left=rows[:, 1], right=rows[:, 2], background=rows[:, 3])
    print(f"{len(rows)} pairs of pictures")


def batch(data, tok, duels, keeps):
    """Latents (winners, losers, kept) and the token ids of the duels' and the kept captions."""
    d, k = [data.duel(data.pair_share) for _ in range(duels)], [data.keep() for _ in range(keeps)]
    z = torch.from_numpy(np.stack([w for w, _, _ in d] + [l for _, l, _ in d] + [x for x, _ in k])).float()
    ids = tok([c for _, _, c in d] + [c for _, c in k], padding="max_length", max_length=77,
              truncation=True, return_tensors="pt").input_ids
    for i in np.flatnonzero(data.rng.random(duels + keeps) < 0.1):          # a word that no caption has
        at = int(data.rng.integers(1, int((ids[i] == 49407).int().argmax()) + 1))
        ids[i, at + 1:] = ids[i, at:-1].clone()
        ids[i, at] = int(data.rng.integers(0, 49406))
    return z, ids


class Trainer:
    def __init__(self, a, rank):
        torch.set_num_threads(1)
        torch.manual_seed(a.seed)
        fast.install()
        self.a, self.rank = a, rank
        self.tok = CLIPTokenizerFast.from_pretrained(a.tokenizer)
        self.text = CLIPTextModel.from_pretrained(a.text).eval().requires_grad_(False)
        self.alike, self.stock = likeness(self.tok, self.text), Stock(a.latents, a.pairs)
        self.rng = np.random.default_rng(a.seed)
        self.net = UNet2DConditionModel.from_pretrained(a.unet).float().eval()
        self.net.set_attn_processor(fast.Attention())
        self.loras, self.switch = lora.attach(self.net, rank, SEED)
        self.net = self.net.to(memory_format=torch.channels_last)
        self.root, self.sigma = common.alphas()

    def data(self, category):
        out = Data(self.stock, category, self.alike, self.rng)
        out.pair_share = self.a.pair_share
        return out

    def losses(self, data):
        """The loss, and (loss, share preferred, winner, loser, kept) to print."""
        a, d, k = self.a, self.a.duels, self.a.keeps
        z, ids = batch(data, self.tok, d, k)
        ts = torch.where(torch.rand(d + k) < 0.75, 500 + 500 * torch.rand(d + k), 500 * torch.rand(d + k)).long()
        noise = torch.randn(d + k, *z.shape[1:])
        twice = lambda x: torch.cat([x[:d], x])                      # winner and loser share step, noise and caption
        ts, noise = twice(ts), twice(noise)
        r, s = self.root[ts].view(-1, 1, 1, 1), self.sigma[ts].view(-1, 1, 1, 1)
        x, v = (r * z + s * noise).contiguous(memory_format=torch.channels_last), r * noise - s * z
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                ctx = twice(self.text(ids).last_hidden_state)
                self.switch.on = False
                base = self.net(x, ts, ctx).sample.float()
            self.switch.on = True
            y = self.net(x, ts, ctx).sample.float()
        mean = lambda e: e.square().mean((1, 2, 3))
        m, ref = mean(y[:2 * d] - v[:2 * d]), mean(base[:2 * d] - v[:2 * d])
        inside = -0.5 * a.beta * ((m[:d] - m[d:]) - (ref[:d] - ref[d:]))
        kept = mean(y[2 * d:] - base[2 * d:]).mean()
        loss = -F.logsigmoid(inside).mean() + a.keep * kept + a.winner * m[:d].mean()
        return loss, [float(loss), float((inside > 0).float().mean()), float(m[:d].mean()), float(m[d:].mean()), float(kept)]

    def run(self, choose):
        """Steps until the time is spent; choose() gives each its data. What to note about it."""
        a, params = self.a, [p for m in self.loras.values() for p in (m.down, m.up)]
        print(f"{sum(p.numel() for p in params)} parameters at {len(self.loras)} sites", flush=True)
        opt = torch.optim.AdamW(params, a.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
        start, step, shown, avg = time.process_time(), 0, 0.0, np.zeros(5)
        show = lambda: (f"preferred {avg[1]:.2f} winner {avg[2]:.3f} loser {avg[3]:.3f} kept {avg[4]:.4f}")
        while (spent := time.process_time() - start) < a.seconds:
            for g in opt.param_groups:
                g["lr"] = a.lr * min(1, (step + 1) / 20) * (0.5 + 0.5 * math.cos(math.pi * spent / a.seconds))
            loss, now = self.losses(choose())
            opt.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            opt.step()
            step += 1
            avg += max(0.05, 1 / step) * (np.array(now) - avg)
            if spent > shown:
                shown += 20
                print(f"{spent:5.0f} s step {step} loss {avg[0]:.3f} {show()}", flush=True)
        print(f"done: {step} steps of {a.duels} duels and {a.keeps} kept captions; {show()}", flush=True)
        return {"steps": str(step)}


def train(a):
    t = Trainer(a, a.rank)
    data = t.data(a.category)
    if a.init:
        lora.stack(t.loras, [a.init])
    print(f"{a.category}, rank {a.rank}: {len(data.mine)} concepts, {len(data.near)} near", flush=True)
    lora.save(t.loras, a.out, {"category": a.category, **t.run(lambda: data)})


def join(a):
    names = [c for c in concepts.categories()]
    paths = [os.path.join(a.init, c.replace(" ", "-") + ".safetensors") for c in names]
    t = Trainer(a, a.rank * len(names))
    ranks = lora.stack(t.loras, paths)
    ends = np.cumsum([0] + ranks)
    data = {c: t.data(c) for c in ["all"] + names}

    def choose():
        k = int(t.rng.integers(len(names))) if t.rng.random() < a.alone else -1
        t.switch.mask = torch.ones(ends[-1])
        if k >= 0:
            t.switch.mask.zero_()[ends[k]:ends[k + 1]] = 1
        return data[names[k] if k >= 0 else "all"]

    notes = t.run(choose)
    os.makedirs(a.out, exist_ok=True)
    for k, path in enumerate(paths):
        lora.save(t.loras, os.path.join(a.out, os.path.basename(path)), {"category": names[k], **notes}, ends[k], ends[k + 1])


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = ap.add_subparsers(dest="command", required=True)
    p = sub.add_parser("pairs")
    p.add_argument("--vae", required=True)
    p.add_argument("--out", required=True)
    p.add_argument("--each", type=int, default=24, help="pairs for each concept")
    for command in ("train", "join"):
        p = sub.add_parser(command)
        if command == "train":
            p.add_argument("--category", required=True)
            p.add_argument("--init", help="an adapter to go on with")
        else:
            p.add_argument("--init", required=True, help="folder of the experts to go on with")
            p.add_argument("--alone", type=float, default=0.25, help="share of the steps in which one of them is alone")
        p.add_argument("--rank", type=int, default=4)
        for name in ("unet", "text", "tokenizer", "pairs", "out"):
            p.add_argument("--" + name, required=True)
        p.add_argument("--latents", nargs="+", required=True)
        p.add_argument("--seconds", type=float, default=120, help="of processor time")
        p.add_argument("--seed", type=int, default=1)
        p.add_argument("--duels", type=int, default=12)
        p.add_argument("--keeps", type=int, default=20)
        p.add_argument("--pair-share", type=float, default=0.3, help="share of duels with two emoji")
        p.add_argument("--lr", type=float, default=2e-3)
        p.add_argument("--beta", type=float, default=10)
        p.add_argument("--keep", type=float, default=20, help="weight of the distance to the base on other captions")
        p.add_argument("--winner", type=float, default=5, help="weight of the winner's own loss")
    a = ap.parse_args()
    {"pairs": draw_pairs, "train": train, "join": join}[a.command](a)


if __name__ == "__main__":
    main()
