"""Trains the judge on rendered glyphs and writes judge.npz.  One thread.

python judge_train.py --minutes M

Pictures are drawn in batches on tensors: random size, place, angle, background
(plain, gradient), blur, noise and colour shift.  judge.py draws its own test
pictures with Pillow, on another path.
"""
import argparse
import math
import os
import time

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import glyphs
import judge

WIDTHS = [(32, 64), (64, 96), (96, 144)]


class Net(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.m = nn.ModuleDict()
        add = lambda k, i, o, s: self.m.update({k: nn.Sequential(nn.Conv2d(i, o, 3, s, 1, bias=False), nn.BatchNorm2d(o))})
        add("c0", 3, 32, 2)
        for k, (i, o) in enumerate(WIDTHS, 1):
            add(f"d{k}", i, o, 1 if k == 3 else 2)
            add(f"r{k}a", o, o, 1)
            add(f"r{k}b", o, o, 1)
        self.h, self.fc = nn.Linear(144 * 4, 224), nn.Linear(224, n)

    def forward(self, x):
        m = self.m
        x = F.relu(m["c0"](x))
        for k in "123":
            x = F.relu(m["d" + k](x))
            x = F.relu(x + m[f"r{k}b"](F.relu(m[f"r{k}a"](x))))
        x = F.avg_pool2d(x, 4).permute(0, 2, 3, 1).flatten(1)
        return self.fc(F.dropout(F.relu(self.h(x)), 0.1, self.training))

    def export(self, path):
        """Folds the batch norms; convolutions as (9c, out) matrices in judge.py's order."""
        out = {}
        for k, (c, b) in self.m.items():
            s = b.weight / (b.running_var + b.eps).sqrt()
            w = c.weight * s[:, None, None, None]
            out[k + ".w"] = w.permute(2, 3, 1, 0).reshape(-1, w.shape[0])
            out[k + ".b"] = b.bias - b.running_mean * s
        for k, l in (("h", self.h), ("fc", self.fc)):
            out[k + ".w"], out[k + ".b"] = l.weight.t(), l.bias
        np.savez(path, **{k: v.detach().numpy().astype(np.float16) for k, v in out.items()})


def art():
    """All glyphs as premultiplied RGBA at 72x72 with a transparent rim."""
    from PIL import Image
    out = []
    for text, _, _ in glyphs.load():
        a = np.asarray(glyphs.rgba(text).resize((68, 68), Image.LANCZOS), np.float32) / 255
        a = np.concatenate([a[..., :3] * a[..., 3:], a[..., 3:]], -1)
        out.append(np.pad(a, ((2, 2), (2, 2), (0, 0))).transpose(2, 0, 1))
    return torch.tensor(np.stack(out))


def draw(stock, idx, g):
    n = len(idx)
    u = lambda lo, hi, *s: torch.rand(n, *s, generator=g) * (hi - lo) + lo
    side, angle = u(44, 66), u(-0.14, 0.14)         # pixels of the 68 across, of a picture of 64
    k = 64 / side * 68 / 72
    c, s = angle.cos() * k, angle.sin() * k
    room = (64 - side).clamp(min=3) / 64 * 0.7
    tx, ty = u(-1, 1) * room * k, u(-1, 1) * room * k
    theta = torch.stack([torch.stack([c, -s, tx], 1), torch.stack([s, c, ty], 1)], 1)
    x = F.grid_sample(stock[idx], F.affine_grid(theta, (n, 4, 64, 64), align_corners=False), align_corners=False)
    bg = u(0, 1, 3, 1, 1)
    bg[u(0, 1) < 0.25] = 1.0
    ramp = torch.linspace(-1, 1, 64).view(1, 1, 64, 1) * u(-0.15, 0.15, 3, 1, 1) * (u(0, 1, 1, 1, 1) < 0.3)
    x = x[:, :3] + (bg + ramp) * (1 - x[:, 3:])
    x = x * u(0.85, 1.15, 1, 1, 1) + u(-0.08, 0.08, 3, 1, 1)
    q = n // 4
    f = torch.rand(1, generator=g).item() * 0.7 + 0.5     # softened: down and up again
    small = F.interpolate(x[:q], scale_factor=f, mode="area")
    x[:q] = F.interpolate(small, size=64, mode="bilinear", align_corners=False)
    w = torch.rand(1, generator=g).item() * 0.25
    ker = torch.tensor([w, 1 - 2 * w, w])
    ker = (ker[:, None] * ker[None]).expand(3, 1, 3, 3)
    x[q:2 * q] = F.conv2d(F.pad(x[q:2 * q], (1, 1, 1, 1), mode="replicate"), ker, groups=3)
    x = x + torch.randn(x.shape, generator=g) * u(0, 0.06, 1, 1, 1)
    return x.clamp(0, 1) * 2 - 1


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--minutes", type=float, default=10)
    ap.add_argument("--out", default=os.path.join(judge.HERE, "judge.npz"))
    a = ap.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(2)
    g = torch.Generator().manual_seed(3)
    stock = art()
    n = len(stock)
    net = Net(n).to(memory_format=torch.channels_last)
    opt = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=0.02)
    start, step, shown, acc = time.time(), 0, 30, 0.0
    while True:
        t = (time.time() - start) / (60 * a.minutes)
        if t >= 1:
            break
        for p in opt.param_groups:
            p["lr"] = 3e-3 * min(1, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * t))
        idx = torch.randint(0, n, (128,), generator=g)
        x = draw(stock, idx, g).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            y = net(x)
        loss = F.cross_entropy(y.float(), idx, label_smoothing=0.02)
        opt.zero_grad(set_to_none=True)
        loss.backward()
        opt.step()
        step += 1
        acc = 0.97 * acc + 0.03 * float((y.argmax(1) == idx).float().mean())
        if time.time() - start > shown:
            shown += 60
            print(f"{time.time() - start:6.0f} s step {step} loss {float(loss):.3f} train top-1 {acc:.4f}", flush=True)
    net.eval()
    net.export(a.out)
    r = judge.evaluate(judge.Judge(a.out), 2)
    print(f"done: {step} steps of 128; rendered, held-out settings: top-1 {r['top1']:.4f} of {r['pictures']}", flush=True)


if __name__ == "__main__":
    main()
