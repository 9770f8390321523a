"""Every performance's notes as arrays, read once and kept: what the evaluation compares with."""

import hashlib
from pathlib import Path

import numpy as np

from lib.env.errors import UserError
from lib.env.files import atomic_write
from lib.music.maestro import DATA, Performance
from lib.music.notes import NOTE, read_midi, sustain

FORMAT = 2  # raise it when the arrays change their meaning


def note_arrays(
    performances: list[Performance], *, folder: Path | None = None, progress: bool = True
) -> list[np.ndarray]:
    """The notes of each performance, lengthened by the pedal, structured as `lib.music.notes.NOTE`.

    They are kept in data/cache, named by a hash of the files' names and sizes
    (130 MB for all of MAESTRO).
    """
    from tqdm import tqdm

    facts = repr([FORMAT, *((p.path.name, p.path.stat().st_size) for p in performances)])
    target = (
        folder or DATA / "cache"
    ) / f"notes-{hashlib.sha256(facts.encode()).hexdigest()[:12]}.npz"
    if target.is_file():
        try:
            with np.load(target, allow_pickle=False) as file:
                notes, lengths = file["notes"], file["lengths"]
            sound = notes.dtype == NOTE and notes.ndim == 1 and lengths.dtype == np.int64
            sound = sound and lengths.shape == (len(performances),) and (lengths >= 0).all()
            if not sound or lengths.sum() != len(notes):
                raise ValueError("the arrays are not those of these performances")
            # behind the last performance nothing is left
            return np.split(notes, np.cumsum(lengths))[: len(lengths)]
        except Exception as error:
            # ours, or one of numpy, of its zip, or of Python's parser, which reads the header
            raise UserError(f"{target} is damaged: delete it and run this again") from error
    arrays = [
        sustain(read_midi(p.path)).notes
        for p in tqdm(performances, desc="reading", unit="piece", disable=not progress)
    ]
    with atomic_write(target) as part, part.open("wb") as file:
        np.savez(
            file,
            notes=np.concatenate(arrays) if arrays else np.zeros(0, NOTE),
            lengths=np.array([len(a) for a in arrays], np.int64),
        )
    return arrays


def excerpt(notes: np.ndarray, start: float, seconds: float) -> np.ndarray:
    """The notes that begin in a span, from 0 on; none rings beyond its end."""
    out = notes[(notes["start"] >= start) & (notes["start"] < start + seconds)].copy()
    out["start"] -= start
    out["end"] = np.minimum(out["end"] - start, seconds)
    return out


def opening(notes: np.ndarray, seconds: float) -> np.ndarray:
    """The first `seconds` from the first note on.

    The silence before it says nothing about the music.
    """
    return excerpt(notes, float(notes["start"][0]) if len(notes) else 0.0, seconds)
