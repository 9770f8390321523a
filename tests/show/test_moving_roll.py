"""Claims about `lib.show.moving_roll`: the roll shows the notes, moves with its sound,
stays without scripts.
"""

import base64
import io
import re
from urllib.parse import unquote
from xml.etree import ElementTree

import numpy as np
import pytest
import soundfile
from browser import browser, found

from lib.music.notes import NOTE, Music, make_notes
from lib.show.listen import player
from lib.show.moving_roll import LEFT, WIDTH, image, script, svg

SVG = "{http://www.w3.org/2000/svg}"


def music(count=100, seconds=8.0):
    start = np.linspace(0, seconds - 0.5, count)
    return Music(
        make_notes(start, start + 0.5, 40 + np.arange(count) % 48, 20 + np.arange(count) % 90)
    )


def bars(picture):
    """(left, middle, length) of every note in a picture."""
    group = next(
        g for g in ElementTree.fromstring(picture).iter(f"{SVG}g") if g.get("class") == "notes"
    )
    return sorted(
        tuple(map(float, bar))
        for path in group
        for bar in re.findall(r"M(\S+) (\S+?)h(\d+)", path.get("d"))
    )


def test_every_note_is_a_bar_where_and_as_long_as_it_sounds():
    piece = music()
    found = np.array(bars(svg(piece, 10)))
    second = (WIDTH - LEFT) / 10
    assert np.abs(found[:, 0] - (LEFT + piece.notes["start"] * second)).max() <= 0.5
    assert np.abs(found[:, 2] - 0.5 * second).max() <= 3.5
    heights = dict(zip(piece.notes["pitch"].tolist(), found[:, 1]))
    steps = {
        (heights[low] - heights[high]) / (high - low)
        for low in heights
        for high in heights
        if high > low
    }
    assert len({round(step, 6) for step in steps}) == 1 and min(steps) >= 7


@pytest.mark.parametrize("pitches", [[21], [108], [21, 108], [60, 60], []])
def test_all_keys_that_sound_are_inside_the_picture(pitches):
    notes = make_notes([0.0] * len(pitches), [1.0] * len(pitches), pitches, [64] * len(pitches))
    picture = svg(Music(notes), 2)
    _, _, _, height = map(float, ElementTree.fromstring(picture).get("viewBox").split())
    assert len(re.findall(r"h\d+(?=[M'])", picture.split("class='notes'")[1])) == len(pitches)
    assert all(0 < y < height - 60 for _, y, _ in bars(picture))


def test_the_prompt_is_shaded_up_to_its_end():
    picture = svg(music(), 10, prompt_seconds=5)
    assert (
        f"M{LEFT} 0H{(LEFT + WIDTH) // 2}V" in picture
        and "prompt" in picture
        and "continuation" in picture
    )
    assert "prompt" not in svg(music(), 10)
    assert "continuation" not in svg(music(), 10, prompt_seconds=30)


def test_the_pedal_lies_below_the_keys():
    with_pedal = svg(Music(music().notes, np.array([[0.0, 5.0]])), 10)
    assert f"H{(LEFT + WIDTH) // 2}'" in with_pedal and with_pedal != svg(music(), 10)


def test_a_roll_adds_a_few_kilobytes_and_an_hour_of_music_no_more_than_sixty():
    assert len(script()) < 3_500
    assert len(image(music(), 10)) < 4_000
    assert len(image(music(40_000, 3600), 3600)) + len(script()) < 60_000


def test_without_scripts_the_picture_and_the_sound_remain():
    page = player(music(), 'Für "Elise" <i>', seconds=2).data
    still = re.sub(r"<script>.*</script>", "", page, flags=re.DOTALL)
    alt, source = re.search(
        r'<img alt="([^"]+)" [^>]*src="data:image/svg\+xml,([^"]+)"', still
    ).groups()
    assert alt.startswith("Piano roll: Für &quot;Elise&quot; &lt;i&gt;, ") and "seconds" in alt
    assert bars(unquote(source))
    assert "<audio controls" in still and "<script" not in still
    assert " id=" not in page  # so that nothing clashes with a player beside it


needs_browser = pytest.mark.skipif(found() is None, reason="needs Chromium or Chrome")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    first, second = (player(music(), title).data for title in ("One", "Two"))
    silent = player(Music(np.zeros(0, NOTE))).data
    (folder / "page.html").write_text(
        f"<meta charset=utf-8>{first}{second}{silent}{first}", encoding="utf-8"
    )
    with browser(folder) as page:
        page.address = (folder / "page.html").as_uri()
        yield page


def cursor(page, which):
    """The second at which a roll's cursor stands."""
    x = page.run(f"document.querySelectorAll('svg')[{which}].lastChild.getAttribute('d')")
    return (float(re.match(r"M([\d.]+)", x)[1]) - LEFT) / (WIDTH - LEFT) * 9.5


def now(page, which):
    return page.run(f"document.querySelectorAll('audio')[{which}].currentTime")


@needs_browser
def test_in_a_browser_the_cursor_runs_a_click_seeks_and_one_player_plays_at_a_time(page):
    page.open(page.address)
    assert page.run("document.querySelectorAll('svg[role=slider][tabindex]').length") == 4
    paused = "[...document.querySelectorAll('audio')].map((audio) => audio.paused)"
    box = page.run(
        "(({left, top, width}) => [left, top, width])"
        "(document.querySelectorAll('svg')[1].getBoundingClientRect())"
    )
    page.click(box[0] + box[2] * (LEFT + (WIDTH - LEFT) / 2) / WIDTH, box[1] + 60)
    page.until("!document.querySelectorAll('audio')[1].paused")
    start = now(page, 1)
    assert start == pytest.approx(9.5 / 2, abs=1)
    page.until(f"document.querySelectorAll('audio')[1].currentTime > {start + 0.3}")
    assert cursor(page, 1) == pytest.approx(now(page, 1), abs=0.5)
    lit = page.run(
        "document.querySelectorAll('svg')[1].lastChild.previousSibling.getAttribute('d')"
    )
    assert lit.count("h") >= 1  # the keys that sound
    page.run("document.querySelectorAll('svg')[0].focus()")
    page.key(" ", 32)
    page.until("!document.querySelectorAll('audio')[0].paused")
    page.until(f"JSON.stringify({paused}) == '[false,true,true,true]'")
    page.key(" ", 32)
    page.key("ArrowRight", 39)
    page.key("ArrowRight", 39)
    assert cursor(page, 0) == pytest.approx(now(page, 0), abs=0.1) and now(page, 0) >= 2
    page.key("End", 35)
    assert now(page, 0) > 9
    page.key("Home", 36)
    assert now(page, 0) == cursor(page, 0) == 0
    assert page.requests() == [page.address] and not page.errors()


@needs_browser
def test_in_a_browser_without_scripts_the_still_roll_and_the_control_are_seen(page):
    page.open(page.address, scripts=False)
    tree = page.call("DOM.getDocument", depth=-1)
    size = page.call(
        "DOM.getBoxModel",
        nodeId=page.call("DOM.querySelector", nodeId=tree["root"]["nodeId"], selector="img")[
            "nodeId"
        ],
    )["model"]
    assert size["width"] >= 600 and size["height"] >= 100
    with pytest.raises(AssertionError, match="querySelector|node"):
        page.call(
            "DOM.getBoxModel",
            nodeId=page.call("DOM.querySelector", nodeId=tree["root"]["nodeId"], selector="svg")[
                "nodeId"
            ],
        )


def test_the_sound_of_the_page_begins_when_its_note_does():
    """Within a frame of MP3, so that the cursor is where the music is."""
    piece = Music(make_notes([2.0], [2.5], [72], [100]))
    data = re.search(r'src="data:audio/mpeg;base64,([^"]+)"', player(piece).data)[1]
    sound, rate = soundfile.read(io.BytesIO(base64.b64decode(data)))
    assert np.flatnonzero(np.abs(sound) > 0.05)[0] / rate == pytest.approx(2, abs=0.05)
    assert len(sound) / rate == pytest.approx(4, abs=0.1)
