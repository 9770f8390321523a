"""Claims about lib.generate.bridge: it arrives in time, weighs by what follows,
and forks as it says.
"""

import numpy as np
import pytest
import torch

from lib import mamba
from lib.env.errors import UserError
from lib.generate import bridge as bridging
from lib.generate.__main__ import main, parse
from lib.generate.bridge import (
    Crossing,
    Goal,
    Row,
    bridge,
    cross,
    effective_size,
    log_likelihood,
    normalised,
    resample,
)
from lib.generate.grammar import NoteReader
from lib.generate.moment import hear
from lib.generate.player import MODEL, Player
from lib.generate.sampling import Sampling
from lib.music.notes import Music, make_notes, read_midi, write_midi
from lib.music.tokens import Tokenizer


@pytest.fixture(scope="module")
def tiny():
    """A model of random weights with the shipped words."""
    tokenizer = Tokenizer.load(MODEL)
    torch.manual_seed(4)
    return mamba.MambaLM(
        mamba.MambaConfig(tokenizer.vocab_size, d_model=16, n_layer=2, d_state=4)
    ).eval(), tokenizer


def scale(first=60, notes=10, late=0.0):
    start = late + np.arange(notes) * 0.25
    return Music(make_notes(start, start + 0.2, first + np.arange(notes), np.full(notes, 70)))


def start_and_goal(tiny, second=4.13):
    model, tokenizer = tiny
    start = hear(model, tokenizer, tokenizer.encode(scale()), begin=2.5)
    return start, Goal.of(tokenizer, scale(40, late=7.7), second)


def test_the_whole_is_the_first_piece_new_music_and_the_second_in_time(tiny):
    before, after = scale(), scale(40, late=5.0)
    music, begin, end = bridge(*tiny, before, after, seconds=3, rows=4, seed=1)
    starts = music.notes["start"]
    old, new = music.notes[starts < begin], music.notes[(starts >= begin) & (starts < end)]
    later = music.notes[starts >= end - 1e-9]
    assert (old["pitch"] == before.notes["pitch"]).all() and len(new)
    assert end == pytest.approx(begin + 3, abs=0.006)
    assert (later["pitch"] == after.notes["pitch"]).all()
    np.testing.assert_allclose(later["start"] - end, np.arange(10) * 0.25, atol=1e-6)


def test_the_same_seed_builds_the_same_bridge_and_another_seed_another(tiny):
    one, two, other = (
        bridge(*tiny, scale(), scale(40), seconds=2, rows=4, seed=s)[0].notes for s in (1, 1, 2)
    )
    assert len(one) == len(two) and (one == two).all()
    assert len(one) != len(other) or (one != other).any()


def test_what_follows_has_the_tokens_that_it_has_in_a_whole_piece(tiny):
    model, tokenizer = tiny
    start, goal = start_and_goal(tiny, second=4.13)
    row = Row(start, there=True)
    joined = np.concatenate([scale().notes, bridging.starting_at(4.13, scale(40).notes)])
    wanted = [int(t) for t in tokenizer.encode(Music(joined)) if tokenizer.pieces[int(t)]]
    read = [int(t) for t in tokenizer.encode(scale()) if tokenizer.pieces[int(t)]]
    rest = goal.seen_from(row)
    waited = [token for token in start.recent if tokenizer.pieces[token]][len(read) :]
    assert read + waited + rest == wanted


def test_the_likelihood_is_that_of_reading_on(tiny):
    model, tokenizer = tiny
    start, goal = start_and_goal(tiny)
    # a row that is a bar further on
    ahead = Row(hear(model, tokenizer, [goal.bar_line], start), there=True)
    rows = [Row(start, there=True), ahead, Row(start)]
    found = log_likelihood(model, rows, goal, count=12)
    behind = log_likelihood(model, rows[:2], goal, skip=12, count=7)
    for row, nats, nats_behind in zip(rows, found, [*behind, None]):
        ids = goal.first(19).seen_from(row)
        first = len(ids) - 7
        moment, logs = row.moment, []
        for token in ids:
            logs.append(float(moment.logits.log_softmax(-1)[0, token]))
            moment = hear(model, tokenizer, [token], moment)
        assert nats == pytest.approx(sum(logs[:first]), abs=1e-3)
        if nats_behind is not None:
            assert nats_behind == pytest.approx(sum(logs[first:]), abs=1e-3)


def test_every_row_arrives_and_says_nothing_late(tiny):
    start, goal = start_and_goal(tiny)
    crossing = cross(*tiny, start, goal, rows=6, seed=3, every=8)
    assert len(crossing.rows) == 6 and crossing.weights.sum() == pytest.approx(1)
    assert len(crossing.sizes) > 1 and all(1 <= size <= 6 + 1e-9 for size in crossing.sizes)
    for row in crossing.rows:
        assert row.there
        notes = NoteReader(tiny[1], start.grammar).notes(row.tokens)
        assert not len(notes) or (
            notes["start"].max() < goal.second and notes["start"].min() >= 2.5 - 1e-9
        )
        afresh = hear(*tiny, row.tokens, start)
        torch.testing.assert_close(row.moment.logits, afresh.logits, atol=1e-4, rtol=1e-4)


def test_rows_that_were_forked_go_separate_ways(tiny, monkeypatch):
    turns = iter([np.zeros(5, int)])  # all from one, once
    monkeypatch.setattr(bridging, "resample", lambda weights, dice: next(turns, np.arange(5)))
    monkeypatch.setattr(bridging, "ENOUGH", 2.0)  # at every weighing
    start, goal = start_and_goal(tiny, second=8.0)
    crossing = cross(*tiny, start, goal, rows=5, seed=3, every=8)
    ways = [tuple(row.tokens) for row in crossing.rows]
    assert len(set(ways)) == 5
    common = min(map(len, ways))
    assert len({way[:8] for way in ways}) == 1 and common >= 8, "they share where they come from"


def test_a_weight_is_how_likely_what_follows_is_over_how_likely_the_row_was_to_end(tiny):
    """In each row's own place, where nothing was resampled; the sampling counts as it was drawn."""
    model, tokenizer = tiny
    start, goal = start_and_goal(tiny)
    sampling = Sampling(temperature=1.3, top_p=0.9)
    crossing = cross(*tiny, start, goal, rows=6, seed=3, every=10**6, sampling=sampling)
    wanted = log_likelihood(model, crossing.rows, goal)
    for place, row in enumerate(crossing.rows):
        grammar, later = row.moment.grammar, 0.0
        logits = grammar.mask(row.moment.logits[0].double())
        for token, p in enumerate(sampling.probabilities(logits).tolist()):
            after = grammar.copy()
            after.read(token)
            later += p * (after.seconds >= goal.second - 1e-6)
        assert 0 < later <= 1 and row.late == pytest.approx(np.log(later))
        wanted[place] -= row.late
    np.testing.assert_allclose(crossing.weights, normalised(wanted), rtol=1e-6)
    assert len(crossing.sizes) == 1


def test_a_row_that_stops_to_be_weighed_has_not_ended(tiny, monkeypatch):
    """Or its end would be drawn twice: what comes behind a stop is drawn when it goes on."""
    model, tokenizer = tiny
    start, goal = start_and_goal(tiny, second=2.6)
    while start.grammar.end != "Duration":
        start = hear(model, tokenizer, [int(start.grammar.mask(start.logits[0]).argmax())], start)
    player = Player(model, tokenizer, [start] * 40, list(range(40)))
    rows = bridging.walk(player, [Row(start) for _ in range(40)], goal, every=0)
    assert not any(row.there or row.late or row.tokens for row in rows)


def test_resampling_takes_each_row_about_as_often_as_its_weight_says():
    weights = np.array([0.5, 0.3, 0.2, 0.0])
    for dice in (0.0, 0.3, 0.999):
        counts = np.bincount(resample(weights, dice), minlength=4)
        assert counts.sum() == 4 and counts[3] == 0
        assert (np.abs(counts - 4 * weights) < 1).all()
    mean = np.mean(
        [np.bincount(resample(weights, d), minlength=4) for d in np.linspace(0, 0.999, 500)], 0
    )
    np.testing.assert_allclose(mean, 4 * weights, atol=0.02)


def test_the_effective_size_is_the_number_of_rows_that_count():
    assert effective_size(np.full(8, 1 / 8)) == pytest.approx(8)
    assert effective_size(np.array([0.5, 0.5, 0, 0])) == pytest.approx(2)
    assert effective_size(normalised(np.array([0.0, -1000.0]))) == pytest.approx(1)


def test_a_row_is_drawn_as_often_as_its_weight_says(tiny):
    start, _ = start_and_goal(tiny)
    rows = [Row(start) for _ in range(3)]
    crossing = Crossing(rows, np.array([0.7, 0.2, 0.1]), [])
    drawn = [crossing.draw(seed) for seed in range(400)]
    shares = [np.mean([row is one for row in drawn]) for one in rows]
    np.testing.assert_allclose(shares, crossing.weights, atol=0.07)


def test_the_command_writes_the_way_from_one_file_to_the_other(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("lib.generate.__main__.load_model", lambda folder: tiny)
    write_midi(scale(), tmp_path / "a.mid")
    write_midi(scale(40), tmp_path / "b.mid")
    main(
        [
            "--from",
            str(tmp_path / "a.mid"),
            "--to",
            str(tmp_path / "b.mid"),
            "--seconds",
            "2",
            "--rows",
            "3",
            "--out",
            str(tmp_path / "out"),
        ]
    )
    assert len(read_midi(tmp_path / "out" / "a-to-b-seed1.mid").notes) >= 20
    assert "the bridge goes from second 2.5 to second 4.5" in capsys.readouterr().out


def test_a_bridge_too_long_to_be_made_sound_is_refused_before_the_model_is_loaded(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("lib.generate.__main__.load_model", lambda folder: pytest.fail("too late"))
    long = make_notes(
        [5, 3604], [6, 3605], [60, 62], [70, 70]
    )  # an hour, silence before it left out
    write_midi(Music(long), tmp_path / "a.mid")
    words = ["--from", str(tmp_path / "a.mid"), "--to", str(tmp_path / "a.mid")]
    with pytest.raises(UserError, match="last 7,201 seconds, and no more than 7,200"):
        main([*words, "--seconds", "1", "--out", str(tmp_path / "out")])
    held = Music(make_notes([0, 10], [1, 11], [60, 62], [70, 70]), np.array([[10.5, 7200.0]]))
    write_midi(held, tmp_path / "b.mid")
    words[3] = str(tmp_path / "b.mid")
    with pytest.raises(UserError, match="last 10,801 seconds"):  # the pedal holds the last note
        main([*words, "--seconds", "1", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words, says",
    [
        (["--from", "a.mid"], "name both files"),
        (["--to", "a.mid"], "name both files"),
        (["--from", "a.mid", "--to", "b.mid", "--prompt", "c.mid"], "leave out --prompt"),
        (["--from", "a.mid", "--to", "b.mid", "--tempo", "2"], "leave out --tempo"),
        (["--from", "a.mid", "--to", "b.mid", "--stream"], "leave out"),
    ],
)
def test_words_that_do_not_go_together_are_refused(words, says):
    with pytest.raises(UserError, match=says):
        parse(words)


def test_what_cannot_be_bridged_is_said_in_a_sentence(tiny):
    nothing = Music(make_notes([], [], [], []))
    with pytest.raises(UserError, match="to arrive at has no note"):
        bridge(*tiny, scale(), nothing)
    with pytest.raises(UserError, match="has no note"):
        bridge(*tiny, nothing, scale())
    with pytest.raises(UserError, match="outside 2 to 1000"):
        bridge(*tiny, scale(), scale(), rows=1)
    with pytest.raises(UserError, match="seconds -1"):
        bridge(*tiny, scale(), scale(), seconds=-1)
