"""Figures and tables of the experiments, from data/results alone:
what is not there is "not measured".
"""

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from lib.env import machine as env
from lib.lab.bench.scan_figures import draw_figure3
from lib.lab.experiments import original as original_part
from lib.lab.experiments.efficiency import STEPPER, fitted_on, label, show
from lib.lab.experiments.entries import best_of
from lib.lab.experiments.intervals import show as estimate
from lib.lab.experiments.race import whole_runs
from lib.lab.rivals.matched import LABELS
from lib.music.notes import Music
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
    "hybrid": "Mamba + attention",
    "mamba2": "Mamba-2",
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
    """The original's table 1 with measured columns, and what came after, in Markdown."""
    efficiency, race = load("efficiency", scale), load("race", scale)
    rows = race.get("summary", {}).get("budgets", {}).get("tokens", {})
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
    ranges = (
        ""
        if not efficiency
        else "\n\nexponents fitted on the upper half of what was measured: training "
        f"{fitted_on(efficiency, 'training')}, generation {fitted_on(efficiency, 'generation')}"
    )
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
    named = ticks[::-1][:: 2 if len(ticks) > 5 else 1]  # the last, and as many as have room
    ax.set_xticks(ticks, [f"{n:,.10g}" if n in named else "" for n in ticks], fontsize=9)
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


def remembered(reads: Sequence[int], kib: Mapping[str, Sequence[float]]):
    """What each architecture carries to the next token, in KiB,
    against the tokens that it has read.
    """
    fig, ax = plots.figure(height=3.6)
    for arch, sizes in kib.items():
        colour, dash = LOOKS[arch]
        ax.loglog(reads, sizes, dash, color=colour, label=LABELS[arch])
    ax.set(
        xlabel="tokens read",
        ylabel="KiB remembered",
        title="One memory grows with the piece, one does in one layer of four, four do not",
    )
    ax.legend(ncols=5, loc="upper left", fontsize=9.5)
    return fig


def arithmetic(operations: Mapping[str, float], million: float):
    """Operations for a token of training, and the tokens that as many as Mamba's allow; returns the
    figure.

    `operations` of each architecture, `million` tokens that Mamba reads.
    """
    fig, ax = plots.figure(height=3)
    if not operations:
        ax.set_title(env.UNKNOWN)
        return fig
    archs = sorted(operations, key=operations.get, reverse=True)
    for row, arch in enumerate(archs):
        count = operations[arch] / 1e6
        read = million * operations["mamba"] / operations[arch]
        ax.barh(row, count, color=LOOKS[arch][0])
        ax.text(count, row, f" {count:.1f}, so {read:.1f} million tokens", va="center")
    ax.set_yticks(range(len(archs)), [LABELS[arch] for arch in archs])
    ax.margins(x=0.4)  # room for the words
    ax.set(xlabel="million operations a token, forward and backward", xlim=(0, None))
    ax.set_title(f"Tokens for the operations that {million:.0f} million cost Mamba")
    return fig


def overlapping(
    models: Mapping[str, tuple[float, tuple[float, float]]], difference: tuple[float, float]
):
    """A mean and its interval for each of some models,
    and the interval of their difference in the title.
    """
    fig, ax = plots.figure(height=2.2)
    for at, (mean, interval) in enumerate(models.values()):
        ax.plot(interval, [at, at], color=plots.GREY, linewidth=3)
        ax.plot(mean, at, "o", color=plots.INK)
    ax.set_yticks(range(len(models)), models)
    low, high = difference
    ax.set(
        xlabel="bits a note",
        ylim=(-0.6, len(models) - 0.4),
        title=f"Two wide intervals that overlap, and a difference of {low:.2f} to {high:.2f}",
    )
    return fig


def first_steps(curves: Mapping[str, Sequence[tuple[int, float]]]):
    """Validation bits per note of tiny models against the step."""
    fig, ax = plots.figure(height=3.4)
    for arch, curve in curves.items():
        colour, dash = LOOKS[arch]
        ax.plot(*zip(*curve, strict=True), dash, color=colour, label=LABELS[arch])
    ax.set(
        xlabel="step",
        ylabel="bits a note, validation",
        title=f"{len(curves)} architectures in their first steps",
    )
    ax.legend()
    return fig


def rates(result: dict):
    """Validation bits per note of the trials: against the learning rate, and against the warm-up;
    returns the figure.
    """
    fig, axes = plots.figure(1, 2, height=4, width_ratios=(2, 1), sharey=True)
    best, edges, ends = result.get("best", {}), 0, []
    for arch, chosen in best.items():
        colour, dash = LOOKS[arch]
        trials = [row for row in result["trials"] if row["arch"] == arch]
        first = trials[0]["warmup"]  # all rates were tried with it
        bits = {
            row["lr"]: row["validation_bits_per_note"] for row in trials if row["warmup"] == first
        }
        tried = sorted(bits)
        edges += min(bits, key=bits.get) in (tried[0], tried[-1])
        axes[0].plot(tried, [bits[lr] for lr in tried], dash, color=colour, marker="o", ms=3.5)
        axes[0].plot(chosen["lr"], bits[chosen["lr"]], "o", color=colour, markersize=9)
        rate = best_of(trials)["lr"]  # at which the other warm-ups were tried
        others = {
            row["warmup"]: row["validation_bits_per_note"] for row in trials if row["lr"] == rate
        }
        shares = sorted(others)
        shown = [others[share] for share in shares]
        axes[1].plot(range(len(shares)), shown, dash, color=colour, marker="o")
        axes[1].set_xticks(range(len(shares)), [f"{share:.0%}" for share in shares])
        ends.append((len(shares) - 1, shown[-1], LABELS[arch], colour))
    axes[0].set_xscale("log", base=2)
    rates = sorted({row["lr"] for row in result.get("trials", [])})
    axes[0].set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes[0].set(xlabel="learning rate (large: chosen)", ylabel="bits a note, validation")
    axes[1].set_xlabel("warm-up, share of the run")
    axes[1].set_xlim(-0.2, 3)  # room for the names
    title = "The trials"
    if best:
        plots.name_ends(axes[1], ends, gap=0.07, size=9.5)
        title = f"{len(best) - edges} of {len(best)} best trials lie inside what was tried"
    _title(axes[0], title)
    _title(axes[1], "At the rate of its best trial")
    return fig


def piece_by_piece(result: dict, other: str = "transformer"):
    """Bits per note of Mamba against those of another, a point for each test piece;
    returns the figure.

    Means over all seeds; the longer the piece, the larger its point.
    """
    fig, ax = plots.figure(width=6.5, height=5.2)
    ax.set(xlabel=f"{LABELS[other]}, bits a note", ylabel="Mamba, bits a note")
    found = whole_runs(result) if result.get("pieces") else {}
    if other not in found:
        ax.set_title(env.UNKNOWN)
        return fig
    notes = np.array(result["pieces"]["notes"])
    mamba, theirs = (found[arch].mean(0) / notes for arch in ("mamba", other))
    ax.scatter(theirs, mamba, s=notes / 100, color=plots.INK, alpha=0.5, linewidth=0)
    ends = [mamba.min() - 0.5, mamba.max() + 0.5]
    ax.plot(ends, ends, color=plots.GREY, linewidth=1)
    share = (mamba < theirs).mean()
    ax.set_title(f"Mamba needs fewer bits on {share:.0%} of {len(notes)} pieces")
    return fig


def playing(pieces: Mapping[str, Music], prompt_seconds: float, end: float):
    """The same opening, continued by each architecture: piano rolls with the same axes."""
    fig, axes = plots.figure(
        max(len(pieces), 1), 1, height=1.7 * max(len(pieces), 1) + 0.4, sharex=True, squeeze=False
    )
    for ax, (arch, music) in zip(axes[:, 0], pieces.items(), strict=False):
        plots.piano_roll(
            music,
            prompt_seconds=prompt_seconds,
            end=end,
            ax=ax,
            title=LABELS[arch],
            colourbar=False,
        )
        ax.label_outer()
    return fig


def efficiency(result: dict):
    """Training speed and memory against length, generation and its state against position;
    returns the figure.
    """
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
    """Mamba against the Transformer at the longest length or largest batch that both reached."""
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
    """Both halves of the original's figure 3 on this machine: figure 8 of Gu and Dao (2023).

    Left: the operation alone, from the result of `python -m lib.lab.bench scan`.
    Right: tokens a second of the compared models, all pieces of a batch together.
    """
    fig, axes = plots.figure(1, 2, height=4.6)
    if "figure3" in scan:
        draw_figure3(scan, ax=axes[0])
        for label in axes[0].get_xticklabels()[-2::-2]:  # half a page is narrow
            label.set_visible(False)
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
    """Bits per note against the position in the piece, and against the tokens in reach;
    returns the figure.
    """
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
    enough = [
        n
        for n in sorted({row["tokens"] for row in reach})
        if all(bits.get(n, np.inf) - min(bits.values()) < 0.05 for bits in best.values())
    ]
    _title(
        axes[1],
        f"More than {enough[0]:,} tokens are worth less than 0.05 bits"
        if enough
        else "Bits a note against the tokens in reach",
    )
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


def race(result: dict):
    """The first architecture's bits per note of the test split minus each other's, at equal tokens
    and at equal arithmetic; returns the figure.

    Intervals are over seeds and pieces together; grey ones hold zero.
    """
    fig, axes = plots.figure(1, 2, height=4.2, sharex=True)
    summary = result.get("summary", {"budgets": {}})
    first = LABELS.get(summary.get("first"), "")
    for ax, budget in zip(axes, ("tokens", "arithmetic"), strict=True):
        gaps = {
            LABELS[arch]: row["first_minus_this"]
            for arch, row in summary["budgets"].get(budget, {}).items()
            if arch != summary["first"]
        }
        _differences(ax, gaps, f"bits a note, {first} minus this")
        _title(ax, f"Equal {budget}")
    return fig


def _differences(ax, gaps: Mapping[str, dict], unit: str) -> None:
    """A point and an interval for each difference, the least at the top; grey where not shown."""
    rows = [
        (name, gap["bits_per_note"], gap["interval_95"], plots.INK if gap["shown"] else plots.GREY)
        for name, gap in sorted(gaps.items(), key=lambda item: item[1]["bits_per_note"])
    ]
    _forest(ax, rows, unit)
    if rows:
        ax.axvline(0, color=plots.OTHER[0], linewidth=1)


def crossings(result: dict):
    """Bits a note of the test pieces against the tokens of a whole run, the first seed;
    returns the figure.
    """
    fig, ax = plots.figure(height=4.2)
    found = result.get("summary", {}).get("curves", {})
    for arch, points in found.items():
        colour, dash = LOOKS[arch]
        tokens = [count / 1e6 for count, _ in points]
        bits = [value for _, value in points]
        ax.plot(tokens, bits, dash, color=colour, marker="o", label=LABELS[arch])
    if found:
        bits = {arch: dict(points) for arch, points in found.items()}
        shared = sorted(set.intersection(*map(set, bits.values())))  # budgets that all have
        ax.set_xscale("log", base=2)
        ax.set_xticks([count / 1e6 for count in shared], [f"{count / 1e6:.3g}" for count in shared])
        ax.minorticks_off()
        ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
        orders = {tuple(sorted(found, key=lambda arch: bits[arch][count])) for count in shared}
        _title(ax, f"The first seed: {len(orders)} different orders at {len(shared)} budgets")
    ax.set(xlabel="million tokens in the run", ylabel="bits a note, test")
    return fig


def curves(result: dict):
    """Validation bits per note against the tokens read, every run of all tokens;
    returns the figure.
    """
    fig, ax = plots.figure(height=4.4)
    longest = max((row["steps"] for row in result.get("runs", [])), default=0)
    runs = [row for row in result.get("runs", []) if row["steps"] == longest]
    ends: dict[str, list[float]] = {}
    for run in runs:
        colour, dash = LOOKS[run["arch"]]
        named = None if run["arch"] in ends else LABELS[run["arch"]]  # one name for all its seeds
        ends.setdefault(run["arch"], []).append(run["curve"][-1][1])
        ax.plot(
            [tokens / 1e6 for tokens, _ in run["curve"]],
            [bits for _, bits in run["curve"]],
            dash,
            color=colour,
            linewidth=1.2,
            label=named,
        )
    if runs:
        ax.legend(loc="upper right")
        ax.grid(axis="y", visible=True)
        widest = max(ends, key=lambda arch: np.ptp(ends[arch]))
        _title(
            ax,
            "Every run is a line; seeds end furthest apart for "
            f"{LABELS[widest]}: {np.ptp(ends[widest]):.2f} bits",
        )
    ax.set(xlabel="million tokens read", ylabel="bits a note, validation")
    return fig


SIDES = {  # of an arm's curve
    "held_out": ("performances never seen", plots.OUTPUT),
    "own_validation": ("its own validation", plots.STATE),
    "train": ("training", plots.INPUT),
}


def overfitting(result: dict, arms: Sequence[str] = (original_part.NOTHING, "schedule")):
    """Bits a note against passes, a panel an arm:
    thin lines for its seeds, a thick one for their mean; returns the figure.
    """
    fig, axes = plots.figure(1, len(arms), height=3.8, sharey=True)
    for ax, name in zip(axes, arms, strict=True):
        row = _arm(result, name)
        title = f"{name} repaired".capitalize()
        if row:
            for key, (label, colour) in SIDES.items():
                passes, lines = _lines(row, key)
                ax.plot(passes, lines.T, color=colour, linewidth=0.7, alpha=0.5)
                ax.plot(passes, lines.mean(0), color=colour, linewidth=2.5, label=label)
            ends = {key: _lines(row, key)[1].mean(0)[-1] for key in SIDES}
            gap = ends["held_out"] - ends["own_validation"]
            title += f": own validation {gap:.1f} bits too kind"
        ax.set_xlabel("passes over the data")
        _title(ax, title)
    axes[0].set_ylabel("bits a note")
    axes[0].set_ylim(bottom=0)  # for all panels, once all are drawn
    if result.get("arms"):
        axes[0].legend(loc="lower left")
    return fig


def never_seen(result: dict, arms: dict[str, str]):
    """Held-out bits a note against passes, a line for each of {arm: colour}, the mean of its seeds;
    returns the figure.
    """
    fig, ax = plots.figure(height=4)
    for name, colour in arms.items():
        row = _arm(result, name)
        if row:
            passes, lines = _lines(row, "held_out")
            ax.plot(passes, lines.mean(0), color=colour, label=name)
    first, last = _arm(result, original_part.NOTHING), _arm(result, original_part.EVERYTHING)
    title = "Performances never seen, pass by pass"
    if first and last:
        ends = [_lines(row, "held_out")[1].mean(0)[-1] for row in (first, last)]
        title = f"After the last pass {ends[0]:.1f} bits a note have become {ends[1]:.1f}"
        ax.legend(title="repaired", loc="center left", bbox_to_anchor=(1, 0.5))
    ax.set(xlabel="passes over the data", ylabel="bits a note, never seen")
    _title(ax, title)
    return fig


def _arm(result: dict, name: str) -> dict | None:
    return next((arm for arm in result.get("arms", []) if arm["arm"] == name), None)


def _lines(row: dict, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Passes (points,), and an arm's values (seeds, points)."""
    passes = np.array([point["pass"] for point in row["curves"][0]])
    return passes, np.array([[point[key] for point in curve] for curve in row["curves"]])


def original(result: dict):
    """What each repair of the original's recipe gains alone, and what it adds as the last;
    returns the figure.
    """
    fig, ax = plots.figure(height=4.2)
    rows = []
    for name in original_part.REPAIRS:
        alone, without = _arm(result, name), _arm(result, f"all but {name}")
        if alone and without:
            rows.append((name, alone["gain"], plots.INK, "alone"))
            rows.append(("", without["lost"], plots.OUTPUT, "when all others are made"))
    _forest(
        ax,
        [
            (name, found["bits_per_note"], found["interval_95"], colour)
            for name, found, colour, _ in rows
        ],
        "bits a note gained on performances never seen",
    )
    title = "What each repair of the original is worth"
    if rows:
        ax.axvline(0, color=plots.GREY, linewidth=0.8)
        handles = [
            Line2D([], [], color=colour, marker="o", label=label)
            for _, _, colour, label in rows[:2]
        ]
        ax.legend(handles=handles, loc="lower right")
        best = max(
            (row for row in rows if row[3] == "alone"), key=lambda row: row[1]["bits_per_note"]
        )
        title = f"Alone, {best[0]} repairs most: {best[1]['bits_per_note']:.1f} bits a note"
    _title(ax, title)
    return fig


def _tokenizer(row: dict) -> str:
    size = f"{row['bpe']:,} tokens" if row["bpe"] else "no BPE"
    return f"{row['grid_ms']:g} ms, {size}"


def tokens(result: dict):
    """Bits per note at 10 ms of each tokenizer; returns the figure."""
    fig, ax = plots.figure(height=4)
    colours = {62.5: plots.OTHER[0], 10.0: plots.INK}
    _forest(
        ax,
        [
            (
                _tokenizer(row),
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
        f"Fewest bits: {_tokenizer(rows[0])}; most: {_tokenizer(rows[-1])}"
        if rows
        else "The same music through each tokenizer",
    )
    return fig


def tokenizers(result: dict):
    """The first tokenizer's bits per note minus each other's, at equal notes and at equal
    operations; returns the figure.
    """
    fig, axes = plots.figure(1, 2, height=3.6, sharex=True)
    first, *others = result.get("rows", [None])
    budgets = {
        "Equal notes": "first_minus_this",
        "Equal operations": "first_minus_this_at_equal_operations",
    }
    for ax, (title, key) in zip(axes, budgets.items(), strict=True):
        gaps = {_language(row): row[key] for row in others}
        _differences(ax, gaps, f"bits a note, {_language(first)} minus this" if first else "")
        _title(ax, title)
    return fig


def _language(row: dict) -> str:
    kind = row["kind"].replace("MIDILike", "MIDI-Like")
    return f"{kind}, {_tokenizer(row)}"
