"""Parse MIDI bytes that may be damaged: first prove the structure, then let symusic read them.

symusic 0.5.9 is fast C++ that trusts its input: a truncated file, a data byte above 127 or a
tick above 2^31 makes it write outside its memory and ends the process. So every event is walked
first, with regular expressions that run in C (about 40 MB a second), and times are turned into
seconds here, in double precision.
"""

import re
from collections.abc import Iterator

import numpy as np

# Standard MIDI Files 1.0. A delta time has one to four bytes, the last below 0x80; a channel
# event has one or two data bytes below 0x80 and, under "running status", no status byte of its
# own. RUN_* go on from an event of the same kind, 4096 events a match to bound the memory.
DELTA = rb"[\x80-\xff]{0,3}[\x00-\x7f]"
TWO = re.compile(DELTA + rb"[\x80-\xbf\xe0-\xef][\x00-\x7f]{2}")  # notes, controllers, pitch bend
ONE = re.compile(DELTA + rb"[\xc0-\xdf][\x00-\x7f]")  # program, channel pressure
RUN_TWO = re.compile(rb"(?:%b[\x80-\xbf\xe0-\xef]?[\x00-\x7f]{2}){1,4096}" % DELTA)
RUN_ONE = re.compile(rb"(?:%b[\xc0-\xdf]?[\x00-\x7f]){1,4096}" % DELTA)
LONG = re.compile(DELTA + rb"(?:\xff([\x00-\x7f])|\xf0)(%b)" % DELTA)  # meta or system exclusive
END_OF_TRACK, TEMPO, TIME_SIGNATURE, KEY_SIGNATURE = 0x2F, 0x51, 0x58, 0x59
SHORTEST = {TEMPO: 3, TIME_SIGNATURE: 4, KEY_SIGNATURE: 2}  # bytes that these must carry


def parse(data: bytes) -> Iterator[tuple[bool, dict[str, np.ndarray], dict[str, np.ndarray]]]:
    """For each track and channel: is it drums, its notes, its controllers; times in seconds.

    `notes` has time, duration, pitch, velocity; `controls` has time, number, value. Raises
    `ValueError` for anything that is not a whole MIDI file with ticks a quarter.
    """
    import symusic

    score = symusic.Score.from_midi(data[: check(data)])
    tempos = score.tempos.numpy()
    order = np.argsort(tempos["time"], kind="stable")
    ticks = np.concatenate(([0], tempos["time"][order])).astype("f8")
    factor = np.concatenate(([500_000], tempos["mspq"][order])) / (1e6 * score.tpq)
    if (ticks < 0).any() or (factor <= 0).any():
        raise ValueError("a tempo that makes no sense")
    at = np.concatenate(([0.0], np.cumsum(np.diff(ticks) * factor[:-1])))

    def seconds(tick: np.ndarray) -> np.ndarray:
        tick = tick.astype("f8")
        if (tick < 0).any():
            raise ValueError("more ticks than 31 bits hold")
        row = np.searchsorted(ticks, tick, side="right") - 1
        return at[row] + (tick - ticks[row]) * factor[row]

    for track in score.tracks:
        notes, controls = track.notes.numpy(), track.controls.numpy()
        start, length = notes["time"].astype("i8"), notes["duration"].astype("i8")
        notes["time"], controls["time"] = seconds(start), seconds(controls["time"])
        notes["duration"] = seconds(start + length) - notes["time"]
        yield track.is_drum, notes, controls


def check(data: bytes) -> int:
    """How many bytes of `data` are a whole MIDI file; `ValueError` where it is not one."""
    tracks, division = int.from_bytes(data[10:12]), int.from_bytes(data[12:14])
    if data[:8] != b"MThd\0\0\0\6" or int.from_bytes(data[8:10]) > 2 or not 0 < division < 0x8000:
        raise ValueError("not the header of a MIDI file with ticks a quarter")
    position = 14
    while tracks and position < len(data):
        size, begin = int.from_bytes(data[position + 4 : position + 8]), position + 8
        if begin + size > len(data):
            raise ValueError("a track is cut short")
        if data[position : position + 4] == b"MTrk":
            _check_track(data, begin, begin + size)
            tracks -= 1
        position = begin + size
    return position


def _check_track(data: bytes, position: int, end: int) -> None:
    """Walk the events of one track, which lies in data[position:end]."""
    run = None  # what running status continues with
    while position < end:
        if run and (event := run.match(data, position, end)):
            position = event.end()
        elif event := TWO.match(data, position, end):
            position, run = event.end(), RUN_TWO
        elif event := ONE.match(data, position, end):
            position, run = event.end(), RUN_ONE
        elif event := LONG.match(data, position, end):
            kind, length = event[1], 0
            for byte in event[2]:
                length = length << 7 | byte & 0x7F
            position = event.end() + length
            if position > end or (kind and length < SHORTEST.get(kind[0], 0)):
                raise ValueError("a message is cut short")
            if kind and kind[0] == END_OF_TRACK:
                return
            run = run if kind else None
        else:
            raise ValueError("something that is no MIDI event")
