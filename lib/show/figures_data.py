"""The larger drawings of notebooks 01 and 02: what MAESTRO holds, and what tokens keep of it.

Blue is what goes in, orange what is remembered, green what comes out.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from lib.music.notes import Music
from lib.show import plots

# the colour of each grid, by its milliseconds
GRID = {62.5: plots.OTHER[0], 31.25: plots.OTHER[1], 16: plots.OTHER[2], 10: plots.INK}
LETTERS = "C C♯ D E♭ E F F♯ G A♭ A B♭ B".split()


# ---- notebook 01 --------------------------------------------------------------------------


def hours(names: Sequence[str], sizes: Sequence[float], title: str):
    """Hours of music by each composer, from the fewest to the most."""
    fig, ax = plots.figure(height=4.2, width=9)
    ax.barh(names, sizes, color=plots.INPUT)
    ax.set(xlabel="hours", title=title)
    ax.tick_params(axis="y", length=0)
    return fig


def pedal_depth(when: np.ndarray, depth: np.ndarray, down: np.ndarray, seconds: float, title: str):
    """Depth of the pedal, 0 to 127, against the seconds.

    It is shaded where the pedal counts as down, spans (n, 2).
    """
    fig, ax = plots.figure(height=2.8)
    ax.step(when, depth, where="post", color=plots.STATE)
    ax.axhline(64, color=plots.INK, linewidth=1, linestyle="--")
    for begin, end in down:
        ax.axvspan(begin, end, color=plots.STATE, alpha=0.15, linewidth=0)
    ax.set(
        xlim=(0, seconds),
        ylim=(-4, 131),
        yticks=[0, 64, 127],
        xlabel="seconds",
        ylabel="pedal depth",
        title=title,
    )
    return fig


def waits(onsets: np.ndarray, gaps_ms: np.ndarray, seconds: float):
    """Each gap to the next onset against the second it begins in; a dashed line at 62.5 ms."""
    fig, ax = plots.figure(height=3.2)
    shown = np.maximum(gaps_ms, 1)
    ax.vlines(onsets, 1, shown, color=plots.GREY, linewidth=0.8)
    ax.plot(onsets, shown, "o", color=plots.INPUT, markersize=5)
    ax.axhline(62.5, color=plots.INK, linewidth=1, linestyle="--")
    ax.text(2.6, 68, "62.5 ms", va="bottom")
    ax.set(
        yscale="log",
        xlim=(0, seconds),
        ylim=(0.9, 2000),
        xlabel="seconds",
        ylabel="gap, milliseconds",
        title=f"From chord to pause: half of these gaps are under {np.median(gaps_ms):.0f} ms",
    )
    ax.yaxis.set_major_formatter("{x:,.0f}")
    return fig


def velocity_windows(time, low, middle, high, marked: tuple[float, float], seconds: float):
    """Median velocity through a performance, and around it a band of eight notes in ten.

    The seconds in `marked` are shaded.
    """
    fig, ax = plots.figure(height=3)
    ax.fill_between(
        time, low, high, color=plots.INPUT, alpha=0.2, linewidth=0, label="8 notes in 10"
    )
    ax.plot(time, middle, color=plots.INPUT, label="median")
    ax.axvspan(*marked, color=plots.GREY, alpha=0.4, linewidth=0)
    ax.text(marked[1] + 2.5, 5, "our ten seconds")
    ax.legend(loc="upper left", ncols=2)
    ax.set(
        xlim=(0, seconds),
        ylim=(0, 127),
        xlabel="seconds",
        ylabel="velocity",
        title="In one performance the usual velocity moves "
        f"from {middle.min():.0f} to {middle.max():.0f}",
    )
    return fig


def gap_sizes(gaps: np.ndarray, title: str):
    """How gaps in seconds are spread, in classes of 5 ms.

    There are many within chords, then a dip, and a hill between events.
    """
    fig, ax = plots.figure(height=3.6)
    edges = np.arange(0, 301, 5)  # finer classes would show the ticks of the files
    share = 100 * np.histogram(1000 * gaps, edges)[0] / len(gaps)
    ax.stairs(share, edges, fill=True, color=plots.INPUT)
    ax.axvspan(0, 30, color=plots.PALE, linewidth=0, zorder=0)
    ax.text(31, 0.9 * share.max(), "← one chord", color=plots.GREY)
    ax.axvline(62.5, color=plots.INK, linewidth=1, linestyle="--")
    ax.text(64, 0.6 * share.max(), "62.5 ms")
    ax.set(xlim=(0, 300), xlabel="gap, milliseconds", ylabel="% of gaps in each 5 ms", title=title)
    ax.locator_params(axis="y", steps=[1, 2, 5, 10])
    return fig


def lengths(seconds: Mapping[str, np.ndarray], title: str):
    """Share of notes up to each length, by what it is the length of."""
    fig, ax = plots.figure(height=3.4)
    share = np.linspace(0, 1, 801)
    for (name, values), colour in zip(seconds.items(), (plots.INPUT, plots.OUTPUT), strict=True):
        ax.plot(
            np.maximum(1000 * np.quantile(values, share), 1),
            share,
            color=colour,
            label=f"{name}, median {1000 * np.median(values):.0f} ms",
        )
    ax.set(
        xscale="log",
        xlim=(10, 10_000),
        ylim=(0, 1),
        yticks=[0, 0.5, 1],
        xlabel="length of a note, milliseconds",
        ylabel="notes up to this",
        title=title,
    )
    ax.xaxis.set_major_formatter("{x:,.0f}")
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    ax.legend(loc="upper left")
    return fig


def velocities(share: np.ndarray, middle_half: tuple[float, float], title: str):
    """Share of notes at each velocity, 0 to 127; the middle half shaded."""
    fig, ax = plots.figure(height=2.8)
    ax.axvspan(*middle_half, color=plots.PALE, linewidth=0, zorder=0)
    ax.bar(np.arange(128), 100 * share, width=0.85, color=plots.INPUT)
    ax.set(
        xlim=(0, 128),
        xticks=[1, 32, 64, 96, 127],
        xlabel="velocity",
        ylabel="% of notes",
        title=title,
    )
    return fig


def key_name(key: int) -> str:
    """60 is "C4"."""
    return f"{LETTERS[key % 12]}{key // 12 - 1}"


def keys_used(share: np.ndarray, title: str):
    """Share of notes on each of the 88 keys; black keys black."""
    fig, ax = plots.figure(height=2.8)
    keys = range(21, 109)
    ax.bar(
        keys,
        100 * share,
        width=0.85,
        color=[plots.INK if key % 12 in (1, 3, 6, 8, 10) else plots.INPUT for key in keys],
    )
    ax.set_xticks(range(24, 109, 12), [key_name(key) for key in range(24, 109, 12)])
    ax.set(xlim=(20, 109), xlabel="key", ylabel="% of notes", title=title)
    return fig


def at_once(seconds: Mapping[str, np.ndarray], title: str):
    """Share of the time with 0 to 20 notes at once, by what counts as a note."""
    fig, ax = plots.figure(height=3)
    for (label, some), colour in zip(seconds.items(), (plots.INPUT, plots.OUTPUT), strict=True):
        ax.plot(100 * some[:21] / some.sum(), "o-", color=colour, markersize=4, label=label)
    ax.legend()
    ax.set(
        xlim=(-0.3, 20),
        ylim=(0, None),
        xticks=range(0, 21, 2),
        xlabel="notes at the same time",
        ylabel="% of the time",
        title=title,
    )
    return fig


def parts_of_the_beat(percent: np.ndarray):
    """Share of the onsets in each of sixteen parts of the file's beat."""
    fig, ax = plots.figure(height=2.6, width=9)
    ax.bar(np.arange(16) + 0.5, percent, width=0.9, color=plots.INPUT)
    ax.axhline(6.25, color=plots.INK, linewidth=1, linestyle="--")
    ax.set_xticks([0, 4, 8, 12, 16], ["beat", "¼", "½", "¾", "next beat"])
    ax.set(
        xlim=(0, 16),
        ylim=(0, 10),
        ylabel="% of onsets",
        title=f"No beat in sight: every part gets {percent.min():.2f} to {percent.max():.2f} %",
    )
    return fig


def leaks(leaked: Mapping[str, float], title: str):
    """Share of held-out runs that occur in training, for each way to split.

    The first way is the official one.
    """
    fig, ax = plots.figure(height=2.3, width=9)
    ax.barh(
        list(leaked)[::-1],
        [100 * value for value in leaked.values()][::-1],
        color=[plots.OTHER[0]] * (len(leaked) - 1) + [plots.INPUT],
    )
    ax.set(
        xlim=(0, 100),
        xlabel="% of held-out runs of nine pitches that occur in training",
        title=title,
    )
    ax.tick_params(axis="y", length=0)
    return fig


# ---- notebook 02 --------------------------------------------------------------------------


def remi_bar(bar: Music, names: Sequence[str], seconds: float):
    """One bar as a piano roll, and its base tokens where they act.

    Those of the clock stand above it, a note's beside the note.
    """
    fig, ax = plots.figure(height=5.8)
    plots.piano_roll(
        bar, end=seconds, ax=ax, title="A bar as REMI: words of the clock, words of the notes"
    )
    low, high = ax.get_ylim()
    top = high + 19
    ax.set_ylim(low - 3, top)
    free = -1.0  # seconds: where the last label ends
    for name in names:
        if not name.startswith(("Bar", "Position")):
            continue
        at = 0 if name == "Bar_None" else int(name.split("_")[1]) / 100
        ax.plot([at, at], [low - 3, top - 12], color=plots.INPUT, linewidth=0.8, zorder=1)
        label = max(at, free + 0.045, 0.02)  # two positions may lie closer than two lines of text
        ax.plot([at, label], [top - 12, top - 11], color=plots.INPUT, linewidth=0.8, zorder=1)
        ax.text(
            label,
            top - 10.6,
            name.replace("_None", ""),
            color=plots.INPUT,
            fontsize=10,
            rotation=90,
            ha="center",
            va="bottom",
        )
        free = label
    words = [i for i, name in enumerate(names) if name.startswith("Pitch")]
    for note, i in zip(bar.notes, words, strict=True):
        p, v, d = (name.split("_")[1] for name in names[i : i + 3])
        soon = (bar.notes["start"] < note["start"] + 0.4) & (bar.notes["end"] > note["start"])
        above = bar.notes["pitch"][soon].astype(int) - note["pitch"]
        crowded = np.any((above > 0) & (above < 3))  # then the words go behind the bar
        x, y = (note["end"], note["pitch"]) if crowded else (note["start"], note["pitch"] + 0.5)
        ax.text(
            x + 0.012,
            y,
            f"P {p}  V {v}  D {d}",
            fontsize=8.5,
            va="center" if crowded else "bottom",
            zorder=2.5,
            bbox=dict(facecolor="white", edgecolor="none", pad=0.4),
        )
    return fig


def on_the_grid(
    performed: np.ndarray, tokens: Mapping[float, np.ndarray], span: tuple[float, float]
):
    """Onsets as performed (rings) and as each grid, by its milliseconds, puts them (dots)."""
    fig, axes = plots.figure(1, len(tokens), height=3.4, sharey=True, squeeze=False)
    axes = axes[0]
    for ax, (grid, notes) in zip(axes, tokens.items(), strict=True):
        for line in np.arange(0, span[1] + grid, grid):
            ax.axvline(line, color=plots.PALE, linewidth=0.8, zorder=0)
        ax.plot(
            performed["start"] * 1000,
            performed["pitch"],
            "o",
            color=plots.INPUT,
            fillstyle="none",
            markersize=9,
            label="as performed",
        )
        ax.plot(
            notes["start"] * 1000,
            notes["pitch"],
            "o",
            color=plots.OUTPUT,
            markersize=4.5,
            label="as a token",
        )
        ax.set(xlim=span, ylim=(50, 102), xlabel="milliseconds", title=f"{grid:g} ms grid")
    axes[0].set_ylabel("key")
    axes[0].legend(loc="lower left")
    return fig


def onset_errors(errors: Mapping[float, np.ndarray]):
    """Share of notes within each onset error, a line for each grid."""
    fig, ax = plots.figure(height=3.2)
    for grid, error in errors.items():
        ax.plot(
            np.sort(error),
            np.linspace(0, 100, len(error)),
            color=GRID[grid],
            label=f"{grid:g} ms grid: 95 % within {np.percentile(error, 95):.1f} ms",
        )
    ax.axhline(95, color=plots.GREY, linewidth=0.8, linestyle=":")
    ax.set(
        xlabel="onset error, ms",
        ylabel="% of notes",
        xlim=(0, 36),
        ylim=(0, 103),
        title="Only the 10 ms grid keeps 95 % of onsets within 5 ms",
    )
    ax.legend(loc="lower right")
    return fig


def stacked_rolls(
    pieces: Mapping[str, Music], *, start: float = 0, end: float, height: float = 5.0
):
    """Piano rolls below each other, by their titles."""
    fig, axes = plots.figure(len(pieces), 1, height=height, sharex=True, sharey=True)
    for ax, (title, music) in zip(axes, pieces.items(), strict=True):
        plots.piano_roll(music, start=start, end=end, ax=ax, title=title, colourbar=False)
        ax.label_outer()
    return fig


def merge_maps(keys: np.ndarray, lengths: np.ndarray):
    """Which pairs became tokens: 1 where one did.

    The maps are (velocities, keys) and (velocities, durations in steps of 10 ms).
    """
    from matplotlib.colors import ListedColormap

    fig, axes = plots.figure(1, 2, height=3.2, sharey=True, width_ratios=(2, 1))
    for ax, cells, edges in zip(
        axes, (keys, lengths), (np.arange(20.5, 109), np.arange(-5, 250, 10)), strict=True
    ):
        ax.pcolormesh(
            edges,
            np.arange(0, 129, 4),
            cells,
            cmap=ListedColormap(["white", plots.INPUT]),
            edgecolors=plots.PALE,
            linewidth=0.2,
        )
    axes[0].set_xticks(range(24, 109, 12), [f"C{octave}" for octave in range(1, 9)])
    axes[0].set(
        xlabel="key", ylabel="velocity", title="Key and velocity: merged in the middle of both"
    )
    axes[1].set(xlabel="rings for, ms", title="Velocity and duration: short")
    return fig


def chord_tokens(pieces: Sequence[tuple[str, np.ndarray]]):
    """Small piano rolls of single tokens that hold several notes: (title, notes) of each."""
    fig, axes = plots.figure(1, len(pieces), width=11, height=2.4)
    for ax, (title, notes) in zip(axes, pieces, strict=True):
        begin = notes["start"].min()
        ax.barh(
            notes["pitch"],
            notes["end"] - notes["start"],
            0.8,
            notes["start"] - begin,
            color=plots.OUTPUT,
        )
        low, high = int(notes["pitch"].min()) - 3, int(notes["pitch"].max()) + 3
        ax.set(xlim=(0, 0.6), ylim=(min(low, high - 18), high), yticks=[], xlabel="seconds")
        ax.set_title(title, fontsize=10)
        for note in notes:
            ax.text(note["end"] - begin + 0.03, note["pitch"], key_name(note["pitch"]), va="center")
    return fig


def ranks(streams: Mapping[str, Sequence[np.ndarray]]):
    """Share of all tokens against a token's rank, for each vocabulary; Zipf's law dotted."""
    fig, ax = plots.figure(height=3.4)
    for (label, some), colour in zip(
        streams.items(), (plots.INK, plots.OTHER[2], plots.OTHER[0]), strict=True
    ):
        count = np.sort(np.bincount(np.concatenate(some)))[::-1]
        ax.loglog(np.arange(1, len(count) + 1), count / count.sum(), color=colour, label=label)
    rank = np.array([1, 3000])
    ax.loglog(rank, 0.12 / rank, color=plots.GREY, linestyle=":", label="Zipf's law")
    ax.set(
        xlabel="rank of the token",
        ylabel="share of all tokens",
        ylim=(1e-6, 0.3),
        title="Music's words do not follow Zipf's law, and merging flattens them further",
    )
    ax.legend(loc="lower left")
    return fig


def duration_errors(long: np.ndarray, error_ms: np.ndarray):
    """Error of each note's duration against the seconds that it rings for."""
    fig, ax = plots.figure(height=3.2)
    ax.scatter(long, error_ms, s=4, color=plots.OUTPUT, alpha=0.5, linewidth=0)
    ax.set(
        xscale="log",
        xlabel="the note rings for, seconds",
        ylabel="error of its duration, ms",
        ylim=(0, 80),
        title="The longer a note, the coarser its ruler",
    )
    ax.set_xticks([0.03, 0.1, 0.3, 1, 4, 16], ["0.03", "0.1", "0.3", "1", "4", "16"])
    return fig


def vocabularies(rows: Mapping[float, Sequence[dict]], title: str):
    """Tokens a note against the size of the vocabulary, for each grid.

    A solid line is for held-out pieces, a dotted one for those that it was learnt on.
    """
    fig, ax = plots.figure(height=3.6)
    for grid, some in rows.items():
        colour = GRID[grid]
        sizes = [row["vocabulary"] for row in some]
        ax.plot(
            sizes,
            [row["tokens_per_note"] for row in some],
            ".-",
            color=colour,
            label=f"{grid:g} ms, held out",
        )
        ax.plot(
            sizes,
            [row["tokens_per_note_train"] for row in some],
            ".:",
            color=colour,
            label="… where learnt",
        )
    ax.set(xscale="log", xlabel="vocabulary", ylabel="tokens a note", ylim=(1, 4.2), title=title)
    ax.set_xticks([300, 1000, 3000, 10_000, 20_000], ["300", "1,000", "3,000", "10,000", "20,000"])
    ax.legend(loc="lower left", ncols=2)
    return fig
