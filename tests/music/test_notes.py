"""lib.music.notes: what is written is read back, the pedal rings,
cuts and changes do what they say.
"""

import errno
import math
from pathlib import Path

import numpy as np
import pytest

from lib.env.errors import UserError
from lib.music import notes as module
from lib.music.notes import (
    NOTE,
    Music,
    augment,
    clip_repeats,
    crop,
    make_notes,
    read_midi,
    sustain,
    write_midi,
)

HALF_TICK = 0.5 / 960 + 1e-9  # seconds; we write 960 ticks a second


def music(*rows, pedal=()) -> Music:
    """Rows of (start, end, pitch, velocity)."""
    start, end, pitch, velocity = np.array(rows, float).T
    return Music(make_notes(start, end, pitch, velocity), np.array(pedal, float).reshape(-1, 2))


def random_music(count: int, seed: int = 0) -> Music:
    """Each key is free again before it is struck again, as on a piano."""
    rng = np.random.default_rng(seed)
    start = np.sort(rng.uniform(0, count / 8, count))
    notes = make_notes(
        start,
        start + rng.uniform(0.01, 3, count),
        rng.integers(21, 109, count),
        rng.integers(1, 128, count),
    )
    pedal = np.sort(rng.uniform(0, count / 8, count // 5 * 2)).reshape(-1, 2)
    return Music(clip_repeats(notes), pedal)


def smf(*tracks: bytes, form: int = 1, division: int = 480) -> bytes:
    """A MIDI file by hand; each track is the bytes of its events, without the end of track."""
    out = b"MThd\0\0\0\6" + form.to_bytes(2) + len(tracks).to_bytes(2) + division.to_bytes(2)
    for body in tracks:
        body += b"\0\xff\x2f\0"
        out += b"MTrk" + len(body).to_bytes(4) + body
    return out


def read(folder: Path, data: bytes) -> Music:
    (folder / "x.mid").write_bytes(data)
    return read_midi(folder / "x.mid")


# --- reading and writing --------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 63, 64, 65, 1000])
def test_round_trip_keeps_every_note_and_pedal(tmp_path, count):
    before = random_music(count)
    write_midi(before, tmp_path / "deep" / "x.mid")
    after = read_midi(tmp_path / "deep" / "x.mid")
    assert after.notes.dtype == NOTE and len(after.notes) == count
    # two notes within a tick may change places, so compare key by key
    for pitch in np.unique(before.notes["pitch"]):
        mine, back = (m.notes[m.notes["pitch"] == pitch] for m in (before, after))
        assert np.abs(mine["start"] - back["start"]).max() <= HALF_TICK
        long = np.maximum(mine["end"], mine["start"] + 1 / 960)  # a note lasts at least a tick
        assert np.abs(long - back["end"]).max() <= 2 * HALF_TICK
        assert (mine["velocity"] == back["velocity"]).all()
    assert len(after.pedal) == len(before.pedal)
    assert np.abs(after.pedal - before.pedal).max(initial=0) <= HALF_TICK


def test_second_round_trip_changes_nothing(tmp_path):
    write_midi(random_music(200), tmp_path / "x.mid")
    a = read_midi(tmp_path / "x.mid")
    write_midi(a, tmp_path / "x.mid")
    b = read_midi(tmp_path / "x.mid")
    assert (a.notes == b.notes).all() and (a.pedal == b.pedal).all()


def test_other_libraries_read_the_same_notes(tmp_path):
    pretty_midi = pytest.importorskip("pretty_midi")
    one = random_music(300)
    write_midi(one, tmp_path / "x.mid")
    theirs = pretty_midi.PrettyMIDI(str(tmp_path / "x.mid")).instruments[0].notes
    ours = read_midi(tmp_path / "x.mid").notes
    assert len(theirs) == len(ours)
    rows = sorted((round(n.start, 5), n.pitch, n.velocity, round(n.end, 5)) for n in theirs)
    mine = sorted(
        (
            round(float(n["start"]), 5),
            int(n["pitch"]),
            int(n["velocity"]),
            round(float(n["end"]), 5),
        )
        for n in ours
    )
    assert np.abs(np.array(rows) - np.array(mine)).max() < 2e-5


def test_times_stay_exact_in_a_long_piece(tmp_path):
    write_midi(music((7200 + 1 / 960, 7201, 60, 64)), tmp_path / "x.mid")
    start = read_midi(tmp_path / "x.mid").notes["start"][0]
    assert start == pytest.approx(7200 + 1 / 960, abs=1e-9)


def test_tempo_changes_are_honoured(tmp_path):
    # 480 ticks at 120 BPM (0.5 s), then 60 BPM: a note of 480 ticks lasts a second
    tempo = b"\x83\x60\xff\x51\3\x0f\x42\x40"
    one = read(tmp_path, smf(tempo, b"\x83\x60\x90\x3c\x40\x83\x60\x80\x3c\0"))
    assert (one.notes["start"][0], one.notes["end"][0]) == (0.5, 1.5)
    # a note that crosses the change: half of it at each tempo
    one = read(tmp_path, smf(tempo, b"\x81\x70\x90\x3c\x40\x83\x60\x80\x3c\0"))
    assert (one.notes["start"][0], one.notes["end"][0]) == (0.25, 1.0)


def test_tracks_are_merged_and_drums_left_out(tmp_path):
    tracks = [bytes([0, 0x90 | c, 60 + c, 64, 96, 0x80 | c, 60 + c, 0]) for c in (0, 1, 9)]
    assert read(tmp_path, smf(*tracks)).notes["pitch"].tolist() == [60, 61]


def test_running_status_and_velocity_zero_are_understood(tmp_path):
    one = read(tmp_path, smf(b"\0\x90\x3c\x40\x60\x3c\0\0\x40\x41\x60\x40\0", form=0))
    assert one.notes["pitch"].tolist() == [60, 64] and one.notes["velocity"].tolist() == [64, 65]


def test_same_key_struck_again_while_down_ends_first_in_first_out(tmp_path):
    body = b"\0\x90\x3c\x40\x60\x90\x3c\x41\x60\x80\x3c\0\x60\x80\x3c\0"
    one = read(tmp_path, smf(body, division=96))
    assert one.notes["end"].tolist() == [1.0, 1.5]


def test_notes_off_the_piano_are_dropped(tmp_path):
    body = b"\0\x90\x3c\x40\0\x90\x05\x40\0\x90\x6d\x40\x60\x80\x3c\0\0\x80\x05\0"
    assert read(tmp_path, smf(body)).notes["pitch"].tolist() == [60]


def test_pedal_still_down_at_the_end_is_lifted_with_the_last_note(tmp_path):
    body = b"\0\xb0\x40\x7f\0\x90\x3c\x40\x60\x80\x3c\0"
    assert read(tmp_path, smf(body, division=96)).pedal.tolist() == [[0.0, 0.5]]


def test_half_pedal_counts_from_64(tmp_path):
    note = b"\0\x90\x3c\x40\x83\x60\x80\x3c\0"
    body = note + b"\0\xb0\x40\x3f\0\xb0\x40\x40\x60\xb0\x40\x5a\x60\xb0\x40\x3f"
    assert read(tmp_path, smf(body, division=96)).pedal.tolist() == [[2.5, 3.5]]


def test_pedals_of_two_tracks_become_one(tmp_path):
    tracks = [
        b"\0\x90\x3c\x40\0\xb0\x40\x7f\x60\xb0\x40\0\x60\x80\x3c\0",
        b"\0\x91\x40\x40\x30\xb1\x40\x7f\x60\xb1\x40\0\x60\x81\x40\0",
    ]
    assert read(tmp_path, smf(*tracks, division=96)).pedal.tolist() == [[0.0, 0.75]]


ERRORS = {
    "empty": (b"", "is empty"),
    "text": (b"dear diary", "not a MIDI file"),
    "cut": (smf(b"\0\x90\x3c\x40\x60\x80\x3c\0")[:-6], "damaged MIDI file"),
    "no notes": (smf(b""), "has no notes"),
    "no tracks": (smf(), "has no notes"),
    "release without stroke": (smf(b"\0\x80\x3c\x40"), "has no notes"),
    "drums only": (smf(b"\0\x99\x3c\x40\x60\x89\x3c\0"), "drums only"),
    "too low": (smf(b"\0\x90\x05\x40\x60\x80\x05\0"), "no notes that a piano can play"),
    "years long": (smf(b"\xff\xff\xff\x7f\x90\x3c\x40\x60\x80\x3c\0", division=1), "no notes"),
    "huge": (b"MThd" + bytes(10_000_001), "too large"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_useless_file_is_one_sentence(tmp_path, case):
    data, words = ERRORS[case]
    with pytest.raises(UserError, match=words) as caught:
        read(tmp_path, data)
    assert "\n" not in str(caught.value) and "x.mid" in str(caught.value)


@pytest.mark.parametrize("name", ["nowhere.mid", "a\0b"])
def test_file_that_is_not_there_is_one_sentence(tmp_path, name):
    with pytest.raises(UserError, match="there is no file"):
        read_midi(tmp_path / name)


def test_a_folder_in_the_place_of_a_file_is_called_a_folder(tmp_path):
    with pytest.raises(UserError, match="is a folder: give the name of a MIDI file"):
        read_midi(tmp_path)


def test_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    write_midi(random_music(5), tmp_path / "x.mid")
    old = (tmp_path / "x.mid").read_bytes()

    def full(self, data):
        self.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match="the disk is full"):
        write_midi(random_music(9), tmp_path / "x.mid")
    assert [p.name for p in tmp_path.iterdir()] == ["x.mid"]
    assert (tmp_path / "x.mid").read_bytes() == old


# --- pedal ----------------------------------------------------------------------------------


def ends(one: Music) -> list[float]:
    return sustain(one).notes["end"].tolist()


def test_sustain_rings_until_the_pedal_comes_up():
    assert ends(music((0, 1, 60, 64), pedal=[(0.5, 3)])) == [3]
    assert ends(music((0, 1, 60, 64), pedal=[(1, 3)])) == [3], "down at the very release"


def test_sustain_leaves_what_the_pedal_does_not_hold():
    assert ends(music((0, 1, 60, 64), pedal=[(1.5, 3)])) == [1], "down too late"
    assert ends(music((0, 1, 60, 64), pedal=[(0, 0.5)])) == [1], "up before the release"
    assert ends(music((0, 1, 60, 64), pedal=[(0, 1)])) == [1], "up at the release"
    assert ends(music((0, 1, 60, 64))) == [1], "no pedal"


def test_sustain_stops_when_the_key_is_struck_again():
    one = music((0, 1, 60, 64), (2, 2.5, 60, 64), (0, 1, 64, 64), pedal=[(0.5, 4)])
    assert ends(one) == [2, 4, 4]


def test_sustain_is_done_once_and_leaves_its_input():
    one = random_music(300)
    before = one.notes.copy()
    once = sustain(one)
    assert (one.notes == before).all() and len(once.pedal) == 0
    assert (sustain(once).notes == once.notes).all()
    assert (once.notes["end"] >= one.notes["start"]).all()


def test_sustain_matches_a_plain_loop():
    one = random_music(200, seed=3)
    got = sustain(one).notes
    for i, (start, end, pitch, _) in enumerate(one.notes.tolist()):
        for down, up in one.pedal:
            if down <= end < up:
                end = up
                break
        again = [s for s, _, p, _ in one.notes.tolist() if p == pitch and s > start]
        assert got["end"][i] == pytest.approx(min([end, *again]))


# --- cutting and changing -------------------------------------------------------------------


def test_crop_takes_onsets_inside_and_shifts():
    one = music((0, 5, 60, 1), (2, 9, 61, 2), (4, 5, 62, 3), pedal=[(0, 3), (3.5, 6), (7, 8)])
    part = crop(one, 2, 4)
    assert part.notes["pitch"].tolist() == [61]
    assert (part.notes["start"][0], part.notes["end"][0]) == (0, 7)
    assert part.pedal.tolist() == [[0, 1], [1.5, 2]]
    assert one.notes["start"].tolist() == [0, 2, 4], "its input is left alone"


def test_crop_of_nothing_is_empty():
    part = crop(random_music(20), 1e6, 2e6)
    assert len(part.notes) == 0 and part.pedal.shape == (0, 2) and part.seconds == 0


def test_crops_side_by_side_hold_every_note():
    one = random_music(500)
    parts = [crop(one, a, a + 7) for a in range(0, math.ceil(one.seconds), 7)]
    assert sum(len(p.notes) for p in parts) == 500


def test_augment_transposes_stretches_and_plays_louder():
    one = music((1, 2, 60, 100), (3, 4, 108, 120)).notes
    out = augment(one, semitones=-2, stretch=1.5, velocity=20)
    assert out["pitch"].tolist() == [58, 106] and out["velocity"].tolist() == [120, 127]
    assert out["start"].tolist() == [1.5, 4.5] and out["end"].tolist() == [3, 6]
    assert augment(one, semitones=1)["pitch"].tolist() == [61], "108 + 1 is off the keyboard"
    assert augment(one, velocity=-300)["velocity"].tolist() == [1, 1]
    assert (augment(one) == one).all() and augment(one) is not one


@pytest.mark.parametrize("stretch", [0, -1, 0.2, 5, math.nan])
def test_augment_refuses_a_senseless_stretch(stretch):
    with pytest.raises(UserError, match="stretch"):
        augment(random_music(3).notes, stretch=stretch)


def test_seconds_counts_notes_and_pedal():
    assert Music(np.zeros(0, NOTE)).seconds == 0
    assert music((0, 2, 60, 64), pedal=[(1, 3)]).seconds == 3


def test_make_notes_sorts_by_onset_then_key():
    out = make_notes([1, 0, 0], [2, 1, 1], [60, 70, 50], [1, 2, 3])
    assert out["pitch"].tolist() == [50, 70, 60] and module.LOWEST == 21
