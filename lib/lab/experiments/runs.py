"""One training run of an experiment: any architecture, stopped and resumed at will,
its outcome a file.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, NotRequired

from pydantic import ConfigDict, Field
from typing_extensions import TypedDict  # pydantic wants this one before Python 3.12

from lib.env.errors import UserError
from lib.env.files import atomic_write
from lib.env.schema import Amount, Count, Number, read_json
from lib.lab.rivals import matched
from lib.lab.rivals.matched import Size
from lib.lab.rivals.windows import model_bits
from lib.music.streams import Piece, Streams
from lib.train import checkpoints
from lib.train.config import TrainConfig
from lib.train.trainer import Trainer

OUTCOME = "outcome.json"


class Protocol(TypedDict):
    """A record of what was chosen; one of training has a `config`."""

    __pydantic_config__ = ConfigDict(extra="allow")
    config: NotRequired[dict[str, bool | int | Number | str]]


class Outcome(TypedDict):
    """What is kept of a run that has ended."""

    spec: Protocol
    parameters: Count
    body_parameters: Count
    steps: Count
    tokens: Count
    training_seconds: Amount
    tokens_per_second: Amount
    validation_bits_per_note: Amount
    best_step: Count
    # bits a note of the pieces in `judge`, at each row of the log
    judged: NotRequired[list[Amount]]
    log: Annotated[list[checkpoints.Row], Field(min_length=1, max_length=1_000_000)]


class OutOfTime(Exception):
    """The budget of minutes is used up; everything so far is kept."""


@dataclass(frozen=True)
class Spec:
    """What is trained, and how."""

    name: str  # also its folder
    arch: str
    size: Size
    config: TrainConfig
    # steps after which the learning rate is cut tenfold, again and again; 0: warm-up and cosine
    cut_every: int = 0

    def facts(self, streams: Streams) -> dict:
        """As JSON has it, for comparison with a file; with the data that it is for."""
        facts = asdict(self) | {
            "streams": streams.settings.get("id"),
            "vocabulary": streams.vocab_size,
        }
        return json.loads(json.dumps(facts))


def completed(facts: dict) -> dict:
    """A record whose `config` may be older than a field of `TrainConfig`:
    that has its default then.
    """
    return facts | (
        {"config": asdict(TrainConfig()) | facts["config"]} if "config" in facts else {}
    )


class Run(Trainer):
    """A `Trainer` for any architecture of `lib.lab.rivals.matched`.

    A model that does not carry its state begins each crop afresh, and is validated on windows.
    `judge` are pieces that every validation looks at too; nothing is selected by them.
    """

    def __init__(
        self, spec: Spec, streams: Streams, folder: Path, judge: Sequence[Piece] = (), **options
    ):
        self.spec = spec
        self.training_seconds = 0.0
        self.judge = list(judge)
        self.judged: list[float] = []
        super().__init__(
            streams,
            spec.config,
            folder,
            save=matched.save,
            build=lambda: matched.build(spec.arch, streams.vocab_size, spec.size),
            **options,
        )
        if spec.cut_every:  # after the loop has set its own rate
            self.optimizers["optimizer"].register_step_pre_hook(self._cut)

    def _cut(self, optimizer, args, kwargs) -> None:
        for group in optimizer.param_groups:
            group["lr"] = self.config.lr * 0.1 ** (self.step // self.spec.cut_every)

    def train_step(self) -> float:
        begin = time.monotonic()
        if not self.model.carries:
            self.state = self.model.new_state(self.rows.stop - self.rows.start)
        loss = super().train_step()
        self.training_seconds += time.monotonic() - begin
        return loss

    def evaluate(self) -> float:
        if self.judge:
            self.judged.append(self._bits_per_note(self.judge))
        return self._bits_per_note(self.held_out)

    def _bits_per_note(self, pieces: list[Piece]) -> float:
        bits = model_bits(self.model, self.streams, pieces, autocast=self.precision)
        return float(bits.sum()) / sum(piece.notes for piece in pieces)

    def snapshot(self) -> tuple[dict, dict]:
        tensors, facts = super().snapshot()
        return tensors, facts | {"training_seconds": self.training_seconds, "judged": self.judged}

    def restore(self, tensors: dict, facts: dict) -> None:
        super().restore(tensors, facts)
        if "training_seconds" not in facts:
            raise UserError(
                f"{self.folder} holds no run of an experiment: "
                "delete it, or choose another --folder"
            )
        self.training_seconds = facts["training_seconds"]
        self.judged = list(facts.get("judged", []))


def train(
    spec: Spec,
    streams: Streams,
    folder: Path,
    *,
    judge: Sequence[Piece] = (),
    deadline: float = math.inf,
    device: str | None = None,
    say: Callable[[str], None] = print,
) -> dict:
    """Train, or go on, or open the outcome of an earlier call;
    the best checkpoint is in folder/best.

    Raises `OutOfTime` when `time.monotonic()` passes `deadline`, with all work kept,
    and `UserError` where the folder holds a run of another protocol.
    """
    facts = spec.facts(streams)
    outcome = folder / OUTCOME
    if outcome.exists():
        found = read_json(outcome, Outcome, do="delete that file, and the run goes on")
        if completed(found["spec"]) != facts:
            raise UserError(
                f"{folder} holds a run of another protocol: delete it, or choose another --folder"
            )
        return found
    if time.monotonic() > deadline:
        raise OutOfTime
    run = Run(spec, streams, folder, judge, device=device, resume=True, say=lambda text: None)

    def watch(trainer):
        trainer.stop_asked = trainer.stop_asked or time.monotonic() > deadline

    say(f"{spec.name}: from step {run.step}")
    run.run(progress=False, watch=watch)
    if not run.finished:
        raise OutOfTime
    best = min(run.log, key=lambda row: row["validation_bits_per_note"])
    found = {
        "spec": facts,
        "parameters": run.model.parameter_count(),
        "body_parameters": matched.body(run.model),
        "steps": run.step,
        "tokens": run.tokens,
        "training_seconds": round(run.training_seconds, 2),
        "tokens_per_second": round(run.tokens / run.training_seconds, 1),
        "validation_bits_per_note": run.best,
        "best_step": best["step"],
        "log": run.log,
    }
    if run.judge:
        found["judged"] = run.judged
    with atomic_write(outcome) as part:
        part.write_text(json.dumps(found, indent=1) + "\n")
    for name in (checkpoints.LAST, checkpoints.PREVIOUS):
        (folder / name).unlink(missing_ok=True)
    say(
        f"{spec.name}: {run.best:.2f} bits a note on validation "
        f"after {run.training_seconds / 60:.1f} minutes"
    )
    return found


def best_model(folder: Path, device: str = "cpu"):
    """The best checkpoint of a run that has ended. Raises `UserError` where it has not."""
    if not (folder / OUTCOME).exists():
        raise UserError(
            f"{folder.name} has not ended on this machine: run python -m lib.lab.experiments first"
        )
    return matched.load(folder / "best", device)
