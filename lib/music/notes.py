"""Notes as arrays: read a MIDI file, let the pedal ring, cut, augment, write it back.

Everything here is in seconds. Nothing here knows of tokens or models.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lib.env.errors import UserError, os_errors
from lib.env.files import whole
from lib.music.midi import parse

NOTE = np.dtype([("start", "f8"), ("end", "f8"), ("pitch", "u1"), ("velocity", "u1")])
LOWEST, HIGHEST = 21, 108  # the piano's keys, A0 to C8
SUSTAIN = 64  # MIDI controller number of the sustain pedal
MAX_MIDI_BYTES = 10_000_000  # far above any piano piece (the longest of MAESTRO has 0.4 MB)
MAX_SECONDS = 24 * 3600  # a file that claims to last longer is damaged


@dataclass(frozen=True)
class Music:
    """A piece: notes (structured array of `NOTE`, sorted by start, then pitch) and pedal.

    `pedal` is float64 of shape (P, 2): each row the seconds when the sustain pedal goes
    down and comes up.
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
    notes["start"], notes["end"], notes["pitch"], notes["velocity"] = start, end, pitch, velocity
    return notes[np.lexsort((notes["pitch"], notes["start"]))]


def read_midi(path: str | Path) -> Music:
    """Read every piano note and the sustain pedal of a MIDI file, in seconds.

    Tracks are merged, drums left out, tempo changes honoured, pitches outside the piano
    (21 to 108) dropped. Raises `UserError`, one sentence each: no such file, not a MIDI
    file, no notes, drums only.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no file {path}: check the name")
    with os_errors(f"read {path}"):
        if path.stat().st_size > MAX_MIDI_BYTES:
            raise UserError(f"{path} is too large for a MIDI file: give a .mid file under 10 MB")
        data = path.read_bytes()
    if not data:
        raise UserError(f"{path} is empty: give a MIDI file with notes")
    if data[:4] != b"MThd":
        raise UserError(f"{path} is not a MIDI file: it does not begin with 'MThd'")
    try:
        tracks = list(parse(data))
    except Exception as error:  # ValueError from the check, MemoryError and others from symusic
        raise UserError(f"{path} is a damaged MIDI file and cannot be read: export it again") from error
    arrays = [notes for drums, notes, _ in tracks if not drums]
    if not any(len(a["time"]) for a in arrays):
        if any(len(notes["time"]) for _, notes, _ in tracks):
            raise UserError(f"{path} has drums only: give a file with piano notes")
        raise UserError(f"{path} has no notes: give a MIDI file with notes")
    column = {k: np.concatenate([a[k] for a in arrays]) for k in arrays[0]}
    start = column["time"].astype("f8")
    end = start + column["duration"].astype("f8")
    pitch, velocity = column["pitch"].astype("i8"), column["velocity"].astype("i8")
    good = (pitch >= LOWEST) & (pitch <= HIGHEST) & (velocity > 0) & (velocity < 128)
    good &= np.isfinite(start) & np.isfinite(end) & (start >= 0) & (end >= start) & (end < MAX_SECONDS)
    if not good.any():
        raise UserError(f"{path} has no notes that a piano can play (pitch 21 to 108): give another file")
    notes = make_notes(start[good], end[good], pitch[good], velocity[good])
    spans = [_pedal_spans(c, notes["end"].max()) for drums, _, c in tracks if not drums]
    return Music(notes, _merge_spans(np.concatenate(spans)))


def _merge_spans(spans: np.ndarray) -> np.ndarray:
    """Rows of (down, up) of several tracks as rows that do not overlap, in order."""
    spans = spans[np.argsort(spans[:, 0], kind="stable")]
    if not len(spans):
        return spans
    up = np.maximum.accumulate(spans[:, 1])
    first = np.concatenate(([True], spans[1:, 0] > up[:-1]))
    last = np.concatenate((first[1:], [True]))
    return np.stack([spans[first, 0], up[last]], 1)


def _pedal_spans(controls: dict[str, np.ndarray], last: float) -> np.ndarray:
    """Rows of (down, up) in seconds from one track's controller events."""
    mine = (controls["number"] == SUSTAIN) & (controls["time"] < MAX_SECONDS)
    time, down = controls["time"][mine].astype("f8"), controls["value"][mine] >= 64
    order = np.argsort(time, kind="stable")
    time, down = time[order], down[order]
    edges = np.flatnonzero(np.diff(np.concatenate(([False], down))))
    times = time[edges]
    if len(times) % 2:
        times = np.append(times, max(last, times[-1]))
    return times.reshape(-1, 2)


def write_midi(music: Music, path: str | Path) -> None:
    """Write a piano MIDI file at 120 BPM, 480 ticks a quarter, whole or not at all."""
    import symusic

    ticks = lambda seconds: np.round(np.asarray(seconds) * 960).astype("i4")
    score = symusic.Score(480)
    score.tempos.append(symusic.Tempo(0, 120))
    track = symusic.Track("Piano", 0, False)
    notes = music.notes
    start = ticks(notes["start"])
    track.notes = symusic.Note.from_numpy(
        start, np.maximum(ticks(notes["end"]) - start, 1),
        notes["pitch"].astype("i1"), notes["velocity"].astype("i1"))
    for down, up in music.pedal:
        track.controls.append(symusic.ControlChange(int(ticks(down)), SUSTAIN, 127))
        track.controls.append(symusic.ControlChange(int(ticks(up)), SUSTAIN, 0))
    score.tracks.append(track)
    with whole(path) as part:
        part.write_bytes(score.dumps_midi())


def sustain(music: Music) -> Music:
    """Lengthen each note to what the sustain pedal makes ring, and empty the pedal.

    A note that ends while the pedal is down rings until the pedal comes up, or until the
    same key is struck again, whichever is first.
    """
    notes, pedal = music.notes.copy(), music.pedal
    if len(pedal):
        row = np.searchsorted(pedal[:, 0], notes["end"], side="right") - 1
        held = (row >= 0) & (notes["end"] < pedal[row, 1])
        notes["end"] = np.where(held, pedal[row, 1], notes["end"])
    return Music(clip_repeats(notes))


def clip_repeats(notes: np.ndarray) -> np.ndarray:
    """End each note at the latest when its own key is struck again."""
    notes = notes.copy()
    order = np.lexsort((notes["start"], notes["pitch"]))
    this, following = order[:-1], order[1:]
    same = notes["pitch"][this] == notes["pitch"][following]
    later = notes["start"][following] > notes["start"][this]
    clip = same & later
    notes["end"][this[clip]] = np.minimum(notes["end"][this[clip]], notes["start"][following[clip]])
    return notes


def crop(music: Music, start: float, end: float) -> Music:
    """The notes that begin in [start, end) and the pedal there, shifted so that `start` is 0."""
    notes = music.notes[(music.notes["start"] >= start) & (music.notes["start"] < end)].copy()
    notes["start"] -= start
    notes["end"] -= start
    inside = (music.pedal[:, 1] > start) & (music.pedal[:, 0] < end)
    pedal = np.clip(music.pedal[inside], start, end) - start
    return Music(notes, pedal)


def augment(notes: np.ndarray, *, semitones: int = 0, stretch: float = 1.0, velocity: int = 0) -> np.ndarray:
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
