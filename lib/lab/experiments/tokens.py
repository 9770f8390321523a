"""Part (d): what the time grid and byte-pair encoding do to the likelihood of the same music.

Mamba of one size reads the same number of notes through each tokenizer, without augmentation (which
on merged tokens cannot be done as they are read). Bits per note are compared at 10 ms: a coarser
grid pays what it would take to say where in its cells each note lies.
"""

from dataclasses import replace

import numpy as np

from lib.env.schema import Number
from lib.lab.experiments.entries import settings
from lib.lab.experiments.runs import Spec, best_model
from lib.lab.judge.likelihood import dequantisation_bits
from lib.lab.rivals.windows import model_bits
from lib.train.bits import interval


def run(lab) -> dict:
    """One row a tokenizer, written as they come."""
    chosen = lab.protocol.tokens
    result = {
        "rows": lab.all(
            row, [(grid, size) for grid in chosen.grids for size in chosen.vocabularies]
        )
    }
    lab.write("tokens", result)
    return result


def row(lab, item: tuple[float, int | None]) -> dict:
    """Train on one tokenizer's streams, and measure."""
    grid, size = item
    lab.left()
    streams, tokenizer = lab.streams(grid, size)
    validation = drawn(streams.select("validation"), lab.protocol.tokens.measured)
    rate = streams.tokens_a_note()
    config = lab.protocol.config
    config = replace(
        config,
        transpose=0,
        louder=0,
        lr=settings(lab, "mamba")["lr"],
        dropout=lab.protocol.size.dropout,
        steps=max(1, round(lab.protocol.tokens.notes * rate / (config.batch * config.length))),
    )
    one = Spec(f"tokens/{grid:g}ms-{size or 'base'}", "mamba", lab.protocol.size, config)
    outcome = lab.train(one, streams)
    kept = bits_of(lab, one, streams, tokenizer, validation)
    bits, added = np.array(kept["bits"]), np.array(kept["added"])
    notes = np.array([p.notes for p in validation])
    return {
        "grid_ms": grid,
        "bpe": size,
        "vocabulary": streams.vocab_size,
        "tokens_per_note": rate,
        "parameters": outcome["parameters"],
        "tokens": outcome["tokens"],
        "pieces": len(notes),
        # on a coarse grid two strokes of one key can fall into one step
        "notes_kept": float(
            sum(tokenizer.notes_of[streams.stream(p)].sum() for p in validation) / notes.sum()
        ),
        "native_bits_per_note": float(bits.sum() / notes.sum()),
        "added_bits_per_note": float(added.sum() / notes.sum()),
        "bits_per_note_10_ms": float((bits + added).sum() / notes.sum()),
        "interval_95": interval(bits + added, notes),
    }


def drawn(pieces: list, count: int | None) -> list:
    """So many of the pieces, drawn by their names,
    so the same performances whatever the tokens; in order.
    """
    names = sorted(piece.name for piece in pieces)
    chosen = set(np.random.default_rng(4).permutation(names)[:count].tolist())
    return [piece for piece in pieces if piece.name in chosen]


def bits_of(lab, one: Spec, streams, tokenizer, pieces) -> dict:
    """Bits of each piece on its own grid, and what is added to say them at 10 ms; kept."""

    def work():
        model = best_model(lab.place(one.name), lab.device)
        return {
            "bits": model_bits(model, streams, pieces).tolist(),
            "added": [dequantisation_bits(tokenizer, streams.stream(p)) for p in pieces],
        }

    return lab.once(one.name.replace("/", "-"), work, dict[str, list[Number]])


def table(result: dict) -> str:
    """The rows in Markdown."""
    lines = [
        "| grid | BPE | vocabulary | tokens a note | bits a note, own grid "
        "| bits a note at 10 ms (95 %) | tokens |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        low, high = row["interval_95"]
        lines.append(
            f"| {row['grid_ms']:g} ms | {row['bpe'] or 'none'} | {row['vocabulary']:,} | "
            f"{row['tokens_per_note']:.2f} | {row['native_bits_per_note']:.2f} | "
            f"{row['bits_per_note_10_ms']:.2f} ({low:.2f} to {high:.2f}) | {row['tokens']:,} |"
        )
    return "\n".join(lines)
