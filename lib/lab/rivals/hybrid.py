"""Mamba with one or two attention layers, as in Jamba and Samba:
the original authors' future work.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from lib.env.errors import UserError
from lib.lab.rivals.transformer import TransformerBlock
from lib.mamba.model import Block, LanguageModel, MambaConfig, MambaMixer, Memory


@dataclass(frozen=True)
class HybridConfig(MambaConfig):
    """Sizes of a hybrid: a Mamba's, and those of the Transformer layers among its layers."""

    attention: tuple[int, ...] = (2,)  # which layers are Transformer layers, counted from 0
    n_head: int = 4
    d_feed: int = 256  # width inside their feed-forward part
    window: int = 512  # positions that they attend to
    rope_base: float = 10_000.0

    def __post_init__(self):
        object.__setattr__(self, "attention", tuple(self.attention))  # JSON knows lists only
        if any(not 0 <= i < self.n_layer for i in self.attention):
            raise UserError(
                f"attention in layers {self.attention} does not fit "
                f"{self.n_layer} layers, counted from 0"
            )
        if not self.tied:
            raise UserError(
                "the hybrid's embedding is its output layer: tied=False is Mamba's alone"
            )


class Selective(nn.Module):
    """`MambaMixer`, one name deeper: so it stands in the weights of hybrids."""

    def __init__(self, config: MambaConfig):
        super().__init__()
        self.mamba = MambaMixer(config)

    def new_memory(self, batch: int = 1) -> Memory:
        """As the mixer's."""
        return self.mamba.new_memory(batch)

    def forward(self, u: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """u (B, L, M) to (B, L, M), and the memory after it."""
        return self.mamba(u, memory)

    def step(self, u: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """The same for one position, u (B, M)."""
        return self.mamba.step(u, memory)


class HybridLM(LanguageModel):
    """Mamba layers, and Transformer layers where `attention` says so."""

    def __init__(self, config: HybridConfig):
        super().__init__(
            config,
            [
                TransformerBlock(config)
                if i in config.attention
                else Block(config, Selective(config))
                for i in range(config.n_layer)
            ],
        )
