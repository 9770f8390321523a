"""The build of the slides: what a deck quotes is found, what is not there is said,
what is stale is noticed.
"""

import base64
import io
import json
import subprocess
import sys

import pytest
import soundfile

from lib.env.errors import UserError
from lib.music.notes import Music, make_notes
from lib.show.listen import player
from lib.show.moving_roll import image, script
from slides import build, deck, pictures, quotes, sources
from slides.quotes import ROOT

# what is quoted --------------------------------------------------------------------------------


MODULE = '''LIMIT = 3


@cache
def first(x):
    """Words.

    More.
    """
    # why
    return second(x)


def second(x):
    return x + LIMIT


class Box:
    """A box."""

    def open(self):
        return 1
'''


@pytest.fixture
def results(monkeypatch, tmp_path):
    """A made-up repository with one file of results, one notebook and one module."""
    (tmp_path / "data" / "results").mkdir(parents=True)
    (tmp_path / "data" / "results" / "speed.json").write_text(
        json.dumps(
            {
                "hours": 2.5,
                "params": 2452480,
                "device": "CPU",
                "none": None,
                "grids": [{"ms": 10.0, "bpe": None, "n": 7}, {"ms": 62.5, "bpe": 8, "n": 8}],
                "rows": [
                    {"arch": "mamba", "length": 512, "bits": 14.587},
                    {"arch": "lstm", "length": 512, "bits": 16.0},
                ],
                "facts": {"notes a second": 9.876},
                "ms": [4, 1],
            }
        )
    )
    (tmp_path / "notebooks").mkdir()
    image = base64.b64encode(b"PNG").decode()
    (tmp_path / "notebooks" / "01_x.ipynb").write_text(
        json.dumps(
            {
                "cells": [
                    {"cell_type": "markdown", "source": "words"},
                    {
                        "cell_type": "code",
                        "outputs": [
                            {"output_type": "stream", "text": ["1,276 pieces of\n", "854 titles"]}
                        ],
                    },
                    {
                        "cell_type": "code",
                        "outputs": [
                            {
                                "output_type": "display_data",
                                "data": {
                                    "text/html": '<img alt="a b c" '
                                    f'src="data:image/png;base64,{image}">'
                                },
                            }
                        ],
                    },
                ]
            }
        )
    )
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "m.py").write_text(MODULE)
    for module in (quotes, pictures, sources):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    for cached in (sources._tree, sources._names):
        cached.cache_clear()
    yield tmp_path
    for cached in (sources._tree, sources._names):
        cached.cache_clear()


@pytest.mark.parametrize(
    "text, shown",
    [
        ("speed.json hours", "2.5"),
        ("speed.json hours .2f", "2.50"),
        ("speed.json params ,d", "2,452,480"),
        ("speed.json rows.1.bits .1f", "16.0"),
        ("speed.json rows[arch=mamba].bits .2f", "14.59"),
        ("speed.json rows[arch=lstm, length=512].bits .1f", "16.0"),
        ('speed.json "facts.notes a second" .1f', "9.9"),
        ("speed.json grids[ms=10,bpe=null].n", "7"),
        ("speed.json hours *60 .0f", "150"),
        ("speed.json hours*60 .0f", "150"),
        ("speed.json params /1000000 .1f", "2.5"),
        ("speed.json ms.0 / ms.1 .1f", "4.0"),
        ("speed.json device", "CPU"),
    ],
)
def test_numbers_are_found_scaled_and_formatted(results, text, shown):
    assert quotes.result(text) == shown


@pytest.mark.parametrize(
    "text, says",
    [
        ("nowhere.json hours", "nowhere.json is not there"),
        ("speed.json days", "has no days at its top: its keys are hours"),
        ("speed.json rows.7.bits", "has no 7 at rows: it is a list of 2"),
        ("speed.json rows[arch=gru].bits", r"\[arch=gru\] fits 0 rows"),
        ("speed.json rows[length=512].bits", "fits 2 rows"),
        ("speed.json hours[arch=gru]", "needs a list"),
        ("speed.json rows[arch].bits", "key=value"),
        ("speed.json hours.more", "has no more at hours: it is 2.5"),
        ("speed.json rows", "is list, not a value"),
        ("speed.json none", "is NoneType, not a value"),
        ("speed.json device .1f", "the format '.1f' does not fit"),
        ("speed.json device *2", "no arithmetic"),
        ("speed.json", "cannot be read"),
    ],
)
def test_a_number_that_is_not_there_is_one_clear_sentence(results, text, says):
    with pytest.raises(UserError, match=says) as error:
        quotes.result(text)
    assert "\n" not in str(error.value)


def test_notebooks_are_quoted(results):
    assert quotes.printed(r"01_x#1 ([\d,]+) pieces") == "1,276"
    assert quotes.printed(r"01_x (\d+) titles") == "854"
    with pytest.raises(UserError, match="finds 3 values, not one"):
        quotes.printed(r"01_x (\d+)")
    with pytest.raises(UserError, match="finds 0 values"):
        quotes.printed(r"01_x#1 (\d+) cats")
    with pytest.raises(UserError, match="has 2 code cells, and no number 3"):
        quotes.printed(r"01_x#3 (\d+)")
    with pytest.raises(UserError, match="no pattern"):
        quotes.printed(r"01_x#1 \d+")
    with pytest.raises(UserError, match="09_y.ipynb is not there"):
        quotes.printed(r"09_y#1 (\d+)")
    assert pictures.make("figure", "notebook/01_x#1") == ("png", b"PNG", {}, "")
    assert pictures.make("figure", "notebook/01_x#b-c") == ("png", b"PNG", {}, "")
    for which in ("2", "0", "b-d"):
        with pytest.raises(UserError, match=f"shows 1 figures, and 0 of them fit #{which}"):
            pictures.make("figure", f"notebook/01_x#{which}")
    with pytest.raises(UserError, match="shows 0 sounds"):
        pictures.make("sound", "notebook/01_x#1")


@pytest.mark.parametrize(
    "text, code",
    [
        ("lib/m.py second", "def second(x):\n    return x + LIMIT"),
        (
            "lib/m.py first without docstring",
            "@cache\ndef first(x):\n    # why\n    return second(x)",
        ),
        ('lib/m.py first without docstring from "why" to "return"', "# why\nreturn second(x)"),
        ('lib/m.py first without docstring from "second" to "second"', "return second(x)"),
        (
            "lib/m.py first without docstring without comments",
            "@cache\ndef first(x):\n    return second(x)",
        ),
        ("lib/m.py Box.open", "def open(self):\n    return 1"),
        ('lib/m.py Box from "class" to "A box"', 'class Box:\n    """A box."""'),
        ("lib/m.py LIMIT", "LIMIT = 3"),
    ],
)
def test_code_is_found(results, text, code):
    assert quotes.excerpt(text) == code


@pytest.mark.parametrize(
    "text, says",
    [
        ("lib/none.py f", "lib/none.py is not there"),
        ("lib/m.py third", "lib/m.py has no third"),
        ("lib/m.py Box.shut", "has no Box.shut"),
        ("lib/m.py LIMIT.x", "has no LIMIT.x"),
        ('lib/m.py second from "def" to "LIMITS"', "has no line with 'LIMITS' behind"),
        ('lib/m.py second from "return" to "def"', "has no line with 'def' behind"),
        ('lib/m.py second from "deft" to "return"', "has no line with 'deft' here"),
        ("lib/m.py second lines 1-2", "cannot be read"),
        ("lib/m.py second backwards", "cannot be read"),
    ],
)
def test_code_that_is_not_there_is_one_clear_sentence(results, text, says):
    with pytest.raises(UserError, match=says):
        quotes.excerpt(text)


# staleness -------------------------------------------------------------------------------------


def change(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    for cached in (sources._tree, sources._names):
        cached.cache_clear()


def test_a_figure_is_stale_when_code_below_it_changes_but_not_for_words(results):
    module = results / "lib" / "m.py"
    assert sources.closure("lib/m.py", "first") == {
        ("lib/m.py", name) for name in ("first", "second", "LIMIT")
    }
    before = sources.code_hash("lib/m.py", "first")
    change(module, "More.", "Other words.")
    change(module, "# why", "# because")
    change(module, "return 1", "return 2")  # in Box, which `first` does not use
    assert sources.code_hash("lib/m.py", "first") == before
    change(module, "LIMIT = 3", "LIMIT = 4")
    assert sources.code_hash("lib/m.py", "first") != before


def test_code_is_followed_across_modules(results):
    (results / "slides").mkdir()
    (results / "slides" / "figures.py").write_text(
        "from lib import m\nfrom lib.m import Box\n\n\n"
        "def one():\n    return m.second(1)\n\n\ndef two():\n    return Box()\n"
    )
    assert ("lib/m.py", "LIMIT") in sources.closure("slides/figures.py", "one")
    assert sources.closure("slides/figures.py", "two") == {
        ("slides/figures.py", "two"),
        ("lib/m.py", "Box"),
    }
    before = [sources.code_hash("slides/figures.py", name) for name in ("one", "two")]
    (results / "lib" / "room").mkdir()
    # the code moves, and a package hands it on
    (results / "lib" / "m.py").rename(results / "lib" / "room" / "n.py")
    (results / "lib" / "room" / "__init__.py").write_text("from lib.room.n import Box\n")
    figures = results / "slides" / "figures.py"
    change(figures, "from lib import m\nfrom lib.m", "from lib.room import n as m\nfrom lib.room")
    assert ("lib/room/n.py", "Box") in sources.closure("slides/figures.py", "two")
    assert [sources.code_hash("slides/figures.py", name) for name in ("one", "two")] == before
    assert pictures.home("one") == "slides/figures.py"
    with pytest.raises(UserError, match="none of slides/figures"):
        pictures.home("three")


def test_files_that_a_figure_reads_are_noticed(results):
    (results / "data" / "model").mkdir()
    (results / "data" / "model" / "config.json").write_text("{}")
    (results / "data" / "model" / "model.safetensors").write_text("weights")
    with pictures.watching() as opened:
        (results / "data" / "results" / "speed.json").read_text()
        (results / "lib" / "m.py").read_text()
    assert opened == ["data/results/speed.json"]
    with pictures.watching() as opened:
        (results / "data" / "model" / "config.json").read_text()
    assert "data/model/model.safetensors" in opened
    with pictures.watching() as opened:
        quotes.printed(r"01_x (\d+) titles")
    assert opened == [r"notebook:01_x (\d+) titles"]  # the answer counts, not the file
    before = pictures.input_hash(opened[0])
    change(results / "notebooks" / "01_x.ipynb", "1,276 pieces", "1,277 pieces")
    assert pictures.input_hash(opened[0]) == before
    change(results / "notebooks" / "01_x.ipynb", "854 titles", "855 titles")
    assert pictures.input_hash(opened[0]) not in (before, "")
    change(results / "notebooks" / "01_x.ipynb", "855 titles", "no number")
    assert pictures.input_hash(opened[0]) == ""


def test_of_a_notebook_only_its_outputs_count(results):
    notebook = results / "notebooks" / "01_x.ipynb"
    before = pictures.file_hash("notebooks/01_x.ipynb")
    change(notebook, '"words"', '"other words"')
    assert pictures.file_hash("notebooks/01_x.ipynb") == before
    change(notebook, "854 titles", "855 titles")
    assert pictures.file_hash("notebooks/01_x.ipynb") != before
    assert pictures.file_hash("notebooks/02_y.ipynb") == ""


DECK = """---
marp: true
theme: course
math: mathjax
---

# This deck is a test

{{ results:speed.json hours .1f }} hours

<!-- 2 min. Say that it is a test. -->

---

## Code is taken from lib

<!-- code: lib/m.py second -->

![a b c](figure:notebook/01_x#1)

<!-- 1 min. Say that it is code. -->
"""


@pytest.fixture
def small_deck(results, monkeypatch):
    """The made-up repository with a deck of two slides that counts as built."""
    folder = results / "slides"
    folder.mkdir()
    monkeypatch.setattr(deck, "FOLDER", folder)
    monkeypatch.setattr(build, "BUILT", folder / "built.json")
    (folder / "1_x.md").write_text(DECK)
    for ending in ("html", "pdf"):
        (folder / f"1_x.{ending}").write_text("built")
    made = build.inputs("1_x")
    for kind in ("figures", "sounds"):
        for about in made[kind].values():
            about["reads"] = {}
    made |= {ending: pictures.file_hash(f"slides/1_x.{ending}") for ending in ("html", "pdf")}
    build.BUILT.write_text(json.dumps({"1_x": made}))
    return results


def test_a_deck_as_built_is_not_stale(small_deck):
    assert build.stale("1_x") == []
    assert deck.minutes("1_x") == 3
    assert [slide.title for slide in deck.slides("1_x")] == [
        "This deck is a test",
        "Code is taken from lib",
    ]


def test_a_deck_as_built_is_left_alone_unless_it_is_named(small_deck, monkeypatch, capsys):
    made = []
    monkeypatch.setattr(build, "build", lambda name, images: made.append(name))
    monkeypatch.setattr(build, "HERE", small_deck / "slides")
    build.main([])
    assert made == [] and "1_x is as built" in capsys.readouterr().out
    build.main(["1_x"])
    change(small_deck / "slides" / "1_x.md", "a test\n", "an exam\n")
    build.main([])
    assert made == ["1_x", "1_x"]


@pytest.mark.parametrize(
    "file, old, new, says",
    [
        ("data/results/speed.json", "2.5", "2.6", "hours .1f is 2.6 now, and was 2.5"),
        (
            "lib/m.py",
            "return x + LIMIT",
            "return x - LIMIT",
            "the code of lib/m.py second has changed",
        ),
        (
            "notebooks/01_x.ipynb",
            base64.b64encode(b"PNG").decode(),
            base64.b64encode(b"GIF").decode(),
            "figure notebook/01_x#1 has changed",
        ),
        ("slides/1_x.md", "a test\n", "an exam\n", "1_x.md has changed"),
        ("slides/1_x.html", "built", "edited", "1_x.html is not the file that was built"),
    ],
)
def test_what_has_gone_stale_is_said(small_deck, file, old, new, says):
    change(small_deck / file, old, new)
    assert any(says in why for why in build.stale("1_x"))


def test_a_figure_is_stale_when_a_file_that_it_read_changes(small_deck):
    made = json.loads(build.BUILT.read_text())
    made["1_x"]["figures"]["notebook/01_x#1"]["reads"] = {"data/results/speed.json": "0123"}
    build.BUILT.write_text(json.dumps(made))
    assert "was made from data/results/speed.json" in build.stale("1_x")[0]


@pytest.mark.parametrize(
    "old, new, says",
    [
        ("<!-- 2 min. Say that it is a test. -->", "", "slide 1 .*: 0 notes"),
        ("## Code is taken from lib", "words", "slide 2: no title"),
        ("math: mathjax\n", "", "lack the line math: mathjax"),
        ("results:speed.json hours .1f", "result:speed.json hours", "cannot be read"),
        ("<!-- code: lib/m.py second -->", "<!-- code : lib/m.py second -->", "cannot be read"),
        (
            "speed.json hours",
            "speed.json days",
            "slides/1_x.md: data/results/speed.json has no days",
        ),
    ],
)
def test_a_deck_with_a_mistake_is_one_clear_sentence(small_deck, old, new, says):
    change(small_deck / "slides" / "1_x.md", old, new)
    with pytest.raises(UserError, match=says):
        deck.slides("1_x")
        deck.quotes("1_x")


ROUTE = """---
marp: true
theme: course
math: mathjax
---

<!-- part: the beginning -->
<!-- slides: 1_x “This deck is a test” -->

---

<!-- part: a slide of our own -->

## Now you

<!-- 3 min. Let them. -->
"""


@pytest.fixture
def route(small_deck):
    """A route of ten minutes through the small deck."""
    (small_deck / "slides" / "route_10.md").write_text(ROUTE)
    (small_deck / "slides" / "route_9.md").write_text(ROUTE)
    return small_deck / "slides" / "route_10.md"


def test_a_route_shows_what_it_picks_and_its_own(route):
    assert deck.parts() == ["1_x"] and deck.routes() == ["route_9", "route_10"]
    assert [slide.title for slide in deck.slides("route_10")] == ["This deck is a test", "Now you"]
    assert "{{ results:speed.json hours .1f }}" in deck.read("route_10")
    assert build.plan("route_10").splitlines()[2:] == [
        "| 2 | 1 | the beginning |",
        "| 3 | 2 | a slide of our own |",
        "| 5 | | slack |",
    ]
    assert "part:" not in build.expand("route_10", {}) and "2.5 hours" in build.expand(
        "route_10", {}
    )


def test_a_route_may_pick_from_a_shorter_one_and_takes_its_own_section_names(route):
    change(route, "1_x “This deck is a test”", "route_9 “This deck is a test” to “Now you”")
    assert [[slide.title for slide in section] for section in deck.sections("route_10")] == [
        ["This deck is a test", "Now you"],
        ["Now you"],
    ]


def test_a_route_is_stale_when_a_slide_that_it_picks_changes_and_only_then(route):
    made = json.loads(build.BUILT.read_text())
    for ending in ("html", "pdf"):
        route.with_suffix(f".{ending}").write_text("built")
    made["route_10"] = build.inputs("route_10") | {
        ending: pictures.file_hash(f"slides/route_10.{ending}") for ending in ("html", "pdf")
    }
    build.BUILT.write_text(json.dumps(made))
    assert build.stale("route_10") == []
    change(route.with_name("1_x.md"), "Say that it is code.", "Say nothing.")
    assert build.stale("route_10") == [] and build.stale("1_x")
    change(route.with_name("1_x.md"), "Say that it is a test.", "Say nothing.")
    assert build.stale("route_10") == ["route_10.md has changed"]


@pytest.mark.parametrize(
    "old, new, says",
    [
        ("1_x “This", "2_y “This", "may not pick slides of '2_y', only of 1_x, route_9"),
        ("1_x “This", "route_10 “This", "may not pick slides of 'route_10'"),
        (
            "“This deck is a test”",
            "“This deck is an exam”",
            "1_x.md has no slide “This deck is an exam”",
        ),
        ("test” -->", "test” to “Nowhere” -->", "1_x.md has no slide “Nowhere”"),
        (
            "“This deck is a test”",
            "“Code is taken from lib” to “This deck is a test”",
            "comes before",
        ),
        ("<!-- slides: 1_x", "<!-- slides 1_x", "slide 1: no title"),
        ("<!-- part: the beginning -->", "", "slide 1: it must say what its section is for"),
        ("“This deck is a test” -->", "This deck is a test -->", "slide 1: no title"),
    ],
)
def test_a_route_with_a_mistake_is_one_clear_sentence(route, old, new, says):
    change(route, old, new)
    with pytest.raises(UserError, match=says) as error:
        deck.sections("route_10")
    assert "\n" not in str(error.value)


def test_a_paper_has_no_page_and_needs_no_notes(small_deck):
    folder = small_deck / "slides" / "room"
    folder.mkdir()
    settings = "---\nmarp: true\ntheme: paper\nmath: mathjax\n---\n\n"
    (folder / "sheet.md").write_text(f"{settings}# A sheet\n\n{{{{ course:address }}}}\n")
    (folder / "mail.md").write_text("# A mail is not built\n")
    assert deck.papers() == ["sheet"] and deck.title("sheet") == "A sheet"
    assert list(build.made_files("sheet")) == ["pdf"] and list(build.made_files("1_x")) == [
        "html",
        "pdf",
    ]
    assert quotes.REPOSITORY in build.expand("sheet", {})
    assert build.stale("sheet") == ["sheet was never built"]
    with pytest.raises(UserError, match="there is course:address"):
        quotes.number("course", "name")


def test_expansion_puts_in_numbers_code_and_files(small_deck):
    text = build.expand("1_x", {"figure:notebook/01_x#1": "media/x.png"})
    assert (
        "2.5 hours" in text
        and "```python\ndef second(x):" in text
        and "![a b c](media/x.png)" in text
    )
    change(
        small_deck / "slides" / "1_x.md",
        "![a b c](figure:notebook/01_x#1)",
        "<!-- sound: y A <b> -->",
    )
    sound = build.expand("1_x", {"sound:y": "media/y.mp3", "roll:y": image(MUSIC, 3)})
    assert 'src="media/y.mp3"' in sound and "<audio controls" in sound and "A &lt;b&gt;" in sound
    assert (
        '<figure class="sound moving-roll"' in sound
        and '<img alt="Piano roll: ' in sound
        and "<script" not in sound
    )


# sounds ----------------------------------------------------------------------------------------

MUSIC = Music(make_notes([0.0, 1.0], [1.0, 1.5], [60, 64], [80, 40]))


def with_output(notebook, text):
    """The notebook's path, with an output more."""
    book = json.loads(notebook.read_text())
    book["cells"][-1]["outputs"].append(
        {"output_type": "display_data", "data": {"text/html": text}}
    )
    notebook.write_text(json.dumps(book))


def test_the_player_of_a_notebook_brings_its_roll_and_is_stale_with_it(results):
    notebook = results / "notebooks" / "01_x.ipynb"
    with_output(notebook, player(MUSIC, "Two notes", prompt_seconds=1).data)
    made = pictures.make("sound", "notebook/01_x#two-notes")
    assert made.ending == "mp3" and soundfile.info(io.BytesIO(made.data)).duration == pytest.approx(
        3, abs=0.1
    )
    assert made.roll == image(MUSIC, 3, "Two notes", 1)
    before = pictures.made_of("sound", "notebook/01_x#two-notes")
    change(notebook, "prompt%3C", "opening%3C")
    assert pictures.made_of("sound", "notebook/01_x#two-notes") != before


def test_a_player_without_a_roll_is_one_clear_sentence(results):
    with_output(
        results / "notebooks" / "01_x.ipynb",
        '<audio controls aria-label="old" src="data:audio/mpeg;base64,AAAA"></audio>',
    )
    with pytest.raises(
        UserError, match="01_x.ipynb: the player #old has no roll: execute the notebook again"
    ):
        pictures.make("sound", "notebook/01_x#old")


def test_a_function_gives_notes_or_notes_with_their_prompt():
    plain, prompted = pictures._sound(MUSIC, "x"), pictures._sound((MUSIC, 1), "x")
    assert plain.data == prompted.data and "prompt" not in plain.roll and "prompt" in prompted.roll
    assert plain.roll == image(MUSIC, 3)
    with pytest.raises(UserError, match="sound 'x' gave a bytes: return notes"):
        pictures._sound(b"MP3", "x")


def test_the_script_comes_into_the_page_once_whatever_the_number_of_sounds(tmp_path, monkeypatch):
    (tmp_path / "media").mkdir()
    (tmp_path / "media" / "y.mp3").write_bytes(b"MP3")
    monkeypatch.setattr(build, "WORK", tmp_path)
    sounds = 3 * build._player("media/y.mp3", image(MUSIC, 3), "A")
    page = build.inside(f"<html><body>{sounds}</body></html>")
    assert page.count(script()) == 1 and page.index("</figure>") < page.index(script())
    assert "media/y.mp3" not in page and page.count(base64.b64encode(b"MP3").decode()) == 3


# the command -----------------------------------------------------------------------------------


def test_without_node_the_build_says_so(monkeypatch):
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="needs Node.js"):
        build.marp(ROOT / "x.md")


def test_an_unknown_deck_is_one_line_and_no_traceback():
    done = subprocess.run(
        [sys.executable, "-m", "slides.build", "--check", "9_nothing"],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert (
        done.stderr.startswith("error: there is no deck '9_nothing'")
        and done.stderr.count("\n") == 1
    )
