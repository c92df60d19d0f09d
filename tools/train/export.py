"""Assembles the shipped folder: diffusers layout, fp16 safetensors.

python export.py --vae DIR --text DIR --unet DIR --out weights/emoji
The tokenizer is already in --out (tokenizer.py).  Prints the sizes.
"""
import argparse
import json
import os

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel

import common

INDEX = {
    "_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.33.1",
    "feature_extractor": [None, None], "image_encoder": [None, None],
    "requires_safety_checker": False, "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"], "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"], "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def main():
    ap = argparse.ArgumentParser()
    for name in ("vae", "text", "unet", "out"):
        ap.add_argument("--" + name, required=True)
    a = ap.parse_args()
    at = lambda *p: os.path.join(a.out, *p)
    for cls, src, dst in ((AutoencoderKL, a.vae, "vae"), (UNet2DConditionModel, a.unet, "unet"),
                          (CLIPTextModel, a.text, "text_encoder")):
        net = cls.from_pretrained(src).to(torch.float16)
        if not all(torch.isfinite(p).all() for p in net.parameters()):
            raise SystemExit(f"{src}: a weight does not fit fp16")
        net = net.to(memory_format=torch.contiguous_format)
        net.save_pretrained(at(dst))
        path = at(dst, "config.json")
        with open(path) as f:
            config = json.load(f)
        config.pop("_name_or_path", None)
        with open(path, "w") as f:
            f.write(json.dumps(config, indent=2, sort_keys=True) + "\n")
    DDIMScheduler(**common.SCHEDULER).save_pretrained(at("scheduler"))
    with open(at("model_index.json"), "w") as f:
        f.write(json.dumps(INDEX, indent=2) + "\n")
    total = 0
    for base, _, files in sorted(os.walk(a.out)):
        for name in sorted(files):
            size = os.path.getsize(os.path.join(base, name))
            total += size
            if size > 100000:
                print(f"{size:>10} {os.path.relpath(os.path.join(base, name), a.out)}")
    print(f"{total:>10} bytes together")


if __name__ == "__main__":
    main()
