"""Optimizers and the learning-rate schedule."""

from __future__ import annotations

import math

import torch
from model import FAST
from torch import Tensor, nn


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised, for weights [..., rows, columns].

    The update is scaled so that its elements are as large as AdamW's, and both can share one learning rate.
    """

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float = 0.95, decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "decay": decay})

    @staticmethod
    def orthogonal(g: Tensor, rounds: int = 5) -> Tensor:
        """Newton-Schulz: g [..., R, C] -> its singular vectors, with singular values near one."""
        x = g.to(FAST)
        flip = x.shape[-2] > x.shape[-1]
        x = x.mT if flip else x
        x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
        for _ in range(rounds):
            a = x @ x.mT
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        return (x.mT if flip else x).to(g.dtype)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """One update of every weight that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["m"] = torch.zeros_like(p)
                m = state["m"].lerp_(p.grad, 1 - group["momentum"])
                update = self.orthogonal(p.grad.lerp(m, group["momentum"]))
                p.mul_(1 - group["lr"] * group["decay"])
                p.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(p.shape[-2:])))


def optimizers(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings, routers and norms."""
    matrices, rest = [], []
    for name, p in model.named_parameters():
        inside = name.startswith("layers.") and p.dim() > 1 and "gate" not in name
        (matrices if inside else rest).append(p)
    return [
        Muon(matrices, lr=lr, decay=0.1),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def lr_scale(progress: float, warm: float = 0.01) -> float:
    """Linear warm-up, then a cosine down to 2 %, over ``progress`` from 0 to 1."""
    if progress < warm:
        return max(progress / warm, 0.02)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (progress - warm) / (1 - warm)))
