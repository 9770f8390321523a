"""The files of a training run: written whole or not at all, kept few, checked when they are read.

A run's folder holds `last.safetensors`, `previous.safetensors` in case the last is damaged, `log.csv`
and `best/`. A checkpoint is tensors and, in its metadata, JSON: no code can hide in it. A checksum
over both finds a flipped bit.
"""

import csv
import hashlib
import json
import os
from contextlib import contextmanager
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from lib.env.errors import UserError, os_errors
from lib.env.files import whole
from lib.env.machine import RESULTS, ROOT, read_results

LAST, PREVIOUS, LOG = "last.safetensors", "previous.safetensors", "log.csv"
LOG_FIELDS = ["step", "tokens", "minutes", "lr", "train_bits_per_token", "validation_bits_per_note"]


def checksum(tensors: dict[str, Tensor], facts: str) -> str:
    """SHA-256 of the facts and of every tensor's name, type, shape and bytes."""
    digest = hashlib.sha256(facts.encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def write(folder: Path, tensors: dict[str, Tensor], facts: dict) -> None:
    """Make this the last checkpoint of the run; the one that was the last becomes the previous.

    Whenever the process dies, at least one of the two is whole. Raises `UserError` (a full disk).
    """
    from safetensors.torch import save

    text = json.dumps(facts)
    data = save(tensors, metadata={"run": text, "sha256": checksum(tensors, text)})
    with whole(folder / LAST) as part:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # on the disk before it gets its name
        if (folder / LAST).exists():
            os.replace(folder / LAST, folder / PREVIOUS)
    with whole(folder / LOG) as part, open(part, "w", newline="") as file:
        writer = csv.DictWriter(file, LOG_FIELDS)
        writer.writeheader()
        writer.writerows(facts["log"])


def exists(folder: Path) -> bool:
    """Whether the folder holds a checkpoint of a run, whole or not."""
    return (folder / LAST).exists() or (folder / PREVIOUS).exists()


def read(folder: Path, say=print) -> tuple[dict[str, Tensor], dict]:
    """Tensors and facts of the run's last checkpoint that is whole. Raises `UserError` if there is none."""
    for name, other in ((LAST, "the one before"), (PREVIOUS, "")):
        try:
            return open_one(folder / name)
        except FileNotFoundError:
            continue  # killed between two renames: the other one is whole
        except ValueError:
            if other and (folder / PREVIOUS).exists():
                say(f"{folder.name}/{name} is damaged: going on from {other}")
    raise UserError(f"no checkpoint in {folder} is whole: delete that folder and start again")


def open_one(path: Path) -> tuple[dict[str, Tensor], dict]:
    """Tensors and facts of one file. Raises FileNotFoundError, or ValueError where it is damaged."""
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        raise FileNotFoundError(path)
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        # runs of the course's first version have no checksum
        if metadata.get("sha256") not in (None, checksum(tensors, metadata["run"])):
            raise ValueError("checksum")
        return tensors, json.loads(metadata["run"])
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged") from error


@contextmanager
def writing(path: Path):
    """Turn what safetensors raises on a full disk into a `UserError`."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        why = "the disk is full: free some space and run it again" if "os error 28" in str(error) else str(error)
        raise UserError(f"could not write {path}: {why}") from error


@contextmanager
def alone(folder: Path):
    """Keep a second process out of the folder, and sweep up what a killed one left half written."""
    with os_errors(f"write to {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise UserError(f"another process trains in {folder}: wait for it, or choose another --out") from error
    try:
        for part in [*folder.glob(".*.part.*"), *folder.glob("best/.*.part.*")]:
            part.unlink(missing_ok=True)
        yield
    finally:
        lock.release()


def history(folder: Path) -> dict:
    """Where weights in a checkpoint folder come from: its name, and the training behind it where that is known."""
    folder = Path(folder).resolve()
    facts = {"folder": str(folder.relative_to(ROOT)) if folder.is_relative_to(ROOT) else folder.name}
    if exists(folder.parent) and folder.name == "best":  # of a run
        run = read(folder.parent, say=lambda text: None)[1]
        before = run.get("init") or {}
        row = min(run["log"], key=lambda row: row["validation_bits_per_note"], default=None)
        if row and not (before and "tokens" not in before):
            facts |= {"steps": row["step"] + before.get("steps", 0), "tokens": row["tokens"] + before.get("tokens", 0),
                      "hours": round(row["minutes"] / 60 + before.get("hours", 0), 3)}
    elif folder == ROOT / "data" / "model" and (RESULTS / "model.json").exists():  # the shipped one
        model = read_results("model")
        facts |= {"steps": model["steps"], "tokens": model["tokens_seen"], "hours": round(model["hours"], 3)}
    return facts
