"""Muon: momentum made orthogonal, for the weight matrices; stacked matrices are done in one batch.

Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; the polynomials are those of Polar Express,
arXiv 2505.16932, whose first four steps do as well here as five Newton-Schulz steps.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

POLYNOMIALS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
)


def orthogonalize(x: Tensor) -> Tensor:
    """Bring all singular values near 1. f32[...,M,N] -> f32[...,M,N]."""
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.01 + 1e-7)
    for a, b, c in POLYNOMIALS:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Each group: params, lr, weight_decay, momentum, and `split`, the number of matrices fused along the rows."""

    def __init__(self, groups: list[dict], lr: float, weight_decay: float = 0.0, momentum: float = 0.95):
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "split": 1})

    def step(self, run: Callable = map) -> None:
        """Update all parameters; `run` may be the map of a thread pool."""
        jobs = [(param, group) for group in self.param_groups for param in group["params"]]
        list(run(lambda job: self.update(*job), jobs))

    @torch.no_grad()  # here, as each thread has its own grad mode
    def update(self, param: Tensor, group: dict) -> None:
        """Update one parameter."""
        state = self.state[param]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(param)
        momentum = state["momentum"].lerp_(param.grad, 1 - group["momentum"])
        update = param.grad.lerp(momentum, group["momentum"])  # Nesterov
        update = orthogonalize(update.unflatten(-2, (group["split"], -1)))
        rows, columns = update.shape[-2:]
        param.mul_(1 - group["lr"] * group["weight_decay"])
        param.add_(update.flatten(-3, -2), alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)
