"""What a piano makes of MIDI events: when each key is struck, when it comes up, when its string falls silent.

The rules, which are those of the instrument and of the MIDI specification:

- A key is down from its stroke until its release. Several strokes of a key wait for as many
  releases, the first stroke for the first; each track and channel has keys of its own. A stroke
  that no release answers lasts until the key's next stroke, or else until its track ends; a release
  that answers no stroke is nothing.
- The sostenuto pedal (66) holds the keys that are down when it is pressed, as a finger would. The
  sustain pedal (64) keeps the strings of released keys ringing. Both are down from a value of 64.
- The dampers fall whenever the pedal comes up, be it pressed again at the same tick. A pedal that
  is never lifted comes up when the last track ends.
- A pedal belongs to its channel, over all tracks and whatever the channel's program becomes. Pianos
  (programs 0 to 7) share theirs: notation programs write each hand, and the pedal, on a channel of
  its own. Instruments beside them keep their own pedals and do not hear the piano's.
- "All notes off" (123 to 127) releases the keys of its channel, "reset" (121) lifts its pedals, and
  "all sound off" (120) silences it, pedal or not.
- Events at one tick count in the order in which they were written, track after track.
- Channel 10 plays drums, whatever its program, and is left out.

A string struck again stops its earlier sound, by whichever hand: see `lib.notes.clip_repeats`.
"""

from typing import NamedTuple

import numpy as np

from lib.midi import CONTROL, END, NOTE_OFF, NOTE_ON, NOTES_OFF, PROGRAM, RESET, SOSTENUTO, SOUND_OFF, SUSTAIN

DRUMS = 9  # the channel that people call 10
PIANOS = 8  # programs below this are pianos
INSTANT = 1e-9  # seconds: tells what came first within one tick


class Played(NamedTuple):
    """Notes as columns of shape (N,), in the order of their strokes, and pedal spans (P, 2); seconds."""

    start: np.ndarray
    end: np.ndarray  # when the key is up again
    damped: np.ndarray  # when its string is, by its own pedal
    pitch: np.ndarray
    velocity: np.ndarray
    pedal: np.ndarray  # the pedal that holds most of the notes: down, up


def is_drums(events: np.ndarray) -> np.ndarray:
    """Which events are those of the drums, bool of shape (E,)."""
    return (events["status"] & 0xF) == DRUMS


def played(events: np.ndarray) -> Played:
    """The notes of all channels but the drums', and their pedal, from `lib.midi.read_events`.

    An event's index is called its place: to compare places settles what came first within a tick.
    """
    events = events[~is_drums(events)]
    time, channel = events["time"], events["status"] & 0xF
    struck, up = _keys(events)
    damped, pedal, most = up.copy(), np.zeros((0, 2), int), 0
    for number in np.unique(channel[struck]):
        piano = _is_piano(events, number, struck)
        for shared in (True, False):
            mine = np.flatnonzero((channel[struck] == number) & (piano == shared))
            up[mine] = _held(up[mine], _pedal(events, SOSTENUTO, number, shared), struck[mine])
            sustain = _pedal(events, SUSTAIN, number, shared)
            damped[mine] = _held(up[mine], sustain)
            if len(mine) > most:
                most, pedal = len(mine), sustain
    damped = np.minimum(damped, _next(events, [SOUND_OFF], struck))

    end = time[up]
    press = np.append(pedal[:, 0], -1)[np.searchsorted(pedal[:, 0], up)]  # the next one
    missed = (press >= 0) & (time[press] == end)  # by less than a tick
    end = np.where(missed, np.maximum(end - INSTANT, time[struck]), end)
    return Played(time[struck], end, time[damped], events["first"][struck], events["second"][struck], time[pedal])


def _keys(events: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The places where keys are struck, in order, and those where they come up again; (N,) both."""
    kind, channel = events["status"] >> 4, events["status"] & 0xF
    is_stroke = (kind == NOTE_ON) & (events["second"] > 0)
    moves = np.flatnonzero((kind == NOTE_ON) | (kind == NOTE_OFF))
    stop = _next(events, [SOUND_OFF, *NOTES_OFF], moves)

    # A number for each key of each track and channel, from one silence to the next. Key by key:
    key = events["track"][moves].astype("i8") << 11 | channel[moves].astype("i8") << 7 | events["first"][moves]
    key = key * (len(events) + 1) + stop
    order = np.argsort(key, kind="stable")
    moves, stop, key = moves[order], stop[order], key[order]
    down = is_stroke[moves]

    # How many strokes wait for a release, before each move? One more at each stroke and one fewer
    # at each release, but never below none: a level as low as the lowest so far is none. To keep
    # the keys apart each begins lower than all before it.
    step = np.where(down, 1, -1)
    level = np.cumsum(step) - step - 2 * len(step) * np.cumsum(np.diff(key, prepend=-1) != 0)
    waiting = level - np.minimum.accumulate(level)
    strokes, releases = np.flatnonzero(down), np.flatnonzero(~down & (waiting > 0))

    # A key's first release answers its first stroke, and so on.
    mine, theirs = key[strokes], key[releases]
    answer = np.searchsorted(theirs, mine) + np.arange(len(mine)) - np.searchsorted(mine, mine)
    answered = answer < np.searchsorted(theirs, mine, side="right")
    struck = moves[strokes]
    up = np.append(moves[releases], -1)[np.where(answered, answer, -1)]

    # A stroke without an answer lasts until the key's next one, a silence, or the end of the track.
    ends = np.flatnonzero(events["status"] == END)
    last = np.zeros(1 << 16, int)
    last[events["track"][ends]] = ends
    until = np.minimum(stop[strokes], last[events["track"][struck]])
    again = np.append(mine[1:] == mine[:-1], False)[: len(mine)]
    until = np.where(again, np.roll(struck, -1), until)
    up = np.where(answered, up, until)
    order = np.argsort(struck)
    return struck[order], up[order]


def _next(events: np.ndarray, controls: list[int], places: np.ndarray) -> np.ndarray:
    """The next place where the same channel gets one of these controls, or the number of events; (N,)."""
    control = np.flatnonzero(events["status"] >> 4 == CONTROL)
    control = control[np.isin(events["first"][control], controls)]
    channel = events["status"] & 0xF
    out = np.full(len(places), len(events))
    for number in np.unique(channel[control]):
        here = np.append(control[channel[control] == number], len(events))
        mine = channel[places] == number
        out[mine] = here[np.searchsorted(here, places[mine])]
    return out


def _is_piano(events: np.ndarray, channel: int, places: np.ndarray) -> np.ndarray:
    """Whether a channel has a piano's program at each place, bool."""
    changes = np.flatnonzero(events["status"] == (PROGRAM << 4 | channel))
    program = np.concatenate(([0], events["first"][changes]))
    return program[np.searchsorted(changes, places)] < PIANOS


def _pedal(events: np.ndarray, pedal: int, channel: int, shared: bool) -> np.ndarray:
    """Places (P, 2) between which a pedal holds a channel's keys: its own and, if shared, the pianos'."""
    own, time = _spans(events, pedal, channel), events["time"]
    others = []
    control = events["status"][events["status"] >> 4 == CONTROL]
    for other in np.unique(control & 0xF) if shared else ():
        spans = _spans(events, pedal, other)
        spans = spans[_is_piano(events, other, spans).all(1)]
        if not any(np.array_equal(time[spans], time[known]) for known in (own, *others)):
            others.append(spans)  # more than the same pedal on another hand's channel
    return _union(np.concatenate((own, *others)), time) if others else own


def _spans(events: np.ndarray, pedal: int, channel: int) -> np.ndarray:
    """Places (P, 2) where one channel's pedal goes down and comes up; the last event lifts it."""
    mine = np.flatnonzero(events["status"] == (CONTROL << 4 | channel))
    number = events["first"][mine]
    mine = mine[(number == pedal) | (number == RESET)]
    down = (events["first"][mine] == pedal) & (events["second"][mine] >= 64)
    edges = mine[np.flatnonzero(np.diff(down, prepend=False))]
    return np.append(edges, [len(events) - 1] * (len(edges) % 2)).reshape(-1, 2).astype(int)


def _union(spans: np.ndarray, time: np.ndarray) -> np.ndarray:
    """Spans (P, 2) of several channels as spans in order. Where two meet at one tick the dampers fall."""
    spans = spans[np.argsort(spans[:, 0])]
    down, up = spans[:, 0], np.maximum.accumulate(spans[:, 1])
    begins = np.append(True, time[down[1:]] >= time[up[:-1]])
    ends = np.append(begins[1:], True)
    return np.stack((down[begins], up[ends]), 1)


def _held(up: np.ndarray, spans: np.ndarray, struck: np.ndarray | None = None) -> np.ndarray:
    """The places `up` (N,) moved to where a pedal that is down there comes up.

    With `struck` the pedal holds only what was struck before it went down.
    """
    if not len(spans):
        return up
    row = np.searchsorted(spans[:, 0], up) - 1
    down, lifted = spans[row].T
    holds = (row >= 0) & (lifted > up)
    if struck is not None:
        holds &= struck < down
    return np.where(holds, lifted, up)
