"""Play: continue a MIDI file or start from nothing (`python -m lib.generate`).

The prompt is read once; then every token costs the same, however long the piece has become,
because all that the model remembers is a state of constant size.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lib import mamba
from lib.env.errors import UserError
from lib.generate import moment as moments
from lib.generate.control import Controls, Steering
from lib.generate.grammar import Grammar, NoteReader
from lib.generate.moment import KEPT, Moment, hear
from lib.generate.sampling import LATELY, Sampling, draw
from lib.mamba import step_cpu
from lib.music.maestro import DATA
from lib.music.notes import Music, clip_repeats, sustain
from lib.music.token_names import BAR_LINE, numbers_in
from lib.music.tokens import Tokenizer, first_seconds, prompt_music

MODEL = DATA / "model"
LONGEST = 3600  # seconds that one call may play; --stream knows no end
BATCH = 50  # variations played side by side


def load_model(folder: str | Path = MODEL, device: str = "cpu") -> tuple[mamba.MambaLM, Tokenizer]:
    """The shipped model and its tokenizer, or those of another folder."""
    model = mamba.load(folder, device)
    tokenizer = Tokenizer.load(folder)
    if model.config.vocab_size != tokenizer.vocab_size:
        raise UserError(
            f"the model in {folder} has {model.config.vocab_size} tokens, "
            f"its tokenizer {tokenizer.vocab_size}: they do not belong together"
        )
    return model, tokenizer


@dataclass
class Line:
    """What one row knows beside the model's state."""

    row: int  # its number, which stays when others have ended
    grammar: Grammar
    recent: deque[int]  # its last tokens
    seed: int
    drawn: int  # how many dice were thrown
    dice: np.random.Generator

    @classmethod
    def of(cls, row: int, start: Moment, seed: int) -> "Line":
        """The row that goes on from a moment; where the seed is the same, the dice roll on too."""
        drawn = start.drawn if start.seed == seed else 0
        recent = deque(start.recent, KEPT)
        return cls(row, start.grammar.copy(), recent, seed, drawn, moments.dice(seed, drawn))


class Player:
    """Rows that play on side by side, each from its moment with its own seed.

    A row plays what it would play alone: it has its own dice, and rows do not meet in the model.
    """

    def __init__(
        self,
        model: mamba.MambaLM,
        tokenizer: Tokenizer,
        starts: Sequence[Moment],
        seeds: Sequence[int],
        sampling: Sampling = Sampling(),
        controls: Controls = Controls(),
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.sampling = sampling
        self.steering = Steering(controls, tokenizer)
        self._keys = numbers_in(tokenizer.pieces, "Pitch")  # of each token
        self._moves = torch.from_numpy(starts[0].grammar.rules.moving)  # which move the clock

        # the rows still playing, in the order of `logits` and of the state
        self.lines = [
            Line.of(row, start, seed) for row, (start, seed) in enumerate(zip(starts, seeds))
        ]
        self.logits = torch.cat([start.logits for start in starts])
        layers = zip(*(start.state for start in starts))  # a layer's memory of every row
        self._set([tuple(torch.cat(parts) for parts in zip(*layer)) for layer in layers])

    def _set(self, state: mamba.State) -> None:
        self._fast = step_cpu.stepper(self.model, len(self.lines)) if self.lines else None
        self._load(state)

    def _load(self, state: mamba.State) -> None:
        self._state = state
        if self._fast:
            self._fast.load(state)

    def go_to(self, moment: Moment) -> None:
        """Let the only row go on from another moment; its dice roll on."""
        (line,) = self.lines
        line.grammar = moment.grammar.copy()
        line.recent = deque(moment.recent, KEPT)
        self.logits = moment.logits
        self._load(moment.state)

    @property
    def grammars(self) -> list[Grammar]:
        """Where each row stands."""
        return [line.grammar for line in self.lines]

    @property
    def state(self) -> mamba.State:
        return self._fast.state() if self._fast else self._state

    def step(self) -> list[int]:
        """Draw one token a row, read it, and return them."""
        tokens = self.choose()
        self.read(tokens)
        return tokens.tolist()

    @torch.inference_mode()
    def choose(self) -> torch.Tensor:
        """Draw one token a row, int64 (B,), and do not read it yet."""
        numbers = np.array([line.dice.random() for line in self.lines])
        return draw(self.probabilities(), torch.from_numpy(numbers))

    @torch.inference_mode()
    def read(self, tokens: torch.Tensor) -> None:
        """Go on by one token a row, int64 (B,)."""
        if self._fast:
            self.logits = self._fast.step(tokens)
        else:
            tokens_there = tokens.to(self.model.device)
            self.logits, self._state = self.model.step(tokens_there, self._state)
        for line, token in zip(self.lines, tokens.tolist()):
            line.grammar.read(token)
            line.recent.append(token)
            line.drawn += 1

    def probabilities(self) -> torch.Tensor:
        """What each row's next token is drawn from, float64 (B, V)."""
        may_follow = np.stack([grammar.may_follow() for grammar in self.grammars])
        logits = self.logits.double().cpu().masked_fill(~torch.from_numpy(may_follow), -torch.inf)
        if self.steering:
            logits = self.steering.apply(logits, self.grammars)
        if self.sampling.repetition > 1:
            logits = self.sampling.discourage(logits, self._lately())
        return self.sampling.probabilities(logits, self._moves)

    def _lately(self) -> torch.Tensor:
        """Tokens that strike a key which was struck lately, however hard: bool (B, V)."""
        lately = np.zeros((len(self.lines), len(self._keys)), bool)
        for place, line in enumerate(self.lines):
            last = list(line.recent)[-LATELY:]
            struck = {key for token in last for key in self._keys[token]}
            lately[place] = [not struck.isdisjoint(keys) for keys in self._keys]
        return torch.from_numpy(lately)

    def keep(self, places: list[int]) -> None:
        """Go on with these places of `lines` only."""
        state = [tuple(part[places] for part in layer) for layer in self.state]
        self.lines = [self.lines[place] for place in places]
        self.logits = self.logits[places]
        self._set(state)

    def moment(self, place: int = 0) -> Moment:
        """Where the row at this place is now."""
        line = self.lines[place]
        here = slice(place, place + 1)
        logits = self.logits[here].clone()
        state = [tuple(part[here].clone() for part in layer) for layer in self.state]
        recent = tuple(line.recent)
        return Moment(logits, state, line.grammar.copy(), recent, line.seed, line.drawn)


def play(player: Player, until: float) -> Iterator[tuple[int, int, float]]:
    """Every row's tokens up to `until` seconds: (row, token, the second that it has reached).

    The tokens that reach `until` are not given. Rows that have ended are dropped when half are.
    """
    done: set[int] = set()
    limit = int(300 * until) + 1000  # far more tokens than any music has
    for _ in range(limit):
        for place, token in enumerate(player.step()):
            row = player.lines[place].row
            seconds = player.lines[place].grammar.seconds
            if row in done:
                continue
            if seconds >= until:
                done.add(row)
            else:
                yield row, token, seconds
        left = [place for place, line in enumerate(player.lines) if line.row not in done]
        if not left:
            return
        if 2 * len(left) <= len(player.lines):
            player.keep(left)


def sample(
    model: mamba.MambaLM,
    tokenizer: Tokenizer,
    prompt: np.ndarray,
    *,
    until: float,
    begin: float = 0.0,
    seed: int = 0,
    sampling: Sampling = Sampling(),
    controls: Controls = Controls(),
) -> Iterator[tuple[int, float]]:
    """Tokens that continue `prompt` (uint16 (L,), BOS first) from `begin` to `until` seconds.

    Yields each token and the second that it has reached; the first ones are bar lines where the
    prompt ends with silence. The end-of-piece token is never drawn.
    """
    start = hear(model, tokenizer, prompt, begin=begin)
    before = Grammar(tokenizer)
    for token in prompt:
        before.read(int(token))
    bar = int(tokenizer.base[BAR_LINE])
    yield from ((bar, begin) for _ in range(start.grammar.bar - before.bar))
    player = Player(model, tokenizer, [start], [seed], sampling, controls)
    for _, token, seconds in play(player, until):
        yield token, seconds


def check_seconds(value: float, name: str) -> None:
    """Raise `UserError` for a length that nobody can play."""
    if not 0 < value <= LONGEST:
        raise UserError(f"{name} {value} is outside 0 to {LONGEST}: choose another length")


def check_seed(seed: int) -> None:
    """Raise `UserError` for a seed that the dice do not take."""
    if not 0 <= seed < 2**63 - 1000:
        raise UserError(f"seed {seed} is outside 0 to 2^63: give a small whole number")


def prompt_end(prompt: Music, prompt_seconds: float) -> float:
    """The second at which the continuation begins, counted from the prompt's first note.

    A prompt that is shorter is heard out, its last chord and pedal too: a player waits for them.
    """
    if not len(prompt.notes):
        return 0.0
    sound = sustain(prompt).notes
    first = sound["start"].min()
    last = sound["start"].max()
    end = max(sound["end"].max(), last + 0.01)
    return float(min(prompt_seconds, end - first))


def hear_prompt(
    model: mamba.MambaLM, tokenizer: Tokenizer, prompt: Music | None, prompt_seconds: float
) -> tuple[Moment, np.ndarray, float]:
    """The moment after a prompt's first seconds, the notes that begin in them, and where they end.

    Silence before the first note is left out. A note that is held beyond the end keeps its length.
    Raises `UserError` when the prompt has no note.
    """
    if prompt is None:
        return hear(model, tokenizer, [tokenizer.bos]), NoteReader(tokenizer).notes([]), 0.0
    if not len(prompt.notes):
        raise UserError("the prompt has no note: give another one, or none")
    begin = prompt_end(prompt, prompt_seconds)
    start = hear(model, tokenizer, first_seconds(tokenizer, prompt, begin), begin=begin)
    return start, prompt_music(prompt, begin).notes, begin


def continuations(
    model: mamba.MambaLM,
    tokenizer: Tokenizer,
    starts: Sequence[Moment],
    seeds: Sequence[int],
    *,
    until: float,
    sampling: Sampling = Sampling(),
    controls: Controls = Controls(),
    progress: Callable[[float], None] | None = None,
) -> tuple[list[np.ndarray], list[list[int]]]:
    """The new notes, and the new tokens, of each start with its seed, up to `until` seconds.

    `progress` is called with the second that all have reached on average.
    """
    tokens: list[list[int]] = [[] for _ in starts]
    for first in range(0, len(starts), BATCH):
        here = slice(first, first + BATCH)
        player = Player(model, tokenizer, starts[here], seeds[here], sampling, controls)
        reached = np.zeros(len(starts[here]))
        for count, (row, token, seconds) in enumerate(play(player, until)):
            tokens[first + row].append(token)
            reached[row] = seconds
            if progress and count % 64 == 0:
                progress((first * until + reached.sum()) / len(starts))
    notes = [NoteReader(tokenizer, start.grammar).notes(ids) for start, ids in zip(starts, tokens)]
    return notes, tokens


def shifted(notes: np.ndarray, by: float) -> np.ndarray:
    """The same notes, so many seconds later; earlier where that is below 0."""
    notes = notes.copy()
    notes["start"] += by
    notes["end"] += by
    return notes


def join(before: np.ndarray, new: np.ndarray, begin: float, seconds: float, tempo: float) -> Music:
    """Old and new notes as one piece; the new ones stretched, and stopped where the piece stops."""
    new = new.copy()
    for edge in ("start", "end"):
        new[edge] = begin + (new[edge] - begin) / tempo
    notes = np.concatenate([before, new])
    notes = clip_repeats(notes[np.lexsort((notes["pitch"], notes["start"]))])
    end = begin + seconds
    notes = notes[notes["start"] < end]
    notes["end"] = np.minimum(notes["end"], end)  # the last chord stops with the piece
    return Music(notes)


def variations(
    model: mamba.MambaLM,
    tokenizer: Tokenizer,
    prompt: Music | None = None,
    *,
    seeds: Sequence[int],
    seconds: float = 30,
    prompt_seconds: float = 10,
    sampling: Sampling = Sampling(),
    controls: Controls = Controls(),
    progress: Callable[[float], None] | None = None,
) -> list[Music]:
    """`seconds` of new music for each seed, from one prompt that is read once, played side by side.

    Arguments and errors as for `generate`.
    """
    check_seconds(seconds, "seconds")
    check_seconds(prompt_seconds, "prompt-seconds")
    start, before, begin = hear_prompt(model, tokenizer, prompt, prompt_seconds)
    tempo = controls.tempo

    def played(now: float) -> None:
        if progress:
            progress(max(0.0, now - begin) / tempo)

    starts = [start] * len(seeds)
    until = begin + seconds * tempo
    new, _ = continuations(
        model,
        tokenizer,
        starts,
        seeds,
        until=until,
        sampling=sampling,
        controls=controls,
        progress=played,
    )
    return [join(before, notes, begin, seconds, tempo) for notes in new]


def generate(
    model: mamba.MambaLM,
    tokenizer: Tokenizer,
    prompt: Music | None = None,
    *,
    seconds: float = 30,
    prompt_seconds: float = 10,
    seed: int = 0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = Sampling.top_p,
    min_p: float = 0.0,
    repetition: float = 1.0,
    clock_temperature: float = 0.0,
    controls: Controls = Controls(),
    progress: Callable[[float], None] | None = None,
) -> Music:
    """`seconds` of new music, after the first `prompt_seconds` of `prompt` where one is given.

    The seconds are counted from the prompt's first note, with which the music returned begins. A
    shorter prompt is heard out: the new music enters when its last chord and the pedal have ended.
    A key that is held when `prompt_seconds` are over is not cut, it sounds on as long as it was
    played, or until the new music strikes it. The same arguments give the same notes. `progress`
    is called with the seconds played so far. Raises `UserError` when the prompt has no note or an
    argument is out of range.
    """
    sampling = Sampling(
        temperature, top_k, top_p, min_p, repetition, clock_temperature=clock_temperature
    )
    pieces = variations(
        model,
        tokenizer,
        prompt,
        seeds=[seed],
        seconds=seconds,
        prompt_seconds=prompt_seconds,
        sampling=sampling,
        controls=controls,
        progress=progress,
    )
    return pieces[0]
