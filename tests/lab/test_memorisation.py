"""Claims about lib.lab.judge.memorisation: what is copied is found, exactly and transposed,
and nothing else is.
"""

import numpy as np
import pytest

from lib.env.errors import UserError
from lib.lab.judge.memorisation import CHORD, keys, longest_repeat, longest_shared
from lib.music.notes import make_notes


def longest_by_table(query, corpus, transposed):
    """The textbook table of common substrings, for comparison: quadratic and slow."""
    best = 0
    for piece in corpus:
        a, b = (np.diff(x) if transposed else x for x in (query, piece))
        row = np.zeros(len(b) + 1, int)
        for value in a:
            row[1:] = np.where(b == value, row[:-1] + 1, 0)
            best = max(best, row.max())
    best += transposed and best > 0
    return best if best >= 4 else 0


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("spread", [2, 5, 40])
def test_the_longest_passage_is_that_of_the_textbook(transposed, spread):
    rng = np.random.default_rng(spread)
    corpus = [60 + rng.integers(0, spread, n) for n in (1, 64, 257, 65, 3)]
    queries = [60 + rng.integers(0, spread, n) for n in (63, 5, 2, 1, 129)]
    queries[0][20:50] = corpus[2][100:130]
    found = longest_shared(queries, corpus, transposed=transposed)
    assert [p.notes for p in found] == [longest_by_table(q, corpus, transposed) for q in queries]
    for query, passage in zip(queries, found):
        if passage.notes:
            ours = query[passage.at : passage.at + passage.notes]
            theirs = corpus[passage.piece][passage.there : passage.there + passage.notes]
            assert len(ours) == passage.notes and np.ptp(ours - theirs) == 0
            assert transposed or (ours == theirs).all()


def test_a_transposed_copy_is_found_as_such_only():
    rng = np.random.default_rng(0)
    corpus = [rng.integers(30, 90, 5000) for _ in range(4)]
    query = rng.integers(30, 90, 200)
    query[50:110] = corpus[3][777:837] + 5
    exact, moved = (longest_shared([query], corpus, transposed=t)[0] for t in (False, True))
    assert exact.notes < 6 and (moved.notes, moved.at, moved.piece, moved.there) == (60, 50, 3, 777)


def test_a_passage_does_not_run_from_one_piece_into_the_next():
    corpus = [np.arange(40, 50), np.arange(50, 60)]
    assert longest_shared([np.arange(40, 60)], corpus)[0].notes == 10


def test_only_pieces_of_another_group_count():
    corpus = [np.arange(40, 60), np.arange(40, 52)]
    for own, length in ((0, 12), (1, 20), (2, 20)):
        found = longest_shared([np.arange(40, 60)], corpus, groups=([own], [0, 1]))[0]
        assert found.notes == length and found.piece != own


def test_a_chord_is_read_from_low_to_high_whatever_finger_was_first():
    one = make_notes([0.0, 0.01, 0.02, 0.5], [1.0] * 4, [64, 60, 67, 72], [70] * 4)
    two = make_notes([0.0, 0.01, 0.02, 0.5], [1.0] * 4, [67, 64, 60, 72], [70] * 4)
    assert keys(one).tolist() == keys(two).tolist() == [60, 64, 67, 72]
    apart = make_notes([0, 1.1 * CHORD], [1, 1], [64, 60], [70, 70])
    assert keys(apart).tolist() == [64, 60] and len(keys(apart[:0])) == 0


@pytest.mark.parametrize(
    "sequence, length",
    [
        ([], 0),
        ([60], 0),
        ([60, 60], 1),
        ([1, 2, 3, 9, 1, 2, 3], 3),
        ([1, 2, 1, 2, 1, 2, 1, 2], 4),
        ([5] * 9, 4),
        ([1, 2, 3, 4], 0),
    ],
)
def test_the_longest_repeat_does_not_overlap_itself(sequence, length):
    assert longest_repeat(np.array(sequence, int)) == length


def test_nothing_to_compare_with_is_one_sentence():
    with pytest.raises(UserError, match="nothing to compare"):
        longest_shared([np.arange(9)], [])
