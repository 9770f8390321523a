"""What this machine has, and what the course will do with it; `python -m lib.env` prints it.

Nothing heavy is imported until it is needed, so this works on a bare machine too.
"""

import json
import os
import platform
import random
import shlex
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from lib.env.errors import UserError, os_errors
from lib.env.install import INSTALL, install_missing
from lib.env.paths import RESULTS, ROOT

OLDEST_PYTHON = (3, 11)
UNKNOWN = "not measured"


@dataclass(frozen=True)
class Run:
    """What a notebook needs to know about where it runs."""

    quick: bool  # small sizes, seconds (the tests); else the full run
    device: str  # "cuda" or "cpu"
    precision: str  # "bf16", "fp16" or "fp32"
    seed: int  # what Python's, numpy's and torch's generators were set to


def is_quick() -> bool:
    """Whether MUSIC_QUICK asks for the quick run (the tests set it to 1)."""
    return os.environ.get("MUSIC_QUICK", "").strip().lower() in {"1", "true", "yes"}


def start(seed: int = 0, *, alone: bool = False, say=print) -> Run:
    """Begin a notebook: set every seed, say in one line where and how it runs.

    `alone`: the notebook was opened without its repository, as on Colab, and has just fetched it;
    what is missing is installed first, and a failure ends the cell in one sentence. May be called
    again at any time; it then sets the seeds again. Raises UserError where Python is too old, or
    numpy or torch is missing.
    """
    if alone:
        try:
            check_python()
            install_missing(say)
        except UserError as error:
            sys.exit(str(error))
    check_python()
    try:
        import numpy as np
        import torch
    except ImportError as error:
        raise UserError(f"{error.name or error} is missing: run {INSTALL}") from error
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    quick = is_quick()
    device, precision, _ = choose_device()
    where = f"{device_name()} · {precision}" if device == "cuda" else device
    how = "quick run" if quick else f"full run{_expected_minutes()}"
    torch_version = torch.__version__.partition("+")[0]
    python_version = f"{sys.version_info.major}.{sys.version_info.minor}"
    say(f"{where} · torch {torch_version} · python {python_version} · {how}")
    return Run(quick=quick, device=device, precision=precision, seed=seed)


def check_python() -> None:
    """Raise UserError if this Python is older than the course needs."""
    if sys.version_info < OLDEST_PYTHON:
        oldest = ".".join(map(str, OLDEST_PYTHON))
        raise UserError(
            f"this is Python {platform.python_version()}, the course needs {oldest} or newer: "
            f"install a newer Python and run {INSTALL} with it"
        )


def choose_device() -> tuple[str, str, str]:
    """(device, precision, why) for this machine; imports torch.

    bfloat16 is in hardware from compute capability 8.0 on. Older cards, a T4 for one, only
    emulate it, so they get float16.
    """
    import torch

    if not torch.cuda.is_available():
        why = "no CUDA device was found; training takes bfloat16 where a CPU has units for it"
        return "cpu", "fp32", why
    capability = torch.cuda.get_device_capability()
    number = f"compute capability {capability[0]}.{capability[1]}"
    if capability >= (8, 0):
        return "cuda", "bf16", f"{number} has bfloat16 in hardware (8.0 or higher does)"
    return "cuda", "fp16", f"{number} only emulates bfloat16 (hardware has it from 8.0 on)"


def device_name() -> str:
    """The device in words, as the result files record it: "CPU, 2 cores" or the card's name."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return f"CPU, {cores} core{'s' if cores > 1 else ''}"


def command_line(*words: str) -> str:
    """A command as a result file keeps it: of a path that only this machine has, the last name."""
    kept = []
    for word in words:
        option, equals, value = word.rpartition("=")  # --out=PATH, or PATH alone
        kept.append(option + equals + (Path(value).name if Path(value).is_absolute() else value))
    return shlex.join(kept)


def provenance(command: str, *, seed: int = 0) -> dict:
    """What a result file says about its numbers: device, versions, command and seed."""
    versions = {"python": platform.python_version()}
    for name in ("torch", "triton", "numpy", "muspy", "miditok", "symusic"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {"device": device_name(), "versions": versions, "command": command, "seed": seed}


def read_results(name: str) -> dict:
    """data/results/NAME.json as a dict, empty where it was never written."""
    path = RESULTS / f"{name}.json"
    try:
        with os_errors(f"read data/results/{path.name}"):
            text = path.read_text(encoding="utf-8") if path.exists() else "{}"
        found = json.loads(text)
    except ValueError as error:  # not UTF-8, or not JSON
        raise UserError(f"data/results/{path.name} is damaged: get it again with git") from error
    if not isinstance(found, dict):
        raise UserError(f"data/results/{path.name} is damaged: get it again with git")
    return found


def _expected_minutes() -> str:
    """The hint " (about 2 minutes)" for the notebook that runs, or "" where that is not known."""
    # JPY_SESSION_NAME is what Jupyter tells a kernel, MUSIC_NOTEBOOK what execute.py tells it.
    name = os.environ.get("MUSIC_NOTEBOOK") or os.environ.get("JPY_SESSION_NAME") or ""
    found = read_results("notebooks").get(Path(name).stem, {})
    minutes = found.get("full_minutes")
    if minutes is None:
        return ""
    measured_on = found.get("full_run", {}).get("device", "")
    elsewhere = f" on {measured_on}" if measured_on not in ("", device_name()) else ""
    if minutes < 0.75:
        return f" (under a minute{elsewhere})"
    if minutes < 1.5:
        return f" (about a minute{elsewhere})"
    return f" (about {minutes:.0f} minutes{elsewhere})"


# ---- the notebooks ------------------------------------------------------------------------


def notebook_names() -> list[str]:
    """The notebooks that exist, in the order they are read."""
    return sorted(p.stem for p in (ROOT / "notebooks").glob("*.ipynb"))


def minutes_text(value: float | None) -> str:
    """Measured minutes as they are shown: "1.2", or "not measured"."""
    if value is None:
        return UNKNOWN
    return "under 0.1" if value < 0.1 else f"{value:.1f}"
