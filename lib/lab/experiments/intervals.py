"""Is a difference between two architectures real?

Two trainings of one model differ, and so do two pieces. An interval over pieces alone holds for
these weights, one over seeds alone for these pieces. Here both are asked, and the wider one is
given at each end:

- a bootstrap that draws seeds and pieces anew. With three or five seeds it is too narrow, for it
  takes the seeds at hand for all that there are;
- Student's t over seeds (Welch's for two models, 1947). It knows how few they are, and nothing of
  pieces.

Seed s gives all models the same crops in the same order, but the seeds of two models are drawn
apart from each other. Where the order of the crops is a part of the luck, that is on the safe side.
"""

from collections.abc import Sequence

import numpy as np
from scipy import stats

DRAWS = 4000
Spread = tuple[float, int]  # the variance of a mean of seeds, and its degrees of freedom


def mean_bits(bits: np.ndarray, notes: np.ndarray) -> float:
    """Bits a note of all pieces, over all seeds: bits (seeds, pieces), notes (pieces,)."""
    return float(bits.mean(0).sum() / notes.sum())


def spread(bits: np.ndarray, notes: np.ndarray) -> Spread:
    """The variance of `mean_bits` by what its seeds say: s² / n, with n - 1 degrees of freedom."""
    by_seed = bits.sum(1) / notes.sum()
    return float(by_seed.var(ddof=1)) / len(by_seed), len(by_seed) - 1


def interval(
    bits: np.ndarray, notes: np.ndarray, *, luck: Spread | None = None, seed: int = 0
) -> list[float]:
    """95 % interval of `mean_bits`, over seeds and pieces; of one seed over pieces alone.

    `luck` is what else is uncertain about the mean, with its degrees of freedom.
    """
    both = _draws(notes, bits, luck=luck, seed=seed)[0]
    ends = list(np.percentile(both, (2.5, 97.5)))
    if len(bits) > 1:
        mean, half = mean_bits(bits, notes), _student([spread(bits, notes), luck])[0]
        ends = [min(ends[0], mean - half), max(ends[1], mean + half)]
    return [float(end) for end in ends]


def difference(
    first: np.ndarray,
    second: np.ndarray,
    notes: np.ndarray,
    *,
    luck: Spread | None = None,
    seed: int = 0,
) -> dict:
    """First minus second, bits (seeds, pieces) of each; "shown" where the interval is not about 0.

    `bootstrap_95` draws the same pieces for both, so that what makes a piece hard for all falls
    out; `welch_95` and `p` are over seeds alone; `interval_95` is the wider at each end. One seed
    of either shows nothing. `luck` is what else is uncertain about the second.
    """
    ours, theirs = _draws(notes, first, second, luck=luck, seed=seed)
    mean = mean_bits(first, notes) - mean_bits(second, notes)
    low, high = (float(end) for end in np.percentile(ours - theirs, (2.5, 97.5)))
    found = {
        "bits_per_note": mean,
        "interval_95": [low, high],
        "bootstrap_95": [low, high],
        "welch_95": None,
        "p": None,
        "shown": False,
    }
    if min(len(first), len(second)) > 1:  # one seed says nothing about seeds
        half, p = _student([spread(first, notes), spread(second, notes), luck], mean)
        low, high = min(low, mean - half), max(high, mean + half)
        found |= {
            "interval_95": [low, high],
            "welch_95": [mean - half, mean + half],
            "p": p,
            "shown": not low <= 0 <= high,
        }
    return found


def within(apart: np.ndarray, notes: np.ndarray) -> dict:
    """As `difference`, of two ways to judge the same trainings: `apart` is first minus second,
    bits (seeds, pieces).

    What differs from training to training is the same for both, so the interval is over pieces
    alone, and what is "shown" is shown for these trainings.
    """
    low, high = interval(apart.mean(0, keepdims=True), notes)
    return {
        "bits_per_note": mean_bits(apart, notes),
        "interval_95": [low, high],
        "bootstrap_95": [low, high],
        "welch_95": None,
        "p": None,
        "shown": not low <= 0 <= high,
    }


def _student(spreads: Sequence[Spread | None], mean: float = 0.0) -> tuple[float, float]:
    """Half of the 95 % interval of a sum of independent means, and the p of `mean`,
    by Student's t with the degrees of freedom of Welch and Satterthwaite.
    """
    known = [one for one in spreads if one is not None]
    total = sum(variance for variance, _ in known)
    if not total:
        return 0.0, float(mean == 0)
    free = total**2 / sum(variance**2 / degrees for variance, degrees in known)
    error = total**0.5
    half, p = stats.t.ppf(0.975, free) * error, 2 * stats.t.sf(abs(mean) / error, free)
    return float(half), float(p)


def _draws(
    notes: np.ndarray, *models: np.ndarray, luck: Spread | None, seed: int
) -> list[np.ndarray]:
    """`mean_bits` of each model in every draw, (DRAWS,) each; the last has the luck as well."""
    rng = np.random.default_rng(seed)
    # how often each piece is drawn, (DRAWS, pieces)
    pieces = rng.multinomial(len(notes), np.full(len(notes), 1 / len(notes)), size=DRAWS)
    drawn_notes = pieces @ notes
    found = []
    for bits in models:
        count = len(bits)
        seeds = rng.multinomial(count, np.full(count, 1 / count), size=DRAWS) / count
        found.append(((seeds @ bits) * pieces).sum(1) / drawn_notes)
    if luck:
        found[-1] = found[-1] + rng.normal(0, luck[0] ** 0.5, DRAWS)
    return found


def show(row: dict, sign: str = "") -> str:
    """An estimate and its interval in words."""
    if row["bits_per_note"] is None:
        return "no piece"
    low, high = row["interval_95"]
    return f"{row['bits_per_note']:{sign}.2f} ({low:{sign}.2f} to {high:{sign}.2f})"


def show_difference(found: dict) -> str:
    """A difference in words, with "not shown" where its interval holds zero."""
    return show(found, "+") + ("" if found["shown"] else ", not shown")
