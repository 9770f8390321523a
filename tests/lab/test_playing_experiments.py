"""Claims about the measurements of one's own folder, of bridges and of the partner."""

from dataclasses import replace

import numpy as np
import pytest

from lib.lab.experiments import bridge, own_midi
from lib.music.folder import read_folder
from lib.music.notes import HIGHEST, LOWEST, Music, make_notes
from tests.helpers.made_up import make_streams


def test_rags_are_music_for_a_piano_and_each_seed_has_its_own(tmp_path):
    one, again, other = (own_midi.rag(np.random.default_rng(seed)).notes for seed in (1, 1, 2))
    assert (one == again).all() and (len(one) != len(other) or (one != other).any())
    assert LOWEST <= one["pitch"].min() and one["pitch"].max() <= HIGHEST
    assert 60 < one["end"].max() < 120 and len(one) > 400
    own_midi.write_rags(tmp_path, 12)
    splits = [p.split for p in read_folder(tmp_path, say=lambda text: None)]
    assert len(splits) == 12 and set(splits) == {"train", "validation", "test"}


def test_a_composer_who_is_left_out_is_left_out_in_arrangements_too():
    streams = make_streams()
    names = ["Bach", "Bach / Busoni", "Chopin", "Liszt"]
    pieces = [replace(p, composer=name) for p, name in zip(streams.pieces, names)]
    kept = own_midi.without(replace(streams, pieces=pieces), ("Bach", "Debussy"))
    assert [p.composer for p in kept.pieces] == ["Chopin", "Liszt"]


def test_a_changed_copy_has_the_keys_tempo_and_share_that_were_asked_for():
    start = np.arange(1000) * 0.1
    notes = make_notes(start, start + 0.1, 40 + np.arange(1000) % 40, np.full(1000, 70))
    copy = own_midi.changed(notes, 1.5, 0.2, np.random.default_rng(0))
    other = copy["pitch"] != notes["pitch"] + 3
    assert 0.15 < other.mean() < 0.25
    np.testing.assert_allclose(copy["start"], start * 1.5)


def test_the_summary_of_gaps_sets_each_way_beside_plain_continuation():
    rng = np.random.default_rng(0)
    gaps = []
    for _ in range(30):
        plain = rng.normal(100, 5, 2)
        gaps.append(
            {
                "notes": [10, 50],
                "plain": plain.tolist(),
                "best": (plain - 5).tolist(),
                "bridge": (plain - [10, 0]).tolist(),
                "true": (plain - 20).tolist(),
            }
        )
    found = bridge.summary(gaps)
    assert found["weighed_by"]["bridge_minus_plain"]["bits_per_note"] == pytest.approx(-1.0)
    assert found["weighed_by"]["bridge_minus_best"]["bits_per_note"] == pytest.approx(-0.5)
    assert found["behind"]["bridge_minus_plain"]["interval_95"] == pytest.approx((0, 0), abs=1e-9)


def test_a_cut_begins_with_a_note_and_leaves_room_for_the_gap_and_what_follows():
    start = np.arange(400) * 0.5
    music = Music(make_notes(start, start + 0.4, np.full(400, 60), np.full(400, 70)))
    piece = bridge.cut(music, np.random.default_rng(3)).notes
    assert piece["start"].min() == 0
    assert piece["start"].max() >= bridge.BEFORE + bridge.GAP + 29
