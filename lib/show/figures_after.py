"""The drawings of notebook 11: a decaying mask, chunks, speed, the trapezium, the waltz counter.

Blue is what goes in, orange what is remembered, green what comes out.
Forms and models, which are none of these, have colours of their own.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from lib.show import plots

FORM = {"scan": (plots.INK, "-"), "ssd": (plots.OTHER[2], "-"), "ssd_bf16": (plots.OTHER[2], "--")}
RULE = {
    1.0: (plots.OTHER[0], "o-", "λ = 1: the later end"),
    0.0: (plots.OTHER[1], "s:", "λ = 0: the earlier end"),
    0.5: (plots.OTHER[2], "o-", "λ = ½: the trapezium"),
}
STATE = {"turning": (plots.OTHER[2], "o-"), "real decay": (plots.OTHER[0], "s--")}


def duality(scores, mask, names: Sequence[str]):
    """C · B (L, L), the mask (L, L), and their product.

    The product is what each step (row) reads of each earlier one (column).
    """
    fig, axes = plots.figure(1, 3, height=4, width=12)
    both = np.where(np.tri(len(mask)) > 0, scores * mask, np.nan)
    panels = (
        ("C · B: who fits whom", scores, "PuOr", plots.INPUT),
        ("the mask: what is left of it", mask, "Oranges", plots.STATE),
        ("both: what is read", both, "PuOr", plots.OUTPUT),
    )
    for ax, (title, values, colours, _) in zip(axes, panels, strict=True):
        most = np.nanmax(np.abs(values))
        ax.imshow(
            np.where(np.tri(len(mask)) > 0, values, np.nan),
            cmap=colours,
            vmin=0 if colours == "Oranges" else -most,
            vmax=most,
        )
        ax.set(title=title, xlabel="written by note s")
        ax.set_xticks(range(len(names)), names, fontsize=9)
        ax.set_yticks(range(len(names)), names, fontsize=9)
        ax.tick_params(length=0)
        for side in ("left", "bottom"):
            ax.spines[side].set_visible(False)
    axes[0].set_ylabel("read by note t")
    for ax, sign in zip(axes[1:], "×=", strict=True):
        ax.text(-0.16, 0.5, sign, transform=ax.transAxes, fontsize=22, ha="center", va="center")
    return fig


def chunks(length: int, chunk: int):
    """The matrix of all reads, cut into chunks.

    Squares stand on the diagonal, and one state is handed on below it.
    """
    fig, axes = plots.figure(1, 2, height=4.4, width=11, width_ratios=[1, 1.25])
    ax = axes[0]
    for begin in range(0, length, chunk):
        triangle = [(begin, begin), (begin, begin + chunk), (begin + chunk, begin + chunk)]
        ax.add_patch(_polygon(triangle, plots.INPUT, 0.75))
        if begin:
            below = [(0, begin), (begin, begin), (begin, begin + chunk), (0, begin + chunk)]
            ax.add_patch(_polygon(below, plots.STATE, 0.45))
    ax.text(
        chunk * 0.32, chunk * 0.72, "Q × Q", color="white", ha="center", va="center", fontsize=9
    )
    ax.text(
        (length - chunk) / 2,
        length - chunk / 2,
        "by way of one state a chunk",
        ha="center",
        va="center",
    )
    ax.set(
        xlim=(0, length),
        ylim=(length, 0),
        aspect="equal",
        xlabel="written at s",
        ylabel="read at t",
        title="What has to be read",
    )
    ax.set_xticks(range(0, length + 1, chunk))
    ax.set_yticks(range(0, length + 1, chunk))
    ax = axes[1]
    count = length // chunk
    for k in range(count):
        ax.add_patch(_box(k, 1.2, 0.72, 0.8, plots.INPUT))
        ax.text(k + 0.36, 1.6, f"chunk {k}", color="white", ha="center", va="center", fontsize=10)
        ax.annotate(
            "",
            (k + 0.36, 0.62),
            (k + 0.36, 1.2),
            arrowprops=dict(arrowstyle="->", color=plots.STATE, lw=2),
        )
        ax.annotate(
            "",
            (k + 0.36, 2.6),
            (k + 0.36, 2.0),
            arrowprops=dict(arrowstyle="->", color=plots.OUTPUT, lw=2),
        )
        ax.text(
            k + 0.36, 2.75, "y", color=plots.OUTPUT, ha="center", fontsize=13, fontweight="bold"
        )
        ax.add_patch(_box(k + 0.14, 0.2, 0.44, 0.42, plots.STATE))
        ax.text(k + 0.36, 0.41, "h", ha="center", va="center", fontsize=12, fontweight="bold")
        if k + 1 < count:
            ax.annotate(
                "",
                (k + 1.14, 0.41),
                (k + 0.58, 0.41),
                arrowprops=dict(arrowstyle="->", color=plots.STATE, lw=2),
            )
            ax.annotate(
                "",
                (k + 1.1, 1.25),
                (k + 0.55, 0.62),
                arrowprops=dict(arrowstyle="->", color=plots.STATE, lw=1.2, linestyle=":"),
            )
    ax.set(xlim=(-0.1, count), ylim=(0, 3.1), title="One state is handed on for Q steps")
    ax.axis("off")
    return fig


def _polygon(corners, colour, alpha):
    from matplotlib.patches import Polygon

    return Polygon(corners, facecolor=colour, alpha=alpha, edgecolor="white", linewidth=1)


def _box(x, y, width, height, colour):
    from matplotlib.patches import FancyBboxPatch

    return FancyBboxPatch(
        (x, y),
        width,
        height,
        boxstyle="round,pad=0,rounding_size=0.06",
        facecolor=colour,
        edgecolor="none",
    )


def speed(result: Mapping, part: str = "both"):
    """Milliseconds of each form, with quartiles, against the length and the size of the state."""
    rows, sizes = result["rows"], result["sizes"]
    fig, axes = plots.figure(1, 2, height=4.2, width=12)
    views = (
        (axes[0], "length", "d_state", sizes["state"], "length L"),
        (axes[1], "d_state", "length", sizes["length"], "size of the state N"),
    )
    short = {
        "scan": "any decay, in C++",
        "ssd": "products, float32",
        "ssd_bf16": "products, bfloat16",
    }
    for ax, x, fixed, value, label in views:
        lines = []
        for form, (colour, dash) in FORM.items():
            mine = [row for row in rows if row["form"] == form and row[fixed] == value]
            points = [
                (row[x], *(row[part][key] for key in ("q1_ms", "median_ms", "q3_ms")))
                for row in mine
            ]
            lines.append((short[form], colour, dash, sorted(set(points))))
        plots.quartile_lines(ax, lines, room=0.5)
        ax.set(xlabel=label, ylabel="ms")
    axes[0].set_title(
        f"At N = {sizes['state']} the fused scan is ahead from "
        f"{ahead_from(result, part):,} steps on"
    )
    axes[1].set_title(f"A larger state costs the products little (L = {sizes['length']})")
    return fig


def ahead_from(result: Mapping, part: str = "both") -> int:
    """From which length on the scan's upper quartile lies below the lower ones of all products."""
    rows = [row for row in result["rows"] if row["d_state"] == result["sizes"]["state"]]
    first = 0
    for length in sorted({row["length"] for row in rows}, reverse=True):
        here = {row["form"]: row[part] for row in rows if row["length"] == length}
        scan = here.pop("scan")
        if scan["q3_ms"] >= min(other["q1_ms"] for other in here.values()):
            break
        first = length
    return first


def orders(steps: Sequence[int], errors: Mapping[float, Sequence[float]]):
    """The error at the end against the number of steps, for each λ."""
    fig, ax = plots.figure(height=3.9, width=9)
    for lam, (colour, dash, name) in RULE.items():
        ax.plot(steps, errors[lam], dash, color=colour, markersize=4, label=name)
    ax.set(
        xscale="log",
        yscale="log",
        xlabel="steps for two seconds",
        ylabel="error at the end",
        title="Both ends of a step count, and the error falls with its square",
    )
    ax.set_xticks(steps, [f"{n:,}" for n in steps])
    ax.minorticks_off()
    ax.grid(axis="y", visible=True)
    ax.legend()
    return fig


def dial(turned: np.ndarray, faded: np.ndarray, beats: int):
    """A state after each of a few notes: one turns (complex, (T,)), one only fades (real, (T,))."""
    fig, axes = plots.figure(1, 2, height=3.9, width=10.5, width_ratios=[1, 1.5])
    ax = axes[0]
    circle = np.exp(1j * np.linspace(0, 2 * np.pi, 200))
    ax.plot(circle.real, circle.imag, color=plots.PALE)
    for k, place in enumerate(turned[:beats]):
        notes = [str(n) for n in range(len(turned)) if n % beats == k]
        ax.annotate(
            "",
            (place.real, place.imag),
            (0, 0),
            arrowprops=dict(arrowstyle="->", color=plots.STATE, lw=2.5),
        )
        ax.text(
            (1.5 if place.real > 0 else 1.3) * place.real,
            1.25 * place.imag,
            f"beat {k + 1}\nafter {', '.join(notes)}",
            ha="center",
            va="center",
            fontsize=9,
        )
    ax.set(xlim=(-1.7, 1.9), ylim=(-1.5, 1.5), aspect="equal", title="It turns: three places")
    ax.axis("off")
    ax = axes[1]
    for n, value in enumerate(faded):
        ax.plot([n, n], [0, value], color=plots.STATE, linewidth=2)
        ax.plot(n, value, "o", color=plots.STATE)
        ax.text(n, value + 0.06, f"beat {n % beats + 1}", ha="center", fontsize=9)
    ax.set(
        xlabel="notes so far",
        ylabel="state",
        ylim=(0, 1.25),
        title="It fades: every beat at another height",
    )
    return fig


def counting(lengths: Sequence[int], shares: Mapping[str, ArrayLike], trained: int, beats: int):
    """The share of right beats at the end of rhythms of these lengths, of each model a line a seed.

    `shares` are (lengths,) or (seeds, lengths); training saw at most `trained` steps.
    """
    fig, ax = plots.figure(height=3.8, width=9)
    ax.axvspan(min(lengths) / 1.2, trained, color=plots.PALE, zorder=0)
    ax.text(trained / 1.04, 1.06, "lengths of training", ha="right", fontsize=9, color=plots.GREY)
    ax.axhline(1 / beats, color=plots.GREY, linestyle=":")
    ax.text(max(lengths), 1 / beats - 0.1, "guessing", ha="right", fontsize=9, color=plots.GREY)
    for name, values in shares.items():
        colour, dash = STATE[name]
        for number, line in enumerate(np.atleast_2d(values)):
            label = name if number == 0 else None
            ax.plot(lengths, line, dash, color=colour, markersize=5, alpha=0.8, label=label)
    ax.set(
        xscale="log",
        xlabel="steps of the rhythm",
        ylabel="right beats",
        ylim=(0, 1.12),
        title=f"Counting to {beats}: a state that turns counts on, one that fades is soon guessing",
        xlim=(min(lengths) / 1.2, max(lengths) * 1.2),
    )
    ax.set_xticks(lengths, [f"{n:,}" for n in lengths])
    ax.minorticks_off()
    ax.legend(loc="center left", bbox_to_anchor=(0, 0.62))
    return fig
