"""Is a difference between two architectures real?

Intervals over training seeds and over pieces together.

Two trainings of one model differ, and so do two pieces.
An interval over pieces alone holds for these weights; one over both holds for the architecture.
"""

import numpy as np
from scipy import stats

DRAWS = 4000


def mean_bits(bits: np.ndarray, notes: np.ndarray) -> float:
    """Bits a note of all pieces, over all seeds: bits (seeds, pieces), notes (pieces,)."""
    return float(bits.mean(0).sum() / notes.sum())


def two_level(bits: np.ndarray, notes: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of `mean_bits`: seeds and pieces drawn anew, with replacement."""
    low, high = np.percentile(_draws(notes, bits, seed=seed)[0], (2.5, 97.5))
    return float(low), float(high)


def difference(first: np.ndarray, second: np.ndarray, notes: np.ndarray, seed: int = 0) -> dict:
    """First minus second, bits (seeds, pieces) of each:
    with the two-level interval, and Welch's over seeds.

    The pieces drawn are the same for both, so that what makes a piece hard for all falls out;
    the seeds of one have nothing to do with those of the other. It is "shown" where neither
    interval holds zero.
    """
    ours, theirs = _draws(notes, first, second, seed=seed)
    low, high = np.percentile(ours - theirs, (2.5, 97.5))
    found = {
        "bits_per_note": mean_bits(first, notes) - mean_bits(second, notes),
        "interval_95": [float(low), float(high)],
        "welch_95": None,
        "p": None,
        "shown": False,
    }
    if min(len(first), len(second)) > 1:  # one seed says nothing about seeds
        by_seed = [one.sum(1) / notes.sum() for one in (first, second)]
        test = stats.ttest_ind(*by_seed, equal_var=False)
        across = [float(end) for end in test.confidence_interval()]
        found |= {
            "welch_95": across,
            "p": float(test.pvalue),
            "shown": not (low <= 0 <= high or across[0] <= 0 <= across[1]),
        }
    return found


def _draws(notes: np.ndarray, *models: np.ndarray, seed: int) -> list[np.ndarray]:
    """`mean_bits` of each model in every draw, (DRAWS,) each."""
    rng = np.random.default_rng(seed)
    # how often each piece is drawn, (DRAWS, pieces)
    pieces = rng.multinomial(len(notes), np.full(len(notes), 1 / len(notes)), size=DRAWS)
    drawn_notes = pieces @ notes
    found = []
    for bits in models:
        count = len(bits)
        seeds = rng.multinomial(count, np.full(count, 1 / count), size=DRAWS) / count
        found.append(((seeds @ bits) * pieces).sum(1) / drawn_notes)
    return found
