"""Adapter files of every format, written by the libraries that define them, and what those libraries make of them.

Writes tests/golden/adapters/<case>.safetensors (or a folder, as PEFT saves one) and, in tests/golden/adapters.safetensors, for every
layer that a case touches `<case>.<site>` (dW of the weight) and `<case>.<site>.bias`, for most cases `<case>.epsilon`: the UNet's output
with the adapter for the case `mid` of unet_<ckpt>.safetensors. dW is what the library adds to the tiny checkpoint of ckpt/ after it has
read the file back: never the tensors the file was made from.

Needs peft and LyCORIS of requirements-adapters.txt beside requirements.txt. `adapters.py metadata` makes the one case that needs
diffusers 0.34, which first writes lora_adapter_metadata; run it with that version.
"""
import json
import os
import shutil
import sys

import checkpoints
import common
import peft
import torch
from common import GOLDEN, GoldenFile
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from safetensors.torch import load_file, save_file

FOLDER = os.path.join(GOLDEN, "adapters")
D0, MID = "down_blocks.0.attentions.0.transformer_blocks.0", "mid_block.attentions.0.transformer_blocks.0"
ATTENTION = [f"{D0}.attn1.to_q", f"{D0}.attn1.to_out.0", f"{D0}.attn2.to_k", f"{MID}.attn2.to_v"]
OTHERS = [f"{D0}.ff.net.0.proj", f"{D0}.ff.net.2", "down_blocks.0.attentions.0.proj_in", "down_blocks.0.resnets.0.conv1",
          "down_blocks.0.resnets.1.time_emb_proj", "down_blocks.0.downsamplers.0.conv", "down_blocks.1.resnets.0.conv_shortcut",
          "up_blocks.2.upsamplers.0.conv", "conv_in", "time_embedding.linear_1"]
CONVS = ["down_blocks.0.resnets.0.conv1", "down_blocks.0.downsamplers.0.conv", f"{D0}.attn1.to_q", "down_blocks.0.attentions.0.proj_in"]
TEXT = [f"text_model.encoder.layers.{i}.{p}" for i, p in ((0, "self_attn.q_proj"), (0, "self_attn.out_proj"), (1, "mlp.fc1"))]
cases = []


def case(make):
    cases.append(make)
    return make


def path_of(name):
    return os.path.join(FOLDER, name)


def randomize(parameters, std=0.3):
    """Factors so large that dW is of the order of the weight, as no training makes them: errors show better."""
    for p in parameters:
        p.data.copy_(torch.randn(p.shape) * std / (1 if p.dim() < 4 or p[0, 0].numel() == 1 else 3))


def weights_of(module, prefix=""):
    """Weights and biases by the name of their layer; PEFT's and LyCORIS' own modules left out."""
    return {prefix + k: v.detach().clone() for k, v in module.state_dict().items()}


class Case:
    """One adapter: where its file is, and what it did to the weights."""

    def __init__(self, out, name):
        self.out, self.name = out, name
        torch.manual_seed(sum(name.encode()))

    def file(self):
        return path_of(self.name + ".safetensors")

    def changed(self, component, before, after):
        touched = 0
        for key, old in before.items():
            delta = after[key].double() - old.double()
            if not delta.abs().max() > 0:
                continue
            touched += 1
            kind = key.rsplit(".", 1)
            self.out.add(f"{self.name}.{component}.{kind[0]}" + (".bias" if kind[1] == "bias" else ""), delta)
        assert touched, self.name

    def epsilon(self, unet, ckpt="sd15"):
        golden = load_file(os.path.join(GOLDEN, f"unet_{ckpt}.safetensors"))
        added = {}
        if ckpt == "sdxl":
            added = {"added_cond_kwargs": {"text_embeds": golden["text_embeds"][:1], "time_ids": golden["time_ids"][:1]}}
        got = unet(golden["mid.sample"], golden["mid.timestep"], golden["context.77"][:1], **added).sample
        self.out.add(f"{self.name}.epsilon", got)


def pipeline(ckpt="sd15", **parts):
    """The pipeline class is only wanted for its loader."""
    from diffusers import DDIMScheduler
    unet = checkpoints.load_unet(ckpt)
    if ckpt == "sdxl":
        return StableDiffusionXLPipeline(None, None, None, None, None, unet, DDIMScheduler())
    return StableDiffusionPipeline(None, checkpoints.load_text_encoder(ckpt), None, unet, DDIMScheduler(), None, None,
                                   requires_safety_checker=False)


def by_diffusers(c, state, ckpt="sd15", metadata=None, save=True, epsilon=True):
    """Stores a state dict, loads it with diffusers' own loader and fuses it."""
    if save:
        save_file({k: v.contiguous() for k, v in state.items()}, c.file(), metadata=metadata or {"format": "pt"})
    pipe = pipeline(ckpt)
    unet = weights_of(pipe.unet)
    text = weights_of(pipe.text_encoder) if ckpt != "sdxl" else {}
    pipe.load_lora_weights(FOLDER, weight_name=c.name + ".safetensors")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    keys = {k.split(".")[0] for k in load_file(c.file())} | {k.split("_")[1] for k in load_file(c.file()) if k.startswith("lora_")}
    if keys & {"unet", "down_blocks", "mid_block", "up_blocks", "conv_in", "base_model", "lora_unet"}:
        c.changed("unet", unet, weights_of(pipe.unet))
    if keys & {"text_encoder", "te", "te1"}:
        c.changed("text_encoder", text, weights_of(pipe.text_encoder))
    if epsilon:
        c.epsilon(pipe.unet, ckpt)


def peft_state(model, names, **config):
    """A PEFT adapter with random factors on the model, as its state dict."""
    config = {"r": 4, "lora_alpha": 4, "init_lora_weights": "gaussian", **config}
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=list(names), **config))
    randomize(p for n, p in model.named_parameters() if "lora_A" in n or "lora_B" in n)
    for n, p in model.named_parameters():
        if "magnitude" in n:
            p.data.mul_(1 + 0.3 * torch.rand(p.shape))
    return model


def unprefixed(model):
    return {k.removeprefix("base_model.model."): v for k, v in peft.get_peft_model_state_dict(model).items()}


# ---- diffusers ----

@case
def diffusers_new(c):
    """SafetyDPO's way: PEFT's state dict through convert_state_dict_to_diffusers, saved by the pipeline."""
    state = convert_state_dict_to_diffusers(unprefixed(peft_state(checkpoints.load_unet("sd15"), ATTENTION)))
    StableDiffusionPipeline.save_lora_weights(FOLDER, unet_lora_layers=state, weight_name=c.name + ".safetensors")
    by_diffusers(c, None, save=False)


@case
def diffusers_mixed(c):
    """The same for layers of every kind: convert_state_dict_to_diffusers renames the projections only. The loader of diffusers 0.33
    then misses the renamed ones and goes on, so what counts is the model that the file was saved from."""
    model = peft_state(checkpoints.load_unet("sd15"), ATTENTION + OTHERS)
    state = convert_state_dict_to_diffusers(unprefixed(model))
    assert any("lora_A" in k for k in state) and any("lora.down" in k for k in state)
    StableDiffusionPipeline.save_lora_weights(FOLDER, unet_lora_layers=state, weight_name=c.name + ".safetensors")
    unet = model.merge_and_unload()
    c.changed("unet", weights_of(checkpoints.load_unet("sd15")), weights_of(unet))
    c.epsilon(unet)


@case
def diffusers_text(c):
    """UNet and text encoder in one file."""
    unet = convert_state_dict_to_diffusers(unprefixed(peft_state(checkpoints.load_unet("sd15"), ATTENTION[:1])))
    text = convert_state_dict_to_diffusers(unprefixed(peft_state(checkpoints.load_text_encoder("sd15"), TEXT)))
    StableDiffusionPipeline.save_lora_weights(FOLDER, unet_lora_layers=unet, text_encoder_lora_layers=text,
                                              weight_name=c.name + ".safetensors")
    by_diffusers(c, None, save=False)


@case
def diffusers_old(c):
    """Attention processors, and the text encoder of that time. The library's loader still reads what its writer no longer makes."""
    state = {}
    for name in ATTENTION:
        head, _, part = name.rpartition(".to_")
        key = f"unet.{head}.processor.to_{part.split('.')[0]}_lora"
        width_in = 64 if "attn2.to_k" in name or "attn2.to_v" in name else (96 if "mid" in name else 32)
        width_out = 96 if "mid" in name else 32
        state[key + ".down.weight"] = torch.randn(4, width_in) * 0.3
        state[key + ".up.weight"] = torch.randn(width_out, 4) * 0.3
    for part in ("q_proj", "out_proj"):
        key = f"text_encoder.text_model.encoder.layers.0.self_attn.{part}.lora_linear_layer"
        state[key + ".down.weight"] = torch.randn(4, 64) * 0.3
        state[key + ".up.weight"] = torch.randn(64, 4) * 0.3
    by_diffusers(c, state)


@case
def diffusers_bare(c):
    """Older still: no "unet." before the names."""
    state = {}
    for part in ("to_q", "to_out"):
        key = f"{D0}.attn1.processor.{part}_lora"
        state[key + ".down.weight"] = torch.randn(2, 32) * 0.3
        state[key + ".up.weight"] = torch.randn(32, 2) * 0.3
    save_file(state, c.file())
    unet = checkpoints.load_unet("sd15")
    before = weights_of(unet)
    unet.load_attn_procs(FOLDER, weight_name=c.name + ".safetensors")
    unet.fuse_lora()
    unet.unload_lora()
    c.changed("unet", before, weights_of(unet))
    c.epsilon(unet)


# ---- PEFT ----

def by_peft(c, rename=None, **config):
    folder = path_of(c.name)
    shutil.rmtree(folder, ignore_errors=True)
    names = config.pop("names", ATTENTION)
    peft_state(checkpoints.load_unet("sd15"), names, **config).save_pretrained(folder)
    os.remove(os.path.join(folder, "README.md"))
    model = peft.PeftModel.from_pretrained(checkpoints.load_unet("sd15"), folder)
    unet = model.merge_and_unload()
    c.changed("unet", weights_of(checkpoints.load_unet("sd15")), weights_of(unet))
    c.epsilon(unet)
    if rename:
        file = os.path.join(folder, "adapter_model.safetensors")
        save_file({rename(k): v for k, v in load_file(file).items()}, file, metadata={"format": "pt"})


@case
def peft_folder(c):
    by_peft(c, lora_alpha=10)


@case
def peft_default(c):
    """Early PEFT left the adapter's name in the keys."""
    by_peft(c, lora_alpha=2, rename=lambda k: k.replace(".weight", ".default.weight"))


@case
def peft_patterns(c):
    """rslora with its own ranks and alphas for some layers, one named in full, the others by pattern."""
    by_peft(c, names=ATTENTION + CONVS[:1], lora_alpha=8, use_rslora=True, rank_pattern={"attn1.to_q": 2, r"resnets.\d+.conv1": 3},
            alpha_pattern={f"{D0}.attn1.to_q": 5, "to_out.[0-9]": 1.5})


@case
def peft_dora(c):
    by_peft(c, names=ATTENTION + CONVS[:1], lora_alpha=6, use_dora=True)


@case
def peft_bias(c):
    """A bias on lora_B. PEFT's merge adds it without the scale (0.15), its forward pass, which training saw, with it."""
    name, folder = f"{D0}.attn1.to_out.0", path_of(c.name)
    shutil.rmtree(folder, ignore_errors=True)
    peft_state(checkpoints.load_unet("sd15"), [name], lora_alpha=6, lora_bias=True, init_lora_weights=True).save_pretrained(folder)
    os.remove(os.path.join(folder, "README.md"))
    unet = peft.PeftModel.from_pretrained(checkpoints.load_unet("sd15"), folder).base_model.model
    before = weights_of(checkpoints.load_unet("sd15"))
    layer, bias = unet.get_submodule(name), before[name + ".bias"]
    after = dict(before)
    after[name + ".bias"] = layer(torch.zeros(1, 32))[0]
    after[name + ".weight"] = before[name + ".weight"] + layer.get_delta_weight("default")
    assert (after[name + ".bias"] - bias).abs().max() > 0
    c.changed("unet", before, after)
    c.epsilon(unet)


# ---- kohya's names ----

def kohya(model, prefix, names, r=4, alpha=2.0, rename=None):
    """sd-scripts' LoRA (networks/lora.py): lora_down, lora_up and alpha for every layer; convolutions 4-D."""
    state = {}
    for name in names:
        weight = model.get_submodule(name).weight
        rank = min(r, weight.shape[0])
        up = (weight.shape[0], rank) + (1, 1) * (weight.dim() == 4)
        key = prefix + "_" + (rename or (lambda n: n))(name).replace(".", "_")
        state[key + ".lora_down.weight"] = torch.randn((rank, *weight.shape[1:])) * (0.1 if weight.dim() == 4 else 0.3)
        state[key + ".lora_up.weight"] = torch.randn(up) * 0.3
        if alpha:
            state[key + ".alpha"] = torch.tensor(alpha)
    return state


@case
def kohya_sd15(c):
    state = kohya(checkpoints.load_unet("sd15"), "lora_unet", ATTENTION + CONVS)
    state.update(kohya(checkpoints.load_text_encoder("sd15"), "lora_te", TEXT, alpha=1.0))
    by_diffusers(c, state)


@case
def kohya_half(c):
    """fp16 factors, and no alpha: then the scale is 1."""
    state = kohya(checkpoints.load_unet("sd15"), "lora_unet", ATTENTION, alpha=None)
    by_diffusers(c, {k: v.half() for k, v in state.items()}, epsilon=False)


SDXL_SGM = {
    "down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q": "input_blocks.4.1.transformer_blocks.1.attn1.to_q",
    "down_blocks.1.attentions.1.transformer_blocks.0.attn2.to_k": "input_blocks.5.1.transformer_blocks.0.attn2.to_k",
    "mid_block.attentions.0.transformer_blocks.0.attn1.to_v": "middle_block.1.transformer_blocks.0.attn1.to_v",
    "up_blocks.1.attentions.2.proj_out": "output_blocks.5.1.proj_out",
    "up_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0": "output_blocks.0.1.transformer_blocks.0.attn2.to_out.0",
    "down_blocks.0.resnets.1.conv2": "input_blocks.2.0.out_layers.3",
    "down_blocks.0.resnets.0.time_emb_proj": "input_blocks.1.0.emb_layers.1",
    "up_blocks.2.resnets.0.conv_shortcut": "output_blocks.6.0.skip_connection",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
    "up_blocks.1.upsamplers.0.conv": "output_blocks.5.2.conv",
}


@case
def kohya_sdxl(c):
    """SGM's names. Diffusers maps them back; it has no map for resnets of these files, so those are left to the table of names."""
    names = [n for n in SDXL_SGM if "attentions" in n]
    by_diffusers(c, kohya(checkpoints.load_unet("sdxl"), "lora_unet", names, rename=SDXL_SGM.get), ckpt="sdxl")


# ---- LyCORIS ----

def by_lycoris(c, names=None, prefix="lycoris", std=0.3, kwargs=None, reload=True, dim=4, alpha=2.0):
    """LyCORIS writes the file, reads it back (unless its reader cannot) and merges it."""
    import lycoris
    lycoris.LycorisNetwork.apply_preset({"enable_conv": True, "target_module": [], "target_name": names or CONVS, "lora_prefix": prefix})
    torch.set_grad_enabled(True)
    unet = checkpoints.load_unet("sd15")
    net = lycoris.create_lycoris(unet, 1.0, linear_dim=dim, linear_alpha=alpha, conv_dim=dim, conv_alpha=alpha, **(kwargs or {}))
    net.apply_to()
    torch.set_grad_enabled(False)
    for name, p in net.named_parameters():
        if "dora_scale" in name:
            p.data.mul_(1 + 0.3 * torch.rand(p.shape))
        elif "scalar" not in name:
            p.data.add_(torch.randn(p.shape) * std) if kwargs.get("algo") == "full" else randomize([p], std)
    state = {}
    for lora in net.loras:
        for key, value in lora.custom_state_dict().items() if hasattr(lora, "custom_state_dict") else lora.state_dict().items():
            state[f"{lora.lora_name}.{key}"] = value.detach().clone().contiguous()
    save_file(state, c.file(), metadata={"format": "pt"})
    before = weights_of(checkpoints.load_unet("sd15"))
    if reload:
        unet = checkpoints.load_unet("sd15")
        net, _ = lycoris.create_lycoris_from_weights(1.0, c.file(), unet)
    if kwargs["algo"] in ("loha", "lokr"):
        # Merging multiplies these by their scale twice (LyCORIS 4.1.3); the forward pass, which training saw, once.
        if reload:
            net.apply_to()
        net.eval()
        for lora in net.loras:
            lora.op = watch(lora.op, lora)
        c.epsilon(unet)
        after = dict(before)
        for lora in net.loras:
            name = next(n for n in names or CONVS if lora.lora_name == f"{prefix}_{n}".replace(".", "_"))
            after[name + ".weight"] = before[name + ".weight"].double() + lora.seen.reshape(before[name + ".weight"].shape).double()
        return c.changed("unet", before, after)
    if not reload:
        net.restore()
    net.merge_to(1.0)
    c.changed("unet", before, weights_of(unet))
    c.epsilon(unet)


def watch(op, lora):
    """The convolution or product that a LyCORIS layer adds to the layer's own, remembering its weight."""
    def see(x, weight, *args, **kwargs):
        lora.seen = weight.detach().clone()
        return op(x, weight, *args, **kwargs)
    return see


@case
def lycoris_lora(c):
    by_lycoris(c, kwargs={"algo": "lora"})


@case
def kohya_locon(c):
    """LoCon with a core, under kohya's prefix."""
    by_lycoris(c, prefix="lora_unet", kwargs={"algo": "lora", "use_tucker": True})


@case
def lycoris_loha(c):
    by_lycoris(c, kwargs={"algo": "loha"})


@case
def lycoris_loha_tucker(c):
    by_lycoris(c, kwargs={"algo": "loha", "use_tucker": True})


@case
def lycoris_lokr(c):
    """w1 whole, w2 a product."""
    by_lycoris(c, kwargs={"algo": "lokr", "factor": 4}, dim=2, alpha=3.0)


@case
def lycoris_lokr_both(c):
    """w1 and w2 products."""
    by_lycoris(c, kwargs={"algo": "lokr", "factor": 4, "decompose_both": True}, dim=1, names=ATTENTION[:2])


@case
def lycoris_lokr_full(c):
    """Both whole: alpha stands in the file and does not count."""
    by_lycoris(c, kwargs={"algo": "lokr", "factor": 4, "full_matrix": True})


@case
def lycoris_lokr_tucker(c):
    by_lycoris(c, kwargs={"algo": "lokr", "factor": 4, "use_tucker": True}, dim=2, alpha=3.0, reload=False)


@case
def lycoris_full(c):
    by_lycoris(c, kwargs={"algo": "full"}, std=0.05, names=CONVS[2:] + ["conv_in"])


@case
def lycoris_dora_in(c):
    """The norm over each input channel."""
    by_lycoris(c, kwargs={"algo": "lora", "dora_wd": True, "wd_on_output": False}, reload=False)


@case
def lycoris_dora_out(c):
    """The norm over each output row."""
    by_lycoris(c, kwargs={"algo": "lora", "dora_wd": True, "wd_on_output": True})


@case
def lycoris_dora_loha(c):
    by_lycoris(c, kwargs={"algo": "loha", "dora_wd": True, "wd_on_output": True}, names=ATTENTION[:2])


# ---- overlays ----

def by_load_state_dict(c, names, dtype, prefix=""):
    """A partial state dict of the UNet, as SafeGen's attn1 or an ESD file; torch puts it in."""
    unet = checkpoints.load_unet("sd15")
    before = weights_of(unet)
    part = {k: (v + 0.1 * torch.randn(v.shape)).to(dtype) for k, v in before.items() if any(k.startswith(n + ".") for n in names)}
    save_file({prefix + k: v for k, v in part.items()}, c.file(), metadata={"format": "pt"})
    unet.load_state_dict({k.removeprefix(prefix): v for k, v in load_file(c.file()).items()}, strict=False)
    c.changed("unet", before, weights_of(unet))
    c.epsilon(unet)


@case
def overlay_attn1(c):
    by_load_state_dict(c, [f"{D0}.attn1"], torch.float32)


@case
def overlay_half(c):
    by_load_state_dict(c, [f"{D0}.attn2.to_k", f"{D0}.norm2", "conv_in"], torch.float16, "unet.")


@case
def overlay_bf16(c):
    by_load_state_dict(c, [f"{D0}.attn2.to_out.0", "down_blocks.0.resnets.0.conv1"], torch.bfloat16)


def metadata_case():
    """diffusers 0.34 and later keep LoraConfig in the file; alpha and rank differ, so that a loader that ignores it is wrong."""
    out = GoldenFile("adapters_metadata.safetensors", "what diffusers makes of adapters/diffusers_metadata.safetensors")
    c = Case(out, "diffusers_metadata")
    unet = checkpoints.load_unet("sd15")
    config = peft.LoraConfig(r=4, lora_alpha=10, target_modules=ATTENTION, rank_pattern={ATTENTION[0]: 2}, alpha_pattern={ATTENTION[2]: 3})
    unet.add_adapter(config)
    randomize(p for n, p in unet.named_parameters() if "lora_" in n)
    state = convert_state_dict_to_diffusers(peft.get_peft_model_state_dict(unet))
    StableDiffusionPipeline.save_lora_weights(FOLDER, unet_lora_layers=state, weight_name=c.name + ".safetensors",
                                              unet_lora_adapter_metadata=json_config(unet))
    by_diffusers(c, None, save=False)
    out.close()


def json_config(unet):
    config = unet.peft_config["default"].to_dict()
    return {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}


def main():
    os.makedirs(FOLDER, exist_ok=True)
    if sys.argv[1:] == ["metadata"]:
        return metadata_case()
    out = GoldenFile("adapters.safetensors", "what the libraries make of adapters/*", peft=peft.__version__)
    for make in cases:
        print(make.__name__)
        make(Case(out, make.__name__))
    out.close()


if __name__ == "__main__":
    main()
