"""The teacher's page keeps its word: minutes add up, slides and exercises exist, numbers come from the results."""

import json
import re

import pytest

from lib.lab.pages import __main__ as command
from slides import deck, quotes

ROOT = quotes.ROOT
PAGE = (ROOT / "slides" / "teaching.md").read_text(encoding="utf-8")
ROUTES = re.findall(r"<!-- route (\d+) -->(.*?)<!-- /route -->", PAGE, re.DOTALL)
ROW = re.compile(r"^\| (\d+) \| (.+?) \| (.*?) ?\|$", re.MULTILINE)
SLIDES = re.compile(r"deck (\d), “(.+?)” to “(.+?)”")
EXERCISE = re.compile(r"exercise (\d\d)\.(\d)")
NUMBER = re.compile(r"([\d.,]+)<!-- results: (.+?) -->")
FREE = {"8.0", "4.0", "1,024", "32,768"}  # a compute capability, a licence, lengths that were asked for


def exercises():
    """{("02", "1"): 10, …}: the minutes of every exercise, as its notebook gives them."""
    found = {}
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            for number, minutes in re.findall(r"\*\*(\d) · [^*]+\*\* ★+ · (\d+) minutes", "".join(cell["source"])):
                found[path.stem[:2], number] = int(minutes)
    return found


def test_there_are_three_routes():
    assert [total for total, _ in ROUTES] == ["45", "90", "180"]


@pytest.mark.parametrize("total, table", ROUTES)
def test_the_minutes_of_a_route_add_up(total, table):
    rows = ROW.findall(table)
    assert len(rows) == len([line for line in table.splitlines() if line.startswith("| ")]) - 1  # but the head
    assert sum(int(minutes) for minutes, _, _ in rows) == int(total)


@pytest.mark.parametrize("total, table", ROUTES)
def test_slides_are_there_and_take_as_long_as_their_notes_say(total, table):
    decks = {name[0]: name for name in deck.decks()}
    named = 0
    for minutes, _, where in ROW.findall(table):
        for number, first, last in SLIDES.findall(where):
            found = deck.slides(decks[number])
            titles = [slide.title for slide in found]
            assert {first, last} <= set(titles), f"deck {number} has no slide {first!r} or {last!r}"
            chosen = found[titles.index(first) : titles.index(last) + 1]
            assert chosen, f"{last!r} comes before {first!r}"
            assert sum(slide.minutes for slide in chosen) == int(minutes), f"deck {number}, {first!r} to {last!r}"
            named += 1
        assert ("“" in where) == bool(SLIDES.search(where)), where
    assert named >= 5


@pytest.mark.parametrize("total, table", ROUTES)
def test_exercises_take_the_minutes_of_their_notebooks(total, table):
    known = exercises()
    for minutes, _, where in ROW.findall(table):
        for exercise in EXERCISE.findall(where):
            assert known[exercise] == int(minutes), exercise


def test_every_exercise_on_the_page_exists():
    named = set(EXERCISE.findall(PAGE)) | set(re.findall(r"\b(0\d)\.(\d)\b", PAGE))
    assert named <= set(exercises()) and len(named) > 5


def test_every_number_agrees_with_the_results():
    found = NUMBER.findall(PAGE)
    assert len(found) == PAGE.count("<!-- results:") > 20
    for shown, what in found:
        assert shown == quotes.result(quoted(what)), f"{shown} is not {what}"


def quoted(what):
    """A path that holds spaces, in the quotes that `slides.quotes` asks for."""
    file, _, rest = what.partition(" ")
    path, _, form = rest.rpartition(" ")
    return f'{file} "{path}" {form}' if " " in path else what


def test_no_number_of_the_answers_goes_without_its_source():
    answers = re.sub(r"<!-- .*?-->", "", NUMBER.sub("", PAGE.partition("## Questions")[2]))
    loose = set(re.findall(r"\d+(?:,\d{3})+|\d+\.\d+", answers)) - FREE - {".".join(e) for e in exercises()}
    assert not loose, f"where were these measured? {sorted(loose)}"


def test_commands_of_the_page_exist(capsys):
    with pytest.raises(SystemExit, match="0"):
        command.main(["--help"])
    known = capsys.readouterr().out
    named = set(re.findall(r"python -m lib\.lab\.pages (\w+)", PAGE))
    assert named and all(errand in known for errand in named)
