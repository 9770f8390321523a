"""MIDI files made byte by byte, and an oracle of another make: what they should sound like.

mido reads the events, and plain loops join them, one note after another, by the rules of
`lib.music.keyboard`. By hand, at a larger scale than the tests:

    python tests/helpers/midi_oracle.py 1000 [SEED]    random files
    python tests/helpers/midi_oracle.py FOLDER [EVERY [FIRST]]    a folder's files, or every so many
"""

import io
import random
import struct
import sys
import tempfile
from bisect import bisect_left, bisect_right
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import mido
import numpy as np

from lib.env.errors import UserError
from lib.music.midi import variable
from lib.music.notes import LAST, Music, read_midi, sustain

QUARTER, SECOND = 480, 960  # ticks, at 120 BPM


# --- files by hand --------------------------------------------------------------------------


def on(key, velocity=64, channel=0):
    return bytes((0x90 | channel, key, velocity))


def off(key, channel=0):
    return bytes((0x80 | channel, key, 0))


def note(key, start, end, channel=0):
    return (start, on(key, 64, channel)), (end, off(key, channel))


def control(number, value, channel=0):
    return bytes((0xB0 | channel, number, value))


def program(number, channel=0):
    return bytes((0xC0 | channel, number))


def meta(kind, content=b""):
    return b"\xff" + bytes([kind]) + variable(len(content)) + content


def tempo(microseconds):
    return meta(0x51, microseconds.to_bytes(3))


def track(*events, end=0) -> bytes:
    """A track of (tick, bytes), whose end comes `end` ticks after the last;
    at one tick as they stand.
    """
    body, now = b"", 0
    for tick, event in sorted(events, key=lambda event: event[0]):
        body += variable(tick - now) + event
        now = tick
    return chunk(body + variable(end) + meta(0x2F))


def chunk(body: bytes, name: bytes = b"MTrk") -> bytes:
    return name + len(body).to_bytes(4) + body


def midi(*tracks: bytes, form: int = 1, division: int = QUARTER) -> bytes:
    return b"MThd" + struct.pack(">IHHH", 6, form, len(tracks), division) + b"".join(tracks)


def read(folder: Path, data: bytes) -> Music:
    (folder / "x.mid").write_bytes(data)
    return read_midi(folder / "x.mid")


# --- an oracle of another make --------------------------------------------------------------


def oracle(data: bytes) -> list[tuple[float, float, int, int]]:
    """(start, end, key, velocity) of every string that sounds in a file, one note after another."""
    events = joined(data)
    middle, right = ({c: spans(events, n, c) for c in range(16)} for n in (66, 64))
    changes, silences, pedals, sounds = defaultdict(list), defaultdict(list), {}, []
    for place, event in enumerate(events):
        if event.message.type == "program_change":
            changes[event.message.channel].append((place, event.message.program))
        if event.message.type == "control_change" and event.message.control == 120:
            silences[event.message.channel].append(place)
    for stroke, release in paired(events):
        message = events[stroke].message
        channel, piano = message.channel, is_piano(changes[message.channel], stroke)
        if (channel, piano) not in pedals:
            pedals[channel, piano] = [
                obeyed(events, p, changes, channel, piano) for p in (middle, right)
            ]
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
        sound[1] = min([sound[1], *starts[bisect_right(starts, sound[0]) :][:1]])
    return sorted(map(tuple, sounds))


class Event(NamedTuple):
    """A message of mido's, where it stands in the piece."""

    tick: int
    track: int
    message: mido.Message
    time: float = 0.0


def joined(data: bytes) -> list[Event]:
    """The events of all tracks in playing order, without the drums';
    each track has an end_of_track.
    """
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
        frames = 256 - (division >> 8)
        pace = 1 / ((30 / 1.001 if frames == 29 else frames) * (division & 255))
    for event in events:
        now, last = now + (event.tick - last) * pace, event.tick
        if event.message.type == "set_tempo" and division < 0x8000:
            pace = event.message.tempo / 1e6 / division
        if getattr(event.message, "channel", 0) != 9:
            timed.append(event._replace(time=now))
    return timed


def paired(events: list[Event]) -> list[tuple[int, int]]:
    """The places where each key is struck and released."""
    moves, pairs = defaultdict(list), []

    def settle(key, last):
        kept, waiting, free = [], 0, 0
        for place, stroke in moves.pop(key):
            if stroke or waiting:
                kept.append((place, stroke))
                waiting += 1 if stroke else -1
        answered, silence = set(), min(last, ends[key[0]])
        for place, stroke in reversed(kept):
            free += not stroke
            if stroke and free:
                answered.add(place)
                free -= 1
        strokes = [place for place, stroke in kept if stroke]
        pairs.extend(zip(sorted(answered), (place for place, stroke in kept if not stroke)))
        pairs.extend(
            pair for pair in zip(strokes, [*strokes[1:], silence]) if pair[0] not in answered
        )

    ends = {
        event.track: place
        for place, event in enumerate(events)
        if event.message.type == "end_of_track"
    }
    for place, (_, number, message, _) in enumerate(events):
        if message.type in ("note_on", "note_off"):
            stroke = message.type == "note_on" and message.velocity > 0
            moves[number, message.channel, message.note].append((place, stroke))
        elif message.type == "control_change" and message.control in (120, 123, 124, 125, 126, 127):
            for key in [key for key in moves if key[1] == message.channel]:
                settle(key, place)
    for key in list(moves):
        settle(key, len(events))
    return pairs


def spans(events: list[Event], number: int, channel: int) -> list[tuple[int, int]]:
    """The places between which one channel's pedal is down."""
    found, down = [], None
    for place, (_, _, message, _) in enumerate(events):
        if (
            message.type == "control_change"
            and message.channel == channel
            and message.control in (number, 121)
        ):
            pressed = message.control == number and message.value >= 64
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
    """The spans of the pedal that a note obeys:
    its channel's and, for a piano, the other pianos'.
    """
    own = pedals[channel]
    kept = list(own)
    for other in range(16) if piano else ():
        theirs = [
            span for span in pedals[other] if all(is_piano(changes[other], place) for place in span)
        ]
        if other != channel:
            kept = sorted([*kept, *(span for span in theirs if not is_copy(events, span, kept))])
    if len(kept) == len(own):
        return own
    one: list[tuple[int, int]] = []
    for down, up in kept:
        if one and events[down].time < events[one[-1][1]].time:
            one[-1] = one[-1][0], max(up, one[-1][1])
        else:
            one.append((down, up))
    return one


def is_copy(events, span: tuple[int, int], known: list[tuple[int, int]]) -> bool:
    """Whether a span is a copy of a known one.

    Its ends lie within 0.1 s of those of the known one beginning before it, or after.
    """
    if not known:
        return False
    begins = [events[down].time for down, _ in known]
    later = bisect_left(begins, events[span[0]].time)
    beside = known[max(later - 1, 0)], known[min(later, len(known) - 1)]
    apart = [
        [round(abs(events[a].time - events[b].time), 6) for a, b in zip(span, one)]
        for one in beside
    ]
    return min(map(max, apart)) <= 0.1


# --- random files ---------------------------------------------------------------------------


def random_file(seed) -> bytes:
    """One to eight tracks of everything that there are rules for, with many events at one tick."""
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
        steps = 300 if rng.random() < 0.01 else rng.choice((0, 0, 0, 1, 1, 2, 7))
        body += variable(grid * steps)
        kind, channel, key = rng.random(), rng.choice(channels), rng.choice(keys)
        if kind < 0.3:
            event = on(key, rng.choice((0, 1, 64, 127)), channel)
        elif kind < 0.6:
            event = bytes((0x80 | channel, key, rng.choice((0, 64, 127))))  # how fast it comes up
        elif kind < 0.8:
            event = control(rng.choice((64, 64, 64, 66)), rng.choice((0, 0, 63, 64, 127)), channel)
        elif kind < 0.84:
            event = control(rng.choice((120, 121, 123, 126)), 0, channel)
        elif kind < 0.88:
            event = program(rng.choice(programs), channel)
        elif kind < 0.94:
            status = rng.choice((0xA0, 0xB0, 0xD0, 0xE0)) | channel
            event = bytes((status, 7, 99))[: 2 if status >> 4 == 0xD else 3]
        elif kind < 0.96:
            event = tempo(rng.choice((20_000, 250_000, 500_000, 16_000_000)))
        elif kind < 0.98:
            # no unknown kinds: mido 1.3.3 forgets the delta time before them
            event = meta(rng.choice((1, 3, 5, 0x7F)), rng.randbytes(rng.choice((0, 1, 200))))
        else:
            event = rng.choice((b"\xf0\x03abc", b"\xf0\x02a\xf7", b"\xf7\x02\x90<", b"\xf7\x00"))
        if event[0] == run and rng.random() < 0.8:
            event = event[1:]
        elif event[0] < 0xF0:
            run = event[0]
        elif event[0] != 0xFF:
            run = None
        body += event
    if rng.random() < 0.8:
        body += variable(grid * rng.randrange(3)) + meta(0x2F)
    return chunk(body)


def disagreement(path: Path) -> str:
    """Where the reader and the oracle part; empty where they agree."""
    theirs = oracle(path.read_bytes())
    try:
        ours = sustain(read_midi(path)).notes.tolist()
    except UserError as error:
        return f"the oracle has {len(theirs)} notes, but {error}" if theirs else ""
    if len(ours) != len(theirs):
        return f"{len(ours)} notes, and {len(theirs)} of the oracle"
    by_key = [
        sorted((key, a, round(b, 6), velocity) for a, b, key, velocity in rows)
        for rows in (ours, theirs)
    ]
    apart = [pair for pair in zip(*by_key) if np.abs(np.subtract(*pair)).max() > 2e-6]
    return f"{len(apart)} of {len(ours)} notes, the first {apart[0]}" if apart else ""


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
