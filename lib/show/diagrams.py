"""Rows of memory cells and arrows between them: the schematic figures of the kernels.

A figure is a board of unit squares, x to the right, y upwards. Colours mean what they mean in
`lib.show.plots`: blue is read, orange is remembered, green is written.
"""

from lib.show import plots

INCH = 0.52  # a unit's side


def board(width: float, height: float, title: str = ""):
    """An empty board of `width` x `height` units; returns the figure and its axes."""
    fig, ax = plots.figure(
        width=max(INCH * width, 4), height=INCH * height + (0.5 if title else 0.1)
    )
    ax.set(xlim=(-0.1, width + 0.1), ylim=(-0.1, height + 0.1), aspect="equal", anchor="W")
    ax.axis("off")
    if title:
        ax.set_title(title, loc="left", fontsize=13, fontweight="bold", color=plots.INK)
    return fig, ax


def cells(ax, x: float, y: float, texts, colour: str, *, empty=(), width: float = 1) -> None:
    """A row of cells from (x, y) on, a text in each.

    Those with an index in `empty` are dashed and not filled.
    """
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Rectangle

    # opaque, so that stacked rows hide each other
    pale = [1 - 0.18 * (1 - part) for part in to_rgb(colour)]
    for i, text in enumerate(texts):
        void = i in empty
        ax.add_patch(
            Rectangle(
                (x + i * width, y),
                width,
                1,
                facecolor="none" if void else pale,
                edgecolor=plots.GREY if void else colour,
                linestyle=":" if void else "-",
                linewidth=1.3,
                zorder=1 if void else 2,
            )
        )
        ax.text(
            x + (i + 0.5) * width,
            y + 0.5,
            text,
            ha="center",
            va="center",
            fontsize=10,
            zorder=3,
            color=plots.GREY if void else plots.INK,
        )


def arrow(ax, start: tuple, end: tuple, colour: str = plots.GREY, *, bend: float = 0) -> None:
    """An arrow between two points; `bend` curves it, to the right of its way where positive."""
    from matplotlib.patches import FancyArrowPatch

    ax.add_patch(
        FancyArrowPatch(
            start,
            end,
            arrowstyle="-|>",
            mutation_scale=11,
            shrinkA=0,
            shrinkB=0,
            linewidth=1.3,
            color=colour,
            connectionstyle=f"arc3,rad={bend}",
            zorder=4,
        )
    )


def say(ax, x: float, y: float, text: str, colour: str = plots.INK, **options) -> None:
    """A text at (x, y), to its right and centred on y unless `options` say otherwise."""
    ax.text(x, y, text, **{"ha": "left", "va": "center", "fontsize": 10, "color": colour} | options)
