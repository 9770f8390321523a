"""A player that knows the last token alone: pairs of tokens, counted. What it plays is the anchor that music must beat.

Shuffled tokens are a poor floor: whatever keeps to the grammar and to the frequency of pairs comes nearer to
real music than they do. So a measure means something where a model lies clearly above this one.
"""

from types import SimpleNamespace

import torch
from torch import Tensor, nn

from lib.music.streams import Streams


class BigramLM(nn.Module):
    """log P(next token | last token), with the interface of a language model; its state is empty.

    Counts are of the train split, add-one smoothed unigrams mixed in by Witten and Bell's weights, as
    in `lib.train.bits.counting_baselines`.
    """

    carries = True

    def __init__(self, streams: Streams):
        super().__init__()
        size = streams.vocab_size
        self.config = SimpleNamespace(vocab_size=size, n_layer=0)
        counts = torch.zeros(size, size, dtype=torch.float64)
        for piece in streams.select("train"):
            ids = torch.from_numpy(streams.stream(piece).astype("int64"))
            pairs = ids[:-1] * size + ids[1:]
            counts += torch.bincount(pairs, minlength=size * size).view(size, size)
        unigram = counts.sum(0) + 1
        unigram /= unigram.sum()
        seen = counts.sum(1, keepdim=True)
        kinds = (counts > 0).sum(1, keepdim=True)
        weight = seen / (seen + kinds).clamp(min=1)
        mixed = weight * counts / seen.clamp(min=1) + (1 - weight) * unigram
        self.register_buffer("table", mixed.log().float())

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
