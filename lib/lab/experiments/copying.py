"""Selective copying, every arm trained to the end:
`python -m lib.lab.experiments.copying [--minutes M]`.

Fixed, selective and gated (GRU) models of one, two and three layers, two seeds each, about equal in
parameters and equal in what they read. Then what a doubter would try: selection by parts, and for
the fixed model other rates, a larger state and training at many lengths. Every arm is kept as it
goes, under data/runs/selective_copying, and the same command goes on where the last one stopped.
Writes data/results/selective_copying.json, arm by arm.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from lib.env import machine as env
from lib.env.errors import UserError, cli
from lib.env.files import atomic_write, write_json
from lib.scan import copying

COMMAND = "python -m lib.lab.experiments.copying"
RUNS = env.ROOT / "data" / "runs" / "selective_copying"
NAME = "selective_copying"
TASK = copying.Task()
STEPS, SETTLE = 6000, 600  # steps at a constant rate, at most; steps of the decay after them
SOLVED = 0.995  # of the notes, at three checks in a row: the decay begins
LENGTHS = (10, 20, 40, 58, 80, 120, 200, 300)  # at which a trained model is tried
SEEDS = (0, 1)


@dataclass(frozen=True)
class Arm:
    """One model and how it is trained; everything else is the same for all."""

    group: str  # what it is compared with: "layers", "parts" or "doubts"
    system: str  # of `copying.Copier`
    n_layer: int = 2
    seed: int = 0
    selective: tuple[str, ...] = copying.SELECTIVE
    d_state: int = 8
    learning_rate: float = 0.01
    lengths: tuple[int, int] | None = (
        None  # positions before the cues in training; None: those of TASK
    )

    @property
    def name(self) -> str:
        """What sets it apart, as the name of its file."""
        parts = [self.system, f"{self.n_layer}_layers"]
        if self.system == "selective" and self.selective != copying.SELECTIVE:
            parts.append("only_" + "_".join(self.selective))
        if self.d_state != 8:
            parts.append(f"{self.d_state}_states")
        if self.learning_rate != 0.01:
            parts.append(f"rate_{self.learning_rate:g}")
        if self.lengths is not None:
            parts.append(f"lengths_{self.lengths[0]}_to_{self.lengths[1]}")
        return "_".join([*parts, f"seed_{self.seed}"])

    def training(self, steps: int = STEPS, settle: int = SETTLE) -> copying.Training:
        """The training, at its first step."""
        torch.manual_seed(self.seed)
        model = copying.Copier(
            TASK, self.system, selective=self.selective, n_layer=self.n_layer, d_state=self.d_state
        )
        return copying.Training(
            model,
            TASK,
            steps,
            settle=settle,
            solved=SOLVED,
            lengths=self.lengths,
            learning_rate=self.learning_rate,
            seed=self.seed,
        )


def arms() -> list[Arm]:
    """All arms, those that matter most first."""
    kinds = [
        (system, n)
        for n in (2, 1, 3)
        for system in ("selective", "gru", "fixed")
        if (system, n) != ("gru", 3)
    ]
    found = [Arm("layers", system, n_layer, seed) for seed in SEEDS for system, n_layer in kinds]
    found += [Arm("parts", "selective", 2, selective=parts) for parts in (("delta",), ("B", "C"))]
    found.append(Arm("doubts", "fixed", 3, lengths=(20, 100)))
    found += [Arm("doubts", "fixed", 2, learning_rate=rate) for rate in (0.03, 0.003)]
    return [*found, Arm("doubts", "fixed", 2, d_state=64)]


def train(
    arm: Arm, folder: Path, seconds: float = math.inf, *, steps: int = STEPS, settle: int = SETTLE
) -> dict | None:
    """Train an arm, or go on with it; its outcome, or None where the seconds were used up first."""
    kept = folder / f"{arm.name}.pt"
    training = arm.training(steps, settle)
    if kept.exists():
        training.load_state_dict(torch.load(kept, weights_only=True))
    finished = training.run(seconds)
    with atomic_write(kept) as part:
        torch.save(training.state_dict(), part)
    if not finished:
        return None
    return outcome(arm, training)


def outcome(arm: Arm, training: copying.Training) -> dict:
    """What a finished training came to."""
    notes, answers = copying.accuracy(training.model, TASK)
    other = {}
    for length in LENGTHS:
        task = copying.Task(length=length)
        other[str(length)] = copying.accuracy(training.model, task, size=500)[0]
    return {
        **asdict(arm),
        "parameters": training.model.parameter_count(),
        "steps": training.step,
        "settles_at": training.settles_at,
        "seconds": round(training.seconds, 1),
        "notes": notes,
        "answers": answers,
        "other_lengths": other,
        "curve": training.curve,
        **env.provenance(COMMAND, seed=arm.seed),
    }


def run(
    minutes: float = math.inf,
    folder: Path = RUNS,
    chosen: Iterable[Arm] | None = None,
    *,
    results: str = NAME,
    steps: int = STEPS,
    settle: int = SETTLE,
    say: Callable[[str], None] = print,
) -> bool:
    """Train what is not yet in the results, arm by arm; returns whether nothing is left."""
    deadline = time.monotonic() + 60 * minutes
    settings = {"steps": steps, "settle": settle, "solved": SOLVED, "task": asdict(TASK)}
    known = env.read_results(results) or {**settings, "arms": {}}
    if {key: known.get(key) for key in settings} != settings:
        raise UserError(
            f"data/results/{results}.json was measured with other settings: delete it to begin anew"
        )
    for arm in arms() if chosen is None else chosen:
        if arm.name in known["arms"]:
            continue
        left = deadline - time.monotonic()
        found = train(arm, folder, left, steps=steps, settle=settle) if left > 0 else None
        if found is None:
            say(f"time is up in {arm.name}: the same command goes on")
            return False
        known["arms"][arm.name] = found
        write_json(env.RESULTS / f"{results}.json", known)
        say(
            f"{arm.name:<45} {found['steps']:>5} steps, {found['seconds']:5.0f} s, "
            f"{found['notes']:6.1%} of the notes"
        )
    return True


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog=COMMAND, description="Train every arm of selective copying."
    )
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="stop after so many, and go on next time"
    )
    given = parser.parse_args(argv)
    run(given.minutes)


if __name__ == "__main__":
    cli(main)
