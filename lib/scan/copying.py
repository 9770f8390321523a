"""Selective copying: play back the notes, forget the rests (Gu and Dao 2023, section 3.1 and figure 2).

A sequence holds a few notes among rests, then one cue for each note; the answers, at the cues, are the
notes in their order. With random gaps a model must choose what to remember by what it reads. Here are
the task, two small models that differ in nothing but their state space, and their training.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib.env.errors import UserError
from lib.scan.selective import selective_scan
from lib.scan.ssm import DiagonalSystems

SELECTIVE = ("delta", "B", "C")  # what may depend on the input
DT_MIN, DT_MAX = 0.01, 0.3  # steps at the start: memories of a few to some hundred positions


@dataclass(frozen=True)
class Task:
    """Sequences of `length` positions with `keep` notes in them, then `keep` cues."""

    notes: int = 8  # pitches to tell apart
    keep: int = 6  # notes to remember
    length: int = 58  # positions before the cues
    fixed_gaps: bool = False  # True: copying, all notes at the front; False: selective copying

    def __post_init__(self):
        if self.notes < 2 or not 1 <= self.keep <= self.length:
            raise UserError(f"a task needs two pitches or more and 1 to {self.length} notes to keep, "
                            f"not {self.notes} and {self.keep}")

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
            places = torch.rand(size, self.length, generator=random).topk(self.keep).indices.sort().values
        tokens = torch.full((size, self.length + self.keep), self.rest)
        tokens[:, self.length:] = self.cue
        return tokens.scatter_(1, places, answers), answers


class FixedSystem(DiagonalSystems):
    """The systems of an S4D layer alone, one a channel: (B, L, D) to (B, L, D), a convolution."""

    def __init__(self, d_inner: int, d_state: int):
        super().__init__(d_inner, d_state, DT_MIN, DT_MAX)


class SelectiveSystem(nn.Module):
    """A scan whose step, B and C are read off the input: (B, L, D) to (B, L, D) (algorithm 2).

    `selective` says which of "delta", "B", "C" are; the others are learnt constants. With all three
    it is the inside of a Mamba block, without its gate.
    """

    def __init__(self, d_inner: int, d_state: int, selective: Iterable[str] = SELECTIVE):
        super().__init__()
        self.selective = tuple(selective)
        if strange := set(self.selective) - set(SELECTIVE):
            raise UserError(f"{min(strange)!r} cannot be selective: choose among {', '.join(SELECTIVE)}")
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
        delta = self.dt_proj(self.delta_low(x)) if "delta" in self.selective else torch.zeros_like(x)
        B, C = (getattr(self, f"{name}_proj")(x) if name in self.selective
                else getattr(self, f"{name}_constant").expand(*x.shape[:2], -1) for name in ("B", "C"))
        return F.softplus(delta + self.dt_bias), B, C

    def forward(self, x: Tensor) -> Tensor:
        """x (B, L, D) to (B, L, D)."""
        delta, B, C = self.select(x)
        return selective_scan(x, delta, self.A, B, C, self.D)


class Block(nn.Module):
    """x + out(system(silu(convolution(in(norm(x)))))): a Mamba block without its gate."""

    def __init__(self, d_model: int, system: nn.Module, d_inner: int, d_conv: int):
        super().__init__()
        self.norm = nn.RMSNorm(d_model)
        self.in_proj = nn.Linear(d_model, d_inner, bias=False)
        # d_conv = 0: no convolution
        self.conv1d = nn.Conv1d(d_inner, d_inner, d_conv, groups=d_inner, padding=d_conv - 1) if d_conv else None
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


class Copier(nn.Module):
    """Tokens (B, L) to logits (B, L, notes): embedding, blocks, norm, a linear layer.

    `selective` names what the input decides (`SelectiveSystem`); None makes every block's system an
    S4D, the same at every position. Both remember `d_state` real numbers a channel.
    """

    def __init__(self, task: Task, selective: Iterable[str] | None = SELECTIVE, d_model: int = 32, *,
                 n_layer: int = 2, d_state: int = 8, d_conv: int = 4):
        super().__init__()
        d_inner = 2 * d_model
        self.embeddings = nn.Embedding(task.vocab_size, d_model)
        systems = [FixedSystem(d_inner, d_state) if selective is None
                   else SelectiveSystem(d_inner, d_state, selective) for _ in range(n_layer)]
        self.layers = nn.ModuleList(Block(d_model, system, d_inner, d_conv) for system in systems)
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
    return model(tokens)[:, -task.keep:, : task.notes].argmax(-1)


def accuracy(model: nn.Module, task: Task, *, size: int = 1000, seed: int = 12345) -> tuple[float, float]:
    """Share of notes, and of whole answers, that are right on fresh sequences."""
    tokens, answers = task.batch(size, torch.Generator().manual_seed(seed))
    right = torch.cat([answer(model, task, t) == a for t, a in zip(tokens.split(250), answers.split(250))])
    return right.double().mean().item(), right.all(1).double().mean().item()


def train(model: nn.Module, task: Task, steps: int, *, batch: int = 64, learning_rate: float = 0.01,
          seed: int = 0, every: int = 25, progress: str = "") -> list[tuple[int, float]]:
    """Train on fresh sequences only; returns (step, share of notes right) every so many steps.

    Cross-entropy at the cues, Adam, 50 steps of warm-up and a cosine down to a twentieth.
    `model` gives logits (B, L, V), V at least `task.notes`. With `progress`, a bar of that name.
    """
    from tqdm import tqdm

    random = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), learning_rate)
    shape = lambda i: min(1, (i + 1) / 50) * (0.525 + 0.475 * math.cos(math.pi * i / steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, shape)
    curve = [(0, accuracy(model, task, size=250)[0])]
    for step in tqdm(range(1, steps + 1), progress, disable=not progress, leave=False):
        tokens, answers = task.batch(batch, random)
        loss = F.cross_entropy(model(tokens)[:, -task.keep:].flatten(0, 1), answers.flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % every == 0 or step == steps:
            curve.append((step, accuracy(model, task, size=250)[0]))
    return curve
