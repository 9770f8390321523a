"""Figures and tables of the experiments, from data/results alone: what is not there is "not measured"."""

import matplotlib
import numpy as np
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from lib.env import machine as env
from lib.lab.bench.scan_figures import draw_figure3
from lib.lab.experiments.efficiency import STEPPER, fitted_on, label, show
from lib.lab.experiments.likelihood import show as estimate
from lib.lab.rivals.matched import LABELS
from lib.show import plots

LOOKS = {  # Mamba in ink, the others in colours that have no other meaning in this course
    "mamba": (plots.INK, "-"),
    STEPPER: (plots.INK, "--"),
    "mamba2": (plots.INK, ":"),
    "mamba3": (plots.INK, "-."),
    "hybrid": (plots.GREY, "-"),
    "transformer": (plots.OTHER[0], "-"),
    "transformer_xl": (plots.OTHER[0], "--"),
    "s4d": (plots.OTHER[2], "-"),
    "lstm": (plots.OTHER[1], "-"),
}
TABLE1 = {
    "transformer": "Transformer",
    "lstm": "RNN",
    "s4d": "SSM",
    "mamba": "Selective SSM (Mamba)",
}


MEASURED = (  # of an architecture's efficiency, in the order of the columns
    ("training", "median_ms"),
    ("generation", "median_ms"),
    ("memory", "peak_bytes"),
    ("generation", "state_bytes"),
)


def load(part: str, scale: str = "cpu") -> dict:
    """A part's result at a scale; empty where it was not measured."""
    return env.read_results(f"experiments_{part}_{scale}")


def table1(scale: str = "cpu") -> str:
    """The original's table 1 with measured columns, in Markdown."""
    efficiency, likelihood = load("efficiency", scale), load("likelihood", scale)
    rows = likelihood.get("summary", {}).get("budgets", {}).get("tokens", {})
    heads = (
        "architecture",
        "complexity: training time grows as N to the",
        "a generated token's time, as N to the",
        "memory: training, as N to the",
        "state, as N to the",
        "performance: bits a note, equal tokens (95 %)",
    )
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for arch, name in TABLE1.items():
        cells = [show(efficiency, arch, *what) for what in MEASURED]
        row = rows.get(arch)
        cells.append(estimate(row) if row else env.UNKNOWN)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    ranges = ("" if not efficiency else "\n\nexponents fitted on the upper half of what was measured: training "
              f"{fitted_on(efficiency, 'training')}, generation {fitted_on(efficiency, 'generation')}")
    return "\n".join(lines) + ranges


def _curve(
    ax, rows: list[dict], x: str, y: str, unit: str, *, bars: bool = False, logarithmic: bool = True
) -> None:
    """A line an architecture, named at its end; a note where nothing was measured."""
    ends, ticks = [], sorted({row[x] for row in rows})
    if not rows:
        ax.text(0.5, 0.5, env.UNKNOWN, transform=ax.transAxes, ha="center", color=plots.GREY)
        ax.set_axis_off()
        return
    for arch in dict.fromkeys(row["arch"] for row in rows):
        mine = sorted(
            (
                (row[x], row[y], row)
                for row in rows
                if row["arch"] == arch and row.get(y) is not None
            ),
            key=lambda one: one[0],
        )
        if not mine:
            continue
        colour, dash = LOOKS[arch]
        ax.plot(
            [m[0] for m in mine],
            [m[1] for m in mine],
            dash,
            color=colour,
            marker="o",
            markersize=3.5,
        )
        if bars:
            ax.fill_between(
                [m[0] for m in mine],
                *zip(*(m[2]["interval_95"] for m in mine), strict=True),
                color=colour,
                alpha=0.12,
                linewidth=0,
            )
        ends.append((mine[-1][0], mine[-1][1], label(arch), colour))
    ax.set_xscale("log", base=2)
    if logarithmic:
        ax.set_yscale("log")
        values = [row[y] for row in rows if row.get(y)]
        narrow = max(values) < 30 * min(values)  # few powers of ten: ticks between them
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if narrow else (1,)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_xticks(ticks, [f"{n:,.10g}" for n in ticks], fontsize=9)
    ax.xaxis.set_minor_formatter(NullFormatter())
    # room for the names
    ax.set_xlim(ticks[0] / 1.2, ticks[-1] * 2 ** (0.62 * max(2, len(ticks) - 1)))
    ax.set_ylabel(unit)
    ax.grid(axis="y", visible=True)
    plots.name_ends(ax, ends, gap=0.07, size=9.5)


def _title(ax, text: str) -> None:
    with matplotlib.rc_context(plots.STYLE):
        ax.set_title(text, fontsize=11.5)


def _rows(result: dict, kind: str) -> list[dict]:
    return [row for row in result.get("rows", []) if row["kind"] == kind]


def efficiency(result: dict):
    """Training speed and memory against length, generation and its state against position; returns the figure."""
    fig, axes = plots.figure(2, 2, height=8)
    training, memory, generation = (
        _rows(result, kind) for kind in ("training", "memory", "generation")
    )
    _curve(axes[0, 0], training, "length", "tokens_per_second", "tokens a second")
    axes[0, 0].set_xlabel("length of a training step, batch 1")
    _title(axes[0, 0], "Training: " + _ends(training, "tokens_per_second"))
    _curve(
        axes[0, 1],
        [row | {"mib": row["peak_bytes"] / 2**20} for row in memory if row["peak_bytes"]],
        "length",
        "mib",
        "MiB",
    )
    axes[0, 1].set_xlabel("length of a training step, batch 1")
    _title(axes[0, 1], "Memory that a training step takes")
    _curve(axes[1, 0], generation, "length", "median_ms", "ms a token")
    axes[1, 0].set_xlabel("tokens read so far")
    _title(axes[1, 0], "Generation: " + _ends(generation, "median_ms", less=True))
    _curve(
        axes[1, 1],
        [row | {"kib": row["state_bytes"] / 1024} for row in generation if row["arch"] != STEPPER],
        "length",
        "kib",
        "KiB",
    )
    axes[1, 1].set_xlabel("tokens read so far")
    _title(axes[1, 1], "What is remembered")
    return fig


def _ends(rows: list[dict], quantity: str, less: bool = False, axis: str = "length") -> str:
    """Mamba against the Transformer at the longest length, or the largest batch, that both reached."""
    found = {(row["arch"], row[axis]): row[quantity] for row in rows}
    both = [n for arch, n in found if arch == "mamba" and ("transformer", n) in found]
    if not both:
        return env.UNKNOWN
    ratio = found["mamba", max(both)] / found["transformer", max(both)]
    ratio = 1 / ratio if less else ratio
    if ratio >= 1:
        return f"Mamba is {ratio:.1f} × the Transformer at {max(both):,}"
    return f"the Transformer is {1 / ratio:.1f} × Mamba at {max(both):,}"


def figure3(scan: dict, efficiency: dict):
    """Both halves of figure 3 (Gu and Dao 2023), which the original reprints, on this machine.

    Left: the operation alone, from the result of `python -m lib.lab.bench scan`. Right: tokens a second of the
    compared models, all pieces of a batch together.
    """
    fig, axes = plots.figure(1, 2, height=4.6)
    if "figure3" in scan:
        draw_figure3(scan, ax=axes[0])
        _title(axes[0], "Left: " + axes[0].get_title("left").replace("The scan", "the scan"))
    else:
        _curve(axes[0], [], "", "", "")
    throughput = _rows(efficiency, "throughput")
    _curve(axes[1], throughput, "batch", "tokens_per_second", "tokens a second, all pieces")
    axes[1].set_xlabel("pieces side by side")
    _title(
        axes[1],
        "Right: "
        + (_ends(throughput, "tokens_per_second", axis="batch") if throughput else env.UNKNOWN),
    )
    return fig


def context(result: dict):
    """Bits per note against the position in the piece, and against the tokens in reach; returns the figure."""
    fig, axes = plots.figure(1, 2, height=4.4)
    position = [
        row | {"middle": _middle(row["from"], row["to"])}
        for row in result.get("position", [])
        if row["bits_per_note"] is not None
    ]
    _curve(
        axes[0], position, "middle", "bits_per_note", "bits a note", bars=True, logarithmic=False
    )
    axes[0].set_xlabel("position in the piece, tokens")
    _title(axes[0], "Bits a note against the position in the piece")
    reach = [row for row in result.get("reach", []) if row["bits_per_note"] is not None]
    _curve(axes[1], reach, "tokens", "bits_per_note", "bits a note", bars=True, logarithmic=False)
    axes[1].set_xlabel("tokens in reach")
    best: dict[str, dict] = {}
    for row in reach:
        best.setdefault(row["arch"], {})[row["tokens"]] = row["bits_per_note"]
    enough = [n for n in sorted({row["tokens"] for row in reach})
              if all(bits.get(n, np.inf) - min(bits.values()) < 0.05 for bits in best.values())]
    _title(axes[1], f"More than {enough[0]:,} tokens are worth less than 0.05 bits" if enough else
           "Bits a note against the tokens in reach")
    return fig


def _middle(begin: int, end: int | None) -> float:
    """Where a bin of positions is drawn; the last one has no end."""
    return begin * 1.5 if end is None else max(1, (begin + end) / 2)


def _forest(ax, rows: list[tuple[str, float, tuple[float, float], str]], unit: str) -> None:
    """A point and an interval a row, the first at the top."""
    if not rows:
        ax.text(0.5, 0.5, env.UNKNOWN, transform=ax.transAxes, ha="center", color=plots.GREY)
        ax.set_axis_off()
        return
    for at, (_, value, (low, high), colour) in enumerate(rows):
        ax.plot([low, high], [-at, -at], color=colour, linewidth=2)
        ax.plot(value, -at, "o", color=colour)
    ax.set_yticks([-at for at in range(len(rows))], [row[0] for row in rows])
    ax.set_ylim(-len(rows) + 0.5, 0.5)
    ax.grid(axis="x", visible=True)
    ax.set_xlabel(unit)


def likelihood(result: dict):
    """Bits per note of the test split at both budgets, with intervals over pieces; returns the figure."""
    fig, axes = plots.figure(1, 2, height=3.8)
    for ax, budget in zip(axes, ("tokens", "minutes"), strict=True):
        rows = result.get("summary", {}).get("budgets", {}).get(budget, {})
        _forest(
            ax,
            [
                (LABELS[arch], row["bits_per_note"], row["interval_95"], LOOKS[arch][0])
                for arch, row in sorted(rows.items(), key=lambda item: item[1]["bits_per_note"])
            ],
            "bits a note, test",
        )
        _title(ax, f"Equal {'tokens' if budget == 'tokens' else 'time'}")
    return fig


def curves(result: dict):
    """Validation bits per note against the tokens read, every run of equal tokens; returns the figure."""
    fig, ax = plots.figure(height=4.2)
    runs = [run for run in result.get("runs", []) if run["budget"] == "tokens"]
    for run in runs:
        colour, dash = LOOKS[run["arch"]]
        named = LABELS[run["arch"]] if run["seed"] == 0 else None  # one name for all its seeds
        ax.plot(
            [tokens / 1e6 for tokens, _ in run["curve"]],
            [bits for _, bits in run["curve"]],
            dash,
            color=colour,
            marker="o",
            markersize=3,
            linewidth=1.4,
            label=named,
        )
    if runs:
        ax.legend()
        ax.grid(axis="y", visible=True)
        spread = {
            arch: np.ptp([run["validation_bits_per_note"] for run in runs if run["arch"] == arch])
            for arch in ("mamba", "transformer")
        }
        _title(
            ax,
            f"Every run is a line: seeds of the Transformer end {spread['transformer']:.1f} bits apart, of Mamba "
            f"{spread['mamba']:.1f}",
        )
    ax.set(xlabel="million tokens read", ylabel="bits a note, validation")
    return fig


def original(result: dict):
    """What each repair of the original's recipe is worth, alone; returns the figure."""
    fig, ax = plots.figure(height=3.6)
    gains = {arm["arm"]: arm["gain"] for arm in result.get("arms", []) if arm["arm"] != "original"}
    _forest(
        ax,
        [
            (name, gain["bits_per_note"], gain["interval_95"], plots.INK)
            for name, gain in gains.items()
        ],
        "bits a note gained on held-out pieces",
    )
    ax.axvline(0, color=plots.GREY, linewidth=0.8)
    alone = {name: gain["bits_per_note"] for name, gain in gains.items() if name != "all repaired"}
    title = "What each repair of the original is worth, alone"
    if len(alone) > 1:
        first, second = sorted(alone, key=alone.get, reverse=True)[:2]
        title = f"Alone, {first} and {second} repair most: {alone[first]:.1f} and {alone[second]:.1f} bits a note"
    _title(ax, title)
    return fig


def tokens(result: dict):
    """Bits per note at 10 ms of each tokenizer; returns the figure."""
    fig, ax = plots.figure(height=4)
    colours = {62.5: plots.OTHER[0], 10.0: plots.INK}
    _forest(
        ax,
        [
            (
                f"{row['grid_ms']:g} ms, {row['bpe'] or 'no BPE'}",
                row["bits_per_note_10_ms"],
                row["interval_95"],
                colours.get(row["grid_ms"], plots.GREY),
            )
            for row in result.get("rows", [])
        ],
        "bits a note at 10 ms",
    )
    rows = sorted(result.get("rows", []), key=lambda row: row["bits_per_note_10_ms"])
    _title(
        ax,
        f"Fewest bits: {rows[0]['grid_ms']:g} ms, {rows[0]['bpe'] or 'no BPE'}; most: {rows[-1]['grid_ms']:g} ms, "
        f"{rows[-1]['bpe'] or 'no BPE'}"
        if rows
        else "The same music through each tokenizer",
    )
    return fig
