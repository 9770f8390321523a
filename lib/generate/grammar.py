"""What may follow what in REMI, inside merged tokens too; the clock that the tokens move; their notes.

A `Grammar` goes along with a token sequence and says which tokens may come next, so that whatever
is drawn can be decoded. A `NoteReader` decodes token by token, in constant memory.
"""

import copy
import functools
import math

import numpy as np
import torch
from torch import Tensor

from lib.env.errors import UserError
from lib.music.notes import NOTE
from lib.music.token_names import duration_of, is_music, kind_of, number_of
from lib.music.tokens import BAR, BEAT, Tokenizer

FINGERS = 10  # keys that may be struck at one instant
# "start" is BOS; "mark" is the token that stands for no music and that byte-pair encoding writes
# once, before the first bar.
FOLLOWS = {"start": {"mark", "Bar"}, "mark": {"Bar"}, "Bar": {"Bar", "Position"}, "Position": {"Pitch"},
           "Pitch": {"Velocity"}, "Velocity": {"Duration"}, "Duration": {"Pitch", "Position", "Bar"}}


class Rules:
    """What every token of a vocabulary begins with, ends with, strikes, and does to the clock."""

    def __init__(self, tokenizer: Tokenizer):
        if tokenizer.config.pedal == "tokens":
            raise UserError("playing needs a tokenizer without pedal tokens: build one with pedal='extend'")
        size = tokenizer.vocab_size
        self.grid = BEAT / tokenizer.config.steps
        self.ends, self.moves, begins = [], [], []
        self.first_position = np.full(size, 1_000_000)
        self.spares = np.ones((128, size), bool)  # whether a token leaves a key alone where the clock stands
        self.bars, self.last_position = np.zeros(size, int), np.full(size, -1)
        for i, names in enumerate(tokenizer.pieces):
            kinds = [kind_of(name) for name in names]
            begins.append(kinds[0] if kinds else "mark")  # BOS, EOS and PAD follow nothing: never drawn
            self.ends.append("mark" if not kinds else kinds[-1] if kinds[-1] in FOLLOWS else "start")
            bars, position, struck = 0, None, set()  # how the token moves the clock; keys struck then
            for kind, name in zip(kinds, names):
                if kind == "Bar":
                    bars, position, struck = bars + 1, -1, set()
                elif kind == "Position":
                    if position is None:  # the first one must lie behind where the clock stands
                        self.first_position[i] = number_of(name)
                    position, struck = number_of(name), set()
                elif kind == "Pitch":
                    struck.add(number_of(name))
                    self.spares[number_of(name), i] &= position is not None
            self.moves.append((bars, position, struck))
            self.bars[i], self.last_position[i] = bars, -1 if position is None else position
        self.allowed = {end: np.array([b in kinds for b in begins]) for end, kinds in FOLLOWS.items()}
        self.moving = (self.bars > 0) | (self.last_position >= 0)


@functools.lru_cache(maxsize=8)
def _rules(tokenizer: Tokenizer, size: int) -> Rules:  # `size` changes when a tokenizer learns merges
    return Rules(tokenizer)


class Grammar:
    """Keeps a token sequence decodable and knows its clock.

    Tokens of merged kinds are looked into: what a token begins with must be allowed after what
    the last one ended with, positions inside a bar must increase, and at one instant no key is
    struck twice and no more than ten are struck.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.rules = _rules(tokenizer, tokenizer.vocab_size)
        self.end, self.bar, self.position, self.struck = "start", -1, -1, set()

    def copy(self) -> "Grammar":
        """One that goes its own way from here."""
        return copy.copy(self)  # `struck` is only ever replaced, never changed

    def read(self, token: int) -> None:
        """Move on by one token."""
        bars, position, struck = self.rules.moves[token]
        self.bar += bars
        self.struck = self.struck | struck if position is None else struck
        self.position = self.position if position is None else position
        self.end = self.rules.ends[token]

    def wait(self, until: float, bar_token: int) -> list[int]:
        """Let the clock run on in silence: no onset before `until` seconds.

        Returns the bar lines that this takes, as tokens for the model to read too.
        """
        bars = [bar_token] * max(0, int(until / BAR + 1e-9) - max(self.bar, -1))
        for token in bars:
            self.read(token)
        self.position = max(self.position, math.ceil((until - self.bar * BAR) / self.rules.grid - 1e-6) - 1)
        self.end = "Bar"  # a new position or a new bar; no further note at the last onset
        return bars

    @property
    def seconds(self) -> float:
        """Where the last onset is."""
        return max(self.bar, 0) * BAR + max(self.position, 0) * self.rules.grid

    def elapsed(self) -> np.ndarray:
        """Seconds by which each token would move the clock, float64 of shape (V,)."""
        rules = self.rules
        after = (max(self.bar, 0) + rules.bars) * BAR + np.maximum(rules.last_position, 0) * rules.grid
        return np.where(rules.moving, np.maximum(after - self.seconds, 0), 0)

    def may_follow(self) -> np.ndarray:
        """Which tokens may come next, bool of shape (V,)."""
        rules = self.rules
        good = rules.allowed[self.end] & (rules.first_position > self.position)
        for key in self.struck:
            good &= rules.spares[key]
        if len(self.struck) >= FINGERS:
            good &= ~rules.allowed["Position"]  # nothing that begins with another key
        return good

    def mask(self, logits: Tensor) -> Tensor:
        """-inf for every token that may not come next; logits of shape (V,)."""
        return logits.masked_fill(~torch.from_numpy(self.may_follow()), -torch.inf)


class NoteReader:
    """Notes out of grammatical tokens, one token at a time: what `Tokenizer.decode` gives, without the whole piece.

    A `grammar` tells where the clock stands when the first token lies inside a piece.
    """

    def __init__(self, tokenizer: Tokenizer, grammar: Grammar | None = None):
        self._words = [[self._word(name) for name in names if is_music(name)]
                       for names in tokenizer.pieces]
        self._grid = BEAT / tokenizer.config.steps
        self._bar = grammar.bar if grammar else -1
        self._position = max(grammar.position, 0) if grammar else 0
        self._pitch = self._velocity = 0

    @staticmethod
    def _word(name: str) -> tuple[str, float]:
        kind = kind_of(name)
        if kind == "Duration":
            beats, _ = duration_of(name)
            return kind, beats * BEAT
        return kind, 0 if kind == "Bar" else number_of(name)

    def read(self, token: int) -> list[tuple[float, float, int, int]]:
        """The notes (start, end, pitch, velocity) that this token completes."""
        notes = []
        for kind, value in self._words[token]:
            if kind == "Bar":
                self._bar, self._position = self._bar + 1, 0
            elif kind == "Position":
                self._position = value
            elif kind == "Pitch":
                self._pitch = value
            elif kind == "Velocity":
                self._velocity = value
            else:
                start = max(self._bar, 0) * BAR + self._position * self._grid
                notes.append((start, start + value, self._pitch, self._velocity))
        return notes

    def notes(self, tokens) -> np.ndarray:
        """All notes of a run of tokens, a structured array as in `lib.music.notes`, sorted."""
        rows = np.array([note for token in tokens for note in self.read(int(token))], NOTE)
        return rows[np.lexsort((rows["pitch"], rows["start"]))]
