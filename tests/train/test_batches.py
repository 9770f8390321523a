"""Claims about lib.train.batches: what a step reads, transposed or not."""

from dataclasses import replace

import numpy as np
import pytest
from made_up import TINY, make_streams, store

from lib.env.errors import UserError
from lib.music.notes import Music, augment, make_notes
from lib.music.streams import Streams
from lib.music.tokens import TokenConfig, Tokenizer
from lib.train.batches import Batches, Changes, base_names


@pytest.fixture(scope="module")
def music():
    rng = np.random.default_rng(3)
    start = np.cumsum(rng.uniform(0.02, 0.4, 80))
    return Music(make_notes(start, start + 0.3, rng.integers(40, 80, 80), rng.integers(40, 90, 80)))


@pytest.fixture(scope="module")
def base(music, tmp_path_factory):
    """Streams of base tokens of one piece, twice, with their tokenizer."""
    tokenizer = Tokenizer(TokenConfig(vocab_size=None))
    made = make_streams(lengths=(70, 41, 20, 90))
    ids = tokenizer.encode(music, end=True)
    pieces = [
        replace(made.pieces[i], offset=i * len(ids), length=len(ids), notes=80) for i in range(3)
    ]
    streams = Streams(np.tile(ids, 3), pieces, tokenizer.vocab_size, tokenizer.bos, {"id": "base"})
    names = [names[0] for names in tokenizer.pieces]
    return store(streams, tmp_path_factory.mktemp("base"), names), tokenizer


def test_shifted_tokens_are_the_tokens_of_the_shifted_notes(base, music):
    streams, tokenizer = base
    ids = streams.stream(streams.pieces[0])
    for semitones in (-5, 0, 7):
        other = Music(augment(music.notes, semitones=semitones))
        assert np.array_equal(
            Changes(streams).apply(ids, semitones, 0), tokenizer.encode(other, end=True)
        )


def test_louder_moves_each_velocity_by_levels_and_nothing_else(base):
    streams, tokenizer = base
    ids = streams.stream(streams.pieces[0])
    before, after = (tokenizer.decode(t).notes for t in (ids, Changes(streams).apply(ids, 0, 2)))
    assert (after["velocity"] > before["velocity"]).all()
    assert np.array_equal(before[["start", "end", "pitch"]], after[["start", "end", "pitch"]])
    top = tokenizer.decode(Changes(streams).apply(ids, 0, 99)).notes["velocity"]
    assert (top == top.max()).all()


def test_no_transposition_leaves_the_keyboard_and_a_visit_keeps_its_own(base):
    streams, _ = base
    config = replace(TINY, length=24, carry=4, transpose=60, louder=1)
    batches, plain = (
        Batches(streams, streams.select("train"), c)
        for c in (config, replace(config, transpose=0, louder=0))
    )
    pitches, seen, rows = batches.changes.pitches, set(), None
    for _ in range(40):
        tokens, jumped = batches.next()
        for row in range(config.batch):
            piece, after, _ = batches.rows[row]
            original = streams.stream(batches.pieces[piece])[after - 24 : after + 1].astype(int)
            keys = (original >= pitches[0]) & (original <= pitches[-1])
            shift = np.unique((tokens[row, : len(original)] - original)[keys])
            assert len(shift) <= 1 and (not len(shift) or shift[0] == batches.drawn[row][0])
            if not jumped[row]:
                assert batches.drawn[row] == rows[row]
            seen |= set(shift.tolist())
        rows = [list(d) for d in batches.drawn]
    assert len(seen) > 10 and not plain.drawn[0][0]
    keys = streams.stream(streams.pieces[0])
    keys = keys[(keys >= pitches[0]) & (keys <= pitches[-1])].astype(int)
    assert (
        pitches[0] - keys.min() <= min(seen)
        and max(seen) <= pitches[-1] - keys.max()
        and plain.changes is None
    )


def test_transposition_goes_on_exactly_after_a_stop(base):
    streams, _ = base
    config = replace(TINY, transpose=5)
    first, second = (Batches(streams, streams.select("train"), config) for _ in range(2))
    for _ in range(7):
        first.next()
    second.load(first.position())
    for _ in range(7):
        assert np.array_equal(first.next()[0], second.next()[0])


def test_tokens_that_cannot_be_shifted_are_one_sentence(tmp_path):
    streams = make_streams()
    with pytest.raises(UserError, match="lie in a folder"):
        base_names(streams)
    merged = store(streams, tmp_path / "merged", [f"Pitch_{i} Velocity_3" for i in range(11)])
    with pytest.raises(UserError, match="byte-pair merges"):
        Batches(merged, merged.select("train"), replace(TINY, transpose=3))
    other = store(streams, tmp_path / "other", [f"Word_{i}" for i in range(11)])
    with pytest.raises(UserError, match="no row of pitches"):
        Batches(other, other.select("train"), replace(TINY, louder=1))


def test_where_every_state_starts_empty_each_crop_is_a_jump():
    streams = make_streams()
    batches = Batches(streams, streams.select("train"), replace(TINY, carry=1))
    assert all(batches.next()[1].all() for _ in range(20))
