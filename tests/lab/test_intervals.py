"""Claims about lib.lab.experiments.intervals:
an interval over seeds and pieces holds what it should.
"""

import numpy as np
import pytest
from scipy import stats

from lib.lab.experiments.intervals import difference, mean_bits, two_level

NOTES = np.random.default_rng(9).integers(500, 6000, 60).astype(float)


def made_up(rng, seeds: int, *, between_seeds: float, better: float = 0.0, hard=None):
    """Bits (seeds, pieces) of a model whose trainings differ by so many bits a note."""
    hard = rng.normal(15, 3, len(NOTES)) if hard is None else hard
    luck = rng.normal(0, between_seeds, (seeds, 1))
    return (hard + luck - better + rng.normal(0, 0.3, (seeds, len(NOTES)))) * NOTES


def test_the_mean_counts_each_note_once_whatever_the_seeds():
    bits = np.array([[10.0, 30.0], [20.0, 60.0]])
    assert mean_bits(bits, np.array([1.0, 4.0])) == pytest.approx((15 + 45) / 5)


def test_with_one_seed_the_interval_is_that_over_pieces():
    from lib.train.bits import interval

    bits = made_up(np.random.default_rng(0), 1, between_seeds=0)
    np.testing.assert_allclose(
        two_level(bits, NOTES), interval(bits[0], NOTES, draws=4000), rtol=0.01
    )


def test_luck_of_the_seeds_widens_the_interval_and_pieces_alone_do_not_see_it():
    rng = np.random.default_rng(1)
    hard = rng.normal(15, 3, len(NOTES))
    first = made_up(rng, 5, between_seeds=1.0, hard=hard)
    second = made_up(rng, 5, between_seeds=1.0, hard=hard)
    both = difference(first, second, NOTES)
    alone = difference(first.mean(0, keepdims=True), second.mean(0, keepdims=True), NOTES)
    width = lambda found: np.diff(found["interval_95"])[0]
    assert width(both) > 5 * width(alone)


def test_a_difference_between_equals_is_rarely_shown_and_a_large_one_mostly():
    rng = np.random.default_rng(2)
    shown = []
    for better in (0.0, 1.0):
        found = []
        for _ in range(60):
            hard = rng.normal(15, 3, len(NOTES))
            first = made_up(rng, 5, between_seeds=0.3, better=better, hard=hard)
            second = made_up(rng, 5, between_seeds=0.3, hard=hard)
            found.append(difference(first, second, NOTES)["shown"])
        shown.append(np.mean(found))
    assert shown[0] <= 0.15 and shown[1] > 0.9  # one in twenty, and the luck of sixty draws


def test_welch_over_seeds_is_scipys():
    rng = np.random.default_rng(3)
    first, second = made_up(rng, 4, between_seeds=0.5), made_up(rng, 3, between_seeds=0.1)
    found = difference(first, second, NOTES)
    test = stats.ttest_ind(first.sum(1) / NOTES.sum(), second.sum(1) / NOTES.sum(), equal_var=False)
    assert found["p"] == pytest.approx(test.pvalue)
    middle = np.mean(found["welch_95"])
    assert middle == pytest.approx(found["bits_per_note"])


def test_one_seed_shows_nothing_however_far_apart():
    rng = np.random.default_rng(4)
    found = difference(
        made_up(rng, 1, between_seeds=0, better=9), made_up(rng, 5, between_seeds=0.1), NOTES
    )
    assert found["welch_95"] is None and not found["shown"]
