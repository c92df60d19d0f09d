"""Goldens of pictures that start from another one: StableDiffusionImg2ImgPipeline and StableDiffusionInpaintPipeline.

Writes first.safetensors. The inpainting UNet has four channels: kept latents are blended back after every step.
"""
import checkpoints
import numpy as np
import torch
from common import GoldenFile
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline
from gen_pipelines import NEGATIVE, PROMPT, SEED, tiny_pipeline, to_bytes
from gen_samplers import make
from PIL import Image

HEIGHT, WIDTH = 64, 48
CASES = {
    "ddim": {"sampler": "ddim", "strength": 0.6},
    "euler": {"sampler": "euler", "strength": 0.7},
    "euler_karras": {"sampler": "euler_karras", "strength": 0.6},
    "euler_a": {"sampler": "euler_a", "strength": 0.8},
    "dpmpp_2m": {"sampler": "dpmpp_2m", "strength": 0.6},
    "full": {"sampler": "dpmpp_2m_karras", "strength": 1.0},
    "mask_ddim": {"sampler": "ddim", "strength": 0.6, "mask": True},
    "mask_euler_a": {"sampler": "euler_a", "strength": 0.8, "mask": True},
    "mask_dpmpp_2m": {"sampler": "dpmpp_2m", "strength": 0.8, "mask": True},
    "mask_full": {"sampler": "euler", "strength": 1.0, "mask": True},
}


def first_picture():
    """Colour ramps with a disc: smooth and sharp parts, no symmetry."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    rgb = np.stack([4 * y, 5 * x, 255 - 2 * y - 2 * x], axis=-1)
    rgb[(y - 20) ** 2 + (x - 30) ** 2 < 144] = (250, 40, 10)
    return np.clip(rgb, 0, 255).astype(np.uint8)


def mask():
    """The right half but for a bar, with grey edges on both sides of the middle."""
    out = np.zeros((HEIGHT, WIDTH), np.uint8)
    out[:, 20:] = 90
    out[:, 24:] = 160
    out[:, 28:] = 255
    out[40:52, :] = 0
    return out


def draw(base, config, sampler, strength, mask=None, **arguments):
    """Returns (latents before the first and after every step, the picture before anything is pasted)."""
    kind = StableDiffusionImg2ImgPipeline if mask is None else StableDiffusionInpaintPipeline
    pipe = kind(**{name: part for name, part in base.components.items() if name != "image_encoder"}, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = make(sampler, config)
    if mask is not None:
        arguments |= {"mask_image": Image.fromarray(mask), "height": HEIGHT, "width": WIDTH}
    path = []
    scale_model_input = pipe.scheduler.scale_model_input

    def first_latents(sample, *args, **kwargs):
        if not path:
            path.append(sample[:1].clone())
        return scale_model_input(sample, *args, **kwargs)

    def after_step(_pipe, _index, _t, values):
        path.append(values["latents"].clone())
        return {}

    pipe.scheduler.scale_model_input = first_latents
    picture = pipe(
        image=Image.fromarray(first_picture()),
        strength=strength,
        generator=torch.Generator().manual_seed(SEED),
        output_type="np",
        callback_on_step_end=after_step,
        **arguments,
    ).images[0]
    return torch.cat(path), picture


def main():
    defaults = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "num_inference_steps": 5, "guidance_scale": 3.0}
    out = GoldenFile(
        "first.safetensors",
        "Img2Img and Inpaint pipelines on ckpt/sd15: latents before and after every step, and the picture",
        seed=SEED,
        defaults=defaults,
        cases=CASES,
    )
    out.add("first", torch.from_numpy(first_picture()))
    out.add("mask", torch.from_numpy(mask()))
    base, config = tiny_pipeline("sd15"), checkpoints.CHECKPOINTS["sd15"]["scheduler"]
    for name, case in CASES.items():
        arguments = {**defaults, **case, "mask": mask() if case.get("mask") else None}
        path, picture = draw(base, config, **arguments)
        out.add(f"{name}.x", path)
        out.add(f"{name}.image", torch.from_numpy(to_bytes(picture)))
    out.close()


if __name__ == "__main__":
    main()
