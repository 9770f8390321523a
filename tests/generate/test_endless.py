"""Claims about lib.generate.endless: it plays on in constant memory and constant time,
and its file is always whole.
"""

import errno
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from lib.env.errors import UserError
from lib.generate import endless
from lib.generate.endless import GrowingMidi, forever, stream
from lib.generate.grammar import NoteReader
from lib.generate.moment import hear
from lib.generate.player import Player, load_model, sample
from lib.generate.sampling import Sampling
from lib.mamba.model import MambaConfig, MambaLM
from lib.music.notes import read_midi
from lib.music.tokens import TokenConfig, Tokenizer


def tiny(seed=0):
    """A player with a random model over the smallest vocabulary:
    what is claimed does not hang on its size.
    """
    tokenizer = Tokenizer(TokenConfig(grid_ms=125, vocab_size=None, velocities=4))
    torch.manual_seed(0)
    model = MambaLM(MambaConfig(tokenizer.vocab_size, d_model=16, n_layer=1)).eval()
    return Player(
        model, tokenizer, [hear(model, tokenizer, [tokenizer.bos])], [seed], Sampling(top_p=1.0)
    )


def resident():
    """Bytes of this process in memory, or None where the system does not say (not Linux)."""
    try:
        return 1024 * int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1])
    except OSError:
        return None


def test_a_hundred_thousand_tokens_take_no_more_memory_and_no_more_time_a_token(tmp_path):
    """The processor's own time is compared, which other programs do not change.

    A cost that grew with the piece, as attention's does, would be twenty times as high in the last
    tenth as in the first half.
    """
    player, count, tenth = tiny(), 100_000, 10_000
    memory, seconds, state, before = [], [], [], time.process_time()
    with GrowingMidi(tmp_path / "endless.mid") as midi:
        for i, (notes, _) in enumerate(forever(player, NoteReader(player.tokenizer)), 1):
            for note in notes:
                midi.add(*note)
            if i % 1000 == 0:
                midi.flush()
            if i % tenth == 0:
                now = time.process_time()
                seconds.append(now - before)
                memory.append(resident())
                state.append(player.moment().nbytes())
                before = now
            if i == count:
                break
    assert len(set(state)) == 1
    assert np.median(seconds[-3:]) < 2 * np.median(seconds[:3])
    if memory[0] is not None:
        # the notes alone would take more, as Python objects
        assert memory[-1] - memory[1] < 2_000_000
    assert midi.notes > 30_000
    assert len(read_midi(tmp_path / "endless.mid").notes) == midi.notes


def test_the_file_is_whole_whenever_it_is_opened(tmp_path):
    player, path, sizes = tiny(1), tmp_path / "now.mid", []
    reader = NoteReader(player.tokenizer)
    with GrowingMidi(path) as midi:
        for i, (notes, _) in enumerate(forever(player, reader), 1):
            for note in notes:
                midi.add(*note)
            if i % 50 == 0:
                midi.flush()
                if midi.notes:
                    assert len(read_midi(path).notes) == midi.notes
                sizes.append(path.stat().st_size)
            if i == 600:
                break
    assert sizes[-1] > sizes[0] and len(read_midi(path).notes) == midi.notes


def test_the_file_holds_the_notes_that_were_played(tmp_path):
    """Onsets to half a tick; where a key is struck again, its earlier note has ended."""
    player, path = tiny(2), tmp_path / "x.mid"
    played = []
    with GrowingMidi(path) as midi:
        for i, (notes, _) in enumerate(forever(player, NoteReader(player.tokenizer))):
            played += notes
            for note in notes:
                midi.add(*note)
            if i % 37 == 0:
                midi.flush()
            if i == 1500:
                break
    back, wanted = read_midi(path).notes, sorted(played, key=lambda n: (n[0], n[2]))
    assert [(n["pitch"], n["velocity"]) for n in back] == [(n[2], n[3]) for n in wanted]
    np.testing.assert_allclose(back["start"], [n[0] for n in wanted], atol=0.0006)
    for pitch in np.unique(back["pitch"]):
        mine = back[back["pitch"] == pitch]
        assert (mine["end"][:-1] <= mine["start"][1:] + 1e-6).all()


def test_notes_read_token_by_token_are_those_of_the_whole_piece():
    model, tokenizer = load_model()
    ids = [
        tokenizer.bos,
        *(t for t, _ in sample(model, tokenizer, np.array([tokenizer.bos]), until=20, seed=2)),
    ]
    ours, theirs = NoteReader(tokenizer).notes(ids), tokenizer.decode(ids).notes
    assert len(ours) == len(theirs) > 20
    for name in ("start", "pitch", "velocity"):
        np.testing.assert_allclose(ours[name], theirs[name], atol=1e-6)
    # `decode` also ends a note where its key is struck again
    later = np.array(
        [
            any(
                theirs["start"][(theirs["pitch"] == n["pitch"]) & (theirs["start"] > n["start"])]
                < n["end"]
            )
            for n in ours
        ]
    )
    np.testing.assert_allclose(ours["end"][~later], theirs["end"][~later], atol=1e-6)


def test_streaming_stops_where_it_should_and_keeps_what_is_there(tmp_path):
    said, path = [], tmp_path / "s.mid"
    stream(tiny(3), NoteReader(tiny().tokenizer).notes([]), 0.0, path, until=10.0, say=said.append)
    notes = read_midi(path).notes
    assert 4 < notes["start"].max() < 10 and len(notes) > 5 and str(len(notes)) in said[-1]
    data = path.read_bytes()
    with pytest.raises(UserError, match="exists already"):
        stream(tiny(3), notes, 0.0, path, until=10.0)
    assert path.read_bytes() == data


def test_control_c_leaves_a_whole_file(tmp_path, monkeypatch):
    player, path, steps = tiny(4), tmp_path / "s.mid", iter(range(10**6))
    step = player.step

    def interrupted():
        if next(steps) == 700:
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(player, "step", interrupted)
    stream(player, NoteReader(player.tokenizer).notes([]), 0.0, path, say=lambda text: None)
    assert len(read_midi(path).notes) > 20


def test_a_disk_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError) as error:
        GrowingMidi(tmp_path / "file" / "x.mid")
    assert "\n" not in str(error.value)


# ---- a disk that is full --------------------------------------------------------------------


class Full:
    """A file on a disk that takes so many bytes more,
    and a half of the write that is one too many.
    """

    def __init__(self, file, room):
        self.file, self.room = file, room

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, data):
        beyond = max(0, self.file.tell() + len(data) - self.room)
        if beyond >= len(data):
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(data[: len(data) - beyond])


@pytest.mark.parametrize("room", [0, 10, 30])
def test_a_disk_that_is_full_from_the_start_leaves_nothing(tmp_path, room):
    path = tmp_path / "new.mid"
    with pytest.raises(UserError, match="the disk is full") as error, GrowingMidi(path) as midi:
        midi._file = Full(midi._file, room)
        midi.add(0, 1, 60, 80)
        midi.flush()
    assert "\n" not in str(error.value) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("room", [0, 1, 3, 9, 40])
def test_a_disk_that_fills_up_leaves_the_name_free_and_keeps_what_was_played(tmp_path, room):
    path = tmp_path / "new.mid"
    for attempt in (1, 2):
        with pytest.raises(
            UserError, match=f"the disk is full.*played until then is in .*new-until-{attempt}.mid"
        ):
            with GrowingMidi(path) as midi:
                midi.add(0, 1, 60, 80)
                midi.add(0.5, 2, 64, 80)
                midi.flush()
                midi._file = Full(midi._file, path.stat().st_size + room)
                for pitch in range(30, 60):
                    midi.add(1, 2, pitch, 80)
                midi.flush()
        kept = read_midi(tmp_path / f"new-until-{attempt}.mid").notes
        assert kept["pitch"].tolist() == [60, 64] and not path.exists()


def test_what_fails_before_the_first_note_leaves_nothing(tmp_path):
    with pytest.raises(UserError), GrowingMidi(tmp_path / "new.mid"):
        raise UserError("something else")
    assert list(tmp_path.iterdir()) == []


def test_a_file_as_long_as_can_be_stays_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(endless, "FULL", 60)
    with (
        pytest.raises(UserError, match="as long as a MIDI file can be"),
        GrowingMidi(tmp_path / "new.mid") as midi,
    ):
        for pitch in range(40, 60):
            midi.add(0, 1, pitch, 80)
            midi.flush()
    assert len(read_midi(tmp_path / "new.mid").notes) > 1
