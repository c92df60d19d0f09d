"""Adapter files and policies for the tests of the safety: random LoRA in the diffusers format, strong enough to be seen, and ways to spoil them."""
import hashlib
import json
import pathlib
import struct
import sys

import numpy as np

from conftest import MODEL

UNET = pathlib.Path(MODEL) / "unet/diffusion_pytorch_model.safetensors"
NOTHING = {"requires_nothing": True}


def read_safetensors(path):
    """Header (with __metadata__) and tensors by name; F16 and F32 only."""
    data = pathlib.Path(path).read_bytes()
    length, = struct.unpack("<Q", data[:8])
    header = json.loads(data[8:8 + length])
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            kind = {"F16": np.float16, "F32": np.float32}[entry["dtype"]]
            tensors[name] = np.frombuffer(data[8 + length + begin:8 + length + end], kind).reshape(entry["shape"])
    return header, tensors


def write_safetensors(path, tensors):
    header, blobs, at = {}, [], 0
    for name, t in tensors.items():
        blob = np.ascontiguousarray(t).tobytes()
        header[name] = {"dtype": {"float16": "F16", "float32": "F32"}[t.dtype.name], "shape": list(t.shape), "data_offsets": [at, at + len(blob)]}
        blobs.append(blob)
        at += len(blob)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    pathlib.Path(path).write_bytes(struct.pack("<Q", len(text)) + text + b"".join(blobs))


def attention_shapes():
    """(out, in) of every attention projection of the UNet, by the name of its module."""
    header, _ = read_safetensors(UNET)
    return {name.removesuffix(".weight"): entry["shape"] for name, entry in header.items()
            if name != "__metadata__" and name.endswith(".weight")
            and any(name.endswith(f"attn{i}.{p}.weight") for i in (1, 2) for p in ("to_q", "to_k", "to_v", "to_out.0"))}


def lora(seed, rank=4, strength=0.5, modules=None):
    """Random factors: dW has `strength` of the Frobenius norm of a random W0 of the same shape with entries of the usual size."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, (rows, columns) in attention_shapes().items():
        if modules and not any(m in name for m in modules):
            continue
        down = (rng.standard_normal((rank, columns)) / np.sqrt(columns)).astype(np.float32)
        up = (rng.standard_normal((rows, rank)) * (strength / np.sqrt(rank))).astype(np.float32)
        tensors[f"unet.{name}.lora.down.weight"] = down
        tensors[f"unet.{name}.lora.up.weight"] = up
    return tensors


def digest(path):
    """What the server calls an adapter file: BLAKE2b-256 over its bytes."""
    return hashlib.blake2b(pathlib.Path(path).read_bytes(), digest_size=32).hexdigest()


def key_hash(key):
    return hashlib.blake2b(key.encode(), digest_size=32).hexdigest()


class Policy:
    """A policy file in a folder of its own, with the adapters beside it."""

    def __init__(self, folder, **top):
        self.folder = pathlib.Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / "policy.json"
        self.content = {"require_manifest": False, "adapters": {}, "profiles": {}, **top}

    def adapter(self, name, tensors, pin=False, file=None):
        path = self.folder / (file or f"{name}.safetensors")
        write_safetensors(path, tensors)
        return self.named(name, path.name, pin)

    def named(self, name, file, pin=False):
        self.content["adapters"][name] = {"path": file, **({"digest": digest(self.folder / file)} if pin else {})}
        return self

    def profile(self, name="default", required=(), **more):
        entries = [r if isinstance(r, dict) else {"adapter": r} for r in required]
        self.content["profiles"][name] = {**({"required": entries} if entries else {}), **more}
        return self

    def tenant(self, name, key, profile, **more):
        self.content.setdefault("tenants", {})[name] = {"key_hash": key_hash(key), "profile": profile, **more}
        return self

    def write(self):
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(self.content))
        new.rename(self.path)  # nobody sees half of it
        return self


if __name__ == "__main__":  # adapters.py FOLDER: two adapters, two styles and a tenant with a policy, for tests/load.sh
    policy = Policy(sys.argv[1])
    for seed, name in enumerate(("a", "b")):
        policy.adapter(name, lora(seed))
    for seed, name in enumerate(("ink", "wash")):
        policy.adapter(name, lora(seed + 8, strength=0.1), pin=True)
    policy.profile(required=["a"], styles=["ink", "wash"], max_style_norm_ratio=50)
    policy.tenant("anna", "anna-key-0123456789", "default", limits={"concurrency": 1}).write()
