"""Part (c): how far back a model looks.

Bits per note against position, and against the tokens in reach.

On validation pieces, with the models of the race (all tokens, first seed). The same tokens are
predicted with more and more context: windows read afresh, of which only the second halves count.
"""

import math

import numpy as np

from lib.env.errors import UserError
from lib.lab.experiments.entries import kept_as, shown
from lib.lab.experiments.runs import Spec
from lib.lab.rivals.matched import LABELS
from lib.lab.rivals.windows import token_nats, window_nats
from lib.music.token_names import count_in
from lib.train.batches import base_names, validation_pieces
from lib.train.bits import interval


def run(lab) -> dict:
    """For each architecture of the race both curves; kept one by one."""
    pieces = validation_pieces(lab.base, lab.protocol.context.tokens)
    result = {"pieces": len(pieces), "position": [], "reach": []}
    ones = shown(lab)
    for one, found in zip(ones, lab.all(curves, ones), strict=True):
        for kind in ("position", "reach"):
            result[kind] += [{"arch": one.arch, **row} for row in found[kind]]
    lab.write("context", result)
    return result


def curves(lab, one: Spec) -> dict:
    """Both curves of an architecture, by the weights of this run; kept."""
    chosen = lab.protocol.context

    def work():
        lab.say(f"context: {one.arch}")
        pieces = validation_pieces(lab.base, chosen.tokens)
        return measure(lab.model(one, lab.base), lab.base, pieces, chosen)

    found = lab.once(f"{kept_as(one)}-context", work, dict[str, list[dict]])
    places = [row["from"] for row in found["position"]], [row["tokens"] for row in found["reach"]]
    if places != (list(chosen.bins), list(chosen.lengths)):
        raise UserError(f"{lab.kept} holds curves of another protocol: choose another --kept")
    return found


def measure(model, streams, pieces, chosen) -> dict:
    """Rows of both curves for one model."""
    counts = note_counts(streams)
    # notes that each predicted token begins
    notes = [counts[streams.stream(piece)[1:]] for piece in pieces]
    nats, rows = token_nats(model, streams, pieces), []
    for begin, end in zip(chosen.bins, (*chosen.bins[1:], None)):
        rows.append({"from": begin, "to": end, **_bits(nats, notes, begin, end)})
    reach = []
    for length in chosen.lengths:
        found = window_nats(model, streams, pieces, window=length)
        reach.append({"tokens": length, **_bits(found, notes, max(chosen.lengths), None)})
    return {"position": rows, "reach": reach}


def note_counts(streams) -> np.ndarray:
    """How many notes each base token begins, an integer array of shape (V,)."""
    return count_in([[name] for name in base_names(streams)], "Pitch")


def _bits(nats: list[np.ndarray], notes: list[np.ndarray], begin: int, end: int | None) -> dict:
    """Bits per note of the tokens at positions begin … end of all pieces that are long enough."""
    some = [
        (n[begin:end].sum() / math.log(2), m[begin:end].sum())
        for n, m in zip(nats, notes)
        if m[begin:end].sum()
    ]
    if not some:
        return {"pieces": 0, "bits_per_note": None, "interval_95": None}
    bits, count = (np.array(column, float) for column in zip(*some, strict=True))
    return {
        "pieces": len(some),
        "bits_per_note": float(bits.sum() / count.sum()),
        "interval_95": interval(bits, count),
    }


def table(result: dict) -> str:
    """Bits per note against the tokens in reach, in Markdown."""
    lengths = sorted({row["tokens"] for row in result["reach"]})
    lines = [
        "| architecture | " + " | ".join(f"{n:,} tokens" for n in lengths) + " |",
        "|---" * (1 + len(lengths)) + "|",
    ]
    for arch in dict.fromkeys(row["arch"] for row in result["reach"]):
        found = {
            row["tokens"]: row["bits_per_note"] for row in result["reach"] if row["arch"] == arch
        }
        lines.append(
            f"| {LABELS[arch]} | "
            + " | ".join("no piece" if found[n] is None else f"{found[n]:.2f}" for n in lengths)
            + " |"
        )
    return "\n".join(lines)
