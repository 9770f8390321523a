"""Claims about `lib.show.plots`: what is drawn is what the notes say."""

import base64
import errno
import io
import re
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

from lib.env.errors import UserError
from lib.music.notes import NOTE, Music, make_notes
from lib.show import plots


def some_music(seconds=30.0, count=300, pedal=True, seed=0):
    rng = np.random.default_rng(seed)
    start = rng.uniform(0, seconds - 1, count)
    notes = make_notes(
        start,
        start + rng.uniform(0.02, 1.0, count),
        rng.integers(30, 95, count),
        rng.integers(10, 127, count),
    )
    spans = np.array([[0.5, 2.0], [2.5, 4.0]]) if pedal else np.zeros((0, 2))
    return Music(notes, spans)


def part(ax, name):
    return next((a for a in ax.get_children() if a.get_gid() == name), None)


def words(ax):
    return [t.get_text().strip() for t in ax.texts]


def bars(ax):
    """(count, 4): left, right, bottom, top of every bar."""
    boxes = [p.get_extents() for p in part(ax, "notes").get_paths()]
    return np.array([(b.x0, b.x1, b.y0, b.y1) for b in boxes])


def test_a_bar_for_every_note_at_its_second_pitch_and_velocity():
    music = some_music()
    ax = plots.piano_roll(music)
    drawn, notes = bars(ax), music.notes
    assert len(drawn) == len(notes)
    assert np.allclose(drawn[:, 0], notes["start"])
    pixel = music.seconds / 1000
    assert np.allclose(drawn[:, 1], notes["end"], atol=1.5 * pixel)
    assert np.allclose((drawn[:, 2] + drawn[:, 3]) / 2, notes["pitch"])
    assert np.array_equal(part(ax, "notes").get_array(), notes["velocity"])
    assert ax.get_xlabel() == "seconds" and "C4" in [t.get_text() for t in ax.get_yticklabels()]


def test_only_notes_in_view_are_drawn_and_cut_at_its_edges():
    music = some_music()
    ax = plots.piano_roll(music, start=5, end=12)
    drawn = bars(ax)
    inside = (music.notes["end"] > 5) & (music.notes["start"] < 12)
    assert len(drawn) == inside.sum() < len(music.notes)
    assert drawn[:, 0].min() >= 5 and ax.get_xlim() == (5, 12)


def test_every_note_lies_inside_the_axes_and_above_the_pedal():
    music = some_music()
    ax = plots.piano_roll(music, prompt_seconds=10)
    drawn = bars(ax)
    low, high = ax.get_ylim()
    band = part(ax, "pedal").get_paths()[0].get_extents()
    assert drawn[:, 2].min() > low + band.y1 * (high - low)
    assert drawn[:, 3].max() < high


def test_louder_is_darker_in_grey_and_never_as_pale_as_the_page():
    colours = plots.velocity_colours()(np.linspace(0, 1, 64))[:, :3]
    grey = colours @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(grey) < 0).all() and grey.max() < 0.75


def test_prompt_and_continuation_are_told_apart():
    ax = plots.piano_roll(some_music(), prompt_seconds=10)
    shade = part(ax, "prompt")
    assert (shade.get_x(), shade.get_width()) == (0, 10)
    assert list(part(ax, "divider").get_xdata()) == [10, 10]
    assert {"prompt", "continuation"} <= set(words(ax))


def test_the_words_stand_above_the_notes_in_low_axes_too():
    for rows in (1, 6):
        fig, axes = plots.figure(rows, 1, height=5, squeeze=False)
        ax = plots.piano_roll(some_music(), prompt_seconds=10, ax=axes[0, 0], colourbar=False)
        fig.canvas.draw()
        foot = min(
            text.get_window_extent().y0
            for text in ax.texts
            if text.get_text() in ("prompt", "continuation")
        )
        assert foot > ax.transData.transform([0, bars(ax)[:, 3].max()])[1], f"{rows} rows"


def test_without_a_prompt_nothing_is_divided():
    for ax in (plots.piano_roll(some_music()), plots.piano_roll(some_music(), prompt_seconds=0)):
        assert part(ax, "prompt") is None and part(ax, "divider") is None
        assert "continuation" not in words(ax)


def test_a_prompt_that_fills_the_view_has_no_continuation():
    ax = plots.piano_roll(some_music(), prompt_seconds=99, end=20)
    assert "prompt" in words(ax) and "continuation" not in words(ax)
    assert part(ax, "divider") is None


def test_pedal_is_drawn_where_it_is_down_and_only_then():
    ax = plots.piano_roll(some_music())
    spans = [p.get_extents() for p in part(ax, "pedal").get_paths()]
    assert [(s.x0, s.x1) for s in spans] == [(0.5, 2.0), (2.5, 4.0)] and "pedal" in words(ax)
    ax = plots.piano_roll(some_music(pedal=False))
    assert part(ax, "pedal") is None and "pedal" not in words(ax)


def test_a_piece_without_notes_is_an_empty_roll_and_an_empty_view_one_sentence():
    assert len(bars(plots.piano_roll(Music(np.zeros(0, NOTE)), prompt_seconds=2))) == 0
    with pytest.raises(UserError, match="empty"):
        plots.piano_roll(some_music(), start=5, end=5)


def test_rolls_share_a_figure_with_other_axes():
    fig, axes = plots.figure(2, 1, height=5, sharex=True)
    for ax in axes:
        assert plots.piano_roll(some_music(), ax=ax, title="Two", colourbar=False) is ax
    assert len(fig.axes) == 2
    assert plots.piano_roll(some_music()).get_title(loc="left") == ""


def test_five_thousand_notes_are_one_artist():
    few, many = (plots.piano_roll(some_music(300, count)) for count in (50, 5000))
    assert len(many.get_children()) == len(few.get_children())  # one for each note takes minutes
    assert len(plots.png_bytes(many.figure)) < 120_000


def test_rolls_do_not_touch_pyplot_or_the_global_style():
    before = dict(matplotlib.rcParams)
    plots.piano_roll(some_music())
    assert dict(matplotlib.rcParams) == before
    if "matplotlib.pyplot" in sys.modules:
        assert sys.modules["matplotlib.pyplot"].get_fignums() == []


def test_style_sets_the_three_roles_first():
    with matplotlib.rc_context():
        plots.style()
        cycle = matplotlib.rcParams["axes.prop_cycle"].by_key()["color"]
        assert cycle[:3] == [plots.INPUT, plots.STATE, plots.OUTPUT]
        assert set(cycle[3:]) == set(plots.OTHER)


def test_save_roll_writes_a_png_and_nothing_else(tmp_path):
    path = tmp_path / "new folder" / "roll.png"
    plots.save_roll(some_music(), path, prompt_seconds=10, title="Ten seconds, and twenty more")
    with Image.open(path) as image:
        assert image.format == "PNG" and image.width > 1000
    assert path.stat().st_size < 120_000
    assert [p.name for p in path.parent.iterdir()] == ["roll.png"]


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch):
    write = Path.write_bytes

    def full(self, data):
        write(self, data[:100])
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match="disk is full"):
        plots.save_roll(some_music(), tmp_path / "roll.png")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_bytes(b"in the way")
    with pytest.raises(UserError, match="could not write"):
        plots.save_roll(some_music(), tmp_path / "file" / "roll.png")


def test_show_embeds_a_png_with_escaped_alt_text_and_no_link(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    assert plots.show(plots.figure()[0], 'Loss < 2 & "falling"') is None
    page = shown[0].data
    assert 'alt="Loss &lt; 2 &amp; &quot;falling&quot;"' in page and "http" not in page
    data = base64.b64decode(re.search(r'src="data:image/png;base64,([^"]+)"', page).group(1))
    assert Image.open(io.BytesIO(data)).format == "PNG"


@pytest.mark.parametrize(
    "title, shown",
    [
        ("Ba$$in", r"Ba\$\$in"),
        ("a $x_$ b", r"a \$x_\$ b"),
        (r"$\frac{", r"\$\frac{"),
        ("Pr\u00e9lude", None),
        ("a\tb\nc", "a\ufffdb\nc"),
        ("\u3042\u3044 \U0001f3b9", "\ufffd\ufffd \ufffd"),
        ("F\udcfcr Elise", "F\ufffdr Elise"),
    ],
)
def test_any_name_of_a_file_is_a_title(title, shown, recwarn):
    """No formula, no letter that is missing without a word:
    what the font lacks shows as a sign of its own.
    """
    ax = plots.piano_roll(some_music(count=3), title=title)
    plots.png_bytes(ax.figure)
    assert not recwarn.list
    assert ax.get_title(loc="left") == (shown or title)


def test_show_closes_a_pyplot_figure(monkeypatch):
    import matplotlib.pyplot as plt

    monkeypatch.setattr("IPython.display.display", lambda page: None)
    plots.show(plt.figure(), "nothing yet")
    assert plt.get_fignums() == []


def test_show_wants_alt_text():
    with pytest.raises(ValueError, match="alt text"):
        plots.show(plots.figure()[0], " ")


@pytest.mark.parametrize("scale", ["linear", "log"])
def test_names_at_the_ends_of_lines_stay_apart_and_inside(scale):
    ax = plots.figure()[1]
    ends = [(8, 1.0, "a", "k"), (8, 1.001, "b", "k"), (8, 50.0, "d", "k"), (8, 49.9, "c", "k")]
    for x, y, _, colour in ends:
        ax.plot([1, x], [y, y], color=colour)
    ax.set_yscale(scale)
    plots.name_ends(ax, ends, gap=0.1)
    heights = [ax.transAxes.inverted().transform(ax.transData.transform(t.xy))[1] for t in ax.texts]
    assert words(ax) == ["a", "b", "c", "d"], "in the order of the lines"
    # room above makes all distances a little smaller
    assert np.diff(heights).min() > 0.09 and heights[-1] < 1
    assert ax.texts[0].xy == pytest.approx((8, 1.0)), "the lowest stays at its line"


def test_names_far_apart_along_the_axis_do_not_lift_each_other():
    ax = plots.figure()[1]
    ax.set(xlim=(1, 100), ylim=(0, 10))
    plots.name_ends(
        ax, [(2, 5.0, "short", "k"), (64, 5.0, "long", "k"), (60, 5.0, "lifted", "k")], near=4
    )
    assert [t.xy[1] for t in ax.texts] == pytest.approx([5, 5, 5.6])
