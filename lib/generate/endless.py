"""Play without end: a MIDI file that grows while the music goes on, in constant memory.

The file can be opened at any moment: after every bar it is a whole MIDI file of what was played.
"""

import heapq
import itertools
import os
import struct
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import numpy as np

from lib.env.errors import UserError, explain_os_error, os_errors
from lib.generate.grammar import NoteReader
from lib.music.midi import END_NOW, TEMPO_120, variable
from lib.music.tokens import BAR

TICKS = 960  # a second: 480 a quarter note at 120 BPM, as `lib.music.notes.write_midi`
LENGTH_AT = 18  # where a file's first track says how long it is, in 4 bytes
FULL = 2**32 - 2**20  # bytes: a track's length has 32 bits (some years of music)


class GrowingMidi:
    """A format 0 file that takes notes in the order of their starts; `flush` makes it whole.

    It remembers only the keys that are down. A key struck while it sounds ends its earlier note.
    Where the file cannot be written any more, as on a full disk, nothing is left under its name
    that would be in the way of another try: what was whole before goes on under another name.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        with os_errors(f"write {self.path}"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("wb", buffering=0)
        self._end = 0  # where the next event goes, over the end of track
        self._tail = b""  # what ends the track in the file now; nothing before the first `flush`
        self._now = 0  # ticks of the last event
        self._down: dict[int, int] = {}  # key: tick at which it comes up
        self._ups: list[tuple[int, int]] = []  # (tick, key), earliest first; some are out of date
        header = b"MThd" + struct.pack(">IHHH", 6, 0, 1, TICKS // 2)
        self._pending = bytearray(header + b"MTrk" + bytes(4) + b"\0" + TEMPO_120)
        self.notes = 0

    def add(self, start: float, end: float, pitch: int, velocity: int) -> None:
        """A note in seconds; no earlier than the one before."""
        begin = max(round(start * TICKS), self._now)
        self._release(begin)
        if pitch in self._down:
            self._event(begin, 0x80, pitch, 0)
            del self._down[pitch]
        self._event(begin, 0x90, pitch, velocity)
        up = max(round(end * TICKS), begin + 1)
        self._down[pitch] = up
        heapq.heappush(self._ups, (up, pitch))
        self.notes += 1

    def _release(self, until: int) -> None:
        """Let the keys come up that do so by this tick."""
        while self._ups and self._ups[0][0] <= until:
            up, pitch = heapq.heappop(self._ups)
            if self._down.get(pitch) == up:
                del self._down[pitch]
                self._event(up, 0x80, pitch, 0)

    def _event(self, tick: int, status: int, pitch: int, velocity: int) -> None:
        self._pending += variable(tick - self._now) + bytes((status, pitch, velocity))
        self._now = tick

    def flush(self, last: bool = False) -> None:
        """Write what has come; keys still down come up at its end, and in time in a later flush."""
        if last:
            self._release(max(self._down.values(), default=0))
        ups = [bytes((0, 0x80, pitch, 0)) for pitch in sorted(self._down)]
        tail = b"".join(ups) + END_NOW
        if self._end + len(self._pending) > FULL:
            raise UserError(f"{self.path} is as long as a MIDI file can be: begin another one")
        try:
            self._finish(self._end, self._pending, tail)
        except OSError as error:
            self._give_up(error)
        self._end += len(self._pending)
        self._tail = tail
        self._pending = bytearray()

    def _finish(self, at: int, events: bytes, tail: bytes) -> None:
        """Write events at a place, end the track behind them, and note its length."""
        size = at + len(events) + len(tail)
        length = struct.pack(">I", size - LENGTH_AT - 4)
        for place, data in ((at, bytes(events) + tail), (LENGTH_AT, length)):
            self._file.seek(place)
            left = memoryview(data)
            while left:
                left = left[self._file.write(left) :]
        self._file.truncate(size)

    def _give_up(self, error: OSError) -> NoReturn:
        """Free the file's name, keep what was whole, and say both."""
        kept = ""
        if self._tail:
            with suppress(OSError):  # the disk has that place already
                self._finish(self._end, b"", self._tail)
        self._file.close()
        if self._tail:
            names = (self.path.with_stem(f"{self.path.stem}-until-{n}") for n in itertools.count(1))
            aside = next(name for name in names if not name.exists())
            os.replace(self.path, aside)
            kept = f"; what was played until then is in {aside}"
        else:
            self.path.unlink(missing_ok=True)
        raise UserError(f"could not write {self.path}: {explain_os_error(error)}{kept}") from error

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            if not isinstance(error, (UserError, OSError)):
                self.flush(last=True)
        finally:
            self._file.close()
            if not self._tail:  # nothing was played
                self.path.unlink(missing_ok=True)


def stream(
    player, before: np.ndarray, origin: float, path: Path, until: float | None = None, say=print
) -> None:
    """Play row 0 of a `Player` into a growing file, to `until` seconds or until Ctrl-C.

    `before` are a prompt's notes; the file begins at second `origin` of the piece.
    """
    from tqdm import tqdm

    reader = NoteReader(player.tokenizer, player.lines[0].grammar)
    if path.exists():
        raise UserError(f"{path} exists already: choose another seed or folder, or move it away")
    with GrowingMidi(path) as midi, tqdm(unit=" tokens", desc=str(path)) as bar:
        for start, end, pitch, velocity in before.tolist():
            midi.add(start - origin, end - origin, pitch, velocity)
        written = -BAR
        try:
            for notes, seconds in forever(player, reader):
                if until is not None and seconds >= until:
                    break
                for start, end, pitch, velocity in notes:
                    midi.add(start - origin, end - origin, pitch, velocity)
                if seconds >= written + BAR:
                    midi.flush()
                    written = seconds
                    bar.set_postfix_str(f"{(seconds - origin) / 60:.1f} minutes of music")
                bar.update(1)
        except KeyboardInterrupt:
            say("stopped")
    say(f"{path}: {midi.notes} notes, {os.path.getsize(path):,} bytes")


def forever(player, reader: NoteReader):
    """The first row's tokens without end: the notes that each completes, the second reached."""
    while True:
        token = player.step()[0]
        yield reader.read(token), player.lines[0].grammar.seconds
