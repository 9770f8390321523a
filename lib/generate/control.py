"""Ask for more or fewer notes, higher or lower, louder or softer: the model's own odds, tilted.

Every control adds to the logits, so that it works with any checkpoint of the vocabulary, needs no
training and no prompt, and at zero changes nothing at all. What a token would do to the attribute
(how high its keys, how hard they are struck, how far it moves the clock) is read off its name. The
tilt is exponential: of all distributions with that mean, the one nearest to the model's (in
Kullback-Leibler divergence). Tempo is not sampled: the new notes are stretched.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lib.env.errors import UserError
from lib.generate.grammar import Grammar
from lib.music.token_names import numbers_in
from lib.music.tokens import Tokenizer

MOST = 3.0  # either way
# What one unit does, chosen so that 1 is plain to see in the figures and 3 is extreme:
KEYS = 48  # semitones by which a key must be higher to become e times likelier
TOUCH = 64  # the same in MIDI velocity
CROWD = 0.4  # the exponent of the next line
MOMENT = 0.05  # seconds: a step of t seconds becomes (1 + t / 0.05) ** 0.4 times unlikelier


@dataclass(frozen=True)
class Controls:
    """What the player asks for. 0, and tempo 1, are the model's own."""

    density: float = 0.0  # more notes a second where positive
    register: float = 0.0  # higher where positive
    loudness: float = 0.0  # louder where positive
    tempo: float = 1.0  # 2: twice as fast

    def __post_init__(self):
        for name in ("density", "register", "loudness"):
            value = getattr(self, name)
            if not -MOST <= value <= MOST:
                raise UserError(
                    f"{name} {value} is outside {-MOST:g} to {MOST:g}: 0 is the model's own"
                )
        if not 0.25 <= self.tempo <= 4:
            raise UserError(f"tempo {self.tempo} is outside 0.25 to 4: 1 is the model's own")


class Steering:
    """Controls, made ready for a vocabulary."""

    def __init__(self, controls: Controls, tokenizer: Tokenizer):
        self.density = controls.density
        self._tilts = []  # which tokens, and what is added to their logits
        if controls.register:
            self._tilts.append(_tilt(tokenizer, "Pitch", controls.register, KEYS))
        if controls.loudness:
            self._tilts.append(_tilt(tokenizer, "Velocity", controls.loudness, TOUCH))

    def __bool__(self) -> bool:
        return bool(self.density or self._tilts)

    def apply(self, logits: Tensor, grammars: Sequence[Grammar]) -> Tensor:
        """Logits (B, V), -inf where forbidden, tilted; a grammar a row.

        Register and loudness choose among the tokens that name a key or a touch, and leave the
        odds of those tokens, taken together, as they were. So neither changes how many notes come.
        """
        for group, tilt in self._tilts:
            inside = logits[:, group]
            tilted = inside + tilt
            shift = inside.logsumexp(1, keepdim=True) - tilted.logsumexp(1, keepdim=True)
            logits = logits.clone()
            logits[:, group] = tilted + shift.nan_to_num(0)  # 0 where no such token is allowed
        if self.density:
            steps = torch.from_numpy(np.stack([grammar.elapsed() for grammar in grammars]))
            logits = logits - CROWD * self.density * torch.log1p(steps / MOMENT)
        return logits


def _tilt(tokenizer: Tokenizer, kind: str, strength: float, unit: float) -> tuple[Tensor, Tensor]:
    """Which tokens hold values of `kind`, bool (V,), and `strength` times their mean in units."""
    values = numbers_in(tokenizer.pieces, kind)
    group = torch.tensor([bool(inside) for inside in values])
    means = torch.tensor([np.mean(inside) for inside in values if inside], dtype=torch.float64)
    return group, strength * means / unit
