"""What is written into README.md and the notebooks by a command,
so that it stands in one place only.

    python -m lib.lab.pages stamp

Into the README go the measured minutes, the shipped model's figures and the links to Colab; into
every notebook its badge and the first cell, which knows the address of the course. Outputs stay
as they are.
"""

import re
from pathlib import Path

from lib.env import machine as env
from lib.env.errors import UserError, os_errors
from lib.env.files import write_text
from lib.env.paths import ROOT
from lib.lab.pages import address

NOTEBOOK = re.compile(r"\b\d\d_\w+")  # 00_tour


def _minutes(block: str) -> str:
    """Put the measured minutes into the last two columns of the table of notebooks."""
    measured, exist = env.read_results("notebooks"), env.notebook_names()
    lines = []
    for line in block.strip().splitlines():
        if line.startswith("Measured"):
            continue
        name = NOTEBOOK.search(line) if line.startswith("|") else None
        if name:
            name = name.group()
            cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
            if name in exist:
                found = measured.get(name, {})
                times = [
                    env.minutes_text(found.get(f"{kind}_minutes")) for kind in ("full", "quick")
                ]
                cells = [f"[{name}](notebooks/{name}.ipynb)", *cells[1:-2], *times]
            else:
                cells = [name, *cells[1:-2], "to come", ""]
            line = f"| {' | '.join(cells)} |".replace("|  |", "| |")
        lines.append(line)
    places = sorted(
        {
            found[f"{kind}_run"]["device"]
            for name, found in measured.items()
            for kind in ("full", "quick")
            if name in exist and "device" in found.get(f"{kind}_run", {})
        }
    )
    text = "\n".join(lines).strip()
    return f"{text}\n\nMeasured on: {'; '.join(places)}." if places else text


def _model(block: str) -> str:
    """The table of the shipped model, from data/results/model.json."""
    model = env.read_results("model")

    def show(key: str, form: str) -> str:
        return form.format(model[key]) if model.get(key) is not None else env.UNKNOWN

    device = f" on {model['device']}" if model.get("device") else ""
    hours = show("hours", "{:.1f} hours")
    rows = [
        ("parameters", show("params", "{:,}")),
        ("training", hours if hours == env.UNKNOWN else hours + device),
        ("training steps", show("steps", "{:,}")),
        ("notes seen in training", show("train_notes_seen", "{:,}")),
        ("bits per note, validation pieces", show("validation_bits_per_note", "{:.2f}")),
        ("bits per note, test pieces", show("test_bits_per_note", "{:.2f}")),
        (
            "bits per note, test pieces whose title is in no other split",
            show("test_bits_per_note_without_leaks", "{:.2f}"),
        ),
    ]
    return "\n".join(["| the shipped model | |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows)])


def _badges(block: str) -> str:
    """The badge of the first notebook, and a link to each of the others."""
    first, *others = env.notebook_names()
    links = [f"[{name[:2]}]({address.link(name)})" for name in others]
    return " ·\n".join([address.badge(first), *links])


def _results(block: str) -> str:
    """The table of what was measured, with its baselines and commands."""
    from lib.lab.pages.results import table

    return table()


SPINE = (
    "music/notes",
    "music/tokens",
    "music/streams",
    "scan/selective",
    "scan/parallel",
    "mamba/model",
    "train/config",
    "train/optim",
    "train/batches",
    "train/trainer",
    "train/bits",
    "generate/sampling",
    "generate/grammar",
    "generate/player",
)


def _spine(block: str) -> str:
    """How long the files are that one should read first, to the nearest hundred lines."""
    texts = [(ROOT / "lib" / f"{name}.py").read_text(encoding="utf-8") for name in SPINE]
    lines = sum(len(text.splitlines()) for text in texts)
    return (
        f"The {len(SPINE)} files of the last column are the spine of the package, "
        f"some {round(lines, -2):,} lines in all:\n"
        "who has read them knows how the rest is put together."
    )


BLOCKS = {
    "badges": _badges,
    "minutes": _minutes,
    "results": _results,
    "model": _model,
    "spine": _spine,
}


def readme(text: str) -> str:
    """README's text with its stamped blocks written anew; changes nothing else."""
    for name, write in BLOCKS.items():
        parts = re.split(rf"(<!-- /?{name} -->)", text)  # before, mark, block, mark, after
        if len(parts) != 5:
            raise UserError(
                f"README.md needs exactly one block from <!-- {name} --> to <!-- /{name} -->: "
                "put the two markers back"
            )
        before, begin, block, end, after = parts
        text = f"{before}{begin}\n\n{write(block)}\n\n{end}{after}"
    return text


def notebook(text: str, name: str) -> str:
    """A notebook's file with its badge below the promise and the common first cell;
    all else is kept.
    """
    import nbformat

    book = nbformat.reads(text, as_version=4)
    parts = [p for p in book.cells[0].source.split("\n\n") if not p.startswith("[![Open in Colab]")]
    book.cells[0].source = "\n\n".join([*parts[:2], address.badge(name), *parts[2:]])
    start = next((cell for cell in book.cells if cell.cell_type == "code"), None)
    if start is None or "lib.env import" not in start.source:
        raise UserError(
            f"the first code cell of {name}.ipynb is not the one "
            "that fetches the course: put it back"
        )
    start.source = address.first_cell()
    return nbformat.writes(book) + "\n"


def stamp(say=print) -> None:
    """Stamp README.md and every notebook, and say which files changed."""
    files = [(env.ROOT / "README.md", lambda text: readme(text))]
    for name in env.notebook_names():
        files.append(
            (env.ROOT / "notebooks" / f"{name}.ipynb", lambda text, name=name: notebook(text, name))
        )
    changed = [path.name for path, write in files if _rewrite(path, write)]
    say(f"stamped: {', '.join(changed)}" if changed else "everything is stamped already")


def _rewrite(path: Path, write) -> bool:
    """Write `write(text)` over a file where that is another text; returns whether it was."""
    with os_errors(f"read {path.name}"):
        old = path.read_text(encoding="utf-8")
    new = write(old)
    if new != old:
        write_text(path, new)
    return new != old
