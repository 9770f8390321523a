"""Claims about lib.show.sliders: a picture stands alone, and is drawn anew when a control moves,
with no browser.
"""

import re

import pytest
from IPython.display import HTML

from lib.show import sliders


@pytest.fixture
def page(monkeypatch):
    """What a notebook would show: the pictures one after the other, and the box of controls."""
    shown = {"pictures": [], "controls": []}

    class Handle:
        def display(self, picture):
            shown["pictures"].append(picture.data)

        update = display

    monkeypatch.setattr(sliders, "DisplayHandle", Handle)
    monkeypatch.setattr(sliders, "display", shown["controls"].append)
    return shown


def controls(page):
    (box,) = page["controls"]
    return box.children


def test_moving_a_control_draws_the_picture_anew(page):
    sliders.sliders(
        lambda size, loud: HTML(f"{size} {loud:.1f}"), size=(1, 5, 1, 2), loud=(0.0, 1.0, 0.1, 0.5)
    )
    size, loud = controls(page)
    assert page["pictures"] == ["2 0.5"]
    size.value = 4
    loud.value = 0.9
    assert page["pictures"][1:] == ["4 0.5", "4 0.9"]


def test_a_new_sound_plays_at_once_and_the_first_waits(page):
    sliders.sliders(
        lambda grid: (HTML(f"<img {grid}>"), HTML("<audio controls src=x>")), grid=[62.5, 10]
    )
    (grid,) = controls(page)
    assert page["pictures"] == ["<img 62.5><audio controls src=x>"]
    grid.value = 10
    assert page["pictures"][1] == "<img 10><audio controls autoplay src=x>"


def test_whole_numbers_stay_whole_and_a_slow_drawing_waits_for_the_hand(page):
    sliders.sliders(
        lambda seed, heat: HTML(f"{seed}"), live=False, seed=(0, 9, 1, 3), heat=(0.5, 1.5, 0.1, 0.9)
    )
    seed, heat = controls(page)
    assert page["pictures"] == ["3"] and isinstance(heat.value, float)
    assert not seed.continuous_update and not heat.continuous_update


def test_a_click_turns_a_box_of_the_strip_to_the_next_name(page):
    sliders.sliders(lambda strip: HTML(str(strip)), strip=sliders.Strip(["rest", "C", "D"], [0, 2]))
    (strip,) = controls(page)
    boxes = strip.children
    assert [box.description for box in boxes] == ["rest", "D"]
    for box in boxes:
        box.click()
    assert [box.description for box in boxes] == ["C", "rest"]
    assert page["pictures"] == ["(0, 2)", "(1, 2)", "(1, 0)"]


def test_rounds_go_on_and_begin_again(page):
    sliders.sliders(lambda moment: HTML(str(moment)), moment=sliders.Rounds("moment", 7))
    (rounds,) = controls(page)
    again, following = rounds.children
    for button in (following, again, following, following):
        button.click()
    assert page["pictures"] == ["7", "8", "0", "1", "2"]


def test_a_drawn_curve_comes_back_from_the_page(page):
    sliders.sliders(lambda curve: HTML(str(curve)), curve=sliders.Curve(value=[0.0, 0.5]))
    (curve,) = controls(page)
    curve.set_state({"value": [1.0, -1.0]})  # what a browser sends
    assert page["pictures"] == ["[0.0, 0.5]", "[1.0, -1.0]"]


def test_the_page_of_the_curve_fetches_nothing():
    script = str(sliders.Curve(value=[0.0])._esm)
    assert "export default" in script and not re.search(r"https?:|import |fetch\(", script)
