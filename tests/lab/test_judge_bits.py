"""Claims about `python -m lib.lab.judge bits`: it counts what the model needs, file by file."""

from pathlib import Path

import numpy as np
import pytest

from lib.env.errors import UserError
from lib.generate.player import load_model
from lib.lab.judge.__main__ import main, name_of, read_folder
from lib.lab.judge.bits import bits_of
from lib.music.notes import Music, make_notes, write_midi


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    home = tmp_path_factory.mktemp("own")
    (home / "below").mkdir()
    for number, name in enumerate(("a.mid", "below/b.mid")):
        rng = np.random.default_rng(number)
        start = np.cumsum(rng.uniform(0.05, 0.4, 80))
        notes = make_notes(start, start + 0.3, rng.integers(50, 75, 80), rng.integers(40, 90, 80))
        write_midi(Music(notes), home / name)
    write_midi(Music(make_notes([0.0], [1.0], [60], [60])), home / "one_note.mid")
    (home / "broken.mid").write_bytes(b"MThd nothing")
    return home


def test_all_together_are_the_files_weighed_by_their_notes_and_others_are_said(folder):
    said = []
    found = bits_of(folder, *load_model(), say=said.append)
    assert list(found["files"]) == ["a.mid", "below/b.mid"]
    assert found["notes"] == 160
    assert found["bits_per_note"] == pytest.approx(np.mean(list(found["files"].values())), abs=1e-3)
    low, high = found["interval_95"]
    assert low <= found["bits_per_note"] <= high
    assert len(said) == 2 and all(line.startswith("left out 1 file") for line in said)


def test_the_command_prints_a_line_a_file_and_the_sum(folder, capsys):
    main(["bits", str(folder)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].endswith("to " + lines[-1].split()[-1]) and "160 notes in all" in lines[-1]
    assert {line.split()[-1] for line in lines[-3:-1]} == {"a.mid", "below/b.mid"}


def test_pieces_shorter_than_what_is_compared_are_left_out(tmp_path, capsys):
    for name, seconds, silence in (("a", 20, 0), ("b", 60, 0), ("c", 60, 5), ("d", 58, 9)):
        start = silence + np.arange(0, seconds, 0.1)
        notes = make_notes(start, start + 0.1, np.full(len(start), 60), np.full(len(start), 70))
        write_midi(Music(notes), tmp_path / f"{name}.mid")
    pieces, seconds = read_folder(tmp_path, None)
    assert seconds == 59 and [len(notes) for notes in pieces.values()] == [590, 590]
    assert "left out, shorter than 59 seconds: a.mid, d.mid" in capsys.readouterr().out
    with pytest.raises(UserError, match="fewer than two files last 70 seconds"):
        read_folder(tmp_path, 70)


def test_a_folder_called_like_an_anchor_is_not_taken_for_it(tmp_path, monkeypatch):
    assert [name_of(tmp_path / name) for name in ("mine", "real", "noise")] == [
        "mine",
        "real (yours)",
        "noise (yours)",
    ]
    monkeypatch.chdir(tmp_path)
    assert name_of(Path(".")) == tmp_path.name


def test_a_folder_without_music_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="there is no MIDI file"):
        bits_of(tmp_path, *load_model())
    (tmp_path / "x.mid").write_bytes(b"")
    with pytest.raises(UserError, match="enough notes"):
        bits_of(tmp_path, *load_model(), say=lambda text: None)
