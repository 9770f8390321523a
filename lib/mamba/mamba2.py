"""Mamba-2: the block with heads and its language model.

What changed since `lib.mamba.model` (Dao and Gu 2024, arXiv:2405.21060, section 7): one projection
gives the gate, the input, B, C and the step of each head; the convolution runs over x, B and C; A
is one number a head, so that the scan becomes matrix products (`lib.scan.ssd`); a norm stands
behind the gate. All the rest is `LanguageModel`'s.

Parameter names are the official ones, those of mamba-ssm's `Mamba2` and of transformers'
`Mamba2ForCausalLM`, with one group of B and C for all heads.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lib.env.errors import UserError
from lib.mamba.model import (
    Block,
    LanguageModel,
    MambaMixer,
    Memory,
    RMSNorm,
    precise,
    scale_output,
    step_bias,
)
from lib.scan.ssd import ssd_scan, ssd_step


class Heads:
    """What sizes with heads have in common: d_model, expand and head_dim say how many there are."""

    def __post_init__(self):
        if self.head_dim < 1 or self.d_inner % self.head_dim:
            raise UserError(
                f"{self.d_inner} channels do not split into heads of {self.head_dim}: "
                "choose a head_dim that divides expand * d_model"
            )

    @property
    def d_inner(self) -> int:
        return self.expand * self.d_model

    @property
    def n_head(self) -> int:
        return self.d_inner // self.head_dim


@dataclass(frozen=True)
class Mamba2Config(Heads):
    """Sizes of a Mamba-2 language model."""

    vocab_size: int
    d_model: int = 256  # width of the residual stream
    n_layer: int = 4
    d_state: int = 64  # N, numbers a channel remembers
    head_dim: int = 64  # P, channels that share one decay
    d_conv: int = 4  # K, taps of the convolution
    expand: int = 2  # channels of the scan: d_inner = expand * d_model
    dt_min: float = 0.001  # delta starts between these two, log-uniformly
    dt_max: float = 0.1
    norm_eps: float = 1e-5
    dropout: float = 0.0  # on each block's output, in training
    bias: bool = False  # of in_proj and out_proj
    conv_bias: bool = True

    @property
    def d_mixed(self) -> int:
        """Channels of the convolution: x, B and C side by side."""
        return self.d_inner + 2 * self.d_state


class GatedRMSNorm(RMSNorm):
    """The norm of y silu(z).

    The gate comes first, so that the output has one size however far it is open.
    """

    def forward(
        self, y: Float[Tensor, "*any D"], z: Float[Tensor, "*any D"]
    ) -> Float[Tensor, "*any D"]:
        return super().forward(precise(y) * F.silu(precise(z)))


class Mamba2Mixer(nn.Module):
    """The Mamba-2 block's inside: (B, L, d_model) to (B, L, d_model).

    Its memory: the last K-1 inputs of the convolution (B, K-1, D + 2 N), and the state (B, D, N).
    """

    def __init__(self, config: Mamba2Config):
        super().__init__()
        self.config = config
        d_inner = config.d_inner
        self.in_proj = nn.Linear(
            config.d_model, d_inner + config.d_mixed + config.n_head, bias=config.bias
        )
        self.conv1d = nn.Conv1d(
            config.d_mixed,
            config.d_mixed,
            config.d_conv,
            groups=config.d_mixed,
            bias=config.conv_bias,
        )
        self.dt_bias = nn.Parameter(torch.empty(config.n_head))
        self.A_log = nn.Parameter(torch.empty(config.n_head))
        self.D = nn.Parameter(torch.ones(config.n_head))
        self.norm = GatedRMSNorm(d_inner, config.norm_eps)
        self.out_proj = nn.Linear(d_inner, config.d_model, bias=config.bias)
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Initialise as published.

        A is uniform in [-16, -1], delta log-uniform, outputs are scaled down.
        """
        config = self.config
        self.A_log.uniform_(1, 16).log_()
        self.dt_bias.copy_(step_bias(config.n_head, config.dt_min, config.dt_max))
        scale_output(self, config.n_layer)

    convolve = MambaMixer.convolve

    def new_memory(self, batch: int = 1) -> Memory:
        """The memory before the first position: zeros."""
        config = self.config
        zeros = precise(self.D).new_zeros
        window = zeros(batch, config.d_conv - 1, config.d_mixed)
        return window, zeros(batch, config.d_inner, config.d_state)

    def split(self, u: Float[Tensor, "*any M"]) -> tuple[Tensor, Tensor, Tensor]:
        """Gate z, what goes through the convolution, and the positive step of each head."""
        config = self.config
        z, mixed, delta = self.in_proj(u).split([config.d_inner, config.d_mixed, config.n_head], -1)
        return z, mixed, F.softplus(precise(delta) + precise(self.dt_bias))

    def heads(self, mixed: Float[Tensor, "*any X"]) -> tuple[Tensor, Tensor, Tensor]:
        """x (…, H, P), B and C (…, N) of what the convolution gave."""
        config = self.config
        x, B, C = mixed.split([config.d_inner, config.d_state, config.d_state], -1)
        return x.unflatten(-1, (config.n_head, config.head_dim)), B, C

    def forward(
        self, u: Float[Tensor, "B L M"], memory: Memory, backend: str = "chunked"
    ) -> tuple[Float[Tensor, "B L M"], Memory]:
        """The layer's output, and its memory after the last position."""
        before, h = memory
        z, mixed, delta = self.split(u)
        mixed, after = self.convolve(mixed, before)
        x, B, C = self.heads(mixed)
        h = h.unflatten(1, x.shape[2:])
        y, h = ssd_scan(x, delta, self.A, B, C, self.D, h, True, backend)
        return self.out_proj(self.norm(y.flatten(2), z)), (after, h.flatten(1, 2))

    def step(self, u: Float[Tensor, "B M"], memory: Memory) -> tuple[Float[Tensor, "B M"], Memory]:
        """One position. The same numbers as `forward`, from the memory alone."""
        before, h = memory
        z, mixed, delta = self.split(u)
        mixed, after = self.convolve(mixed[:, None], before)
        x, B, C = self.heads(mixed[:, 0])
        y, h = ssd_step(h.unflatten(1, x.shape[1:]), x, delta, self.A, B, C, self.D)
        return self.out_proj(self.norm(y.flatten(1), z)), (after, h.flatten(1, 2))

    @property
    def A(self) -> Tensor:
        """One rate a head (H,), negative."""
        return -torch.exp(precise(self.A_log))


class Mamba2LM(LanguageModel):
    """Mamba-2 blocks between an embedding and the same embedding as the output layer."""

    def __init__(self, config: Mamba2Config):
        super().__init__(
            config, (Block(config, Mamba2Mixer(config)) for _ in range(config.n_layer))
        )
