"""The teacher's page keeps its word: minutes add up, slides and exercises exist,
numbers come from the results.
"""

import json
import re

import pytest

from lib.lab.pages import __main__ as command
from slides import build, deck, quotes

ROOT = quotes.ROOT
PAGE = (ROOT / "slides" / "teaching.md").read_text(encoding="utf-8")
ROUTES = re.findall(r"<!-- route (\d+) -->(.*?)<!-- /route -->", PAGE, re.DOTALL)
ROW = re.compile(r"^\| ([\d.]+) \|(?: (?:\d+–)?(\d+))? \| ", re.MULTILINE)
EXERCISE = re.compile(r"exercise (\d\d)\.(\d)")
NUMBER = re.compile(r"([\d.,]+)<!-- results: (.+?) -->")
# a compute capability, a licence, lengths that were asked for
FREE = {"8.0", "4.0", "1,024", "32,768"}

each_route = pytest.mark.parametrize("name", deck.routes())


def exercises():
    """{("02", "1"): 10, …}: the minutes of every exercise, as its notebook gives them."""
    found = {}
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            for number, minutes in re.findall(
                r"\*\*(\d) · [^*]+\*\* ★+ · (\d+) minutes", "".join(cell["source"])
            ):
                found[path.stem[:2], number] = int(minutes)
    return found


def test_there_are_three_routes():
    assert [deck.length(name) for name in deck.routes()] == [45, 90, 180]
    assert [total for total, _ in ROUTES] == ["45", "90", "180"]


@each_route
def test_a_route_leaves_a_tenth_of_its_time_and_no_more_than_a_fifth(name):
    total = deck.length(name)
    slack = total - sum(slide.minutes for section in deck.sections(name) for slide in section)
    assert total / 10 <= slack <= total / 5, f"{name} leaves {slack} of {total} minutes"


@each_route
def test_a_route_gives_time_to_install(name):
    """A talk says how to do it at home; where people work,
    a first look at each machine takes ten minutes.
    """
    minutes = sum(
        slide.minutes
        for section in deck.sections(name)
        for slide in section
        if "install" in section[0].part
    )
    assert minutes >= (2 if deck.length(name) == 45 else 10)


@each_route
def test_the_plan_on_the_page_is_that_of_the_deck(name):
    table = dict(ROUTES)[str(deck.length(name))]
    assert table.strip() == build.plan(name), "run python -m slides.build"


@each_route
def test_the_minutes_of_the_plan_add_up(name):
    minutes, ends = zip(*ROW.findall(build.plan(name)), strict=True)
    assert sum(map(float, minutes)) == deck.length(name)
    last = [end for end in ends if end]
    assert len(last) == len(deck.sections(name)) and int(last[-1]) == len(deck.slides(name))


@each_route
def test_exercises_take_the_minutes_of_their_notebooks(name):
    known, found = exercises(), 0
    for slide in deck.slides(name):
        shown = re.sub(r"<!--.*?-->", "", slide.text, flags=re.DOTALL)
        for exercise in EXERCISE.findall(shown)[:1]:
            assert known[exercise] == slide.minutes, exercise
            found += 1
        for shown in re.findall(r"([\d.]+) minutes</p>", slide.text):
            assert float(shown) == slide.minutes, slide.title
    assert found == {45: 0, 90: 2, 180: 3}[deck.length(name)]


def test_the_road_from_the_keys_reaches_the_kernel():
    assert {what.split()[0] for what in deck.quotes("route_180")["excerpts"]} >= {
        "lib/scan/triton_kernel.py"
    }
    assert any("exercise 06.1" in section[0].part for section in deck.sections("route_180"))


@each_route
def test_timers_named_in_the_notes_run_as_long_as_the_slide(name):
    for slide in deck.slides(name):
        for minutes in re.findall(r"slides/room/timer\.html#(\d+)", slide.note):
            assert float(minutes) == slide.minutes, slide.title


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
    loose = (
        set(re.findall(r"\d+(?:,\d{3})+|\d+\.\d+", answers))
        - FREE
        - {".".join(e) for e in exercises()}
    )
    assert not loose, f"where were these measured? {sorted(loose)}"


def test_commands_of_the_page_exist(capsys):
    with pytest.raises(SystemExit, match="0"):
        command.main(["--help"])
    known = capsys.readouterr().out
    texts = (
        PAGE
        + (ROOT / "README.md").read_text(encoding="utf-8")
        + (ROOT / "slides/room/mail.md").read_text("utf-8")
    )
    named = set(re.findall(r"python -m lib\.lab\.pages (\w+)", texts))
    assert named >= {"teaching", "workshop"} and all(errand in known for errand in named)


@pytest.mark.parametrize("file", ["README.md", "teaching.md", "room/mail.md"])
def test_links_of_the_teachers_pages_lead_somewhere(file):
    """What the build makes counts as there: its source is."""
    path = ROOT / "slides" / file
    for target in re.findall(r"(?<!!)\[[^\]]*\]\(([^)\s#]+)\)", path.read_text(encoding="utf-8")):
        there = path.parent / target
        made = there.suffix in (".html", ".pdf") and there.with_suffix(".md").exists()
        assert target.startswith("https://") or there.exists() or made, target


def test_the_mails_name_the_address_that_the_command_puts_in():
    mail = (ROOT / "slides" / "room" / "mail.md").read_text(encoding="utf-8")
    assert "git clone ADDRESS course" in mail and "python -m lib.env" in mail.replace(
        "room/bin/python", "python"
    )
