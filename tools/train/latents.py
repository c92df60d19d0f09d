"""Draws the training pictures and keeps their latents.

python latents.py --vae DIR --out FILE.npz --part I --parts N     one thread a part.
FILE: z (n, 4, 16, 16) fp16, already times scaling_factor; left, right (-1: none)
and background (-1: unsaid) of every picture.
"""
import argparse
import os
import time

import numpy as np
import torch
from diffusers import AutoencoderKL

import captions
import fast
import glyphs
from vae import to_tensor


def scenes(plain, coloured, pairs, rng):
    """Every glyph `plain` times on white unsaid, `coloured` times on each colour; then pairs."""
    n, c = len(glyphs.load()), len(captions.COLOURS)
    out = [(g, -1, -1) for g in range(n) for _ in range(plain)]
    out += [(g, -1, b) for g in range(n) for b in range(c) for _ in range(coloured)]
    while pairs > 0:
        left, right = int(rng.integers(n)), int(rng.integers(n))
        if captions.held_out((left, right, None), ""):
            continue
        out.append((left, right, int(rng.integers(c)) if rng.random() < 0.55 else -1))
        pairs -= 1
    return [out[i] for i in rng.permutation(len(out))]


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--vae", required=True)
    ap.add_argument("--out", required=True)
    ap.add_argument("--part", type=int, default=0)
    ap.add_argument("--parts", type=int, default=1)
    ap.add_argument("--plain", type=int, default=6)
    ap.add_argument("--coloured", type=int, default=1)
    ap.add_argument("--canonical", action="store_true", help="one pose: no shift, scale or rotation")
    ap.add_argument("--pairs", type=int, default=9000)
    ap.add_argument("--most", type=int, help="stop after so many pictures (to try the whole way quickly)")
    a = ap.parse_args()
    torch.set_num_threads(1)
    fast.install()
    vae = AutoencoderKL.from_pretrained(a.vae).to(memory_format=torch.channels_last)
    todo = scenes(a.plain, a.coloured, a.pairs, np.random.default_rng(5))[a.part::a.parts][:a.most]
    rng = np.random.default_rng(100 + a.part)
    stock, colours = glyphs.load(), [glyphs.BACKGROUNDS[c] for c in captions.COLOURS]
    z, start = np.empty((len(todo), 4, 16, 16), np.float16), time.time()
    for i in range(0, len(todo), 32):
        some = todo[i:i + 32]
        pics = np.stack([glyphs.render([stock[k][0] for k in s[:2] if k >= 0],
                                       (255,) * 3 if s[2] < 0 else colours[s[2]],
                                       None if a.canonical else rng, shift=0.6) for s in some])
        x = to_tensor(pics).contiguous(memory_format=torch.channels_last)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            m = vae.encode(x).latent_dist.mode().float() * vae.config.scaling_factor
        z[i:i + len(some)] = m.numpy()
        done = i + len(some)
        if (i // 32) % 20 == 19 or done == len(todo):
            s = np.array(todo[:done], np.int16)
            np.savez(a.out + ".tmp.npz", z=z[:done], left=s[:, 0], right=s[:, 1], background=s[:, 2])
            os.replace(a.out + ".tmp.npz", a.out)       # the UNet may start on what there is
            print(f"{done} of {len(todo)} in {time.time() - start:.0f} s", flush=True)
    z = z.astype(np.float32)
    print(f"done: mean {z.mean((0, 2, 3))}, std {z.std((0, 2, 3))}")


if __name__ == "__main__":
    main()
