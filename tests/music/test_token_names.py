"""Claims about lib.music.token_names: what a name says is what MidiTok makes of the token."""

import numpy as np
import pytest

from lib.music.token_names import (
    BAR_LINE,
    count_in,
    duration_of,
    is_music,
    kind_of,
    number_of,
    numbers_in,
)
from lib.music.tokens import BEAT, TokenConfig, Tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(TokenConfig(grid_ms=25.0, vocab_size=None))


def of_kind(tokenizer, kind):
    return [names[0] for names in tokenizer.pieces if kind_of(names[0]) == kind]


def played(tokenizer, position, pitch, velocity, duration):
    """The one note that these four tokens write."""
    ids = [tokenizer.base[name] for name in (BAR_LINE, position, pitch, velocity, duration)]
    return tokenizer.decode(ids).notes[0]


@pytest.mark.parametrize("kind", ["Position", "Pitch", "Velocity", "Duration"])
def test_every_name_is_read_as_it_is_played(tokenizer, kind):
    plain = {
        "Position": "Position_0",
        "Pitch": "Pitch_60",
        "Velocity": "Velocity_63",
        "Duration": "Duration_1.0.20",
    }
    names = of_kind(tokenizer, kind)
    assert len(names) > 30 or kind == "Velocity"
    for name in names:
        note = played(tokenizer, *(plain | {kind: name}).values())
        if kind == "Duration":
            assert note["end"] == pytest.approx(duration_of(name)[0] * BEAT)
        elif kind == "Position":
            assert note["start"] == pytest.approx(number_of(name) * 0.025)
        else:
            assert note[kind.lower()] == number_of(name)


def test_a_duration_says_how_finely_it_is_cut(tokenizer):
    """Neighbours lie a part of a beat apart, up to where the ruler changes."""
    durations = [duration_of(name) for name in of_kind(tokenizer, "Duration")]
    assert {parts for _, parts in durations} == {20, 10, 4}
    for (beats, parts), (following, same) in zip(durations, durations[1:]):
        if parts == same:
            assert following - beats == pytest.approx(1 / parts)


def test_what_is_inside_a_token_is_counted():
    pieces = [
        ("BOS_None",),
        (BAR_LINE,),
        ("Pitch_60", "Velocity_63"),
        ("Duration_0.1.8", "Pitch_60", "Pitch_72"),
        (),
    ]
    assert count_in(pieces, "Pitch").tolist() == [0, 0, 1, 2, 0]
    assert numbers_in(pieces, "Pitch") == [[], [], [60], [60, 72], []]
    assert count_in(pieces, "Pit").sum() == 0 and count_in(pieces, "Bar").dtype == np.int64
    assert [is_music(names[0]) for names in pieces[:3]] == [False, True, True]
