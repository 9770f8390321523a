"""The larger drawings of notebooks 00 and 09: what a model reads, expects, remembers and plays.

Blue is what goes in, orange what is remembered, green what comes out.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from lib.music.notes import Music
from lib.show import plots

# the colour behind a word of a token; a white word says when
WORDS = {"Pitch": "#A8D8F5", "Velocity": "#F0C8DF", "Duration": "#E2E2E2"}
DROPPED = "#C9C9C9"


# ---- notebook 00 --------------------------------------------------------------------------


def boxes(tokens: Sequence[tuple[str, Sequence[str]]], title: str):
    """Tokens as (kind, lines of text) in boxes, from left to right and row after row."""
    fig, ax = plots.figure(height=2.7)
    x, row = 0.0, 0
    for kind, lines in tokens:
        width = 0.3 + 0.09 * max(map(len, lines))
        if x + width > 11:
            x, row = 0.0, row + 1
        ax.barh(
            -row,
            width,
            0.8,
            left=x,
            edgecolor=plots.GREY,
            linewidth=0.8,
            color=WORDS.get(kind, "white"),
        )
        ax.text(x + width / 2, -row, "\n".join(lines), ha="center", va="center", fontsize=9.5)
        x += width + 0.08
    ax.set(xlim=(0, 11), ylim=(-row - 0.5, 0.5), title=title)
    ax.axis("off")
    return fig


def next_key(keys: Sequence[float], played: int):
    """Probability of each of 128 keys, and the one that was really struck."""
    place = int((np.array(keys) > keys[played]).sum()) + 1
    fig, ax = plots.figure(height=2.9)
    ax.bar(range(128), keys, color=plots.OUTPUT, width=0.8)
    ax.bar([played], [keys[played]], color=plots.INPUT, width=0.8)
    ax.annotate(
        "what was played",
        (played, keys[played]),
        (played, 1.2 * max(keys)),
        ha="center",
        color=plots.INPUT,
        arrowprops=dict(arrowstyle="->", color=plots.INPUT),
    )
    ax.axhline(1 / 88, color=plots.GREY, linewidth=1, linestyle=":")
    ax.text(108.5, 1 / 88, "knows nothing", ha="right", va="bottom", color=plots.GREY, fontsize=9.5)
    ax.set_xticks(range(24, 109, 12), [f"C{octave}" for octave in range(1, 9)])
    ax.set(
        xlim=(20, 109),
        ylim=(0, 1.35 * max(keys)),
        ylabel="probability",
        xlabel="key",
        title=f"The key that came next had {keys[played]:.1%}: number {place} of 88 guesses",
    )
    return fig


def memory(tokens: Sequence[int], state: Sequence[int], cache: Sequence[int]):
    """Bytes kept between two tokens after so many tokens.

    They are those of a Mamba's state, measured, and of a Transformer's cache.
    """
    fig, ax = plots.figure(height=3.2)
    ax.plot(tokens, np.array(cache) / 2**20, "--", color=plots.GREY)
    ax.plot(tokens, np.array(state) / 2**20, color=plots.STATE, linewidth=3)
    ax.fill_between(tokens, np.array(state) / 2**20, color=plots.STATE, alpha=0.2, linewidth=0)
    ax.text(
        0.6 * tokens[-1],
        0.66 * cache[-1] / 2**20,
        "a Transformer of the same width\nkeeps something of every token",
        ha="right",
        color=plots.GREY,
    )
    ax.text(
        0.99 * tokens[-1],
        1.5 * state[-1] / 2**20,
        f"this model: {state[-1]:,} bytes",
        ha="right",
        va="bottom",
        color=plots.STATE,
        fontweight="bold",
    )
    ax.set(
        xlim=(0, tokens[-1]),
        ylim=(0, None),
        xlabel="tokens read",
        ylabel="MiB kept",
        title="What must be kept between two tokens: one grows with the piece, one does not",
    )
    ax.xaxis.set_major_formatter("{x:,.0f}")
    return fig


def notes_and_sound(music: Music, sound: np.ndarray, rate: int, seconds: int, title: str):
    """The first seconds of a piece as a piano roll; below it the rendered wave (samples,)."""
    fig, (above, below) = plots.figure(2, 1, height=4.4, sharex=True, height_ratios=[3, 2])
    plots.piano_roll(music, end=seconds, ax=above, colourbar=False, title=title)
    above.set_xlabel("")
    columns = 200 * seconds
    part = np.pad(sound, (0, seconds * rate))[: seconds * rate].reshape(columns, -1)
    below.fill_between(
        np.arange(columns) / 200, part.min(1), part.max(1), color=plots.OUTPUT, linewidth=0
    )
    below.set(xlabel="seconds", ylabel="sound wave", ylim=(-1, 1))
    return fig


# ---- notebook 09 --------------------------------------------------------------------------


def likeliest(names: Sequence[str], p: Sequence[float], title: str):
    """The likeliest tokens and their probabilities."""
    fig, ax = plots.figure(height=3.2)
    ax.bar(names, p, color=plots.OUTPUT)
    ax.tick_params(axis="x", rotation=90)
    ax.set(ylabel="probability", xlim=(-0.7, len(names) - 0.3), title=title)
    return fig


def heats(sorted_p: Mapping[str, np.ndarray]):
    """Sorted probabilities at several temperatures, by a label for each."""
    fig, ax = plots.figure(height=3)
    for (label, p), colour in zip(
        sorted_p.items(), (plots.OTHER[2], plots.INK, plots.OTHER[0]), strict=True
    ):
        ax.step(range(1, len(p) + 1), p, where="mid", color=colour, label=label)
    ax.set(
        yscale="log",
        xlabel="rank of the token",
        ylabel="probability",
        xlim=(0.5, len(p)),
        ylim=(1e-4, 1),
        title="Heat lifts the tail, cold presses it down",
    )
    ax.legend(title="temperature")
    return fig


def filters(p: np.ndarray, kept: Mapping[str, int]):
    """Sorted probabilities, and beside each other how many of them each filter keeps."""
    reach = 15 + max(kept.values())
    fig, axes = plots.figure(1, len(kept), height=2.9, sharey=True)
    for ax, (name, n) in zip(axes, kept.items(), strict=True):
        ax.fill_between(range(1, reach + 1), p[:reach], step="mid", color=DROPPED, linewidth=0)
        ax.fill_between(range(1, n + 1), p[:n], step="mid", color=plots.OUTPUT, linewidth=0)
        ax.set(title=f"{name} keeps {n}", xlabel="rank of the token", ylim=(0, None))
    axes[0].set(ylabel="probability")
    return fig


def drawn_from(model: np.ndarray, kept: np.ndarray, shown: int, title: str):
    """Sorted probabilities of the model, and those that are drawn from.

    Of the latter some were dropped and the rest raised.
    """
    fig, ax = plots.figure(height=2.9)
    places = np.arange(1, shown + 1)
    ax.bar(places, kept[:shown], width=1, color=plots.OUTPUT, label="drawn from")
    ax.step(
        places, model[:shown], where="mid", color=plots.INK, linewidth=1.2, label="the model's own"
    )
    ax.set(
        xlabel="rank of the token",
        ylabel="probability",
        yscale="log",
        ylim=(1e-4, 1),
        xlim=(0.5, shown + 0.5),
        title=title,
    )
    ax.legend(loc="upper right")
    return fig


def kept_along(counts: Mapping[str, Sequence[int]], title: str, shown: int = 60):
    """Tokens that each filter keeps at a prompt's first `shown` places; more would be a comb."""
    fig, ax = plots.figure(height=3)
    for (name, n), colour in zip(
        counts.items(), (plots.GREY, plots.OTHER[2], plots.OTHER[1]), strict=True
    ):
        ax.step(range(len(n)), n, where="mid", color=colour, label=name, linewidth=1.3)
    ax.set(
        yscale="log",
        xlabel="the first places of the prompt (tokens)",
        ylabel="tokens kept",
        xlim=(0, min(len(n), shown)),
        ylim=(0.8, 6 * max(map(max, counts.values()))),
        title=title,
    )
    ax.legend(ncols=3, loc="upper right")
    return fig


def rolls(pieces: Mapping[str, Music], start: float, split: float, end: float):
    """A piano roll for each piece by its title, all with the same axes.

    The prompt ends at `split` seconds.
    """
    fig, axes = plots.figure(len(pieces), 1, height=7.4, sharex=True, sharey=True)
    for ax, (title, music) in zip(axes, pieces.items(), strict=True):
        plots.piano_roll(music, start=start, end=end, prompt_seconds=split, ax=ax, colourbar=False)
        ax.set_title(title)
        ax.label_outer()
    pitches = np.concatenate([music.notes["pitch"] for music in pieces.values()]).astype(int)
    axes[0].set_yticks(range(24, 109, 12), [f"C{octave}" for octave in range(1, 9)])
    axes[0].set_ylim(pitches.min() - 3, pitches.max() + 0.2 * np.ptp(pitches))
    return fig


def endless(
    milliseconds: Sequence[float],
    count: int,
    tokens: Sequence[int],
    kept: Mapping[str, Sequence[float]],
):
    """The time that a token takes, and the memory that is kept.

    Left, medians of the milliseconds a token takes over `count` tokens; right, MiB kept, by what
    keeps them.
    """
    fig, (left, right) = plots.figure(1, 2, height=3.4)
    left.plot(
        np.linspace(0, count, len(milliseconds) + 1)[1:], milliseconds, "o-", color=plots.OUTPUT
    )
    early, late = np.median(milliseconds[:5]), np.median(milliseconds[-5:])
    left.set(
        ylim=(0, 2 * max(milliseconds)),
        xlabel="token",
        ylabel="milliseconds for a token",
        title=f"Time: {early:.2f} ms at first, {late:.2f} ms at last",
    )
    looks = (
        dict(color=plots.STATE, linewidth=3),
        dict(linestyle="--", color=plots.GREY),
        dict(color=plots.INPUT),
    )
    for (name, mib), look in zip(kept.items(), looks, strict=False):
        right.plot(tokens, mib, label=name, **look)
    right.set(
        xlabel="token", ylabel="MiB", yscale="log", title="Memory: nothing grows but the file"
    )
    right.legend(loc="center right")
    for ax in (left, right):
        ax.locator_params(axis="x", nbins=5)
        ax.xaxis.set_major_formatter("{x:,.0f}")
    return fig


def tilted(by_key: Mapping[str, np.ndarray]):
    """Probability of each of 128 keys, as the model has it and tilted down and up."""
    fig, ax = plots.figure(height=3)
    for (label, p), colour in zip(
        by_key.items(), (plots.OTHER[2], plots.GREY, plots.OTHER[0]), strict=True
    ):
        ax.step(range(21, 109), p[21:109], where="mid", color=colour, label=label)
    ax.set(
        xlabel="key",
        ylabel="probability",
        yscale="log",
        ylim=(1e-6, 2),
        xlim=(21, 108),
        title="The same odds, tilted towards low and high keys",
    )
    ax.legend()
    return fig


def wishes(levels: Sequence[int], moved: Mapping[str, np.ndarray], units: Mapping[str, str]):
    """Each attribute (levels, seeds) against its control: a thin line a seed, the mean thick."""
    fig, axes = plots.figure(1, len(moved), height=3.2)
    for ax, (name, values) in zip(axes, moved.items(), strict=True):
        ax.plot(levels, values, color=DROPPED, linewidth=1)
        ax.plot(levels, values.mean(1), color=plots.OUTPUT, linewidth=3, marker="o")
        ax.set(
            xlabel=name,
            ylabel=units[name],
            xticks=levels,
            title="mean " + " → ".join(f"{mean:.3g}" for mean in values.mean(1)),
        )
    return fig


def distances(
    real: np.ndarray,
    across: np.ndarray,
    grid: np.ndarray,
    densities: Sequence[np.ndarray],
    title: str,
):
    """Two smoothed collections of distances on a grid, and what they have in common."""
    fig, ax = plots.figure(height=2.8)
    for density, colour, label in zip(
        densities,
        (plots.INPUT, plots.OUTPUT),
        (
            f"between real pieces ({len(real):,} pairs)",
            f"from real to generated ({len(across):,} pairs)",
        ),
        strict=True,
    ):
        ax.plot(grid, density, color=colour, label=label)
    ax.fill_between(grid, np.minimum(*densities), color=plots.PALE, label="in common")
    ax.set(
        xlabel="distance", ylabel="density", xlim=(grid[0], grid[-1]), ylim=(0, None), title=title
    )
    ax.legend()
    return fig


SHARED = {  # how the groups of `lib.lab.judge.anchors.passages` are called in a drawing
    "same title, other hands": ("same title, other hands", plots.OTHER[0]),
    "model": ("generated", plots.OUTPUT),
    "other composers": ("real, other composers", plots.INPUT),
    "same composer": ("real, same composer", plots.INPUT),
    "other composers, as few notes": ("others, as few notes", plots.INPUT),
    "bigram": ("bigram", plots.GREY),
    "noise": ("shuffled tokens", plots.GREY),
}


def shared(found: Mapping, title: str, width: float = 9, height: float = 3.4):
    """What `lib.lab.judge.anchors.passages` found: a dot for each piece's best passage, in bits."""
    fig, ax = plots.figure(width=width, height=height)
    groups = [(SHARED[name], found["groups"][name]) for name in SHARED if name in found["groups"]]
    spread = np.random.default_rng(0)
    for row, ((_, colour), group) in enumerate(reversed(groups)):
        bits = np.maximum(group["bits"], 5)
        scattered = row + spread.uniform(-0.26, 0.26, len(bits))
        ax.plot(bits, scattered, ".", color=colour, markersize=3.5)
        ax.plot(np.median(bits), row, "|", color=plots.INK, markersize=18, markeredgewidth=2)
        ax.text(5500, row, f"{group['above']:.0%}", ha="right", va="center", color=colour)
    threshold = found["threshold_bits"]
    ax.axvline(threshold, color=plots.INK, linestyle=":")
    ax.text(threshold, len(groups) - 0.45, " beyond chance", va="center", fontsize=10)
    ax.set_yticks(range(len(groups)), [name for (name, _), _ in reversed(groups)])
    ax.set(xscale="log", xlim=(4, 6000), ylim=(-0.6, len(groups) - 0.2), title=title)
    ax.set_xlabel("bits of the best passage shared with a training piece (left edge: none)")
    ax.xaxis.set_major_formatter("{x:g}")
    ax.tick_params(axis="y", length=0)
    return fig


def forgetting(since: np.ndarray, curves: Mapping[str, np.ndarray], title: str):
    """Disagreement against the seconds since the readers' ways joined.

    There is a thin line for each piece; medians are thick.
    """
    fig, ax = plots.figure(height=3.2)
    for (name, rows), colour in zip(curves.items(), (plots.STATE, plots.OTHER[1]), strict=True):
        ax.plot(since, rows.T, color=colour, linewidth=0.6, alpha=0.35)
        ax.plot(since, np.nanmedian(rows, 0), color=colour, linewidth=2.5, label=name)
    ax.axhline(0.01, color=plots.GREY, linewidth=1, linestyle=":")
    ax.set(
        xlabel="seconds of the same music since",
        ylabel="disagreement",
        yscale="log",
        ylim=(1e-4, 1),
        xlim=(0, since[-1]),
        title=title,
    )
    ax.legend(loc="upper right")
    return fig
