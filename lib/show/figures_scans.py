"""The larger drawings of notebooks 05 and 06: how a scan joins, what it costs, and its floor.

Blue is what goes in, orange what is remembered, green what comes out.
An algorithm keeps its look in every figure.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from lib.show import plots
from lib.show.diagrams import arrow, board, cells, say

LOOK = {
    "loop": ("-", plots.INK),
    "Hillis–Steele": ("o-", plots.OTHER[0]),
    "Blelloch": ("s-", plots.OTHER[2]),
    "parallel": ("D-", plots.GREY),
    "cpu": ("^-", plots.OTHER[1]),
}


def look(name: str) -> tuple[str, str]:
    """Line with marker, and colour, of an algorithm by the first word of its name.

    "Blelloch, whole" is "Blelloch".
    """
    return LOOK[name.partition(" ")[0].rstrip(",")]


# ---- notebook 05 --------------------------------------------------------------------------


def echo(
    onset: Sequence[float], b: Sequence[float], h: Sequence[float], half_life: float, end: float
):
    """Loudness in the ear over the seconds.

    It is h[t] after each note, of which b[t] is new, and it fades between notes.
    """
    fig, ax = plots.figure(height=3.2)
    for t, after in enumerate([*onset[1:], end]):
        time = np.linspace(onset[t], after, 60)
        ax.plot(time, h[t] * 0.5 ** ((time - onset[t]) / half_life), color=plots.STATE)
        ax.plot([onset[t]] * 2, [h[t] - b[t], h[t]], color=plots.INPUT, linewidth=3)
    ax.plot([], color=plots.INPUT, linewidth=3, label="what a note adds, b[t]")
    ax.plot([], color=plots.STATE, label="what is in the ear, h[t] after each note")
    ax.legend(loc="upper left", ncols=2)
    ax.set(
        xlabel="seconds",
        ylabel="loudness in the ear",
        xlim=(0, end),
        ylim=(0, 1.2 * max(h)),
        title="Each note adds its velocity, and everything before it fades",
    )
    return fig


def joins(ax, items: Sequence, rounds: Iterable, name: str) -> None:
    """The items (a, b) in a row, and below them each round of joins from the generator `rounds`.

    A circle is filled where a join was made, and green where it reaches back to the start;
    the number is its b.
    """
    rounds = list(rounds)
    count = sum(len(pairs) for pairs, _ in rounds)
    begins = list(range(len(items)))  # the first step that each item covers
    for row, (pairs, now) in enumerate([([], items), *rounds]):
        before = list(begins)
        for left, right in pairs:
            begins[right] = before[left]
            ax.plot([left, right], [1 - row, -row], color=plots.STATE, linewidth=1.6, zorder=1)
        made = {right for _, right in pairs}
        for t, (_, value) in enumerate(now):
            busy = row == 0 or t in made
            if row:
                ax.plot([t, t], [1 - row, -row], color=plots.PALE, linewidth=1.6, zorder=0)
            colour = plots.OUTPUT if begins[t] == 0 else plots.STATE if row else plots.INPUT
            ax.plot(
                t,
                -row,
                "o",
                markersize=27,
                zorder=2,
                color=colour if busy else "white",
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
    ax.set(
        title=f"{name}: {count} joins, {len(rounds)} rounds",
        yticks=[],
        xlim=(-0.5, len(items) - 0.5),
        ylim=(-len(rounds) - 0.5, 0.5),
    )
    ax.set_xticks(range(len(items)), [f"t = {t}" for t in range(len(items))])
    ax.spines[["left", "bottom"]].set_visible(False)
    ax.tick_params(length=0)


def by_moments(items: Sequence, moments: Sequence, passed: int, title: str):
    """The diagram of `joins` after `passed` moments; those still to come keep their room."""
    fig, ax = plots.figure(width=9, height=1.2 + 0.5 * len(moments))
    joins(ax, items, moments[:passed], title)
    ax.set(title=title, ylim=(-len(moments) - 0.5, 0.5))
    return fig


def up_and_down(ax) -> None:
    """Mark the two sweeps beside a diagram of Blelloch's scan on eight items."""
    for row, text in ((-2, "up"), (-4.5, "down")):
        ax.text(
            7.75, row, text, fontsize=12, color=plots.GREY, rotation=270, va="center", clip_on=False
        )
    ax.axhline(-3.5, color=plots.GREY, linewidth=0.8, linestyle=":")


def lines(ax, x: Sequence[float], series: Mapping[str, Sequence[float]], **labels) -> None:
    """Each algorithm's values against x, both axes logarithmic; a series may be shorter than x."""
    for name, values in series.items():
        style, colour = look(name)
        ax.plot(x[: len(values)], values, style, color=colour, markersize=5, label=name)
    ax.set(xscale="log", yscale="log", **labels)


def work_and_depth(lengths: Sequence[int], work: Mapping, depth: Mapping):
    """Joins and rounds of each algorithm against the length."""
    fig, axes = plots.figure(1, 2, height=3.6)
    lines(
        axes[0],
        lengths,
        work,
        xlabel="length L",
        ylabel="joins",
        title="Work: Blelloch stays under 2 L",
    )
    lines(
        axes[1],
        lengths,
        depth,
        xlabel="length L",
        ylabel="rounds",
        title="Depth: both scans grow as log L",
    )
    axes[0].legend()
    return fig


def moments(workers: Sequence[int], taken: Mapping):
    """Moments that each algorithm takes against the number of workers."""
    fig, ax = plots.figure(height=3.6)
    lines(
        ax,
        workers,
        taken,
        xlabel="workers P",
        ylabel="moments",
        ylim=(5, None),
        title="Few workers pay for work, many workers pay for depth",
    )
    ax.axvline(2, color=plots.GREY, linewidth=0.8, linestyle=":", label="two cores")
    ax.legend(loc="upper right", ncols=2)
    return fig


def lost_digits(errors: Mapping[str, np.ndarray]):
    """Worst relative error so far (L,) against the step.

    A cross marks where it reaches 1, and all is lost.
    """
    fig, ax = plots.figure(height=3.8)
    for (name, error), colour in zip(
        errors.items(), (plots.OTHER[1], plots.OTHER[0], plots.OTHER[2]), strict=True
    ):
        good = int((error < 1).sum())
        ax.plot(range(1, good + 1), error[:good], color=colour, label=name)
        if good < len(error):
            ax.plot(
                good,
                error[good - 1],
                "X",
                color=colour,
                markersize=9,
                label=f"all lost at step {good + 1}",
            )
    ax.set(
        xscale="log",
        yscale="log",
        xlabel="step",
        ylabel="worst relative error so far",
        ylim=(1e-8, 1),
        title="Cumulative sums lose the state, a scan of pairs keeps it",
    )
    ax.legend(loc="upper left")
    return fig


def owed(b: Sequence[float], share: Sequence[float]):
    """What each note added, and the part of it that the last state still holds."""
    fig, ax = plots.figure(height=2.9)
    ax.bar(range(len(b)), b, color=plots.PALE, label="velocity, as played")
    ax.bar(
        range(len(b)),
        share,
        color=plots.STATE,
        label=f"what is left after note {len(b) - 1}; in all {sum(share):.1f} = h[{len(b) - 1}]",
    )
    ax.set(
        xlabel="note t",
        ylabel="velocity",
        ylim=(0, 1.4 * max(b)),
        title="The gradient says what the end owes to each note",
    )
    ax.legend(loc="upper left", ncols=2)
    return fig


def by_width(
    widths: Sequence[int], took: Mapping[str, Sequence[float]], wins: int | None, length: int
):
    """Milliseconds against the width of a step.

    From the width `wins` on, if it is given, the loop is the fastest.
    """
    fig, ax = plots.figure(height=3.6)
    lines(
        ax,
        widths,
        took,
        xlabel="width of a step, B·D·N",
        ylabel="milliseconds, forward",
        title=f"Scanning {length} steps: a scan wins while a step is small",
    )
    if wins:
        ax.axvspan(wins, widths[-1], color=plots.PALE, alpha=0.5, zorder=0)
        ax.text(
            widths[-1] * 0.95,
            1.3 * min(map(min, took.values())),
            "the loop wins",
            ha="right",
            color=plots.GREY,
        )
    ax.legend(loc="upper left")
    return fig


def by_length(lengths: Sequence[int], took: Mapping[str, Sequence[float]]):
    """Milliseconds of forward and backward against the length."""
    fig, ax = plots.figure(height=4)
    lines(
        ax,
        lengths,
        took,
        xlabel="length L",
        ylabel="milliseconds",
        title="Forward and backward: chunks in the cache beat the loop, fusion beats all",
    )
    ax.set_xticks(lengths, [f"{n:,}" for n in lengths])
    ax.minorticks_off()
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=10)
    return fig


# ---- notebook 06 --------------------------------------------------------------------------


def roofline(
    peak: Mapping[str, float], roofs: Mapping[str, float], points: Iterable[tuple], title: str
):
    """State steps a second against state steps for a byte of memory moved, both logarithmic.

    `peak["memory"]` in bytes a second is the slope, `roofs` the flat limits in state steps a
    second, and a point is (name, steps a byte, steps a second, colour, where its name goes: an
    offset in points).
    """
    fig, ax = plots.figure(height=4.4)
    x = np.geomspace(0.02, 20, 200)
    ax.plot(x, np.minimum(peak["memory"] * x, max(roofs.values())), color=plots.INK)
    for name, roof in roofs.items():
        ax.plot([roof / peak["memory"], 20], [roof, roof], "--", color=plots.GREY, linewidth=1)
        ax.text(20, roof * 1.08, name, ha="right", color=plots.GREY)
    for name, intensity, rate, colour, offset in points:
        ax.plot(intensity, rate, "o", color=colour, markersize=9)
        ax.annotate(
            name,
            (intensity, rate),
            xytext=offset,
            textcoords="offset points",
            color=colour,
            ha="right" if offset[0] < 0 else "left",
        )
    ax.set(
        xscale="log",
        yscale="log",
        xlabel="state steps for a byte of memory moved",
        ylabel="state steps a second, at most",
        title=title,
    )
    return fig


def three_programs():
    """Ten numbers in three blocks of four; the last block masks two."""
    fig, ax = board(19, 3.4, "Three programs add ten numbers; the last one masks two")
    for program in range(3):
        numbers, beyond = range(4 * program, 4 * program + 4), {2, 3} if program == 2 else ()
        cells(ax, 5 * program, 1.9, numbers, plots.INPUT, empty=beyond)
        cells(ax, 5 * program, 0, numbers, plots.OUTPUT, empty=beyond)
        arrow(ax, (5 * program + 2, 1.85), (5 * program + 2, 1.1))
        say(ax, 5 * program + 2, 3.2, f"program {program}", ha="center")
    say(ax, 14.6, 2.4, "x + y are read", plots.INPUT)
    say(ax, 14.6, 0.5, "the sum is written", plots.OUTPUT)
    return fig


def totals(numbers: Sequence[int]):
    """Eight numbers above, their running totals below, and what the sixth total is made of."""
    fig, ax = board(14, 3.2, "Each output is the sum of all inputs up to its place")
    cells(ax, 0, 2, numbers, plots.INPUT)
    cells(ax, 0, 0, np.cumsum(numbers), plots.OUTPUT)
    for i in range(6):
        arrow(ax, (i + 0.5, 1.95), (5.5, 1.05), plots.INPUT)
    say(ax, 8.4, 2.5, "x", plots.INPUT)
    say(ax, 8.4, 0.5, "cumulative sum of x", plots.OUTPUT)
    return fig


def pushes(b, h):
    """What arrives, b (L,), and the state h (L,) that remembers it."""
    fig, ax = plots.figure(height=2.8)
    ax.bar(range(len(b)), b, width=0.5, color=plots.INPUT, label="b, what arrives")
    ax.plot(h, ".-", color=plots.STATE, label="h, what is remembered")
    ax.set(
        xlabel="step t",
        title="The state adds what arrives, and forgets a fifth of itself at every step",
    )
    ax.legend()
    return fig


def carried(h, alone):
    """The state h (L,) and the same steps scanned from zero in chunks, alone (chunks, steps)."""
    fig, ax = plots.figure(height=3)
    size = len(alone[0])
    for k, part in enumerate(alone):
        steps = np.arange(k * size, (k + 1) * size)
        first = k == 0
        ax.fill_between(
            steps,
            part,
            h[steps],
            color=plots.STATE,
            alpha=0.25,
            linewidth=0,
            label="added by the carry" if first else None,
        )
        ax.plot(
            steps, part, ":", color=plots.GREY, label="chunk scanned from zero" if first else None
        )
        ax.axvline(steps[0] - 0.5, color=plots.PALE, zorder=0)
    ax.plot(h, ".-", color=plots.STATE, label="h")
    ax.set(xlabel="step t", title="A chunk scanned alone lacks what its carry would have added")
    ax.legend(loc="lower left")
    return fig


def four_states(x, states):
    """An input x (L,), the states (N, L) that listen to it, and their mean."""
    fig, ax = plots.figure(height=3)
    ax.fill_between(range(len(x)), x, color=plots.INPUT, alpha=0.25, linewidth=0, label="x")
    for n, h in enumerate(states):
        ax.plot(h, color=plots.STATE, alpha=1 - 0.2 * n, label=f"h[{n}]")
    ax.plot(np.mean(states, axis=0), color=plots.OUTPUT, linewidth=2.5, label="y, their mean")
    ax.set(
        xlabel="step t", title="States with other decays remember one input for shorter or longer"
    )
    ax.legend(ncols=3)
    return fig


def softplus_errors(step, errors: Mapping[str, np.ndarray]):
    """Relative error of two ways to compute a step, against the step."""
    fig, ax = plots.figure(height=3)
    for (label, error), colour in zip(errors.items(), (plots.OTHER[0], plots.OUTPUT), strict=True):
        # 1e-9 more, as 0 has no logarithm
        ax.plot(step, error + 1e-9, ".", markersize=3, label=label, color=colour)
    ax.set(
        xscale="log",
        yscale="log",
        xlabel="step, delta",
        ylabel="relative error",
        title="The plain softplus loses small steps in float32",
    )
    ax.legend()
    return fig


def runs():
    """One channel of a tile: steps join to runs, threads scan those, states come down again."""

    def spans(size):
        return [f"{i}…{i + size - 1}" for i in range(0, 16, size)]

    def before(size):
        return ["carry"] + [f"h{i - 1}" for i in range(size, 16, size)]

    fig, ax = board(24, 8.8, "One channel of a tile: four threads, each with a run of four steps")
    rows = [
        (range(16), "maps (a, b) of single steps"),
        (spans(2), "up: the maps of pairs"),
        (spans(4), "up: one map for each thread"),
        (before(4), "threads scan: the state before each run"),
        (before(2), "down: the state before each pair"),
        ([f"h{i}" for i in range(16)], "one more step: every state"),
    ]
    for row, (texts, what) in enumerate(rows):
        cells(
            ax,
            0,
            7.5 - 1.5 * row,
            texts,
            plots.INPUT if row < 3 else plots.STATE,
            width=16 // len(texts),
        )
        say(ax, 16.4, 8 - 1.5 * row, what)
    return fig


def fused():
    """What the fused kernel reads, what stays in registers, and what it writes."""
    fig, ax = board(21, 6.6, "Memory sees only what goes in and what comes out")
    for row, name in enumerate(("x", "delta", "z")):
        cells(ax, 0, 5.4 - 1.1 * row, [name] + [""] * 3, plots.INPUT)
    for row, name in enumerate(("B", "C")):
        cells(ax, 0, 1.6 - 1.1 * row, [name] + [""] * 3, plots.INPUT)
    for n in range(4):
        cells(ax, 7.4 + 0.35 * n, 3.4 - 0.55 * n, [""] * 4, plots.STATE)
    cells(ax, 16.6, 3.2, ["y", "", "", ""], plots.OUTPUT)
    arrow(ax, (4.2, 4.8), (7.2, 3.9), plots.INPUT)
    arrow(ax, (4.2, 1.6), (7.2, 2.9), plots.INPUT)
    arrow(ax, (13, 3.2), (16.4, 3.7), plots.OUTPUT)
    arrow(ax, (8.6, 1.6), (8.6, 0.55), plots.STATE)
    say(ax, 7.4, 5.2, "registers: A_bar, Bx_bar and h,\none state after another", plots.STATE)
    say(ax, 13, 4.6, "C·h + D·x, then the gate", plots.OUTPUT)
    say(ax, 7.4, 0.2, "to memory, once in a block: the carried states", plots.STATE)
    return fig


def backward_blocks():
    """Four blocks from the last to the first: states recomputed forwards, gradients in reverse."""
    fig, ax = board(
        20,
        4.5,
        "Backward: blocks from the last to the first, states recomputed, gradients in reverse",
    )
    for block in range(4):
        cells(ax, 4 * block, 2.9, ["kept", "", "", ""], plots.STATE, empty=(1, 2, 3))
        cells(ax, 4 * block, 0.5, [f"g{4 * block + i}" for i in range(4)], plots.OUTPUT)
        arrow(ax, (4 * block + 0.6, 4.1), (4 * block + 3.6, 4.1), plots.STATE)
        arrow(ax, (4 * block + 3.6, 0.3), (4 * block + 0.6, 0.3), plots.OUTPUT)
        arrow(ax, (4 * block + 2, 2.85), (4 * block + 2, 1.6))
    say(ax, 16.4, 3.4, "h, recomputed", plots.STATE)
    say(ax, 16.4, 1.0, "gradients, in reverse", plots.OUTPUT)
    return fig


def keep_or_recompute(sizes, traffic, again: float, ours: int):
    """Seconds to move the kept states against the steps for each.

    A line beside them: the seconds to compute the other states again.
    """
    fig, ax = plots.figure(height=3.2)
    here = list(sizes).index(ours)
    ax.plot(sizes, 1e6 * traffic, "o-", color=plots.STATE, label="moving the kept states")
    ax.axhline(1e6 * again, color=plots.GREY, linestyle="--", label="recomputing the others")
    ax.plot(
        ours,
        1e6 * traffic[here],
        "o",
        color=plots.OUTPUT,
        markersize=11,
        label=f"ours, {ours} steps",
    )
    ratio = traffic[0] / (again + traffic[here])
    ax.set(
        xscale="log",
        yscale="log",
        xlabel="steps for each state kept",
        ylabel="µs, at least",
        title=f"To keep every state takes {ratio:.0f} times as long as to recompute "
        "(on paper, H100)",
    )
    ax.set_xticks(sizes, sizes)
    ax.minorticks_off()
    ax.legend()
    return fig


def compiled_floors(names: Sequence[str], times: Mapping[str, Sequence[float]]):
    """Least microseconds of each pass for each resource; 0 where nothing was compiled."""
    fig, ax = plots.figure(height=3.6)
    for i, (label, column) in enumerate(times.items()):
        bars = ax.barh(
            np.arange(len(names)) + 0.26 * (i - 1), column, 0.24, label=label, color=plots.OTHER[i]
        )
        ax.bar_label(
            bars,
            [f"{us:.0f}" if us else "not compiled here" for us in column],
            padding=3,
            fontsize=9,
        )
    *others, last = times.values()
    longest = all(own == max(own, *rest) for *rest, own in zip(*others, last, strict=True))
    ax.set(
        xlabel="µs at least, on an H100",
        title="On paper, issuing instructions is what our kernels wait for"
        if longest
        else "Floors on paper: the longest bar of each is what a kernel waits for",
    )
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ax.legend(loc="upper right")
    return fig
