"""Muon (Jordan et al. 2024) for many matrices at once.

It replaces the momentum of a matrix by the nearest matrix whose singular values are all about
one. Matrices of one shape, which the layers of a model have, are stacked and go through the same
few products together: in eight layers that takes an eighth of the calls that one matrix after
another would make.
"""

from collections import defaultdict

import torch
from torch import Tensor

from lib.scan.native import bfloat16_is_fast

# factors of a, a^3 and a^5 for a singular value a: five rounds bring it near one
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ROUNDS = 5
MOMENTUM = 0.95


def orthogonal(matrices: Tensor) -> Tensor:
    """About U V^T for each of (n, rows, columns) with singular values U S V^T.

    The iteration is that of Newton and Schulz.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices  # the square products are then of the shorter side
    x = x / x.norm(dim=(-2, -1), keepdim=True, dtype=torch.float32).clamp(min=1e-7).to(x.dtype)
    first, third, fifth = COEFFICIENTS
    for _ in range(ROUNDS):
        gram = x @ x.mT
        rest = torch.baddbmm(gram, gram, gram, beta=third, alpha=fifth)
        x = torch.baddbmm(x, rest, x, beta=first)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov's momentum and decoupled weight decay, for parameters of two dimensions.

    The step is scaled by 0.2 sqrt(larger side), so that AdamW's learning rate fits (Liu et al.
    2025, eq. 4). Numbers and state are, up to rounding, those of
    `torch.optim.Muon(..., adjust_lr_fn="match_rms_adamw")`.
    """

    def __init__(self, params, lr: float, weight_decay: float = 0.1):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Take one step; `closure` is not called."""
        for group in self.param_groups:
            alike = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike[parameter.shape].append(parameter)
            for (rows, columns), parameters in alike.items():
                updates = orthogonal(torch.stack([self._direction(p) for p in parameters]))
                size = group["lr"] * 0.2 * max(rows, columns) ** 0.5
                for parameter, update in zip(parameters, updates):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=size)

    def _direction(self, parameter: Tensor) -> Tensor:
        """Nesterov's momentum, in bfloat16 where products are faster in it.

        Singular values need not be exact.
        """
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        momentum = state["momentum_buffer"].lerp_(parameter.grad, 1 - MOMENTUM)
        low = parameter.device.type != "cpu" or bfloat16_is_fast()
        return parameter.grad.lerp(momentum, MOMENTUM).to(torch.bfloat16 if low else torch.float32)
