"""A deck as it is written: slides, titles, speaker notes, and what it asks the build to fetch.

A slide ends at a line `---`. Its title is its first heading, a sentence that states its claim. Its
note is a comment that begins with the minutes it takes: `<!-- 2 min. Say … -->`.

There is one deck for each part of the course, and one for each route through it, a workshop of
so many minutes. A route picks its slides out of the parts and out of shorter routes, and adds
few of its own:

    <!-- part: what this section of the workshop is for -->
    <!-- slides: 2_state_spaces “The title of the first” to “The title of the last” -->

Beside the decks there are papers, in slides/room:
sheets to print, which hold pages in place of slides.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from lib.env.errors import UserError
from slides.pictures import FIGURE, SOUND
from slides.quotes import CODE, NUMBER, ROOT, excerpt, number

FOLDER = ROOT / "slides"

_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^#{1,2} (.+)$", re.MULTILINE)
_COMMENT = re.compile(r"<!--\s*(.*?)\s*-->", re.DOTALL)
_MINUTES = re.compile(r"(\d+(?:\.\d+)?) min\. ")
_UNKNOWN = re.compile(r"\{\{\s*\w+\s*:.*?\}\}")
_LOOSE = re.compile(r"<!--\s*(?:code|sound|slides|part)\s*:(?:.*?)-->", re.DOTALL)
_PICK = re.compile(r"^<!-- slides: (\w+) “([^”]+)”(?: to “([^”]+)”)? -->$", re.MULTILINE)
PART = re.compile(r"^<!-- part: (.+?) -->$", re.MULTILINE)


@dataclass(frozen=True)
class Slide:
    """One slide, as it is written."""

    title: str
    note: str  # all that the speaker reads
    minutes: float
    text: str  # its Markdown
    part: str  # of a route: what the section is for that begins here, "" where none begins


def parts() -> list[str]:
    """The names of the decks of the course's parts, in order."""
    return sorted(path.stem for path in FOLDER.glob("[0-9]_*.md"))


def routes() -> list[str]:
    """The names of the routes' decks, the shortest first."""
    return sorted((path.stem for path in FOLDER.glob("route_*.md")), key=length)


def decks() -> list[str]:
    """The names of all decks that are there, in order."""
    return parts() + routes()


def papers() -> list[str]:
    """The names of the sheets that are printed."""
    return sorted(
        path.stem
        for path in (FOLDER / "room").glob("*.md")
        if "marp: true" in path.read_text("utf-8")
    )


def length(route: str) -> int:
    """How many minutes the workshop has, its slack included: the number in the route's name."""
    return int(route.removeprefix("route_"))


def file_of(name: str) -> Path:
    """The file of a deck or paper."""
    where = next(
        (
            file
            for file in (FOLDER / f"{name}.md", FOLDER / "room" / f"{name}.md")
            if file.is_file()
        ),
        None,
    )
    if where is None:
        raise UserError(
            f"there is no deck {name!r}: slides/ holds {', '.join(decks() + papers()) or 'none'}"
        )
    return where


def read(name: str) -> str:
    """The Markdown of a deck, with the slides that a route picks put in."""
    return _PICK.sub(
        lambda found: _picked(name, *found.groups()), file_of(name).read_text(encoding="utf-8")
    )


def _picked(route: str, name: str, first: str, last: str | None) -> str:
    """The Markdown of the slides of another deck from one title to another."""
    sources = parts() + routes()[: routes().index(route)] if route in routes() else []
    if name not in sources:
        raise UserError(
            f"slides/{route}.md may not pick slides of {name!r}, "
            f"only of {', '.join(sources) or 'none'}"
        )
    found = slides(name)
    titles = [slide.title for slide in found]
    for title in filter(None, (first, last)):
        if title not in titles:
            raise UserError(f"slides/{route}.md: slides/{name}.md has no slide “{title}”")
    begin, end = titles.index(first), titles.index(last or first)
    if end < begin:
        raise UserError(f"slides/{route}.md: in slides/{name}.md “{last}” comes before “{first}”")
    chosen = (PART.sub("", slide.text).strip() for slide in found[begin : end + 1])
    return "\n\n---\n\n".join(chosen)


def slides(name: str) -> list[Slide]:
    """The slides of a deck. Raises `UserError` where a title or a note with minutes is missing."""
    _, body = _settings(name)
    found = []
    for place, text in enumerate(re.split(r"^---$", body, flags=re.MULTILINE), 1):
        shown = _FENCE.sub("", text)
        title = _HEADING.search(shown)
        if not title:
            raise UserError(
                f"slides/{name}.md, slide {place}: no title (a line that begins with #)"
            )
        notes = [note for note in _COMMENT.findall(shown) if _MINUTES.match(note)]
        if len(notes) != 1:
            raise UserError(
                f"slides/{name}.md, slide {place} ({title[1]}): {len(notes)} notes, "
                "and there must be one: <!-- 2 min. What to say. -->"
            )
        part = PART.search(text)
        minutes = float(_MINUTES.match(notes[0])[1])
        found.append(Slide(title[1].strip(), notes[0], minutes, text, part[1] if part else ""))
    return found


def sections(route: str) -> list[list[Slide]]:
    """The slides of a route by section. Raises `UserError` where the first slide names none."""
    found: list[list[Slide]] = []
    for slide in slides(route):
        if slide.part:
            found.append([])
        elif not found:
            raise UserError(
                f"slides/{route}.md, slide 1: it must say what its section is for: <!-- part: … -->"
            )
        found[-1].append(slide)
    return found


def title(name: str) -> str:
    """The first heading of a deck or paper."""
    found = _HEADING.search(_FENCE.sub("", _settings(name)[1]))
    if not found:
        raise UserError(f"slides: {name}.md has no title (a line that begins with #)")
    return found[1].strip()


def minutes(name: str) -> float:
    """How long a deck takes by its notes."""
    return sum(slide.minutes for slide in slides(name))


def _settings(name: str) -> tuple[str, str]:
    """The settings at the head of a deck, and its body."""
    found = re.fullmatch(r"---\n(.*?)\n---\n(.*)", read(name), re.DOTALL)
    if not found:
        raise UserError(f"slides/{name}.md does not begin with its settings between two lines ---")
    theme = "paper" if name in papers() else "course"
    for needed in ("marp: true", f"theme: {theme}", "math: mathjax"):
        if needed not in found[1].splitlines():
            raise UserError(f"slides/{name}.md: its settings lack the line {needed}")
    return found[1], found[2]


def quotes(name: str) -> dict[str, dict[str, str]]:
    """What the deck quotes as of now.

    {"numbers": {expression: text}, "excerpts": {marker: code}}
    """
    text = read(name)
    known = (CODE, SOUND, PART)
    loose = [
        found for found in _LOOSE.findall(text) if not any(mark.fullmatch(found) for mark in known)
    ]
    left = [found for found in _UNKNOWN.findall(text) if not NUMBER.fullmatch(found)]
    if loose or left:
        raise UserError(f"slides/{name}.md: {(loose + left)[0]} cannot be read")
    try:
        return {
            "numbers": {
                f"{kind}:{what}": number(kind, what) for kind, what in NUMBER.findall(text)
            },
            "excerpts": {what: excerpt(what) for what in CODE.findall(text)},
        }
    except UserError as error:
        raise UserError(f"slides/{name}.md: {error}") from error


def names(name: str) -> dict[str, list[str]]:
    """The figures and sounds that the deck asks for: {"figures": […], "sounds": […]}."""
    text = read(name)
    return {
        "figures": sorted({found[1] for found in FIGURE.findall(text)}),
        "sounds": sorted({found[0] for found in SOUND.findall(text)}),
    }
