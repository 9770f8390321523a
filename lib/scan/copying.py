"""Selective copying: play back the notes, forget the rests.

The task is that of Gu and Dao 2023, section 3.1 and figure 2. A sequence holds a few notes among
rests, then one cue for each note; the answers, at the cues, are the notes in their order. With
random gaps a model must choose what to remember by what it reads. Here are the task, small models
that differ in what remembers for them, and their training, which can be put down and
taken up again.
"""

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib.env.errors import UserError
from lib.scan.selective import selective_scan
from lib.scan.ssm import DiagonalSystems, kernel

SELECTIVE = ("delta", "B", "C")  # what may depend on the input
DT_MIN, DT_MAX = 0.01, 0.3  # steps at the start: memories of a few to some hundred positions
CHECK = 500  # sequences on which a point of a learning curve is measured


@dataclass(frozen=True)
class Task:
    """Sequences of `length` positions with `keep` notes in them, then `keep` cues."""

    notes: int = 8  # pitches to tell apart
    keep: int = 6  # notes to remember
    length: int = 58  # positions before the cues
    fixed_gaps: bool = False  # True: copying, all notes at the front; False: selective copying

    def __post_init__(self):
        if self.notes < 2 or not 1 <= self.keep <= self.length:
            raise UserError(
                f"a task needs two pitches or more and 1 to {self.length} notes to keep, "
                f"not {self.notes} and {self.keep}"
            )

    @property
    def rest(self) -> int:
        """The token of a rest; the tokens below it are notes."""
        return self.notes

    @property
    def cue(self) -> int:
        """The token that asks for the next note."""
        return self.notes + 1

    @property
    def vocab_size(self) -> int:
        return self.notes + 2

    def batch(self, size: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """Fresh sequences, tokens (B, length + keep), and their answers (B, keep)."""
        answers = torch.randint(self.notes, (size, self.keep), generator=random)
        if self.fixed_gaps:
            places = torch.arange(self.keep).expand(size, -1)
        else:  # the places of the `keep` largest of `length` random numbers, in order
            places = (
                torch.rand(size, self.length, generator=random)
                .topk(self.keep)
                .indices.sort()
                .values
            )
        tokens = torch.full((size, self.length + self.keep), self.rest)
        tokens[:, self.length :] = self.cue
        return tokens.scatter_(1, places, answers), answers


class FixedSystem(DiagonalSystems):
    """The systems of an S4D layer alone, one a channel: (B, L, D) to (B, L, D), a convolution."""

    def __init__(self, d_inner: int, d_state: int):
        super().__init__(d_inner, d_state, DT_MIN, DT_MAX)

    def matrix(self, length: int) -> Tensor:
        """(D, length, length): what is read at t (row) of what was written at s (column)."""
        impulse = kernel(*self.system(), length).real.T  # (D, L)
        lag = torch.arange(length)[:, None] - torch.arange(length)
        return torch.where(lag >= 0, impulse[:, lag.clamp(min=0)], 0)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, L, D) to (B, L, D). At these lengths a product with the matrix beats an FFT."""
        y = torch.bmm(self.matrix(x.shape[1]), x.permute(2, 1, 0))  # (D, L, B)
        return y.permute(2, 1, 0) + self.D * x


class SelectiveSystem(nn.Module):
    """A scan whose step, B and C are read off the input: (B, L, D) to (B, L, D) (algorithm 2).

    `selective` says which of "delta", "B", "C" are; the others are learnt constants. With all three
    it is the inside of a Mamba block, without its gate.
    """

    def __init__(self, d_inner: int, d_state: int, selective: Iterable[str] = SELECTIVE):
        super().__init__()
        self.selective = tuple(selective)
        if strange := set(self.selective) - set(SELECTIVE):
            raise UserError(
                f"{min(strange)!r} cannot be selective: choose among {', '.join(SELECTIVE)}"
            )
        rank = max(1, d_inner // 4)
        if "delta" in self.selective:  # by way of a few numbers, as in the paper
            self.delta_low = nn.Linear(d_inner, rank, bias=False)
            self.dt_proj = nn.Linear(rank, d_inner, bias=False)
        delta = torch.exp(torch.empty(d_inner).uniform_(math.log(DT_MIN), math.log(DT_MAX)))
        self.dt_bias = nn.Parameter(delta + torch.log(-torch.expm1(-delta)))  # softplus backwards
        for name in ("B", "C"):
            if name in self.selective:
                self.add_module(f"{name}_proj", nn.Linear(d_inner, d_state, bias=False))
            else:
                self.register_parameter(f"{name}_constant", nn.Parameter(torch.randn(d_state)))
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, d_state + 1)).repeat(d_inner, 1))
        self.D = nn.Parameter(torch.ones(d_inner))

    @property
    def A(self) -> Tensor:
        """(D, N), negative."""
        return -torch.exp(self.A_log)

    def select(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """delta (B, L, D), positive, and B and C (B, L, N), for an input x (B, L, D)."""
        delta = (
            self.dt_proj(self.delta_low(x)) if "delta" in self.selective else torch.zeros_like(x)
        )
        B, C = (
            getattr(self, f"{name}_proj")(x)
            if name in self.selective
            else getattr(self, f"{name}_constant").expand(*x.shape[:2], -1)
            for name in ("B", "C")
        )
        return F.softplus(delta + self.dt_bias), B, C

    def forward(self, x: Tensor) -> Tensor:
        """x (B, L, D) to (B, L, D)."""
        delta, B, C = self.select(x)
        return selective_scan(x, delta, self.A, B, C, self.D)


class GRUSystem(nn.GRU):
    """A GRU in the place of a state space: (B, L, D) to (B, L, D), with D numbers of state."""

    def __init__(self, d_inner: int):
        super().__init__(d_inner, d_inner, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, L, D) to (B, L, D), one position after another."""
        return super().forward(x)[0]


class Block(nn.Module):
    """x + out(system(silu(convolution(in(norm(x)))))): a Mamba block without its gate."""

    def __init__(self, d_model: int, system: nn.Module, d_inner: int, d_conv: int):
        super().__init__()
        self.norm = nn.RMSNorm(d_model)
        self.in_proj = nn.Linear(d_model, d_inner, bias=False)
        # d_conv = 0: no convolution
        self.conv1d = (
            nn.Conv1d(d_inner, d_inner, d_conv, groups=d_inner, padding=d_conv - 1)
            if d_conv
            else None
        )
        self.system = system
        self.out_proj = nn.Linear(d_inner, d_model, bias=False)

    def prepare(self, u: Tensor) -> Tensor:
        """What the system sees, (B, L, D), of the block's input u (B, L, d_model)."""
        x = self.in_proj(self.norm(u))
        if self.conv1d is not None:
            x = self.conv1d(x.mT)[..., : u.shape[1]].mT
        return F.silu(x)

    def forward(self, u: Tensor) -> Tensor:
        """The residual u (B, L, d_model) after this block."""
        return u + self.out_proj(self.system(self.prepare(u)))


# d_model and d_inner of each system, chosen so that all have about as many parameters
WIDTHS = {"fixed": (40, 80), "selective": (32, 64), "gru": (32, 32)}


class Copier(nn.Module):
    """Tokens (B, L) to logits (B, L, notes): embedding, blocks, norm, a linear layer.

    `system` names what remembers in every block: "fixed" (an S4D, the same at every position),
    "selective" (`selective` says what the input decides, see `SelectiveSystem`) or "gru". The first
    two remember `d_state` real numbers a channel. `WIDTHS` makes all three equally large.
    """

    def __init__(
        self,
        task: Task,
        system: str = "selective",
        *,
        selective: Iterable[str] = SELECTIVE,
        n_layer: int = 2,
        d_state: int = 8,
        d_conv: int = 4,
        widths: tuple[int, int] | None = None,
    ):
        super().__init__()
        if system not in WIDTHS:
            raise UserError(f"{system!r} is no system: choose {', '.join(WIDTHS)}")
        d_model, d_inner = widths or WIDTHS[system]
        make = {
            "fixed": lambda: FixedSystem(d_inner, d_state),
            "selective": lambda: SelectiveSystem(d_inner, d_state, selective),
            "gru": lambda: GRUSystem(d_inner),
        }[system]
        self.embeddings = nn.Embedding(task.vocab_size, d_model)
        self.layers = nn.ModuleList(Block(d_model, make(), d_inner, d_conv) for _ in range(n_layer))
        self.norm_f = nn.RMSNorm(d_model)
        self.head = nn.Linear(d_model, task.notes)

    def parameter_count(self) -> int:
        """Numbers that are learnt, each once."""
        return sum(p.numel() for p in self.parameters())

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, L) to logits (B, L, notes)."""
        u = self.embeddings(tokens)
        for block in self.layers:
            u = block(u)
        return self.head(self.norm_f(u))

    @torch.no_grad()
    def inputs(self, tokens: Tensor) -> list[Tensor]:
        """What the system of each block sees, (B, L, D) each."""
        u, seen = self.embeddings(tokens), []
        for block in self.layers:
            seen.append(block.prepare(u))
            u = block(u)
        return seen


@torch.no_grad()
def answer(model: nn.Module, task: Task, tokens: Tensor) -> Tensor:
    """The model's answers (B, keep): its likeliest pitch at each cue."""
    return model(tokens)[:, -task.keep :, : task.notes].argmax(-1)


def accuracy(
    model: nn.Module, task: Task, *, size: int = 1000, seed: int = 12345
) -> tuple[float, float]:
    """Share of notes, and of whole answers, that are right on fresh sequences."""
    tokens, answers = task.batch(size, torch.Generator().manual_seed(seed))
    right = torch.cat(
        [answer(model, task, t) == a for t, a in zip(tokens.split(250), answers.split(250))]
    )
    return right.double().mean().item(), right.all(1).double().mean().item()


class Training:
    """Training on fresh sequences only, at a constant rate and then with a decay.

    The loss is the cross-entropy at the cues, the optimizer Adam. The rate warms up for 50 steps
    and stays. When `steps` are done, or as soon as three checks in a row find `solved` of the notes
    right, it falls linearly to zero within `settle` steps. So a curve that is flat before that is
    not flat because of the schedule. `model` gives logits (B, L, V), V at least `task.notes`.
    `lengths`: draw each batch's length anew from this range, both ends included.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        steps: int,
        *,
        settle: int = 0,
        solved: float = math.inf,
        batch: int = 64,
        learning_rate: float = 0.01,
        lengths: tuple[int, int] | None = None,
        seed: int = 0,
        every: int = 100,
    ):
        self.model, self.task, self.batch, self.every = model, task, batch, every
        self.steps, self.settle, self.solved = steps, settle, solved
        self.learning_rate, self.lengths = learning_rate, lengths
        self.random = torch.Generator().manual_seed(seed)
        self.optimizer = torch.optim.Adam(model.parameters(), learning_rate)
        self.step, self.seconds = 0, 0.0
        self.settles_at = steps  # the step at which the decay begins; earlier when solved
        # one entry a check: (step, share of notes right, share of whole answers right)
        self.curve = [(0, *accuracy(model, task, size=CHECK))]

    @property
    def finished(self) -> bool:
        """Whether the decay is over too."""
        return self.step >= self.settles_at + self.settle

    def rate(self) -> float:
        """The learning rate of the next step."""
        warm = min(1, (self.step + 1) / 50)
        left = self.settles_at + self.settle - self.step
        return self.learning_rate * min(
            warm, left / self.settle if self.step >= self.settles_at else 1
        )

    def train_step(self) -> None:
        """One batch, one step of Adam."""
        task = self.task
        if self.lengths is not None:
            length = torch.randint(
                self.lengths[0], self.lengths[1] + 1, (), generator=self.random
            ).item()
            task = replace(task, length=length)
        tokens, answers = task.batch(self.batch, self.random)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        loss = F.cross_entropy(self.model(tokens)[:, -task.keep :].flatten(0, 1), answers.flatten())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1

    def check(self) -> None:
        """Add a point to the curve; begin the decay where the task is solved."""
        self.curve.append((self.step, *accuracy(self.model, self.task, size=CHECK)))
        last = [notes for _, notes, _ in self.curve[-3:]]
        if len(last) == 3 and min(last) >= self.solved:
            self.settles_at = min(self.settles_at, self.step)

    def run(self, seconds: float = math.inf) -> bool:
        """Train until the end, or for so many seconds; returns whether it is finished."""
        begin = time.monotonic()
        while not self.finished and time.monotonic() - begin < seconds:
            self.train_step()
            if self.step % self.every == 0 or self.finished:
                self.check()
        self.seconds += time.monotonic() - begin
        return self.finished

    def state_dict(self) -> dict:
        """All that `load_state_dict` needs to go on as if nothing had happened."""
        kept = {name: getattr(self, name) for name in ("step", "seconds", "settles_at", "curve")}
        return kept | {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": self.random.get_state(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on where `state_dict` was taken."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.random.set_state(state["random"])
        for name in ("step", "seconds", "settles_at", "curve"):
            setattr(self, name, state[name])


def train(
    model: nn.Module,
    task: Task,
    steps: int,
    *,
    seed: int = 0,
    every: int = 25,
    batch: int = 64,
    learning_rate: float = 0.01,
) -> list[tuple[int, float]]:
    """Train for `steps` steps, the last fifth of them with a falling rate.

    Returns (step, share of notes right) every so many steps. See `Training`.
    """
    settle = steps // 5
    training = Training(
        model,
        task,
        steps - settle,
        settle=settle,
        batch=batch,
        learning_rate=learning_rate,
        seed=seed,
        every=every,
    )
    training.run()
    return [(step, notes) for step, notes, _ in training.curve]
