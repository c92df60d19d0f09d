"""Trains the AutoencoderKL: 128x128 pictures to 16x16x4 latents and back.

python vae.py --out DIR --minutes M      one thread; crops of 64 first, whole
pictures at the end; learning rate and crop size follow the wall clock.
Writes DIR (diffusers layout, fp32, EMA weights, scaling_factor measured).
"""
import argparse
import math
import os
import time

import numpy as np
import torch
from diffusers import AutoencoderKL

import fast
import glyphs

CONFIG = dict(
    in_channels=3, out_channels=3, latent_channels=4, sample_size=128,
    down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
    block_out_channels=[32, 64, 64, 96], layers_per_block=1, norm_num_groups=16, act_fn="silu",
)


def make_pool(n, rng, pairs=0.35):
    """n pictures: singles and pairs, named and arbitrary backgrounds."""
    texts = [g[0] for g in glyphs.load()]
    named = list(glyphs.BACKGROUNDS.values())
    pool = np.empty((n, 128, 128, 3), np.uint8)
    for i in range(n):
        pair = rng.random() < pairs
        pick = [texts[k] for k in rng.choice(len(texts), 2 if pair else 1)]
        u = rng.random()
        bg = (255,) * 3 if u < 0.3 else named[rng.integers(len(named))] if u < 0.85 else tuple(
            int(v) for v in rng.integers(0, 256, 3))
        pool[i] = glyphs.render(pick, bg, rng)
    return pool


def to_tensor(a):
    return torch.from_numpy(a).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def psnr(vae, pool):
    with torch.no_grad():
        x = to_tensor(pool)
        y = vae.decode(vae.encode(x).latent_dist.mode()).sample.clamp(-1, 1)
    mse = ((x - y) / 2).square().mean((1, 2, 3))
    return float((-10 * mse.log10()).mean()), y


def loss_fn(x, y, dist):
    d = y.float() - x
    edge = (d[..., 1:] - d[..., :-1]).abs().mean() + (d[..., 1:, :] - d[..., :-1, :]).abs().mean()
    kl = 0.5 * (dist.mean.float() ** 2 + dist.var.float() - 1 - dist.logvar.float()).mean()
    return d.abs().mean() + 0.5 * edge + d.square().mean(), kl


def normalise(vae, pool):
    """Gives every latent channel mean 0 and standard deviation 1 / 0.18215.

    Folded into quant_conv and post_quant_conv, so that Stable Diffusion's own
    scaling_factor is right and nothing else has to know.
    """
    with torch.no_grad():
        z = torch.cat([vae.encode(to_tensor(pool[i:i + 50])).latent_dist.mode() for i in range(0, len(pool), 50)])
        mean, gain = z.mean((0, 2, 3)), 1 / 0.18215 / z.std((0, 2, 3))
        q, p = vae.quant_conv, vae.post_quant_conv
        q.weight[:4] *= gain.view(4, 1, 1, 1)
        q.bias[:4] = (q.bias[:4] - mean) * gain
        q.bias[4:] += 2 * gain.log()
        p.bias += p.weight[:, :, 0, 0] @ mean
        p.weight /= gain.view(1, 4, 1, 1)
    vae.register_to_config(scaling_factor=0.18215)
    print(f"latents had mean {mean.tolist()}, std {(1 / 0.18215 / gain).tolist()}", flush=True)


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--out", required=True)
    ap.add_argument("--minutes", type=float, default=30)
    ap.add_argument("--pool", type=int, default=8000)
    ap.add_argument("--lr", type=float, default=1.5e-3)
    ap.add_argument("--init")
    ap.add_argument("--decoder-only", action="store_true")
    ap.add_argument("--noise", type=float, default=0.0, help="up to so much noise on the latents (1: their spread)")
    a = ap.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    fast.install()
    rng = np.random.default_rng(0)
    if a.init:
        vae = AutoencoderKL.from_pretrained(a.init)
    else:
        vae = AutoencoderKL(**CONFIG)
        fast.zero_residuals(vae)
    vae = vae.to(memory_format=torch.channels_last)
    if a.decoder_only:
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    params = [p for p in vae.parameters() if p.requires_grad]
    ema = [p.detach().clone() for p in params]
    opt = torch.optim.AdamW(params, a.lr, betas=(0.9, 0.99), weight_decay=1e-4)
    start = time.time()
    pool = make_pool(a.pool, rng, 0.45 if a.decoder_only else 0.35)
    test = make_pool(48, np.random.default_rng(99))
    print(f"pool {len(pool)} pictures in {time.time() - start:.0f} s", flush=True)
    start, step, seen, shown, avg = time.time(), 0, 0, 0, 0.0
    while True:
        t = (time.time() - start) / (60 * a.minutes)
        if t >= 1:
            break
        if a.decoder_only:
            side, bs = 128, 8
        else:
            side, bs = (64, 16) if t < 0.65 else (96, 8) if t < 0.8 else (128, 6)
        warm = min(1, (step + 1) / 100)
        for g in opt.param_groups:
            g["lr"] = a.lr * warm * (0.5 + 0.5 * math.cos(math.pi * t))
        pick = pool[rng.integers(len(pool), size=bs)]
        if side < 128:
            oy, ox = rng.integers(0, 128 - side + 1, 2)
            pick = pick[:, oy:oy + side, ox:ox + side]
        x = to_tensor(np.ascontiguousarray(pick)).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            if a.decoder_only:
                with torch.no_grad():
                    dist = vae.encode(x).latent_dist
            else:
                dist = vae.encode(x).latent_dist
            z = dist.sample()
            if a.noise:            # the UNet's latents are not exact: learn to forgive
                z = z + torch.randn_like(z) * torch.rand(len(z), 1, 1, 1) * a.noise / vae.config.scaling_factor
            y = vae.decode(z).sample
        rec, kl = loss_fn(x, y, dist)
        loss = rec if a.decoder_only else rec + 1e-5 * kl
        opt.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        opt.step()
        step, seen = step + 1, seen + bs
        decay = min(0.998, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(ema, params, 1 - decay)
        avg = avg * 0.98 + float(rec) * 0.02
        if time.time() - start > shown:
            shown = time.time() - start + (180 if a.decoder_only else 60)
            live = [p.detach().clone() for p in params]
            for p, e in zip(params, ema):
                p.data.copy_(e)
            db, _ = psnr(vae, test[:24])
            vae.save_pretrained(a.out)
            for p, e in zip(params, live):
                p.data.copy_(e)
            print(f"{time.time() - start:6.0f} s step {step} seen {seen} loss {avg:.4f} kl {float(kl):.2f} "
                  f"lr {opt.param_groups[0]['lr']:.2e} side {side} ema psnr {db:.2f} dB", flush=True)
    for p, e in zip(params, ema):
        p.data.copy_(e)
    if not a.decoder_only:
        normalise(vae, pool[:1000])
    db, _ = psnr(vae, test)
    vae.save_pretrained(a.out)
    print(f"done: {step} steps, {seen} crops, psnr {db:.2f} dB, scaling_factor {vae.config.scaling_factor}", flush=True)


if __name__ == "__main__":
    main()
