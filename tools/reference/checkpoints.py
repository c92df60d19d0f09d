"""The tiny checkpoints: their config files, and the models built from them.

Who uses it: gen_networks.py, gen_pipelines.py and gen_weighting.py. Run as a program it writes tests/golden/ckpt/ (config
files and tensor lists only; the weights are the formula of synth.py).

Each configuration is a published one with small numbers: the keys are those of the published files, so that a reader of
configs meets the real thing (null values, keys it must ignore, keys that are missing and have a default).
"""
import json
import os

import common
import synth
import torch
import vocabulary
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

CROSS_DOWN, PLAIN_DOWN = "CrossAttnDownBlock2D", "DownBlock2D"
CROSS_UP, PLAIN_UP = "CrossAttnUpBlock2D", "UpBlock2D"


def unet_config(**changes):
    """Stable Diffusion 1.5's unet/config.json with fewer channels."""
    config = {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": "0.6.0",
        "act_fn": "silu",
        "attention_head_dim": 8,
        "block_out_channels": [32, 64, 96, 96],
        "center_input_sample": False,
        "cross_attention_dim": 64,
        "down_block_types": [CROSS_DOWN, CROSS_DOWN, CROSS_DOWN, PLAIN_DOWN],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": 4,
        "layers_per_block": 2,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-05,
        "norm_num_groups": 32,
        "out_channels": 4,
        "sample_size": 16,
        "up_block_types": [PLAIN_UP, CROSS_UP, CROSS_UP, CROSS_UP],
    }
    config.update(changes)
    return config


def vae_config(**changes):
    """Stable Diffusion 1.5's vae/config.json with fewer channels. It has no scaling_factor: the default is 0.18215."""
    config = {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": "0.6.0",
        "act_fn": "silu",
        "block_out_channels": [32, 32, 64, 64],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "in_channels": 3,
        "latent_channels": 4,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "out_channels": 3,
        "sample_size": 128,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    }
    config.update(changes)
    return config


def text_config(**changes):
    """Stable Diffusion 1.5's text_encoder/config.json (the CLIP ViT-L/14 text half) with fewer channels and layers."""
    config = {
        "_name_or_path": "openai/clip-vit-large-patch14",
        "architectures": ["CLIPTextModel"],
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "dropout": 0.0,
        "eos_token_id": 2,
        "hidden_act": "quick_gelu",
        "hidden_size": 64,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": 256,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 77,
        "model_type": "clip_text_model",
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "pad_token_id": 1,
        "torch_dtype": "float32",
        "transformers_version": "4.22.0.dev0",
        "vocab_size": 49408,
    }
    config.update(changes)
    return config


SD15_SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}
SD21_SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "_diffusers_version": "0.8.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
SDXL_SCHEDULER = {
    "_class_name": "EulerDiscreteScheduler",
    "_diffusers_version": "0.19.0.dev0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
}

# What every SDXL UNet config spells out although it is the default.
SDXL_NULLS = {
    "_diffusers_version": "0.19.0.dev0",
    "addition_embed_type": "text_time",
    "addition_embed_type_num_heads": 64,
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "mid_block_only_cross_attention": None,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "num_attention_heads": None,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "upcast_attention": None,
    "use_linear_projection": True,
}

CHECKPOINTS = {
    "sd15": {
        "text_encoder": text_config(),
        "unet": unet_config(),
        "vae": vae_config(),
        "scheduler": SD15_SCHEDULER,
    },
    # Heads per level, linear projections, attention in fp32, v-prediction, GELU text encoder, "!" (id 0) as padding.
    "sd21": {
        "text_encoder": text_config(
            _name_or_path="hf-models/stable-diffusion-v2-768x768/text_encoder",
            hidden_act="gelu",
            num_hidden_layers=4,
            num_attention_heads=2,
            projection_dim=32,
        ),
        "unet": unet_config(
            _diffusers_version="0.10.0.dev0",
            attention_head_dim=[2, 4, 8, 8],
            block_out_channels=[32, 64, 128, 128],
            dual_cross_attention=False,
            mid_block_type="UNetMidBlock2DCrossAttn",
            num_class_embeds=None,
            only_cross_attention=False,
            resnet_time_scale_shift="default",
            upcast_attention=True,
            use_linear_projection=True,
        ),
        "vae": vae_config(_diffusers_version="0.10.0.dev0", scaling_factor=0.18215),
        "scheduler": SD21_SCHEDULER,
    },
    "sdxl": {
        "unet": unet_config(
            **SDXL_NULLS,
            addition_time_embed_dim=32,
            attention_head_dim=[2, 4, 8],
            block_out_channels=[32, 64, 128],
            cross_attention_dim=96,
            down_block_types=[PLAIN_DOWN, CROSS_DOWN, CROSS_DOWN],
            projection_class_embeddings_input_dim=6 * 32 + 64,
            transformer_layers_per_block=[1, 2, 3],
            up_block_types=[CROSS_UP, CROSS_UP, PLAIN_UP],
        ),
        "vae": vae_config(
            _diffusers_version="0.20.0.dev0", block_out_channels=[32, 64, 64, 64], force_upcast=True, scaling_factor=0.13025
        ),
        "scheduler": SDXL_SCHEDULER,
    },
    # The refiner: four levels of which the outer two have no attention, five time ids.
    "sdxl_refiner": {
        "unet": unet_config(
            **SDXL_NULLS,
            addition_time_embed_dim=16,
            attention_head_dim=[2, 3, 4, 4],
            block_out_channels=[32, 48, 64, 64],
            cross_attention_dim=80,
            down_block_types=[PLAIN_DOWN, CROSS_DOWN, CROSS_DOWN, PLAIN_DOWN],
            norm_num_groups=16,
            projection_class_embeddings_input_dim=5 * 16 + 40,
            transformer_layers_per_block=2,
            up_block_types=[PLAIN_UP, CROSS_UP, CROSS_UP, PLAIN_UP],
        ),
        "scheduler": SDXL_SCHEDULER,
    },
    # A small hobby model: three UNet levels with one layer, the nine input channels of the inpainting models, a three-level
    # VAE with one layer and few channels.
    "odd": {
        "unet": unet_config(
            attention_head_dim=3,
            block_out_channels=[24, 48, 48],
            cross_attention_dim=40,
            down_block_types=[PLAIN_DOWN, CROSS_DOWN, CROSS_DOWN],
            in_channels=9,
            layers_per_block=1,
            norm_num_groups=8,
            up_block_types=[CROSS_UP, CROSS_UP, PLAIN_UP],
        ),
        "vae": vae_config(
            block_out_channels=[16, 24, 32],
            down_block_types=["DownEncoderBlock2D"] * 3,
            layers_per_block=1,
            norm_num_groups=8,
            scaling_factor=0.5,
            up_block_types=["UpDecoderBlock2D"] * 3,
        ),
        "scheduler": SD15_SCHEDULER,
    },
}


def load_text_encoder(name, **fill):
    config = {k: v for k, v in CHECKPOINTS[name]["text_encoder"].items() if not k.startswith("_")}
    return synth.fill(CLIPTextModel(CLIPTextConfig(**config)), **fill)


def load_unet(name, **fill):
    return synth.fill(UNet2DConditionModel.from_config(CHECKPOINTS[name]["unet"]), **fill)


def load_vae(name, **fill):
    return synth.fill(AutoencoderKL.from_config(CHECKPOINTS[name]["vae"]), **fill)


def write_json(value, *path):
    path = os.path.join(common.CKPT, *path)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="ascii") as out:
        json.dump(value, out, indent=2)
        out.write("\n")


def write_checkpoint(name, parts):
    loaders = {"text_encoder": load_text_encoder, "unet": load_unet, "vae": load_vae}
    classes = {
        "text_encoder": ["transformers", "CLIPTextModel"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", parts["scheduler"]["_class_name"]],
    }
    index = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.6.0"}
    for part, config in parts.items():
        index[part] = classes[part]
        write_json(config, name, part, "scheduler_config.json" if part == "scheduler" else "config.json")
        if part in loaders:
            model = loaders[part](name)
            synth.write_tensor_list(model, os.path.join(common.CKPT, name, part, "tensors.tsv"))
            print(f"{name}/{part}: {sum(p.numel() for p in model.parameters())} parameters")
    if "text_encoder" in parts:
        index["tokenizer"] = ["transformers", "CLIPTokenizer"]
        for file, value in vocabulary.settings(name).items():
            write_json(value, name, "tokenizer", file)
    write_json(dict(sorted(index.items())), name, "model_index.json")


def write_formula_samples():
    """The first values of a few tensors, for a test of the program that writes the weights."""
    out = common.GoldenFile("ckpt/formula.safetensors", "first 8 values of some tensors, rounded to fp16 and widened")
    shapes = {
        "text_model.embeddings.token_embedding.weight": (49408, 64),
        "text_model.final_layer_norm.weight": (64,),
        "text_model.final_layer_norm.bias": (64,),
        "conv_in.weight": (32, 4, 3, 3),
        "encoder.mid_block.attentions.0.to_out.0.bias": (64,),
    }
    for name, shape in shapes.items():
        values = torch.from_numpy(synth.draw(name, shape)).half().float().flatten()
        out.add(name, values[:8])
        out.add(f"{name}.last8", values[-8:])
    out.close()


if __name__ == "__main__":
    for name, parts in CHECKPOINTS.items():
        write_checkpoint(name, parts)
    write_formula_samples()
