"""Claims about lib.music.library: notes are read once, and come from the cache as they were."""

import numpy as np
import pytest

from lib.env.errors import UserError
from lib.music.library import note_arrays
from lib.music.maestro import Performance
from lib.music.notes import Music, make_notes, write_midi


@pytest.fixture
def performances(tmp_path):
    """Two performances, of one note and of two."""
    for count in (1, 2):
        start = np.arange(count, dtype=float)
        music = Music(make_notes(start, start + 1, 60 + np.arange(count), [64] * count))
        write_midi(music, tmp_path / f"{count}.mid")
    return [
        Performance(tmp_path / f"{count}.mid", "Bach", "Air", 2018, "train", 2.0)
        for count in (1, 2)
    ]


@pytest.mark.parametrize("count", [0, 1, 2])
def test_the_cache_gives_as_many_performances_as_were_read(performances, tmp_path, count):
    """Also of none at all."""
    asked = performances[:count]
    read = note_arrays(asked, folder=tmp_path, progress=False)
    kept = note_arrays(asked, folder=tmp_path, progress=False)
    assert [len(one) for one in kept] == [len(one) for one in read] == [1, 2][:count]
    assert all((ours == theirs).all() for ours, theirs in zip(kept, read, strict=True))


def test_kept_notes_that_are_not_those_of_the_performances_are_called_damaged(
    performances, tmp_path
):
    note_arrays(performances, folder=tmp_path, progress=False)
    path = next(tmp_path.glob("notes-*.npz"))
    with np.load(path) as file:
        notes = file["notes"]
    np.savez(path, notes=notes, lengths=np.array([2, 2]))  # four notes, and there are three
    with pytest.raises(UserError, match="is damaged: delete it"):
        note_arrays(performances, folder=tmp_path, progress=False)
