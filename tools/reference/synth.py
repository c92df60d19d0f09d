"""The weights of the tiny checkpoints: a formula, not a file.

Who uses it: gen_networks.py, gen_pipelines.py and gen_weighting.py fill diffusers and transformers models with it; the C test
program that writes safetensors files implements the same few lines from tests/golden/README.md.

For the tensor named n (the names of today's diffusers, listed in ckpt/*/*/tensors.tsv) and the flat index i, row-major:

    s = fnv1a64(n as UTF-8)                          offset basis 0xcbf29ce484222325, prime 0x100000001b3
    z = s + (i + 1) * 0x9E3779B97F4A7C15             all of this modulo 2^64: splitmix64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    z = z ^ (z >> 31)
    u = (float)(z >> 40) * 2^-23f - 1.0f             exact, in [-1, 1)
    value = base + u * scale                         fp32: one multiply, then one add, never fused

    2 or more dimensions:         base 0, scale = (float)sqrt(3.0 / fan_in), fan_in = product(shape[1:])
    1 dimension, "...weight":     base 1, scale 0.1f
    1 dimension, otherwise:       base 0, scale 0.05f

The models then use each value rounded to fp16 (nearest even) and widened again, so that a file of fp32 numbers rounded this
way and a file of fp16 numbers hold the same model.
"""
import numpy as np
import torch

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
MIX1 = np.uint64(0xBF58476D1CE4E5B9)
MIX2 = np.uint64(0x94D049BB133111EB)


def fnv1a64(name):
    h = 0xCBF29CE484222325
    for byte in name.encode("utf-8"):
        h = ((h ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return h


def draw(name, shape):
    """The tensor in fp32, before rounding to fp16."""
    count = int(np.prod(shape, dtype=np.int64))
    z = np.uint64(fnv1a64(name)) + np.arange(1, count + 1, dtype=np.uint64) * GOLDEN
    z = (z ^ (z >> np.uint64(30))) * MIX1
    z = (z ^ (z >> np.uint64(27))) * MIX2
    z = z ^ (z >> np.uint64(31))
    u = (z >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-23) - np.float32(1.0)
    if len(shape) >= 2:
        base, scale = np.float32(0), np.float32(np.sqrt(3.0 / np.prod(shape[1:], dtype=np.float64)))
    elif name.endswith("weight"):
        base, scale = np.float32(1), np.float32(0.1)
    else:
        base, scale = np.float32(0), np.float32(0.05)
    return (base + u * scale).astype(np.float32).reshape(shape)


def fill(module, rounding=torch.float16):
    """Give every parameter of `module` its formula value, rounded to `rounding` and widened to fp32."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.from_numpy(draw(name, tuple(parameter.shape))).to(rounding).float())
    return module.float().eval().requires_grad_(False)


def write_tensor_list(module, path):
    """One line per tensor, in the order of the module: name, tab, comma-separated shape."""
    with open(path, "w", encoding="ascii") as out:
        for name, parameter in module.named_parameters():
            out.write(f"{name}\t{','.join(str(d) for d in parameter.shape)}\n")
