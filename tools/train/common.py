"""The shapes of the shipped model and small things several steps share."""
import json
import os

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

UNET = dict(
    sample_size=16, in_channels=4, out_channels=4, center_input_sample=False,
    down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    block_out_channels=[64, 128, 192], layers_per_block=1, cross_attention_dim=96,
    attention_head_dim=[2, 4, 6], norm_num_groups=32, act_fn="silu",
)

SCHEDULER = dict(
    num_train_timesteps=1000, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
    clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type="v_prediction",
)


def alphas():
    """sqrt(alpha_bar) and sqrt(1 - alpha_bar) of the thousand steps."""
    a = DDIMScheduler(**SCHEDULER).alphas_cumprod
    return a.sqrt(), (1 - a).sqrt()
