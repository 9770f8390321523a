"""What may follow what in REMI, inside merged tokens too; the clock that tokens move; their notes.

A `Grammar` goes along with a token sequence and says which tokens may come next, so that whatever
is drawn can be decoded. A `NoteReader` decodes token by token, in constant memory.
"""

import copy
import functools
import math
from dataclasses import dataclass

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
FOLLOWS = {
    "start": {"mark", "Bar"},
    "mark": {"Bar"},
    "Bar": {"Bar", "Position"},
    "Position": {"Pitch"},
    "Pitch": {"Velocity"},
    "Velocity": {"Duration"},
    "Duration": {"Pitch", "Position", "Bar"},
}
ANYWHERE = 1_000_000  # the first position in a token that has none: behind every other


@dataclass(frozen=True)
class Move:
    """What one token does to the clock and to the keys."""

    bars: int = 0  # bar lines in it
    position: int | None = None  # where it leaves the clock in the bar; None: where it was
    struck: frozenset[int] = frozenset()  # keys struck at the last onset in it
    first_position: int = ANYWHERE  # must lie behind where the clock stands
    struck_now: frozenset[int] = frozenset()  # keys struck before it moves the clock


def read_move(names: tuple[str, ...]) -> Move:
    """The `Move` of a token, from the base tokens inside it."""
    bars = 0
    position = None
    first_position = ANYWHERE
    struck: set[int] = set()
    struck_now: set[int] = set()
    for name in names:
        kind = kind_of(name)
        if kind == "Bar":
            bars += 1
            position = -1
            struck = set()
        elif kind == "Position":
            if position is None:
                first_position = number_of(name)
            position = number_of(name)
            struck = set()
        elif kind == "Pitch":
            struck.add(number_of(name))
            if position is None:
                struck_now.add(number_of(name))
    return Move(bars, position, frozenset(struck), first_position, frozenset(struck_now))


class Rules:
    """What every token of a vocabulary begins with, ends with, strikes, and does to the clock."""

    def __init__(self, tokenizer: Tokenizer):
        if tokenizer.config.kind != "REMI":
            raise UserError(
                f"playing needs REMI tokens, and these are {tokenizer.config.kind}: "
                "train on streams of python -m lib.music encode"
            )
        if tokenizer.config.pedal == "tokens":
            raise UserError(
                "playing needs a tokenizer without pedal tokens: build one with pedal='extend', "
                "or python -m lib.music encode --pedal extend"
            )
        self.grid = BEAT / tokenizer.config.steps
        # BOS, EOS and PAD follow nothing, so they are never drawn
        begins = [kind_of(names[0]) if names else "mark" for names in tokenizer.pieces]
        self.allowed = {
            end: np.array([begin in kinds for begin in begins]) for end, kinds in FOLLOWS.items()
        }
        ends = [kind_of(names[-1]) if names else "mark" for names in tokenizer.pieces]
        self.ends = [end if end in FOLLOWS else "start" for end in ends]

        self.moves = [read_move(names) for names in tokenizer.pieces]
        self.bars = np.array([move.bars for move in self.moves])
        self.first_position = np.array([move.first_position for move in self.moves])
        last = [-1 if move.position is None else move.position for move in self.moves]
        self.last_position = np.array(last)
        self.moving = (self.bars > 0) | (self.last_position >= 0)
        # whether a token leaves a key alone where the clock stands
        self.spares = np.ones((128, tokenizer.vocab_size), bool)
        for token, move in enumerate(self.moves):
            self.spares[list(move.struck_now), token] = False


@functools.lru_cache(maxsize=8)
def _rules(tokenizer: Tokenizer, size: int) -> Rules:
    """Made once for a tokenizer, and again where merges have changed its `size`."""
    return Rules(tokenizer)


class Grammar:
    """Keeps a token sequence decodable and knows its clock.

    Tokens of merged kinds are looked into: what a token begins with must be allowed after what
    the last one ended with, positions inside a bar must increase, and at one instant no key is
    struck twice and no more than ten are struck.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.rules = _rules(tokenizer, tokenizer.vocab_size)
        self.end = "start"  # the kind that the last token ended with
        self.bar = -1
        self.position = -1  # in the bar, of the last onset
        self.struck: frozenset[int] = frozenset()  # keys struck there

    def copy(self) -> "Grammar":
        """One that goes its own way from here."""
        return copy.copy(self)

    def read(self, token: int) -> None:
        """Move on by one token."""
        move = self.rules.moves[token]
        self.bar += move.bars
        if move.position is None:
            self.struck = self.struck | move.struck  # never changed in place: copies share it
        else:
            self.struck = move.struck
            self.position = move.position
        self.end = self.rules.ends[token]

    def wait(self, until: float, bar_token: int) -> list[int]:
        """Let the clock run on in silence: no onset before `until` seconds.

        Returns the bar lines that this takes, as tokens for the model to read too.
        """
        bar = int(until / BAR + 1e-9)
        bars = [bar_token] * max(0, bar - self.bar)
        for token in bars:
            self.read(token)
        step = math.ceil((until - self.bar * BAR) / self.rules.grid - 1e-6)
        self.position = max(self.position, step - 1)
        self.end = "Bar"  # a new position or a new bar; no further note at the last onset
        return bars

    @property
    def seconds(self) -> float:
        """Where the last onset is."""
        return max(self.bar, 0) * BAR + max(self.position, 0) * self.rules.grid

    def elapsed(self) -> np.ndarray:
        """Seconds by which each token would move the clock, float64 of shape (V,)."""
        rules = self.rules
        bar = np.maximum(self.bar + rules.bars, 0)
        after = bar * BAR + np.maximum(rules.last_position, 0) * rules.grid
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
    """Notes out of grammatical tokens, one after another: `Tokenizer.decode` in constant memory.

    A `grammar` tells where the clock stands when the first token lies inside a piece.
    """

    def __init__(self, tokenizer: Tokenizer, grammar: Grammar | None = None):
        self._words = [
            [self._word(name) for name in names if is_music(name)] for names in tokenizer.pieces
        ]
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
                self._bar += 1
                self._position = 0
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
        found = [note for token in tokens for note in self.read(int(token))]
        rows = np.array(found, NOTE)
        return rows[np.lexsort((rows["pitch"], rows["start"]))]
