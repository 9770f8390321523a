"""One look for every figure: style, colours with one meaning each, the piano roll.

Colours are Okabe and Ito's, which people with any colour vision can tell apart. In every
figure blue is what goes in (`INPUT`), orange what is remembered (`STATE`), green what comes
out (`OUTPUT`). Figures are made without pyplot's global state, so they work without a screen.
"""

import base64
import html
import io
import sys
from pathlib import Path

import numpy as np

from lib.env.errors import UserError
from lib.env.files import atomic_write
from lib.music.notes import Music

INPUT, STATE, OUTPUT = "#0072B2", "#E69F00", "#009E73"
OTHER = ("#D55E00", "#CC79A7", "#56B4E9", "#F0E442")  # where a figure needs more than the roles
INK, GREY, PALE = "#262626", "#7A7A7A", "#E6E6E6"
QUIET, LOUD = 20, 110  # MIDI velocities at the two ends of the colour scale
DPI = 144  # twice a page's 72, for sharp screens

STYLE = {
    "figure.dpi": 72,
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
    "savefig.dpi": DPI,
    "font.size": 11,
    "text.color": INK,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "axes.titlepad": 9,
    "axes.prop_cycle": f"cycler('color', {[INPUT, STATE, OUTPUT, *OTHER]})",
    "axes.axisbelow": True,
    "axes.grid": False,
    "grid.color": PALE,
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "image.cmap": "cividis",
}


def style() -> None:
    """Use the course's look for every figure drawn from now on."""
    import matplotlib

    matplotlib.rcParams.update(STYLE)


def figure(rows: int = 1, columns: int = 1, *, width: float = 11, height: float = 3.6, **options):
    """A figure of `width` x `height` inches and its axes; `options` as for `Figure.subplots`."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        fig = Figure(figsize=(width, height), layout="constrained")
        return fig, fig.subplots(rows, columns, **options)


def name_ends(ax, ends, *, gap: float = 0.06, size: float = 10, near: float | None = None) -> None:
    """Write names at the right ends of lines; one that would lie on another is lifted above it.

    `ends` are (x, y, name, colour). Names are at least `gap` of the axes' height apart; with
    `near`, only those whose x differ by less than this factor. The axes' scales and limits must be
    final: only the upper limit rises where a name would stand above it.
    """
    ax.get_ylim()  # matplotlib finds the limits when they are asked for
    to_axes = ax.transData - ax.transAxes  # from data to shares of the axes
    to_data = to_axes.inverted()
    placed: list[tuple[float, float]] = []
    for x, y, name, colour in sorted(ends, key=lambda end: end[1]):
        across, height = to_axes.transform((x, y))
        for other, beside in placed:
            if near is None or max(x, other) <= near * min(x, other):
                height = max(height, beside + gap)
        placed.append((x, height))
        ax.annotate(
            name,
            to_data.transform((across, height)),
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            fontsize=size,
            annotation_clip=False,
        )
    top = max((height for _, height in placed), default=0) + gap / 2
    if top > 1:
        ax.set_ylim(top=to_data.transform((0, top))[1])


def quartile_lines(ax, lines, *, room: float, gap: float = 0.06, near: float | None = None) -> None:
    """Medians between quartiles over x, both axes logarithmic, a line's name at its right end.

    `lines` are (name, colour, dash, points), a point is (x, lower quartile, median, upper
    quartile). The names get `room`, as a share of the width that the points take; `gap` and `near`
    are those of `name_ends`.
    """
    from matplotlib.ticker import FuncFormatter, NullFormatter

    ends, ticks = [], set()
    for name, colour, dash, points in lines:
        x, low, middle, high = zip(*sorted(points), strict=True)
        ax.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        ax.plot(x, middle, dash, color=colour, marker="o", markersize=3.5)
        ends.append((x[-1], middle[-1], name, colour))
        ticks |= set(x)
    ticks = sorted(ticks)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_xticks(ticks, [f"{n:,}" for n in ticks])
    ax.set_xlim(ticks[0] / 1.2, ticks[-1] * max(4, ticks[-1] / ticks[0]) ** room)
    ax.grid(axis="y", visible=True)
    name_ends(ax, ends, gap=gap, near=near)


def velocity_colours():
    """The colour map of loudness: soft is pale orange, loud nearly black; grey-scale safe."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    return ListedColormap(colormaps["magma_r"](np.linspace(0.2, 0.95, 256)), name="velocity")


def piano_roll(
    music: Music,
    *,
    prompt_seconds: float | None = None,
    start: float = 0,
    end: float | None = None,
    ax=None,
    title: str = "",
    colourbar: bool = True,
):
    """Draw the notes that sound in [start, end) and return the axes.

    Seconds go right, pitch up, a bar a note, darker when louder. Where `prompt_seconds` is
    given, the music before it is shaded and called "prompt", the rest "continuation". The
    sustain pedal, if the piece has one, is a band below. Without `ax` a new figure is made:
    `ax.figure`. The bars are the `PolyCollection` whose gid is "notes".
    """
    import matplotlib
    from matplotlib.collections import PolyCollection

    with matplotlib.rc_context(STYLE):
        if ax is None:
            ax = figure()[1]
        if end is None:
            end = max(music.seconds, start + 1)
        if not end > start:
            raise UserError(
                f"a piano roll from {start} to {end} seconds is empty: give an end after the start"
            )
        notes = music.notes[(music.notes["end"] > start) & (music.notes["start"] < end)]
        left, right = np.clip(notes["start"], start, end), np.clip(notes["end"], start, end)
        pixel = (end - start) / 1000
        right -= np.minimum(pixel, (right - left) / 4)  # a gap before the next bar
        right = np.maximum(right, left + 1.5 * pixel)  # the shortest stay visible
        low, high = notes["pitch"] - 0.44, notes["pitch"] + 0.44
        corners = np.stack([[left, low], [left, high], [right, high], [right, low]])
        bars = PolyCollection(
            corners.transpose(2, 0, 1),
            array=notes["velocity"].astype("f8"),
            cmap=velocity_colours(),
            clim=(QUIET, LOUD),
            linewidth=0,
            zorder=3,
        )
        bars.set_gid("notes")
        ax.add_collection(bars, autolim=False)
        ax.set_xlim(start, end)
        ax.locator_params(axis="x", steps=[1, 2, 5, 10])
        ax.set_xlabel("seconds")
        pedal = music.pedal[(music.pedal[:, 1] > start) & (music.pedal[:, 0] < end)]
        _pitch_axis(ax, notes["pitch"], band=len(pedal) > 0)
        if len(pedal):
            _pedal_band(ax, np.clip(pedal, start, end))
        if prompt_seconds is not None and start < prompt_seconds:
            _prompt(ax, start, min(prompt_seconds, end), end)
        if colourbar:
            bar = ax.figure.colorbar(
                bars, ax=ax, pad=0.012, aspect=24, extend="both", ticks=[20, 50, 80, 110]
            )
            bar.set_label("velocity")
            bar.outline.set_visible(False)
        if title:
            ax.set_title(printable(title))
    return ax


def printable(text: str) -> str:
    """A name for a figure: a dollar begins no formula, and what the font lacks becomes a �."""
    import matplotlib
    from matplotlib import font_manager

    wanted = font_manager.FontProperties(weight=matplotlib.rcParams["axes.titleweight"])
    letters = font_manager.get_font(font_manager.findfont(wanted)).get_charmap()
    known = [letter if ord(letter) in letters or letter == "\n" else "\ufffd" for letter in text]
    return "".join(known).replace("$", r"\$")


def _pitch_axis(ax, pitch: np.ndarray, band: bool) -> None:
    """Limits around the pitches in view, C of each octave named; room below for the pedal."""
    low, high = (int(pitch.min()), int(pitch.max())) if len(pitch) else (54, 66)
    missing = max(0, 24 - (high - low))  # at least two octaves
    low, high = low - 2 - missing // 2, high + 3 + (missing + 1) // 2
    if band:
        low -= 0.11 * (high - low)
    ax.set_ylim(low, high)
    lowest = low + (0.13 * (high - low) if band else 1)
    octaves = [c for c in range(0, 128, 12) if lowest <= c <= high]
    ax.set_yticks(octaves, [f"C{c // 12 - 1}" for c in octaves])
    ax.set_ylabel("pitch")
    ax.grid(axis="y", visible=True)
    ax.tick_params(axis="y", length=0)


def _pedal_band(ax, pedal: np.ndarray) -> None:
    """The spans with the sustain pedal down, at the foot of the axes."""
    across = ax.get_xaxis_transform()
    ax.broken_barh(
        [(a, b - a) for a, b in pedal],
        (0.015, 0.045),
        transform=across,
        color=GREY,
        linewidth=0,
        zorder=2,
        gid="pedal",
    )
    ax.annotate(
        "pedal",
        (0, 0.0375),
        xycoords="axes fraction",
        xytext=(-4, 0),
        textcoords="offset points",
        ha="right",
        va="center",
        color=GREY,
        fontsize=9,
    )


def _prompt(ax, start: float, split: float, end: float) -> None:
    """Shade [start, split), draw the dividing line and name both sides above the notes."""
    ax.axvspan(start, split, color=INPUT, alpha=0.10, linewidth=0, zorder=0, gid="prompt")
    low, high = ax.get_ylim()
    # of the axes, of words; in points
    height, line = 72 * ax.figure.get_figheight() * ax.get_position().height, 14
    ax.set_ylim(low, high + max(0.09, line / max(height - line, line)) * (high - low))
    label = dict(
        transform=ax.get_xaxis_transform(), va="top", fontsize=10, fontweight="bold", zorder=4
    )
    if (split - start) / (end - start) > 0.08:
        ax.text((start + split) / 2, 0.985, "prompt", ha="center", color=INPUT, **label)
    else:  # too narrow for the word
        ax.text(split, 0.985, " \u25c2 prompt", ha="left", color=INPUT, **label)
    if split < end:
        ax.axvline(split, color=INPUT, linewidth=1.4, zorder=4, gid="divider")
        if (end - split) / (end - start) > 0.12:
            ax.text((split + end) / 2, 0.985, "continuation", ha="center", color=OUTPUT, **label)


def save_roll(
    music: Music, path: str | Path, *, prompt_seconds: float | None = None, title: str = ""
) -> None:
    """Write the piano roll as a PNG, whole or not at all; needs no screen."""
    ax = piano_roll(music, prompt_seconds=prompt_seconds, title=title)
    data = png_bytes(ax.figure)
    with atomic_write(path) as part:
        part.write_bytes(data)


def png_bytes(fig, dpi: int = DPI) -> bytes:
    """A figure as a PNG of at most 96 colours, which is a third of the size."""
    from PIL import Image

    raw = io.BytesIO()
    fig.savefig(raw, format="png", dpi=dpi)
    small = io.BytesIO()
    image = Image.open(raw).convert("RGB").quantize(96, dither=Image.Dither.NONE)
    image.save(small, "PNG", optimize=True)
    return small.getvalue()


def image(fig, alt: str):
    """A figure as an image with alternative text, for display in a notebook."""
    from IPython.display import HTML

    if not alt.strip():
        raise ValueError("a figure needs alt text: say what it shows in a sentence")
    source = base64.b64encode(png_bytes(fig)).decode()
    width = round(fig.get_figwidth() * 72)
    return HTML(
        f'<img alt="{html.escape(alt)}" width="{width}" style="max-width:100%" '
        f'src="data:image/png;base64,{source}">'
    )


def show(fig, alt: str) -> None:
    """Show a figure in a notebook as an image with alternative text, and close it."""
    from IPython.display import display

    display(image(fig, alt))
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close(fig)
