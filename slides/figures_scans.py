"""Figures of the deck on scans: the same music, measurements and colours as notebooks 05 and 06.

A slide's title states the claim, so that these figures have none of their own.
"""

from fractions import Fraction
from functools import partial

import numpy as np
import torch

from lib.env import machine as env
from lib.lab.bench import scan_figures
from lib.music.maestro import performances
from lib.music.notes import crop, read_midi, sustain
from lib.scan import parallel as scan_parallel
from lib.scan.selective import loop
from lib.show import diagrams as cells
from lib.show import plots

# inches: what a slide holds below its title, with letters that reach the last row
WIDTH, HEIGHT = 8.4, 3.6
LOOKS = {
    "loop": ("-", plots.INK),
    "Hillis–Steele": ("o-", plots.OTHER[0]),
    "Blelloch": ("s-", plots.OTHER[2]),
}
# one layer of a model with 130 million parameters
LAYER = {"batch": 8, "length": 2048, "channels": 1536, "states": 16}


def _board(width: float, height: float, inches: float):
    """A board that is `inches` wide, so that its letters are large beside its cells."""
    fig, ax = cells.board(width, height)
    fig.set_size_inches(inches, inches * height / width)
    return fig, ax


def _figure(rows: int = 1, columns: int = 1, **options):
    return plots.figure(rows, columns, **{"width": WIDTH, "height": HEIGHT} | options)


# ---- a recurrence, its steps, and three ways to join them -----------------------------------


def _piece():
    """Liszt's paraphrase on Verdi's Rigoletto."""
    found = performances(quick=True, say=lambda text: None)
    return read_midi(next((p for p in found if p.title == "Rigoletto Parap."), found[0]).path)


def _eight():
    """Onsets in seconds of its eight notes from second 74, what is left of the past at each,
    and what each adds.
    """
    notes = _piece().notes
    notes = notes[np.searchsorted(notes["start"], 74) :][:8]
    onset = notes["start"] - 74
    return onset, 0.5 ** (np.diff(onset, prepend=0) / 0.25), notes["velocity"].astype(float)


def _join(first, second):
    """The one step that does what `first` and then `second` do."""
    (a1, b1), (a2, b2) = first, second
    return a2 * a1, a2 * b1 + b2


def _one_by_one(items):
    items = list(items)
    for t in range(1, len(items)):
        items[t] = _join(items[t - 1], items[t])
        yield [(t - 1, t)], list(items)


def _hillis_steele(items):
    items, step = list(items), 1
    while step < len(items):
        joins = [(t - step, t) for t in range(step, len(items))]
        items = items[:step] + [_join(items[left], items[right]) for left, right in joins]
        yield joins, items
        step *= 2


def _blelloch(items):
    items, step = list(items), 1
    while 2 * step <= len(items):  # up
        joins = [(t - step, t) for t in range(2 * step - 1, len(items), 2 * step)]
        for left, right in joins:
            items[right] = _join(items[left], items[right])
        yield joins, list(items)
        step *= 2
    while step > 1:  # down
        step //= 2
        joins = [(t - step, t) for t in range(3 * step - 1, len(items), 2 * step)]
        for left, right in joins:
            items[right] = _join(items[left], items[right])
        if joins:
            yield joins, list(items)


ROUNDS = {"loop": _one_by_one, "Hillis–Steele": _hillis_steele, "Blelloch": _blelloch}


def echo():
    """Loudness in the ear: each note adds its velocity, and everything before it fades."""
    onset, a, b = _eight()
    fig, ax = _figure()
    h = 0.0
    for t in range(8):
        h = a[t] * h + b[t]
        time = np.linspace(onset[t], onset[t + 1] if t < 7 else 2, 60)
        ax.plot(
            time,
            h * 0.5 ** ((time - onset[t]) / 0.25),
            color=plots.STATE,
            linewidth=2.5,
            label="remembered, h" if t == 0 else None,
        )
        ax.plot(
            [onset[t]] * 2,
            [h - b[t], h],
            color=plots.INPUT,
            linewidth=5,
            label="comes in, b" if t == 0 else None,
        )
    ax.set(xlabel="seconds", ylabel="loudness in the ear", xlim=(0, 2), ylim=(0, 230))
    ax.legend(loc="upper left", ncols=2)
    return fig


def _draw(name: str, height: float):
    """The items, and below them each round of joins that the generator reports."""
    _, a, b = _eight()
    items, fig_ax = list(zip(a, b)), _figure(height=height)
    ax, rounds = fig_ax[1], list(ROUNDS[name](items))
    begins = list(range(8))  # the first step that each item covers
    for row, (joins, now) in enumerate([([], items), *rounds]):
        before = list(begins)
        for left, right in joins:
            begins[right] = before[left]
            ax.plot([left, right], [1 - row, -row], color=plots.STATE, linewidth=2, zorder=1)
        for t, (_, value) in enumerate(now):
            busy = row == 0 or any(right == t for _, right in joins)
            if row:
                ax.plot([t, t], [1 - row, -row], color=plots.PALE, linewidth=1.6, zorder=0)
            colour = plots.OUTPUT if begins[t] == 0 else plots.STATE if row else plots.INPUT
            ax.plot(
                t,
                -row,
                "o",
                markersize=22,
                zorder=2,
                color="white" if not busy else colour,
                markeredgecolor=colour,
                markeredgewidth=1.5,
            )
            ax.text(
                t,
                -row,
                f"{value:.0f}",
                ha="center",
                va="center",
                zorder=3,
                fontsize=10,
                color="white" if busy else plots.INK,
            )
    ax.set(yticks=[], xlim=(-0.6, 8.9), ylim=(-len(rounds) - 0.5, 0.5))
    ax.text(7.75, 0, "the notes", va="center", color=plots.GREY)
    ax.text(
        7.75,
        -len(rounds),
        f"{sum(len(joins) for joins, _ in rounds)} joins,\n{len(rounds)} rounds",
        va="center",
        fontweight="bold",
    )
    ax.set_xticks(range(8), [f"t = {t}" for t in range(8)])
    ax.spines[["left", "bottom"]].set_visible(False)
    ax.tick_params(length=0)
    return fig_ax[0]


def loop_rounds():
    """The loop makes one join a round."""
    return _draw("loop", 4.3)


def hillis_steele_rounds():
    """Hillis and Steele: every item joins the one 1, then 2, then 4 places back."""
    return _draw("Hillis–Steele", 3.4)


def blelloch_rounds():
    """Blelloch: up a tree, down again."""
    return _draw("Blelloch", 4.0)


def grouping():
    """Three steps joined in both groupings: exact fractions, one result."""
    steps = [
        (Fraction(1, 2), Fraction(4)),
        (Fraction(1, 3), Fraction(2)),
        (Fraction(3, 4), Fraction(1)),
    ]
    fig, ax = _board(21.5, 6.6, 8.8)

    def show(step):
        return f"× {step[0]},  + {step[1]}"

    for x, first in ((0, True), (11.5, False)):
        pair = _join(*steps[:2]) if first else _join(*steps[1:])
        whole = _join(pair, steps[2]) if first else _join(steps[0], pair)
        for i, step in enumerate(steps):
            cells.cells(ax, x + 3.4 * i, 5.2, [show(step)], plots.INPUT, width=2.9)
        at = x + (1.3 if first else 4.7)
        cells.cells(ax, at, 2.8, [show(pair)], plots.STATE, width=3.8)
        cells.cells(ax, x + 2.9, 0.4, [show(whole)], plots.OUTPUT, width=4)
        for i in (0, 1) if first else (1, 2):
            cells.arrow(
                ax, (x + 3.4 * i + 1.45, 5.15), (at + 1.2 + 1.4 * (i - (0 if first else 1)), 3.85)
            )
        alone = 2 if first else 0
        cells.arrow(ax, (x + 3.4 * alone + 1.45, 5.15), (x + (5.9 if first else 3.9), 1.45))
        cells.arrow(ax, (at + 1.9, 2.75), (x + (4.4 if first else 5.6), 1.45))
    return fig


# ---- work, depth and what they cost -----------------------------------------------------------


def _counted(longest: int = 2048) -> dict:
    """Joins in each round, by algorithm and length."""
    lengths = [2**k for k in range(1, longest.bit_length())]
    return {
        (name, n): [len(joins) for joins, _ in rounds([(0.5, 1.0)] * n)]
        for name, rounds in ROUNDS.items()
        for n in lengths
    }


def work_and_depth():
    """Joins and rounds against length, counted from what the generators report."""
    counted = _counted()
    lengths = sorted({n for _, n in counted})
    fig, axes = _figure(1, 2, height=3.5)
    for ax, measure, what in ((axes[0], sum, "work: joins"), (axes[1], len, "depth: rounds")):
        for name, (look, colour) in LOOKS.items():
            ax.plot(
                lengths,
                [measure(counted[name, n]) for n in lengths],
                look,
                color=colour,
                markersize=5,
                label=name,
            )
        ax.set(xscale="log", yscale="log", xlabel="length L", title=what)
    axes[0].legend()
    return fig


def workers():
    """Time in moments against workers, from the counted rounds of 2,048 steps."""
    counted, many = _counted(), np.array([2**k for k in range(12)])
    fig, ax = _figure()
    for name, (look, colour) in LOOKS.items():
        ax.plot(
            many,
            [sum(-(-n // p) for n in counted[name, 2048]) for p in many],
            look,
            color=colour,
            markersize=6,
            label=name,
        )
    ax.axvline(2, color=plots.GREY, linewidth=0.8, linestyle=":")
    ax.text(2.15, 7, "two cores", color=plots.GREY)
    ax.set(
        xscale="log",
        yscale="log",
        xlabel="workers",
        ylabel="moments for 2,048 steps",
        ylim=(5, None),
    )
    ax.legend(loc="upper right")
    return fig


def cumulative_sums():
    """Relative float32 error of the two shortcuts by cumulative sums, and of Blelloch's scan."""

    def two_cumsums(a, b):
        fading = torch.log(a).cumsum(1)
        return torch.exp(fading) * (torch.exp(-fading) * b).cumsum(1)

    def log_space(a, b):
        fading = torch.log(a).cumsum(1)
        return torch.exp(fading + (torch.log(b) - fading).logcumsumexp(1))

    draw, length = torch.Generator().manual_seed(1), 4096
    a = 0.05 + 0.9 * torch.rand(1, length, 8, generator=draw).double()
    b = 0.1 + torch.rand(1, length, 8, generator=draw).double()
    truth = scan_parallel.blelloch(a, b)  # in float64
    fig, ax = _figure()
    for scan, label, colour in (
        (two_cumsums, "two cumulative sums", plots.OTHER[1]),
        (log_space, "… in log space", plots.OTHER[0]),
        (scan_parallel.blelloch, "Blelloch", plots.OTHER[2]),
    ):
        error = ((scan(a.float(), b.float()) - truth).abs() / truth).amax((0, 2))
        worst = error.nan_to_num(np.inf).cummax(0).values
        good = int((worst < 1).sum())
        ax.plot(range(1, good + 1), worst[:good], color=colour, label=label, linewidth=2.5)
        if good < length:
            ax.plot(
                good,
                worst[good - 1],
                "X",
                color=colour,
                markersize=10,
                label=f"all lost at step {good + 1}",
            )
    ax.set(
        xscale="log",
        yscale="log",
        xlabel="step",
        ylabel="worst relative error so far",
        ylim=(1e-8, 1),
    )
    ax.legend(loc="upper left")
    return fig


def owed():
    """What the loudness after the last note owes to each note: the gradient times the velocity."""
    _, a, b = _eight()
    g = np.ones(8)
    for t in reversed(range(7)):
        g[t] = a[t + 1] * g[t + 1]
    fig, ax = _figure(height=2.7)
    ax.bar(range(8), b, color=plots.PALE, label="velocity, as played")
    ax.bar(
        range(8), g * b, color=plots.INPUT, label="what is left of it after note 7: b · gradient"
    )
    ax.set(xlabel="note t", ylabel="velocity", ylim=(0, 128))
    ax.legend(loc="upper left", ncols=2)
    return fig


def written():
    """Numbers that a forward pass writes to memory, in units of B L D N,
    counted operation by operation.
    """
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    batch, length, channels, states = 1, 1024, 64, 16

    class Written(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if not function.is_view:
                self.elements += sum(made.numel() for made in tree_leaves(out))
            return out

    given = [
        torch.rand(batch, length, channels),
        torch.rand(batch, length, channels),
        -torch.rand(channels, states),
        torch.rand(batch, length, states),
        torch.rand(batch, length, states),
        torch.zeros(batch, channels, states),
    ]
    ways = {
        "loop": loop,
        "Hillis–Steele": partial(scan_parallel.parallel, method="hillis_steele", chunk=length),
        "Blelloch": partial(scan_parallel.parallel, chunk=length),
    }
    found = {}
    for name, way in ways.items():
        with torch.no_grad(), Written() as count:
            way(*given)
        found[name] = count.elements / (batch * length * channels * states)
    fig, ax = _figure(height=2.3)
    bars = ax.barh(
        list(found), list(found.values()), color=[LOOKS[name][1] for name in found], height=0.62
    )
    ax.bar_label(bars, [f" {value:.0f} × B·L·D·N" for value in found.values()])
    ax.invert_yaxis()
    ax.set(xlabel="numbers written in a forward pass", xlim=(0, 1.2 * max(found.values())))
    ax.tick_params(axis="y", length=0)
    return fig


# ---- memory, and the fused kernel --------------------------------------------------------------


def memory_wall():
    """Bytes that a forward pass moves, unfused and fused,
    by arithmetic (notebook 06, section 1).
    """
    steps = LAYER["batch"] * LAYER["length"] * LAYER["channels"]
    small = LAYER["batch"] * LAYER["length"] * LAYER["states"]
    # A_bar, Bx_bar, h: written and read
    moved = {"plain, 32 bits": 2 * 3 * 4 * steps * LAYER["states"]}
    for width in (4, 2):
        # x, delta, z and y, of `steps` numbers each; B and C, of `small`
        moved[f"fused, {8 * width} bits"] = 4 * width * steps + 2 * width * small
    fig, ax = _figure(height=2.4)
    bars = ax.barh(
        list(moved),
        [value / 1e9 for value in moved.values()],
        height=0.62,
        color=(plots.OTHER[0], plots.OUTPUT, plots.OUTPUT),
    )
    ax.bar_label(bars, [f" {value / 1e9:.1f} GB" for value in moved.values()])
    ax.invert_yaxis()
    ax.set(xlabel="gigabytes through main memory, one layer, forward (computed)")
    ax.set_xlim(0, 1.15 * max(moved.values()) / 1e9)
    ax.tick_params(axis="y", length=0)
    return fig


def fused():
    """What a program reads, holds in registers and writes."""
    fig, ax = _board(21, 6.4, 8.8)
    for row, name in enumerate(("x", "delta", "z")):
        cells.cells(ax, 0, 5.3 - 1.1 * row, [name] + [""] * 3, plots.INPUT)
    for row, name in enumerate(("B", "C")):
        cells.cells(ax, 0, 1.5 - 1.1 * row, [name] + [""] * 3, plots.INPUT)
    for n in range(4):
        cells.cells(ax, 7.4 + 0.35 * n, 3.4 - 0.55 * n, [""] * 4, plots.STATE)
    cells.cells(ax, 16.6, 3.2, ["y", "", "", ""], plots.OUTPUT)
    cells.arrow(ax, (4.2, 4.8), (7.2, 3.9), plots.INPUT)
    cells.arrow(ax, (4.2, 1.5), (7.2, 2.9), plots.INPUT)
    cells.arrow(ax, (13, 3.2), (16.4, 3.7), plots.OUTPUT)
    cells.arrow(ax, (8.6, 1.6), (8.6, 0.55), plots.STATE)
    cells.say(ax, 7.4, 5.3, "registers: A_bar, Bx_bar and h,\none state after another", plots.STATE)
    cells.say(ax, 13, 4.7, "C·h + D·x, then the gate", plots.OUTPUT)
    cells.say(ax, 7.4, 0.2, "one state a block to memory: the carry", plots.STATE)
    return fig


def runs():
    """Up, across and down over the sixteen steps that four threads hold."""

    def spans(size):
        return [f"{i}…{i + size - 1}" for i in range(0, 16, size)]

    def before(size):
        return ["carry"] + [f"h{i - 1}" for i in range(size, 16, size)]

    fig, ax = _board(25, 8.6, 9.2)
    rows = [
        (range(16), "maps (a, b) of single steps"),
        (spans(2), "up: the maps of pairs"),
        (spans(4), "up: one map a thread"),
        (before(4), "threads scan: the state before a run"),
        (before(2), "down: the state before a pair"),
        ([f"h{i}" for i in range(16)], "one more step: every state"),
    ]
    for row, (texts, what) in enumerate(rows):
        cells.cells(
            ax,
            0,
            7.5 - 1.5 * row,
            texts,
            plots.INPUT if row < 3 else plots.STATE,
            width=16 // len(texts),
        )
        cells.say(ax, 16.5, 8 - 1.5 * row, what)
    return fig


def backward():
    """Blocks from the last to the first: states recomputed forwards, gradients in reverse."""
    fig, ax = _board(20.5, 4.4, 8.8)
    for block in range(4):
        cells.cells(ax, 4 * block + 1, 2.9, [""] * 3, plots.STATE, empty=range(3))
        cells.cells(ax, 4 * block, 2.9, ["kept"], plots.STATE)
        cells.cells(ax, 4 * block, 0.5, [f"g{4 * block + i}" for i in range(4)], plots.OUTPUT)
        cells.arrow(ax, (4 * block + 0.6, 4.1), (4 * block + 3.6, 4.1), plots.STATE)
        cells.arrow(ax, (4 * block + 3.6, 0.3), (4 * block + 0.6, 0.3), plots.OUTPUT)
        cells.arrow(ax, (4 * block + 2, 2.85), (4 * block + 2, 1.6))
    cells.say(ax, 16.3, 3.4, "h, recomputed", plots.STATE)
    cells.say(ax, 16.3, 1.0, "gradients, in reverse", plots.OUTPUT)
    return fig


# ---- measured -------------------------------------------------------------------------------


def scan_on_cpu():
    """Forward and backward against length, ours beside other people's, the names in a legend:
    lines end anywhere.
    """
    result = env.read_results("scan_cpu_2_cores")
    fig, ax = _figure(height=3.9)
    scan_figures.draw(result, ax=ax)
    ax.set_title("")
    for name in list(ax.texts):
        name.remove()
    drawn = {row["contender"] for row in result["rows"]}
    labels = [about["label"] for name, about in result["contenders"].items() if name in drawn]
    by_height = sorted(zip(ax.lines, labels, strict=True), key=lambda pair: -pair[0].get_ydata()[0])
    ax.legend(*zip(*by_height), loc="lower right", ncols=2, fontsize=10)
    ax.set_xlim(right=1.2 * max(row["length"] for row in result["rows"]))
    return fig


def figure3():
    """The scan against attention and a long convolution,
    as in figure 8 (left) of Gu and Dao (2023), on a CPU.
    """
    fig, ax = _figure(height=3.9)
    scan_figures.draw_figure3(env.read_results("scan_cpu_2_cores"), ax=ax)
    ax.set_title("")
    return fig


def kept_bytes():
    """Bytes that each implementation keeps for the backward pass,
    for a step of a channel (measured).
    """
    result = env.read_results("scan_cpu_2_cores")
    rows = {
        row["contender"]: row["kept_bytes_per_element"]
        for row in result["memory"]
        if row["length"] == result["key_length"]
    }
    names = sorted(rows, key=rows.get)
    fig, ax = _figure(height=2.6)
    bars = ax.barh(
        [result["contenders"][name]["label"] for name in names],
        [rows[name] for name in names],
        height=0.62,
        color=[plots.OUTPUT if name == result["ours"] else plots.GREY for name in names],
    )
    ax.bar_label(bars, [f" {rows[name]:,.0f}" for name in names])
    ax.invert_yaxis()
    ax.set(
        xlabel="bytes kept for the way back, for one step of one channel",
        xlim=(0, 1.12 * max(rows.values())),
    )
    ax.tick_params(axis="y", length=0)
    return fig


# ---- sound ----------------------------------------------------------------------------------


def heard_eight_notes():
    """The eight notes, and the bar after them."""
    return crop(sustain(_piece()), 74, 78)
