"""The larger drawings of notebooks 03, 04 and 07: what a state remembers.

Blue is what goes in, orange what is remembered, green what comes out. Methods and models, which are
none of these, have colours of their own, the same in every figure.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from lib.show import plots

METHOD = {"euler": plots.OTHER[0], "bilinear": plots.OTHER[1], "zoh": plots.OTHER[2]}
MODEL = {
    "fixed": plots.OTHER[0],
    "S4D": plots.OTHER[0],
    "gru": plots.OTHER[1],
    "GRU": plots.OTHER[1],
    "selective": plots.OTHER[2],
    "Mamba": plots.OTHER[2],
}
KEYS = "CDEFGABC"  # the eight pitches of selective copying, white keys from middle C


# ---- notebook 03 --------------------------------------------------------------------------


def spring(t, x, states, y):
    """The spring drawn, what goes through it over the seconds t, and the spiral.

    The force x is (L,), the states (L, 2), and the output y (L,).
    """
    fig, _ = plots.figure(width=12, height=4.4)
    fig.clear()
    axes = fig.subplot_mosaic(
        [["sketch", "x", "plane"], ["sketch", "h", "plane"], ["sketch", "y", "plane"]],
        width_ratios=[0.7, 2, 1.2],
    )
    _sketch(axes["sketch"])
    rows = (
        ("x", [(x, "-", "force")], plots.INPUT, "goes in"),
        (
            "h",
            [(states[:, 0], "-", "position"), (states[:, 1] / 6, ":", "velocity / 6")],
            plots.STATE,
            "is remembered",
        ),
        ("y", [(y, "-", "position")], plots.OUTPUT, "comes out"),
    )
    for name, lines, colour, words in rows:
        for values, style, label in lines:
            axes[name].plot(t, values, style, color=colour, label=label)
        axes[name].legend(loc="upper right", ncols=2, fontsize=10)
        axes[name].set_ylabel(
            name, color=colour, rotation=0, labelpad=12, fontsize=14, fontweight="bold"
        )
        axes[name].text(
            0.01, 0.97, words, transform=axes[name].transAxes, va="top", fontsize=10, color=colour
        )
        low, high = axes[name].get_ylim()
        axes[name].set_ylim(low, high + 0.45 * (high - low))
        axes[name].set_xticks(range(7), range(7) if name == "y" else [""] * 7)
    axes["x"].set_title("Two pushes ring on")
    axes["y"].set_xlabel("seconds")
    axes["plane"].plot(*states.T, color=plots.STATE, linewidth=1.2)
    axes["plane"].set(xlabel="position", ylabel="velocity", title="The state spirals in")
    return fig


def _sketch(ax) -> None:
    coil = np.linspace(0, 1, 400)
    ax.plot(
        0.25 * np.sin(18 * np.pi * coil) * (np.abs(coil - 0.5) < 0.45),
        3 - 1.6 * coil,
        color=plots.GREY,
    )
    ax.plot([-0.7, 0.7], [3, 3], color=plots.INK, linewidth=4)
    ax.plot(0, 1.1, "s", markersize=38, color=plots.STATE)
    ax.text(0, 1.1, "h", color="white", ha="center", va="center", fontsize=15, fontweight="bold")
    for at, word, colour in ((-0.75, "force x", plots.INPUT), (0.75, "position y", plots.OUTPUT)):
        ax.annotate(
            word,
            (at, 1.7),
            (at, 0.35),
            color=colour,
            ha="center",
            va="top",
            arrowprops=dict(arrowstyle="<-", color=colour, linewidth=3),
        )
    ax.set(xlim=(-1.5, 1.5), ylim=(0, 3.1))
    ax.axis("off")


def stepped(t, y, runs: Mapping[float, Mapping[str, np.ndarray]]):
    """The spring y (L,) over the seconds t, and what the methods make of it.

    There is a panel for each step Δ in seconds.
    """
    fig, axes = plots.figure(1, len(runs), height=3.2, width=12, sharey=True)
    for ax, (delta, found) in zip(axes, runs.items()):
        ax.plot(t, y, color=plots.PALE, linewidth=6, label="the spring")
        for method, values in found.items():
            clock = delta * np.arange(1, len(values) + 1)
            ax.plot(
                clock, values, ".-", markersize=3, linewidth=1, color=METHOD[method], label=method
            )
        ax.set(ylim=(-1.6, 1.6), xlabel="seconds", title=f"Δ = {1000 * delta:.0f} ms")
    fig.suptitle(
        "With larger steps Euler's spring gains energy from nowhere",
        x=0.01,
        ha="left",
        fontweight="bold",
    )
    axes[0].legend(fontsize=10, loc="lower left", ncols=2, borderaxespad=0)
    return fig


def three_pushes(kernel, pushes: Mapping[int, float], delta: float):
    """A kernel (L,), one copy of it for each push (step: force), and their sum."""
    at = delta * np.arange(len(kernel))
    fig, (one, three) = plots.figure(1, 2, height=3.4, sharey=True)
    one.vlines(at, 0, kernel, color=plots.STATE, linewidth=1.4)
    one.set(xlabel="seconds since the push", title="The kernel: what one push leaves")
    one.locator_params(axis="y", steps=[1, 2, 5, 10])
    total = np.zeros(len(kernel))
    for step, force in pushes.items():
        moved = np.pad(force * np.asarray(kernel), (step, 0))[: len(kernel)]
        total += moved
        three.plot(at, moved, color=plots.STATE, linewidth=1)
        three.vlines(at[step], 0, force * max(kernel), color=plots.INPUT, linewidth=3)
    three.plot(at, total, color=plots.OUTPUT)
    three.set(xlabel="seconds", title="Three pushes: three kernels, added")
    return fig


def legendre(A, shapes: Mapping[int, np.ndarray]):
    """HiPPO's matrix (N, N), and the polynomials (L,) over the past that the states stand for.

    The zeros of the matrix are left white.
    """
    fig, (matrix, curves) = plots.figure(1, 2, height=3.4, width=10.5, width_ratios=[1, 1.5])
    below = np.ma.masked_where(np.triu(np.ones(A.shape), 1) > 0, A)
    shown = matrix.imshow(below, cmap="cividis")
    fig.colorbar(shown, ax=matrix, ticks=[-25, -20, -15, -10, -5, -1])
    places = range(0, len(A), 5)
    matrix.set(
        xlabel="reads number k",
        ylabel="changes number n",
        title="A: each from those before",
        xticks=places,
        yticks=places,
    )
    for (n, shape), colour in zip(shapes.items(), (plots.INK, *plots.OTHER)):
        curves.plot(np.linspace(0, 1, len(shape)), shape, color=colour, label=f"n = {n}")
    curves.set(
        title="What number n measures",
        xticks=[0, 0.5, 1],
        xticklabels=["the beginning", "half-way", "now"],
    )
    curves.legend(fontsize=10, ncols=2, loc="lower center")
    return fig


def redrawn(seconds, melody, drawn: Mapping[int, np.ndarray]):
    """A melody (L,), and how it is redrawn from so many numbers."""
    fig, axes = plots.figure(
        len(drawn), 1, height=max(3, 2 * len(drawn)), sharex=True, sharey=True, squeeze=False
    )
    axes = axes[:, 0]
    for ax, (n, curve) in zip(axes, drawn.items()):
        error = float(np.sqrt(np.mean((np.asarray(curve) - np.asarray(melody)) ** 2)))
        ax.step(seconds, melody, where="post", color=plots.INPUT, linewidth=1, label="went in")
        ax.plot(seconds, curve, color=plots.OUTPUT, label="redrawn")
        ax.set(
            title=f"{n} numbers: off by {error:.1f} semitones (root mean square)", ylabel="MIDI key"
        )
    axes[0].legend(
        ncols=2, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.1, fontsize=10
    )
    axes[-1].set(xlabel="seconds", xticks=np.arange(0, seconds[-1] + 1, 5))
    return fig


def followers(clock, key, sung: Mapping[str, np.ndarray], behind: int):
    """The leader's keys (L,) over seconds, and what the models sing `behind` steps later.

    The models stand below each other.
    """
    fig, axes = plots.figure(len(sung), 1, height=2.2 * len(sung) + 0.6, sharex=True, sharey=True)
    due = key[:-behind]
    for ax, (name, voice) in zip(axes, sung.items()):
        ax.step(clock, key, where="post", color=plots.INPUT, linewidth=1, label="leader")
        ax.step(
            clock[behind:], due, where="post", color=plots.PALE, linewidth=7, label="what is due"
        )
        ax.step(clock[behind:], voice, where="post", color=plots.OUTPUT, label="follower")
        right = np.mean(np.abs(np.asarray(voice) - np.asarray(due)) < 0.5)
        ax.set(title=f"{name}: {right:.0%} of these steps right", ylabel="MIDI key", ylim=(58, 92))
    axes[0].legend(ncols=3, fontsize=10, loc="upper right")
    axes[-1].set_xlabel("seconds")
    return fig


def held(clock, melody, marks, answers: Mapping[str, np.ndarray]):
    """A melody (L,), its marked steps (L,), and below each other what the models hold."""
    fig, axes = plots.figure(
        len(answers), 1, height=2.2 * len(answers) + 0.6, sharex=True, sharey=True
    )
    # the last marked step up to each step, -1 where there is none
    marked = np.maximum.accumulate(np.where(marks, np.arange(len(marks)), -1))
    for ax, (name, answer) in zip(axes, answers.items()):
        ax.step(clock, melody, where="post", color=plots.PALE, linewidth=2, label="melody")
        ax.plot(clock[marks], melody[marks], "o", color=plots.INPUT, markersize=6, label="marked")
        ax.step(
            clock,
            answer,
            where="post",
            color=plots.OUTPUT,
            linewidth=1.6,
            label="what the layer holds",
        )
        since = marked >= 0
        right = np.mean(np.abs(np.asarray(answer) - np.asarray(melody)[marked])[since] < 0.5)
        ax.set(title=f"{name}: {right:.0%} of these steps right", ylabel="MIDI key", ylim=(56, 96))
    axes[0].legend(ncols=3, fontsize=10, loc="upper right")
    axes[-1].set_xlabel("seconds")
    return fig


def learned_kernels(before, after, reach: Mapping[str, np.ndarray], peak: int):
    """Kernels (L, 4) before and after training, and how long the states remember, in steps."""
    fig, (first, second, third) = plots.figure(1, 3, height=3.3, width=12)
    for ax, kernels, colour, title in (
        (first, before, plots.GREY, "Four kernels before training"),
        (second, after, plots.STATE, f"After: a peak {peak} steps ago"),
    ):
        ax.plot(kernels / np.abs(kernels).max(), color=colour, linewidth=1.2)
        ax.set(xlabel="steps ago", ylabel="weight, scaled", title=title, ylim=(-1.08, 1.08))
    edges = np.geomspace(4, 1000, 19)
    for (name, values), colour in zip(reach.items(), (plots.GREY, plots.STATE)):
        counts, _ = np.histogram(values, edges)
        third.stairs(counts / len(values), edges, color=colour, linewidth=2, label=name)
    third.set(
        xscale="log",
        xlabel="time constant, steps",
        ylabel="share of the states",
        title="How long states remember",
        xticks=[10, 100, 1000],
        xticklabels=["10", "100", "1,000"],
    )
    third.locator_params(axis="y", steps=[1, 2, 5, 10])
    third.legend(loc="upper left", fontsize=10)
    for ax in (first, second, third):
        ax.axvline(peak, color=plots.INK, linestyle=":", linewidth=1)
    return fig


# ---- notebook 04 --------------------------------------------------------------------------


def sequences(panels: Sequence[tuple], notes: int, length: int):
    """Sequences as small piano rolls, with `length` steps before the cues.

    Each of `panels` is (tokens (L,), answers (keep,), title).
    """
    fig, axes = plots.figure(len(panels), 1, height=2.25 * len(panels) + 0.3, sharex=True)
    for ax, (tokens, answers, title) in zip(axes, panels):
        heard = [(t, token) for t, token in enumerate(tokens[:length]) if token < notes]
        due = [(length + k, pitch) for k, pitch in enumerate(answers)]
        for places, colour, word in (
            (heard, plots.INPUT, "heard"),
            (due, plots.OUTPUT, "to be answered"),
        ):
            at, pitch = np.array(places).T
            ax.bar(at, 0.9, bottom=pitch - 0.45, width=0.95, color=colour, label=word)
        rests = [t for t, token in enumerate(tokens[:length]) if token >= notes]
        ax.plot(rests, [-1] * len(rests), ".", color=plots.GREY, markersize=3, label="a rest")
        ax.axvspan(
            length - 0.5, length + len(due) - 0.5, color=plots.OUTPUT, alpha=0.08, linewidth=0
        )
        ax.set(title=title, xlim=(-1, length + len(due)), ylim=(-1.6, notes - 0.3))
        ax.set_yticks(range(notes), KEYS[:notes], fontsize=11)
        ax.grid(axis="y", visible=True)
        ax.tick_params(axis="y", length=0)
    axes[0].legend(
        ncols=3, fontsize=10, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.1
    )
    axes[-1].set_xlabel("position")
    return fig


def places(filled, notes, length: int, *, title: str, label: str, ticks: Sequence[float]):
    """What is in each place of a memory (places, L) at each position.

    Notes are dotted; at the green line the cues begin.
    """
    fig, ax = plots.figure(height=2.9)
    shown = ax.imshow(filled, aspect="auto", cmap="YlOrBr", vmin=ticks[0], vmax=ticks[-1])
    for t in notes:
        ax.axvline(t, color=plots.INPUT, linewidth=1.2, linestyle=":")
    ax.axvline(length - 0.5, color=plots.OUTPUT, linewidth=2.5)
    ax.text(length - 0.2, -0.62, "cues", color=plots.OUTPUT, fontsize=10, va="bottom")
    ax.set(
        xlabel="position",
        ylabel="place",
        yticks=range(len(filled)),
        yticklabels=range(1, len(filled) + 1),
        title=title,
    )
    fig.colorbar(shown, ax=ax, pad=0.01, aspect=14, label=label, ticks=ticks)
    return fig


def turns(
    read: Sequence[str], delta: np.ndarray, held: np.ndarray, names: Sequence[str], title: str
):
    """What is read at each position, and below it what each place holds.

    `delta` and `held` are (places, L), 0 for nothing. A thick frame is a place whose Δ is large, so
    that it takes what is read; where Δ is 0 it keeps what it has.
    """
    from matplotlib.patches import Rectangle

    count, length = held.shape
    fig, ax = plots.figure(height=0.46 * (count + 1) + 0.9)
    for t, word in enumerate(read):
        ax.text(t, 0, word, ha="center", va="center", color=plots.INPUT, fontweight="bold")
    for (place, t), number in np.ndenumerate(held):
        opened = delta[place, t] > 0
        full = number > 0.5
        ax.add_patch(
            Rectangle(
                (t - 0.46, place + 0.54),
                0.92,
                0.92,
                facecolor=plots.STATE if full else "white",
                alpha=0.9 if opened else 0.35,
                linewidth=0,
            )
        )
        ax.add_patch(
            Rectangle(
                (t - 0.46, place + 0.54),
                0.92,
                0.92,
                fill=False,
                zorder=3 if opened else 2,
                edgecolor=plots.INPUT if opened else plots.PALE,
                linewidth=2.4 if opened else 0.8,
            )
        )
        if full:
            ax.text(
                t, place + 1, names[round(number)], ha="center", va="center", fontsize=10, zorder=4
            )
    ax.set(
        xlim=(-0.6, length - 0.4),
        ylim=(count + 0.6, -0.6),
        xticks=range(length),
        xlabel="position",
        title=title,
    )
    ax.set_yticks(range(count + 1), ["read", *(f"place {place}" for place in range(1, count + 1))])
    ax.spines[["left", "bottom"]].set_visible(False)
    ax.tick_params(length=0)
    return fig


def learning(panels: Mapping[str, Mapping[str, Sequence]], guess: float):
    """Notes right against the step, a panel each.

    A panel has for each model its curves of (step, notes, answers), one a seed.
    """
    fig, axes = plots.figure(1, len(panels), width=12, height=3.5, sharey=True)
    for ax, (title, models) in zip(axes, panels.items()):
        for model, curves in models.items():
            for number, curve in enumerate(curves):
                curve = np.array(curve)
                ax.plot(
                    curve[:, 0],
                    100 * curve[:, 1],
                    color=MODEL[model],
                    linewidth=1.4,
                    label=None if number else model,
                )
        ax.axhline(100 * guess, color=plots.INK, linestyle=":", linewidth=1)
        ax.set(xlabel="training step", ylim=(0, 103), title=title)
        ax.xaxis.set_major_formatter("{x:,.0f}")
        # the legend stands above the line of a guess
        ax.legend(loc="lower right", bbox_to_anchor=(1, 0.14), fontsize=10)
    axes[0].set_ylabel("% of notes right")
    return fig


def other_lengths(
    lengths,
    shares: Mapping[str, Sequence],
    trained,
    looks: Mapping[str, tuple[str, str]],
    title: str,
):
    """Notes right (a row a seed) at other lengths than that of training, which is marked."""
    fig, ax = plots.figure(height=3.6)
    for name, rows in shares.items():
        rows, (colour, style) = 100 * np.array(rows), looks[name]
        ax.plot(lengths, rows.mean(0), style, color=colour, marker="o", markersize=5, label=name)
        ax.fill_between(lengths, rows.min(0), rows.max(0), color=colour, alpha=0.18, linewidth=0)
    ax.axvline(trained, color=plots.INK, linestyle=":", linewidth=1)
    ax.text(trained * 1.02, 4, "trained at this length", color=plots.INK, fontsize=10)
    ax.set(
        xscale="log",
        xlabel="positions before the cues",
        ylabel="% of notes right",
        ylim=(0, 103),
        title=title,
    )
    ax.set_xticks(lengths, lengths)
    ax.minorticks_off()
    ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=10)
    return fig


def opening(deltas: Sequence[np.ndarray], notes):
    """Δ (L, D) of each block over the positions; notes are triangles.

    The channels are in the order of how much they move.
    """
    fig, axes = plots.figure(len(deltas), 1, height=2.6 * len(deltas), sharex=True)
    for number, (ax, delta) in enumerate(zip(axes, deltas), 1):
        order = np.argsort(-np.log10(delta).std(0))
        shown = ax.imshow(
            np.log10(delta[:, order]).T, aspect="auto", cmap="YlOrBr", vmin=-3, vmax=0.5
        )
        for t in notes:
            ax.plot(t, -3.5, "v", color=plots.INPUT, markersize=8, clip_on=False)
        ax.set_title(f"Block {number}: dark where a channel lets the position in", pad=20)
        ax.set(
            ylabel="channel", yticks=[0, delta.shape[1] - 1], yticklabels=["moves most", "least"]
        )
    axes[-1].set_xlabel("position")
    bar = fig.colorbar(shown, ax=axes, ticks=[-3, -2, -1, 0])
    bar.set_ticklabels(["0.001", "0.01", "0.1", "1"])
    bar.set_label("Δ")
    return fig


def read_and_written(matrices: Mapping[str, np.ndarray], notes, length: int):
    """What is read at t of what was written at s, (L, L) each, with a scale.

    Notes are triangles.
    """
    fig, axes = plots.figure(1, len(matrices), height=4.9, width=11.5)
    for ax, (title, m) in zip(axes, matrices.items()):
        m = np.ma.masked_where(np.triu(np.ones(m.shape), 1) > 0, m / np.abs(m).max())
        shown = ax.imshow(m, cmap="RdBu", vmin=-1, vmax=1)
        for t in notes:
            ax.plot(t, -2.4, "v", color=plots.INPUT, markersize=7, clip_on=False)
        ax.axhline(length - 0.5, color=plots.OUTPUT, linewidth=1)
        ax.text(len(m) + 0.5, length - 0.5, "cues", color=plots.OUTPUT, va="top", fontsize=10)
        ax.set(
            xlabel="written at position s",
            ylabel="read at position t",
            xticks=range(0, len(m), 10),
            yticks=range(0, len(m), 10),
        )
        ax.set_title(title, pad=18)
    fig.colorbar(shown, ax=axes, shrink=0.8, label="weight, largest = 1")
    return fig


# ---- notebook 07 --------------------------------------------------------------------------


def by_layer_and_kind(ratios: Mapping[str, np.ndarray], kinds: Sequence[str]):
    """A grid a name: ratios (pieces, layers, kinds) as their mean.

    A mean is bold where all pieces lie on one side of 1.
    """
    fig, axes = plots.figure(1, len(ratios), height=3.6, width=12, sharey=True)
    for ax, (name, ratio) in zip(axes, ratios.items()):
        mean = ratio.mean(0)
        agreed = (ratio > 1).all(0) | (ratio < 1).all(0)
        ax.imshow(mean, cmap="PuOr_r", vmin=0.5, vmax=1.5, aspect="auto")
        for (row, column), value in np.ndenumerate(mean):
            bold = agreed[row, column]
            ax.text(
                column,
                row,
                f"{value:.2f}",
                ha="center",
                va="center",
                fontsize=10,
                fontweight="bold" if bold else "normal",
                color=plots.INK if bold else plots.GREY,
            )
        ax.set(
            xticks=range(len(kinds)),
            yticks=range(len(mean)),
            title=f"{name}: {agreed.sum()} of {agreed.size} agree in {len(ratio)} pieces",
        )
        ax.set_xticklabels(kinds, rotation=30, ha="right")
        ax.grid(visible=False)
    axes[0].set_ylabel("layer")
    return fig
