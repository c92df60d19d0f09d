"""Goldens of the three networks: text encoder, UNet and VAE of every tiny checkpoint.

Writes text_<ckpt>.safetensors, unet_<ckpt>.safetensors, vae_<ckpt>.safetensors and bf16.safetensors. Every output is computed
in fp32, and once more in fp64 to learn the golden's own rounding error, which goes into the manifest.
"""
import copy
import sys

import checkpoints
import torch
import vocabulary
from common import GoldenFile, draw_normal

PROMPTS = {
    "sd15": [
        "",
        "a photo of an astronaut riding a horse on mars",
        "Élan vital: naïve café, 东京タワー & a 👩‍🚀 in £5 jeans, isn't it?",
        "a very long prompt about " + "a red car and a sunflower on a blue background, " * 9,
    ],
    "sd21": ["", "a photo of an astronaut riding a horse on mars", "low quality, blurry, jpeg artifacts, deformed hands"],
}


def text_goldens(name):
    model = checkpoints.load_text_encoder(name)
    exact = copy.deepcopy(model).double()
    tokenizer = vocabulary.fast(name)
    out = GoldenFile(f"text_{name}.safetensors", f"text encoder of ckpt/{name}", prompts=PROMPTS[name])
    for i, prompt in enumerate(PROMPTS[name]):
        ids = tokenizer(prompt, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids
        out.add(f"p{i}.input_ids", ids[0])
        got = model(ids, output_hidden_states=True)
        torch.set_default_dtype(torch.float64)  # the causal mask is made in the default type
        want = exact(ids, output_hidden_states=True)
        torch.set_default_dtype(torch.float32)
        out.add(f"p{i}.last", got.last_hidden_state[0], want.last_hidden_state[0])
        out.add(f"p{i}.pooled", got.pooler_output[0], want.pooler_output[0])
        # diffusers: hidden_states[-(clip_skip + 1)], then the final layer norm.
        for skip in (1, 2) if i == 1 else (1,):
            norm, norm_exact = model.text_model.final_layer_norm, exact.text_model.final_layer_norm
            depth = -(skip + 1)
            out.add(f"p{i}.skip{skip}", norm(got.hidden_states[depth])[0], norm_exact(want.hidden_states[depth])[0])
        if i == 1:
            for layer, (g, w) in enumerate(zip(got.hidden_states, want.hidden_states)):
                out.add(f"p{i}.hidden.{layer}", g[0], w[0])
    out.close()


def watch(model, store):
    """Record the output of the modules whose values locate an error."""
    names = ["time_embedding", "add_embedding", "conv_in", "mid_block", "conv_norm_out"]
    names += ["mid_block.resnets.0", "mid_block.attentions.0"]
    for i, block in enumerate(model.down_blocks):
        names.append(f"down_blocks.{i}")
        if i == 0:
            names.append("down_blocks.0.resnets.0")
        if hasattr(block, "attentions") and not any(n.endswith("attentions.0") and n[0] == "d" for n in names):
            names.append(f"down_blocks.{i}.attentions.0")
    names += [f"up_blocks.{i}" for i in range(len(model.up_blocks))]
    handles = []
    for name, module in model.named_modules():
        if name in names and module is not None:

            def hook(_module, _args, output, name=name):
                # Down blocks return (hidden, skips), transformers return (sample,).
                store[name] = output[0] if isinstance(output, tuple) else output

            handles.append(module.register_forward_hook(hook))
    return handles


def run_unet(model, dtype, x, t, context, added):
    cast = {k: v.to(dtype) for k, v in added.items()} if added else None
    return model(x.to(dtype), t, context.to(dtype), added_cond_kwargs=cast).sample


def unet_goldens(name):
    model = checkpoints.load_unet(name)
    exact = copy.deepcopy(model).double()
    config = model.config
    out = GoldenFile(f"unet_{name}.safetensors", f"UNet of ckpt/{name}")
    short = draw_normal(1000, 2, 77, config.cross_attention_dim)
    long = draw_normal(1001, 1, 154, config.cross_attention_dim)
    out.add("context.77", short)
    out.add("context.154", long)
    added = {}
    if config.addition_embed_type == "text_time":
        ids = 6 if name == "sdxl" else 5
        pooled = config.projection_class_embeddings_input_dim - ids * config.addition_time_embed_dim
        added["text_embeds"] = draw_normal(1002, 2, pooled)
        sizes = [[1024.0, 768.0, 0.0, 16.0, 1024.0, 1024.0], [512.0, 512.0, 64.0, 0.0, 768.0, 1344.0]]
        added["time_ids"] = torch.tensor(sizes)[:, :ids]
        for key, value in added.items():
            out.add(key, value)
    # name: timesteps (one per row), latent height, latent width, context
    cases = {
        "first": ([999.0], 16, 16, short),
        "mid": ([500.0], 16, 16, short),
        "last": ([1.0], 16, 16, short),
        "zero": ([0.0], 16, 16, short),
        "frac": ([786.4375], 16, 16, short),
        "long": ([261.0], 16, 16, long),
        "wide": ([741.0], 8, 24, short),
        "ragged": ([321.0], 10, 13, short),
        "batch": ([981.0, 21.0], 16, 16, short),
    }
    for seed, (case, (t, height, width, context)) in enumerate(cases.items()):
        rows = len(t)
        x = draw_normal(seed, rows, config.in_channels, height, width)
        t = torch.tensor(t)
        extra = {k: v[:rows] for k, v in added.items()}
        inner, inner_exact = {}, {}
        handles = watch(model, inner) + watch(exact, inner_exact) if case == "mid" else []
        got = run_unet(model, torch.float32, x, t, context[:rows], extra)
        want = run_unet(exact, torch.float64, x, t, context[:rows], extra)
        for handle in handles:
            handle.remove()
        out.add(f"{case}.sample", x)
        out.add(f"{case}.timestep", t)
        out.add(f"{case}.output", got, want)
        for module in inner:
            out.add(f"{case}.at.{module}", inner[module], inner_exact[module])
    out.close()


def vae_goldens(name):
    model = checkpoints.load_vae(name)
    exact = copy.deepcopy(model).double()
    factor = 2 ** (len(model.config.block_out_channels) - 1)
    out = GoldenFile(
        f"vae_{name}.safetensors", f"VAE of ckpt/{name}", scaling_factor=model.config.scaling_factor, factor=factor
    )
    for case, height, width in (("square", 6, 6), ("wide", 3, 10)):
        z = draw_normal(2000 + height, 1, model.config.latent_channels, height, width) * 3
        inner, inner_exact, handles = {}, {}, []
        if case == "square":
            for vae, store in ((model, inner), (exact, inner_exact)):
                modules = {"decoder.conv_in": vae.decoder.conv_in, "decoder.mid_block": vae.decoder.mid_block}
                modules["decoder.mid_block.attentions.0"] = vae.decoder.mid_block.attentions[0]
                modules["decoder.up_blocks.0"] = vae.decoder.up_blocks[0]
                modules["encoder.conv_in"] = vae.encoder.conv_in
                modules["encoder.down_blocks.1"] = vae.encoder.down_blocks[1]
                modules["encoder.mid_block"] = vae.encoder.mid_block
                for key, module in modules.items():
                    handles.append(
                        module.register_forward_hook(lambda _m, _a, o, key=key, store=store: store.__setitem__(key, o))
                    )
        out.add(f"{case}.decode.z", z)
        out.add(f"{case}.decode.image", model.decode(z).sample, exact.decode(z.double()).sample)
        image = torch.tanh(draw_normal(2100 + height, 1, 3, height * factor, width * factor))
        got, want = model.encode(image).latent_dist, exact.encode(image.double()).latent_dist
        out.add(f"{case}.encode.image", image)
        out.add(f"{case}.encode.mean", got.mean, want.mean)
        out.add(f"{case}.encode.logvar", got.logvar, want.logvar)
        for handle in handles:
            handle.remove()
        for key in inner:
            if inner[key].numel() <= 20000:
                out.add(f"{case}.at.{key}", inner[key], inner_exact[key])
    out.close()


def bf16_goldens():
    """The sd15 checkpoint with weights rounded to bf16 instead of fp16 and still computed in fp32."""
    out = GoldenFile("bf16.safetensors", "ckpt/sd15 with every weight rounded to bf16 instead of fp16; fp32 arithmetic")
    rounding = {"rounding": torch.bfloat16}
    ids = vocabulary.fast()("a red car", padding="max_length", max_length=77, return_tensors="pt").input_ids
    text = checkpoints.load_text_encoder("sd15", **rounding)
    last = text(ids).last_hidden_state
    out.add("text.input_ids", ids[0])
    torch.set_default_dtype(torch.float64)
    out.add("text.last", last[0], text.double()(ids).last_hidden_state[0])
    torch.set_default_dtype(torch.float32)
    unet = checkpoints.load_unet("sd15", **rounding)
    x, t = draw_normal(3000, 1, 4, 16, 16), torch.tensor([500.0])
    out.add("unet.sample", x)
    out.add("unet.timestep", t)
    got = run_unet(unet, torch.float32, x, t, last, None)
    out.add("unet.output", got, run_unet(unet.double(), torch.float64, x, t, last, None))
    vae = checkpoints.load_vae("sd15", **rounding)
    z = draw_normal(3001, 1, 4, 4, 4)
    out.add("vae.z", z)
    out.add("vae.image", vae.decode(z).sample, copy.deepcopy(vae).double().decode(z.double()).sample)
    out.close()


if __name__ == "__main__":
    wanted = sys.argv[1:] or list(checkpoints.CHECKPOINTS)
    for name in wanted:
        parts = checkpoints.CHECKPOINTS[name]
        if "text_encoder" in parts:
            text_goldens(name)
        unet_goldens(name)
        if "vae" in parts and name != "sd21":  # sd21's VAE is sd15's with the scaling factor spelled out
            vae_goldens(name)
    bf16_goldens()
