"""An interpolated n-gram with back-off, counted and not trained:
the floor that any model must beat.

Each order mixes its own counts with the next shorter order by Witten and Bell's weights (1991):
a context that was met often, and followed by few kinds of token, is trusted most. How much at all
may be fitted, one number an order.
"""

from dataclasses import dataclass

import numpy as np

UNSEEN = -1  # the number of a context that training never met


@dataclass(frozen=True)
class Level:
    """What was counted behind contexts of one length."""

    grams: np.ndarray  # context * V + token of each pair that was met, sorted
    counts: np.ndarray  # how often, in the same order
    totals: np.ndarray  # tokens behind each context
    kinds: np.ndarray  # different tokens behind each context


class NGram:
    """`NGram(order, vocab_size).fit(streams)`.

    Contexts are of 0 … order - 1 tokens of the same piece. `doubt` says for each of these lengths
    how many observations the next shorter context counts for, per kind of token; 1 is Witten and
    Bell's.
    """

    def __init__(self, order: int, vocab_size: int):
        self.order = order
        self.vocab_size = vocab_size
        self.levels: list[Level] = []
        self.doubt = [1.0] * order

    def shorter(self, order: int, doubt: list[float]) -> "NGram":
        """The n-gram of a lower order, of the same counts."""
        one = NGram(order, self.vocab_size)
        one.levels = self.levels[:order]
        one.doubt = doubt
        return one

    def fit(self, streams: list[np.ndarray]) -> "NGram":
        """Count token streams, each an integer array (length,)."""
        self.levels, contexts = [], 1
        tokens = np.concatenate(streams).astype(np.int64)
        first = np.concatenate([np.arange(len(stream)) for stream in streams])  # place in its piece
        context = np.zeros(len(tokens), np.int64)
        for length in range(self.order):
            here = first >= length  # so many tokens lie before it
            grams, which, counts = np.unique(
                context[here] * self.vocab_size + tokens[here],
                return_inverse=True,
                return_counts=True,
            )
            behind = grams // self.vocab_size
            totals, kinds = (np.bincount(behind, weights, contexts) for weights in (counts, None))
            self.levels.append(Level(grams, counts, totals, kinds))
            contexts = len(grams)
            # the next token's longer context is this one with this token behind it
            longer = np.full(len(tokens), UNSEEN)
            longer[here] = which
            context = np.concatenate([[UNSEEN], longer[:-1]])
        return self

    def probabilities(self, stream: np.ndarray) -> np.ndarray:
        """The probability of each token of a stream after those before it, float64 (length,)."""
        tokens = stream.astype(np.int64)
        found = np.full(len(tokens), 1 / self.vocab_size)
        context = np.zeros(len(tokens), np.int64)
        for level, doubt in zip(self.levels, self.doubt, strict=True):
            # one that only ended pieces has nothing behind it
            known = (context != UNSEEN) & (level.totals[context] > 0)
            key = context * self.vocab_size + tokens
            place = np.searchsorted(level.grams, key).clip(max=len(level.grams) - 1)
            met = known & (level.grams[place] == key)
            count = np.where(met, level.counts[place], 0)
            total = level.totals[context]
            prior = doubt * level.kinds[context]
            mixed = (count + prior * found) / np.maximum(total + prior, 1)
            found = np.where(known, mixed, found)
            longer = np.where(met, place, UNSEEN)
            context = np.concatenate([[UNSEEN], longer[:-1]])
        return found

    def bits(self, stream: np.ndarray) -> float:
        """Bits of a stream, its first token given."""
        return float(-np.log2(self.probabilities(stream)[1:]).sum())
