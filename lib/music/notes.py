"""Notes as arrays: read a MIDI file, let the pedal ring, cut, augment, write it back.

Everything here is in seconds. Nothing here knows of tokens or models.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lib.env.errors import UserError, os_errors
from lib.env.files import atomic_write
from lib.music.keyboard import DRUMS, INSTANT, played
from lib.music.midi import (
    CONTROL,
    NOTE_OFF,
    NOTE_ON,
    PROGRAM,
    SUSTAIN,
    TEMPO_120,
    midi_file,
    read_events,
    track_chunk,
    unwrapped,
)

NOTE = np.dtype([("start", "f8"), ("end", "f8"), ("pitch", "u1"), ("velocity", "u1")])
LOWEST, HIGHEST = 21, 108  # the piano's keys, A0 to C8
MAX_MIDI_BYTES = 10_000_000  # far above any piano piece (the longest of MAESTRO has 0.4 MB)
MAX_SECONDS = 24 * 3600  # what comes later in a file is left out
LAST = MAX_SECONDS - 1.0  # and what still sounds then stops
TICKS = 480  # a quarter note, in the files that we write: 960 a second at 120 BPM
NAME = b"\xff\x03\x05Piano"  # of the track in them
CHANNELS = [channel for channel in range(16) if channel != DRUMS]

# A message of a MIDI file: its tick, whether it begins a note, its second, its bytes. At one tick
# what ends something goes first, the pedal before keys that come up at the same second.
Message = tuple[int, bool, float, bytes]


@dataclass(frozen=True)
class Music:
    """A piece: notes (structured array of `NOTE`, sorted by start, then pitch) and pedal.

    `end` is when the key is released. `pedal` is float64 of shape (P, 2): each row the seconds
    when the sustain pedal goes down and comes up, in order, none overlapping.
    """

    notes: np.ndarray
    pedal: np.ndarray = field(default_factory=lambda: np.zeros((0, 2)))

    @property
    def seconds(self) -> float:
        """Until the last note or pedal ends; 0 for a piece without notes."""
        ends = [float(a.max()) for a in (self.notes["end"], self.pedal) if len(a)]
        return max(ends, default=0.0)


def make_notes(start, end, pitch, velocity) -> np.ndarray:
    """Four arrays of equal length (seconds, seconds, MIDI pitch, MIDI velocity) as sorted notes."""
    notes = np.empty(len(start), NOTE)
    notes["start"] = start
    notes["end"] = end
    notes["pitch"] = pitch
    notes["velocity"] = velocity
    order = np.lexsort((notes["velocity"], notes["end"], notes["pitch"], notes["start"]))
    return notes[order]


def read_midi(path: str | Path) -> Music:
    """Read every note of a MIDI file as a piano plays it, and the sustain pedal, in seconds.

    All tracks and instruments are merged, drums left out, pitches outside the piano (21 to 108)
    dropped; `lib.music.keyboard` says what ends a note. Where one pedal does not tell all, because
    instruments have their own or a channel is silenced, the notes come back as long as they sound
    and the pedal empty: `sustain(read_midi(path))` is always what is heard. Raises `UserError`, one
    sentence each: no such file, not a MIDI file, damaged, no notes, drums only.
    """
    path = Path(path)
    events = _events(path)
    keys = played(events)
    if not len(keys.start):
        if (events["status"] == (NOTE_ON << 4 | DRUMS)).any():
            raise UserError(f"{path} has drums only: give a file with piano notes")
        raise UserError(f"{path} has no notes: give a MIDI file with notes")
    good = keys.start < LAST
    if not good.any():
        hours = MAX_SECONDS // 3600
        raise UserError(f"{path} has no notes in its first {hours} hours: give another file")
    good &= (keys.pitch >= LOWEST) & (keys.pitch <= HIGHEST)
    if not good.any():
        raise UserError(
            f"{path} has no notes that a piano can play (pitch 21 to 108): give another file"
        )
    start, end, damped, pitch, velocity = (column[good] for column in keys[:5])
    end = np.minimum(end, LAST)
    damped = np.minimum(damped, LAST)
    pedal = np.minimum(keys.pedal[keys.pedal[:, 0] < LAST], LAST)
    one_pedal_tells_all = np.abs(_ring(end, pedal) - damped).max() <= 2 * INSTANT
    if one_pedal_tells_all:
        return Music(make_notes(start, end, pitch, velocity), pedal)
    return Music(clip_repeats(make_notes(start, damped, pitch, velocity)))


def _events(path: Path) -> np.ndarray:
    """The events of a MIDI file; `UserError` where there is none or it is damaged."""
    if path.is_dir():
        raise UserError(f"{path} is a folder: give the name of a MIDI file")
    if not path.is_file():
        raise UserError(f"there is no file {path}: check the name")
    with os_errors(f"read {path}"):
        if path.stat().st_size > MAX_MIDI_BYTES:
            raise UserError(f"{path} is too large for a MIDI file: give a .mid file under 10 MB")
        data = path.read_bytes()
    if not data:
        raise UserError(f"{path} is empty: give a MIDI file with notes")
    data = unwrapped(data)  # some come in an envelope
    if data[:4] != b"MThd":
        raise UserError(f"{path} is not a MIDI file: it does not begin with 'MThd'")
    try:
        return read_events(data)
    except ValueError as error:
        raise UserError(f"{path} is a damaged MIDI file, {error}: export it again") from error


def write_midi(music: Music, path: str | Path) -> None:
    """Write a piano MIDI file at 120 BPM, 480 ticks a quarter, whole or not at all.

    `read_midi` gives the same notes and pedal back, to half a tick (0.5 ms), a note lasting at
    least one; written again, they do not change at all. Notes that overlap on one key get channels
    of their own, each with the pedal, as no reader could tell their releases apart.
    """
    start = _ticks(music.notes["start"])
    end = np.maximum(_ticks(music.notes["end"]), start + 1)
    voices = _voices(music.notes["pitch"], start, end)
    highest = max(voices, default=0)
    channels = CHANNELS[: highest + 1]

    tracks: list[list[Message]] = [[] for _ in range(1 + highest // len(CHANNELS))]
    tracks[0] += _pedal_messages(music.pedal, channels)
    rows = zip(voices, start.tolist(), end.tolist(), music.notes.tolist())
    for voice, on, off, (begin, stop, pitch, velocity) in rows:
        channel = CHANNELS[voice % len(CHANNELS)]
        track = tracks[voice // len(CHANNELS)]
        release = bytes((NOTE_OFF << 4 | channel, pitch, 0))
        stroke = bytes((NOTE_ON << 4 | channel, pitch, velocity))
        track.append((off, False, stop, release))
        track.append((on, True, begin, stroke))
    for track in tracks:
        track.sort(key=lambda message: message[:3])

    pianos = [bytes((PROGRAM << 4 | channel, 0)) for channel in channels]
    head = [TEMPO_120, NAME, *pianos]
    tracks[0] = [(0, False, 0.0, data) for data in head] + tracks[0]
    chunks = []
    for track in tracks:
        ticks = [tick for tick, _, _, _ in track]
        chunks.append(track_chunk(ticks, [data for _, _, _, data in track]))
    with atomic_write(path) as part:
        part.write_bytes(midi_file(chunks, division=TICKS))


def _pedal_messages(pedal: np.ndarray, channels: list[int]) -> list[Message]:
    """The pedal going down and up, on every channel."""
    messages = []
    edges = pedal.ravel()  # down, up, down, up, …
    for i, (tick, second) in enumerate(zip(_ticks(edges).tolist(), edges.tolist())):
        pressed = 127 if i % 2 == 0 else 0
        for channel in channels:
            data = bytes((CONTROL << 4 | channel, SUSTAIN, pressed))
            messages.append((tick, False, second, data))
    return messages


def _ticks(seconds: np.ndarray) -> np.ndarray:
    """Seconds as ticks of our files, none before the beginning."""
    return np.maximum(np.round(seconds * (2 * TICKS)), 0).astype("i8")


def _voices(pitch: np.ndarray, start: np.ndarray, end: np.ndarray) -> list[int]:
    """A voice for each note, such that its release is told from those of others; by their starts.

    In the voices that have a channel of their own no two notes overlap on one key. In those beyond,
    what is struck first is released first.
    """
    voices: list[int] = []
    busy: list[dict[int, int]] = []  # for each voice, until when its keys are down
    for key, on, off in zip(pitch.tolist(), start.tolist(), end.tolist()):
        for voice, until in enumerate(busy):
            if until.get(key, 0) <= (on if voice < len(CHANNELS) else off):
                break
        else:
            voice = len(busy)
            busy.append({})
        busy[voice][key] = off
        voices.append(voice)
    return voices


def sustain(music: Music) -> Music:
    """Lengthen each note to what the sustain pedal makes ring, and empty the pedal.

    A note that ends while the pedal is down rings until the pedal comes up, or until the same key
    is struck again, whichever is first. A pedal pressed at the very end of a note still holds it,
    and one lifted then does not.
    """
    notes = music.notes.copy()
    notes["end"] = _ring(notes["end"], music.pedal)
    return Music(clip_repeats(notes))


def _ring(end: np.ndarray, pedal: np.ndarray) -> np.ndarray:
    """When strings fall silent whose keys come up at `end`."""
    if not len(pedal):
        return end
    row = np.searchsorted(pedal[:, 0], end, side="right") - 1
    held = (row >= 0) & (end < pedal[row, 1])
    return np.where(held, pedal[row, 1], end)


def clip_repeats(notes: np.ndarray) -> np.ndarray:
    """End each note at the latest when its own key is struck again."""
    notes = notes.copy()
    order = np.lexsort((notes["start"], notes["pitch"]))  # a key's notes beside one another
    pitch = notes["pitch"][order]
    start = notes["start"][order]
    # the first note of each instant at which a key is struck
    fresh = np.append(True, (np.diff(pitch) != 0) | (np.diff(start) != 0))[: len(notes)]
    strokes = np.flatnonzero(fresh)
    following = np.append(strokes, -1)[np.cumsum(fresh)]
    struck_again = (pitch[following] == pitch) & (start[following] > start)
    clipped = order[struck_again]
    again = start[following[struck_again]]
    notes["end"][clipped] = np.minimum(notes["end"][clipped], again)
    return notes


def crop(music: Music, start: float, end: float) -> Music:
    """The notes that begin in [start, end) and the pedal there, shifted so that `start` is 0."""
    begins = music.notes["start"]
    notes = music.notes[(begins >= start) & (begins < end)].copy()
    notes["start"] -= start
    notes["end"] -= start
    inside = (music.pedal[:, 1] > start) & (music.pedal[:, 0] < end)
    pedal = np.clip(music.pedal[inside], start, end) - start
    return Music(notes, pedal)


def augment(
    notes: np.ndarray, *, semitones: int = 0, stretch: float = 1.0, velocity: int = 0
) -> np.ndarray:
    """Transpose, slow down (`stretch` > 1) and play louder; notes off the keyboard are dropped."""
    if not 0.25 <= stretch <= 4:
        raise UserError(f"stretch {stretch} is outside 0.25 to 4: give a factor near 1")
    pitch = notes["pitch"].astype("i8") + semitones
    keep = (pitch >= LOWEST) & (pitch <= HIGHEST)
    out = notes[keep].copy()
    out["pitch"] = pitch[keep]
    out["start"] *= stretch
    out["end"] *= stretch
    out["velocity"] = np.clip(out["velocity"].astype("i8") + velocity, 1, 127)
    return out
