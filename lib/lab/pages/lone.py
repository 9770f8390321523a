"""Colab, pretended in earnest: a lone notebook, a fresh environment,
and the minutes to its first sound.

    python -m lib.lab.pages lone 00 07 09

For each notebook: a new virtual environment with what Colab has at least, torch and a
kernel; an empty folder with nothing in it but the notebook; the committed state of this
repository as its address. The notebook makes its quick run up to the first cell that plays
sound, or to its end where none does. The minutes count from the start of its first cell,
which fetches and installs; putting torch and the kernel there does not count, as on Colab
they wait. They go to data/results/colab.json.

Colab has many more packages than this environment, so there is less to install there, and another
network: the minutes are those of the machine that is named beside them. Beside the minutes of the
clock stand those that the processor worked, and how many programs waited for it at the beginning
(its load): on a machine that is busy with something else the clock says little.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from lib.env import machine as env
from lib.env.errors import UserError
from lib.env.files import write_text
from lib.env.install import INSTALL, pip_reason

THERE = ("ipykernel",)  # what Colab has beside torch, and a kernel cannot do without
SOUND = "<audio"
GOAL = 4.0  # minutes to the first sound, as the course promises


def choose(names: list[str]) -> list[str]:
    """The notebooks that the names mean, all for none: 00 or 00_tour."""
    have = env.notebook_names()
    for name in names:
        if not any(name in (stem, stem[:2]) for stem in have):
            raise UserError(f"no notebook is called {name!r}: there are {', '.join(have)}")
    return [stem for stem in have if not names or stem in names or stem[:2] in names]


def to_first_sound(book):
    """The notebook without what comes after the first code cell whose stored output plays;
    True if one does.
    """
    for number, cell in enumerate(book.cells):
        if any(
            SOUND in out.get("data", {}).get("text/html", "") for out in cell.get("outputs", ())
        ):
            book.cells = book.cells[: number + 1]
            return book, True
    return book, False


def serve(folder: Path) -> str:
    """A bare clone of this repository's committed state, and its address."""
    _run(
        ["git", "clone", "-q", "--bare", str(env.ROOT), str(folder)],
        "clone this repository with git",
    )
    return folder.as_uri()


def _run(command: list[str], doing: str) -> str:
    """Run a command; its output, or UserError with its last complaint."""
    try:
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, errors="replace"
        )
    except OSError as error:
        raise UserError(f"could not {doing}: {command[0]} does not start") from error
    if done.returncode:
        raise UserError(f"could not {doing}: {pip_reason(done.stderr)}")
    return done.stdout


def environment(folder: Path) -> Path:
    """A virtual environment with torch, a kernel and a pretended `google.colab`;
    returns its Python.
    """
    _run([sys.executable, "-m", "venv", str(folder)], "make a virtual environment")
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    torch = f"torch=={version('torch').partition('+')[0]}"
    _run(
        [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", torch, *THERE],
        f"install {torch} into a fresh environment",
    )
    place = "import sysconfig; print(sysconfig.get_path('purelib'))"
    pretend = (
        Path(_run([str(python), "-c", place], "find its packages").strip()) / "google" / "colab"
    )
    pretend.mkdir(parents=True)
    (pretend / "__init__.py").write_text("", encoding="utf-8")
    return python


def run_alone(name: str, python: Path, address: str, folder: Path) -> dict:
    """Run a lone copy of the notebook in `folder`, which is empty; returns its minutes."""
    import nbformat
    from jupyter_client import AsyncKernelManager
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    text = (env.ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8")
    (folder / f"{name}.ipynb").write_text(text, encoding="utf-8")
    book, plays = to_first_sound(nbformat.reads(text, as_version=4))
    manager = AsyncKernelManager(kernel_name="python3")
    manager.kernel_spec.argv = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    hidden = ("PYTHONPATH", "MAESTRO_DIR", "MUSIC_NOTEBOOK", "JPY_SESSION_NAME")
    there = {key: value for key, value in os.environ.items() if key not in hidden}
    there |= {"MUSIC_REPO": address, "MUSIC_QUICK": "1"}
    begin, ended = [], []  # the clock when the first cell began, and at the end of each cell
    client = NotebookClient(
        book,
        km=manager,
        timeout=1800,
        record_timing=False,
        resources={"metadata": {"path": str(folder)}},
        on_cell_execute=lambda **_: begin or begin.append(time.perf_counter()),
        on_cell_executed=lambda **_: ended.append(time.perf_counter()),
    )
    load, worked = _load(), _worked()
    try:
        client.execute(env=there, cleanup_kc=True)
    except CellExecutionError as error:
        what = f"{error.ename}: {error.evalue}".splitlines()[0][:300]
        raise UserError(f"{name}.ipynb, alone, stopped ({what})") from error
    except (CellTimeoutError, DeadKernelError) as error:
        raise UserError(
            f"{name}.ipynb, alone, did not end: {str(error).splitlines()[0]}"
        ) from error
    played = any(
        SOUND in out.get("data", {}).get("text/html", "")
        for out in book.cells[-1].get("outputs", ())
    )
    if played != plays:
        raise UserError(f"{name}.ipynb, alone, played no sound where the committed one does")
    return {
        "minutes_to_first_sound" if plays else "minutes_to_the_end": round(
            (ended[-1] - begin[0]) / 60, 2
        ),
        "minutes_of_first_cell": round((ended[0] - begin[0]) / 60, 2),
        "minutes_of_processor": round((_worked() - worked) / 60, 2),
        "load_before": load,
    }


def _worked() -> float:
    """Seconds that the processors worked for programs that this one started and that have ended."""
    times = os.times()
    return times.children_user + times.children_system


def _load() -> float | None:
    """How many programs want a processor, over the last minute;
    None where the system does not say.
    """
    return round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None


def main(names: list[str], say=print) -> None:
    """Check the named notebooks, all for none,
    and merge their minutes into data/results/colab.json.
    """
    chosen = choose(names)
    for package in ("nbclient", "nbformat", "torch"):
        try:
            version(package)
        except PackageNotFoundError as error:
            raise UserError(f"{package} is missing: run {INSTALL}") from error
    with tempfile.TemporaryDirectory() as scratch:
        address = serve(Path(scratch) / "served.git")
        for name in chosen:
            say(f"{name}: a fresh environment with torch", flush=True)
            python = environment(Path(scratch) / name / "python")
            before = _torch(python)
            alone = Path(scratch) / name / "alone"
            alone.mkdir()
            found = run_alone(name, python, address, alone)
            if _torch(python) != before:
                raise UserError(
                    f"{name}.ipynb, alone, changed torch from {before} to {_torch(python)}"
                )
            found["torch_before_and_after"] = before
            found["run"] = env.provenance(f"python -m lib.lab.pages lone {name[:2]}")
            results = env.read_results("colab")
            results[name] = found
            write_text(
                env.RESULTS / "colab.json",
                json.dumps(dict(sorted(results.items())), indent=2) + "\n",
            )
            minutes = found.get("minutes_to_first_sound")
            what = (
                f"first sound after {minutes:.1f} minutes"
                if minutes
                else "no sound in it, run to its end"
            )
            late = f", later than the promised {GOAL:g}" if minutes and minutes > GOAL else ""
            busy = (
                f" on a machine with a load of {found['load_before']}"
                if found["load_before"]
                else ""
            )
            say(
                f"{name}: {what}{late}{busy} (first cell {found['minutes_of_first_cell']:.1f}, "
                f"processor {found['minutes_of_processor']:.1f}); torch {before} untouched"
            )


def _torch(python: Path) -> str:
    ask = "from importlib.metadata import version; print(version('torch'))"
    return _run([str(python), "-c", ask], "ask for torch's version").strip()
