"""Likelihoods that can be compared between time grids: bits a note, with what a grid leaves unsaid.

A model on a coarse grid need not say where in a cell of time a note lies. What it would take to say
so is added, and all likelihoods are then those of one grid.
"""

import math
from collections.abc import Sequence

import numpy as np

from lib.env.errors import UserError
from lib.music.token_names import duration_of, kind_of
from lib.train.bits import held_out, interval, piece_bits


def dequantisation_bits(tokenizer, ids: np.ndarray, *, grid_ms: float = 10.0) -> float:
    """Bits that say of every note of these tokens where in its cell of time it lies, to `grid_ms`.

    A density that is flat within a cell of w ms costs log2(w / grid_ms) bits, for the onset and for
    the duration; long durations have wider cells. Added to the model's own bits this makes the
    likelihoods of tokenizers with different grids comparable. Negative for a grid finer than
    `grid_ms`. MIDI-Like tokens name no durations whose cells could be counted: they have bits on
    their own grid only, where there is nothing to add, and a `UserError` on another.
    """
    if tokenizer.config.kind == "MIDILike" and tokenizer.config.grid_ms != grid_ms:
        raise UserError(
            f"MIDI-Like tokens are compared on their own grid only: theirs is "
            f"{tokenizer.config.grid_ms:g} ms, not {grid_ms:g}"
        )
    duration = np.zeros(len(tokenizer.pieces))
    for token, names in enumerate(tokenizer.pieces):
        for name in names:
            if kind_of(name) == "Duration":
                _, parts = duration_of(name)  # of a beat of half a second
                duration[token] += math.log2(500 / parts / grid_ms)
    cell = math.log2(tokenizer.config.grid_ms / grid_ms)
    return float(tokenizer.notes_of[ids].sum() * cell + duration[ids].sum())


def likelihood(
    model, tokenizer, performances: Sequence, *, progress: bool = False, **options
) -> dict:
    """Bits per note of whole performances, on the tokens' own grid and at 10 ms.

    Each with a 95 % interval over pieces. Options as in `lib.train.bits.piece_bits`.
    """
    streams = held_out(tokenizer, performances, progress=progress)
    if not streams.pieces:
        raise UserError("there is no piece to evaluate: choose another split")
    bits = piece_bits(model, streams, streams.pieces, progress=progress, **options)
    notes = np.array([p.notes for p in streams.pieces])
    fine = bits + [dequantisation_bits(tokenizer, streams.stream(p)) for p in streams.pieces]
    return {
        "pieces": len(notes),
        "notes": int(notes.sum()),
        "grid_ms": tokenizer.config.grid_ms,
        "native": with_interval(bits, notes),
        "dequantised_10_ms": with_interval(fine, notes),
    }


def with_interval(bits: np.ndarray, notes: np.ndarray) -> dict:
    """Bits per note, and their 95 % interval over pieces: bits and notes of shape (pieces,)."""
    return {"bits_per_note": float(bits.sum() / notes.sum()), "interval_95": interval(bits, notes)}
