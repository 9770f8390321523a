"""lib.midi and lib.keyboard: a file sounds as its bytes say, whoever wrote it.

Each claim stands on a file that is made here, byte by byte. Beside them stands an oracle of another
make: mido reads the events, and a plain loop over one note after another joins them. By hand, at
a larger scale:

    python tests/test_midi.py 1000 [SEED]    random files
    python tests/test_midi.py FOLDER [EVERY [FIRST]]    every file in a folder, or every so many
"""

import io
import random
import struct
import sys
import tempfile
from bisect import bisect_right
from collections import defaultdict, deque
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import mido  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

from lib.errors import UserError  # noqa: E402
from lib.midi import read_events, variable  # noqa: E402
from lib.notes import LAST, Music, clip_repeats, make_notes, read_midi, sustain, write_midi  # noqa: E402

QUARTER, SECOND = 480, 960  # ticks, at 120 BPM


# --- files by hand --------------------------------------------------------------------------

def on(key, velocity=64, channel=0):
    return bytes((0x90 | channel, key, velocity))


def off(key, channel=0):
    return bytes((0x80 | channel, key, 0))


def control(number, value, channel=0):
    return bytes((0xB0 | channel, number, value))


def program(number, channel=0):
    return bytes((0xC0 | channel, number))


def meta(kind, content=b""):
    return b"\xff" + bytes([kind]) + variable(len(content)) + content


def tempo(microseconds):
    return meta(0x51, microseconds.to_bytes(3))


def track(*events, end=0) -> bytes:
    """A track of (tick, bytes), in ascending order, whose end comes `end` ticks after the last."""
    body, now = b"", 0
    for tick, event in events:
        body += variable(tick - now) + event
        now = tick
    body += variable(end) + meta(0x2F)
    return b"MTrk" + len(body).to_bytes(4) + body


def midi(*tracks: bytes, form: int = 1, division: int = QUARTER, count: int | None = None) -> bytes:
    count = len(tracks) if count is None else count
    return b"MThd" + struct.pack(">IHHH", 6, form, count, division) + b"".join(tracks)


def read(folder: Path, data: bytes) -> Music:
    (folder / "x.mid").write_bytes(data)
    return read_midi(folder / "x.mid")


@pytest.fixture
def heard(tmp_path):
    """(start, end, key) of the strings that sound in a file, in order; to a thousandth of a second."""
    def listen(data: bytes):
        rows = sustain(read(tmp_path, data)).notes.tolist()
        return [(round(start, 3), round(end, 3), key) for start, end, key, _ in rows]
    return listen


# --- an oracle of another make --------------------------------------------------------------

def oracle(data: bytes) -> list[tuple[float, float, int, int]]:
    """(start, end, key, velocity) of every string that sounds in a file, one note after another."""
    events = joined(data)
    middle, right = ({c: spans(events, n, c) for c in range(16)} for n in (66, 64))
    changes = {c: [(place, e.message.program) for place, e in enumerate(events)
                   if e.message.type == "program_change" and e.message.channel == c] for c in range(16)}
    silences = {c: [place for place, e in enumerate(events) if is_control(e, {120}, c)] for c in range(16)}
    pedals, sounds = {}, []
    for stroke, release in paired(events):
        message = events[stroke].message
        channel, piano = message.channel, is_piano(changes[message.channel], stroke)
        if (channel, piano) not in pedals:
            pedals[channel, piano] = [obeyed(events, pedal, changes, channel, piano) for pedal in (middle, right)]
        sostenuto, sustain_pedal = pedals[channel, piano]
        release = max([release, *(up for down, up in sostenuto if stroke < down < release < up)])
        release = max([release, *(up for down, up in sustain_pedal if down < release < up)])
        release = min([release, *(place for place in silences[channel] if place > stroke)])
        start, end = events[stroke].time, min(events[release].time, LAST)
        if 21 <= message.note <= 108 and start < LAST:
            sounds.append([start, end, message.note, message.velocity])
    strokes = defaultdict(set)
    for start, _, key, _ in sounds:
        strokes[key].add(start)
    ordered = {key: sorted(starts) for key, starts in strokes.items()}
    for sound in sounds:
        starts = ordered[sound[2]]
        sound[1] = min(sound[1], *starts[bisect_right(starts, sound[0]) :][:1], sound[1])
    return sorted(map(tuple, sounds))


class Event(NamedTuple):
    """A message of mido's, where it stands in the piece."""

    tick: int
    track: int
    message: mido.Message
    time: float = 0.0


def joined(data: bytes) -> list[Event]:
    """The events of all tracks in playing order, without the drums'; each track ends with an end_of_track."""
    division = int.from_bytes(data[12:14])
    file = mido.MidiFile(file=io.BytesIO(data), clip=True)
    events, begin = [], 0
    for number, messages in enumerate(file.tracks):
        tick = begin if file.type == 2 else 0
        if file.type == 2:
            events.append(Event(tick, number, mido.MetaMessage("set_tempo", tempo=500_000)))
        for message in messages:
            tick += message.time
            if message.type == "end_of_track":
                break
            events.append(Event(tick, number, message))
        begin = tick
        events.append(Event(tick, number, mido.MetaMessage("end_of_track")))
    events.sort(key=lambda event: (event.tick, event.message.type == "end_of_track"))
    now, last, pace, timed = 0.0, 0, 0.5 / division, []
    if division >= 0x8000:
        pace = 1 / ({24: 24, 25: 25, 29: 29.97002997, 30: 30}[256 - (division >> 8)] * (division & 255))
    for event in events:
        now, last = now + (event.tick - last) * pace, event.tick
        if event.message.type == "set_tempo" and division < 0x8000:
            pace = event.message.tempo / 1e6 / division
        if getattr(event.message, "channel", 0) != 9:
            timed.append(event._replace(time=now))
    return timed


def is_control(event: Event, numbers, channel: int) -> bool:
    message = event.message
    return message.type == "control_change" and message.channel == channel and message.control in numbers


def paired(events: list[Event]) -> list[tuple[int, int]]:
    """The places where each key is struck and released."""
    waiting, pairs = defaultdict(deque), []

    def give_up(key, last):
        strokes = [*waiting.pop(key), min(last, ends[key[0]])]
        pairs.extend(zip(strokes, strokes[1:]))

    ends = {event.track: place for place, event in enumerate(events) if event.message.type == "end_of_track"}
    for place, (_, number, message, _) in enumerate(events):
        if message.type == "note_on" and message.velocity:
            waiting[number, message.channel, message.note].append(place)
        elif message.type in ("note_on", "note_off"):
            if strokes := waiting.get((number, message.channel, message.note)):
                pairs.append((strokes.popleft(), place))
        elif message.type == "control_change" and message.control in (120, 123, 124, 125, 126, 127):
            for key in [key for key in waiting if key[1] == message.channel]:
                give_up(key, place)
    for key in list(waiting):
        give_up(key, ends[key[0]])
    return pairs


def spans(events: list[Event], number: int, channel: int) -> list[tuple[int, int]]:
    """The places between which one channel's pedal is down."""
    found, down = [], None
    for place, event in enumerate(events):
        if is_control(event, {number, 121}, channel):
            pressed = event.message.control == number and event.message.value >= 64
            if pressed and down is None:
                down = place
            if not pressed and down is not None:
                found.append((down, place))
                down = None
    return found if down is None else [*found, (down, len(events) - 1)]


def is_piano(changes: list[tuple[int, int]], place: int) -> bool:
    programs = [program for when, program in changes if when < place]
    return not programs or programs[-1] < 8


def obeyed(events, pedals, changes, channel: int, piano: bool) -> list[tuple[int, int]]:
    """The spans of the pedal that a note obeys: its channel's and, for a piano, the other pianos'."""
    kept = [list(pedals[channel])]
    for other in range(16) if piano else ():
        theirs = [span for span in pedals[other] if all(is_piano(changes[other], place) for place in span)]
        if [times(events, span) for span in theirs] not in [[times(events, span) for span in one] for one in kept]:
            kept.append(theirs)
    if len(kept) == 1:
        return kept[0]
    one: list[tuple[int, int]] = []
    for down, up in sorted(sum(kept, [])):
        if one and events[down].time < events[one[-1][1]].time:
            one[-1] = one[-1][0], max(up, one[-1][1])
        else:
            one.append((down, up))
    return one


def times(events: list[Event], span: tuple[int, int]) -> tuple[float, float]:
    return events[span[0]].time, events[span[1]].time


# --- random files ---------------------------------------------------------------------------

def random_file(seed) -> bytes:
    """One to eight tracks of everything that the reader has rules for, with many events at one tick."""
    rng = random.Random(f"midi {seed}")
    channels = rng.sample(range(16), rng.choice((1, 1, 2, 3, 5))) + [9] * (rng.random() < 0.2)
    keys = rng.sample(range(15, 115), rng.choice((1, 2, 4, 12)))
    programs = rng.choice(([0], [0, 1, 7], [0, 48], [0, 5, 11, 48, 127]))
    grid = rng.choice((1, 10, 120, 480))
    tracks = [random_track(rng, channels, keys, programs, grid) for _ in range(rng.randint(1, 8))]
    form = rng.choice((0, 1, 1, 1, 2))
    division = rng.choice((1, 96, 480, 480, 1000, 32767, 0xE728, 0xE204, 0xE3FF, 0xE850))
    return midi(*tracks, form=form, division=division)


def random_track(rng, channels, keys, programs, grid) -> bytes:
    body, run = b"", None
    for _ in range(rng.choice((0, 3, 30, 200))):
        body += variable(grid * rng.choice((0, 0, 0, 1, 1, 2, 7, 300 if rng.random() < 0.05 else 1)))
        kind, channel, key = rng.random(), rng.choice(channels), rng.choice(keys)
        if kind < 0.3:
            event = on(key, rng.choice((0, 1, 64, 127)), channel)
        elif kind < 0.6:
            event = off(key, channel)
        elif kind < 0.8:
            event = control(rng.choice((64, 64, 64, 66)), rng.choice((0, 0, 63, 64, 127)), channel)
        elif kind < 0.84:
            event = control(rng.choice((120, 121, 123, 126)), 0, channel)
        elif kind < 0.88:
            event = program(rng.choice(programs), channel)
        elif kind < 0.94:
            status = rng.choice((0xA0, 0xB0, 0xD0, 0xE0)) | channel
            event = bytes((status, 7, 99))[: 2 if status < 0xE0 and status >= 0xD0 else 3]
        elif kind < 0.96:
            event = tempo(rng.choice((20_000, 250_000, 500_000, 16_000_000)))
        elif kind < 0.98:
            event = meta(rng.choice((1, 3, 5, 0x7F)), rng.randbytes(rng.choice((0, 1, 200))))
        else:
            event = rng.choice((b"\xf0\x03abc", b"\xf0\x04ab\xf7\xf7", b"\xf7\x02\x90<", b"\xf7\x00"))[:9]
        if event[0] == run and rng.random() < 0.8:
            event = event[1:]
        elif event[0] < 0xF0:
            run = event[0]
        elif event[0] != 0xFF:
            run = None
        body += event
    if rng.random() < 0.8:
        body += variable(grid * rng.randrange(3)) + meta(0x2F)
    return b"MTrk" + len(body).to_bytes(4) + body


def disagreement(path: Path) -> str:
    """Where the reader and the oracle part; empty where they agree."""
    theirs = oracle(path.read_bytes())
    try:
        ours = sustain(read_midi(path)).notes.tolist()
    except UserError as error:
        return f"the oracle has {len(theirs)} notes, but {error}" if theirs else ""
    if len(ours) != len(theirs):
        return f"{len(ours)} notes, and {len(theirs)} of the oracle"
    by_key = [sorted((key, a, round(b, 6), velocity) for a, b, key, velocity in rows) for rows in (ours, theirs)]
    apart = [pair for pair in zip(*by_key) if np.abs(np.subtract(*pair)).max() > 2e-6]
    return f"{len(apart)} of {len(ours)} notes, the first {apart[0]}" if apart else ""


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

def test_the_first_release_answers_the_first_stroke(heard):
    part = track((0, on(60)), (96, on(64)), (192, on(60)), (960, off(60)), (1920, off(60)), (1920, off(64)))
    assert heard(midi(part)) == [(0, 0.2, 60), (0.1, 2, 64), (0.2, 2, 60)]


def test_a_release_without_a_stroke_is_nothing(heard):
    part = track((0, off(60)), (0, off(60)), (0, on(60)), (480, off(60)), (960, off(60)), (960, on(60)), (1440, off(60)))
    assert heard(midi(part)) == [(0, 0.5, 60), (1, 1.5, 60)]


def test_keys_that_stay_down_sound_until_their_own_track_ends(heard):
    left, right = track((0, on(40)), (960, on(45)), end=960), track((0, on(72)), end=4800)
    assert heard(midi(left, right)) == [(0, 2, 40), (0, 5, 72), (1, 2, 45)]


def test_a_track_that_does_not_say_its_end_ends_with_its_last_event(heard):
    body = b"\0" + on(60) + b"\x87\x40" + control(1, 5)
    assert heard(midi(b"MTrk" + len(body).to_bytes(4) + body)) == [(0, 1, 60)]


def test_every_stroke_of_a_key_that_stays_down_is_a_note(tmp_path):
    notes = read(tmp_path, midi(track((0, on(60, 1)), (480, on(60, 2)), (960, on(60, 3)), (960, on(64)), end=960))).notes
    assert notes[["start", "end", "velocity"]][notes["pitch"] == 60].tolist() == [(0, 0.5, 1), (0.5, 1, 2), (1, 2, 3)]


def test_a_stroke_at_the_tick_of_the_release_is_another_note_in_either_order(heard):
    for pair in ((off(60), on(60)), (on(60), off(60))):
        assert heard(midi(track((0, on(60)), *((480, event) for event in pair), (960, off(60))))) == [
            (0, 0.5, 60), (0.5, 1, 60)]


def test_hands_in_two_tracks_on_one_channel_release_their_own_keys(tmp_path):
    left, right = track((0, on(60, 10)), (1920, off(60))), track((480, on(60, 20)), (960, off(60)))
    notes = read(tmp_path, midi(left, right)).notes
    assert notes[["start", "end", "velocity"]].tolist() == [(0, 2, 10), (0.5, 1, 20)]


def test_a_string_is_damped_by_whoever_strikes_it_next(heard):
    left = track((0, on(60)), (0, on(60)), (2880, off(60)), (2880, off(60)))
    right = track((0, on(60, 70, 1)), (480, off(60, 1)), (960, on(60, 70, 1)), (1440, off(60, 1)))
    assert heard(midi(left, right)) == [(0, 0.5, 60), (0, 1, 60), (0, 1, 60), (1, 1.5, 60)]


@pytest.mark.parametrize("number", [120, 123, 124, 125, 126, 127])
def test_all_notes_off_releases_its_channel_in_every_track(heard, number):
    left, right = track((0, on(48)), (0, on(50, 64, 1)), end=1920), track((480, on(72)), (960, control(number, 0)), end=960)
    assert heard(midi(left, right)) == [(0, 1, 48), (0, 2, 50), (0.5, 1, 72)]


def test_after_all_notes_off_strokes_and_releases_begin_anew(heard):
    part = track((0, on(60)), (480, control(123, 0)), (960, on(60)), (1440, off(60)), end=9600)
    assert heard(midi(part)) == [(0, 0.5, 60), (1, 1.5, 60)]


def test_the_pedal_outlasts_all_notes_off_and_not_all_sound_off(heard):
    for number, end in ((123, 3), (120, 1)):
        part = track((0, control(64, 127)), (0, on(60)), (960, control(number, 0)), (2880, control(64, 0)))
        assert heard(midi(part)) == [(0, end, 60)]


# --- pedals

def test_the_pedal_holds_over_tracks_and_programs(heard):
    notes = track((0, on(60)), (240, off(60)), (1920, on(62)), (2160, off(62)))
    pedal = track((0, control(64, 127)), (480, program(1)), (960, control(64, 0)), (1200, program(0)))
    assert heard(midi(notes, pedal)) == [(0, 1, 60), (2, 2.25, 62)]


def test_a_pedal_in_a_track_without_notes_and_on_a_channel_of_its_own_is_the_pianos(heard):
    right = track((0, on(72)), (240, off(72)))
    left = track((0, program(5, 1)), (0, control(64, 127, 1)), (0, on(48, 64, 2)), (240, off(48, 2)), (960, control(64, 0, 1)))
    assert heard(midi(right, left)) == [(0, 1, 48), (0, 1, 72)]


def test_other_instruments_keep_their_pedals_to_themselves(heard):
    piano = track((0, on(60)), (240, off(60)))
    harp = track((0, program(46, 3)), (0, control(64, 127, 3)), (0, on(72, 64, 3)), (240, off(72, 3)), (960, control(64, 0, 3)))
    voice = track((0, program(52, 4)), (0, on(76, 64, 4)), (480, off(76, 4)))
    assert heard(midi(piano, harp, voice)) == [(0, 0.25, 60), (0, 1, 72), (0, 0.5, 76)]


def test_the_order_in_which_a_channel_is_set_up_does_not_make_it_a_piano(heard):
    piano = track((0, on(60)), (240, off(60)))
    harp = track((0, control(64, 127, 3)), (10, program(46, 3)), (10, on(72, 64, 3)), (960, control(64, 0, 3)), (960, off(72, 3)))
    assert heard(midi(piano, harp))[0] == (0, 0.25, 60)


def test_an_instrument_alone_keeps_its_pedal_as_a_pedal(tmp_path):
    music = read(tmp_path, midi(track((0, program(11)), (0, control(64, 127)), (0, on(60)), (240, off(60)), (960, control(64, 0)))))
    assert music.pedal.tolist() == [[0, 1]] and music.notes["end"].tolist() == [0.25]


def test_the_same_pedal_on_both_hands_channels_damps_where_it_changes(tmp_path):
    hands = [track((0, control(64, 127, c)), (0, on(60 + c, 64, c)), (240, off(60 + c, c)), (960, control(64, 0, c)),
                   (960, control(64, 127, c)), (1920, control(64, 0, c))) for c in (0, 1)]
    music = read(tmp_path, midi(*hands))
    assert music.pedal.tolist() == [[0, 1], [1, 2]]
    assert sustain(music).notes["end"].tolist() == [1, 1]


@pytest.mark.parametrize(("events", "end"), [
    ((off(60), control(64, 127)), 1),  # the key was up before the pedal went down
    ((control(64, 127), off(60)), 2),
    ((off(60), control(64, 0), control(64, 127)), 1),
    ((control(64, 127), control(64, 0), off(60)), 1),
    ((control(64, 127), off(60), control(64, 0)), 1),
    ((control(64, 0), control(64, 127), off(60)), 2),
])
def test_at_one_tick_the_order_of_the_file_counts(heard, tmp_path, events, end):
    data = midi(track((0, on(60)), *((960, event) for event in events), (1920, control(64, 0))))
    assert heard(data) == [(0, end, 60)]
    again = read(tmp_path, data)
    write_midi(again, tmp_path / "y.mid")
    assert np.abs(sustain(read_midi(tmp_path / "y.mid")).notes["end"] - end).max() < 1e-6


def test_a_pedal_that_is_never_lifted_rings_until_the_file_ends(heard):
    assert heard(midi(track((0, control(64, 127)), (0, on(60)), (240, off(60)), end=1680))) == [(0, 2, 60)]


def test_reset_lifts_both_pedals_of_its_channel(heard):
    part = track((0, on(60)), (0, control(66, 127)), (0, control(64, 127)), (0, on(62)), (240, off(60)), (240, off(62)),
                 (960, control(121, 0)), end=960)
    assert heard(midi(part)) == [(0, 1, 60), (0, 1, 62)]


def test_the_sostenuto_pedal_holds_what_is_down_when_it_is_pressed(heard):
    part = track((0, on(48)), (240, control(66, 127)), (240, on(72)), (480, off(48)), (480, off(72)), (1920, control(66, 0)))
    assert heard(midi(part)) == [(0, 2, 48), (0.25, 0.5, 72)]


def test_the_soft_pedal_and_aftertouch_end_nothing(heard):
    part = track((0, on(60)), (10, control(67, 127)), (20, b"\xa0\x3c\x00"), (30, b"\xd0\x00"), (40, b"\xe0\0\0"), (960, off(60)))
    assert heard(midi(part)) == [(0, 1, 60)]


def test_channel_ten_is_drums_whatever_its_program_and_its_pedal_is_not_ours(heard):
    drums = track((0, program(0, 9)), (0, control(64, 127, 9)), (0, on(40, 64, 9)), (960, control(64, 0, 9)))
    assert heard(midi(track((0, on(60)), (240, off(60))), drums)) == [(0, 0.25, 60)]


# --- time

def test_a_tempo_counts_in_whatever_track_it_stands(heard):
    notes, clock = track((480, on(60)), (960, off(60))), track((480, tempo(1_000_000)))
    assert heard(midi(notes, clock)) == heard(midi(clock, notes)) == [(0.5, 1.5, 60)]


def test_the_tracks_of_format_2_follow_one_another_each_at_its_own_tempo(heard):
    fast, slow = track((0, tempo(250_000)), (0, on(60)), (480, off(60)), end=480), track((0, on(62)), (480, off(62)))
    assert heard(midi(fast, slow, form=2)) == [(0, 0.25, 60), (0.5, 1, 62)]


@pytest.mark.parametrize(("frames", "rate"), [(24, 24), (25, 25), (29, 30_000 / 1001), (30, 30)])
def test_film_frames_are_time_without_a_tempo(tmp_path, frames, rate):
    division = (256 - frames) << 8 | 100
    notes = read(tmp_path, midi(track((0, tempo(1_000_000)), (0, on(60)), (4800, off(60))), division=division)).notes
    assert notes["end"][0] == pytest.approx(48 / rate, abs=1e-9)


@pytest.mark.parametrize("content", [b"", b"\7", b"\7\xa1", b"\0\0\0"])
def test_a_tempo_event_that_says_none_changes_nothing(heard, content):
    assert heard(midi(track((0, meta(0x51, content)), (0, on(60)), (480, off(60))))) == [(0, 0.5, 60)]


def test_long_times_are_exact_and_what_comes_after_a_day_is_left_out(heard, tmp_path):
    day = 24 * 3600 * SECOND
    part = track((0, on(60)), (960, off(60)), (day - 4800, on(62)), (day - 3840, off(62)), (day, on(64)), (2 * day, off(64)),
                 (2 * day, on(65)), end=2**28 - 1)
    assert heard(midi(part)) == [(0, 1, 60), (86395, 86396, 62)]
    with pytest.raises(UserError, match="no notes in its first 24 hours"):
        read(tmp_path, midi(track((2 * day, on(64)))))


# --- whole files, whatever they are wrapped in or strewn with

SCALE = midi(track((0, on(60)), (480, off(60)), (480, on(62)), (960, off(62))))
PLAYED = [(0, 0.5, 60), (0.5, 1, 62)]


def riff(*chunks, form=b"RMID"):
    body = form + b"".join(name + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2) for name, data in chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


@pytest.mark.parametrize("data", [riff((b"data", SCALE)), riff((b"LIST", b"INFO!"), (b"data", SCALE), (b"DLS ", b"sound"))])
def test_riff_is_an_envelope(heard, data):
    assert heard(data) == PLAYED


@pytest.mark.parametrize("kind", [*range(0x60), 0x7F])
def test_an_empty_meta_event_of_any_kind_but_the_end_does_no_harm(heard, kind):
    if kind != 0x2F:
        assert heard(midi(track((0, meta(kind)), (0, on(60)), (480, meta(kind)), (480, off(60))))) == [(0, 0.5, 60)]


STREWN = {
    "an escape": b"\xf7\x03\x90\x3d\x40",
    "an empty escape": b"\xf7\0",
    "system exclusive": b"\xf0\x05\x7e\x7f\x09\x01\xf7",
    "system exclusive in packets": b"\xf0\x03\x43\x12\0" + b"\0\xf7\x02\x43\xf7",
    "a length in more bytes than it needs": b"\xff\x01\x80\x02ab",
    "real time": b"\xf8", "active sensing": b"\xfe", "song position": b"\xf2\x01\x02", "song": b"\xf3\x01",
}


@pytest.mark.parametrize("name", STREWN)
def test_what_a_keyboard_does_not_obey_is_passed_over(heard, name):
    assert heard(midi(track((0, on(60)), (240, STREWN[name]), (480, off(60))))) == [(0, 0.5, 60)]


def test_running_status_goes_on_after_meta_events_and_real_time(heard):
    part = track((0, on(60)), (0, meta(1, b"\x93 text")), (0, bytes((64, 64))), (10, b"\xf8"), (480, bytes((60, 0))), (960, bytes((64, 0))))
    assert heard(midi(part)) == [(0, 0.5, 60), (0, 1, 64)]


def test_running_status_of_one_byte_events(heard):
    part = track((0, program(3)), (10, b"\4"), (20, b"\5"), (20, on(60)), (30, b"\xd0\1"), (40, b"\2"), (960, off(60)))
    assert heard(midi(part)) == [(0.021, 1, 60)]


def test_a_longer_header_and_foreign_chunks_are_passed_over(heard):
    body = SCALE[14:]
    header = b"MThd" + struct.pack(">IHHH", 8, 1, 1, 480) + b"??"
    assert heard(header + b"XFIH\0\0\0\3abc" + body) == PLAYED


def test_bytes_behind_the_last_track_do_no_harm(heard):
    assert heard(SCALE + b"\0\x1a\0") == PLAYED
    assert heard(SCALE[:11] + b"\x09" + SCALE[12:]) == PLAYED, "nor do tracks that were only announced"


BROKEN = {
    "format 3": (midi(track(), form=3), "format 3"),
    "no clock": (midi(track(), division=0), "no ticks"),
    "no frames": (midi(track(), division=0xE700), "no ticks"),
    "slow film": (midi(track(), division=0xF428), "12 frames a second"),
    "short header": (b"MThd\0\0\0\4\0\0\0\1", "header"),
    "cut track": (SCALE[:-6], "track 1 is cut short"),
    "cut second track": (midi(track(), track((0, on(60))))[:-1], "track 2 is cut short"),
    "cut event": (midi(track((0, on(60)), (0, b"\xff\1\x7f"))), "track 1 is cut short at byte 26"),
    "nothing to run on": (midi(track((0, bytes((60, 64))))), "byte 22 that is no MIDI event"),
    "running on after exclusive": (midi(track((0, on(60)), (0, b"\xf0\1\x41"), (0, bytes((64, 64))))), "no MIDI event"),
    "a key of 200": (midi(track((0, b"\x90\xc8\x40"))), "no MIDI event"),
    "a time of five bytes": (midi(track((0, b"\x81\x80\x80\x80\0" + on(60)))), "no MIDI event"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_damaged_file_is_refused_for_its_true_reason(tmp_path, case):
    data, reason = BROKEN[case]
    with pytest.raises(UserError, match=f"damaged MIDI file, its .*{reason}.*: export it again") as caught:
        read(tmp_path, data)
    assert "\n" not in str(caught.value)


def test_riff_without_midi_is_no_midi_file(tmp_path):
    for data in (riff((b"fmt ", bytes(16)), form=b"WAVE"), riff((b"data", b"nothing"))):
        with pytest.raises(UserError, match="not a MIDI file"):
            read(tmp_path, data)


# --- what is written is read

def random_music(rng: np.random.Generator) -> Music:
    """Notes on few keys that overlap and nest, and a pedal that changes within a tick; on the grid of ticks."""
    count = rng.choice([1, 3, 40, 300])
    start = np.sort(rng.integers(0, rng.choice([5, 500, 50_000]), count))
    end = start + rng.integers(1, rng.choice([2, 50, 3000]) + 1, count)
    edges = np.sort(rng.integers(0, end.max() + 500, 2 * rng.choice([0, 1, 30])))
    if rng.random() < 0.5:  # legato pedalling: up and down again at once
        edges[2::2] = edges[1:-1:2]
    second = start / SECOND, end / SECOND
    return Music(make_notes(*second, rng.integers(58, 58 + rng.choice([1, 5, 40]), count), rng.integers(1, 128, count)),
                 edges.reshape(-1, 2) / SECOND)


def test_writing_and_reading_again_is_the_identity(tmp_path):
    for seed in range(80):
        before = random_music(np.random.default_rng(seed))
        write_midi(before, tmp_path / "x.mid")
        after = read_midi(tmp_path / "x.mid")
        for name in ("pitch", "velocity"):
            assert (after.notes[name] == before.notes[name]).all(), seed
        for name in ("start", "end"):  # but for the last bits, and for what came first within a tick
            assert np.abs(after.notes[name] - before.notes[name]).max() < 2e-9, seed
        assert after.pedal.shape == before.pedal.shape and np.abs(after.pedal - before.pedal).max(initial=0) < 1e-9
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
        assert len(second.notes) == len(first.notes) and len(second.pedal) == len(first.pedal), seed
        assert np.abs(np.sort(second.notes["start"]) - np.sort(first.notes["start"])).max() <= 0.5 / SECOND + 1e-6
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
    notes = make_notes([0, 0.5, 1, 3], [2.5, 2, 1.5, 4], [60] * 4, [1, 2, 3, 4])
    write_midi(Music(notes), tmp_path / "x.mid")
    events = read_events((tmp_path / "x.mid").read_bytes())
    strokes = events[events["status"] >> 4 == 9]
    assert (strokes["status"] & 0xF).tolist() == [0, 1, 2, 0]


def test_a_key_struck_by_twenty_hands_at_once_is_read_as_written(tmp_path):
    count = 20
    notes = make_notes(np.arange(count) / 10, 10 - np.arange(count) / 10, np.full(count, 60), np.arange(1, count + 1))
    write_midi(Music(notes, np.array([[1.0, 20.0]])), tmp_path / "x.mid")
    after = read_midi(tmp_path / "x.mid")
    assert np.abs(after.notes["end"] - notes["end"]).max() < 1e-3 and after.pedal.tolist() == [[1, 20]]


# --- by hand --------------------------------------------------------------------------------

def main() -> None:
    """Compare with the oracle: random files, or every so many files in a folder."""
    wanted, *more = sys.argv[1:]
    numbers = [int(word) for word in more]
    with tempfile.TemporaryDirectory() as folder:
        if Path(wanted).is_dir():
            every, first = numbers or (1, 0)
            paths = sorted(Path(wanted).rglob("*.mid*"))[first::every]
        else:
            paths = [Path(folder) / f"{number}.mid" for number in range(int(wanted))]
            for number, path in enumerate(paths):
                path.write_bytes(random_file(f"{numbers or [0]} {number}"))
        apart = {path.name: said for path in paths if (said := disagreement(path))}
    for name, said in apart.items():
        print(f"{name}: {said}")
    print(f"{len(paths) - len(apart)} of {len(paths)} files agree")


if __name__ == "__main__":
    main()
