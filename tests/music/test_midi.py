"""lib.music.midi and lib.music.keyboard: a file sounds as its bytes say, whoever wrote it.

Each claim stands on a file that is made here, byte by byte; beside them stands an oracle of another
make, `midi_oracle`.
"""

import struct

import numpy as np
import pytest
from midi_oracle import (
    SECOND,
    chunk,
    control,
    disagreement,
    meta,
    midi,
    note,
    off,
    on,
    oracle,
    program,
    random_file,
    read,
    tempo,
    track,
)

from lib.env.errors import UserError
from lib.music.midi import read_events
from lib.music.notes import Music, make_notes, read_midi, sustain, write_midi


@pytest.fixture
def heard(tmp_path):
    """(start, end, key) of the strings that sound in a file, in order, to a millisecond."""

    def listen(data: bytes):
        rows = sustain(read(tmp_path, data)).notes.tolist()
        return [(round(start, 3), round(end, 3), key) for start, end, key, _ in rows]

    return listen


# --- the claims -----------------------------------------------------------------------------


def test_the_oracle_of_another_make_agrees_on_random_files(tmp_path):
    sounding = 0
    for seed in range(60):
        path = tmp_path / "x.mid"
        path.write_bytes(random_file(f"suite {seed}"))
        assert not disagreement(path), f"seed {seed}: {disagreement(path)}"
        sounding += bool(oracle(path.read_bytes()))
    assert sounding > 40, "and most of them sound"


# --- which note ends when


def pedal(down, up, channel=0):
    return (down, control(64, 127, channel)), (up, control(64, 0, channel))


def test_the_first_release_answers_the_first_stroke(heard):
    part = track(*note(64, 96, 1920), *note(60, 0, 960), *note(60, 192, 1920))
    assert heard(midi(part)) == [(0, 0.2, 60), (0.1, 2, 64), (0.2, 2, 60)]


def test_a_release_without_a_stroke_is_nothing(heard):
    part = track(
        (0, off(60)), (0, off(60)), *note(60, 0, 480), (960, off(60)), *note(60, 960, 1440)
    )
    assert heard(midi(part)) == [(0, 0.5, 60), (1, 1.5, 60)]


def test_keys_that_stay_down_sound_until_their_own_track_ends(heard):
    left, right = track((0, on(40)), (960, on(45)), end=960), track((0, on(72)), end=4800)
    assert heard(midi(left, right)) == [(0, 2, 40), (0, 5, 72), (1, 2, 45)]


def test_a_track_that_does_not_say_its_end_ends_with_its_last_event(heard):
    assert heard(midi(chunk(b"\0" + on(60) + b"\x87\x40" + control(1, 5)))) == [(0, 1, 60)]


def test_every_stroke_of_a_key_that_stays_down_is_a_note(tmp_path):
    part = track((0, on(60, 1)), (480, on(60, 2)), (960, on(60, 3)), end=960)
    notes = read(tmp_path, midi(part)).notes[["start", "end", "velocity"]]
    assert notes.tolist() == [(0, 0.5, 1), (0.5, 1, 2), (1, 2, 3)]


def test_a_missing_release_is_that_of_an_early_stroke(tmp_path):
    """As in MAESTRO, once: the later stroke must not ring until the piece is over."""
    part = track((0, on(60)), *note(60, 960, 1200), *note(60, 1440, 1680), end=96000)
    assert read(tmp_path, midi(part)).notes["end"].tolist() == [1, 1.25, 1.75]


def test_a_stroke_at_the_tick_of_the_release_is_another_note_in_either_order(heard):
    for pair in ((off(60), on(60)), (on(60), off(60))):
        part = track((0, on(60)), *((480, event) for event in pair), (960, off(60)))
        assert heard(midi(part)) == [(0, 0.5, 60), (0.5, 1, 60)]


def test_hands_in_two_tracks_on_one_channel_release_their_own_keys(tmp_path):
    left, right = track((0, on(60, 10)), (1920, off(60))), track((480, on(60, 20)), (960, off(60)))
    notes = read(tmp_path, midi(left, right)).notes
    assert notes[["start", "end", "velocity"]].tolist() == [(0, 2, 10), (0.5, 1, 20)]


def test_a_string_is_damped_by_whoever_strikes_it_next(heard):
    left = track(*note(60, 0, 2880), *note(60, 0, 2880))
    right = track(*note(60, 0, 480, 1), *note(60, 960, 1440, 1))
    assert heard(midi(left, right)) == [(0, 0.5, 60), (0, 1, 60), (0, 1, 60), (1, 1.5, 60)]


@pytest.mark.parametrize("number", [120, 123, 124, 125, 126, 127])
def test_all_notes_off_releases_its_channel_in_every_track(heard, number):
    left = track((0, on(48)), (0, on(50, 64, 1)), end=1920)
    right = track((480, on(72)), (960, control(number, 0)), end=960)
    assert heard(midi(left, right)) == [(0, 1, 48), (0, 2, 50), (0.5, 1, 72)]


def test_after_all_notes_off_strokes_and_releases_begin_anew(heard):
    part = track((0, on(60)), (480, control(123, 0)), *note(60, 960, 1440), end=9600)
    assert heard(midi(part)) == [(0, 0.5, 60), (1, 1.5, 60)]


def test_the_pedal_outlasts_all_notes_off_and_not_all_sound_off(heard):
    for number, end in ((123, 3), (120, 1)):
        part = track(*pedal(0, 2880), (0, on(60)), (960, control(number, 0)))
        assert heard(midi(part)) == [(0, end, 60)]


# --- pedals


def test_the_pedal_holds_over_tracks_and_programs(heard):
    hands = track(*note(60, 0, 240), *note(62, 1920, 2160))
    foot = track(*pedal(0, 960), (480, program(1)), (1200, program(0)))
    assert heard(midi(hands, foot)) == [(0, 1, 60), (2, 2.25, 62)]


def test_a_pedal_in_a_track_without_notes_and_on_a_channel_of_its_own_is_the_pianos(heard):
    hands = track(*note(72, 0, 240)), track(*note(48, 0, 240, 2))
    foot = track((0, program(5, 1)), *pedal(0, 960, 1))
    assert heard(midi(*hands, foot)) == [(0, 1, 48), (0, 1, 72)]


def test_other_instruments_keep_their_pedals_to_themselves(heard):
    piano = track(*note(60, 0, 240))
    harp = track((0, program(46, 3)), *pedal(0, 960, 3), *note(72, 0, 240, 3))
    voice = track((0, program(52, 4)), *note(76, 0, 480, 4))
    assert heard(midi(piano, harp, voice)) == [(0, 0.25, 60), (0, 1, 72), (0, 0.5, 76)]


def test_the_pianos_pedal_does_not_hold_other_instruments(heard):
    piano = track(*pedal(0, 1920), *note(48, 0, 240))
    voice = track((0, program(52, 1)), *note(72, 0, 240, 1), *note(74, 480, 720, 1))
    assert heard(midi(piano, voice)) == [(0, 2, 48), (0, 0.25, 72), (0.5, 0.75, 74)]


def test_the_order_in_which_a_channel_is_set_up_does_not_make_it_a_piano(heard):
    harp = track(*pedal(0, 960, 3), (10, program(46, 3)), *note(72, 10, 960, 3))
    assert heard(midi(track(*note(60, 0, 240)), harp))[0] == (0, 0.25, 60)


def test_an_instrument_alone_keeps_its_pedal_as_a_pedal(tmp_path):
    music = read(tmp_path, midi(track((0, program(11)), *pedal(0, 960), *note(60, 0, 240))))
    assert music.pedal.tolist() == [[0, 1]] and music.notes["end"].tolist() == [0.25]


def test_the_same_pedal_on_both_hands_channels_damps_where_it_changes(tmp_path):
    hands = [
        track(*pedal(0, 960, c), *pedal(960, 1920, c), *note(60 + c, 0, 240, c)) for c in (0, 1)
    ]
    music = read(tmp_path, midi(*hands))
    assert music.pedal.tolist() == [[0, 1], [1, 2]]
    assert sustain(music).notes["end"].tolist() == [1, 1]


def test_a_pedal_played_to_two_channels_damps_each_when_its_own_comes_up(heard):
    right, left = [], []
    for beat in range(0, 4 * 960, 960):
        right += *pedal(beat, beat + 900), *note(72, beat, beat + 240)
        left += *pedal(max(0, beat - 70), beat + 880, 1), *note(48, beat, beat + 240, 1)
    ends = {72: 900 / 960, 48: 880 / 960}
    wanted = [(float(i), round(i + ends[key], 3), key) for i in range(4) for key in (48, 72)]
    assert heard(midi(track(*right), track(*left))) == wanted


@pytest.mark.parametrize("late", [20, 50, 77, 86, 94])
def test_a_copy_that_comes_late_is_a_copy_press_by_press(heard, late):
    """Also where the next press is nearer to the late one than its own is."""
    presses = (0, 960), (1008, 1100), (1114, 2880)
    own = track(*(event for down, up in presses for event in pedal(down, up)), *note(60, 480, 1037))
    copy = track(
        *(event for down, up in presses for event in pedal(down + late, up + late, 1)),
        *note(72, 0, 10, 1),
    )
    assert (0.5, round(1100 / 960, 3), 60) in heard(midi(own, copy))


def test_a_pedal_that_is_more_than_a_copy_is_held_with_the_others(heard):
    hands = (
        track(*pedal(0, 960), *note(60, 0, 240)),
        track(*pedal(480, 1920, 1), *note(62, 480, 720, 1)),
    )
    assert heard(midi(*hands)) == [(0, 2, 60), (0.5, 2, 62)]
    right = track(*pedal(0, 960), *pedal(1920, 2880), *note(60, 1000, 1100))
    # a copy of the right hand's first span, and one span more
    left = track(*pedal(20, 980, 1), *pedal(985, 1940, 1), *note(62, 0, 240, 1))
    assert heard(midi(right, left)) == [(0, 1.021, 62), (1.042, 3, 60)]


@pytest.mark.parametrize(
    ("events", "end"),
    [
        ((off(60), control(64, 127)), 1),  # the key was up before the pedal went down
        ((control(64, 127), off(60)), 2),
        ((off(60), control(64, 0), control(64, 127)), 1),
        ((control(64, 127), control(64, 0), off(60)), 1),
        ((control(64, 127), off(60), control(64, 0)), 1),
        ((control(64, 0), control(64, 127), off(60)), 2),
    ],
)
def test_at_one_tick_the_order_of_the_file_counts(heard, tmp_path, events, end):
    data = midi(track((0, on(60)), *((960, event) for event in events), (1920, control(64, 0))))
    assert heard(data) == [(0, end, 60)]
    again = read(tmp_path, data)
    write_midi(again, tmp_path / "y.mid")
    assert np.abs(sustain(read_midi(tmp_path / "y.mid")).notes["end"] - end).max() < 1e-6


def test_a_pedal_that_is_never_lifted_rings_until_the_file_ends(heard):
    part = track((0, control(64, 127)), *note(60, 0, 240), end=1680)
    assert heard(midi(part)) == [(0, 2, 60)]


def test_reset_lifts_both_pedals_of_its_channel(heard):
    pedals = (0, control(66, 127)), (0, control(64, 127)), (960, control(121, 0))
    part = track(*note(60, 0, 240), *pedals, *note(62, 0, 240), end=960)
    assert heard(midi(part)) == [(0, 1, 60), (0, 1, 62)]


def test_the_sostenuto_pedal_holds_what_is_down_when_it_is_pressed(heard):
    part = track(
        *note(48, 0, 480), (240, control(66, 127)), *note(72, 240, 480), (1920, control(66, 0))
    )
    assert heard(midi(part)) == [(0, 2, 48), (0.25, 0.5, 72)]


def test_the_soft_pedal_and_aftertouch_end_nothing(heard):
    others = control(67, 127), b"\xa0\x3c\0", b"\xd0\0", b"\xe0\0\0"
    part = track(*note(60, 0, 960), *((240, event) for event in others))
    assert heard(midi(part)) == [(0, 1, 60)]


def test_channel_ten_is_drums_whatever_its_program_and_its_pedal_is_not_ours(heard):
    drums = track((0, program(0, 9)), *pedal(0, 960, 9), *note(40, 0, 240, 9))
    assert heard(midi(track(*note(60, 0, 240)), drums)) == [(0, 0.25, 60)]


# --- time


def test_a_tempo_counts_in_whatever_track_it_stands(heard):
    hand, clock = track(*note(60, 480, 960)), track((480, tempo(1_000_000)))
    assert heard(midi(hand, clock)) == heard(midi(clock, hand)) == [(0.5, 1.5, 60)]


def test_the_tracks_of_format_2_follow_one_another_each_at_its_own_tempo(heard):
    fast, slow = track((0, tempo(250_000)), *note(60, 0, 480), end=480), track(*note(62, 0, 480))
    assert heard(midi(fast, slow, form=2)) == [(0, 0.25, 60), (0.5, 1, 62)]


@pytest.mark.parametrize(("frames", "rate"), [(24, 24), (25, 25), (29, 30_000 / 1001), (30, 30)])
def test_film_frames_are_time_without_a_tempo(tmp_path, frames, rate):
    division = (256 - frames) << 8 | 100
    part = track((0, tempo(1_000_000)), *note(60, 0, 4800))
    end = read(tmp_path, midi(part, division=division)).notes["end"][0]
    assert end == pytest.approx(48 / rate, abs=1e-9)


@pytest.mark.parametrize("content", [b"", b"\7", b"\7\xa1", b"\0\0\0"])
def test_a_tempo_event_that_says_none_changes_nothing(heard, content):
    assert heard(midi(track((0, meta(0x51, content)), *note(60, 0, 480)))) == [(0, 0.5, 60)]


def test_long_times_are_exact_and_what_comes_after_a_day_is_left_out(heard, tmp_path):
    day = 24 * 3600 * SECOND
    late = *note(62, day - 4800, day - 3840), *note(64, day, 2 * day), (2 * day, on(65))
    part = track(*note(60, 0, 960), *late, end=2**28 - 1)
    assert heard(midi(part)) == [(0, 1, 60), (86395, 86396, 62)]
    with pytest.raises(UserError, match="no notes in its first 24 hours"):
        read(tmp_path, midi(track((2 * day, on(64)))))


# --- whole files, whatever they are wrapped in or strewn with

SCALE = midi(track(*note(60, 0, 480), *note(62, 480, 960)))
PLAYED = [(0, 0.5, 60), (0.5, 1, 62)]


def riff(*chunks, form=b"RMID"):
    body = form
    for name, data in chunks:
        body += name + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def test_riff_is_an_envelope(heard):
    assert heard(riff((b"data", SCALE))) == PLAYED
    assert heard(riff((b"LIST", b"INFO!"), (b"data", SCALE), (b"DLS ", b"sound"))) == PLAYED
    assert heard(riff((b"DISP", b"MThd  :)"), (b"data", SCALE))) == PLAYED, (
        "a title that looks like a header"
    )
    assert heard(riff((b"data", b""), (b"data", SCALE))) == PLAYED
    streamed = riff((b"data", SCALE)).replace(
        len(SCALE).to_bytes(4, "little") + SCALE, bytes(4) + SCALE
    )
    assert heard(streamed) == PLAYED, "the size was not known when it was written"
    assert (
        heard(riff((b"LIST", b"odd and not padded")).replace(b"padded", b"padde") + SCALE) == PLAYED
    )


def test_the_tracks_that_are_there_count_and_not_the_headers_number_of_them(heard):
    hands = track(*note(60, 0, 480)), track(*note(62, 480, 960))
    for number in (0, 1, 2, 9):
        whole = bytearray(midi(*hands))
        whole[11] = number
        assert heard(bytes(whole)) == PLAYED
        assert heard(bytes(whole) + b"\0" * 5) == PLAYED, "padded with zeros"
        if number < 2:  # the second track is not counted: nobody promised that it is whole
            assert heard(bytes(whole)[:-1]) == PLAYED[:1]
        else:
            with pytest.raises(UserError, match="track 2 is cut short"):
                heard(bytes(whole)[:-1])
    first = bytearray(midi(track(), chunk(b"abc", b"XFIH"), hands[0]))
    first[11] = 1
    assert heard(bytes(first)) == PLAYED[:1]


@pytest.mark.parametrize(
    "behind",
    [b"MTrk", b"MTrk\0\0\1\0abc", chunk(b"\0\x90"), chunk(b"abc", b"XFIH"), b"\x1a", b"text"],
)
def test_behind_the_tracks_that_are_counted_anything_may_lie(heard, behind):
    assert heard(SCALE + behind) == PLAYED


@pytest.mark.parametrize("kind", [kind for kind in (*range(0x60), 0x7F) if kind != 0x2F])
def test_an_empty_meta_event_of_any_kind_but_the_end_does_no_harm(heard, kind):
    part = track((0, meta(kind)), (0, on(60)), (480, meta(kind)), (480, off(60)))
    assert heard(midi(part)) == [(0, 0.5, 60)]


STREWN = {
    "an escape": b"\xf7\x03\x90\x3d\x40",
    "an empty escape": b"\xf7\0",
    "system exclusive": b"\xf0\x05\x7e\x7f\x09\x01\xf7",
    "system exclusive in packets": b"\xf0\x03\x43\x12\0" + b"\0\xf7\x02\x43\xf7",
    "a length in more bytes than it needs": b"\xff\x01\x80\x02ab",
    "a length in many more": b"\xff\x01\x80\x80\x80\x80\x80\x02ab",
    "real time": b"\xf8",
    "active sensing": b"\xfe",
    "a song position": b"\xf2\x01\x02",
    "a song": b"\xf3\x01",
}


@pytest.mark.parametrize("name", STREWN)
def test_what_a_keyboard_does_not_obey_is_passed_over(heard, name):
    assert heard(midi(track(*note(60, 0, 480), (240, STREWN[name])))) == [(0, 0.5, 60)]


def test_running_status_goes_on_after_meta_events_and_real_time(heard):
    between = (0, meta(1, b"\x93 text")), (10, b"\xf8")
    part = track(
        (0, on(60)), *between, (20, bytes((64, 64))), (480, bytes((60, 0))), (960, bytes((64, 0)))
    )
    assert heard(midi(part)) == [(0, 0.5, 60), (0.021, 1, 64)]


def test_running_status_of_one_byte_events(heard):
    ones = (0, program(3)), (10, b"\4"), (20, b"\5"), (30, b"\xd0\1"), (40, b"\2")
    part = track(*ones, *note(60, 20, 960))
    assert heard(midi(part)) == [(0.021, 1, 60)]


def test_a_longer_header_and_foreign_chunks_are_passed_over(heard):
    header = b"MThd" + struct.pack(">IHHH", 8, 1, 1, 480) + b"??"
    assert heard(header + chunk(b"abc", b"XFIH") + SCALE[14:]) == PLAYED


def test_bytes_behind_the_last_track_do_no_harm(heard):
    assert heard(SCALE + b"\0\x1a\0") == PLAYED
    assert heard(SCALE[:11] + b"\x09" + SCALE[12:]) == PLAYED, (
        "nor do tracks that were only announced"
    )


BROKEN = {
    "format 3": (midi(track(), form=3), "format 3"),
    "no clock": (midi(track(), division=0), "no ticks"),
    "no frames": (midi(track(), division=0xE700), "no ticks"),
    "slow film": (midi(track(), division=0xF428), "12 frames a second"),
    "short header": (b"MThd\0\0\0\4\0\0\0\1", "header"),
    "cut track": (SCALE[:-6], "track 1 is cut short"),
    "cut second track": (midi(track(), track((0, on(60))))[:-1], "track 2 is cut short"),
    "cut event": (midi(track((0, on(60)), (0, b"\xff\1\x7f"))), "track 1 is cut short at byte 26"),
    "nothing to run on": (midi(track((0, bytes((60, 64))))), "no MIDI event at byte 22"),
    "nothing after exclusive": (
        midi(track((0, on(60)), (0, b"\xf0\1A"), (0, b"@@"))),
        "no MIDI event",
    ),
    "a key of 200": (midi(track((0, b"\x90\xc8\x40"))), "no MIDI event"),
    "a time of five bytes": (midi(track((0, b"\x81\x80\x80\x80\0" + on(60)))), "no MIDI event"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_damaged_file_is_refused_for_its_true_reason(tmp_path, case):
    data, reason = BROKEN[case]
    with pytest.raises(
        UserError, match=f"damaged MIDI file, its .*{reason}.*: export it again"
    ) as caught:
        read(tmp_path, data)
    assert "\n" not in str(caught.value)


def test_riff_without_midi_is_no_midi_file(tmp_path):
    for data in (riff((b"fmt ", bytes(16)), form=b"WAVE"), riff((b"data", b"nothing"))):
        with pytest.raises(UserError, match="not a MIDI file"):
            read(tmp_path, data)


# --- what is written is read


def random_music(rng: np.random.Generator) -> Music:
    """Notes on few keys that overlap and nest,
    and a pedal that changes within a tick; all on ticks.
    """
    count = rng.choice([1, 3, 40, 300])
    start = np.sort(rng.integers(0, rng.choice([5, 500, 50_000]), count))
    end = start + rng.integers(1, rng.choice([2, 50, 3000]) + 1, count)
    edges = np.sort(rng.integers(0, end.max() + 500, 2 * rng.choice([0, 1, 30])))
    if rng.random() < 0.5:  # legato pedalling: up and down again at once
        edges[2::2] = edges[1:-1:2]
    pitch, velocity = (
        rng.integers(58, 58 + rng.choice([1, 5, 40]), count),
        rng.integers(1, 128, count),
    )
    notes = make_notes(start / SECOND, end / SECOND, pitch, velocity)
    return Music(notes, edges.reshape(-1, 2) / SECOND)


def test_writing_and_reading_again_is_the_identity(tmp_path):
    for seed in range(80):
        before = random_music(np.random.default_rng(seed))
        write_midi(before, tmp_path / "x.mid")
        after = read_midi(tmp_path / "x.mid")
        for name in ("pitch", "velocity"):
            assert (after.notes[name] == before.notes[name]).all(), seed
        for name in ("start", "end"):  # but for rounding, and for what came first within a tick
            assert np.abs(after.notes[name] - before.notes[name]).max() < 2e-9, seed
        assert after.pedal.shape == before.pedal.shape, seed
        assert np.abs(after.pedal - before.pedal).max(initial=0) < 1e-9, seed
        assert np.abs(sustain(after).notes["end"] - sustain(before).notes["end"]).max() < 2e-9, seed


def test_any_file_that_was_read_is_written_and_read_again_as_it_was(tmp_path):
    """The second time to the last bit: from then on all times lie on ticks."""
    kept = 0
    for seed in range(60):
        try:
            first = read(tmp_path, random_file(f"again {seed}"))
        except UserError:
            continue
        write_midi(first, tmp_path / "a.mid")
        second = read_midi(tmp_path / "a.mid")
        write_midi(second, tmp_path / "b.mid")
        third = read_midi(tmp_path / "b.mid")
        assert len(second.notes) == len(first.notes), seed
        assert len(second.pedal) == len(first.pedal), seed
        assert np.abs(second.notes["start"] - first.notes["start"]).max() <= 0.5 / SECOND + 1e-9
        assert (third.notes == second.notes).all() and (third.pedal == second.pedal).all(), seed
        kept += 1
    assert kept > 40


def test_mido_hears_what_we_write(tmp_path):
    for seed in range(20):
        music = random_music(np.random.default_rng([7, seed]))
        write_midi(music, tmp_path / "x.mid")
        assert not disagreement(tmp_path / "x.mid")
        assert len(oracle((tmp_path / "x.mid").read_bytes())) == len(music.notes)


def test_notes_that_overlap_on_one_key_have_channels_of_their_own(tmp_path):
    notes = make_notes([0, 0.5, 1, 3], [2, 2.5, 1.5, 4], [60] * 4, [1, 2, 3, 4])
    write_midi(Music(notes), tmp_path / "x.mid")
    events = read_events((tmp_path / "x.mid").read_bytes())
    strokes = events[events["status"] >> 4 == 9]
    assert (strokes["status"] & 0xF).tolist() == [0, 1, 2, 0]


def test_a_key_struck_by_twenty_hands_at_once_is_read_as_written(tmp_path):
    late = np.arange(20) / 10
    notes = make_notes(late, 10 - late, np.full(20, 60), np.arange(1, 21))
    write_midi(Music(notes, np.array([[1.0, 20.0]])), tmp_path / "x.mid")
    after = read_midi(tmp_path / "x.mid")
    assert np.abs(after.notes["end"] - notes["end"]).max() < 1e-9
    assert after.pedal.tolist() == [[1, 20]]
