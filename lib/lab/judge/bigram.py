"""A player that knows the last token alone: pairs of tokens, counted.

What it plays is the anchor that music must beat.

Shuffled tokens alone are no floor: in overlap and Fréchet distance this player lies below them,
though it keeps to the grammar and to the frequency of pairs. So a model should lie clearly above
both.
"""

from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

from lib.music.streams import Streams
from lib.train.bits import counted_pairs


class BigramLM(nn.Module):
    """log P(next token | last token), with the interface of a language model;
    its state is empty.
    """

    carries = True

    def __init__(self, streams: Streams):
        super().__init__()
        self.config = SimpleNamespace(vocab_size=streams.vocab_size, n_layer=0)
        _, pairs = counted_pairs(streams)
        self.register_buffer("table", torch.from_numpy(np.log(pairs)).float())

    @property
    def device(self) -> torch.device:
        return self.table.device

    def new_state(self, batch: int = 1) -> list:
        """Nothing is remembered."""
        return []

    def prefill(self, tokens: Tensor, state: list | None = None) -> tuple[Tensor, list]:
        """tokens (B, L) to the logits after the last of them, (B, V)."""
        return self.table[tokens[:, -1]], []

    def step(self, tokens: Tensor, state: list | None = None) -> tuple[Tensor, list]:
        """tokens (B,) to logits (B, V)."""
        return self.table[tokens], []
