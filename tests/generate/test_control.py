"""lib.generate.control: each control moves its attribute, zero changes nothing,
tilts are what they say.
"""

import numpy as np
import pytest
import torch

from lib.env.errors import UserError
from lib.generate.control import CROWD, KEYS, MOMENT, Controls, Steering
from lib.generate.grammar import Grammar
from lib.generate.player import generate, load_model, variations


@pytest.fixture(scope="module")
def shipped():
    return load_model()


def at(tokenizer, *names):
    """A grammar that has read base tokens, by name."""
    single = {t[0]: i for i, t in enumerate(tokenizer.pieces) if len(t) == 1}
    grammar = Grammar(tokenizer)
    for name in ("BOS_None", "Bar_None", *names):
        grammar.read(single[name])
    return grammar, single


def test_zero_changes_nothing(shipped):
    assert not Steering(Controls(tempo=2.0), shipped[1])
    plain, asked = (
        generate(*shipped, seconds=4, seed=3, **more) for more in ({}, {"controls": Controls()})
    )
    assert (plain.notes == asked.notes).all()


def test_a_key_an_octave_higher_gains_what_was_promised_and_the_share_of_keys_stays(shipped):
    tokenizer = shipped[1]
    grammar, single = at(tokenizer, "Position_0", "Pitch_40", "Velocity_63", "Duration_0.10.50")
    logits = grammar.mask(
        torch.randn(tokenizer.vocab_size, generator=torch.Generator().manual_seed(0)).double()
    )[None]
    tilted = Steering(Controls(register=2.0), tokenizer).apply(logits, [grammar])
    change = (tilted - logits)[0]
    assert change[single["Pitch_72"]] - change[single["Pitch_60"]] == pytest.approx(2 * 12 / KEYS)
    names_a_key = torch.tensor([any(n.startswith("Pitch") for n in t) for t in tokenizer.pieces])
    before, after = (torch.softmax(x[0], 0)[names_a_key].sum() for x in (logits, tilted))
    assert after == pytest.approx(float(before)) and torch.isinf(logits).equal(torch.isinf(tilted))
    assert not change[single["Position_7"]]


def test_a_step_in_time_loses_what_was_promised(shipped):
    tokenizer = shipped[1]
    grammar, single = at(tokenizer, "Position_10", "Pitch_40", "Velocity_63", "Duration_0.10.50")
    logits = torch.zeros(1, tokenizer.vocab_size, dtype=torch.float64)
    change = Steering(Controls(density=1.0), tokenizer).apply(logits, [grammar])[0]
    grid = grammar.rules.grid
    for name, seconds in (("Pitch_60", 0), ("Position_30", 20 * grid), ("Bar_None", 2 - 10 * grid)):
        assert change[single[name]] == pytest.approx(-CROWD * np.log1p(seconds / MOMENT))


@pytest.mark.parametrize(
    "before", [(), ("Position_10", "Pitch_40", "Velocity_63", "Duration_0.10.50")]
)
def test_elapsed_is_what_reading_does_to_the_clock(shipped, before):
    """Also before the first bar, whose line takes no time."""
    tokenizer = shipped[1]
    grammar = at(tokenizer, *before)[0] if before else Grammar(tokenizer)
    elapsed = grammar.elapsed()
    for token in np.flatnonzero(grammar.may_follow()):
        after = grammar.copy()
        after.read(int(token))
        assert after.seconds - grammar.seconds == pytest.approx(elapsed[token])


def measure(name, music, seconds):
    return {
        "density": len(music.notes) / seconds,
        "register": music.notes["pitch"].mean(),
        "loudness": music.notes["velocity"].mean(),
    }[name]


@pytest.mark.parametrize("name", ["density", "register", "loudness"])
def test_a_control_moves_its_attribute(shipped, name):
    """Paired over seeds, up against down;
    data/results/generation.json has 30 seeds against the model's own.
    """
    seeds = range(8)
    up, down = (
        variations(*shipped, seeds=seeds, seconds=10, controls=Controls(**{name: value}))
        for value in (2.0, -2.0)
    )
    assert sum(measure(name, a, 10) > measure(name, b, 10) for a, b in zip(up, down)) >= 7


def test_tempo_stretches_the_new_notes_and_plays_as_long(shipped):
    plain = generate(*shipped, seconds=12, seed=1)
    fast = generate(*shipped, seconds=6, seed=1, controls=Controls(tempo=2.0))
    assert (
        len(plain.notes) == len(fast.notes) and (plain.notes["pitch"] == fast.notes["pitch"]).all()
    )
    np.testing.assert_allclose(fast.notes["start"], plain.notes["start"] / 2, atol=1e-9)


@pytest.mark.parametrize(
    "settings", [{"density": 4}, {"register": -3.1}, {"loudness": float("nan")}, {"tempo": 0}]
)
def test_a_control_out_of_range_is_one_sentence(settings):
    with pytest.raises(UserError) as error:
        Controls(**settings)
    assert "\n" not in str(error.value)
