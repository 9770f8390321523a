"""Mamba-3 without its MIMO form: the block and its language model.

What changed since `lib.mamba.mamba2` (Lahoti et al. 2026, arXiv:2603.15569): a step takes in both
of its ends (`lib.scan.trapezoid`), pairs of the state turn, the decay itself is read off the input,
B and C are normed and have a bias a head, and there is no convolution and no norm behind the gate.
Parameter names and shapes are those of mamba-ssm's `Mamba3`, with one group of B and C and a MIMO
rank of 1.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lib.env.errors import UserError
from lib.mamba.mamba2 import Heads
from lib.mamba.model import Block, LanguageModel, Memory, RMSNorm, precise, scale_output, step_bias
from lib.scan.trapezoid import angles, trapezoid_scan, turn

SLOWEST = 1e-4  # the least rate of decay, as published: a state never grows


@dataclass(frozen=True)
class Mamba3Config(Heads):
    """Sizes of a Mamba-3 language model."""

    vocab_size: int
    d_model: int = 256  # width of the residual stream
    n_layer: int = 4
    d_state: int = 64  # N, numbers a channel remembers
    head_dim: int = 64  # P, channels that share a decay and a turn
    expand: int = 2  # channels of the scan: d_inner = expand * d_model
    rope_fraction: float = 0.5  # the part of the state that turns; 0: none, as in Mamba-2
    trapezoid: bool = True  # False: only the later end of a step counts (λ = 1), as in Mamba-2
    dt_min: float = 0.001  # delta starts between these two, log-uniformly
    dt_max: float = 0.1
    norm_eps: float = 1e-5
    dropout: float = 0.0  # on each block's output, in training

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.rope_fraction <= 1:
            raise UserError(
                "rope_fraction is the part of the state that turns, 0 to 1, "
                f"not {self.rope_fraction}"
            )

    @property
    def n_angle(self) -> int:
        """Pairs of the state that turn."""
        return int(self.d_state * self.rope_fraction) // 2


class Mamba3Mixer(nn.Module):
    """The Mamba-3 block's inside: (B, L, d_model) to (B, L, d_model).

    Its memory: of the step before, how far each head has turned, B and x,
    side by side (B, H, R + N + P); and the state (B, D, N).
    """

    def __init__(self, config: Mamba3Config):
        super().__init__()
        self.config = config
        heads, d_state = config.n_head, config.d_state
        self.sizes = [
            config.d_inner,
            config.d_inner,
            d_state,
            d_state,
            heads,
            heads,
            heads if config.trapezoid else 0,
            config.n_angle,
        ]
        self.in_proj = nn.Linear(config.d_model, sum(self.sizes), bias=False)
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.B_bias = nn.Parameter(torch.ones(heads, 1, d_state))
        self.C_bias = nn.Parameter(torch.ones(heads, 1, d_state))
        self.B_norm = RMSNorm(d_state, config.norm_eps)
        self.C_norm = RMSNorm(d_state, config.norm_eps)
        self.D = nn.Parameter(torch.ones(heads))
        self.out_proj = nn.Linear(config.d_inner, config.d_model, bias=False)
        with torch.no_grad():
            self.dt_bias.copy_(step_bias(heads, config.dt_min, config.dt_max))
            scale_output(self, config.n_layer)

    def new_memory(self, batch: int = 1) -> Memory:
        """The memory before the first position: zeros."""
        config = self.config
        zeros = precise(self.D).new_zeros
        before = zeros(batch, config.n_head, config.n_angle + config.d_state + config.head_dim)
        return before, zeros(batch, config.d_inner, config.d_state)

    def forward(
        self, u: Float[Tensor, "B L M"], memory: Memory, backend: str = "chunked"
    ) -> tuple[Float[Tensor, "B L M"], Memory]:
        """The layer's output, and its memory after the last position."""
        config = self.config
        before, h = memory
        if not u.shape[1]:
            return u, memory
        theta, B_before, x_before = before.split(
            [config.n_angle, config.d_state, config.head_dim], -1
        )
        z, x, B, C, delta, rate, lam, speed = self.in_proj(u).split(self.sizes, -1)
        delta = F.softplus(precise(delta) + precise(self.dt_bias))  # (B, L, H)
        log_decay = -F.softplus(precise(rate)).clamp(min=SLOWEST) * delta
        lam = torch.sigmoid(precise(lam)) if config.trapezoid else torch.ones_like(delta)
        theta = angles(speed, delta, theta)  # (B, L, H, R)
        B = turn(self.B_norm(B)[:, :, None] + precise(self.B_bias[:, 0]), theta)  # (B, L, H, N)
        C = turn(self.C_norm(C)[:, :, None] + precise(self.C_bias[:, 0]), theta)
        x = x.unflatten(-1, (config.n_head, config.head_dim))
        state = h.unflatten(1, x.shape[2:]), B_before, x_before
        y, (h, B, x) = trapezoid_scan(
            x, delta, log_decay, B, C, lam, self.D, state, backend=backend
        )
        y = (y.flatten(2) * F.silu(precise(z))).to(z.dtype)
        after = torch.cat([theta[:, -1].to(B.dtype), B, x], -1)
        return self.out_proj(y), (after, h.flatten(1, 2))

    def step(self, u: Float[Tensor, "B M"], memory: Memory) -> tuple[Float[Tensor, "B M"], Memory]:
        """One position. The same numbers as `forward`, from the memory alone."""
        y, memory = self(u[:, None], memory, backend="loop")
        return y[:, 0], memory


class Mamba3LM(LanguageModel):
    """Mamba-3 blocks between an embedding and the same embedding as the output layer."""

    def __init__(self, config: Mamba3Config):
        super().__init__(
            config, (Block(config, Mamba3Mixer(config)) for _ in range(config.n_layer))
        )
