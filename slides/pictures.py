"""Figures and sounds of the decks: found by name, drawn or rendered,
and watched while they are made.

A name is a function in slides/figures*.py: a figure's returns a Matplotlib figure, a sound's notes
(`lib.music.notes.Music`), or notes and the second at which the prompt ends in them.
`notebook/01_maestro#the-pedal-is-down` is the one image of an executed notebook whose alt text, or
the one player whose label, holds these words; `#3` is the third. With a sound comes the roll that
the notebooks' player draws of it.
"""

import base64
import hashlib
import html
import importlib
import io
import json
import re
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from lib.env.errors import UserError
from slides import quotes
from slides.quotes import ROOT, book
from slides.sources import code_hash

FIGURE = re.compile(r"(!\[[^\]]*\]\()figure:([\w/#.-]+)(\))")
SOUND = re.compile(r"^<!-- sound: (\S+)(?: (.+?))? -->$", re.MULTILINE)
LARGEST_SVG = 150_000  # bytes; above it a PNG is smaller to carry and quicker to show
PNG_DPI = 200
WATCHED = ("data/results", "data/model", "notebooks")
CACHE = ROOT / "slides" / ".build" / "cache"
PLAYER = ("lib/show/listen.py", "player")  # which code makes a sound and its roll of notes

_FROM_NOTEBOOK = re.compile(r"notebook/(\w+)#([\w-]+)")
_IN_PAGE = {
    "figure": re.compile(
        r'<img\b(?P<tag>[^>]*)\bsrc="data:image/(?P<kind>png|svg\+xml);'
        r'base64,(?P<data>[A-Za-z0-9+/=]+)"'
    ),
    "sound": re.compile(
        r'(?P<roll><img alt="Piano roll: [^>]*>)?'
        r'<audio\b(?P<tag>[^>]*)\bsrc="data:audio/(?P<kind>mpeg);base64,(?P<data>[A-Za-z0-9+/=]+)"'
    ),
}
_opened: list[str] | None = None


class Made(NamedTuple):
    """A figure or a sound."""

    ending: str  # svg, png or mp3
    data: bytes
    reads: dict[str, str]  # the files that were read for it, with their hashes
    roll: str = ""  # of a sound: its still roll, an `<img>`


def home(name: str) -> str:
    """The file of the function `name`, such as slides/figures.py."""
    where = [
        path
        for path in sorted((ROOT / "slides").glob("figures*.py"))
        if re.search(rf"^def {re.escape(name)}\(", path.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    if len(where) != 1:
        there = " and ".join(path.name for path in where) or "none of slides/figures*.py"
        raise UserError(f"figure or sound {name!r}: {there} defines it, and exactly one should")
    return where[0].relative_to(ROOT).as_posix()


def made_of(kind: str, name: str) -> str:
    """A short hash of what the picture or sound is made of:
    its code, or its bytes in a notebook.
    """
    if _FROM_NOTEBOOK.fullmatch(name):
        shown = _from_notebook(kind, name)
        return hashlib.sha256(shown.data + shown.roll.encode()).hexdigest()[:16]
    drawn_by = code_hash(home(name), name)
    if kind == "figure":
        return drawn_by
    return hashlib.sha256((drawn_by + code_hash(*PLAYER)).encode()).hexdigest()[:16]


def make(kind: str, name: str) -> Made:
    """A "figure" or a "sound".

    What was made is kept under slides/.build and used again while code and files are the same.
    """
    if _FROM_NOTEBOOK.fullmatch(name):
        return _from_notebook(kind, name)
    note = CACHE / f"{name}-{made_of(kind, name)}.json"
    if note.is_file():
        kept = json.loads(note.read_text(encoding="utf-8"))
        if all(input_hash(path) == before for path, before in kept["reads"].items()):
            return Made(**kept | {"data": base64.b64decode(kept["data"])})
    from matplotlib import rc_context

    from lib.show.plots import STYLE

    print(f"  {kind} {name}")
    module = importlib.import_module(home(name)[:-3].replace("/", "."))
    with watching() as opened, rc_context(STYLE):
        drawn = getattr(module, name)()
        made = _figure(drawn) if kind == "figure" else _sound(drawn, name)
    made = made._replace(reads={what: input_hash(what) for what in sorted(set(opened))})
    note.parent.mkdir(parents=True, exist_ok=True)
    note.write_text(
        json.dumps(made._asdict() | {"data": base64.b64encode(made.data).decode()}),
        encoding="utf-8",
    )
    return made


def _from_notebook(kind: str, name: str) -> Made:
    notebook, which = _FROM_NOTEBOOK.fullmatch(name).groups()
    found = []
    for cell in book(notebook)["cells"]:
        for out in cell.get("outputs", []):
            page = "".join(out.get("data", {}).get("text/html", ""))
            found += _IN_PAGE[kind].finditer(page)
    if which.isdecimal():
        fits = found[int(which) - 1 : int(which)] if int(which) else []
    else:
        fits = [one for one in found if f"-{which}-" in f"-{slug(one['tag'])}-"]
    if len(fits) != 1:
        raise UserError(
            f"notebooks/{notebook}.ipynb shows {len(found)} {kind}s, "
            f"and {len(fits)} of them fit #{which}"
        )
    made = _shown(fits[0])
    if kind == "sound" and not made.roll:
        raise UserError(
            f"notebooks/{notebook}.ipynb: the player #{which} has no roll: "
            "execute the notebook again"
        )
    return made


def _shown(found: re.Match) -> Made:
    """What `_IN_PAGE` found."""
    ending = {"png": "png", "svg+xml": "svg", "mpeg": "mp3"}[found["kind"]]
    return Made(ending, base64.b64decode(found["data"]), {}, found.groupdict().get("roll") or "")


def slug(tag: str) -> str:
    """The alt text or label of an image's or player's tag, in small letters,
    with hyphens for all else.
    """
    found = re.search(r'\b(?:alt|aria-label)="([^"]*)"', tag)
    return re.sub(r"[^a-z0-9]+", "-", html.unescape(found[1]).lower()).strip("-") if found else ""


def _figure(fig) -> Made:
    """An SVG with its letters as outlines, the same bytes every time; a PNG where that is large."""
    import matplotlib

    from lib.show.plots import STYLE, png_bytes

    out = io.BytesIO()
    with matplotlib.rc_context(STYLE | {"svg.fonttype": "path", "svg.hashsalt": "slides"}):
        fig.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    return (
        Made("svg", svg, {})
        if len(svg) <= LARGEST_SVG
        else Made("png", png_bytes(fig, dpi=PNG_DPI), {})
    )


def _sound(made, name: str) -> Made:
    """The sound and the roll that a notebook would show of what a function gave."""
    from lib.music.notes import Music
    from lib.show.listen import player

    music, prompt_seconds = made if isinstance(made, tuple) else (made, None)
    if not isinstance(music, Music):
        raise UserError(
            f"sound {name!r} gave a {type(music).__name__}: "
            "return notes, or notes and the seconds of their prompt"
        )
    return _shown(_IN_PAGE["sound"].search(player(music, prompt_seconds=prompt_seconds).data))


def input_hash(what: str) -> str:
    """The hash of what a figure read: a file, or `notebook:…`, what a notebook says."""
    if not what.startswith("notebook:"):
        return file_hash(what)
    try:
        return hashlib.sha256(quotes.printed(what.removeprefix("notebook:")).encode()).hexdigest()[
            :16
        ]
    except UserError:  # it says so no longer
        return ""


def file_hash(path: str) -> str:
    """The hash of a file of the repository, "" where it is not there;
    of a notebook only what it printed and showed.
    """
    full = ROOT / path
    if not full.is_file():
        return ""
    data = full.read_bytes()
    if path.endswith(".ipynb"):
        data = json.dumps([cell.get("outputs") for cell in json.loads(data)["cells"]]).encode()
    return hashlib.sha256(data).hexdigest()[:16]


@contextmanager
def watching():
    """A list that fills with what is read meanwhile:
    files of the repository, and what notebooks are asked for.

    Weights are opened by compiled code, which Python does not see: who opens one file of
    data/model is taken to have read them all.
    """
    global _opened
    if not getattr(watching, "hooked", False):
        sys.addaudithook(_hook)
        watching.hooked = True
    files: list[str] = []
    _opened, quotes.asked = files, {}
    try:
        yield files
    finally:
        files += [f"notebook:{text}" for text in quotes.asked]
        _opened = quotes.asked = None
        if any(path.startswith("data/model/") for path in files):
            model = ROOT / "data" / "model"
            files += [
                path.relative_to(ROOT).as_posix() for path in model.iterdir() if path.is_file()
            ]


def _hook(event: str, arguments: tuple) -> None:
    if _opened is None or event != "open" or not isinstance(arguments[0], str | Path):
        return
    if quotes.asked is None:  # `printed` is reading: its answer is noted instead
        return
    path = str(Path(arguments[0]).absolute())
    for folder in WATCHED:
        if path.startswith(f"{ROOT / folder}/") and not path.endswith(".py"):
            _opened.append(Path(path).relative_to(ROOT).as_posix())
