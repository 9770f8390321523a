"""The files of a training run: written whole or not at all, kept few, checked when they are read.

A run's folder holds `last.safetensors`, `previous.safetensors` in case the last is damaged,
`log.csv` and `best/`. A checkpoint is tensors and, in its metadata, JSON: no code can hide in it. A
checksum over both finds a flipped bit.
"""

import csv
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NotRequired

import torch
from filelock import FileLock, Timeout
from pydantic import ConfigDict, Field
from torch import Tensor
from typing_extensions import TypedDict  # pydantic wants this one before Python 3.12

from lib.env.errors import Damaged, UserError, os_errors
from lib.env.files import atomic_write, on_disk
from lib.env.machine import RESULTS, ROOT, read_results
from lib.env.schema import Amount, Count, Few, Number, check
from lib.env.tensors import open_tensors
from lib.mamba.config_schema import WEIGHTS

LAST, PREVIOUS, LOG = "last.safetensors", "previous.safetensors", "log.csv"
MOST_TIMES = 100  # a checkpoint's bytes to those of the weights, at most, without the rows' states
MOST_ROWS = 4096  # whose states a checkpoint of a stranger's may hold
SPARE = 64 << 20  # bytes for facts and random states, however small the model
LOG_FIELDS = ["step", "tokens", "minutes", "lr", "train_bits_per_token", "validation_bits_per_note"]


class Row(TypedDict):
    """A line of the log; the keys are `LOG_FIELDS`."""

    step: Count
    tokens: Count
    minutes: Amount
    lr: Amount
    train_bits_per_token: Amount
    validation_bits_per_note: Amount


class Numbers(TypedDict):
    """The two that PCG64 counts with."""

    state: Annotated[int, Field(ge=0, lt=2**128)]
    inc: Annotated[int, Field(ge=0, lt=2**128)]


class Generator(TypedDict):
    """The state of numpy's PCG64."""

    bit_generator: Annotated[str, Field(pattern="^PCG64$")]
    state: Numbers
    has_uint32: Annotated[int, Field(ge=0, le=1)]
    uinteger: Annotated[int, Field(ge=0, lt=2**32)]


class Position(TypedDict):
    """What `lib.train.batches.Batches.position` gives."""

    rows: list[Annotated[list[Count], Field(min_length=3, max_length=3)]]
    drawn: NotRequired[
        list[
            Annotated[
                list[Annotated[int, Field(ge=-128, le=128)]], Field(min_length=2, max_length=2)
            ]
        ]
    ]
    first: bool
    rng: Generator


class Before(TypedDict, total=False):
    """What is known of the weights that a run started from."""

    __pydantic_config__ = ConfigDict(extra="allow")
    folder: str
    weights: str  # the checksum of their file
    steps: Count
    tokens: Count
    hours: Amount


class Facts(TypedDict):
    """All that a checkpoint says beside its tensors. What may be missing is not in older runs."""

    config: dict[str, bool | int | Number | str]
    settings: dict
    data: NotRequired[str]
    init: NotRequired[Before | None]
    step: Count
    tokens: Count
    seconds: Amount
    best: Annotated[float, Field(ge=0)]  # infinite until something was validated
    log: Annotated[list[Row], *Few]
    recent: NotRequired[Annotated[list[Number], Field(max_length=1000)]]
    crops: Position
    scaler: dict[str, Amount]
    training_seconds: NotRequired[Amount]  # of a run of `lib.lab.experiments`


Look = Callable[[Facts, int], None]


def checksum(tensors: Iterable[tuple[str, Tensor]], facts: str) -> str:
    """SHA-256 of the facts and of every tensor's name, type, shape and bytes.

    The tensors come in the order of their names.
    """
    digest = hashlib.sha256(facts.encode())
    for name, tensor in tensors:
        tensor = tensor.contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def write(folder: Path, tensors: dict[str, Tensor], facts: dict) -> None:
    """Make this the last checkpoint of the run; the one that was the last becomes the previous.

    Whenever the process dies, at least one of the two is whole. Raises `UserError` (a full disk).
    """
    from safetensors.torch import save

    text = json.dumps(facts)
    data = save(tensors, metadata={"run": text, "sha256": checksum(sorted(tensors.items()), text)})
    with atomic_write(folder / LAST) as part:
        part.write_bytes(data)
        on_disk(part)  # before another file gives its name up
        if (folder / LAST).exists():
            os.replace(folder / LAST, folder / PREVIOUS)
    with atomic_write(folder / LOG) as part, open(part, "w", newline="") as file:
        writer = csv.DictWriter(file, LOG_FIELDS)
        writer.writeheader()
        writer.writerows(facts["log"])


def exists(folder: Path) -> bool:
    """Whether the folder holds a run's checkpoint, whole or not, or a link to one.

    A link counts wherever it leads.
    """
    return any(os.path.lexists(folder / name) for name in (LAST, PREVIOUS))


def stamp(folder: Path) -> tuple[int, ...] | None:
    """What tells the run's last checkpoint from the one before, whatever the clock says."""
    try:
        found = (folder / LAST).stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def read(folder: Path, say=print, look: Look | None = None) -> tuple[dict[str, Tensor], Facts]:
    """Tensors and facts of the run's last checkpoint that is whole.

    Before a tensor is read, `look` is given the facts and the bytes of the file, and may
    raise. Raises `UserError` where no checkpoint is whole, or where one cannot be read and may
    be whole nevertheless.
    """
    faults = []
    for name in (LAST, PREVIOUS):
        if not os.path.lexists(folder / name):
            continue  # killed between two renames: the other one is whole
        try:
            return open_one(folder / name, look)
        except ValueError as error:
            faults.append(f"{name}: {error}")
            if name == LAST and (folder / PREVIOUS).exists():
                say(f"{folder.name}/{name} is damaged ({error}): going on from the one before")
    why = f" ({faults[0]})" if faults else ""
    raise UserError(f"no checkpoint in {folder} is whole{why}: delete that folder and start again")


def open_one(path: Path, look: Look | None = None) -> tuple[dict[str, Tensor], Facts]:
    """Tensors and facts of one file; see `read`.

    Raises ValueError where its content is damaged, `UserError` where it cannot be read.
    """
    try:
        with open_tensors(path, do="start again") as file:
            text, recorded = _notes(file)
            facts = check(text, Facts)
            if look:
                look(facts, path.stat().st_size)
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
    except Damaged as error:
        raise ValueError("it cannot be opened") from error
    if recorded not in (None, checksum(tensors.items(), text)):
        raise ValueError("its checksum is wrong")
    return tensors, facts


def _notes(file) -> tuple[str, str | None]:
    """The facts as they were written and their checksum.

    Runs of the course's first version lack the checksum.
    """
    notes = file.metadata() or {}
    if "run" not in notes:
        raise ValueError("it says nothing of a run")
    return notes["run"], notes.get("sha256")


def check_size(folder: Path, size: int, weights: int, rows: int) -> None:
    """Raise `UserError` where a checkpoint has far more bytes than training such weights keeps.

    A row's state is smaller than the weights, among which A has as many numbers as the states.
    """
    most = (MOST_TIMES + 2 * rows) * weights + SPARE
    if size > most:
        raise UserError(
            f"the checkpoint in {folder} takes {size / 1e6:,.0f} MB, and training this model "
            f"keeps less than {most / 1e6:,.0f} MB: it is of another model, choose another folder"
        )


@contextmanager
def alone(folder: Path):
    """Keep a second process out of the folder, and sweep up what a killed one left half written."""
    with os_errors(f"write to {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise UserError(
                f"another process trains in {folder}: wait for it, or choose another --out"
            ) from error
    try:
        for part in [*folder.glob(".*.part.*"), *folder.glob("best/.*.part.*")]:
            shutil.rmtree(part) if part.is_dir() else part.unlink(missing_ok=True)
        yield
    finally:
        lock.release()


def history(folder: Path) -> dict:
    """Where weights in a checkpoint folder come from.

    That is its name, and the training behind it where that is known.
    """
    folder = Path(folder).resolve()
    facts = {
        "folder": str(folder.relative_to(ROOT)) if folder.is_relative_to(ROOT) else folder.name
    }
    if exists(folder.parent) and folder.name == "best":  # of a run
        weights = (folder / WEIGHTS).stat().st_size if (folder / WEIGHTS).exists() else 0
        look = lambda _, size: check_size(folder.parent, size, weights, MOST_ROWS)
        run = read(folder.parent, lambda text: None, look)[1]
        before = run.get("init") or {}
        row = min(run["log"], key=lambda row: row["validation_bits_per_note"], default=None)
        if row and row["validation_bits_per_note"] > run["best"] + 1e-5:
            row = {"step": 0, "tokens": 0, "minutes": 0.0}  # none was better than the beginning
        known = not before or "tokens" in before
        if row and known:
            facts |= {
                "steps": row["step"] + before.get("steps", 0),
                "tokens": row["tokens"] + before.get("tokens", 0),
                "hours": round(row["minutes"] / 60 + before.get("hours", 0), 3),
            }
    elif folder == ROOT / "data" / "model" and (RESULTS / "model.json").exists():  # the shipped one
        model = read_results("model")
        facts |= {
            "steps": model["steps"],
            "tokens": model["tokens_seen"],
            "hours": round(model["hours"], 3),
        }
    return facts
