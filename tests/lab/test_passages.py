"""Claims about lib.lab.judge.passages: a copy is found though notes differ;
what everybody plays is worth little.
"""

from pathlib import Path

import numpy as np
import pytest

from lib.env.errors import UserError
from lib.lab.judge.anchors import Anchors, other_hands, passages
from lib.lab.judge.passages import EDIT, Corpus, Shared, align
from lib.music.maestro import Performance
from lib.music.notes import make_notes

RNG = np.random.default_rng(0)


def melody(length: int, seed: int) -> np.ndarray:
    """Keys that nobody can foresee."""
    return np.random.default_rng(seed).integers(40, 80, length)


@pytest.fixture(scope="module")
def corpus():
    scales = [60 + np.arange(400) % 24 for _ in range(3)]
    trills = [np.tile([72, 74], 300) for _ in range(3)]
    return Corpus([*(melody(900, seed) for seed in range(20)), *scales, *trills])


def by_hand(query, there, bits) -> float:
    """Smith and Waterman's recursion, cell by cell."""
    scores = np.zeros((len(query) + 1, len(there) + 1))
    for i in range(1, len(query) + 1):
        for j in range(1, len(there) + 1):
            step = bits[i - 1] if query[i - 1] == there[j - 1] else -EDIT
            scores[i, j] = max(
                0, scores[i - 1, j - 1] + step, scores[i - 1, j] - EDIT, scores[i, j - 1] - EDIT
            )
    return scores.max()


@pytest.mark.parametrize("sizes", [(1, 1), (7, 3), (30, 41), (64, 65)])
def test_an_alignment_scores_what_the_recursion_says_and_its_parts_add_up(sizes):
    rng = np.random.default_rng(sum(sizes))
    query, there = (rng.integers(60, 64, size) for size in sizes)
    bits = rng.uniform(0, 8, sizes[0])
    found = align(query, there, bits)
    assert found.bits == pytest.approx(by_hand(query, there, bits))
    inside = bits[found.at : found.at + found.length]
    assert found.bits <= inside.sum() - EDIT * found.edits + EDIT * sizes[0]
    assert found.notes <= found.length <= found.notes + found.edits


def test_a_copy_is_found_transposed_and_with_notes_changed_left_out_and_put_in(corpus):
    passage = corpus.pieces[7][200:260] + 5
    passage[20] += 1
    passage = np.delete(passage, 35)
    passage = np.insert(passage, 48, 50)
    query = np.concatenate([melody(40, 100), passage, melody(40, 101)])
    found = corpus.shared(query)
    assert (found.piece, found.transposed) == (7, -5)
    assert found.notes == 58 and found.edits == 3
    assert abs(found.at - 40) <= 1 and abs(found.there - 200) <= 1


def test_what_was_made_up_shares_little_and_a_copy_much(corpus):
    chance = max(corpus.shared(melody(200, seed)).bits for seed in range(200, 215))
    copied = corpus.shared(
        np.concatenate([melody(90, 300), corpus.pieces[3][500:530], melody(80, 301)])
    ).bits
    assert copied > 3 * chance


def test_scales_and_trills_are_worth_little_a_note(corpus):
    trill = np.tile([50, 52], 100)
    scale = 40 + np.arange(200) % 24
    short_copy = np.concatenate([melody(50, 400), corpus.pieces[1][100:115], melody(50, 401)])
    for ordinary in (trill, scale):
        assert corpus.surprise(ordinary)[10:].mean() < 0.7
    assert corpus.surprise(short_copy)[10:].mean() > 4


def test_only_the_pieces_that_are_allowed_count(corpus):
    allowed = np.ones(len(corpus.pieces), bool)
    query = corpus.pieces[5][100:160]
    assert corpus.shared(query, allowed).piece == 5
    allowed[5] = False
    assert corpus.shared(query, allowed).piece != 5


def test_short_queries_share_nothing_and_an_empty_corpus_is_refused(corpus):
    for query in (np.zeros(0, int), np.array([60]), np.array([60, 62, 64])):
        assert corpus.shared(query) == Shared()
    with pytest.raises(UserError, match="nothing to compare with"):
        Corpus([])


def test_the_control_of_a_composers_style_leaves_out_the_piece_itself():
    def notes(seed):
        start = np.arange(200) * 0.3
        return make_notes(start, start + 0.2, melody(200, seed), np.full(200, 60))

    titles = ("A", "B", "A", "C")  # the real one is A as well, and note by note the first
    composers = ("X", "X", "X", "Y")
    facts = [
        Performance(Path(f"{title}.mid"), by, title, 2000, "train", 60.0)
        for by, title in zip(composers, titles)
    ]
    train = [notes(k) for k in range(4)]
    found = passages(
        Anchors(60.0, [train[0]], [], ["X"], ["A"], train, facts), {"copies": [train[0]]}
    )["groups"]
    assert found["same composer"]["most_bits"] < found["copies"]["most_bits"] / 3
    assert found["copies"]["top"]["piece"] == 0


def test_a_copy_by_other_hands_is_no_second_track_of_one_evening():
    """MAESTRO cuts recitals into tracks that all have the title of the whole set."""
    tracks = [
        ("MIDI-Unprocessed_SMF_07_R1_2004_01_ORIG_MID--AUDIO_07_R1_2004_08_Track08_wav", 2004),
        ("MIDI-Unprocessed_SMF_07_R1_2004_01_ORIG_MID--AUDIO_07_R1_2004_09_Track09_wav", 2004),
        ("MIDI-Unprocessed_XP_09_R1_2004_01_ORIG_MID--AUDIO_09_R1_2004_01_Track01_wav", 2004),
        ("MIDI-Unprocessed_17_R1_2006_01-06_ORIG_MID--AUDIO_17_R1_2006_04_Track04_wav", 2006),
    ]
    facts = [
        Performance(Path(f"{stem}.midi"), "X", title, year, "train", 60.0)
        for (stem, year), title in zip(tracks, ("Preludes", "Preludes", "Preludes", "Alone"))
    ]
    found = other_hands(facts)
    assert list(found) == [0]
    assert found[0].tolist() == [False, False, True, False]


def test_short_copies_are_seen_less_often_and_what_is_missed_is_named():
    def notes(seed):
        start = np.arange(200) * 0.3
        return make_notes(start, start + 0.2, melody(200, seed), np.full(200, 60))

    train = [notes(k) for k in (0, 0, 1, 2)]  # "Other" is two different pieces of one name
    facts = [
        Performance(Path(f"{k}.mid"), by, title, 2000, "train", 60.0)
        for k, (by, title) in enumerate(
            (("X", "Same"), ("X", "Same"), ("Y", "Other"), ("Y", "Other"))
        )
    ]
    real = [notes(k) for k in range(10, 14)]
    anchor = Anchors(60.0, real, [], ["Z"] * 4, list("abcd"), train, facts)
    found = passages(anchor, {})
    shares = {row["seconds"]: row["above"] for row in found["copies_seen"]}
    assert shares[60.0] == 0.5 and shares[5.0] <= shares[10.0] <= shares[20.0] <= shares[60.0]
    assert found["copies_unseen"] == ["Y, Other"]
