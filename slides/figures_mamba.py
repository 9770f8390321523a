"""Figures of the deck on Mamba: the shipped model taken apart on a phrase by Liszt,
as in notebook 07.

A slide's title states the claim, so that these figures have none of their own.
"""

import numpy as np
import torch
from torch.nn import functional as F

from lib.env import machine as env
from lib.generate.player import load_model
from lib.lab.bench import generate as generate_bench
from lib.mamba import model as mamba
from lib.music.maestro import performances
from lib.music.notes import crop, read_midi, sustain
from lib.show import diagrams as cells
from lib.show import plots

# inches: what a slide holds below its title, with letters that reach the last row
WIDTH, HEIGHT = 8.4, 3.6
SECONDS = (64, 94)  # the phrase


def _figure(rows: int = 1, columns: int = 1, **options):
    return plots.figure(rows, columns, **{"width": WIDTH, "height": HEIGHT} | options)


# ---- the model, and what is inside it while it reads -------------------------------------------
# (read anew for each figure: the build notes which files a figure was made from)


def _model():
    return load_model()


def _heard():
    """The whole piece, with the pedal in the lengths of its notes."""
    found = performances(quick=True, say=lambda text: None)
    piece = next((p for p in found if p.title == "Rigoletto Parap."), found[0])
    return sustain(read_midi(piece.path))


def _phrase():
    """The phrase as music, and its tokens (L,)."""
    music = crop(_heard(), *SECONDS)
    return music, torch.tensor(_model()[1].encode(music).astype(int))


@torch.no_grad()
def _insides() -> list[dict]:
    """On the phrase, for each layer: delta (L, D), B, C (L, N), z (L, D), every h (L, D, N)."""
    model, found = _model()[0], []
    x = model.backbone.embeddings(_phrase()[1][None]).float()
    for layer, memory in zip(model.backbone.layers, model.new_state(1)):
        m, u = layer.mixer, layer.norm(x)
        v, z = m.in_proj(u).chunk(2, -1)
        v, _ = m.convolve(v, memory[0])
        raw, B, C = m.split(v)
        delta, A = F.softplus(raw + m.dt_proj.bias)[0], -torch.exp(m.A_log)
        h, states = memory[1][0], []
        for x_t, delta_t, B_t in zip(v[0], delta, B[0]):
            h = torch.exp(delta_t[:, None] * A) * h + (delta_t * x_t)[:, None] * B_t
            states.append(h)
        found.append(
            {"delta": delta, "B": B[0], "C": C[0], "z": z[0], "A": A, "h": torch.stack(states)}
        )
        x = x + m(u, memory)[0]
    return found


# ---- the block ------------------------------------------------------------------------------


def block():
    """The Mamba block: what is remembered, and a gate."""
    blue, orange, green, grey = plots.INPUT, plots.STATE, plots.OUTPUT, plots.GREY
    boxes = [
        (0, 2, "in", 1, blue),
        (2, 2, "RMSNorm", 2.6, grey),
        (5.5, 2, "in_proj", 2.2, grey),
        (8.6, 3, "x", 0.9, blue),
        (8.6, 1, "z", 0.9, blue),
        (10.3, 3, "conv1d", 2.1, orange),
        (13.1, 3, "SiLU", 1.6, grey),
        (15.5, 3, "scan", 2, orange),
        (13.2, 1, "SiLU", 1.6, grey),
        (18.3, 2, "×", 0.9, grey),
        (19.9, 2, "out_proj", 2.5, grey),
        (23, 2, "+", 0.8, grey),
        (24.6, 2, "out", 1.4, green),
        (12.4, 5, "x_proj", 2.2, grey),
        (15.2, 5, "Δ  B  C", 2.6, blue),
    ]
    arrows = [
        ((1, 2.5), (2, 2.5)),
        ((4.6, 2.5), (5.5, 2.5)),
        ((7.7, 2.5), (8.6, 3.5)),
        ((7.7, 2.5), (8.6, 1.5)),
        ((9.5, 3.5), (10.3, 3.5)),
        ((12.4, 3.5), (13.1, 3.5)),
        ((14.7, 3.5), (15.5, 3.5)),
        ((9.5, 1.5), (13.2, 1.5)),
        ((14.8, 1.5), (18.3, 2.35)),
        ((17.5, 3.5), (18.3, 2.75)),
        ((19.2, 2.5), (19.9, 2.5)),
        ((22.4, 2.5), (23, 2.5)),
        ((23.8, 2.5), (24.6, 2.5)),
        ((13.9, 4), (13.9, 5)),
        ((14.6, 5.5), (15.2, 5.5)),
        ((16.5, 5), (16.5, 4)),
    ]
    fig, ax = cells.board(26.2, 6.2)
    fig.set_size_inches(8.8, 8.8 * 6.2 / 26.2)
    for x, y, text, width, colour in boxes:
        cells.cells(ax, x, y, [text], colour, width=width)
    for begin, end in arrows:
        cells.arrow(ax, begin, end)
    ax.plot([0.5, 0.5, 23.4], [2, 0.3, 0.3], color=grey, linewidth=1.3)
    cells.arrow(ax, (23.4, 0.3), (23.4, 2))
    cells.say(ax, 5.05, 2.75, "u", grey, ha="center")
    cells.say(ax, 11.2, 0.65, "residual, float32", grey, ha="center")
    cells.say(ax, 18.1, 5.5, "the selection: from x itself", grey)
    return fig


def parameters():
    """How many parameters of a block each part of the shipped model has."""
    layer = _model()[0].backbone.layers[0]
    counts: dict[str, int] = {}
    for name, p in layer.named_parameters():
        part = name.removeprefix("mixer.").split(".")[0]
        counts[part] = counts.get(part, 0) + p.numel()
    names, total = sorted(counts, key=counts.get, reverse=True), sum(counts.values())
    fig, ax = _figure(height=3.3)
    plain = ("in_proj", "out_proj")
    bars = ax.barh(
        names,
        [counts[name] for name in names],
        height=0.68,
        color=[plots.GREY if name in plain else plots.STATE for name in names],
    )
    ax.bar_label(bars, [f" {counts[name]:,}   {counts[name] / total:.1%}" for name in names])
    ax.invert_yaxis()
    ax.set(xlabel="parameters in a block", xlim=(0, 1.28 * max(counts.values())))
    ax.xaxis.set_major_formatter("{x:,.0f}")
    ax.tick_params(axis="y", length=0)
    return fig


def taps():
    """The share of the convolution's weight on the present token and on the three before it."""
    layers = _model()[0].backbone.layers
    share = torch.stack(
        [layer.mixer.conv1d.weight[:, 0].abs().mean(0).flip(0) for layer in layers]
    ).detach()
    share = (share / share.sum(1, keepdim=True)).numpy()
    fig, ax = _figure(height=3.0)
    ax.bar(range(share.shape[1]), share.mean(0), color=plots.STATE, width=0.6, label="mean")
    for i, row in enumerate(share):
        ax.plot(
            range(share.shape[1]),
            row,
            "o",
            color=plots.INK,
            markersize=5,
            label=None if i else "a layer",
        )
    ax.set(
        xticks=range(share.shape[1]), xlabel="tokens back", ylabel="share of |tap|", ylim=(0, 0.6)
    )
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    ax.legend(loc="upper right", ncols=2)
    return fig


def gate():
    """SiLU, and what the gates of the shipped model let through on the phrase."""
    v = np.linspace(-6, 6, 300)
    z = torch.cat([inside["z"].flatten() for inside in _insides()])
    let = F.silu(z).numpy()
    fig, (left, right) = _figure(1, 2, height=3.3)
    left.plot(v, v / (1 + np.exp(-v)), color=plots.OUTPUT, linewidth=2.5)
    left.axhline(0, color=plots.PALE, zorder=0)
    left.set(xlabel="z", ylabel="silu(z) = z · sigmoid(z)")
    right.hist(
        let,
        bins=np.linspace(-0.5, 3, 71),
        color=plots.OUTPUT,
        weights=np.full(len(let), 1 / len(let)),
    )
    right.axvspan(-0.3, 0.3, color=plots.STATE, alpha=0.2, linewidth=0)
    right.set(xlabel="silu(z) on the phrase", ylabel="share of all gates", yticks=[])
    right.text(
        0.98,
        0.9,
        f"{np.mean(abs(let) < 0.3):.0%} lie within ±0.3",
        transform=right.transAxes,
        ha="right",
    )
    return fig


def step_size():
    """What a token forgets and writes against delta, for three of a channel's sixteen states."""
    delta = np.geomspace(1e-3, 1, 200)
    fig, ax = _figure(height=3.2)
    for A, alpha in ((1, 1), (4, 0.65), (16, 0.35)):
        ax.plot(
            delta,
            np.exp(-delta * A),
            color=plots.STATE,
            alpha=alpha,
            linewidth=2.5,
            label=f"kept, A = −{A}",
        )
    ax.plot(delta, delta, color=plots.INPUT, linewidth=2.5, label="written: Δ (times B x)")
    ax.axvspan(1e-3, 0.1, color=plots.PALE, alpha=0.6, zorder=0)
    ax.text(1.1e-3, 0.05, " where Δ starts", color=plots.GREY)
    ax.set(xscale="log", xlabel="Δ", ylabel="factor", xlim=(1e-3, 1), ylim=(0, 1.03))
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return fig


def time_scales():
    """How many tokens the states of 512 channels remember, at the start and after training."""
    model = _model()[0]
    torch.manual_seed(0)
    fresh = mamba.MambaLM(model.config).backbone.layers[0].mixer
    inside = _insides()[0]
    panels = (
        (
            "a fresh layer",
            F.softplus(fresh.dt_proj.bias).detach(),
            -torch.exp(fresh.A_log.detach()),
        ),
        ("the shipped model, first layer", inside["delta"].median(0).values, inside["A"].detach()),
    )
    fig, axes = _figure(1, 2, height=3.5, sharey=True)
    for ax, (name, delta, A) in zip(axes, panels):
        kept = (1 / (delta[:, None] * -A))[delta.argsort(descending=True)].numpy()
        slow, fast = kept.max(1), kept.min(1)
        ax.fill_between(range(len(kept)), fast, slow, color=plots.STATE, alpha=0.35, linewidth=0)
        ax.plot(slow, color=plots.STATE, label=f"slowest state: up to {slow.max():,.0f} tokens")
        ax.plot(fast, color=plots.STATE, linestyle=":", label=f"fastest: from {fast.min():.1f}")
        ax.axhline(4, color=plots.INPUT, linewidth=1)
        ax.set(yscale="log", xlabel="channel, sorted by Δ", ylim=(0.1, 3e4))
        ax.set_title(name, fontsize=11)
        ax.legend(loc="upper left", fontsize=10)
    axes[0].text(
        len(kept) - 5,
        3.4,
        "a note, about four tokens",
        color=plots.INPUT,
        va="top",
        ha="right",
        fontsize=9,
    )
    axes[0].set_ylabel("remembers, in tokens")
    return fig


def language_model():
    """Embedding, blocks that add to the residual, norm, and the embedding once more."""
    names = ["block 1", "block 2", "…", f"block {_model()[0].config.n_layer}"]
    wide = 25.6
    fig, ax = cells.board(wide, 4.4)
    fig.set_size_inches(8.4, 8.4 * 4.4 / wide)
    cells.cells(ax, 0, 0.4, ["token"], plots.INPUT, width=2.3)
    cells.cells(ax, 3.2, 0.4, ["embedding"], plots.GREY, width=3.3)
    for place, name in enumerate(names):
        x = 7.6 + 3.1 * place
        if name == "…":
            cells.say(ax, x + 1.1, 3.6, name, plots.STATE)
            continue
        cells.cells(ax, x, 3.1, [name], plots.STATE, width=2.6)
        cells.arrow(ax, (x, 0.9), (x + 0.9, 3.05))
        cells.arrow(ax, (x + 1.8, 3.05), (x + 2.7, 0.95), plots.STATE)
    end = 7.6 + 3.1 * len(names)
    cells.cells(ax, end + 0.5, 0.4, ["norm"], plots.GREY, width=1.9)
    cells.cells(ax, end + 3.2, 0.4, ["logits"], plots.OUTPUT, width=2.3)
    for a, b in ((2.3, 3.2), (end + 2.4, end + 3.2)):
        cells.arrow(ax, (a, 0.9), (b, 0.9))
    cells.arrow(ax, (6.5, 0.9), (end + 0.5, 0.9))
    cells.say(ax, 7.6, 0.25, "the residual stream, a sum in float32", plots.GREY)
    cells.say(
        ax,
        end + 0.3,
        3.2,
        "the embedding again:\nhow well does the\nvector point its way?",
        plots.GREY,
    )
    return fig


# ---- step by step ----------------------------------------------------------------------------


@torch.no_grad()
def step_and_forward():
    """The largest difference of logits between `step` and `forward`, position by position."""
    model, tokenizer = _model()
    ids = torch.tensor(tokenizer.encode(_heard()).astype(int))[:513]
    whole, state, apart = model(ids[None])[0], model.new_state(1), []
    for t, token in enumerate(ids):
        logits, state = model.step(token[None], state)
        apart.append((logits[0] - whole[t]).abs().max().item())
    fig, ax = _figure(height=3.1)
    ax.axhspan(1, whole.abs().max().item(), color=plots.PALE, alpha=0.6, linewidth=0)
    ax.text(len(ids), 2.5, "the size of the logits", color=plots.GREY, ha="right", va="center")
    ax.plot(np.maximum(apart, 1e-8), ".", color=plots.OUTPUT, markersize=4)
    ax.set(
        yscale="log",
        ylim=(1e-7, 40),
        xlabel="position",
        ylabel="max |difference|",
        xlim=(0, len(ids)),
    )
    return fig


def tokens_a_second():
    """Tokens a second against the position in the piece, as measured."""
    fig, ax = _figure(height=3.9)
    generate_bench.draw(env.read_results("generate_cpu_2_cores"), ax=ax)
    ax.set_title("")
    return fig


def memory():
    """What must be kept at each position: the state, and GPT-2's cache, as measured."""
    result = env.read_results("generate_cpu_2_cores")
    fig, ax = _figure(height=3.4)
    for name, label, look, colour in (
        ("gpt2", "GPT-2's cache", "s--", plots.OTHER[0]),
        ("stepper", "Mamba's state", "o-", plots.STATE),
    ):
        rows = sorted(
            (row["position"], row["cache_bytes"] / 2**20)
            for row in result["rows"]
            if row["contender"] == name
        )
        ax.plot(*zip(*rows), look, color=colour, linewidth=2.5, label=label)
        for position, size in rows:
            ax.annotate(
                f"{size:,.{0 if size > 9 else 1}f}",
                (position, size),
                xytext=(0, 8),
                textcoords="offset points",
                ha="center",
                color=colour,
            )
    ax.set(
        xscale="log",
        yscale="log",
        xlabel="tokens in the piece so far",
        ylabel="MiB kept",
        ylim=(0.1, 1500),
    )
    positions = result["positions"]
    ax.set_xticks(positions, [f"{p:,}" for p in positions])
    ax.minorticks_off()
    ax.yaxis.set_major_formatter("{x:g}")
    ax.legend(loc="upper left")
    return fig


# ---- what the state shows ---------------------------------------------------------------------


def states():
    """48 single states of one layer over 160 tokens, sorted by how long they remember."""
    inside = _insides()[1]
    memory = (1 / (inside["delta"].median(0).values[:, None] * -inside["A"])).detach().flatten()
    chosen = memory.argsort()[torch.linspace(0, len(memory) - 1, 48).long()]
    rows = inside["h"].flatten(1)[:, chosen].T.detach()
    rows = rows / rows.abs().amax(1, keepdim=True)
    alike = (rows[:, 1:] * rows[:, :-1]).sum(1) / (rows * rows).sum(1)  # 1: unchanged a token later
    fig, ax = _figure(height=4.1)
    image = ax.imshow(
        rows[:, :160].numpy(),
        cmap="PuOr_r",
        vmin=-1,
        vmax=1,
        aspect="auto",
        interpolation="nearest",
    )
    ticks = [0, 12, 24, 36, 47]
    ax.set_yticks(ticks, [f"{memory[chosen[i]]:,.{int(i < 12)}f}" for i in ticks])
    ax.set(xlabel="tokens read", ylabel="remembers, in tokens")
    for row, some, name in ((7.5, alike[:16], "fast"), (39.5, alike[32:], "slow")):
        ax.text(
            162,
            row,
            f"{name}: {some.mean():.2f}\nalike, one\ntoken later",
            va="center",
            clip_on=False,
            fontsize=10,
        )
    fig.colorbar(image, ax=ax, pad=0.13, aspect=24, label="state, of its largest")
    return fig


# ---- sound ----------------------------------------------------------------------------------


def phrase_by_liszt():
    """The first ten seconds of the phrase, as the pianist played it."""
    return crop(_phrase()[0], 0, 10)
