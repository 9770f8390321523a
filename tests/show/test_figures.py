"""Claims about the drawings of lib.show: what they show is what they were given."""

import numpy as np
import pytest

from lib.music.notes import Music, make_notes
from lib.show import figures_data, figures_memory, figures_playing, figures_scans, plots


def title(ax):
    return ax.get_title(loc="left") or ax.get_title()  # with and without the course's style


def texts(ax):
    return [text.get_text() for text in ax.texts]


def two_rounds(items):
    """Hillis and Steele on three items, by hand: joins and items after each round."""
    (a0, b0), (a1, b1), (a2, b2) = items
    items = [(a0, b0), (a1 * a0, a1 * b0 + b1), (a2 * a1, a2 * b1 + b2)]
    yield [(0, 1), (1, 2)], items
    items = [items[0], items[1], (items[2][0] * a0, items[2][0] * b0 + items[2][1])]
    yield [(0, 2)], items


def test_a_diagram_of_joins_counts_them_and_turns_green_at_the_start():
    ax = plots.figure()[1]
    figures_scans.joins(
        ax, [(0.5, 10), (0.5, 20), (0.5, 30)], two_rounds([(0.5, 10), (0.5, 20), (0.5, 30)]), "Scan"
    )
    assert title(ax) == "Scan: 3 joins, 2 rounds"
    assert texts(ax) == ["10", "20", "30", "10", "25", "40", "10", "25", "42"]
    circles = [line for line in ax.lines if line.get_marker() == "o"]
    assert [line.get_markeredgecolor() == plots.OUTPUT for line in circles] == [
        True,
        False,
        False,
        True,
        True,
        False,
        True,
        True,
        True,
    ]


def test_an_algorithm_keeps_its_look():
    assert (
        figures_scans.look("Blelloch, whole")
        == figures_scans.look("Blelloch")
        != figures_scans.look("loop")
    )
    with pytest.raises(KeyError):
        figures_scans.look("another")


def test_lost_digits_end_with_a_cross():
    error = np.array([1e-7, 1e-3, 5.0, 5.0])
    fig = figures_scans.lost_digits({"one": error, "two": error / 100, "three": error / 1000})
    labels = [text.get_text() for text in fig.axes[0].get_legend().get_texts()]
    assert labels == ["one", "all lost at step 3", "two", "three"]


def test_a_bar_of_remi_shows_every_word_and_no_label_on_another():
    bar = Music(make_notes([0.17, 0.18, 0.5], [0.4, 0.9, 0.8], [60, 53, 70], [64, 64, 64]))
    names = [
        "Bar_None",
        "Position_17",
        "Pitch_60",
        "Velocity_63",
        "Duration_0.23.50",
        "Position_18",
        "Pitch_53",
        "Velocity_63",
        "Duration_1.22.50",
        "Position_50",
        "Pitch_70",
        "Velocity_63",
        "Duration_0.30.50",
    ]
    ax = figures_data.remi_bar(bar, names, 2.0).axes[0]
    clock = [text for text in ax.texts if text.get_rotation() == 90]
    assert [text.get_text() for text in clock] == [
        "Bar",
        "Position_17",
        "Position_18",
        "Position_50",
    ]
    assert np.diff([text.get_position()[0] for text in clock]).min() > 0.04
    assert [text.get_text() for text in ax.texts if text not in clock] == [
        "P 60  V 63  D 0.23.50",
        "P 53  V 63  D 1.22.50",
        "P 70  V 63  D 0.30.50",
    ]


def test_gaps_show_the_dip_between_chords_and_events():
    rng = np.random.default_rng(0)
    gaps = np.concatenate(
        [rng.lognormal(np.log(0.012), 0.4, 5000), rng.lognormal(np.log(0.13), 0.4, 5000)]
    )
    ax = figures_data.gap_sizes(gaps, "title").axes[0]
    share, edges, _ = ax.patches[0].get_data()
    middle = np.sqrt(edges[1:] * edges[:-1])
    left, dip, right = (
        share[(middle > low) & (middle < high)].max()
        for low, high in ((5, 25), (40, 50), (80, 200))
    )
    assert dip < left / 3 and dip < right / 3


def test_memory_names_the_bytes_that_do_not_grow():
    ax = figures_playing.memory([1, 1000], [300, 300], [100, 100_000]).axes[0]
    assert "this model: 300 bytes" in texts(ax)
    assert [len(set(line.get_ydata())) for line in ax.lines] == [2, 1]


def test_the_key_that_was_struck_is_named_with_its_rank():
    keys = np.zeros(128)
    keys[[60, 64, 67]] = 0.5, 0.3, 0.2
    ax = figures_playing.next_key(keys, 64).axes[0]
    assert title(ax) == "The key that came next had 30.0%: number 2 of 88 guesses"


def test_moments_to_come_keep_their_room():
    items = [(0.5, 10), (0.5, 20), (0.5, 30)]
    moments = list(two_rounds(items))
    before, after = (
        figures_scans.by_moments(items, moments, passed, "title").axes[0] for passed in (1, 2)
    )
    assert before.get_ylim() == after.get_ylim()
    assert texts(before) == ["10", "20", "30", "10", "25", "40"] and texts(after)[6:] == [
        "10",
        "25",
        "42",
    ]


def test_a_place_is_framed_where_it_takes_a_note_and_names_what_it_holds():
    read, held = ["C", "·", "E"], np.array([[1.0, 1.0, 1.0], [0.0, 0.0, 3.0]])
    delta = np.array([[50.0, 0, 0], [0, 0, 50]])
    ax = figures_memory.turns(read, delta, held, ["·", "C", "D", "E"], "title").axes[0]
    assert texts(ax) == ["C", "·", "E", "C", "C", "C", "E"]
    framed = [
        patch.get_xy() for patch in ax.patches if not patch.get_fill() and patch.get_linewidth() > 2
    ]
    assert [(round(x + 0.46), round(y - 0.54)) for x, y in framed] == [(0, 0), (2, 1)]


def test_what_is_dropped_has_no_bar():
    ax = figures_playing.drawn_from(
        np.array([0.5, 0.3, 0.2]), np.array([0.6, 0.4, 0.0]), 3, "title"
    ).axes[0]
    assert [bar.get_height() for bar in ax.patches] == [0.6, 0.4, 0.0]


def test_the_held_keys_are_counted_from_the_first_mark_on():
    melody, marks = np.array([60.0, 62, 64, 65]), np.array([False, True, False, True])
    fig = figures_memory.held(
        np.arange(4),
        melody,
        marks,
        {"right": np.array([0, 62, 62, 65]), "wrong": np.array([0, 62, 64, 65])},
    )
    assert [title(ax) for ax in fig.axes] == [
        "right: 100% of these steps right",
        "wrong: 67% of these steps right",
    ]
