"""Trains the UNet on cached latents: v-prediction, two single-thread workers.

python unet.py --latents FILE.npz... --text DIR --tokenizer DIR --out DIR --minutes M

Each worker trains its own copy and every few steps adds half of what it moved to
the shared weights and takes those over (local SGD without a barrier: a busy
neighbour core slows one worker and stalls none).  Worker 0 keeps the running
average of the shared weights and writes it to DIR every few minutes.
The learning rate follows the wall clock.
"""
import argparse
import math
import os
import time

import numpy as np
import torch
import torch.multiprocessing as mp
from diffusers import UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizerFast

import captions
import common
import fast
import muon

SYNC = 5           # steps between two exchanges of weights
VARIED = 0.15       # share of pictures in a varied pose; the rest have the canonical one


def flat(net):
    return torch.cat([p.detach().reshape(-1) for p in net.parameters()])


def load_flat(net, vector):
    i = 0
    for p in net.parameters():
        p.data.copy_(vector[i:i + p.numel()].view_as(p))
        i += p.numel()


class Data:
    def __init__(self, files, seed):
        self.rng, self.files, self.size = np.random.default_rng(seed), files, 0
        self.load()

    def load(self):
        """Takes what latents.py has written so far; again while it is still at work."""
        files = [f for f in self.files if os.path.exists(f)]
        parts = [np.load(f) for f in files]
        if sum(len(p["left"]) for p in parts) == self.size:
            return
        join = lambda k: np.concatenate([p[k] for p in parts])
        self.z = torch.from_numpy(join("z"))
        self.left, self.right, self.bg = join("left"), join("right"), join("background")
        varied = np.concatenate([np.full(len(p["left"]), "varied" in f) for p, f in zip(parts, files)])
        pick = lambda m: [np.flatnonzero(m & ~varied), np.flatnonzero(m & varied)]
        self.singles, self.pairs = pick(self.right < 0), pick(self.right >= 0)
        self.size = len(self.left)

    def batch(self, n, pair_share):
        rng, idx, texts = self.rng, [], []
        while len(idx) < n:
            kind = self.pairs if rng.random() < pair_share else self.singles
            i = int(rng.choice(kind[int(rng.random() < VARIED and len(kind[1]) > 0)]))
            right = None if self.right[i] < 0 else int(self.right[i])
            bg = None if self.bg[i] < 0 else captions.COLOURS[self.bg[i]]
            text = captions.train_caption((int(self.left[i]), right, bg), rng)
            if text:
                idx.append(i)
                texts.append("" if rng.random() < 0.1 else text)
        return self.z[idx].float(), texts


def work(rank, a, shared, count, lock, start):
    torch.set_num_threads(1)
    torch.manual_seed(10 + rank)
    fast.install()
    tok = CLIPTokenizerFast.from_pretrained(a.tokenizer)
    text = CLIPTextModel.from_pretrained(a.text).eval().requires_grad_(False)
    data = Data(a.latents, 20 + rank)
    net = UNet2DConditionModel(**common.UNET)
    net.set_attn_processor(fast.Attention())
    load_flat(net, shared)
    net = net.to(memory_format=torch.channels_last)
    ours, rest = muon.split(net)
    opts = [muon.Muon(ours, a.lr, weight_decay=0.01),
            torch.optim.AdamW(rest, a.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)]
    root, sigma = common.alphas()
    base, ema = shared.clone(), shared.clone()
    step, syncs, shown, saved, avg = 0, 0, 0.0, 0.0, np.zeros(3)
    seen = np.zeros(3)
    while True:
        t = (time.time() - start) / (60 * a.minutes)
        if t >= 1:
            break
        lr = a.lr * min(1, (step + 1) / a.warm) * (0.5 + 0.5 * math.cos(math.pi * t))
        for g in opts[0].param_groups + opts[1].param_groups:
            g["lr"] = lr
        if step % 40 == 39:
            data.load()
        z, texts = data.batch(a.batch, a.pairs)
        ids = tok(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        ts = torch.where(torch.rand(len(z)) < 0.7, 500 + 500 * torch.rand(len(z)), 500 * torch.rand(len(z))).long()
        noise = torch.randn_like(z)
        r, s = root[ts].view(-1, 1, 1, 1), sigma[ts].view(-1, 1, 1, 1)
        x, v = r * z + s * noise, r * noise - s * z
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                ctx = text(ids).last_hidden_state
            y = net(x.contiguous(memory_format=torch.channels_last), ts, ctx).sample
        each = (y.float() - v).square().mean((1, 2, 3))
        loss = each.mean()
        net.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(rest, 1.0)
        for o in opts:
            o.step()
        step += 1
        with torch.no_grad():
            for k, (lo, hi) in enumerate(((0, 333), (333, 800), (800, 1000))):
                m = (ts >= lo) & (ts < hi)
                if m.any():
                    seen[k] += 1
                    w = max(0.02, 1 / seen[k])
                    avg[k] += w * (float(each[m].mean()) - avg[k])
            if step % SYNC == 0:
                mine = flat(net)
                with lock:
                    shared.add_(mine.sub_(base), alpha=0.6)
                    base.copy_(shared)
                    count += SYNC * len(z)
                load_flat(net, base)
                if rank == 0:
                    syncs += 1
                    ema.lerp_(base, 1 - min(1 - 0.001 * SYNC, (1 + syncs) / (8 + syncs)))
        if rank == 0 and time.time() - start > shown:
            shown = time.time() - start + 60
            print(f"{time.time() - start:6.0f} s step {step} samples {int(count)} loss by noise "
                  f"{avg[0]:.3f} {avg[1]:.3f} {avg[2]:.3f} lr {lr:.1e}", flush=True)
        if rank == 0 and time.time() - start > saved + 60 * a.save_minutes:
            saved = time.time() - start
            save(a.out, ema)
    if rank == 0:
        save(a.out, ema)
        print(f"done: {step} steps of worker 0, {int(count)} samples", flush=True)


def save(out, vector):
    net = UNet2DConditionModel(**common.UNET)
    load_flat(net, vector)
    net.save_pretrained(out)


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--latents", nargs="+", required=True)
    ap.add_argument("--text", required=True)
    ap.add_argument("--tokenizer", required=True)
    ap.add_argument("--out", required=True)
    ap.add_argument("--init")
    ap.add_argument("--minutes", type=float, default=65)
    ap.add_argument("--save-minutes", type=float, default=3)
    ap.add_argument("--batch", type=int, default=48)
    ap.add_argument("--lr", type=float, default=1e-3)
    ap.add_argument("--warm", type=int, default=150, help="steps over which the learning rate rises")
    ap.add_argument("--pairs", type=float, default=0.3, help="share of pictures with two emoji")
    ap.add_argument("--workers", type=int, default=2)
    a = ap.parse_args()
    torch.manual_seed(4)
    if a.init:
        net = UNet2DConditionModel.from_pretrained(a.init)
    else:
        net = UNet2DConditionModel(**common.UNET)
        fast.zero_residuals(net)
    shared = flat(net).share_memory_()
    count = torch.zeros(1, dtype=torch.float64).share_memory_()
    ctx = mp.get_context("spawn")
    lock, start = ctx.Lock(), time.time()
    print(f"UNet: {len(shared)} parameters", flush=True)
    ps = [ctx.Process(target=work, args=(r, a, shared, count, lock, start)) for r in range(a.workers)]
    for p in ps:
        p.start()
    for p in ps:
        p.join()
    if any(p.exitcode for p in ps):
        raise SystemExit("a worker failed")


if __name__ == "__main__":
    main()
