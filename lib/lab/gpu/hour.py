"""One call of the GPU hour: steps in order, each in a process of its own, as far as the minutes go.

Nothing but Python's own library is imported here,
for the machine may lack the rest until the wheels that were carried over are unpacked.
"""

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from lib.env.errors import UserError
from lib.env.files import write_json, write_text
from lib.env.paths import ROOT
from lib.lab.gpu import parts
from lib.lab.gpu.plan import STEPS, STREAMS, Step

EXPECTED = ("torch", "triton", "numpy", "scipy", "matplotlib")  # the machine's own
GRACE = 25.0  # seconds that a step which was asked to stop may take for it


@dataclass(frozen=True)
class Hour:
    """Where things lie."""

    folder: Path
    carried_back: Path | None = None
    tiny: bool = False

    @property
    def work(self) -> Path:
        """What stays on the machine between two calls."""
        return self.folder / "work"

    @property
    def out(self) -> Path:
        return self.carried_back or self.folder / "out"

    @property
    def streams(self) -> Path:
        return self.work / "streams"

    def result(self, name: str) -> Path:
        return self.work / "results" / f"{name}.json"

    def read(self, name: str) -> dict:
        path = self.result(name)
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def run(
    hour: Hour, minutes: float, again: set[str] = frozenset(), say: Callable[[str], None] = print
) -> bool:
    """Take the steps that are not yet done; returns whether all of them have ended."""
    missing = [name for name in EXPECTED if find_spec(name) is None]
    if missing:
        raise UserError(
            f"this machine lacks {', '.join(missing)}: the hour needs them, "
            "and brings the rest along"
        )
    deadline = time.monotonic() + 60 * minutes
    receive(hour, say)
    for name in again:
        hour.result(name).unlink(missing_ok=True)
    for step in STEPS:
        if over(hour, step):
            continue
        left = (deadline - time.monotonic()) / 60
        if step.needs == STREAMS and not (hour.streams / "tokens.npy").exists():
            say(f"{step.name}: waits for the streams, of which not all parts are here")
        elif left < (0 if hour.tiny else step.least):
            say(f"{step.name}: {left:.1f} minutes are too few to begin")
        else:
            take(step, hour, min(left, step.limit), say)
            parts.collect(hour)
    parts.collect(hour)
    return all(over(hour, step) for step in STEPS)


def over(hour: Hour, step: Step) -> bool:
    """Whether a step has ended for good: one that ran out of time has,
    unless it goes on from there.
    """
    ended = hour.read(step.name).get("ended")
    return ended in ("done", "failed") or ended == "time" and not step.goes_on


def take(step: Step, hour: Hour, minutes: float, say: Callable) -> None:
    """One step; how it ended is written down whatever happens."""
    log = hour.work / "logs" / f"{step.name}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        "-m",
        "lib.lab.gpu",
        "step",
        step.name,
        "--folder",
        hour.folder,
        "--minutes",
        f"{minutes:.3f}",
        *["--tiny"] * hour.tiny,
    ]
    before = hour.read(step.name).get("minutes", 0)
    begin = time.monotonic()
    with log.open("ab") as file:
        child = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(hour),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = child.wait(60 * minutes)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end(child)
    took = (time.monotonic() - begin) / 60
    known = hour.read(step.name)
    if code is None or code == 0 and known.get("finished") is False:
        known["ended"] = "time"
    elif code == 0:
        known["ended"] = "failed" if known.get("wrong") else "done"
    else:
        known["ended"] = "failed"
        known["last words"] = log.read_text(encoding="utf-8", errors="replace").splitlines()[-12:]
    known["minutes"] = round(before + took, 2)
    write_json(hour.result(step.name), known)
    say(f"{step.name}: {known['ended']} after {took:.1f} minutes")


def end(child: subprocess.Popen) -> None:
    """Ask a process and its children to stop; after a while, make them."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(child.pid, number)
        except ProcessLookupError:
            return
        try:
            child.wait(GRACE)
        except subprocess.TimeoutExpired:
            continue


def environment(hour: Hour) -> dict[str, str]:
    """That of a step: the repository and the packages that were carried over can be imported."""
    folders = [ROOT, hour.work / "site", hour.work / "peer"]
    found = {"PYTHONPATH": os.pathsep.join(map(str, folders)), "PYTHONUNBUFFERED": "1"}
    if hour.tiny:  # kernels run in Triton's interpreter, GPU or not
        found |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **found}


def receive(hour: Hour, say) -> None:
    """Unpack what was carried over, as far as it is here."""
    for wheel in sorted(hour.folder.glob("in*/wheels/*.whl")):
        mark = hour.work / "site" / f".{wheel.stem}"
        if not mark.exists():
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(hour.work / "site")
            mark.touch()
    if not (hour.streams / "tokens.npy").exists() and parts.complete(hour.folder):
        say("the streams are here: unpacking them")
        parts.join(hour.folder, hour.streams)


def keep(hour: Hour, name: str, result: dict) -> None:
    """What a step has found so far."""
    try:
        write_text(hour.result(name), json.dumps(result, indent=1) + "\n")
    except TypeError as error:
        raise UserError(f"the result of {name} is no JSON ({error})") from error
