"""Figures and sounds of the deck on results: what the experiments of notebook 10 measured,
and what the models play.

All is drawn from data/results. A slide's title states the claim,
so that these figures have none of their own.
"""

import numpy as np

from lib.lab.experiments import figures as experiments
from lib.lab.experiments.efficiency import label
from lib.lab.experiments.entries import best_of
from lib.lab.experiments.figures import LOOKS, load
from lib.lab.experiments.race import whole_runs
from lib.lab.rivals.matched import LABELS
from lib.music.notes import Music, crop
from lib.music.tokens import TokenConfig, Tokenizer
from lib.show import plots

# inches: what a slide holds below its title, with letters that reach the last row
WIDTH, HEIGHT = 8.4, 3.6
BEFORE, AFTER = 2, 10  # seconds of the prompt and of the continuation that are heard


def _figure(rows: int = 1, columns: int = 1, **options):
    return plots.figure(rows, columns, **{"width": WIDTH, "height": HEIGHT} | options)


def _rows(part: str, kind: str) -> list[dict]:
    return [row for row in load(part)["rows"] if row["kind"] == kind]


def _lines(
    rows: list[dict],
    x: str,
    y: str,
    xlabel: str,
    ylabel: str,
    *,
    name=label,
    logarithmic: bool = True,
    bars: bool = False,
):
    """A line an architecture over a doubling x, its name at its end."""
    fig, ax = _figure()
    ends, ticks = [], sorted({row[x] for row in rows})
    for arch in dict.fromkeys(row["arch"] for row in rows):
        mine = sorted((row for row in rows if row["arch"] == arch), key=lambda row: row[x])
        colour, dash = LOOKS[arch]
        ax.plot(
            [row[x] for row in mine],
            [row[y] for row in mine],
            dash,
            marker="o",
            markersize=4,
            color=colour,
        )
        if bars:
            ax.fill_between(
                [row[x] for row in mine],
                *zip(*(row["interval_95"] for row in mine), strict=True),
                color=colour,
                alpha=0.1,
                linewidth=0,
            )
        ends.append((mine[-1][x], mine[-1][y], name(arch), colour))
    ax.set_xscale("log", base=2)
    if logarithmic:
        ax.set_yscale("log")
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    ax.set_xticks(ticks, [f"{n:,}" for n in ticks])
    ax.minorticks_off()
    ax.set(xlabel=xlabel, ylabel=ylabel, xlim=(ticks[0] / 1.15, ticks[-1] * 1.15))
    plots.name_ends(ax, ends, gap=0.075, size=11)
    return fig


def _with_slope(kind: str, quantity: str):
    """Names an architecture with the slope of the upper half of its line:
    over all lengths the lines are bent.
    """
    slopes = {
        row["arch"]: row["upper_half"]
        for row in load("efficiency")["exponents"]
        if (row["kind"], row["quantity"]) == (kind, quantity)
    }
    return lambda arch: f"{label(arch)}: {slopes[arch]['exponent']:.2f}"


# ---- the rules --------------------------------------------------------------------------------


def operations():
    """What a token of training costs each architecture."""
    found = load("race")["operations"]
    fig, ax = _figure(height=3.1)
    order = sorted(found, key=found.get)
    bars = ax.barh(
        [LABELS[arch] for arch in order],
        [found[arch] / 1e6 for arch in order],
        color=[LOOKS[arch][0] for arch in order],
        height=0.64,
    )
    ax.bar_label(bars, [f" {found[arch] / found['mamba']:.2f} × Mamba" for arch in order])
    ax.invert_yaxis()
    ax.tick_params(axis="y", length=0)
    ax.set(
        xlabel="million operations for a token of training",
        xlim=(0, 1.25 * max(found.values()) / 1e6),
    )
    return fig


def rate_grid():
    """Validation bits per note of the trials against the learning rate, at the longer warm-up."""
    found = load("race")
    fig, ax = _figure()
    ends, tried = [], set()
    for arch, chosen in found["best"].items():
        bits = _trials(found, arch, "lr", warmup=found["protocol"]["race"]["warmups"][0])
        best, colour = chosen["lr"], LOOKS[arch][0]
        ax.plot(list(bits), list(bits.values()), LOOKS[arch][1], color=colour, marker="o", ms=4)
        ax.plot(best, bits[best], "o", color=colour, markersize=11)
        last = max(bits)
        ends.append((last, bits[last], LABELS[arch], colour))
        tried |= set(bits)
    ax.set_xscale("log", base=2)
    ax.minorticks_off()
    ax.set_xticks(sorted(tried), [f"{lr:g}" for lr in sorted(tried)])
    ax.set(xlabel="learning rate (large dot: chosen)", ylabel="bits a note, validation")
    ax.set_xlim(min(tried) / 1.15, max(tried) * 8)  # room for the names
    plots.name_ends(ax, ends, gap=0.075, size=11)
    return fig


def warm_up():
    """Validation bits per note by the warm-up, at the rate of each architecture's best trial."""
    found = load("race")
    fig, ax = _figure()
    shares = sorted(found["protocol"]["race"]["warmups"])
    ends = []
    for arch in found["best"]:
        best = best_of(row for row in found["trials"] if row["arch"] == arch)
        bits = _trials(found, arch, "warmup", lr=best["lr"])
        colour, dash = LOOKS[arch]
        ax.plot([0, 1], [bits[share] for share in shares], dash, marker="o", color=colour)
        ends.append((1, bits[shares[1]], f"{LABELS[arch]}, {bits[shares[1]]:.2f}", colour))
    ax.set_xticks([0, 1], [f"warm-up {share:.0%} of the run" for share in shares])
    ax.set(xlim=(-0.15, 2), ylabel="bits a note, validation")
    plots.name_ends(ax, ends, gap=0.075, size=11)
    return fig


def _trials(found: dict, arch: str, by: str, **same) -> dict[float, float]:
    """Validation bits per note of an architecture's trials that share a choice, by another."""
    rows = [row for row in found["trials"] if row["arch"] == arch]
    rows = [row for row in rows if all(row[key] == value for key, value in same.items())]
    return {row[by]: row["validation_bits_per_note"] for row in sorted(rows, key=lambda r: r[by])}


# ---- likelihood -------------------------------------------------------------------------------


def _intervals(rows: list[tuple[str, float, tuple[float, float], str]], unit: str, height: float):
    """A point, an interval and its number a row, the first at the top."""
    fig, ax = _figure(height=height)
    for at, (_, value, (low, high), colour) in enumerate(rows):
        ax.plot([low, high], [at, at], color=colour, linewidth=3)
        ax.plot(value, at, "o", color=colour, markersize=9)
        ax.annotate(
            f"{value:.2f}",
            (high, at),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            color=colour,
        )
    ax.set_yticks(range(len(rows)), [row[0] for row in rows])
    ax.invert_yaxis()
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x", visible=True)
    ax.margins(x=0.12)  # room for the last number
    ax.set_xlabel(unit)
    return fig


def _gaps(budget: str):
    summary = load("race")["summary"]
    gaps = {
        arch: row["first_minus_this"]
        for arch, row in summary["budgets"][budget].items()
        if arch != summary["first"]
    }
    first = LABELS[summary["first"]]
    fig = _intervals(
        [
            (
                LABELS[arch],
                gap["bits_per_note"],
                gap["interval_95"],
                plots.INK if gap["shown"] else plots.GREY,
            )
            for arch, gap in sorted(gaps.items(), key=lambda item: item[1]["bits_per_note"])
        ],
        f"bits a note, {first} minus this, 95 % over seeds and pieces (grey: not shown)",
        height=3.3,
    )
    fig.axes[0].axvline(0, color=plots.OTHER[0], linewidth=1)
    every = [row for rows in summary["budgets"].values() for row in rows.values()]
    ends = [end for row in every for end in row.get("first_minus_this", {}).get("interval_95", [0])]
    room = 0.12 * (max(ends) - min(ends))
    fig.axes[0].set_xlim(min(ends) - room, max(ends) + room)  # the same for both budgets
    return fig


def equal_tokens():
    """Mamba's bits per note of the test split minus each other's, at equal tokens."""
    return _gaps("tokens")


def equal_arithmetic():
    """The same at equal arithmetic."""
    return _gaps("arithmetic")


def pieces_apart():
    """Left: each test piece by two models. Right: the differences alone."""
    found = load("race")
    bits, notes = whole_runs(found), np.array(found["pieces"]["notes"])
    ours, theirs = (bits[arch].mean(0) / notes for arch in ("mamba", "transformer"))
    fig, (left, right) = _figure(1, 2)
    ends = [min(ours.min(), theirs.min()) - 0.5, max(ours.max(), theirs.max()) + 0.5]
    left.plot(ends, ends, color=plots.GREY, linewidth=1)
    left.plot(theirs, ours, "o", color=plots.OUTPUT, alpha=0.5, markersize=5, markeredgewidth=0)
    left.set(xlabel="Transformer, bits a note", ylabel="Mamba, bits a note", xlim=ends, ylim=ends)
    right.hist(ours - theirs, bins=24, color=plots.OUTPUT)
    right.axvline(0, color=plots.GREY, linewidth=1)
    right.set(xlabel="Mamba − Transformer, bits a note", ylabel="pieces")
    return fig


def learning():
    """Validation bits per note of all whole runs."""
    found = load("race")
    fig, ax = _figure()
    longest, ends = max(row["steps"] for row in found["runs"]), []
    for run in found["runs"]:
        if run["steps"] == longest:
            tokens, bits = zip(*run["curve"], strict=True)
            colour, dash = LOOKS[run["arch"]]
            alpha = 1 if run["seed"] == 0 else 0.35
            ax.plot(np.array(tokens) / 1e6, bits, dash, color=colour, alpha=alpha, linewidth=1.4)
            if run["seed"] == 0:
                ends.append((tokens[-1] / 1e6, bits[-1], LABELS[run["arch"]], colour))
    ax.set(xlabel="million tokens read (pale: other seeds)", ylabel="bits a note, validation")
    plots.name_ends(ax, ends, gap=0.075, size=11)
    return fig


def lengths_of_training():
    """Bits per note of the test pieces against the tokens of a whole run, the first seed."""
    fig, ax = _figure()
    ends = []
    curves = load("race")["summary"]["curves"]
    for arch, points in curves.items():
        tokens, bits = zip(*points, strict=True)
        colour, dash = LOOKS[arch]
        ax.plot(np.array(tokens) / 1e6, bits, dash, color=colour, marker="o", markersize=4)
        ends.append((tokens[-1] / 1e6, bits[-1], LABELS[arch], colour))
    ticks = sorted({count / 1e6 for points in curves.values() for count, _ in points})
    ax.set_xscale("log", base=2)
    ax.minorticks_off()
    ax.set_xticks(ticks, [f"{count:.3g}" for count in ticks])
    ax.set(xlabel="million tokens in the run", ylabel="bits a note, test")
    plots.name_ends(ax, ends, gap=0.075, size=11)
    return fig


# ---- cost -------------------------------------------------------------------------------------


def carried():
    """KiB that each remembers against the tokens that it has read."""
    rows = [
        row | {"kib": row["state_bytes"] / 1024}
        for row in _rows("efficiency", "generation")
        if row["arch"] in LABELS
    ]
    return _lines(rows, "length", "kib", "tokens read", "KiB remembered")


def training_time():
    """Time of a training step against its length, with exponents."""
    rows = [row | {"seconds": row["median_ms"] / 1e3} for row in _rows("efficiency", "training")]
    return _lines(
        rows,
        "length",
        "seconds",
        "length of a training step, tokens",
        "seconds",
        name=_with_slope("training", "median_ms"),
    )


def training_memory():
    """Memory that a training step takes against its length, with exponents."""
    rows = [
        row | {"mib": row["peak_bytes"] / 2**20}
        for row in _rows("efficiency", "memory")
        if row["peak_bytes"]
    ]
    return _lines(
        rows,
        "length",
        "mib",
        "length of a training step, tokens",
        "MiB",
        name=_with_slope("memory", "peak_bytes"),
    )


def token_time():
    """Milliseconds a generated token against the tokens read so far."""
    return _lines(
        _rows("efficiency", "generation"), "length", "median_ms", "tokens read so far", "ms a token"
    )


def side_by_side():
    """Tokens a second of all pieces of a batch: the original's figure 3, right, on this machine."""
    return _lines(
        _rows("efficiency", "throughput"),
        "batch",
        "tokens_per_second",
        "pieces side by side",
        "tokens a second, all pieces",
    )


# ---- what they hear and play ------------------------------------------------------------------


def reach():
    """Bits per note against the tokens in reach."""
    rows = [row for row in load("context")["reach"] if row["bits_per_note"] is not None]
    return _lines(
        rows,
        "tokens",
        "bits_per_note",
        "tokens in reach",
        "bits a note, validation",
        logarithmic=False,
    )


def _continued(arch: str) -> Music:
    """The prompt and what this architecture plays after it."""
    found = load("playing")
    row = next(row for row in found["played"] if row["arch"] == arch)
    tokenizer = Tokenizer(TokenConfig(found["protocol"]["grid_ms"], "extend", None))
    return tokenizer.decode(np.array(found["prompt"] + row["tokens"], np.uint16))


def _heard(arch: str) -> Music:
    begin = load("playing")["prompt_seconds"]
    return crop(_continued(arch), begin - BEFORE, begin + AFTER)


def heard_lstm():
    """Two seconds of the prompt and ten of the LSTM."""
    return _heard("lstm"), BEFORE


def heard_transformer():
    """Two seconds of the prompt and ten of the Transformer."""
    return _heard("transformer"), BEFORE


# ---- tokens -----------------------------------------------------------------------------------


def tokenizers():
    """Bits per note at 10 ms of each tokenizer."""
    colours = {62.5: plots.OTHER[0], 10.0: plots.INK}
    return _intervals(
        [
            (
                f"{row['grid_ms']:g} ms, {row['bpe'] or 'no BPE'}",
                row["bits_per_note_10_ms"],
                row["interval_95"],
                colours[row["grid_ms"]],
            )
            for row in load("tokens")["rows"]
        ],
        "bits a note at 10 ms",
        height=3.6,
    )


# ---- the original -----------------------------------------------------------------------------


def each_repair():
    """What each repair of the original's recipe gains alone,
    and what it adds when all others are made.
    """
    return experiments.original(load("original"))
