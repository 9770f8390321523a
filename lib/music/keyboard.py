"""What a piano makes of MIDI events: when a key is struck, comes up, and its string falls silent.

The rules, which are those of the instrument and of the MIDI specification:

- A key is down from its stroke until its release; each track and channel has keys of its own.
  Several strokes of a key wait for as many releases, the first stroke for the first. Where releases
  are missing, the later strokes are answered, as a key that is struck has come up before: a stroke
  without a release lasts until its key's next stroke, or else until its track ends. A release of
  a key that is up is nothing.
- A string that is struck again stops sounding as it did, by whichever hand:
  `lib.music.notes.clip_repeats`.
- The sostenuto pedal (66) holds the keys that are down when it is pressed, as a finger would. The
  sustain pedal (64) keeps the strings of released keys ringing. Both are down from a value of 64.
- The dampers fall whenever the pedal comes up, be it pressed again at the same tick. A pedal that
  is never lifted comes up when the last track ends.
- A pedal belongs to its channel, over all tracks and whatever the channel's program becomes. Pianos
  (programs 0 to 7) share theirs: notation programs write each hand, and the pedal, on a channel of
  its own. Some write the pedal on both, or play it to both by hand: what another channel says a
  tenth of a second sooner or later is a copy, and the channel's own counts. Instruments beside
  pianos keep their own pedals and do not hear the piano's.
- "All notes off" (123, and 124 to 127, which imply it) releases the keys of its channel, "all sound
  off" (120) silences it, pedal or not, and "reset" (121) lifts its pedals.
- Events at one tick count in the order in which they were written, track after track.
- Channel 10 plays drums, whatever its program, and is left out.

To settle what came first within a tick, the functions below compare *places*: an event's place is
its index among the events.
"""

from typing import NamedTuple

import numpy as np

from lib.music.midi import (
    CONTROL,
    END,
    NOTE_OFF,
    NOTE_ON,
    NOTES_OFF,
    PROGRAM,
    RESET,
    SOSTENUTO,
    SOUND_OFF,
    SUSTAIN,
)

DRUMS = 9  # the channel that people call 10
PIANOS = 8  # programs below this are pianos
COPY = 0.1  # seconds by which the ends of a copy of a pedal may differ from the pedal's
INSTANT = 1e-9  # seconds: far less than a tick, and tells what came first within one


class Played(NamedTuple):
    """Notes as columns of shape (N,), in the order of their strokes, and a pedal; in seconds."""

    start: np.ndarray
    end: np.ndarray  # when the key is up again
    damped: np.ndarray  # when its string is, unless it is struck again before
    pitch: np.ndarray
    velocity: np.ndarray
    pedal: np.ndarray  # (P, 2), down and up: the pedal that holds most of the notes


def played(events: np.ndarray) -> Played:
    """The notes of all channels but the drums', from the events of `lib.music.midi.read_events`.

    Where a key comes up at the tick at which the pedal goes down, but before it, `end` is an
    `INSTANT` earlier: `lib.music.notes.sustain` then tells that from a key which the pedal
    still catches.
    """
    events = events[(events["status"] & 0xF) != DRUMS]
    struck, up = _keys(events)
    damped, pedal, most = up.copy(), np.zeros((0, 2), int), 0
    channel = (events["status"] & 0xF)[struck]
    for number in np.unique(channel):
        piano = _is_piano(events, number, struck)
        for shared in (True, False):
            mine = np.flatnonzero((channel == number) & (piano == shared))
            up[mine] = _held(up[mine], _pedal(events, SOSTENUTO, number, shared), struck[mine])
            sustain = _pedal(events, SUSTAIN, number, shared)
            damped[mine] = _held(up[mine], sustain)
            if len(mine) > most:
                most, pedal = len(mine), sustain
    damped = np.minimum(damped, _next(events, [SOUND_OFF], struck))

    time = events["time"]
    start, end = time[struck], time[up]
    press = np.append(pedal[:, 0], -1)[np.searchsorted(pedal[:, 0], up)]  # the next one
    missed = (press >= 0) & (time[press] == end)  # by less than a tick
    end = np.where(missed, np.maximum(end - INSTANT, start), end)
    pitch, velocity = events["first"][struck], events["second"][struck]
    return Played(start, end, time[damped], pitch, velocity, time[pedal])


# --- keys -----------------------------------------------------------------------------------


def _keys(events: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The places where keys are struck, in order, and those where they come up again; (N,) both."""
    kind, channel = events["status"] >> 4, events["status"] & 0xF
    is_stroke = (kind == NOTE_ON) & (events["second"] > 0)
    moves = np.flatnonzero((kind == NOTE_ON) | (kind == NOTE_OFF))
    silences = [SOUND_OFF, *NOTES_OFF]

    # Key by key: a number for each key of each track and channel, from one silence to the next.
    key = events["track"][moves].astype("i8") << 11
    key |= channel[moves].astype("i8") << 7 | events["first"][moves]
    key = key * (len(events) + 1) + _next(events, silences, moves)
    order = np.argsort(key, kind="stable")
    moves, key = moves[order], key[order]

    idle = _takes_in_vain(is_stroke[moves], key)  # releases of keys that are up
    moves, key = moves[~idle], key[~idle]
    down = is_stroke[moves]
    # Seen backwards, strokes take releases, and the early ones find none where some are missing.
    unanswered = _takes_in_vain(~down[::-1], key[::-1])[::-1][down]
    struck, releases, key = moves[down], moves[~down], key[down]

    ends = np.flatnonzero(events["status"] == END)
    track_end = np.zeros(1 << 16, int)
    track_end[events["track"][ends]] = ends
    up = np.minimum(track_end[events["track"][struck]], _next(events, silences, struck))
    again = np.append(key[1:] == key[:-1], False)[: len(key)]
    up = np.where(again, np.roll(struck, -1), up)
    up[~unanswered] = releases  # as many as there are answered strokes, in the same order
    order = np.argsort(struck)
    return struck[order], up[order]


def _takes_in_vain(adds: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Which moves find nothing to take, bool (M,); each adds one to its key's store or takes one.

    A store as low as it ever was holds nothing. The moves of a key stand in a row; to keep the keys
    apart, each store begins lower than all before it.
    """
    step = np.where(adds, 1, -1)
    floor = 2 * len(step) * np.cumsum(np.diff(key, prepend=-1) != 0)
    level = np.cumsum(step) - step - floor
    return ~adds & (level == np.minimum.accumulate(level))


def _next(events: np.ndarray, controls: list[int], places: np.ndarray) -> np.ndarray:
    """Where the same channel next gets one of these controls; the number of events where never."""
    control = np.flatnonzero(events["status"] >> 4 == CONTROL)
    control = control[np.isin(events["first"][control], controls)]
    channel = events["status"] & 0xF
    out = np.full(len(places), len(events))
    for number in np.unique(channel[control]):
        here = np.append(control[channel[control] == number], len(events))
        mine = channel[places] == number
        out[mine] = here[np.searchsorted(here, places[mine])]
    return out


# --- pedals ---------------------------------------------------------------------------------


def _pedal(events: np.ndarray, pedal: int, channel: int, shared: bool) -> np.ndarray:
    """The spans of a pedal that holds a channel's keys: its own and, if shared, those of pianos."""
    own, time = _spans(events, pedal, channel), events["time"]
    found = own
    control = events["status"][events["status"] >> 4 == CONTROL]
    for other in np.unique(control & 0xF) if shared else ():
        if other == channel:
            continue
        spans = _spans(events, pedal, other)
        spans = spans[_is_piano(events, other, spans).all(1)]
        spans = spans[~_copies(spans, found, time)]
        found = np.concatenate((found, spans))
        found = found[np.argsort(found[:, 0])]
    return _union(found, time) if len(found) > len(own) else own


def _copies(spans: np.ndarray, known: np.ndarray, time: np.ndarray) -> np.ndarray:
    """Which spans, bool (P,), repeat the known one that begins just before or just after."""
    if not len(known):
        return np.zeros(len(spans), bool)

    def apart(row):  # seconds, (P, 2)
        return np.abs(time[spans] - time[known[row]]).round(6)

    later = np.searchsorted(time[known[:, 0]], time[spans[:, 0]])
    before, behind = np.maximum(later - 1, 0), np.minimum(later, len(known) - 1)
    return (apart(before) <= COPY).all(1) | (apart(behind) <= COPY).all(1)


def _spans(events: np.ndarray, pedal: int, channel: int) -> np.ndarray:
    """Where one channel's pedal goes down and comes up, (P, 2); the last event lifts it."""
    mine = np.flatnonzero(events["status"] == (CONTROL << 4 | channel))
    mine = mine[np.isin(events["first"][mine], [pedal, RESET])]
    down = (events["first"][mine] == pedal) & (events["second"][mine] >= 64)
    edges = mine[np.flatnonzero(np.diff(down, prepend=False))]
    if len(edges) % 2:
        edges = np.append(edges, len(events) - 1)
    return edges.reshape(-1, 2)


def _is_piano(events: np.ndarray, channel: int, places: np.ndarray) -> np.ndarray:
    """Whether a channel has a piano's program at each place, bool; it has until it is told."""
    changes = np.flatnonzero(events["status"] == (PROGRAM << 4 | channel))
    program = np.append(0, events["first"][changes])
    return program[np.searchsorted(changes, places)] < PIANOS


def _union(spans: np.ndarray, time: np.ndarray) -> np.ndarray:
    """Spans of several channels as one pedal's. Where two meet at one tick the dampers fall."""
    spans = spans[np.argsort(spans[:, 0])]
    down, up = spans[:, 0], np.maximum.accumulate(spans[:, 1])
    begins = np.append(True, time[down[1:]] >= time[up[:-1]])
    ends = np.append(begins[1:], True)
    return np.stack((down[begins], up[ends]), 1)


def _held(up: np.ndarray, spans: np.ndarray, struck: np.ndarray | None = None) -> np.ndarray:
    """Places `up` (N,), or where a pedal that is down there comes up.

    With `struck` the pedal holds only keys that were struck before it went down.
    """
    if not len(spans):
        return up
    row = np.searchsorted(spans[:, 0], up) - 1
    down, lifted = spans[row].T
    holds = (row >= 0) & (lifted > up)
    if struck is not None:
        holds &= struck < down
    return np.where(holds, lifted, up)
