"""Muon for the UNet's matrices and convolutions, AdamW for everything else.

The momentum of each weight, seen as a matrix (outputs, inputs), is replaced by its
nearest orthogonal matrix (Newton-Schulz, five iterations in bf16), so that rare
directions - the picture of one emoji among 853 - move as fast as common ones.
Method: Jordan et al. 2024; scale 0.2 sqrt(max side): Liu et al. 2025, which
makes AdamW's learning rate and decay fit.
"""
import torch

A, B, C = 3.4445, -4.7750, 2.0315


def orthogonal(g):
    x = g.to(torch.bfloat16)
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.t()
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        s = x @ x.t()
        x = A * x + (B * s + C * (s @ s)) @ x
    return x.t() if tall else x


class Muon(torch.optim.Optimizer):
    def __init__(self, params, lr, momentum=0.95, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            m, lr = group["momentum"], group["lr"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "m" not in state:
                    state["m"] = torch.zeros_like(p)
                buf = state["m"].lerp_(p.grad, 1 - m)
                g = p.grad.lerp(buf, m).permute(0, 2, 3, 1) if p.dim() == 4 else p.grad.lerp(buf, m)
                flat = g.reshape(g.shape[0], -1)
                o = orthogonal(flat).reshape(g.shape)
                if p.dim() == 4:
                    o = o.permute(0, 3, 1, 2)
                p.mul_(1 - lr * group["weight_decay"])
                p.add_(o.to(p.dtype), alpha=-lr * 0.2 * max(flat.shape) ** 0.5)


def split(net):
    """(matrices for Muon, the rest): in- and output, time embedding, norms and biases stay with AdamW."""
    ours, rest = [], []
    for name, p in net.named_parameters():
        inner = p.dim() >= 2 and not name.startswith(("conv_in", "conv_out", "time_embedding"))
        (ours if inner else rest).append(p)
    return ours, rest
