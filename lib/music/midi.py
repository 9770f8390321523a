"""Standard MIDI Files, byte by byte: read every event that a keyboard obeys, write a file.

A file may come from anywhere and be damaged, so nothing is trusted: each track is walked with
regular expressions, which run in C, and every length is held against the bytes that are there. What
the walk finds is then decoded at once, as arrays. Source: *Standard MIDI Files 1.0* (RP-001).
"""

import re
from array import array
from collections.abc import Iterable

import numpy as np

# What `read_events` gives. `status` is that of MIDI (note on is 0x90 | channel), or END where a
# track ends; `first` and `second` are its data bytes.
BYTES = [(name, "u1") for name in ("status", "first", "second")]
EVENT = np.dtype([("time", "f8"), ("track", "u2"), *BYTES])
END = 0xFF
NOTE_OFF, NOTE_ON, CONTROL, PROGRAM = 0x8, 0x9, 0xB, 0xC  # the upper half of a status
SUSTAIN, SOSTENUTO = 64, 66  # controllers: the right and the middle pedal
SOUND_OFF, RESET = 120, 121
NOTES_OFF = range(123, 128)  # 124 to 127 change the mode, and end all notes too
HEARD = np.isin(np.arange(256), [SUSTAIN, SOSTENUTO, SOUND_OFF, RESET, *NOTES_OFF])

MOST_TRACKS = 0xFFFF  # that a header can count
END_OF_TRACK, TEMPO = 0x2F, 0x51  # kinds of meta event
DEFAULT_TEMPO = 500_000  # microseconds a quarter note: 120 BPM, until a file says otherwise
TEMPO_120 = b"\xff\x51\x03" + DEFAULT_TEMPO.to_bytes(3)  # the event that says so
END_NOW = b"\x00\xff\x2f\x00"  # the end of a track, at once
FRAMES = {24: 24.0, 25: 25.0, 29: 30_000 / 1001, 30: 30.0}  # a second, where frames are counted

# A delta time has one to four bytes, only the last below 0x80, and some writers pad it with empty
# ones. A channel event has one or two data bytes below 0x80 and, under "running status", no
# status byte of its own. RUN_* go on from an event of the same kind, 4096 events a match to bound
# the memory.
DELTA = rb"\x80{0,8}[\x80-\xff]{0,3}[\x00-\x7f]"
TWO = re.compile(DELTA + rb"[\x80-\xbf\xe0-\xef][\x00-\x7f]{2}")  # notes, controllers, pitch bend
ONE = re.compile(DELTA + rb"[\xc0-\xdf][\x00-\x7f]")  # program, pressure on a channel
RUN_TWO = re.compile(rb"(?:%b[\x80-\xbf\xe0-\xef]?[\x00-\x7f]{2}){1,4096}" % DELTA)
RUN_ONE = re.compile(rb"(?:%b[\xc0-\xdf]?[\x00-\x7f]){1,4096}" % DELTA)
DATA = {RUN_TWO: 2, RUN_ONE: 1}  # data bytes of an event
# Meta events, system exclusive and escapes say how long they are; other system messages need not.
LONG = re.compile(rb"(%b)(?:\xff([\x00-\x7f])|[\xf0\xf7])(%b)" % (DELTA, DELTA))
SYSTEM = re.compile(
    rb"(%b)(?:[\xf6\xf8\xfa-\xfc\xfe]|[\xf1\xf3][\x00-\x7f]|\xf2[\x00-\x7f]{2})" % DELTA
)


class Walk:
    """What a walk over a file finds, not yet decoded.

    A stretch is a run of channel events with equally many data bytes, or one other event: where it
    begins and ends (the other event: where its delta time does), data bytes an event, and track.
    """

    def __init__(self) -> None:
        self.stretches = array("q")  # four numbers each
        self.tempos = array("q")  # of each tempo event: its stretch, and microseconds a quarter

    def add(self, begin: int, end: int, data: int, track: int) -> None:
        """Note a stretch."""
        self.stretches.extend((begin, end, data, track))


# --- reading --------------------------------------------------------------------------------


def read_events(data: bytes) -> np.ndarray:
    """The events of a MIDI file that a keyboard obeys, (E,) of `EVENT`, in playing order.

    These are notes, pedals 64 and 66, programs, and what ends notes or lifts pedals, on every
    channel, and an END a track; times are in seconds. Events at one tick come in the order of the
    file, track after track. Tempo changes count wherever they stand, and the tracks of a format 2
    file follow one another. Raises `ValueError` with a phrase that says what is wrong.
    """
    form, count, division, position = _header(data)
    walk = _walk(data, position, count)
    stretches = np.array(walk.stretches).reshape(-1, 4)
    stretch, delta, status, first, second = _decode(data, stretches)
    track = stretches[stretch, 3]
    opening = np.flatnonzero(np.diff(track, prepend=-1))  # each track's first event
    last = np.append(opening[1:], len(track))[: len(opening)] - 1
    tick = np.cumsum(delta)  # as if each track began where the one before it ends
    opens = (tick - delta)[opening]
    if form != 2:  # no, they begin together
        tick -= np.repeat(opens, last - opening + 1)

    kind = status >> 4
    obeyed = (kind == NOTE_OFF) | (kind == NOTE_ON) | (kind == PROGRAM)
    obeyed |= (kind == CONTROL) & HEARD[first]
    rows = np.concatenate((np.flatnonzero(obeyed), last))
    order = np.argsort(tick[rows], kind="stable")
    is_end = order >= len(rows) - len(last)
    rows = rows[order]
    events = np.empty(len(rows), EVENT)
    events["status"] = np.where(is_end, END, status[rows])
    events["track"], events["first"], events["second"] = track[rows], first[rows], second[rows]

    number, tempo = np.array(walk.tempos).reshape(-1, 2).T
    number = np.searchsorted(stretch, number)
    change = tick[number]
    if form == 2:  # a track does not inherit its neighbour's tempo
        number = np.concatenate((opening, number))
        change = np.concatenate((opens, change))
        tempo = np.concatenate((np.full(len(opening), DEFAULT_TEMPO), tempo))
    order = np.lexsort((number, change))
    events["time"] = _seconds(tick[rows], change[order], tempo[order], division)
    return events


def unwrapped(data: bytes) -> bytes:
    """The MIDI file in a RIFF envelope: its chunk "data".

    What is no such envelope comes back as it is.
    """
    if data[:4] != b"RIFF" or data[8:12] != b"RMID":
        return data
    position = 12
    while position + 8 <= len(data):
        name, begin = data[position : position + 4], position + 8
        size = int.from_bytes(data[position + 4 : begin], "little")
        if name == b"data" and data[begin : begin + 4] == b"MThd":
            return data[begin : begin + size] if size else data[begin:]  # 0: it was not known yet
        position = begin + size + size % 2  # chunks begin at even places
    return data[max(0, data.find(b"MThd")) :]


def _header(data: bytes) -> tuple[int, int, int, int]:
    """Format, number of tracks, division, and where the first track begins."""
    size = int.from_bytes(data[4:8])
    form, count, division = (int.from_bytes(data[i : i + 2]) for i in (8, 10, 12))
    if data[:4] != b"MThd" or size < 6 or len(data) < 14:
        raise ValueError("its header is cut short")
    if form > 2:
        raise ValueError(f"its header says format {form}, and there are 0, 1 and 2")
    if not division & (0xFF if division >= 0x8000 else 0x7FFF):
        raise ValueError("its header gives no ticks to count time with")
    if division >= 0x8000 and _frames(division) not in FRAMES:
        raise ValueError(f"its header says {_frames(division)} frames a second, not 24, 25, 29, 30")
    return form, count, division, 8 + size


def _frames(division: int) -> int:
    """Frames a second, of a header that counts them: the upper byte is negative."""
    return 256 - (division >> 8)


def _walk(data: bytes, position: int, count: int) -> Walk:
    """Walk over the tracks, the first of which begins at `position`.

    The header's `count` may be too small or too large: what is there is read. Behind the tracks
    that it counts anything may lie, and a track there counts if it is whole; zeros may end a file.
    """
    walk, track = Walk(), 0
    content = len(data.rstrip(b"\0"))
    while position < content and track < MOST_TRACKS:
        begin = position + 8
        end = begin + int.from_bytes(data[position + 4 : begin])
        known = len(walk.stretches), len(walk.tempos)
        try:
            if end > len(data):
                raise ValueError(f"its track {track + 1} is cut short")
            if data[position : position + 4] == b"MTrk":  # other chunks are for other programs
                _walk_track(data, begin, end, track, walk)
                track += 1
        except ValueError:
            if track < max(count, 1):
                raise
            del walk.stretches[known[0] :], walk.tempos[known[1] :]
            break
        position = end
    return walk


def _walk_track(data: bytes, position: int, end: int, track: int, walk: Walk) -> None:
    """Walk over the events of the track in data[position:end], up to its end of track."""
    run = None  # what running status continues with
    while position < end:
        if run and (events := run.match(data, position, end)):
            walk.add(position, events.end(), DATA[run], track)
            position = events.end()
        elif TWO.match(data, position, end):
            run = RUN_TWO
        elif ONE.match(data, position, end):
            run = RUN_ONE
        elif event := LONG.match(data, position, end):
            walk.add(position, event.end(1), 0, track)
            content = event.end()
            position = content + _number(event[3])
            if position > end:
                raise ValueError(f"its track {track + 1} is cut short at byte {event.start()}")
            meta = event[2] and event[2][0]
            if meta == END_OF_TRACK:
                return
            tempo = data[content : min(content + 3, position)] if meta == TEMPO else b""
            if len(tempo) == 3 and any(tempo):  # one that is empty, or 0, changes nothing
                walk.tempos.extend((len(walk.stretches) // 4 - 1, int.from_bytes(tempo)))
            run = None if meta is None else run
        elif event := SYSTEM.match(data, position, end):
            walk.add(position, event.end(1), 0, track)
            position = event.end()
        else:
            raise ValueError(f"its track {track + 1} has no MIDI event at byte {position}")


def _number(digits: bytes) -> int:
    """A variable-length number: seven bits a byte, the highest first."""
    value = 0
    for byte in digits:
        value = value << 7 | byte & 0x7F
    return value


def _decode(data: bytes, stretches: np.ndarray) -> tuple[np.ndarray, ...]:
    """The stretch of each event, its delta time, status, and two bytes of data; all of shape (E,).

    In a stretch every event has as many bytes below 0x80: the last of its delta time, and its data.
    """
    raw = np.frombuffer(data + bytes(2), "u1")
    begin, end, size = stretches[:, 0], stretches[:, 1], 1 + stretches[:, 2]
    low = np.flatnonzero(raw < 0x80)
    first = np.searchsorted(low, begin)
    count = (np.searchsorted(low, end) - first) // size  # events in each stretch
    stretch = np.repeat(np.arange(len(count)), count)
    nth = np.arange(len(stretch)) - np.repeat(np.cumsum(count) - count, count)
    at = low[first[stretch] + nth * size[stretch]]  # the last byte of each delta time

    delta = raw[at].astype("i8")
    more = np.ones(len(at), bool)
    for i in (1, 2, 3):
        byte = raw[at - i]
        more &= (byte >= 0x80) & (at - i >= begin[stretch])
        delta += np.where(more, byte & 0x7F, 0).astype("i8") << 7 * i

    lead = raw[at + 1]
    own = lead >= 0x80
    speaks = np.where(own & (lead < 0xF0), np.arange(len(at)), 0)
    running = lead[np.maximum.accumulate(speaks)]  # the last status byte of a channel event
    at += 1 + own
    return stretch, delta, np.where(own, lead, running), raw[at], raw[at + 1]


def _seconds(
    tick: np.ndarray, tempo_tick: np.ndarray, tempo: np.ndarray, division: int
) -> np.ndarray:
    """Ticks as seconds: counted in film frames, or in quarters under the tempos in force."""
    if division >= 0x8000:
        return tick / (FRAMES[_frames(division)] * (division & 0xFF))
    change = np.append(0, tempo_tick).astype("f8")
    factor = np.append(DEFAULT_TEMPO, tempo) / (1e6 * division)  # seconds a tick
    at = np.append(0.0, np.cumsum(np.diff(change) * factor[:-1]))
    row = np.searchsorted(change, tick, side="right") - 1
    return at[row] + (tick - change[row]) * factor[row]


# --- writing --------------------------------------------------------------------------------


def variable(value: int) -> bytes:
    """A number below 2^28 in MIDI's variable-length form: seven bits a byte, the highest first."""
    out = [value & 0x7F]
    while value := value >> 7:
        out.append(0x80 | value & 0x7F)
    return bytes(reversed(out))


def track_chunk(ticks: Iterable[int], messages: Iterable[bytes]) -> bytes:
    """A track of messages at ascending ticks, each with its status byte."""
    body, now = bytearray(), 0
    for tick, message in zip(ticks, messages):
        body += variable(tick - now) + message
        now = tick
    body += END_NOW
    return b"MTrk" + len(body).to_bytes(4) + body


def midi_file(tracks: list[bytes], division: int) -> bytes:
    """A MIDI file of these tracks, with so many ticks a quarter; one track makes format 0."""
    form = min(len(tracks) - 1, 1)
    header = form.to_bytes(2) + len(tracks).to_bytes(2) + division.to_bytes(2)
    return b"MThd" + len(header).to_bytes(4) + header + b"".join(tracks)
