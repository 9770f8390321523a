"""Figures of deck 1. Few inches wide, so that their letters are large on a slide.

What was measured on all of MAESTRO is read from the outputs of the executed notebooks,
so that a deck is built without the data.
"""

import re

import numpy as np

from lib.env.machine import read_results
from lib.music.notes import Music, make_notes
from lib.show import plots
from slides.quotes import printed

WIDTH = 8.2  # inches, shown 1,150 pixels wide: 11 points are then 21 pixels of 720
KINDS = {
    "Bar": "#FFFFFF",
    "Position": "#FFFFFF",
    "Pitch": "#A8D8F5",
    "Velocity": "#F0C8DF",
    "Duration": "#E2E2E2",
}


def gaps():
    """How many gaps between onsets are at most so long."""
    limits = ("10", "30", "62.5", "125", "500")
    shares = [
        float(printed(rf"01_maestro at most\s+{re.escape(limit)} ms:\s+([\d.]+)%"))
        for limit in limits
    ]
    fig, ax = plots.figure(width=WIDTH, height=3.5)
    colours = [plots.OTHER[0] if limit == "62.5" else plots.INPUT for limit in limits]
    bars = ax.bar([f"{limit} ms" for limit in limits], shares, color=colours, width=0.7)
    ax.bar_label(bars, [f"{share:.0f} %" for share in shares], padding=3, fontsize=12)
    ax.set(
        ylim=(0, 112),
        yticks=[0, 50, 100],
        ylabel="% of gaps",
        xlabel="gap between two onsets, at most",
    )
    ax.tick_params(axis="x", length=0)
    return fig


def splits():
    """How much of the test is known from training, by the way of splitting."""
    names = ("official split", "random performances", "random chunks")
    shares = [float(printed(rf"01_maestro {name}\s+([\d.]+)%")) for name in names]
    fig, ax = plots.figure(width=WIDTH, height=2.9)
    bars = ax.barh(names[::-1], shares[::-1], color=[plots.OTHER[0], plots.OTHER[0], plots.INPUT])
    ax.bar_label(bars, [f"{share:.1f} %" for share in shares[::-1]], padding=5, fontsize=13)
    ax.set(xlim=(0, 100), xlabel="% of held-out runs of nine pitches that occur in training")
    ax.tick_params(axis="y", length=0, labelsize=13)
    return fig


def remi_bar():
    """Two seconds of Liszt, and the words that REMI makes of the first notes."""
    notes = printed(r"02_remi_bpe onset s  rings s  key  velocity([\s\d.]+)$")
    rows = [line.split() for line in notes.splitlines() if line.strip()]
    start, rings, pitch, velocity = np.array(rows, float).T
    words = re.findall(
        r"(Bar|Position|Pitch|Velocity|Duration)_(\S+)",
        printed(r"02_remi_bpe \n(Bar_None Position.+)"),
    )
    fig, (roll, row) = plots.figure(2, 1, width=WIDTH, height=3.9, height_ratios=[3, 1])
    music = Music(make_notes(start, start + rings, pitch.astype("u1"), velocity.astype("u1")))
    plots.piano_roll(music, end=2, ax=roll, colourbar=False)
    for number, note in enumerate(music.notes[:3], 1):
        low = note["pitch"] == music.notes["pitch"][1]
        roll.text(
            note["start"] - 0.015,
            note["pitch"] + (0.6 if low else 0),
            str(number),
            ha="right",
            va="center",
            color=plots.INPUT,
            fontweight="bold",
        )
    shown = words[:12]
    for place, (kind, value) in enumerate(shown):
        row.barh(0, 0.94, 0.9, left=place, color=KINDS[kind], edgecolor=plots.GREY, linewidth=0.8)
        row.text(
            place + 0.47,
            0,
            f"{kind}\n{'' if value == 'None' else value}",
            ha="center",
            va="center",
            fontsize=9,
        )
    for number, place in enumerate([n for n, (kind, _) in enumerate(shown) if kind == "Pitch"], 1):
        row.plot([place, place + 2.94], [0.62] * 2, color=plots.INPUT, linewidth=2)
        row.text(place + 1.47, 0.72, f"note {number}", ha="center", va="bottom", color=plots.INPUT)
    row.set(xlim=(-0.05, 12), ylim=(-0.55, 1.3))
    row.axis("off")
    return fig


def _rows(**wanted) -> list[dict]:
    return [
        row
        for row in read_results("tokens")["rows"]
        if all(row[key] == value for key, value in wanted.items())
    ]


def grids():
    """What a finer grid gives in time, and what it costs in tokens."""
    rows = _rows(pedal="extend", bpe=None)
    names = [f"{row['grid_ms']:g} ms" for row in rows]
    fig, (error, cost) = plots.figure(1, 2, width=WIDTH, height=3.5)
    for ax, key, colour, form, title in (
        (error, "onset_ms_p95", plots.OTHER[0], "{:.1f}", "error of an onset, ms"),
        (cost, "tokens_per_note", plots.INPUT, "{:.2f}", "tokens a note"),
    ):
        values = [row[key] for row in rows]
        bars = ax.bar(names, values, color=colour, width=0.7)
        ax.bar_label(bars, [form.format(value) for value in values], padding=3)
        ax.set(title=title, yticks=[], xlabel="step of the grid", ylim=(0, 1.12 * max(values)))
        ax.spines["left"].set_visible(False)
        ax.tick_params(axis="x", length=0)
    return fig


def vocabularies():
    """Tokens a note against the size of the vocabulary."""
    fig, ax = plots.figure(width=WIDTH, height=3.6)
    for grid, colour in ((10.0, plots.OUTPUT), (62.5, plots.STATE)):
        rows = _rows(grid_ms=grid, pedal="extend")
        sizes = [row["vocabulary"] for row in rows]
        for key, line, label in (
            ("tokens_per_note", "o-", f"{grid:g} ms, held-out pieces"),
            ("tokens_per_note_train", "o:", "… pieces it was learnt on"),
        ):
            ax.plot(
                sizes, [row[key] for row in rows], line, color=colour, label=label, markersize=5
            )
    ax.axvline(1024, color=plots.INK, linewidth=1, linestyle="--")
    ax.text(1060, 3.95, "ours")
    ax.set(xscale="log", ylim=(0, 4.2), xlabel="vocabulary", ylabel="tokens a note")
    ax.set_xticks([300, 1000, 5000, 20_000], ["300", "1,000", "5,000", "20,000"])
    ax.minorticks_off()
    ax.legend(loc="lower left", bbox_to_anchor=(0.28, 0), ncols=2, fontsize=10)
    return fig


def units_of_likelihood():
    """The same four models by two units: bits a token, and bits a note."""
    rows = [row for row in read_results("experiments_tokens_cpu")["rows"] if row["grid_ms"] == 10]
    names = [f"{row['vocabulary']:,}" for row in rows]
    token = [row["native_bits_per_note"] / row["tokens_per_note"] for row in rows]
    note = [row["native_bits_per_note"] for row in rows]
    fig, axes = plots.figure(1, 2, width=WIDTH, height=3.5)
    for ax, values, colour, title in (
        (axes[0], token, plots.GREY, "bits a token"),
        (axes[1], note, plots.OUTPUT, "bits a note"),
    ):
        bars = ax.bar(names, values, color=colour, width=0.7)
        ax.bar_label(bars, [f"{value:.1f}" for value in values], padding=3)
        ax.set(title=title, yticks=[], xlabel="vocabulary", ylim=(0, 1.12 * max(values)))
        ax.spines["left"].set_visible(False)
        ax.tick_params(axis="x", length=0)
    return fig
