"""A partner at the keyboard: `python -m lib.generate jam --in PORT --out PORT`.

It listens while you play. When you press a pedal, or let no key sound for two seconds, it takes
over where you left off, and when you strike a key it stops and listens again. Both of you are one
piece to the model: its state is carried through all of it, and no token is ever read twice. What
you play is read bar by bar while you play, so that at the takeover hardly anything is left to read.

A few tokens are drawn before their time has come. Where you interrupt them, the state goes back to
the moment before: that of what was heard.
"""

import argparse
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lib.env.errors import UserError
from lib.env.files import check_writable
from lib.generate.control import Controls
from lib.generate.grammar import NoteReader
from lib.generate.moment import Moment, hear
from lib.generate.options import add_playing_options, check_named
from lib.generate.player import Player, check_seconds, check_seed, load_model
from lib.generate.sampling import Sampling
from lib.music.midi import SUSTAIN
from lib.music.notes import HIGHEST, LOWEST, Music, make_notes, read_midi, sustain, write_midi
from lib.music.token_names import BAR_LINE
from lib.music.tokens import BAR, BEAT, Tokenizer

SOFT = 67  # the left pedal, which asks for the takeover: the right one has music to do
AHEAD = 0.1  # seconds that are drawn before they are due
TICK = 0.001  # seconds from one look at the keyboard to the next
MOCK_SECONDS = 10.0  # that are played of a file in the place of a keyboard
INSTALL = "pip install -r requirements-jam.txt"


# ---- what is heard --------------------------------------------------------------------------


@dataclass
class Heard:
    """A note of yours; no end while it sounds."""

    start: float
    pitch: int
    velocity: int
    end: float | None = None
    held: bool = True  # the key is down


class Ear:
    """Keys and the right pedal, kept as notes until they are taken."""

    def __init__(self) -> None:
        self.notes: list[Heard] = []  # by their starts
        self.pedal = False
        self.last = 0.0  # when a key last moved

    @property
    def keys_down(self) -> bool:
        return any(note.held for note in self.notes)

    def strike(self, pitch: int, velocity: int, now: float) -> None:
        """A key goes down; where its string sounds, that note has ended."""
        self.damp(now, lambda note: note.pitch == pitch)
        self.notes.append(Heard(now, pitch, velocity))
        self.last = now

    def release(self, pitch: int, now: float) -> None:
        """A key comes up; the pedal may hold its note."""
        for note in self.notes:
            if note.pitch == pitch and note.held:
                note.held = False
                self.last = now
        if not self.pedal:
            self.damp(now, lambda note: not note.held)

    def press(self, down: bool, now: float) -> None:
        """The right pedal goes down or comes up."""
        self.pedal = down
        if not down:
            self.damp(now, lambda note: not note.held)

    def damp(self, now: float, which: Callable[[Heard], bool]) -> None:
        """Notes that still sound end here."""
        for note in self.notes:
            if note.end is None and which(note):
                note.end = now
                note.held = False

    def whole_bars(self, now: float) -> float:
        """The last bar line before which all that began has ended."""
        sounding = [note.start for note in self.notes if note.end is None]
        return min([now, *sounding]) // BAR * BAR

    def take(self, until: float, now: float) -> np.ndarray:
        """The notes that began before `until`, and no more; what still sounds ends now."""
        taken = [note for note in self.notes if note.start < until]
        self.notes = [note for note in self.notes if note.start >= until]
        ends = [now if note.end is None else note.end for note in taken]
        return make_notes(
            [n.start for n in taken], ends, [n.pitch for n in taken], [n.velocity for n in taken]
        )


# ---- the partner ----------------------------------------------------------------------------


class Partner:
    """Listens and plays, one piece with you: `message` for what you do, `tick` as time goes by.

    `send(pitch, velocity)` is called for what it plays, velocity 0 for a key that comes up.
    `clock` counts seconds. `tokens` are all that the model has in its memory.
    """

    def __init__(
        self,
        model,
        tokenizer: Tokenizer,
        send: Callable[[int, int], None],
        clock: Callable[[], float],
        *,
        sampling: Sampling = Sampling(),
        controls: Controls = Controls(),
        seed: int = 1,
        silence: float = 2.0,
        pedal: int = SOFT,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.send = send
        self.clock = clock
        self.silence = silence
        self.pedal = pedal
        self.grid = BEAT / tokenizer.config.steps
        self.bar_line = int(tokenizer.base[BAR_LINE])
        self.tokens: list[int] = [int(tokenizer.bos)]
        self.moment = hear(model, tokenizer, self.tokens)
        self.player = Player(model, tokenizer, [self.moment], [seed], sampling, controls)
        self.player.step()  # the first step of all takes longest: not when somebody waits
        self.ear = Ear()
        self.zero: float | None = None  # of the piece, on the clock: your first note
        self.playing = False
        self.reader = NoteReader(tokenizer, self.moment.grammar)  # anew at each takeover
        # what it plays: notes to strike and keys to let up, and the way back from what is not due
        self.due: list[tuple[float, float, int, int]] = []
        self.down: dict[int, float] = {}
        self.drawn: deque[tuple[float, Moment, int]] = deque()
        self.asked: float | None = None  # since when its first note is awaited
        self.delays: list[float] = []  # seconds from each takeover to its first note

    # -- listening --

    @property
    def now(self) -> float:
        """Seconds since the piece began."""
        return self.clock() - self.zero

    def message(self, message) -> None:
        """A MIDI message from your keyboard, as mido has them."""
        strikes = message.type == "note_on" and message.velocity > 0
        control = message.control if message.type == "control_change" else None
        if strikes and LOWEST <= message.note <= HIGHEST:
            if self.zero is None:
                self.zero = self.clock()
            if self.playing:
                self.stop()
            self.ear.strike(message.note, message.velocity, self.now)
        elif control == SUSTAIN:  # it may go down before the first note
            self.ear.press(message.value >= 64, 0.0 if self.zero is None else self.now)
        elif self.zero is None:
            return
        elif message.type == "note_off" or message.type == "note_on":
            self.ear.release(message.note, self.now)
        elif control == self.pedal:
            if message.value >= 64 and not self.playing:
                self.take_over()

    def tick(self) -> None:
        """Let time go by: read what is complete, take over after silence, play what is due."""
        if self.zero is None:
            return
        now = self.now
        if self.playing:
            self.play(now)
        elif not self.ear.keys_down and now - self.ear.last >= self.silence:
            self.take_over()
        else:
            self.read(self.words(self.ear.take(self.ear.whole_bars(now), now)))

    def read(self, ids: list[int]) -> None:
        """Go on by tokens that the model has not drawn itself."""
        if ids:
            self.moment = hear(self.model, self.tokenizer, ids, self.moment)
            self.tokens += ids

    def words(self, notes: np.ndarray) -> list[int]:
        """Your notes as tokens that go on from the model's clock, as those of a file would be."""
        if not len(notes):
            return []
        bar_steps = round(BAR / self.grid)
        grammar = self.moment.grammar
        first_free = max(grammar.bar, 0) * bar_steps + grammar.position + 1
        steps = np.maximum(np.round(notes["start"] / self.grid).astype(int), first_free)
        ids = []
        before = grammar.bar
        for bar in np.unique(steps // bar_steps).tolist():
            inside = steps // bar_steps == bar
            start = (steps[inside] - bar * bar_steps) * self.grid
            lasts = np.maximum(notes["end"] - notes["start"], self.grid)[inside]
            music = Music(
                make_notes(start, start + lasts, notes["pitch"][inside], notes["velocity"][inside])
            )
            base = self.tokenizer.encode_base(music)[1:]  # behind the bar line
            lines = [self.bar_line] * (bar - before)
            before = bar
            merged = self.tokenizer.merge(np.concatenate([lines, base]).astype(np.uint16))
            ids += [int(token) for token in merged if self.tokenizer.pieces[int(token)]]
        return ids

    # -- playing --

    def take_over(self) -> None:
        """Read what is left, and come in at once."""
        self.asked = self.clock()
        now = self.now
        ids = self.words(self.ear.take(np.inf, now))
        grammar = self.moment.grammar.copy()
        for token in ids:
            grammar.read(token)
        bar_steps = round(BAR / self.grid)
        step = max(int(now / self.grid), max(grammar.bar, 0) * bar_steps + grammar.position + 1)
        bar, position = divmod(step, bar_steps)
        lines = [self.bar_line] * (bar - grammar.bar)
        self.read([*ids, *lines, int(self.tokenizer.base[f"Position_{position}"])])
        self.player.go_to(self.moment)
        self.reader = NoteReader(self.tokenizer, self.moment.grammar)
        self.playing = True
        self.play(now)

    def play(self, now: float) -> None:
        """Draw what is nearly due, strike what is, and let keys up."""
        while not self.rests() or self.player.lines[0].grammar.seconds <= now + AHEAD:
            before = self.player.moment()
            token = self.player.step()[0]
            self.drawn.append((self.player.lines[0].grammar.seconds, before, len(self.tokens)))
            self.tokens.append(token)
            self.due += self.reader.read(token)
            self.strike_due(now)
        while self.drawn and self.drawn[0][0] <= now:
            self.drawn.popleft()
        self.strike_due(now)
        for pitch, end in list(self.down.items()):
            if end <= now:
                self.let_up(pitch)

    def strike_due(self, now: float) -> None:
        """Strike what should sound by now."""
        for note in [note for note in self.due if note[0] <= now]:
            self.due.remove(note)
            self.strike(*note)

    def rests(self) -> bool:
        """Whether no note is half drawn."""
        return self.player.lines[0].grammar.end in ("Duration", "Bar")

    def strike(self, start: float, end: float, pitch: int, velocity: int) -> None:
        if pitch in self.down:
            self.let_up(pitch)
        with at_a_port():
            self.send(pitch, velocity)
        self.down[pitch] = end
        if self.asked is not None:
            self.delays.append(self.clock() - self.asked)
            self.asked = None

    def let_up(self, pitch: int) -> None:
        del self.down[pitch]
        with at_a_port():
            self.send(pitch, 0)

    def stop(self) -> None:
        """Fall silent, and remember no more than was heard."""
        now = self.now
        try:
            for pitch in list(self.down):
                self.let_up(pitch)
        finally:  # where the port is lost, too: what was heard can still be kept
            self.forget_what_comes_after(now)

    def forget_what_comes_after(self, now: float) -> None:
        """Go back to the moment before what was drawn and not heard."""
        self.moment = self.player.moment()
        for reached, before, count in self.drawn:
            if reached > now and before.grammar.end in ("Duration", "Bar"):
                self.moment = before
                self.tokens = self.tokens[:count]
                break
        self.drawn.clear()
        self.due.clear()
        self.playing = False
        self.asked = None

    def end(self) -> None:
        """The last of the piece: fall silent, or read what you played and what still sounds."""
        if self.playing:
            self.stop()
        elif self.zero is not None:
            self.read(self.words(self.ear.take(np.inf, self.now)))


# ---- a session ------------------------------------------------------------------------------


@contextmanager
def at_a_port() -> Iterator[None]:
    """Turn what goes wrong at a MIDI port that was open into a `UserError`."""
    try:
        yield
    except Exception as error:  # each system's MIDI has faults of its own
        raise UserError("the MIDI port was lost: connect it again") from error


def session(
    partner: Partner,
    messages: Callable[[], Iterable],
    *,
    pause: Callable[[float], None],
    until: float = np.inf,
    say=print,
) -> None:
    """Let the partner listen and play, to a second of the clock or until Ctrl-C.

    `messages()` gives what has come from the keyboard since it was last asked. Raises `UserError`
    where a port is lost; what was heard until then stays in the partner's tokens.
    """
    told = 0
    try:
        while partner.clock() < until:
            with at_a_port():
                come = list(messages())
            for message in come:
                partner.message(message)
            partner.tick()
            if len(partner.delays) > told:
                told = len(partner.delays)
                say(f"takeover {told}: its first note came after {1e3 * partner.delays[-1]:.0f} ms")
            pause(TICK)
    except KeyboardInterrupt:
        say("stopped")
    finally:
        partner.end()


class Clock:
    """Seconds since it was started."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Begin at zero."""
        self.zero = time.monotonic()

    def __call__(self) -> float:
        return time.monotonic() - self.zero


class File:
    """A file in the place of a keyboard: its keys go down and up as the clock says.

    Its pedal must be in the lengths of its notes (`lib.music.notes.sustain`).
    """

    def __init__(self, music: Music, clock: Callable[[], float]):
        from mido import Message

        self.clock = clock
        first = music.notes["start"].min()
        events = []
        for start, end, pitch, velocity in music.notes.tolist():
            events.append((start - first, Message("note_on", note=pitch, velocity=velocity)))
            events.append((end - first, Message("note_off", note=pitch)))
        self.left = deque(sorted(events, key=lambda event: event[0]))

    def messages(self) -> list:
        """What was played since it was last asked."""
        now = self.clock()
        found = []
        while self.left and self.left[0][0] <= now:
            found.append(self.left.popleft()[1])
        return found


def open_ports(source: str, sink: str):
    """A MIDI input and a MIDI output by their names, or by what their names begin with.

    Raises `UserError` where one is not there or cannot be opened, and then holds neither.
    """
    mido, inputs, outputs = ports()
    source = one_of(inputs, source)
    sink = one_of(outputs, sink)
    entrance = open_port(mido.open_input, source)
    try:
        return entrance, open_port(mido.open_output, sink)
    except UserError:
        entrance.close()
        raise


def open_port(opener: Callable, name: str):
    """One port. Raises `UserError` where the system does not give it."""
    try:
        return opener(name)
    except Exception as error:  # python-rtmidi raises SystemError where another program holds it
        raise UserError(
            f"the MIDI port {name!r} cannot be opened ({error}): does another program hold it?"
        ) from error


def ports():
    """mido, and the names of the machine's inputs and outputs. Raises `UserError` without any."""
    import mido

    try:
        return mido, mido.get_input_names(), mido.get_output_names()
    except ImportError as error:
        raise UserError(
            f"a keyboard needs the package python-rtmidi: run {INSTALL}, "
            "or let a file play in its place with --mock FILE.mid"
        ) from error
    except Exception as error:  # each system's MIDI has faults of its own
        raise UserError(
            f"this system's MIDI cannot be opened ({error}): is a driver missing? "
            "--mock FILE.mid needs none"
        ) from error


def one_of(names: list[str], wanted: str) -> str:
    """The port that is meant. Raises `UserError` where there is none, or more than one."""
    found = [name for name in names if name == wanted] or [
        name for name in names if name.startswith(wanted)
    ]
    if len(found) != 1:
        there = ", ".join(names) or "none at all"
        raise UserError(
            f"{'more than one' if found else 'no'} MIDI port is called {wanted!r}: there is {there}"
        )
    return found[0]


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m lib.generate jam", description=main.__doc__)
    add = parser.add_argument
    add("--in", dest="source", metavar="PORT", help="MIDI port of your keyboard")
    add(
        "--out",
        dest="sink",
        metavar="PORT",
        help="MIDI port that sounds; without both, the ports of this machine are listed",
    )
    add("--mock", type=Path, metavar="FILE.mid", help="play this file at it instead: no hardware")
    add("--mock-seconds", type=float, help=f"so much of the file ({MOCK_SECONDS:g})")
    add("--seconds", type=float, help="end after so long (default: Ctrl-C; with --mock 20)")
    add(
        "--silence",
        type=float,
        default=2.0,
        help="take over when no key was down for so many seconds (%(default)s)",
    )
    add(
        "--pedal",
        type=int,
        default=SOFT,
        help="controller that asks for the takeover (%(default)s, the left pedal)",
    )
    add("--keep", type=Path, metavar="FILE.mid", help="write what both of you played, a new file")
    add_playing_options(parser)
    args = parser.parse_args(argv)
    check(args)
    args.sampling = Sampling(args.temperature, top_p=args.top_p)
    args.controls = Controls(density=args.density)
    return args


def check(args: argparse.Namespace) -> None:
    """Raise `UserError` for what cannot be played, or cannot be asked for together."""
    check_named("--in", args.source)
    check_named("--out", args.sink)
    if args.mock and (args.source or args.sink):
        raise UserError("--mock plays without hardware: leave out --in and --out")
    if bool(args.source) != bool(args.sink):
        raise UserError("--in and --out belong together: name both ports")
    if args.mock_seconds is not None:
        check_seconds(args.mock_seconds, "mock-seconds")
    if args.seconds is not None:
        check_seconds(args.seconds, "seconds")
    check_seed(args.seed)
    if not 0.2 <= args.silence <= 60:
        raise UserError(f"silence {args.silence} is outside 0.2 to 60 seconds: choose another")
    if not 0 <= args.pedal <= 127 or args.pedal == SUSTAIN:
        raise UserError(
            f"pedal {args.pedal} is no controller for this: "
            "67 is the left pedal, 66 the middle one, and 64 has music to do"
        )
    if args.mock_seconds is not None and not args.mock:
        raise UserError("--mock-seconds says how much of a --mock is played: name one")
    only_lists = not (args.mock or args.source)
    for option, value in (("--seconds", args.seconds), ("--keep", args.keep)):
        if only_lists and value is not None:
            raise UserError(
                f"without --in and --out, or --mock, nothing is played and ports are only listed: "
                f"name what plays, or leave out {option}"
            )


def main(argv: list[str] | None = None) -> None:
    """Play with the Mamba in turns, at a MIDI keyboard."""
    args = parse(argv)
    if args.keep:
        check_writable(args.keep)
        if args.keep.exists():
            raise UserError(
                f"{args.keep} exists already: give --keep another name, or move it away"
            )
    if args.mock:
        music = sustain(read_midi(args.mock))
        first = music.notes["start"].min()
        end = first + (args.mock_seconds or MOCK_SECONDS)
        music = Music(music.notes[music.notes["start"] < end])
    elif not args.source:
        _, inputs, outputs = ports()
        print(f"inputs, for --in: {', '.join(inputs) or 'none'}")
        print(f"outputs, for --out: {', '.join(outputs) or 'none'}")
        return
    else:
        source, sink = open_ports(args.source, args.sink)
    model, tokenizer = load_model(args.model)
    struck = []

    def send(pitch: int, velocity: int) -> None:
        struck.extend([pitch] * (velocity > 0))
        if not args.mock:
            from mido import Message

            sink.send(Message("note_on", note=pitch, velocity=velocity))

    clock = Clock()
    partner = Partner(
        model,
        tokenizer,
        send,
        clock,
        seed=args.seed,
        silence=args.silence,
        pedal=args.pedal,
        sampling=args.sampling,
        controls=args.controls,
    )
    seconds = args.seconds or (20.0 if args.mock else np.inf)
    clock.start()
    messages = File(music, clock).messages if args.mock else source.iter_pending
    print("listening" + (f" to {args.mock.name}" if args.mock else "; Ctrl-C ends it"))
    try:
        session(partner, messages, pause=time.sleep, until=seconds)
        print(f"it played {len(struck)} notes in {len(partner.delays)} takeovers")
    finally:  # a session that ends in an error was played, too
        if args.keep:
            keep(NoteReader(tokenizer).notes(partner.tokens), args.keep)


def keep(notes: np.ndarray, path: Path) -> None:
    """Write what was played, if anything was."""
    if not len(notes):
        print(f"nothing was played, so {path} is not written")
        return
    write_midi(Music(notes), path)
    print(f"{path}: what both of you played")
