"""Draws pictures with torch: the check while training and the numbers of the card.

python sample.py --model DIR --out DIR [--unet DIR --vae DIR --text DIR] [--tsv heldout.tsv] [--first N]
Writes OUT/000.png ..., OUT/manifest.tsv for judge.py score, OUT/sheet.png.
--vae, --text and --unet take parts from elsewhere (fp32 training folders); --adapter FILE adds a
safety expert, as often as it is given (FILE=0.5: at half its weight).
"""
import argparse
import csv
import os
import time

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DPMSolverMultistepScheduler, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

import common
import fast
import glyphs
import lora


def draw(parts, prompts, seeds, steps, guidance, sampler="ddim", negative=""):
    tok, text, unet, vae = parts
    ids = lambda t: tok(t, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    sched = (DDIMScheduler(**common.SCHEDULER) if sampler == "ddim" else
             DPMSolverMultistepScheduler.from_config(DDIMScheduler(**common.SCHEDULER).config))
    sched.set_timesteps(steps)
    x = torch.cat([torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(s)) for s in seeds])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ctx = text(torch.cat([ids([negative] * len(prompts)), ids(prompts)])).last_hidden_state
        for t in sched.timesteps:
            y = unet(torch.cat([x, x]).contiguous(memory_format=torch.channels_last), t, ctx).sample.float()
            un, co = y.chunk(2)
            x = sched.step(un + guidance * (co - un), t, x).prev_sample
        pic = vae.decode((x / vae.config.scaling_factor).contiguous(memory_format=torch.channels_last)).sample
    return ((pic.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def load(model, vae=None, text=None, unet=None, adapters=()):
    at = lambda given, sub: given or os.path.join(model, sub)
    fast.install()
    net = UNet2DConditionModel.from_pretrained(at(unet, "unet")).float()
    for spec in adapters:
        path, _, weight = spec.partition("=")
        lora.fold(net, path, float(weight or 1))
    net = net.to(memory_format=torch.channels_last)
    net.set_attn_processor(fast.Attention())
    return (CLIPTokenizer.from_pretrained(os.path.join(model, "tokenizer")),
            CLIPTextModel.from_pretrained(at(text, "text_encoder")).float().eval(), net.eval(),
            AutoencoderKL.from_pretrained(at(vae, "vae")).float().eval().to(memory_format=torch.channels_last))


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--model", required=True)
    ap.add_argument("--out", required=True)
    for name in ("unet", "vae", "text"):
        ap.add_argument("--" + name)
    ap.add_argument("--adapter", action="append", default=[])
    ap.add_argument("--tsv", default=os.path.join(glyphs.HERE, "heldout.tsv"))
    ap.add_argument("--first", type=int, default=0)
    ap.add_argument("--every", type=int, default=1)
    ap.add_argument("--steps", type=int, default=20)
    ap.add_argument("--guidance", type=float, default=3.0)
    ap.add_argument("--sampler", choices=["ddim", "dpm++2m"], default="ddim")
    a = ap.parse_args()
    torch.set_num_threads(1)
    parts = load(a.model, a.vae, a.text, a.unet, a.adapter)
    with open(a.tsv, encoding="utf-8") as f:
        rows = list(csv.DictReader(f, delimiter="\t"))[::a.every]
    rows = rows[:a.first] if a.first else rows
    os.makedirs(a.out, exist_ok=True)
    start, pics = time.process_time(), []
    for i in range(0, len(rows), 16):
        some = rows[i:i + 16]
        pics += list(draw(parts, [r["prompt"] for r in some], [int(r["seed"]) for r in some],
                          a.steps, a.guidance, a.sampler))
    with open(os.path.join(a.out, "manifest.tsv"), "w", encoding="utf-8") as f:
        f.write("file\tleft\tright\n")
        for i, (p, r) in enumerate(zip(pics, rows)):
            Image.fromarray(p).save(os.path.join(a.out, f"{i:03d}.png"))
            f.write(f"{i:03d}.png\t{r['left']}\t{r['right'] or ''}\n")
    pics += [np.full_like(pics[0], 255)] * (-len(pics) % 8)
    grid = np.stack(pics).reshape(-1, 8, 128, 128, 3).transpose(0, 2, 1, 3, 4).reshape(-1, 1024, 3)
    Image.fromarray(grid).save(os.path.join(a.out, "sheet.png"))
    print(f"{len(rows)} pictures in {time.process_time() - start:.0f} s of one core")


if __name__ == "__main__":
    main()
