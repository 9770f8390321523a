"""Who can hold and who can choose: `python -m lib.lab.experiments.canon [--minutes M]`.

One layer each, about equal in parameters, between two linear maps, on two tasks over melodies: to
follow four seconds behind (a canon), and to name the last key that was marked. Every layer at four
learning rates with three seeds; S4D, which was best at the largest of them, at two larger ones as
well. One layer more is a control: an S4D without its waves. Writes data/results/canon.json, run by
run, and goes on where it stopped.
"""

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import mean

import numpy as np
import torch
from torch import Tensor, nn

from lib.env import machine as env
from lib.env.errors import cli
from lib.env.files import write_json
from lib.mamba.model import MambaConfig, MambaMixer
from lib.music.notes import Music
from lib.scan import ssm

COMMAND = "python -m lib.lab.experiments.canon"
NAME = "canon"
STEP, BEHIND, WINDOW = 8, 32, 256  # steps a second; steps to stay behind; steps of one example
MARKED = 1 / 12  # of all steps
RATES, SEEDS = (0.005, 0.01, 0.02, 0.04), (0, 1, 2)
HIGHER = (0.08, 0.16)  # for the layers that were best at the largest of RATES
LONGER = 2000  # steps, five times as many

# inputs (B, L, 1 or 2), target (B, L, 1), and where it counts (B, L, 1)
Task = tuple[Tensor, Tensor, Tensor]


# ---- melodies and tasks -------------------------------------------------------------------


def top_line(music: Music, rate: int) -> Tensor:
    """The highest sounding key from middle C up, `rate` times a second,
    from its first note on: (L,).
    """
    line = []  # [start, end, key]
    for start, end, key, _ in music.notes[music.notes["pitch"] >= 60].tolist():
        if line and start - line[-1][0] < 0.05:  # one chord: keep its top
            line[-1][1:] = max(line[-1][1:], [end, key], key=lambda note: note[1])
        elif not line or key >= line[-1][2] or start >= line[-1][1]:
            line.append([start, end, key])
    begins, _, keys = np.array(line).T
    at = np.arange(begins[0], music.seconds, 1 / rate)
    return torch.tensor(keys[np.searchsorted(begins, at, side="right") - 1])


def octaves(key: Tensor) -> Tensor:
    """MIDI keys in octaves around the C above middle C."""
    return (key.float() - 72) / 12


@dataclass(frozen=True)
class Melodies:
    """Top lines in octaves, STEP values a second."""

    train: list[Tensor]  # (L,) each
    test: Tensor  # (L,), of a piece that is not in train

    @classmethod
    def read(cls, say=print) -> "Melodies":
        """Of the sample of ten performances; the test is its Nocturne."""
        from lib.music.maestro import performances
        from lib.music.notes import read_midi

        found = performances(quick=True, say=say)
        nocturne = next(p for p in found if "Nocturne" in p.title)
        lines = {p.path: octaves(top_line(read_midi(p.path), STEP)) for p in found}
        return cls(
            [lines[p.path] for p in found if p.split == "train" and p != nocturne],
            lines[nocturne.path],
        )

    def draw(self, batch: int = 16) -> Tensor:
        """Windows of random train pieces, (B, WINDOW, 1), by torch's global random numbers."""
        found = []
        for piece in torch.randint(len(self.train), (batch,)).tolist():
            begin = torch.randint(len(self.train[piece]) - WINDOW, ()).item()
            found.append(self.train[piece][begin : begin + WINDOW])
        return torch.stack(found)[..., None]

    def windows(self) -> Tensor:
        """The test piece in windows, (B, WINDOW, 1)."""
        return self.test[: len(self.test) // WINDOW * WINDOW].view(-1, WINDOW, 1)


def canon(leader: Tensor) -> Task:
    """To hold: sing what the leader (B, L, 1) sang BEHIND steps ago."""
    begun = torch.arange(leader.shape[1])[:, None] >= BEHIND
    return leader, leader.roll(BEHIND, 1), begun.expand_as(leader)


def marked(melody: Tensor) -> Task:
    """To choose: name the key (B, L, 1) of the last marked step, of steps marked at random."""
    marks = torch.rand(melody.shape) < MARKED
    last = torch.where(marks, torch.arange(melody.shape[1])[:, None], -1).cummax(1).values
    return torch.cat([melody, marks], -1), melody.gather(1, last.clamp(min=0)), last >= 0


def silenced(melody: Tensor) -> Task:
    """As `marked`, but whatever is not marked is silent already when it comes in."""
    inputs, target, counts = marked(melody)
    return inputs * inputs[..., 1:], target, counts


TASKS = {"canon": canon, "marked": marked, "silenced": silenced}


# ---- layers and their training ------------------------------------------------------------


class GRU(nn.Module):
    """A GRU of one layer: (B, L, width) to (B, L, width)."""

    def __init__(self, width: int):
        super().__init__()
        self.cell = nn.GRU(width, width, batch_first=True)

    def forward(self, u: Tensor) -> Tensor:
        """Every state of the cell."""
        return self.cell(u)[0]


class Mamba(nn.Module):
    """The inside of a Mamba block, from an empty memory: (B, L, width) to (B, L, width)."""

    def __init__(self, width: int):
        super().__init__()
        self.mixer = MambaMixer(MambaConfig(vocab_size=1, d_model=width, n_layer=1))

    def forward(self, u: Tensor) -> Tensor:
        """What the block's inside makes of u."""
        return self.mixer(u, self.mixer.new_memory(len(u)))[0]


def without_waves(width: int) -> ssm.S4D:
    """An S4D whose states only fade: A is -1, -2, …, as in Mamba, and stays real."""
    layer = ssm.S4D(width, dt_min=0.01)
    with torch.no_grad():
        layer.A_imag.zero_()
        layer.A_log.copy_(torch.arange(1, layer.A_log.shape[1] + 1).log().expand_as(layer.A_log))
    layer.A_imag.requires_grad_(False)
    return layer


# width of the layer, and the layer. S4D gets no delta below 0.01:
# its slowest states then fade within a window.
LAYERS = {
    "S4D": (32, lambda width: ssm.S4D(width, dt_min=0.01)),
    "GRU": (32, GRU),
    "Mamba": (24, Mamba),
    "S4D without waves": (32, without_waves),
}


def build(layer: str, task: str, seed: int) -> nn.Sequential:
    """A linear map to the layer's width, the layer, and a linear map to one number."""
    torch.manual_seed(seed)
    width, make = LAYERS[layer]
    return nn.Sequential(
        nn.Linear(1 if task == "canon" else 2, width), make(width), nn.Linear(width, 1)
    )


def fit(
    model: nn.Module, draw: Callable[[], Task], steps: int, learning_rate: float
) -> list[float]:
    """Train with Adam on what `draw` gives; the loss at each step, in octaves squared."""
    optimizer, losses = torch.optim.Adam(model.parameters(), learning_rate), []
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=steps, pct_start=0.1
    )
    for _ in range(steps):
        inputs, target, counts = draw()
        loss = (model(inputs) - target)[counts].square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def score(model: nn.Module, task: Task) -> tuple[float, float]:
    """The share of steps that are right to half a semitone,
    and the error in semitones (root mean square).
    """
    inputs, target, counts = task
    miss = 12 * (model(inputs) - target)[counts]
    return (miss.abs() < 0.5).double().mean().item(), miss.square().mean().sqrt().item()


# ---- the experiment -----------------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    """One training."""

    layer: str
    task: str
    learning_rate: float
    seed: int = 0
    steps: int = 400

    @property
    def name(self) -> str:
        """What sets it apart."""
        rate = f"rate {self.learning_rate:g}"
        return f"{self.layer}, {self.task}, {rate}, {self.steps} steps, seed {self.seed}"


def arms() -> list[Arm]:
    """Every layer at every rate and seed, on both tasks; then what a doubter would try.

    Is it enough for an S4D that the choice was made before it? Does it want a higher rate? Are five
    times as many steps enough to hold, or to choose?
    """
    found = [
        Arm(layer, task, rate, seed)
        for seed in SEEDS
        for task in ("canon", "marked")
        for layer in LAYERS
        for rate in RATES
    ]
    found += [Arm("S4D", "silenced", rate, seed) for seed in SEEDS for rate in RATES]
    higher = [
        (layer, task) for layer in ("S4D", "S4D without waves") for task in ("canon", "marked")
    ]
    found += [
        Arm(layer, task, rate, seed)
        for seed in SEEDS
        for layer, task in [*higher, ("S4D", "silenced")]
        for rate in HIGHER
    ]
    longer = [("S4D", "marked", 0.08), ("S4D", "silenced", 0.08)]
    longer += [("Mamba", "canon", 0.01), ("GRU", "canon", 0.01)]
    return found + [
        Arm(layer, task, rate, seed, LONGER) for seed in SEEDS[:2] for layer, task, rate in longer
    ]


def measure(arm: Arm, melodies: Melodies) -> dict:
    """Train one arm and try it on the piece that it has never seen."""
    model, task = build(arm.layer, arm.task, arm.seed), TASKS[arm.task]
    begin = time.perf_counter()
    losses = fit(model, lambda: task(melodies.draw()), arm.steps, arm.learning_rate)
    seconds = time.perf_counter() - begin
    torch.manual_seed(12345)  # the same marks for all
    right, off = score(model, task(melodies.windows()))
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {
        **asdict(arm),
        "parameters": parameters,
        "right": right,
        "semitones": off,
        "seconds": round(seconds, 1),
        "last_loss": mean(losses[-20:]),
        **env.provenance(COMMAND, seed=arm.seed),
    }


def best(
    found: dict, layer: str, task: str, steps: int = 400, rates: tuple[float, ...] = RATES
) -> list[dict]:
    """The runs of a layer on a task, a seed each,
    at the one of these rates whose training loss ends lowest.

    The rates are those that all layers had, so that none is helped by having had more.
    """
    runs = [
        run
        for run in found.values()
        if (run["layer"], run["task"], run["steps"]) == (layer, task, steps)
        and run["learning_rate"] in rates
    ]
    tried = {run["learning_rate"] for run in runs}
    lowest = min(
        tried,
        key=lambda rate: mean(run["last_loss"] for run in runs if run["learning_rate"] == rate),
    )
    return [run for run in runs if run["learning_rate"] == lowest]


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog=COMMAND, description="Train every layer on every task.")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="stop after so many, and go on next time"
    )
    given = parser.parse_args(argv)
    deadline = time.monotonic() + 60 * given.minutes
    known = env.read_results(NAME) or {"runs": {}}
    melodies = Melodies.read()
    for arm in arms():
        if arm.name in known["runs"]:
            continue
        if time.monotonic() > deadline:
            print(f"time is up before {arm.name}: the same command goes on")
            return
        found = known["runs"][arm.name] = measure(arm, melodies)
        write_json(env.RESULTS / f"{NAME}.json", known)
        print(f"{arm.name:<60} {found['right']:4.0%} right, {found['seconds']:4.0f} s", flush=True)


if __name__ == "__main__":
    cli(main)
