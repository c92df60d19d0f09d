#!/usr/bin/python3
"""Writes the seeds of fuzz_manifest into a folder: small manifests that are right, and one with a signature that is not.

Usage: tests/fuzz/seeds_manifest.py FOLDER. Needs Python alone.
"""
import base64
import json
import pathlib
import struct
import sys


def manifest(channels, height, width, probes):
    """A manifest whose predictions are all ones and twos."""
    floats = lambda x: base64.b64encode(struct.pack("<f", x) * (channels * height * width)).decode()
    probe = lambda i: {"seed": i, "timestep": 901 - i, "prompt": "a red apple", "expected": floats(2.0), "base": floats(1.0)}
    return {"format": "safelight-manifest-1", "name": "seed", "digest": "0" * 64, "base": {"name": "fuzz", "digest": "0" * 64},
            "targets": {"count": 1, "digest": "0" * 64}, "max_rank": 1, "params": 4, "note": "",
            "canary": {"channels": channels, "height": height, "width": width, "tolerance": {"f32": 0.0001, "bf16": 0.03},
                       "probes": [probe(i) for i in range(probes)]}}


def main():
    folder = pathlib.Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, shape in {"one": (1, 1, 1, 1), "latent": (4, 2, 2, 3)}.items():
        (folder / name).write_text(json.dumps(manifest(*shape)))
    signed = manifest(1, 1, 1, 1) | {"public_key": "1" * 64, "signature": "2" * 128}
    (folder / "signed").write_text(json.dumps(signed))


if __name__ == "__main__":
    main()
