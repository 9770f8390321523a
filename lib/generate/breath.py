"""Is it short of breath? At a low temperature a piece can fall silent, or go round on a few keys.

A low temperature sharpens every choice, and waiting is a choice as well: where a further bar line
is the likeliest token, it is drawn again and again, and the longer the silence, the likelier the
next bar line. data/results/breath.json has how often, and what helps.
"""

import numpy as np

LONGEST_REST = 6.0  # seconds of silence, and
FEWEST_KEYS = 12  # different keys: what no piece of 60 s at temperature 1 falls short of


def longest_rest(notes: np.ndarray, begin: float, end: float) -> tuple[float, float]:
    """The longest silence between two seconds, and when it begins."""
    inside = notes[notes["start"] < end]
    heard = np.maximum.accumulate(np.append(begin, inside["end"]))
    heard = np.clip(heard, begin, end)
    nexts = np.clip(np.append(inside["start"], end), begin, end)
    rests = nexts - heard
    at = int(rests.argmax())
    return float(max(rests[at], 0.0)), float(heard[at])


def different_keys(notes: np.ndarray, begin: float, end: float) -> int:
    """How many keys are struck between two seconds."""
    inside = (notes["start"] >= begin) & (notes["start"] < end)
    return len(np.unique(notes["pitch"][inside]))


def short_of_breath(notes: np.ndarray, begin: float, end: float) -> str:
    """What to say of music that fell silent or got stuck; "" where it did neither.

    Few keys are held against music of half a minute or more: less of it may do with a few.
    """
    rest, at = longest_rest(notes, begin, end)
    keys = different_keys(notes, begin, end)
    faults = []
    if rest > LONGEST_REST:
        faults.append(f"it is silent for {rest:.0f} s from second {at:.0f} on")
    if end - begin >= 30 and keys < FEWEST_KEYS:
        faults.append(f"it strikes {keys} different keys only")
    return " and ".join(faults)
