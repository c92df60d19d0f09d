"""Goldens of adapters: the UNet and the text encoder of the tiny sd15 checkpoint under LoRA and DoRA, by PEFT.

Writes lora_sd15.safetensors: outputs alone. The factors are the formula of synth.py, on the name of the adapter and of the module, so that
a test makes the same ones without a file of theirs: `<adapter>.<component>.<module>.down` (r, in[, k, k]), `.up` (out, r[, 1, 1]),
`.magnitude.weight` (out), in fp32 and not rounded.
"""
import copy

import checkpoints
import synth
import torch
import vocabulary
from common import GoldenFile, draw_normal
from peft import LoraConfig
from peft.tuners.lora import Conv2d, Linear

# name: rank, alpha, whether DoRA, which modules
ADAPTERS = {
    "attn": (4, 1, False, lambda name: ".attn1." in name or ".attn2." in name),
    "wide": (3, 2, False, lambda name: ".attn1." not in name and ".attn2." not in name),
    "dora": (4, 2, True, lambda name: ".attn1." in name or ".attn2." in name),
}


def tensor(name, shape):
    return torch.from_numpy(synth.draw(name, tuple(shape)))


def add(model, component, name):
    """Puts adapter `name` on every linear and convolution that it targets; the number of modules."""
    rank, alpha, is_dora, wanted = ADAPTERS[name]
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    found = [n.replace(".base_layer", "") for n, m in model.named_modules() if isinstance(m, kinds) and "lora_" not in n]
    targets = [n for n in found if wanted(n)]
    config = LoraConfig(r=rank, lora_alpha=alpha, use_dora=is_dora, target_modules=targets, init_lora_weights=False)
    model.add_adapter(config, adapter_name=name)
    count = 0
    for n, m in model.named_modules():
        if isinstance(m, (Conv2d, Linear)) and name in m.lora_A:
            key = f"{name}.{component}.{n}"
            down, up = m.lora_A[name].weight, m.lora_B[name].weight
            down.copy_(tensor(f"{key}.down", down.shape))
            up.copy_(tensor(f"{key}.up", up.shape))
            if is_dora:
                magnitude = m.lora_magnitude_vector[name].weight
                magnitude.copy_(tensor(f"{key}.magnitude.weight", magnitude.shape))
            count += 1
    if count != len(targets):
        raise ValueError(f"{name}: {count} modules of {len(targets)}")
    return count


def run(model, dtype, x, t, context):
    return model(x.to(dtype), t, context.to(dtype)).sample


def unet_case(out, case, weights):
    model = checkpoints.load_unet("sd15")
    counts = {name: add(model, "unet", name) for name in weights}
    model.set_adapters(list(weights), list(weights.values()))
    model.eval()
    exact = copy.deepcopy(model).double()
    x, t, context = draw_normal(4000, 2, 4, 16, 16), torch.tensor([981.0, 21.0]), out.tensors["context"]
    out.add(f"{case}.sample", x)
    out.add(f"{case}.timestep", t)
    out.add(f"{case}.output", run(model, torch.float32, x, t, context), run(exact, torch.float64, x, t, context))
    print(case, weights, counts)


def text_case(out):
    ids = vocabulary.fast()("a red car", padding="max_length", max_length=77, return_tensors="pt").input_ids
    model = checkpoints.load_text_encoder("sd15")
    add(model, "text_encoder", "wide")
    model.eval()
    exact = copy.deepcopy(model).double()
    out.add("text.input_ids", ids[0])
    got = model(ids).last_hidden_state
    torch.set_default_dtype(torch.float64)  # the causal mask is made in the default type
    want = exact(ids).last_hidden_state
    torch.set_default_dtype(torch.float32)
    out.add("text.last", got[0], want[0])


if __name__ == "__main__":
    adapters = {name: {"rank": a[0], "alpha": a[1], "dora": a[2]} for name, a in ADAPTERS.items()}
    golden = GoldenFile("lora_sd15.safetensors", "ckpt/sd15 under LoRA and DoRA (PEFT)", adapters=adapters)
    golden.add("context", draw_normal(4001, 2, 77, 64))
    unet_case(golden, "attn", {"attn": 1.0})
    unet_case(golden, "wide", {"wide": 1.0})
    unet_case(golden, "two", {"attn": 0.7, "wide": -0.4})
    unet_case(golden, "dora", {"dora": 1.0})
    text_case(golden)
    golden.close()
