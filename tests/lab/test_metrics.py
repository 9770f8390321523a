"""lib.lab.judge.metrics and lib.lab.judge.anchors:
known music gives known numbers, real ranks before noise.
"""

import dataclasses

import numpy as np
import pytest

from lib.env.errors import UserError
from lib.generate.player import load_model
from lib.lab.judge import anchors
from lib.lab.judge import metrics as music_metrics
from lib.lab.judge.metrics import (
    Embedding,
    describe,
    facts,
    features,
    frechet,
    overlap,
    returns,
    yang_lerch,
)
from lib.music.notes import make_notes


def scale(seconds=60.0, step=0.25, seed=None):
    """C major up and down, one key at a time, or in random order."""
    start = np.arange(0, seconds - step, step)
    pitch = 60 + np.array([0, 2, 4, 5, 7, 9, 11, 12, 11, 9, 7, 5, 4, 2])[np.arange(len(start)) % 14]
    if seed is not None:
        pitch = np.random.default_rng(seed).permutation(pitch)
    return make_notes(start, start + step, pitch, np.full(len(start), 64))


def test_facts_of_a_scale():
    found = facts(scale(), 60)
    assert (
        found["notes a second"] == pytest.approx(239 / 60)
        and found["median gap between onsets in s"] == 0.25
    )
    assert (
        found["range in semitones"] == 12
        and found["keys used"] == 8
        and found["spread of velocity"] == 0
    )
    assert found["scale consistency"] == 1 and found["keys sounding at once"] == pytest.approx(
        1, abs=0.05
    )
    assert found["longest exact repetition in notes"] == 113  # keys 0 to 112 are keys 126 to 238


def test_what_returns_is_told_from_what_does_not():
    """Seven chords again and again, every 14 seconds, against keys without order."""
    start = np.repeat(np.arange(0, 56, 2.0), 3)
    chord = np.array(
        [[0, 4, 7], [2, 5, 9], [4, 7, 11], [5, 9, 0], [7, 11, 2], [9, 0, 4], [11, 2, 5]]
    )
    regular = make_notes(start, start + 2, 60 + chord[np.arange(28) % 7].ravel(), np.full(84, 60))
    rng = np.random.default_rng(0)
    random = make_notes(start, start + 2, 60 + rng.integers(0, 12, 84), np.full(84, 60))
    one, two = returns(regular, 56), returns(random, 56)
    assert (
        one["8 to 15 s"] == pytest.approx(1, abs=1e-6) and one["8 to 15 s"] > one["3 to 8 s"] + 0.2
    )
    assert two["8 to 15 s"] < 0.7
    assert np.isnan(returns(regular[:9], 6)["8 to 15 s"])


def test_overlap_of_equal_apart_and_constant_distances():
    rng = np.random.default_rng(0)
    a = rng.normal(5, 1, 4000)
    area, kl = overlap(a, rng.normal(5, 1, 4000))
    assert area > 0.95 and abs(kl) < 0.02
    area, kl = overlap(a, a + 30)
    assert area < 0.01 and kl > 5
    area, kl = overlap(a, rng.normal(6, 1, 4000))  # known: 2 Φ(-1/2) and 1/2
    assert area == pytest.approx(0.617, abs=0.04) and kl == pytest.approx(0.5, abs=0.1)
    assert overlap(np.ones(9), np.ones(9))[0] == pytest.approx(1)


def test_features_of_the_same_kind_overlap_more_than_those_of_another():
    rng = np.random.default_rng(1)

    def group(low, high, count):
        return features(
            [
                make_notes(
                    s := np.sort(rng.uniform(0, 60, n)),
                    s + rng.uniform(0.1, 1, n),
                    rng.integers(low, high, n),
                    rng.integers(40, 90, n),
                )
                for n in rng.integers(80, 300, count)
            ]
        )

    real, alike, other = group(40, 80, 40), group(40, 80, 40), group(95, 100, 40)
    near, far = (np.mean([v[0] for v in yang_lerch(real, x).values()]) for x in (alike, other))
    assert near > 0.85 > far


def test_frechet_of_gaussians_is_the_formula():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 1, (20_000, 3)), rng.normal(0, 2, (20_000, 3)) + [1, 0, 0]
    assert frechet(a, b) == pytest.approx(1 + 3 * (2 - 1) ** 2, rel=0.05)
    assert frechet(a, a) == pytest.approx(0, abs=1e-6)


def test_an_embedding_keeps_distances_of_histograms():
    pieces = [scale(12, seed=s) for s in range(40)]
    embed = Embedding(pieces, size=20)
    assert embed(pieces).shape == (40, 20) and np.linalg.norm(describe(pieces[0])) == pytest.approx(
        6**0.5
    )
    with pytest.raises(UserError, match="too few"):
        Embedding(pieces, size=64)


def test_a_piece_of_one_note_is_refused():
    with pytest.raises(UserError):
        facts(scale()[:1], 60)
    with pytest.raises(UserError):
        features([scale(), scale()[:1]])


def test_the_features_are_as_many_as_yang_and_lerch_have():
    assert len(music_metrics.FEATURES) == 9 and all(
        v.shape[0] == 1 for v in features([scale()]).values()
    )


@pytest.fixture(scope="module")
def anchor():
    """The sample's test piece in openings of 20 seconds, and its eight training pieces."""
    from lib.music.maestro import performances

    found = performances(quick=True, say=lambda text: None)
    return anchors.anchors(found, load_model()[1], 20.0, progress=False)


def test_copies_and_noise_are_told_from_new_music(anchor):
    """A training piece handed in as new is found out; so is noise; a real test piece is neither."""
    stolen = [anchors.excerpt(notes, 30, 20) for notes in anchor.train]
    for notes in stolen[:4]:
        notes["pitch"] += 1
    result = anchors.compare(anchor, {"stolen": stolen, "held out": anchor.real})
    exact, moved = result["copied"]["exact"], result["copied"]["transposed"]
    assert moved["stolen"]["median"] > 3 * moved["held out"]["longest"] > 0
    assert exact["stolen"]["longest"] == max(len(n) for n in stolen[4:])
    assert exact["stolen"]["piece"] == exact["stolen"]["query"]  # it says where it is from
    overlap = {name: row["mean_overlap_area"] for name, row in result["overlap"].items()}
    assert overlap["held out"] > overlap["noise"] and result["empty"] == {
        "stolen": 0,
        "held out": 0,
    }
    text = anchors.table(result)
    assert text.startswith("| | real | stolen | held out | noise |") and "Fréchet" in text
    assert anchors.plot(result).axes


def test_pieces_that_are_empty_are_counted_not_hidden(anchor):
    result = anchors.compare(
        anchor, {"some": [*anchor.real[:3], anchor.real[0][:2], anchor.real[0][:0]]}
    )
    assert result["empty"] == {"some": 2} and result["pieces"]["some"] == 3
    with pytest.raises(UserError, match="two pieces"):
        anchors.compare(anchor, {"none": [anchor.real[0][:0]] * 5})


def test_the_distance_is_of_as_many_excerpts_however_many_there_are(anchor):
    """The same music is as near in pieces that end early; too little of it is no number."""
    seconds = 60.0
    real, again = ([scale(seed=s) for s in range(first, first + 80)] for first in (0, 80))
    early = [notes[notes["start"] < 20] if i % 4 else notes for i, notes in enumerate(again)]
    fast = [scale(step=0.1, seed=s) for s in range(80)]
    among = dataclasses.replace(anchor, seconds=seconds, real=real)
    found = anchors.frechets(among, {"again": again, "early": early, "fast": fast})
    assert found["again"] == pytest.approx(found["real"], rel=0.1)
    assert found["early"] == pytest.approx(found["real"], rel=0.2)
    assert found["fast"] > 3 * found["real"]
    silent = [notes[: anchors.FEW] for notes in again[:60]]
    found = anchors.frechets(among, {"again": again, "silent": silent})
    assert list(found) == ["real", "again", "silent"] and np.isnan(list(found.values())).all()
