"""What a teacher carries beside the course: for the day when nothing works, and for every other.

    python -m lib.lab.pages teaching FOLDER           out/teaching where none is named

The folder holds the executed notebooks as pages, which a browser shows without Python or a network
(`pages/`); the exercises of each notebook without their solutions (`exercises/`) and all solutions
on one page (`solutions.html`); the decks of the routes with the timer, the papers to print, and the
mails with the course's address put in. `index.html` leads to all of it. It is made of what is in
the repository within a minute, and fetches nothing.
"""

import json
import re
from pathlib import Path

import nbformat

from lib.env import machine as env
from lib.env.errors import UserError, os_errors
from lib.lab.pages import address

SOLUTION = re.compile(
    r"<details><summary>Solution</summary>\s*(```python\n.*?```)\s*</details>\n?", re.DOTALL
)
HEADING = re.compile(r"\*\*(\d) · ([^*]+)\*\* ★")

_BADGE = re.compile(r"^\[!\[Open in Colab\].*\n+", re.MULTILINE)
_LINK = re.compile(r"(?<=\]\()(?!https?://|#|mailto:|attachment:)([^)\s]+)(?=\))")
_MATH = re.compile(  # code comes first, so that a dollar in it is none
    r"```.*?```|`[^`\n]*`|\$\$(?P<block>.+?)\$\$"
    r"|(?<![\\$\w])\$(?!\s)(?P<inline>[^$\n]+?)(?<![\s\\])\$(?!\w)",
    re.DOTALL,
)


def books() -> dict[str, nbformat.NotebookNode]:
    """The notebooks of the course by name, in order. Raises `UserError` where one is damaged."""
    found = {}
    for path in sorted((env.ROOT / "notebooks").glob("[0-9]*.ipynb")):
        try:
            with os_errors(f"read {path}"):
                found[path.stem] = nbformat.reads(path.read_text(encoding="utf-8"), as_version=4)
        except (nbformat.reader.NotJSONError, json.JSONDecodeError) as error:
            raise UserError(f"{path} is damaged: fetch the course again") from error
    return found


# ---- notebooks as pages ---------------------------------------------------------------------


def page(book: nbformat.NotebookNode, title: str) -> str:
    """A notebook as a page that fetches nothing: formulas are MathML, figures and sounds inside."""
    from nbconvert import HTMLExporter

    shown = _copy(book)
    formulas: list[str] = []
    for cell in shown.cells:
        if cell.cell_type == "markdown":
            text = _without_formulas(_BADGE.sub("", cell.source), formulas)
            cell.source = _LINK.sub(lambda found: _target(found[1]), text)
    nowhere = dict.fromkeys(("mathjax_url", "require_js_url", "jquery_url"), "")
    exporter = HTMLExporter(template_name="classic", **nowhere)
    exporter.exclude_input_prompt = exporter.exclude_output_prompt = True
    html, _ = exporter.from_notebook_node(shown, {"metadata": {"name": title}})
    html = re.sub(r'<script src=""></script>\s*', "", html)
    html = re.sub(r"<html>", '<html lang="en">', html, count=1)
    return re.sub(r"FORMULA(\d+)END", lambda found: formulas[int(found[1])], html)


def _copy(book: nbformat.NotebookNode) -> nbformat.NotebookNode:
    return nbformat.reads(nbformat.writes(book), as_version=4)


def _without_formulas(text: str, formulas: list[str]) -> str:
    """The Markdown with a mark in place of each formula, whose MathML is appended to `formulas`."""
    from latex2mathml.converter import convert

    def mark(found: re.Match) -> str:
        latex = found["block"] or found["inline"]
        if latex is None:  # code
            return found[0]
        formulas.append(convert(latex.strip(), display="block" if found["block"] else "inline"))
        return f"FORMULA{len(formulas) - 1}END"

    return _MATH.sub(mark, text)


def _target(link: str) -> str:
    """Where a link of a notebook leads from its page: a page, or a file at the course's address."""
    file, sharp, place = link.partition("#")
    if file.endswith(".ipynb") and "/" not in file:
        return f"{file.removesuffix('.ipynb')}.html{sharp}{place}"
    inside = (env.ROOT / "notebooks" / file).resolve()
    file = inside.relative_to(env.ROOT.resolve()).as_posix()
    return f"{address.REPOSITORY}/blob/{address.BRANCH}/{file}{sharp}{place}"


# ---- exercises and solutions ----------------------------------------------------------------


def without_solutions(book: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook with its folded solutions taken out; hints and stubs stay."""
    kept = _copy(book)
    for cell in kept.cells:
        cell.source = SOLUTION.sub("", cell.source)
    return kept


def exercises(book: nbformat.NotebookNode) -> nbformat.NotebookNode | None:
    """Of a notebook its title, its first code cell,
    and texts and stubs of its exercises; or None.
    """
    first = next((cell for cell in book.cells if cell.cell_type == "code"), None)
    pairs = zip(book.cells, book.cells[1:], strict=False)
    chosen = [pair for pair in pairs if SOLUTION.search(pair[0].source)]
    if first is None or not chosen:
        return None
    title = _text(f"{book.cells[0].source.splitlines()[0]}: exercises")
    cells = [title, first, *(cell for pair in chosen for cell in pair)]
    return without_solutions(nbformat.v4.new_notebook(cells=cells, metadata=book.metadata))


def solutions(books: dict[str, nbformat.NotebookNode]) -> nbformat.NotebookNode:
    """All solutions, by notebook and number, as a notebook of text."""
    lines = ["# Solutions", "Any function that passes its check is a solution. These are ours."]
    for name, book in books.items():
        for cell in book.cells:
            found, heading = SOLUTION.search(cell.source), HEADING.search(cell.source)
            if found and heading:
                lines += [f"## {name[:2]}.{heading[1]} · {heading[2]}", found[1]]
    return nbformat.v4.new_notebook(cells=[_text("\n\n".join(lines))])


def _text(source: str) -> nbformat.NotebookNode:
    """A cell of text; its name is fixed, so that the same repository gives the same files."""
    return nbformat.v4.new_markdown_cell(source, id="text")


# ---- the folder -----------------------------------------------------------------------------


def files() -> dict[str, bytes]:
    """What goes into the folder: the bytes of each file by its name in there."""
    course, made = books(), {}
    for name, book in course.items():
        made[f"pages/{name}.html"] = page(without_solutions(book), name)
        alone = exercises(book)
        if alone:
            made[f"exercises/{name}_exercises.ipynb"] = nbformat.writes(alone)
    made["solutions.html"] = page(solutions(course), "Solutions")
    slides = env.ROOT / "slides"
    mail = slides / "room" / "mail.md"
    if mail.is_file():
        made["mail.md"] = mail.read_text(encoding="utf-8").replace("ADDRESS", address.REPOSITORY)
    there = {name: text.encode() for name, text in made.items()}
    for pattern in ("route_*.html", "route_*.pdf", "room/*.html", "room/*.pdf"):
        for path in slides.glob(pattern):
            there[path.relative_to(slides).as_posix()] = path.read_bytes()
    there["index.html"] = page(_index(there), "Music with state spaces").encode()
    return there


def _index(names) -> nbformat.NotebookNode:
    """The page that leads to all others."""
    groups = (
        ("To show", r"route_.*|room/timer\.html"),
        ("To print", r"room/.*\.pdf"),
        ("To send", r"mail\.md"),
        ("To read when nothing works: the notebooks, executed", r"pages/.*"),
        ("To give to participants: exercises without solutions", r"exercises/.*"),
        ("For you", r"solutions\.html"),
    )
    lines = ["# Music with state spaces: for the teacher"]
    for title, pattern in groups:
        found = [name for name in sorted(names) if re.fullmatch(pattern, name)]
        if found:
            items = [f'- <a href="{name}">{Path(name).name}</a>' for name in found]
            lines += [f"## {title}", "\n".join(items)]
    lines.append(
        "An exercise notebook runs beside the others: copy it into the course's `notebooks`."
    )
    return nbformat.v4.new_notebook(cells=[_text("\n\n".join(lines))])


def main(folder: Path, say=print) -> None:
    """Write the files over those of an earlier call; what else is in the folder stays."""
    there = files()
    with os_errors(f"write {folder}"):
        for name, data in there.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
    size = sum(map(len, there.values())) / 1e6
    say(f"{folder / 'index.html'} leads to {len(there) - 1} files, {size:,.0f} MB")
