"""Goldens of the whole way: StableDiffusionPipeline on the tiny checkpoints, every sampler.

Writes pipeline.safetensors. bundled.py uses its functions for the bundled model.
"""
import copy

import checkpoints
import diffusers.schedulers.scheduling_euler_ancestral_discrete as euler_a
import numpy as np
import torch
import vocabulary
from common import GoldenFile
from diffusers import StableDiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor
from gen_samplers import SAMPLERS, make

PROMPT = "a red car and a sunflower on a blue background"
NEGATIVE = "blurry, low quality"
SEED = 1234


def tiny_pipeline(name):
    pipe = StableDiffusionPipeline(
        vae=checkpoints.load_vae(name),
        text_encoder=checkpoints.load_text_encoder(name),
        tokenizer=vocabulary.slow(name),
        unet=checkpoints.load_unet(name),
        scheduler=make("ddim", checkpoints.CHECKPOINTS[name]["scheduler"]),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, scheduler, seed, **arguments):
    """One picture. Returns (latents before the first and after every step, (H, W, 3) picture in [0, 1])."""
    pipe.scheduler = scheduler
    path = []
    # The initial latents, with init_noise_sigma applied, are the first thing that the pipeline hands to the scheduler.
    scale_model_input = scheduler.scale_model_input

    def first_latents(sample, *args, **kwargs):
        if not path:
            path.append(sample[:1].clone())
        return scale_model_input(sample, *args, **kwargs)

    def after_step(_pipe, _index, _t, values):
        path.append(values["latents"].clone())
        return {}

    if arguments.get("clip_skip") and "prompt_embeds" not in arguments:
        # diffusers skips layers of the prompt only; A1111, whose setting this is, of both, and so does Safelight
        prompt, negative = arguments.pop("prompt"), arguments.pop("negative_prompt")
        embeds = [pipe.encode_prompt(text, "cpu", 1, False, clip_skip=arguments["clip_skip"])[0] for text in (prompt, negative)]
        arguments |= {"prompt_embeds": embeds[0], "negative_prompt_embeds": embeds[1]}
    scheduler.scale_model_input = first_latents
    arguments.setdefault("generator", torch.Generator().manual_seed(seed))
    picture = pipe(output_type="np", callback_on_step_end=after_step, **arguments).images[0]
    return torch.cat(path), picture


def draw_exact(pipe, scheduler, seed, prompt, negative_prompt=None, clip_skip=None, **arguments):
    """The same picture with networks in fp64 and the same fp32 random numbers: how exact is the fp32 one?"""
    generator = torch.Generator().manual_seed(seed)
    guided = arguments["guidance_scale"] > 1
    factor = pipe.vae_scale_factor
    shape = (1, pipe.unet.config.in_channels, arguments["height"] // factor, arguments["width"] // factor)
    latents = torch.randn(shape, generator=generator).double()
    networks = {part: getattr(pipe, part) for part in ("text_encoder", "unet", "vae")}
    try:
        for part, network in networks.items():
            setattr(pipe, part, copy.deepcopy(network).double())
        torch.set_default_dtype(torch.float64)  # the causal mask is made in the default type
        embeds = pipe.encode_prompt(prompt, "cpu", 1, False, clip_skip=clip_skip)[0]
        negative = pipe.encode_prompt(negative_prompt, "cpu", 1, False, clip_skip=clip_skip)[0] if guided else None
        torch.set_default_dtype(torch.float32)
        euler_a.randn_tensor = lambda shape, dtype, device, generator: torch.randn(shape, generator=generator).to(dtype)
        arguments |= {"prompt_embeds": embeds, "negative_prompt_embeds": negative, "latents": latents}
        return draw(pipe, scheduler, seed, generator=generator, **arguments)
    finally:
        euler_a.randn_tensor = randn_tensor
        for part, network in networks.items():
            setattr(pipe, part, network)


def to_bytes(picture):
    """What diffusers' numpy_to_pil does."""
    return (picture * 255).round().astype(np.uint8)


def psnr(a, b):
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return 10 * np.log10(255**2 / error) if error > 0 else 999.0


def add_case(out, case, pipe, make_scheduler, seed, exact=True, last_only=False, **arguments):
    """Draw and store the latents (of every step, or after the last one only) and the picture. `exact`: draw once more in fp64,
    with another scheduler, because a scheduler keeps state."""
    path, picture = draw(pipe, make_scheduler(), seed, **arguments)
    image = to_bytes(picture)
    path_exact, picture_exact = draw_exact(pipe, make_scheduler(), seed, **arguments) if exact else (None, None)
    if last_only:
        path, path_exact = path[-1:], path_exact[-1:] if exact else None
    out.add(f"{case}.x", path, path_exact)
    out.add(f"{case}.image", torch.from_numpy(image))
    if exact:
        out.stats[f"{case}.image"] = {
            "mean": round(float(image.mean()), 2),
            "std": round(float(image.std()), 2),
            "psnr_of_fp32": round(float(psnr(image, to_bytes(picture_exact))), 1),
        }


def main():
    cases = {
        f"{name}.{sampler}": {"height": 128, "width": 64} for name in ("sd15", "sd21") for sampler in SAMPLERS
    }
    # Odd sizes inside the UNet: latents of 12x12, 6x6, 3x3, 2x2.
    cases["sd15.clip_skip1"] = {"sampler": "ddim", "height": 96, "width": 96, "clip_skip": 1}
    cases["sd15.unguided"] = {
        "sampler": "euler", "height": 64, "width": 64, "guidance_scale": 1.0, "num_inference_steps": 2, "negative_prompt": None
    }  # fmt: skip
    defaults = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "num_inference_steps": 5, "guidance_scale": 7.5}
    out = GoldenFile(
        "pipeline.safetensors",
        "StableDiffusionPipeline on ckpt/sd15 and ckpt/sd21: latents before and after every step, and the picture",
        seed=SEED,
        defaults=defaults,
        cases=cases,
    )
    pipes = {name: tiny_pipeline(name) for name in ("sd15", "sd21")}
    for case, changes in cases.items():
        name, sampler = case.split(".")
        arguments = {**defaults, **changes}
        sampler = arguments.pop("sampler", sampler)
        config = checkpoints.CHECKPOINTS[name]["scheduler"]
        add_case(out, case, pipes[name], lambda: make(sampler, config), SEED, **arguments)
    out.close()


if __name__ == "__main__":
    main()
