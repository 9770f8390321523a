"""Claims about lib.lab.experiments.intervals:
an interval over seeds and pieces holds what it should.
"""

import numpy as np
import pytest
from scipy import stats

from lib.lab.experiments.intervals import difference, interval, mean_bits, spread, within
from lib.lab.experiments.race import pooled
from lib.train.bits import interval as bits_interval

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
    bits = made_up(np.random.default_rng(0), 1, between_seeds=0)
    over_pieces = bits_interval(bits[0], NOTES, draws=4000)
    np.testing.assert_allclose(interval(bits, NOTES), over_pieces, rtol=0.01)


def test_with_pieces_alike_the_interval_is_students_over_seeds():
    by_seed = np.array([15.0, 15.4, 14.9])
    found = interval(by_seed[:, None] * NOTES, NOTES)
    wanted = stats.t.interval(0.95, 2, by_seed.mean(), stats.sem(by_seed))
    assert found == pytest.approx(wanted)


def test_the_interval_is_the_wider_of_both_at_each_end():
    rng = np.random.default_rng(6)
    for seeds in (3, 5):
        found = difference(
            made_up(rng, seeds, between_seeds=0.2), made_up(rng, 3, between_seeds=0.1), NOTES
        )
        boot, welch = found["bootstrap_95"], found["welch_95"]
        assert found["interval_95"] == [min(boot[0], welch[0]), max(boot[1], welch[1])]
        low, high = found["interval_95"]
        assert found["shown"] == (low > 0 or high < 0)


def test_luck_that_the_seeds_do_not_have_widens_both():
    rng = np.random.default_rng(7)
    hard = rng.normal(15, 3, len(NOTES))
    first, second = (made_up(rng, 5, between_seeds=0.1, hard=hard) for _ in range(2))
    plain = difference(first, second, NOTES)
    more = difference(first, second, NOTES, luck=(0.5**2, 20))
    for kind in ("bootstrap_95", "welch_95"):
        assert np.ptp(more[kind]) > 1.5 * np.ptp(plain[kind])
    assert more["bits_per_note"] == plain["bits_per_note"] and more["p"] > plain["p"]
    # much luck alone: a normal interval
    alone = difference(first, second, NOTES, luck=(50.0**2, 10_000))
    assert np.ptp(alone["welch_95"]) == pytest.approx(2 * 1.96 * 50, rel=0.01)
    assert np.ptp(alone["bootstrap_95"]) == pytest.approx(2 * 1.96 * 50, rel=0.05)


def test_the_variance_of_a_single_run_is_that_of_all_seeds_together():
    rng = np.random.default_rng(8)
    models = [made_up(rng, seeds, between_seeds=0.5) for seeds in (200, 1, 300)]
    variance, free = pooled(models, NOTES)
    assert free == 199 + 299
    assert variance == pytest.approx(0.5**2, rel=0.15)
    assert pooled([models[1]], NOTES) is None
    assert spread(models[0], NOTES)[0] == pytest.approx(variance / 200, rel=0.3)


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
    shown, by_bootstrap = {}, {}
    for better in (0.0, 1.0):
        found = []
        for _ in range(80):
            hard = rng.normal(15, 3, len(NOTES))
            first = made_up(rng, 3, between_seeds=0.3, better=better, hard=hard)
            second = made_up(rng, 3, between_seeds=0.3, hard=hard)
            found.append(difference(first, second, NOTES))
        shown[better] = np.mean([one["shown"] for one in found])
        ends = np.array([one["bootstrap_95"] for one in found])
        by_bootstrap[better] = np.mean((ends > 0).all(1) | (ends < 0).all(1))
    assert shown[0.0] <= 0.1 and shown[1.0] > 0.7  # one in twenty, and the luck of eighty draws
    assert by_bootstrap[0.0] > shown[0.0] + 0.04  # why the bootstrap is not enough


def test_where_pieces_suit_one_model_seeds_alone_are_not_enough_either():
    rng = np.random.default_rng(10)
    found = []
    for _ in range(80):
        hard, taste = rng.normal(15, 3, len(NOTES)), rng.normal(0, 0.6, len(NOTES))
        first = made_up(rng, 5, between_seeds=0.02, hard=hard + taste)
        found.append(difference(first, made_up(rng, 5, between_seeds=0.02, hard=hard), NOTES))
    ends = np.array([one["welch_95"] for one in found])
    assert np.mean((ends > 0).all(1) | (ends < 0).all(1)) > 0.3
    assert np.mean([one["shown"] for one in found]) <= 0.12


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


def test_two_ways_to_judge_the_same_trainings_are_told_apart_by_pieces():
    """However far the trainings lie apart: it is the same distance for both ways."""
    rng = np.random.default_rng(3)
    notes = rng.integers(200, 400, 30)
    one = rng.normal(0, 50, (2, 1)) * notes + rng.normal(20, 1, (2, 30)) * notes
    other = one - rng.normal(0.1, 0.1, 30) * notes
    found = within(one - other, notes)
    assert found["shown"] and not difference(one, other, notes)["shown"]
    assert found["bits_per_note"] == pytest.approx(mean_bits(one, notes) - mean_bits(other, notes))
    assert found["interval_95"] == found["bootstrap_95"] and found["welch_95"] is None
    assert not within(one - one, notes)["shown"]
