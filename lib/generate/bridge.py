"""Bridge a gap between two pieces: `python -m lib.generate --from A.mid --to B.mid --seconds 8`.

A model that only looks back plays on from A as if nothing were to come. Here many rows play on side
by side, and again and again each is asked how likely B would be from where it stands. Rows from
which B is unlikely are dropped, the others forked: sequential Monte Carlo (Gordon, Salmond and
Smith 1993), with what lies ahead as a twist of the weights, as in twisted SMC (Zhao and others
2024). In the end every row has reached B, and one is drawn by its weight: how likely B is from
there, over how likely the row was to end there. The more rows, the nearer its music comes to what
the model would draw given both A and B. What that brings, `lib.lab.experiments.bridge` measures: B
is far likelier than after a plain continuation, but not shown to be likelier than after the best of
as many that were chosen once, at the end.

Forking is what a state space model does cheaply. All that a row knows is a `Moment`, which has the
same size after a second and after an hour: a copy of some hundred kilobytes. A Transformer's row is
its cache, which grows with every token read, and to fork it is to copy all of that.
"""

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch.nn import functional as F

from lib.env.errors import UserError
from lib.generate.control import Controls
from lib.generate.grammar import NoteReader
from lib.generate.moment import Moment
from lib.generate.player import Player, check_seconds, hear_prompt, shifted
from lib.generate.sampling import Sampling, draw
from lib.mamba import MambaLM
from lib.music.notes import Music, clip_repeats, sustain
from lib.music.token_names import BAR_LINE
from lib.music.tokens import BAR, BEAT, Tokenizer

ROWS = 32
AHEAD = 32  # tokens of what follows that a row is weighed by: a bridge changes little behind them
EVERY = 96  # tokens, at least, from one weighing to the next
TWIST = 0.5  # the power of the likelihood on the way; 1 at the end, where it is what is meant
ENOUGH = 0.5  # share of the rows that must count: below, they are drawn anew


@dataclass(frozen=True)
class Goal:
    """What follows, and when: its tokens from inside its first bar on, or from the bar line on."""

    second: float
    inside: list[int]
    whole: list[int]  # the first may hold the bar line and what comes behind it, merged
    bar_line: int  # as a token

    @classmethod
    def of(cls, tokenizer: Tokenizer, after: Music, second: float) -> "Goal":
        """A piece whose first note comes at this second, on the tokens' grid."""
        bar = int(second / BAR + 1e-9)
        sound = sustain(after) if tokenizer.config.pedal == "extend" else after
        notes = starting_at(second - bar * BAR, sound.notes)
        base = tokenizer.encode_base(Music(notes))
        inside, whole = (
            [int(token) for token in tokenizer.merge(ids) if tokenizer.pieces[int(token)]]
            for ids in (base[1:], base)
        )
        return cls(second, inside, whole, int(tokenizer.base[BAR_LINE]))

    def first(self, count: int) -> "Goal":
        """The same, with so many tokens behind the first bar line."""
        more = len(self.whole) - len(self.inside)
        return replace(self, inside=self.inside[:count], whole=self.whole[: count + more])

    def seen_from(self, row: "Row") -> list[int]:
        """The tokens by which a row would go on with what follows: in the next bar, or in time."""
        if not row.there:
            return self.whole
        bars = row.moment.grammar.copy().wait(self.second, self.bar_line)
        return [*bars[:-1], *self.whole] if bars else self.inside


@dataclass
class Row:
    """One way across: where it stands, and the tokens that led there."""

    moment: Moment
    tokens: list[int] = field(default_factory=list)
    there: bool = False  # its next note would come too late
    late: float = 0.0  # the log-probability of that, as tokens were drawn


@dataclass(frozen=True)
class Crossing:
    """All rows at the goal, their weights (rows,), and the effective sample sizes on the way."""

    rows: list[Row]
    weights: np.ndarray
    sizes: list[float]

    def draw(self, seed: int = 0) -> Row:
        """One of them, by its weight."""
        dice = torch.tensor([np.random.default_rng([seed, len(self.rows)]).random()])
        return self.rows[int(draw(torch.from_numpy(self.weights)[None], dice.double())[0])]


def starting_at(second: float, notes: np.ndarray) -> np.ndarray:
    """The same notes, the first of which begins at this second."""
    return shifted(notes, second - notes["start"].min())


def cross(
    model: MambaLM,
    tokenizer: Tokenizer,
    start: Moment,
    goal: Goal,
    *,
    rows: int = ROWS,
    seed: int = 0,
    sampling: Sampling = Sampling(),
    controls: Controls = Controls(),
    every: int = EVERY,
) -> Crossing:
    """Play from a moment to a goal in many rows, the unlikely ones replaced on the way."""
    rng = np.random.default_rng(seed)
    crowd = [Row(start) for _ in range(rows)]
    log_weights = np.zeros(rows)
    twists = np.zeros(rows)
    sizes = []
    while not all(row.there for row in crowd):
        walking = [i for i, row in enumerate(crowd) if not row.there]
        seeds = rng.integers(2**62, size=len(walking)).tolist()
        moments = [crowd[i].moment for i in walking]
        player = Player(model, tokenizer, moments, seeds, sampling, controls)
        for i, row in zip(walking, walk(player, [crowd[i] for i in walking], goal, every)):
            crowd[i] = row
        power = 1.0 if all(row.there for row in crowd) else TWIST
        before, twists = twists, power * arrivals(model, crowd, goal)
        log_weights += twists - before
        weights = normalised(log_weights)
        sizes.append(effective_size(weights))
        if power < 1 and sizes[-1] < ENOUGH * rows:
            chosen = resample(weights, rng.random())
            crowd = [crowd[i] for i in chosen]
            twists = twists[chosen]
            log_weights = np.zeros(rows)
    return Crossing(crowd, normalised(log_weights), sizes)


def walk(player: Player, rows: list[Row], goal: Goal, every: int) -> list[Row]:
    """Each row some tokens further, to where a note has ended, or to the goal."""
    tokens = [list(row.tokens) for row in rows]
    ended: dict[int, Row] = {}
    limit = every + int(300 * goal.second) + 1000  # far more tokens than any music has
    for count in range(limit):
        drawn = player.choose()
        for place, token in enumerate(drawn.tolist()):
            if place in ended:
                continue
            grammar = player.lines[place].grammar
            if count >= every and grammar.end == "Duration":  # whatever comes next is drawn later
                ended[place] = Row(player.moment(place), tokens[place])
                continue
            late = grammar.seconds + grammar.elapsed() >= goal.second - 1e-6
            if late[token]:
                p = player.probabilities()[place].numpy()
                ended[place] = Row(player.moment(place), tokens[place], True, np.log(p[late].sum()))
            else:
                tokens[place].append(token)
        if len(ended) == len(rows):
            return [ended[place] for place in range(len(rows))]
        player.read(drawn)
    raise UserError("the model plays without moving on: try a higher --temperature")


def arrivals(model: MambaLM, rows: list[Row], goal: Goal) -> np.ndarray:
    """How likely what follows is from each row, over how likely the row was to end there, in nats.

    What follows says itself that no note comes in between: where a row has ended, that would count
    twice otherwise. float64 (rows,).
    """
    return log_likelihood(model, rows, goal) - np.array([row.late for row in rows])


@torch.inference_mode()
def log_likelihood(
    model: MambaLM, rows: list[Row], goal: Goal, skip: int = 0, count: int = AHEAD
) -> np.ndarray:
    """Log-likelihood of what follows from where each row stands, in nats: float64 (rows,).

    Of `count` tokens of it, those behind the first `skip`, which are only read.
    """
    goal = goal.first(skip + count)
    whole = [goal.seen_from(row) for row in rows]
    unasked = [len(ids) - len(goal.inside[skip:]) if skip else 0 for ids in whole]
    length = max(len(ids) for ids in whole)
    tokens = torch.zeros(len(rows), length, dtype=torch.long)
    targets = torch.full((len(rows), length), -1)
    for i, ids in enumerate(whole):
        tokens[i, : len(ids)] = torch.tensor(ids)
        targets[i, unasked[i] : len(ids)] = torch.tensor(ids[unasked[i] :])
    tokens = tokens.to(model.device)
    targets = targets.to(model.device)
    layers = zip(*(row.moment.state for row in rows))
    state = [tuple(torch.cat(parts) for parts in zip(*layer)) for layer in layers]
    logits = torch.cat([row.moment.logits for row in rows])
    nats = F.cross_entropy(logits, targets[:, 0], ignore_index=-1, reduction="none").double()
    x, _ = model.residual(tokens[:, :-1], state)
    nats += model.nats(x, targets[:, 1:].contiguous()).view(len(rows), -1).double().sum(1)
    return -nats.cpu().numpy()


def normalised(log_weights: np.ndarray) -> np.ndarray:
    """Weights that add up to 1."""
    weights = np.exp(log_weights - log_weights.max())
    return weights / weights.sum()


def effective_size(weights: np.ndarray) -> float:
    """How many equal rows would be worth as much: 1 / Σ w² (Kong, Liu and Wong 1994)."""
    return float(1 / (weights**2).sum())


def resample(weights: np.ndarray, dice: float) -> np.ndarray:
    """Rows to go on with, (rows,), by systematic resampling.

    Each comes about as often as its weight says.
    """
    ladder = (dice + np.arange(len(weights))) / len(weights)
    return np.minimum(np.searchsorted(np.cumsum(weights), ladder, side="right"), len(weights) - 1)


def bridge(
    model: MambaLM,
    tokenizer: Tokenizer,
    before: Music,
    after: Music,
    *,
    seconds: float = 8,
    rows: int = ROWS,
    seed: int = 0,
    sampling: Sampling = Sampling(),
    controls: Controls = Controls(),
) -> tuple[Music, float, float]:
    """One piece, then so many seconds of new music that lead to the other, then that.

    The first is heard out, and silence before the second is left out. Returns the whole, and the
    seconds at which the new music begins and ends. Raises `UserError` where one has no note or an
    argument is out of range.
    """
    check_seconds(seconds, "seconds")
    if not 2 <= rows <= 1000:
        raise UserError(f"rows {rows} is outside 2 to 1000: choose how many play side by side")
    if not len(after.notes):
        raise UserError("the piece to arrive at has no note: give another one")
    grid = BEAT / tokenizer.config.steps
    start, old, begin = hear_prompt(model, tokenizer, before, sustain(before).seconds + 1)
    end = round((begin + seconds) / grid) * grid
    goal = Goal.of(tokenizer, after, end)
    crossing = cross(
        model, tokenizer, start, goal, rows=rows, seed=seed, sampling=sampling, controls=controls
    )
    new = NoteReader(tokenizer, start.grammar).notes(crossing.draw(seed).tokens)
    notes = np.concatenate([old, new, starting_at(end, sustain(after).notes)])
    order = np.lexsort((notes["pitch"], notes["start"]))
    return Music(clip_repeats(notes[order])), begin, end
