"""The slides say what is measured and what lib holds, and their pages need no network."""

import base64
import html
import io
import re
import zlib
from contextlib import suppress
from urllib.parse import unquote

import pytest
import soundfile
from browser import browser, found

from lib.show import moving_roll
from slides import build, deck, pictures
from slides.quotes import ROOT

DECKS, PAPERS = deck.decks(), deck.papers()

each_deck = pytest.mark.parametrize("name", DECKS)


def page(name):
    assert name in build.built(), f"python -m slides.build {name}"
    return (ROOT / "slides" / f"{name}.html").read_text(encoding="utf-8")


# every deck ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DECKS + PAPERS)
def test_nothing_is_stale(name):
    """Source, numbers, excerpts, figures, sounds and built files are as they were when built."""
    assert not build.stale(name), "run python -m slides.build"


@each_deck
def test_each_slide_has_a_title_of_its_own_a_note_and_minutes(name):
    found = deck.slides(name)
    assert all(slide.title and slide.note and slide.minutes > 0 for slide in found)
    assert len({slide.title for slide in found}) == len(found)


@each_deck
def test_numbers_and_code_stand_in_the_page(name):
    """What the manifest promises is what a viewer sees."""
    shown = re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", "", without_data(page(name)))))
    quoted = deck.quotes(name)
    for what, text in quoted["numbers"].items():
        assert text in shown, f"{what} should read {text}"
    for what, code in quoted["excerpts"].items():
        assert re.sub(r"\s+", " ", code).strip() in shown, f"the page lacks the code of {what}"


@each_deck
def test_every_slide_and_note_reached_the_page(name):
    """Marp takes a note with a line like `class: x` for settings, and drops it without a word."""
    text = page(name)
    assert len(re.findall(r"<section\b[^>]*\bdata-marpit-pagination=", text)) >= len(
        deck.slides(name)
    )
    assert text.count('<div class="bespoke-marp-note"') == len(deck.slides(name))


@each_deck
def test_page_fetches_nothing(name):
    assert not fetched(page(name))


@each_deck
def test_page_says_that_it_is_english(name):
    assert '<html lang="en"' in page(name)[:200]


@each_deck
def test_sound_plays_from_inside_the_page(name):
    found = re.findall(r"<audio\b([^>]*)>", page(name))
    assert len(found) == len(pictures.SOUND.findall(deck.read(name))) > 0
    for tag in found:
        data = base64.b64decode(re.search(r'src="data:audio/mpeg;base64,([^"]+)"', tag)[1])
        assert "controls" in tag and len(data) > 2_000
        assert data[:3] == b"ID3" or data[0] == 0xFF and data[1] & 0xE0 == 0xE0, "not an MP3"


@each_deck
def test_every_sound_has_its_roll_and_both_last_equally_long(name):
    shown = re.findall(
        r'<figure class="sound moving-roll"[^>]*>(.*?)</figure>', page(name), re.DOTALL
    )
    assert len(shown) == page(name).count("<audio ") == len(pictures.SOUND.findall(deck.read(name)))
    for sound in shown:
        roll = unquote(
            re.search(
                r'<img alt="Piano roll: [^"]+"[^>]* src="data:image/svg\+xml,([^"]+)"', sound
            )[1]
        )
        data = base64.b64decode(re.search(r'src="data:audio/mpeg;base64,([^"]+)"', sound)[1])
        seconds = float(re.search(r"data-end='([\d.]+)'", roll)[1])
        assert soundfile.info(io.BytesIO(data)).duration == pytest.approx(seconds, abs=0.1)
        assert re.search(r"class='notes'.*?d='M\d+ [\d.]+h\d+", roll), "a roll without notes"


@each_deck
def test_the_script_of_the_rolls_is_there_once(name):
    assert (
        page(name).count(moving_roll.script())
        == page(name).count("figure.moving-roll:not(.moves)")
        == 1
    )


@pytest.mark.skipif(found() is None, reason="needs Chromium or Chrome")
def test_in_a_browser_a_click_on_a_roll_plays_from_there_and_the_keys_still_turn_the_slides(
    tmp_path,
):
    address = (ROOT / "slides" / "1_data.html").as_uri()
    audio, roll = "document.querySelector('audio')", "document.querySelector('.moves svg')"
    with browser(tmp_path) as shown:
        shown.open(f"{address}#2", width=1280, height=720)
        assert shown.run("document.querySelectorAll('figure.moving-roll:not(.moves)').length") == 0
        left, top, width, height = shown.run(
            f"(({{left, top, width, height}}) => [left, top, width, height])"
            f"({roll}.getBoundingClientRect())"
        )
        assert width > 1000 and top > 0 and top + height < 720, "not in full width on its slide"
        keys = moving_roll.LEFT / moving_roll.WIDTH
        shown.click(left + width * (keys + (1 - keys) / 2), top + height / 2)
        shown.until(f"!{audio}.paused")
        start, end = shown.run(f"[{audio}.currentTime, {audio}.duration]")
        assert start == pytest.approx(end / 2, abs=1.5)
        before = shown.run(f"{roll}.lastChild.getAttribute('d')")
        shown.until(f"{audio}.currentTime > {start + 0.3}")
        assert shown.run(f"{roll}.lastChild.getAttribute('d')") != before, "no cursor runs"
        shown.key("ArrowRight", 39)
        shown.until("location.hash == '#3'")
        assert shown.requests() == [address] and not shown.errors()


@each_deck
def test_figures_are_inside_the_page_and_have_alt_text(name):
    for alt, what in re.findall(r"!\[([^\]]*)\]\(figure:([^)]+)\)", deck.read(name)):
        words = re.sub(r"\b(?:bg|left|right|fit|contain|cover|[wh]:\S+)(?::\d+%)?", "", alt).split()
        assert len(words) >= 3 or "bg" in alt.split(), f"the figure {what} needs alt text"
    assert not re.search(r"\(?media/[\w-]+\.(svg|png|mp3)", page(name))


@each_deck
def test_sizes(name):
    for ending, largest in build.LARGEST.items():
        assert 10_000 < (ROOT / "slides" / f"{name}.{ending}").stat().st_size <= largest


@each_deck
def test_links_lead_somewhere(name):
    for target in re.findall(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)", deck.read(name)):
        assert (
            re.match(r"https?://|#", target)
            or (ROOT / "slides" / target.partition("#")[0]).exists()
        ), target


def test_manifest_and_readme_name_the_decks_that_are_there():
    assert list(build.built()) == DECKS + PAPERS
    page = (ROOT / "slides" / "README.md").read_text(encoding="utf-8")
    assert build.table() in page and build.route_table() in page, "run python -m slides.build"


# papers and the timer --------------------------------------------------------------------------


@pytest.mark.parametrize("name, pages", [("feedback", 1), ("handout", 1), ("quiz", 2)])
def test_a_paper_has_its_pages(name, pages):
    assert name in PAPERS
    objects = pdf_objects((ROOT / "slides" / "room" / f"{name}.pdf").read_bytes())
    assert len(re.findall(rb"/Type\s*/Page\b", objects)) == pages
    assert re.search(rb"/MediaBox\s*\[\s*0 0 59[56][.\d]* 84[123]", objects), "not a sheet of A4"


def pdf_objects(data):
    """What a PDF says of its pages: the objects that it keeps compressed, and the rest."""
    found = [data]
    for stream in re.findall(rb"stream\r?\n(.*?)endstream", data, re.DOTALL):
        with suppress(zlib.error):  # a picture, or not compressed
            found.append(zlib.decompressobj().decompress(stream))
    return b"\n".join(found)


def test_the_quiz_has_an_answer_for_each_question_and_each_answer_is_on_offer():
    questions, answers = deck.read("quiz").split("\n---\n")[1:]
    asked = dict(
        re.findall(r"^\*\*(\d+)\.\*\* .+\n(a\) .+\nb\) .+\nc\) .+)$", questions, re.MULTILINE)
    )
    given = dict(re.findall(r"^\| (\d+) \| ([abc]) \| .+ \| \d\d \|$", answers, re.MULTILINE))
    assert len(asked) == 10 and asked.keys() == given.keys()
    assert len(set(given.values())) == 3, "one letter is always right, or never"


def test_the_timer_fetches_nothing():
    text = (ROOT / "slides" / "room" / "timer.html").read_text(encoding="utf-8")
    assert (
        "location.hash" in text
        and not fetched(text)
        and "//" not in re.sub(r" //.*| <!--.*?-->", "", text)
    )


# The checks above would pass on anything if their patterns were wrong. So:


def without_data(text):
    return re.sub(r"data:[\w.+/-]+;base64,[A-Za-z0-9+/=]+", "", text)


def fetched(text):
    """What a page would fetch from elsewhere: addresses in anything but the href of a link."""
    text = re.sub(r"/\*.*?\*/", "", without_data(text), flags=re.DOTALL)
    tags = re.findall(
        r"""<(?!a\b)[^<>]*?\b(?:src|srcset|href|data|poster)\s*"""
        r"""=\s*["']?\s*(?:https?:)?//[^"'\s>]*""",
        text,
    )
    styles = re.findall(
        r"""(?:url\(\s*(?:&quot;|["'])?|@import\s+["']?)\s*(?:https?:)?//[^)"'\s]*""", text
    )
    media = "img|audio|video|source|script|link|iframe"
    relative = re.findall(rf"""<(?:{media})\b[^<>]*?\b(?:src|href)=["'](?!data:)[^"']+""", text)
    return tags + styles + relative


def test_the_pattern_for_fetches_finds_what_it_should():
    bad = [
        '<img src="https://a.org/x.svg">',
        "<link href='//a.org/x.css'>",
        "a{background:url(https://a.org/x)}",
        "@import 'https://a.org/font.css';",
        '<script src="x.js">',
        '<audio controls src="media/x.mp3">',
        'style="background:url(&quot;https://a.org/x&quot;)"',
    ]
    assert all(fetched(text) for text in bad)
    fine = [
        '<a href="https://a.org">',
        '<svg xmlns="http://www.w3.org/2000/svg">',
        '<img src="data:image/png;base64,AA=">',
        "/*! licence at https://a.org/x.txt */",
        'url("data:font/woff;base64,AA==")',
        "see https://a.org",
    ]
    assert not any(fetched(text) for text in fine)
