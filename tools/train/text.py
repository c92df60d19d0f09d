"""Pre-trains the CLIP text encoder to name and sketch the picture.

python text.py --tokenizer DIR --out DIR --minutes M      one thread.
Linear heads on the hidden states read off left glyph, right glyph and
background, and sketch the picture at 16x16; they are thrown away.  The states
behind the end of the text carry the answer at every position, so that the
UNet's cross-attention finds it before it has learnt where to look.
"""
import argparse
import math
import time

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizerFast

import captions
import glyphs

WIDTH = 96


def make_model():
    return CLIPTextModel(CLIPTextConfig(
        vocab_size=49408, hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=3,
        num_attention_heads=3, max_position_embeddings=77, hidden_act="quick_gelu",
        projection_dim=WIDTH, bos_token_id=49406, eos_token_id=49407, pad_token_id=49407))


def layer(texts):
    """Premultiplied RGBA of the scene's glyphs at 16x16, 4x16x16 in 0..1."""
    one = glyphs.render(texts, (0, 0, 0)).astype(np.float32)
    two = glyphs.render(texts, (255, 255, 255)).astype(np.float32)
    small = lambda x: np.asarray(Image.fromarray(x.astype(np.uint8)).resize((16, 16), Image.BOX), np.float32) / 255
    rgb, alpha = small(one), 1 - (small(two) - small(one)).mean(-1, keepdims=True)
    return np.concatenate([rgb, alpha], -1).transpose(2, 0, 1)


class Sketcher:
    """Low-resolution pictures of scenes, composed from per-glyph layers."""

    def __init__(self):
        self.single, self.half = [], []
        for text, _, _ in glyphs.load():
            self.single.append(layer([text]))
            self.half.append(layer([text, text]))
        self.single = torch.tensor(np.stack(self.single))
        self.half = torch.tensor(np.stack(self.half))

    def __call__(self, scenes):
        out = []
        for left, right, bg in scenes:
            b = torch.tensor(glyphs.BACKGROUNDS[bg or "white"]).view(3, 1, 1) / 255
            if right is None:
                x = self.single[left]
            else:
                x = torch.cat([self.half[left][..., :8], self.half[right][..., 8:]], -1)
            out.append(x[:3] + b * (1 - x[3:]))
        return torch.stack(out) * 2 - 1


class Heads(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.left, self.right = nn.Linear(WIDTH, n), nn.Linear(WIDTH, n + 1)
        self.bg = nn.Linear(WIDTH, len(captions.COLOURS))
        self.sketch = nn.Sequential(nn.Linear(WIDTH, 384), nn.SiLU(), nn.Linear(384, 768))


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--tokenizer", required=True)
    ap.add_argument("--out", required=True)
    ap.add_argument("--minutes", type=float, default=15)
    ap.add_argument("--batch", type=int, default=96)
    a = ap.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(1)
    rng = np.random.default_rng(1)
    tok = CLIPTokenizerFast.from_pretrained(a.tokenizer)
    n = len(glyphs.load())
    model, heads, sketcher = make_model(), Heads(n), Sketcher()
    params = list(model.parameters()) + list(heads.parameters())
    opt = torch.optim.AdamW(params, 1e-3, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    ema = [p.detach().clone() for p in params]
    start, step, shown, stat = time.time(), 0, 30, np.zeros(5)
    peak = 2e-3
    while True:
        t = (time.time() - start) / (60 * a.minutes)
        if t >= 1:
            break
        for g in opt.param_groups:
            g["lr"] = peak * min(1, (step + 1) / 200) * (0.5 + 0.5 * math.cos(math.pi * t))
        scenes, texts = [], []
        while len(scenes) < a.batch:
            s = captions.random_scene(rng, pair=0.4)
            c = captions.train_caption(s, rng)
            if c:
                scenes.append(s)
                texts.append(c)
        ids = tok(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        width = 77 if step % 5 == 0 else 32         # captions end before 32: the rest is padding
        ids = ids[:, :width]
        end = (ids == 49407).int().argmax(1)
        for k in np.flatnonzero(rng.random(a.batch) < 0.1):      # a word the model has never seen
            at = int(rng.integers(1, int(end[k]) + 1))
            ids[k, at + 1:] = ids[k, at:-1].clone()
            ids[k, at] = int(rng.integers(0, 49406))
            end[k] += 1
        with torch.autocast("cpu", torch.bfloat16):
            h = model(ids).last_hidden_state.float()
        at = torch.stack([end, end + torch.randint(0, 77, end.shape) % (width - end)], 1)
        states = torch.cat([h.gather(1, at[..., None].expand(-1, -1, WIDTH)), h.mean(1, keepdim=True)], 1)
        left = torch.tensor([s[0] for s in scenes])
        right = torch.tensor([n if s[1] is None else s[1] for s in scenes])
        bg = torch.tensor([captions.COLOURS.index(s[2] or "white") for s in scenes])
        pic = sketcher(scenes).flatten(1)
        rep = lambda x: x.repeat_interleave(3, 0)
        flat = states.flatten(0, 1)
        pl, pr, pb = heads.left(flat), heads.right(flat), heads.bg(flat)
        losses = [F.cross_entropy(pl, rep(left)), F.cross_entropy(pr, rep(right)),
                  F.cross_entropy(pb, rep(bg)), F.mse_loss(heads.sketch(flat), rep(pic))]
        loss = losses[0] + losses[1] + losses[2] + 5 * losses[3]
        opt.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        opt.step()
        step += 1
        with torch.no_grad():
            torch._foreach_lerp_(ema, params, 1 - min(0.998, (1 + step) / (10 + step)))
        acc = float((pl.argmax(1) == rep(left)).float().mean())
        stat = 0.98 * stat + 0.02 * np.array([float(x) for x in losses] + [acc])
        if time.time() - start > shown:
            shown += 60
            right_acc = float((pr.argmax(1) == rep(right)).float().mean())
            print(f"{time.time() - start:6.0f} s step {step} left {stat[0]:.3f} right {stat[1]:.3f} "
                  f"background {stat[2]:.3f} sketch {stat[3]:.4f} left top-1 {stat[4]:.3f} right {right_acc:.2f} "
                  f"lr {opt.param_groups[0]['lr']:.1e}", flush=True)
    for p, e in zip(params, ema):
        p.data.copy_(e)
    model.save_pretrained(a.out)
    print(f"done: {step} steps", flush=True)


if __name__ == "__main__":
    main()
