"""How one token is drawn from a model's distribution."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lib.env.errors import UserError

LATELY = 64  # tokens that `repetition` looks back on
TINY = 1e-100  # a temperature below it may make a quotient that is no number any more


@dataclass(frozen=True)
class Sampling:
    """Repetition, temperature and filters, applied in this order."""

    temperature: float = 1.0  # below 1: safer, above 1: wilder; 0 takes the likeliest
    top_k: int = 0  # keep the k likeliest tokens; 0: all
    top_p: float = 0.95  # keep the likeliest tokens that make up this much probability
    min_p: float = 0.0  # drop tokens less likely than this share of the likeliest
    repetition: float = 1.0  # before the rest: divide the odds of keys struck lately; 1: do not
    clock_temperature: float = 0.0  # a floor under the temperature of when, not of what

    def __post_init__(self):
        if not (0 <= self.temperature <= 10 and math.isfinite(self.temperature)):
            raise UserError(
                f"temperature {self.temperature} is outside 0 to 10: 1 is the model's own"
            )
        if self.top_k < 0:
            raise UserError(f"top-k {self.top_k} is negative: give 0 for all tokens, or a count")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top-p {self.top_p} is outside 0 to 1: give 1 for all tokens")
        if not 0 <= self.min_p < 1:
            raise UserError(f"min-p {self.min_p} is outside 0 to 1: give 0 for all tokens")
        if not 1 <= self.repetition <= 100:
            raise UserError(
                f"repetition {self.repetition} is outside 1 to 100: 1 changes nothing, "
                "more discourages repeats, and less would reward them"
            )
        if not (0 <= self.clock_temperature <= 10 and math.isfinite(self.clock_temperature)):
            raise UserError(
                f"clock-temperature {self.clock_temperature} is outside 0 to 10: "
                "0 leaves the clock to --temperature, 1 is the model's own"
            )

    def discourage(self, logits: Tensor, recent: Tensor) -> Tensor:
        """Logits (..., V) with log(`repetition`) taken off where `recent`, bool (..., V), is true.

        That divides the odds of such a token against any other by `repetition`, of which the
        temperature takes a power, as of all odds. The usual penalty
        (transformers' form of Keskar et al. 2019, who divided all) divides positive logits and
        multiplies negative ones instead: its effect hangs on where zero happens to lie, which means
        nothing to a softmax.
        """
        return logits - math.log(self.repetition) * recent

    def tempered(self, logits: Tensor, temperature: float) -> Tensor:
        """Logits (..., V) to probabilities; those of the likeliest alone where it is 0."""
        if temperature == 0:
            return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
        return heated(logits, temperature)

    def in_time(self, logits: Tensor, moves: Tensor) -> Tensor:
        """Whether the clock moves, and how far, at `clock_temperature`; all else at `temperature`.

        Logits (..., V), and which tokens move the clock, bool (V,). The odds of moving against
        staying are those of the two groups of tokens, each taken together.
        """
        moving = logits.masked_fill(~moves, -torch.inf)
        staying = logits.masked_fill(moves, -torch.inf)
        groups = torch.stack([moving.logsumexp(-1), staying.logsumexp(-1)], -1)
        share = heated(groups, self.clock_temperature)
        p = share[..., :1] * self.tempered(moving, self.clock_temperature).nan_to_num(0)
        return p + share[..., 1:] * self.tempered(staying, self.temperature).nan_to_num(0)

    def probabilities(self, logits: Tensor, moves: Tensor | None = None) -> Tensor:
        """Logits (..., V), -inf where forbidden, to the probabilities that are drawn from.

        `moves`, bool (V,), says which tokens move the clock, for `clock_temperature`.
        """
        logits = logits.double()
        if moves is not None and self.clock_temperature > self.temperature:
            p = self.in_time(logits, moves)
        else:
            p = self.tempered(logits, self.temperature)
        if not self.top_k and self.top_p == 1 and not self.min_p:
            return p
        p, order = p.sort(dim=-1, descending=True, stable=True)
        if self.top_k:
            p[..., self.top_k :] = 0
        likelier = p.cumsum(-1) - p  # what all before it make up: 0 for the first, so that it stays
        p[likelier >= self.top_p * p.sum(-1, keepdim=True)] = 0
        p[p < self.min_p * p[..., :1]] = 0
        p = p / p.sum(-1, keepdim=True)
        return torch.zeros_like(p).scatter_(-1, order, p)


def heated(logits: Tensor, temperature: float) -> Tensor:
    """The softmax of logits (..., V) at a temperature above 0."""
    if temperature < TINY:  # only there, as it would change the last bits of usual ones
        logits = logits - logits.amax(-1, keepdim=True)
    return torch.softmax(logits / temperature, -1)


def draw(p: Tensor, dice: Tensor) -> Tensor:
    """A token a row, int64 (B,): probabilities (B, V), and a number from 0 to below 1 each, (B,).

    The number is looked up in the summed probabilities, so it is all the chance there is.
    """
    total = p.cumsum(-1)
    total = total / total[:, -1:]
    return torch.searchsorted(total, dice[:, None], right=True)[:, 0]
