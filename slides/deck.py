"""A deck as it is written: slides, titles, speaker notes, and what it asks the build to fetch.

A slide ends at a line `---`. Its title is its first heading, a sentence that states its claim. Its
note is a comment that begins with the minutes it takes: `<!-- 2 min. Say … -->`.
"""

import re
from dataclasses import dataclass

from lib.env.errors import UserError
from slides.pictures import FIGURE, SOUND
from slides.quotes import CODE, NUMBER, ROOT, excerpt, number

FOLDER = ROOT / "slides"

_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^#{1,2} (.+)$", re.MULTILINE)
_COMMENT = re.compile(r"<!--\s*(.*?)\s*-->", re.DOTALL)
_MINUTES = re.compile(r"(\d+(?:\.\d+)?) min\. ")
_UNKNOWN = re.compile(r"\{\{\s*\w+\s*:.*?\}\}")
_LOOSE = re.compile(r"<!--\s*(?:code|sound)\s*:(?:.*?)-->", re.DOTALL)


@dataclass(frozen=True)
class Slide:
    """One slide, as it is written."""

    title: str
    note: str  # all that the speaker reads
    minutes: float
    text: str  # its Markdown


def decks() -> list[str]:
    """The names of the decks that are there, in order."""
    return sorted(path.stem for path in FOLDER.glob("[0-9]_*.md"))


def read(name: str) -> str:
    """The Markdown source of a deck."""
    path = FOLDER / f"{name}.md"
    if not path.is_file():
        raise UserError(f"there is no deck {name!r}: slides/ holds {', '.join(decks()) or 'none'}")
    return path.read_text(encoding="utf-8")


def slides(name: str) -> list[Slide]:
    """The slides of a deck. Raises `UserError` where a title or a note with minutes is missing."""
    _, body = _parts(name)
    found = []
    for place, text in enumerate(re.split(r"^---$", body, flags=re.MULTILINE), 1):
        shown = _FENCE.sub("", text)
        title = _HEADING.search(shown)
        if not title:
            raise UserError(f"slides/{name}.md, slide {place}: no title (a line that begins with #)")
        notes = [note for note in _COMMENT.findall(shown) if _MINUTES.match(note)]
        if len(notes) != 1:
            raise UserError(f"slides/{name}.md, slide {place} ({title[1]}): {len(notes)} notes, and there must be one: "
                            "<!-- 2 min. What to say. -->")
        found.append(Slide(title[1].strip(), notes[0], float(_MINUTES.match(notes[0])[1]), text))
    return found


def minutes(name: str) -> float:
    """How long a deck takes by its notes."""
    return sum(slide.minutes for slide in slides(name))


def _parts(name: str) -> tuple[str, str]:
    """The front matter and the rest."""
    found = re.fullmatch(r"---\n(.*?)\n---\n(.*)", read(name), re.DOTALL)
    if not found:
        raise UserError(f"slides/{name}.md does not begin with its settings between two lines ---")
    for needed in ("marp: true", "theme: course", "math: mathjax"):
        if needed not in found[1].splitlines():
            raise UserError(f"slides/{name}.md: its settings lack the line {needed}")
    return found[1], found[2]


def quotes(name: str) -> dict[str, dict[str, str]]:
    """What the deck quotes as of now: {"numbers": {expression: text}, "excerpts": {marker: code}}."""
    text = read(name)
    loose = [found for found in _LOOSE.findall(text) if not (CODE.fullmatch(found) or SOUND.fullmatch(found))]
    left = [found for found in _UNKNOWN.findall(text) if not NUMBER.fullmatch(found)]
    if loose or left:
        raise UserError(f"slides/{name}.md: {(loose + left)[0]} cannot be read")
    try:
        return {"numbers": {f"{kind}:{what}": number(kind, what) for kind, what in NUMBER.findall(text)},
                "excerpts": {what: excerpt(what) for what in CODE.findall(text)}}
    except UserError as error:
        raise UserError(f"slides/{name}.md: {error}") from error


def names(name: str) -> dict[str, list[str]]:
    """The figures and sounds that the deck asks for: {"figures": […], "sounds": […]}."""
    text = read(name)
    return {"figures": sorted({found[1] for found in FIGURE.findall(text)}),
            "sounds": sorted({found[0] for found in SOUND.findall(text)})}
