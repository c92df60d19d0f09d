"""Goldens of the samplers: schedules and whole trajectories with a cheap stand-in for the UNet.

Writes samplers.safetensors. The schedulers are made the way a user of diffusers makes them, SCHEDULER.from_config(pipe.scheduler.config)
with the scheduler_config.json of the checkpoint; keys that the file does not have take the default of the *new* class, which is why
the spacing of timesteps differs between DDIM ("leading") and the others ("linspace") for SD1.5 and SD2.1.
"""
import math

import checkpoints
import diffusers
import torch
from common import GoldenFile
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
)

SAMPLERS = {
    "ddim": (DDIMScheduler, {}),
    "euler": (EulerDiscreteScheduler, {}),
    "euler_karras": (EulerDiscreteScheduler, {"use_karras_sigmas": True}),
    "euler_a": (EulerAncestralDiscreteScheduler, {}),
    "dpmpp_2m": (DPMSolverMultistepScheduler, {}),
    "dpmpp_2m_karras": (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
}
SEED = 7
STEPS = (1, 2, 5, 20, 30)
STEPS_OTHER_SPACING = (5, 20)


def make(sampler, config, **changes):
    """The scheduler `sampler` for a checkpoint whose scheduler_config.json is `config`."""
    cls, options = SAMPLERS[sampler]
    base = getattr(diffusers, config["_class_name"]).from_config(config)
    return cls.from_config(base.config, **options, **changes)


def stand_in(x, t):
    """out = a * x + 0.1, a = 0.5 * sin(0.01 * t) computed in double and rounded to fp32."""
    a = 0.5 * torch.sin(0.01 * t.double())
    return a.float() * x + 0.1


def run(scheduler, steps):
    """Returns timesteps, sigmas or None, init_noise_sigma and the latents before the first and after every step."""
    generator = torch.Generator().manual_seed(SEED)
    scheduler.set_timesteps(steps)
    x = torch.randn((1, 4, 4, 4), generator=generator) * scheduler.init_noise_sigma
    path = [x]
    extra = {"eta": 0.0} if isinstance(scheduler, DDIMScheduler) else {}
    if not isinstance(scheduler, DPMSolverMultistepScheduler):
        extra["generator"] = generator
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t)
        x = scheduler.step(stand_in(scaled, t), t, x, **extra).prev_sample
        path.append(x)
    return scheduler.timesteps, getattr(scheduler, "sigmas", None), scheduler.init_noise_sigma, torch.cat(path)


def add_case(out, sampler, prediction, spacing, steps):
    changes = {"prediction_type": prediction}
    if spacing != "default":
        changes["timestep_spacing"] = spacing
    scheduler = make(sampler, checkpoints.SD15_SCHEDULER, **changes)
    timesteps, sigmas, scale, path = run(scheduler, steps)
    name = f"{sampler}.{prediction}.{spacing}.{steps}"
    out.add(f"{name}.x", path)
    if prediction == "epsilon":  # the schedule does not depend on the prediction
        out.add(f"{name}.timesteps", timesteps.float())
        out.add(f"{name}.init_noise_sigma", torch.tensor([float(scale)]))
        if sigmas is not None:
            out.add(f"{name}.sigmas", sigmas.float())


def main():
    out = GoldenFile(
        "samplers.safetensors",
        "schedules and trajectories with out = 0.5*sin(0.01*t)*x + 0.1 as the model",
        seed=SEED,
        steps=STEPS,
        config=checkpoints.SD15_SCHEDULER,
    )
    generator = torch.Generator().manual_seed(SEED)
    out.add("noise", torch.cat([torch.randn((1, 4, 4, 4), generator=generator) for _ in range(1 + max(STEPS))]))
    out.add("alphas_cumprod", make("ddim", checkpoints.SD15_SCHEDULER).alphas_cumprod)
    resolved = {}
    for sampler in SAMPLERS:
        config = make(sampler, checkpoints.SD15_SCHEDULER).config
        resolved[sampler] = {k: str(v) if v == -math.inf else v for k, v in config.items() if k[0] != "_"}
        for prediction in ("epsilon", "v_prediction"):
            for spacing in ("default", "leading", "trailing"):
                for steps in STEPS if spacing == "default" else STEPS_OTHER_SPACING:
                    add_case(out, sampler, prediction, spacing, steps)
    out.params["resolved_config"] = resolved
    out.close()


if __name__ == "__main__":
    main()
