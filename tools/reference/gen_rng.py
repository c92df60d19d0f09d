"""Goldens of the random numbers: torch.Generator("cpu") seeds and torch.randn in fp32.

Writes rng.safetensors. torch draws fewer than 16 values one by one from a double-precision normal distribution, and 16 or more by
filling with uniforms and transforming blocks of 16 (the last block anew where the size is no multiple of 16). The uniforms are
exact everywhere; torch's own vector code and its plain code differ by up to 2e-6 in the logarithm and cosine that follow.
"""
import numpy
import torch
from common import GoldenFile

SEEDS = [0, 1, 42, 2**31, 2**32 + 42, 2**53 + 1, 2**63 - 1]
SHAPES = [(1,), (2,), (15,), (16,), (17,), (31,), (1, 4, 16, 16), (1, 4, 64, 64)]
SEQUENCE = [3, 4, 16, 1, 20, 2, 1]


def main():
    out = GoldenFile("rng.safetensors", "torch.randn from torch.Generator('cpu').manual_seed(seed)", seeds=[str(s) for s in SEEDS])
    for seed in SEEDS:
        for shape in SHAPES:
            values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).flatten()
            name = f"seed{seed}.n{values.numel()}"
            if values.numel() > 1024:
                out.add(f"{name}.sum", values.double().sum().float().reshape(1))
                out.add(f"{name}.sum_abs", values.double().abs().sum().float().reshape(1))
                out.add(f"{name}.tail", values[-32:])
                name, values = f"{name}.head", values[:64]
            out.add(name, values)
    # One generator, several draws: what is left over between calls matters.
    for seed in (7, 2**40 + 5):
        generator = torch.Generator().manual_seed(seed)
        for i, count in enumerate(SEQUENCE):
            out.add(f"sequence{seed}.{i}", torch.randn(count, generator=generator))
    out.add("raw.seed42.u32", torch.from_numpy(raw_words(42, 32)))
    out.close()


def raw_words(seed, count):
    """The first words of the Mersenne Twister (MT19937, numpy's has the same seeding), to check a port below the normal
    distribution. torch keeps the low 32 bits of the seed."""
    return numpy.random.RandomState(seed).randint(0, 2**32, count, dtype=numpy.uint64).astype(numpy.int64)


if __name__ == "__main__":
    main()
