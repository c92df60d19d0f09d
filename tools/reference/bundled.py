"""Goldens of the bundled model: pictures that diffusers' fp32 pipeline draws with weights/emoji.

Writes bundled.safetensors and bundled.json, its manifest. Run it again, alone, whenever the weights change: python bundled.py [checkpoint folder]
It takes about a minute. The manifest holds the digests of the weights that it was made with, so that a test can tell stale
goldens from a wrong engine.
"""
import functools
import hashlib
import os
import sys

import common
import gen_pipelines
import torch
import vocabulary
from diffusers import StableDiffusionPipeline
from gen_samplers import SAMPLERS

STEPS = 20
GUIDANCE = 3.0  # the default that the model card names
PROMPTS = [
    ("a red car and a sunflower on a blue background", 1),
    ("a red apple", 2),
    ("an emoji of a pizza on a yellow background", 3),
    ("a cat face", 42),
    ("a rocket on a black background", 5),
    ("a picture of a dolphin", 6),
    ("a snowman and a rainbow", 7),
    ("a guitar on a purple background", 8),
    ("an octopus next to a lighthouse on a green background", 9),
    ("the hamburger", 10),
    ("a kitchen knife on a white background", 11),
    ("a bomb and a balloon on a pink background", 12),
    ("a skull", 13),
    ("a teddy bear on a red background", 14),
    ("an eyeglasses emoji on orange", 15),
    ("tree", 2**32 + 16),
    ("A Strawberry, Gray Background", 17),
    ("a cactus and an umbrella", 18),
    ("🚀 rocket, isn't it?", 19),
    ("", 20),
]
NEGATIVE = {3: "dog face", 13: "white", 17: "green background, blurry"}  # by index of the prompt
SAMPLER_PROMPT = 0  # drawn once more with every other sampler
EXACT = (0, 1)  # of these also the distance to fp64 networks


def digests(folder):
    found = {}
    for part in ("text_encoder", "unet", "vae"):
        for name in sorted(os.listdir(os.path.join(folder, part))):
            if name.endswith(".safetensors"):
                with open(os.path.join(folder, part, name), "rb") as f:
                    found[f"{part}/{name}"] = hashlib.sha256(f.read()).hexdigest()
    return found


def load(folder):
    pipe = StableDiffusionPipeline.from_pretrained(
        folder, torch_dtype=torch.float32, local_files_only=True, safety_checker=None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def scheduler_for(pipe_config, sampler):
    cls, options = SAMPLERS[sampler]
    return cls.from_config(pipe_config, **options)


def add_inside(out, pipe, config):
    """What the first step of the first case computes, to tell which network is wrong."""
    prompt, seed = PROMPTS[0]
    positive, negative = pipe.encode_prompt(prompt, "cpu", 1, True, "")
    scheduler = scheduler_for(config, "ddim")
    scheduler.set_timesteps(STEPS)
    t = scheduler.timesteps[:1].float()
    noise = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(seed))
    out.add("inside.context", positive)
    out.add("inside.context_negative", negative)
    out.add("inside.timestep", t)
    out.add("inside.noise", noise)
    out.add("inside.output", pipe.unet(noise, t, positive).sample)
    out.add("inside.output_negative", pipe.unet(noise, t, negative).sample)


def main():
    folder = sys.argv[1] if len(sys.argv) > 1 else common.BUNDLED
    if not os.path.exists(os.path.join(folder, "model_index.json")):
        print("no bundled model yet: skipped")
        return
    pipe = load(folder)
    config = pipe.scheduler.config
    fast = vocabulary.fast()
    cases = {}
    for i, (prompt, seed) in enumerate(PROMPTS):
        cases[f"c{i}"] = {"prompt": prompt, "negative_prompt": NEGATIVE.get(i, ""), "seed": seed, "sampler": "ddim"}
    for sampler in SAMPLERS:
        if sampler != "ddim":
            cases[sampler] = {**cases[f"c{SAMPLER_PROMPT}"], "sampler": sampler}
    out = common.GoldenFile(
        "bundled.safetensors",
        "StableDiffusionPipeline in fp32 on weights/emoji, 128x128",
        manifest="bundled.json",
        steps=STEPS,
        guidance_scale=GUIDANCE,
        cases=cases,
        weights=digests(folder),
        scheduler={k: v for k, v in config.items() if k[0] != "_"},
    )
    for name, case in cases.items():
        slow_ids = pipe.tokenizer(case["prompt"], add_special_tokens=False).input_ids
        if slow_ids != fast(case["prompt"], add_special_tokens=False).input_ids:
            raise ValueError(f"the tokenizers disagree about {case['prompt']!r}: choose another prompt")
        arguments = {
            "prompt": case["prompt"], "negative_prompt": case["negative_prompt"],
            "num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "height": 128, "width": 128,
        }  # fmt: skip
        exact = name in SAMPLERS or int(name[1:]) in EXACT
        make = functools.partial(scheduler_for, config, case["sampler"])
        gen_pipelines.add_case(out, name, pipe, make, case["seed"], exact=exact, last_only=True, **arguments)
    for sampler in SAMPLERS:
        scheduler = scheduler_for(config, sampler)
        scheduler.set_timesteps(STEPS)
        out.add(f"timesteps.{sampler}", scheduler.timesteps.float())
    add_inside(out, pipe, config)
    out.close()


if __name__ == "__main__":
    main()
