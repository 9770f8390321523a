"""Figures and sounds of the deck on training and playing:
what notebooks 08 and 09 measured, and what the model plays.

A slide's title states the claim, so that these figures have none of their own.
All that is played has a seed that nobody picked by ear: 1, then 2, then 3.
"""

import csv
import math
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import torch

from lib.env import machine as env
from lib.generate.control import Controls
from lib.generate.grammar import FOLLOWS, Grammar
from lib.generate.player import load_model, prompt_end, variations
from lib.lab.experiments import figures as experiments
from lib.lab.judge import anchors
from lib.music.maestro import performances
from lib.music.notes import Music, crop, read_midi, sustain
from lib.music.tokens import first_seconds
from lib.show import diagrams as cells
from lib.show import figures_playing, plots
from lib.train.batches import Batches
from lib.train.config import TrainConfig
from lib.train.optim import learning_rate

# inches: what a slide holds below its title, with letters that reach the last row
WIDTH, HEIGHT = 8.4, 3.6
LENGTH = 512  # tokens of a crop, as the shipped model was trained
PROMPT, NEW = 10, 14  # seconds


def _figure(rows: int = 1, columns: int = 1, **options):
    return plots.figure(rows, columns, **{"width": WIDTH, "height": HEIGHT} | options)


def _piece(split: str) -> Music:
    """A whole piece of the ten: the Nocturne of the test split,
    or the Beethoven sonata of the validation split.
    """
    found = performances(quick=True, say=lambda text: None)
    piece = read_midi(next(p for p in found if p.split == split).path)
    return crop(piece, piece.notes["start"][0], piece.seconds)  # without the silence before it


def _bars(
    names, values, colours, label, *, form: str = "{:.1f}", height: float = 2.6, room: float = 1.12
):
    fig, ax = _figure(height=height)
    bars = ax.barh(names, values, color=colours, height=0.64)
    ax.bar_label(bars, [" " + form.format(value) for value in values])
    ax.invert_yaxis()
    ax.set(xlabel=label, xlim=(0, room * max(values)))
    ax.tick_params(axis="y", length=0)
    return fig


# ---- batches, loss, one step -------------------------------------------------------------------


def crops():
    """The opening of a held-out piece, in crops of 512 tokens: borders fall anywhere."""
    tokenizer, music = load_model()[1], sustain(_piece("validation"))
    ids = tokenizer.encode(music)[: 4 * LENGTH]
    grammar, borders = Grammar(tokenizer), []
    for i, token in enumerate(ids.tolist()):
        if i % LENGTH == 0:
            borders.append(grammar.seconds)
        grammar.read(token)
    borders.append(grammar.seconds)
    fig, ax = _figure()
    plots.piano_roll(tokenizer.decode(ids), end=borders[-1], ax=ax, colourbar=False)
    for n, (begin, end) in enumerate(pairwise(borders), 1):
        ax.axvspan(begin, end, color=plots.INPUT, alpha=0.13 * (n % 2), linewidth=0)
        ax.text(
            begin,
            1.07,
            f" crop {n}",
            transform=ax.get_xaxis_transform(),
            va="top",
            color=plots.INPUT,
        )
    return fig


def reading():
    """Who reads what: visits of eight rows over forty steps,
    with a carried state and with a reset one.
    """
    found = [p for p in performances(quick=True, say=lambda text: None) if p.split == "train"]
    # about 35 tokens a second
    pieces = [SimpleNamespace(length=int(35 * p.seconds)) for p in found]
    silent = SimpleNamespace(vocab_size=1, stream=lambda piece: np.zeros(piece.length, int))
    fig, axes = _figure(2, 1, height=4.2, sharex=True)
    for ax, carry in zip(axes, (8, 1)):
        plan = Batches(silent, pieces, TrainConfig(batch=8, length=LENGTH, carry=carry))
        begins = [[] for _ in range(8)]  # of each row: (step, whether at a piece's beginning)
        for step in range(40):
            for row in np.flatnonzero(plan.next()[1]):
                begins[row].append((step, plan.rows[row][1] == LENGTH))
        for row, visits in enumerate(begins):
            for (a, opening), b in zip(visits, [*(v[0] for v in visits[1:]), 40]):
                ax.barh(
                    row,
                    b - a - 0.15,
                    left=a,
                    height=0.7,
                    color=plots.OUTPUT if opening else plots.INPUT,
                    alpha=0.85 if opening else 0.4,
                )
        empty = sum(map(len, begins)) / (8 * 40)
        ax.set(ylabel="row", xlim=(0, 40), yticks=[0, 7])
        ax.set_title(
            f"carry={carry}: {empty:.0%} of the crops start with an empty state", fontsize=12
        )
        ax.invert_yaxis()
    axes[1].set_xlabel("step (green: a visit that begins at a piece's opening)")
    return fig


def baselines():
    """Bits per note on the test split: three counting models, and the shipped one."""
    result = env.read_results("model")
    rows = result["test_baselines"] | {"shipped Mamba": result["test_bits_per_note"]}
    return _bars(
        list(rows),
        list(rows.values()),
        [plots.GREY] * 3 + [plots.OUTPUT],
        "bits per note, whole test pieces",
        form="{:.2f}",
    )


def schedule():
    """The learning rate over a run: a warm-up, then half a cosine."""
    config, progress = TrainConfig(), np.linspace(0, 1, 1001)
    fig, ax = _figure(height=2.9)
    ax.plot(
        progress, [learning_rate(p, config) for p in progress], color=plots.INPUT, linewidth=2.5
    )
    ax.axvspan(0, config.warmup, color=plots.STATE, alpha=0.25, linewidth=0)
    ax.text(
        config.warmup + 0.01,
        0.04 * config.lr,
        f"warm-up: the first {config.warmup:.0%}",
        color=plots.GREY,
    )
    ax.text(1, 0.2 * config.lr, f"down to {config.final_lr:.0%}", color=plots.GREY, ha="right")
    ax.set(xlabel="progress of the run", ylabel="learning rate", xlim=(0, 1), ylim=(0, None))
    return fig


def training_speed():
    """Tokens a second of one training step, ours beside other people's models of the same size."""
    result = env.read_results("train_cpu")
    rows = [
        r
        for r in result["rows"]
        if r["length"] == result["key_length"] and r["allocator"] == "tuned"
    ]
    rows.sort(key=lambda r: -r["tokens_per_second"])
    return _bars(
        [r["label"] for r in rows],
        [r["tokens_per_second"] for r in rows],
        [plots.OUTPUT if r["contender"] == "ours" else plots.GREY for r in rows],
        f"tokens a second, forward + backward + AdamW, length {result['key_length']:,}",
        form="{:,.0f}",
        height=2.9,
    )


def kills():
    """Steps lost at each of the kills, in order."""
    result = env.read_results("interruptions")
    fig, ax = _figure(height=2.7)
    for writing, colour, label in (
        (False, plots.INPUT, "killed at work"),
        (True, plots.OTHER[0], "killed while it wrote"),
    ):
        rows = [
            (i, r["lost"]) for i, r in enumerate(result["rows"], 1) if r["was_writing"] == writing
        ]
        ax.plot(*zip(*rows), "o", color=colour, markersize=9, label=label)
    ax.axhline(result["save_every"], color=plots.GREY, linestyle="--", linewidth=1)
    ax.text(
        0.5,
        result["save_every"] + 0.12,
        f"a checkpoint every {result['save_every']} steps",
        color=plots.GREY,
    )
    ax.set(
        xlabel="kill",
        ylabel="steps lost",
        ylim=(-0.3, result["save_every"] + 1.2),
        yticks=range(result["save_every"] + 1),
    )
    ax.legend(loc="upper right", ncols=2)
    return fig


# ---- overfitting ----------------------------------------------------------------------------


def overfitting():
    """The original recipe in small: training, its own validation, and performances never seen."""
    return experiments.overfitting(experiments.load("original"))


def leak():
    """Chunks that overlap, split at random:
    a validation chunk shares tokens with its neighbours.
    """
    fig, ax = cells.board(21, 4.6)
    fig.set_size_inches(8.6, 8.6 * 4.6 / 21)
    validation = {3, 8}
    for i in range(11):
        colour = plots.STATE if i in validation else plots.INPUT
        cells.cells(
            ax,
            1.75 * i,
            0.4 + 1.3 * (i % 2),
            ["validation" if i in validation else "train"],
            colour,
            width=2.6,
        )
    for i in validation:
        for edge in (1.75 * i, 1.75 * i + 1.75):
            ax.axvspan(
                edge,
                edge + 0.85,
                ymin=0.05,
                ymax=0.62,
                color=plots.OTHER[0],
                alpha=0.3,
                linewidth=0,
                zorder=3,
            )
    cells.arrow(ax, (0, 3.5), (20.2, 3.5))
    cells.say(ax, 0, 4.1, "one performance", plots.GREY)
    cells.say(ax, 20.2, 4.1, "red: tokens that are on both sides", plots.OTHER[0], ha="right")
    return fig


def repairs():
    """Bits on performances never seen, pass by pass,
    with one thing repaired at a time and with everything.
    """
    colours = {
        "nothing": plots.INK,
        "schedule": plots.OTHER[0],
        "split": plots.OTHER[1],
        "augmentation": plots.OTHER[2],
        "vocabulary": plots.STATE,
        "everything": plots.OUTPUT,
    }
    return experiments.never_seen(experiments.load("original"), colours)


def shipped_curve():
    """Validation bits per note of the shipped model's whole log."""
    with open(env.RESULTS / "training_log.csv", newline="") as file:
        rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    fig, ax = _figure(height=3.4)
    tokens, bits = [r["tokens"] / 1e6 for r in rows], [r["validation_bits_per_note"] for r in rows]
    restart = [i for i, (a, b) in enumerate(pairwise(rows), 1) if b["lr"] > 1.5 * a["lr"]]
    ax.plot(tokens, bits, "o-", color=plots.OUTPUT, linewidth=2.5)
    for run, i in enumerate(restart, 2):
        middle = (tokens[i] + tokens[i - 1]) / 2
        ax.axvline(middle, color=plots.GREY, linestyle=":")
        ax.text(middle, max(bits), f" run {run}", va="top", color=plots.GREY)
    ax.set(
        xlabel="million tokens read",
        ylabel="bits per note, a few pieces",
        ylim=(math.floor(min(bits)), None),
    )
    return fig


# ---- drawing a token --------------------------------------------------------------------------


def _along() -> torch.Tensor:
    """The model's logits after each token of the prompt, (L, V)."""
    model, tokenizer = load_model()
    piece = _piece("test")
    prompt = first_seconds(tokenizer, piece, prompt_end(piece, PROMPT))
    with torch.inference_mode():
        return model(torch.tensor(prompt[None].astype(int)))[0].double()


def temperature():
    """One distribution at three temperatures: where the model must choose a key."""
    tokenizer, along = load_model()[1], _along()
    piece = _piece("test")
    prompt = first_seconds(tokenizer, piece, prompt_end(piece, PROMPT)).tolist()
    ends = ["".join(tokenizer.pieces[token][-1:]) for token in prompt]
    # behind the last position of the prompt: now it must name a key
    logits = along[max(i for i, end in enumerate(ends) if end.startswith("Position"))]
    fig, ax = _figure(height=3.4)
    for t, colour in zip((0.5, 1.0, 1.5), (plots.INPUT, plots.OUTPUT, plots.OTHER[0])):
        p = torch.softmax(logits / t, -1).sort(descending=True).values
        count = int((p.cumsum(0) < 0.9).sum()) + 1
        ax.step(
            range(1, 101),
            p[:100],
            where="mid",
            color=colour,
            linewidth=2.5,
            label=f"{t}: {count} tokens hold 90 %",
        )
    ax.set(
        yscale="log",
        xlabel="rank of the token",
        ylabel="probability",
        xlim=(0.5, 100),
        ylim=(1e-4, 1),
    )
    ax.legend(title="temperature")
    return fig


def kept_tokens():
    """How many tokens top-k, top-p and min-p keep at each place of the prompt."""
    p = torch.softmax(_along(), -1).sort(descending=True).values
    counts = {
        "top-k 20": torch.full((len(p),), 20),
        "top-p 0.9": ((p.cumsum(-1) - p) < 0.9).sum(-1),
        "min-p 0.1": (p >= 0.1 * p[:, :1]).sum(-1),
    }
    fig, ax = _figure(height=3.3)
    for (name, n), colour in zip(counts.items(), (plots.GREY, plots.OUTPUT, plots.OTHER[1])):
        ax.step(
            range(len(n)),
            n,
            where="mid",
            color=colour,
            linewidth=1.6,
            label=f"{name}: {n.min()} to {n.max()}" if n.min() < n.max() else f"{name}: always",
        )
    ax.set(
        yscale="log",
        xlabel="place in the prompt (tokens)",
        ylabel="tokens kept",
        xlim=(0, len(p)),
        ylim=(0.8, 2000),
    )
    ax.legend(ncols=3, loc="upper right")
    return fig


def grammar():
    """What may follow what: the rules of REMI."""
    where = {
        "start": (0, 2.3),
        "mark": (3.6, 2.3),
        "Bar": (7.2, 2.3),
        "Position": (10.8, 2.3),
        "Pitch": (15.2, 4.2),
        "Velocity": (18.6, 2.3),
        "Duration": (15.2, 0.4),
    }
    width = {
        "start": 2,
        "mark": 2,
        "Bar": 2,
        "Position": 2.9,
        "Pitch": 2.2,
        "Velocity": 2.7,
        "Duration": 2.8,
    }
    fig, ax = cells.board(21.6, 6.2)
    fig.set_size_inches(8.8, 8.8 * 6.2 / 21.6)
    for name, (x, y) in where.items():
        cells.cells(
            ax, x, y, [name], plots.STATE if name in FOLLOWS else plots.GREY, width=width[name]
        )
    middle = {name: (x + width[name] / 2, y + 0.5) for name, (x, y) in where.items()}
    for before, after in FOLLOWS.items():
        for name in sorted(after):
            (x0, y0), (x1, y1) = middle[before], middle[name]
            if before == name:
                cells.arrow(ax, (x0 - 0.7, y0 + 0.5), (x0 + 0.7, y0 + 0.5), bend=-1.3)
                continue
            if (before, name) == ("start", "Bar"):
                cells.arrow(ax, (x0, y0 + 0.5), (x1 - 0.9, y1 + 0.5), bend=-0.35)
                continue
            if (before, name) == ("Duration", "Bar"):
                cells.arrow(ax, (x0 - width[before] / 2, y0), (x1, y1 - 0.5), bend=-0.25)
                continue
            if abs(y1 - y0) < 0.1:
                begin, end = (x0 + width[before] / 2, y0), (x1 - width[name] / 2, y1)
            elif before == "Duration" and name == "Pitch":
                begin, end = (x0, y0 + 0.5), (x1, y1 - 0.5)
            elif x1 > x0:
                begin, end = (x0 + width[before] / 2, y0 + 0.2), (x1 - width[name] / 2, y1 - 0.2)
                if name == "Velocity":
                    end = (x1, y1 + 0.5)
            else:
                begin = (
                    (x0, y0 - 0.5) if before == "Velocity" else (x0 - width[before] / 2, y0 + 0.2)
                )
                end = (x1 + width[name] / 2, y1) if before == "Velocity" else (x1, y1 - 0.5)
            cells.arrow(ax, begin, end)
    return fig


# ---- playing ----------------------------------------------------------------------------------


def _played(seeds, **options) -> list[Music]:
    """The Nocturne's first ten seconds, continued by the shipped model."""
    return variations(
        *load_model(), _piece("test"), seeds=seeds, seconds=NEW, prompt_seconds=PROMPT, **options
    )


def endless():
    """Milliseconds a token and bytes of memory over 200,000 tokens, as measured."""
    stream = env.read_results("generation")["stream"]
    curve = stream["curve"]
    tokens = np.array([row["tokens"] for row in curve])
    fig, (left, right) = _figure(1, 2, height=3.3)
    left.plot(tokens, [row["ms_a_token"] for row in curve], "o-", color=plots.OUTPUT, linewidth=2.5)
    left.set(
        ylim=(0, 2 * max(row["ms_a_token"] for row in curve)),
        xlabel="token",
        ylabel="milliseconds a token",
    )
    right.plot(
        tokens, [row["state_bytes"] / 2**20 for row in curve], color=plots.STATE, linewidth=3
    )
    right.text(
        tokens[-1],
        curve[0]["state_bytes"] / 2**20 * 1.5,
        "the state, measured",
        color=plots.STATE,
        ha="right",
    )
    if curve[0]["resident_bytes"]:
        right.plot(
            tokens,
            [row["resident_bytes"] / 2**20 for row in curve],
            color=plots.INPUT,
            linewidth=2.5,
        )
        right.text(
            tokens[-1],
            curve[0]["resident_bytes"] / 2**20 * 0.45,
            "whole process, measured",
            color=plots.INPUT,
            ha="right",
        )
    config = env.read_results("model")
    right.plot(
        tokens, 8 * config["n_layer"] * config["d_model"] * tokens / 2**20, "--", color=plots.GREY
    )
    right.text(
        tokens[-1],
        8 * config["n_layer"] * config["d_model"] * tokens[-1] / 2**20 * 1.6,
        "a Transformer's cache, computed",
        color=plots.GREY,
        ha="right",
    )
    right.set(xlabel="token", ylabel="MiB", yscale="log", ylim=(0.08, 2e4))
    for ax in (left, right):
        ax.set_xlim(0, None)
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        ax.set_xticks([0, tokens[-1] // 2, tokens[-1]])
    return fig


def controls():
    """What each control does to its attribute, one unit down and up, mean over the seeds."""
    result = env.read_results("generation")["controls"]
    shown = (("density", "notes a second"), ("register", "mean key"), ("loudness", "mean velocity"))
    fig, axes = _figure(1, 3, height=3.2)
    for ax, (name, label) in zip(axes, shown):
        down, up = result[f"{name} -1"], result[f"{name} +1"]
        values = [down["after"], up["before"], up["after"]]
        ax.plot((-1, 0, 1), values, "o-", color=plots.OUTPUT, linewidth=3, markersize=9)
        for x, value in zip((-1, 0, 1), values):
            ax.annotate(
                f"{value:.1f}", (x, value), xytext=(0, 9), textcoords="offset points", ha="center"
            )
        margin = 0.3 * (values[2] - values[0])
        ax.set(
            xlabel=name,
            ylabel=label,
            xticks=(-1, 0, 1),
            xlim=(-1.4, 1.4),
            ylim=(values[0] - margin, values[2] + margin),
        )
    return fig


# ---- judging -----------------------------------------------------------------------------------


def overlap():
    """Overlap area with real test pieces, feature by feature: real halves, the model, noise."""
    fig = anchors.plot(env.read_results("generation")["pieces"]["comparison"])
    fig.set_size_inches(WIDTH, 3.9)
    fig.axes[0].set_title("")
    return fig


def copied():
    """What each piece shares with the training pieces, in bits of surprise: a dot a piece."""
    passages = env.read_results("generation")["pieces"]["passages"]
    return figures_playing.shared(passages, "", width=WIDTH, height=3.5)


# ---- sounds -----------------------------------------------------------------------------------


def _around_the_entry(music: Music) -> tuple[Music, float]:
    """Two seconds before the model enters and seven behind, and where in them it enters."""
    begin = prompt_end(_piece("test"), PROMPT)
    return crop(music, begin - 2, begin + 7), 2


def heard_continuation():
    """Two seconds of the prompt and seven of what the model makes of it, seed 1."""
    return _around_the_entry(_played([1])[0])


def heard_second_future():
    """The same moment with seed 2."""
    return _around_the_entry(_played([2])[0])


def heard_third_future():
    """The same moment with seed 3."""
    return _around_the_entry(_played([3])[0])


def heard_wishes():
    """The same prompt and seed 1 with four wishes: denser, higher, softer, faster."""
    wish = Controls(density=1, register=1, loudness=-1, tempo=1.2)
    return _around_the_entry(_played([1], controls=wish)[0])


def _openings() -> tuple[Music, Music, Music]:
    """Ten seconds each: a real opening through the tokens, the model from nothing,
    and the real tokens shuffled.
    """
    model, tokenizer = load_model()
    ids = tokenizer.encode(crop(sustain(_piece("test")), 0, 30))
    noise = tokenizer.decode(np.random.default_rng(0).permutation(ids))
    played = variations(model, tokenizer, seeds=[1], seconds=10)[0]
    return crop(tokenizer.decode(ids), 0, 10), played, crop(noise, 0, 10)


def heard_real():
    """A real opening, through the tokens."""
    return _openings()[0]


def heard_from_nothing():
    """The model, from nothing, seed 1."""
    return _openings()[1]


def heard_noise():
    """The tokens of the real opening, shuffled."""
    return _openings()[2]
