"""Low-rank adapters on a diffusers UNet: trained, written and read in diffusers' LoRA format.

attach() puts a factor pair beside every attention projection; the weights of the UNet stay
as they are, and Switch.on tells the one network whether it is the expert or the base it
started from.  Files hold unet.NAME.lora.down.weight (r, in) and unet.NAME.lora.up.weight
(out, r) in fp16 without an alpha, as SafetyDPO's train.py writes them: the scale is 1.
Used by experts.py and sample.py.
"""
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")


class Switch:
    on = True
    mask = 1.0      # or (rank): which of the stacked factors count


class Lora(torch.nn.Module):
    """y = W x + b + up (down x); gaussian down, up zero: it starts as the base."""

    def __init__(self, base, rank, switch):
        super().__init__()
        self.base, self.switch = base, switch
        self.down = torch.nn.Parameter(torch.randn(rank, base.in_features) / rank)
        self.up = torch.nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x):
        y = self.base(x)
        if self.switch.on:
            y = y + F.linear(F.linear(x, self.down) * self.switch.mask, self.up)
        return y


def targets(unet):
    """Names of the projections of attn1 and attn2, in the UNet's own order."""
    return [n for n, m in unet.named_modules()
            if isinstance(m, torch.nn.Linear) and ".attn" in n and n.endswith(PROJECTIONS)]


def attach(unet, rank, seed):
    """Freezes the UNet and puts a Lora around each target: name -> Lora.  One seed gives every
    expert the same down factors to start from, so that factors can be compared when merged."""
    unet.requires_grad_(False)
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    switch, out = Switch(), {}
    for name in targets(unet):
        parent, _, last = name.rpartition(".")
        parent = unet.get_submodule(parent)
        out[name] = Lora(getattr(parent, last), rank, switch)
        setattr(parent, last, out[name])
    torch.random.set_rng_state(state)
    return out, switch


def stack(loras, paths):
    """Starts from the sum of files: their factors one after the other.  The rank of each file."""
    files = [load_file(p) for p in paths]
    with torch.no_grad():
        for name, m in loras.items():
            m.down.copy_(torch.cat([f[f"unet.{name}.lora.down.weight"].float() for f in files]))
            m.up.copy_(torch.cat([f[f"unet.{name}.lora.up.weight"].float() for f in files], 1))
    return [f[f"unet.{name}.lora.down.weight"].shape[0] for f in files]


def save(loras, path, notes, lo=0, hi=None):
    """Factors lo to hi of the rank."""
    out = {}
    for name, m in loras.items():
        out[f"unet.{name}.lora.down.weight"] = m.down.detach()[lo:hi].half().contiguous()
        out[f"unet.{name}.lora.up.weight"] = m.up.detach()[:, lo:hi].half().contiguous()
    save_file(out, path, {"format": "pt", **notes})


def fold(unet, path, weight=1.0):
    """Adds weight * up down of a file to the UNet's own weights (before attach)."""
    tensors = load_file(path)
    names = {k[len("unet."):-len(".lora.down.weight")] for k in tensors if k.endswith(".lora.down.weight")}
    if names - set(targets(unet)) or 2 * len(names) != len(tensors):
        raise ValueError(f"{path}: not an adapter of this UNet's attention")
    with torch.no_grad():
        for n in names:
            down, up = (tensors[f"unet.{n}.lora.{part}.weight"].float() for part in ("down", "up"))
            unet.get_submodule(n).weight += weight * up @ down
