"""A language model of fixed state space models: Mamba's block with S4D in the place of the
selective scan.

Projections, convolution, gate and residual are Mamba's; the difference is that A, B, C and the step
do not depend on the input (the ablation of Gu and Dao 2023, table 8 ff.). Sequences go
through `lib.scan.ssm.chunked`, single tokens through the recurrence.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib.mamba.model import Block, LanguageModel, MambaMixer, Memory, precise
from lib.scan.ssm import DiagonalSystems


@dataclass(frozen=True)
class S4DConfig:
    """Sizes of an S4D language model."""

    vocab_size: int
    d_model: int = 256  # width of the residual stream
    n_layer: int = 4
    d_state: int = 64  # states a channel, in conjugate pairs: half as many complex numbers
    d_conv: int = 4  # K, taps of the convolution
    expand: int = 2  # channels of the systems: expand * d_model
    dropout: float = 0.0  # on each block's output, in training
    norm_eps: float = 1e-5
    conv_bias: bool = True  # as in Mamba

    @property
    def d_inner(self) -> int:
        return self.expand * self.d_model


class Systems(DiagonalSystems):
    """The systems of an S4D layer alone: the block has a gate and an output layer of its own."""

    def __init__(self, channels: int, d_state: int):
        super().__init__(channels, d_state)
        self._known = [], ()

    def system(self) -> tuple[Tensor, Tensor, Tensor]:
        """Without gradients computed once for the parameters as they are, not at every token.

        What they are is asked of their numbers: a fused optimiser changes these and leaves the
        version counters of the tensors as they were.
        """
        if torch.is_grad_enabled():
            return super().system()
        before, known = self._known
        now = list(self.parameters())
        if not before or not all(map(_same, now, before)):
            known = super().system()
            self._known = [one.clone() for one in now], known
        return known


class S4DMixer(nn.Module):
    """(B, L, d_model) to (B, L, d_model). Its memory: the convolution's last K-1 inputs (B, K-1,
    D), and the states' real and imaginary parts (B, D, d_state).
    """

    def __init__(self, config: S4DConfig):
        super().__init__()
        self.config = config
        d_inner = config.d_inner
        self.in_proj = nn.Linear(config.d_model, 2 * d_inner, bias=False)
        self.conv1d = nn.Conv1d(
            d_inner, d_inner, config.d_conv, groups=d_inner, bias=config.conv_bias
        )
        self.ssm = Systems(d_inner, config.d_state)
        self.out_proj = nn.Linear(d_inner, config.d_model, bias=False)
        with torch.no_grad():
            self.out_proj.weight /= math.sqrt(config.n_layer)

    convolve = MambaMixer.convolve

    def new_memory(self, batch: int = 1) -> Memory:
        """The convolution's inputs and the states before the first token: zeros."""
        config = self.config
        zeros = precise(self.ssm.D).new_zeros
        window = zeros(batch, config.d_conv - 1, config.d_inner)
        return window, zeros(batch, config.d_inner, config.d_state)

    def forward(self, u: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """u (B, L, M) to (B, L, M), and the memory after it."""
        before, h = memory
        x, z = self.in_proj(u).chunk(2, -1)
        x, after = self.convolve(x, before)
        y, h = self.ssm(x, _complex(h), return_state=True)
        return self.out_proj(y * F.silu(z)), (after, _real(h))

    def step(self, u: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """The same for one position, u (B, M), by the recurrence."""
        before, h = memory
        x, z = self.in_proj(u).chunk(2, -1)
        x, after = self.convolve(x[:, None], before)
        y, h = self.ssm.step(x[:, 0], _complex(h))
        return self.out_proj(y * F.silu(z)), (after, _real(h))


def _same(a: Tensor, b: Tensor) -> bool:
    return a.device == b.device and a.dtype == b.dtype and torch.equal(a, b)


def _complex(h: Tensor) -> Tensor:
    return torch.view_as_complex(h.unflatten(2, (-1, 2)).contiguous())


def _real(h: Tensor) -> Tensor:
    return torch.view_as_real(h).flatten(2)


class S4DLM(LanguageModel):
    """Mamba's language model without selection."""

    def __init__(self, config: S4DConfig):
        super().__init__(config, [Block(config, S4DMixer(config)) for _ in range(config.n_layer)])
