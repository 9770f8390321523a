"""What the tests read in the course's own pages: notebooks, Markdown, and what they link to."""

import json
import re
from pathlib import Path

import pytest

from lib.env.paths import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NOT_OURS = {
    ".git",
    ".pytest_cache",
    ".ruff_cache",
    ".build",
    "node_modules",
    "cache",
    "runs",
    "out",
    "venv",
    ".venv",
}

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=[p.stem for p in NOTEBOOKS])

DATA_URI = re.compile(r"data:[\w.+-]+/[\w.+-]+;base64,[A-Za-z0-9+/=\s]+")
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(\s*<?([^)\s>]+)>?[^)]*\)")
FENCED = re.compile(r"^ *(```|~~~).*?^ *\1", re.DOTALL | re.MULTILINE)


def files(*patterns: str) -> list[Path]:
    """The course's own files that fit a pattern, wherever they lie."""
    found = {path for pattern in patterns for path in ROOT.rglob(pattern) if path.is_file()}
    # a virtual environment is not ours, whatever its name
    others = NOT_OURS | {path.parent.name for path in ROOT.glob("*/pyvenv.cfg")}
    return sorted(
        path
        for path in found
        if not others & set(path.relative_to(ROOT).parts)
        and not path.relative_to(ROOT).as_posix().startswith("data/maestro-")
    )


def load(path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def text_of(value) -> str:
    return "".join(value) if isinstance(value, list) else str(value)


def code_cells(book) -> list[dict]:
    return [c for c in book["cells"] if c["cell_type"] == "code" and text_of(c["source"]).strip()]


def markdown(book) -> list[str]:
    return [text_of(c["source"]) for c in book["cells"] if c["cell_type"] == "markdown"]


def outputs(book) -> list[tuple[int, dict]]:
    """(cell number among code cells, output) pairs."""
    return [(n, out) for n, c in enumerate(code_cells(book), 1) for out in c["outputs"]]


def shown(out) -> list[tuple[str, str]]:
    """Everything that one output puts before a reader, as (kind, text) pairs."""
    if out["output_type"] == "stream":
        return [("text/plain", text_of(out["text"]))]
    return [(kind, text_of(value)) for kind, value in out.get("data", {}).items()]


def broken_links(text: str, page: Path) -> list[str]:
    """Links and images of a Markdown text that lead to no file, or to no heading, here;
    web links are not tried.
    """
    broken = []
    for _, _, target in LINK.findall(FENCED.sub("", text)):
        if re.match(r"[a-z][a-z0-9+.-]*:", target):
            continue
        name, _, heading = target.partition("#")
        there = page.parent / name if name else page
        if not there.exists():
            broken.append(target)
        elif (
            heading
            and there.suffix in (".md", ".ipynb")
            and heading not in headings(there, None if name else text)
        ):
            broken.append(target)
    return broken


def headings(path: Path, text: str | None = None) -> set[str]:
    """The anchors that the headings of a page have, in the manner of GitHub and of Jupyter."""
    if text is None:
        text = (
            "\n".join(markdown(load(path)))
            if path.suffix == ".ipynb"
            else path.read_text(encoding="utf-8")
        )
    found = re.findall(r"^#+ +(.+?) *$", FENCED.sub("", text), re.MULTILINE)
    plain = [re.sub(r"[`*]|\]\([^)]*\)|\[", "", heading) for heading in found]
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in plain} | {
        h.replace(" ", "-") for h in plain
    }
