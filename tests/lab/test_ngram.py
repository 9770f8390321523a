"""Claims about lib.lab.rivals.ngram: it counts, it is a distribution,
and longer contexts help where there are any.
"""

import numpy as np
import pytest

from lib.lab.rivals.ngram import NGram
from lib.music.streams import Piece, Streams
from lib.train.bits import counting_baselines

VOCAB = 7


def streams_of(seed: int, lengths=(40, 1, 2, 63)) -> list[np.ndarray]:
    """Random walks up and down a scale: the next token is near the last."""
    rng = np.random.default_rng(seed)
    return [(np.cumsum(rng.integers(-1, 2, n)) % VOCAB).astype(np.uint16) for n in lengths]


def by_hand(
    train: list[np.ndarray], history: list[int], token: int, order: int, doubt=(1,) * 5
) -> float:
    """Witten and Bell's recursion from a list of n-grams."""
    found = 1 / VOCAB
    for length in range(order):
        if length > len(history):
            break
        context = history[len(history) - length :]
        behind = []
        for one in map(list, train):
            places = range(len(one) - length)
            behind += [one[i + length] for i in places if one[i : i + length] == context]
        if behind:
            prior = doubt[length] * len(set(behind))
            found = (behind.count(token) + prior * found) / (len(behind) + prior)
    return found


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_probabilities_are_those_of_the_recursion(order):
    train = streams_of(0)
    model = NGram(order, VOCAB).fit(train)
    for stream in streams_of(1, (23, 2)):
        history = stream.tolist()
        wanted = [by_hand(train, history[:t], history[t], order) for t in range(len(history))]
        np.testing.assert_allclose(model.probabilities(stream), wanted, rtol=1e-12)


def test_a_shorter_one_has_the_same_counts_and_doubts_of_its_own():
    train = streams_of(0)
    doubt = [2.0, 0.5, 4.0]
    model = NGram(5, VOCAB).fit(train).shorter(3, doubt)
    stream = streams_of(1, (23,))[0]
    history = stream.tolist()
    wanted = [by_hand(train, history[:t], history[t], 3, doubt) for t in range(len(history))]
    np.testing.assert_allclose(model.probabilities(stream), wanted, rtol=1e-12)


def test_a_context_that_only_ended_pieces_leaves_it_to_the_shorter_ones():
    train = [np.array(one, np.uint16) for one in ([0, 1, 2], [3, 4, 1], [0, 6])]
    model = NGram(3, VOCAB).fit(train)
    stream = np.array([2, 0, 6, 1, 4, 1, 5], np.uint16)
    history = stream.tolist()
    wanted = [by_hand(train, history[:t], history[t], 3) for t in range(len(history))]
    np.testing.assert_allclose(model.probabilities(stream), wanted, rtol=1e-12)


def test_after_any_history_the_probabilities_sum_to_one():
    model = NGram(4, VOCAB).fit(streams_of(0))
    for history in ([], [3], [3, 4], [0, 0, 0], [6, 0, 3, 3, 2]):
        ends = [np.array([*history, token], np.uint16) for token in range(VOCAB)]
        assert sum(model.probabilities(end)[-1] for end in ends) == pytest.approx(1)


def test_a_longer_context_helps_where_the_past_decides_and_the_bigram_is_not_beaten_by_chance():
    rng = np.random.default_rng(0)
    turns = [np.tile(rng.permutation(VOCAB), 12).astype(np.uint16) for _ in range(4)]
    held_out = turns[0][:50]
    bits = {order: NGram(order, VOCAB).fit(turns).bits(held_out) for order in (1, 2, 3)}
    assert bits[3] < bits[2] < bits[1]


def test_order_two_is_about_the_bigram_of_the_course():
    train = streams_of(0, (400,) * 6)
    test = streams_of(5, (300,))
    pieces, offset = [], 0
    for number, stream in enumerate([*train, *test]):
        split = "train" if number < len(train) else "test"
        pieces.append(Piece(f"p{number}", "c", "t", split, 0, offset, len(stream), 1, 1.0))
        offset += len(stream)
    streams = Streams(np.concatenate([*train, *test]), pieces, VOCAB, 1, {"id": "walks"})
    theirs = counting_baselines(streams, streams.select("test"))["bigram"]
    assert NGram(2, VOCAB).fit(train).bits(test[0]) == pytest.approx(theirs, rel=0.01)
