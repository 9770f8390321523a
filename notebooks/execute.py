"""Run the notebooks from top to bottom, keep their outputs clean, and note how long they take.

    python notebooks/execute.py                 every notebook, full run, written back
    python notebooks/execute.py 00 02_remi_bpe  only these
    python notebooks/execute.py --quick         the quick run: measured, not written back

The committed notebooks come from the full run. Minutes, device, versions and command go to
data/results/notebooks.json; `python -m lib.lab.pages stamp` puts them into the README.
"""

import argparse
import importlib.util
import json
import os
import re
import sys
import time
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))

from lib.env import machine as env  # noqa: E402
from lib.env.errors import UserError, cli, os_errors  # noqa: E402
from lib.env.files import write_text  # noqa: E402
from lib.env.install import INSTALL  # noqa: E402

KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
WIDGET = "application/vnd.jupyter.widget-view+json"
PROGRESS_BAR = re.compile(r"\[[\d:]*\d:\d\d[<,]")  # the "[00:03<00:07," of every tqdm bar


def choose(names: list[str]) -> list[Path]:
    """The notebook files that the names mean: 00, 00_tour, 00_tour.ipynb; all for no name."""
    have = sorted(FOLDER.glob("*.ipynb"))
    if not names:
        if not have:
            raise UserError("there are no notebooks in notebooks/: nothing to run")
        return have
    chosen = []
    for name in names:
        stem = Path(name).name.removesuffix(".ipynb")
        found = [p for p in have if p.stem == stem or p.stem.split("_")[0] == stem]
        if not found:
            names = ", ".join(p.stem for p in have) or "none, notebooks/ is empty"
            raise UserError(f"no notebook is called {name!r}: there are {names}")
        chosen += found
    return chosen


def read(path: Path):
    """A notebook from disk. UserError if it is none."""
    import nbformat

    try:
        with os_errors(f"read {path.name}"):
            return nbformat.read(path, as_version=4)
    except UserError:
        raise
    except Exception as error:  # nbformat has no common base for what it raises
        raise UserError(f"{path.name} is not a notebook: {str(error).splitlines()[0]}") from error


def run(notebook, path: Path, *, quick: bool, timeout: int) -> float:
    """Execute in place; returns wall-clock minutes. UserError names the cell that failed."""
    from jupyter_client.kernelspec import NoSuchKernel
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    os.environ.pop("MUSIC_QUICK", None)
    if quick:
        os.environ["MUSIC_QUICK"] = "1"
    os.environ["MUSIC_NOTEBOOK"] = path.stem
    client = NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(path.parent)}},
    )
    begin = time.perf_counter()
    try:
        client.execute()
    except CellExecutionError as error:
        what = f"{error.ename}: {error.evalue}".splitlines()[0][:300]
        raise UserError(f"{path.name} stopped ({what}); nothing was written") from error
    except CellTimeoutError as error:
        raise UserError(
            f"{path.name}: a cell took more than {timeout} s: allow more with --timeout"
        ) from error
    except DeadKernelError as error:
        raise UserError(
            f"{path.name}: its kernel died, most likely for want of memory; nothing was written"
        ) from error
    except (NoSuchKernel, RuntimeError) as error:
        raise UserError(
            f"{path.name}: no Python kernel would start ({error}): run {INSTALL}"
        ) from error
    return (time.perf_counter() - begin) / 60


def clean(notebook, name: str) -> None:
    """Leave only what a reader needs: no timing, no widget state, no bars."""
    notebook.metadata = {"kernelspec": dict(KERNEL), "language_info": {"name": "python"}}
    notebook.nbformat_minor = 5
    for cell in notebook.cells:
        tags = cell.metadata.get("tags")
        cell.metadata = {"tags": tags} if tags else {}
        if cell.cell_type != "code":
            continue
        kept = []
        for output in joined(cell.outputs):
            if output.output_type == "stream":
                output.text = final_text(output.text, drop_bars=output.name == "stderr")
                if not output.text:
                    continue
            if WIDGET in output.get("data", {}):  # what is left of it without a kernel is its name
                continue
            kept.append(output)
        cell.outputs = kept


def joined(outputs: list) -> list:
    """The outputs with the pieces of one printed text put together: where it was cut is chance."""
    found = []
    for output in outputs:
        if output.output_type == "stream" and found and found[-1].get("name") == output.name:
            found[-1].text += output.text
        else:
            found.append(output)
    return found


def final_text(text: str, *, drop_bars: bool) -> str:
    """What a terminal shows in the end: each line after its last carriage return."""
    lines = [line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")]
    if drop_bars:
        lines = [line for line in lines if line.strip() and not PROGRESS_BAR.search(line)]
        return "\n".join(lines) + "\n" if lines else ""
    return "\n".join(lines)


def record(name: str, minutes: float, *, quick: bool, command: str) -> None:
    """Merge one measurement into data/results/notebooks.json."""
    kind = "quick" if quick else "full"
    results = env.read_results("notebooks")
    entry = results.setdefault(name, {})
    entry[f"{kind}_minutes"] = round(minutes, 3)
    entry[f"{kind}_run"] = env.provenance(command)
    text = json.dumps(dict(sorted(results.items())), indent=2) + "\n"
    write_text(env.RESULTS / "notebooks.json", text)


def main(argv: list[str] | None = None) -> None:
    """Run the chosen notebooks and write down what came of it."""
    parser = argparse.ArgumentParser(
        prog="python notebooks/execute.py",
        description="Run notebooks from top to bottom, write them back clean, note the minutes.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="00 or 00_tour; all by default")
    parser.add_argument("--quick", action="store_true", help="quick run; nothing written back")
    parser.add_argument("--timeout", type=int, default=3600, help="seconds a cell may take")
    given = parser.parse_args(argv)
    env.check_python()
    for package in ("nbformat", "nbclient"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"{package} is missing: run {INSTALL}")
    import nbformat

    for path in choose(given.names):
        command = f"python notebooks/execute.py {path.stem}{' --quick' if given.quick else ''}"
        print(f"{path.stem:<22} ", end="", flush=True)
        notebook = read(path)
        minutes = run(notebook, path, quick=given.quick, timeout=given.timeout)
        if not given.quick:
            clean(notebook, path.stem)
            write_text(path, nbformat.writes(notebook) + "\n")
        record(path.stem, minutes, quick=given.quick, command=command)
        size = path.stat().st_size / 1024
        print(f"{minutes:6.2f} minutes, {size:5.0f} KiB", flush=True)


if __name__ == "__main__":
    cli(main)
