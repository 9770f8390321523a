"""What the names of base tokens say, read in one place: `Bar_None`, `Pitch_60`, `Duration_1.2.10`.

A name is a kind and a value. The value of a `Pitch` is a MIDI key, of a `Velocity` a MIDI velocity,
of a `Position` a step of the grid in its bar. That of a `Duration` is beats.part.parts: whole
beats, and `part` of the `parts` into which MidiTok cuts a beat of a note so long. `None` is no
value: a bar line, or what begins, ends and pads a piece.
"""

from collections.abc import Sequence

import numpy as np

BAR_LINE = "Bar_None"


def kind_of(name: str) -> str:
    """The kind of a base token: "Bar", "Position", "Pitch", "Velocity", "Duration".

    Of special tokens it is "PAD", "BOS" or "EOS".
    """
    return name.split("_")[0]


def number_of(name: str) -> int:
    """The value of a `Pitch`, a `Velocity` or a `Position`."""
    return int(name.split("_")[1])


def duration_of(name: str) -> tuple[float, int]:
    """(beats, parts) of a `Duration`: how long it lasts, and how finely such a beat is cut."""
    whole, part, parts = map(int, name.split("_")[1].split("."))
    return whole + part / parts, parts


def is_music(name: str) -> bool:
    """Whether a token can be decoded: a bar line can, what begins, ends and pads a piece cannot."""
    return name == BAR_LINE or not name.endswith("_None")


def numbers_in(pieces: Sequence[Sequence[str]], kind: str) -> list[list[int]]:
    """For each token, given the base tokens inside it, the values of one kind."""
    return [[number_of(name) for name in names if kind_of(name) == kind] for names in pieces]


def count_in(pieces: Sequence[Sequence[str]], kind: str) -> np.ndarray:
    """How many base tokens of one kind lie inside each token, int64 of shape (V,)."""
    return np.array([sum(kind_of(name) == kind for name in names) for names in pieces], np.int64)
