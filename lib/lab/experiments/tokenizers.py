"""Part (d), second protocol: grids, vocabularies and languages of tokens,
by the likelihood of the same music.

Mamba of one size reads the same number of notes through each tokenizer, without augmentation
(which on merged tokens cannot be done as they are read), with several seeds and at two budgets.
Bits per note are compared at 10 ms: a coarser grid pays what it would take to say where in its
cells each note lies.

REMI counts bars of two seconds in which nothing in the music begins. TSD says how long it is to the
next note instead, and MIDI-Like when each key is let go: what is a bar that means nothing worth?

Equal notes are not equal work, since tokenizers differ in tokens a note and in the size of the
output layer. So the bits are also put at equal operations, by what a doubling of the notes was
worth to each.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
from typing_extensions import TypedDict

from lib.env.errors import UserError
from lib.env.schema import Number
from lib.lab.experiments.entries import kept_as, settings
from lib.lab.experiments.intervals import difference, interval, mean_bits, show, show_difference
from lib.lab.experiments.runs import Spec, completed
from lib.lab.experiments.tokens import drawn
from lib.lab.judge.likelihood import dequantisation_bits
from lib.lab.rivals.arithmetic import operations
from lib.lab.rivals.matched import build
from lib.lab.rivals.windows import model_bits
from lib.train.bits import counting_baselines


class Kept(TypedDict):
    """What is kept of a run: what it was, and the bits of each measured piece."""

    spec: dict
    bits: list[Number]


@dataclass(frozen=True)
class Arm:
    """A way to write music down."""

    kind: str  # "REMI", "TSD" or "MIDILike"
    grid_ms: float
    merges: int | None  # the size of the vocabulary after byte-pair encoding; None: base tokens

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.grid_ms:g}ms-{self.merges or 'base'}"


def arms(lab) -> list[Arm]:
    """The first is what all others are compared with."""
    chosen = lab.protocol.tokenizers
    fine = lab.protocol.grid_ms
    found = [Arm("REMI", fine, None)]
    found += [Arm(kind, fine, None) for kind in chosen.kinds]
    found += [Arm("REMI", fine, merges) for merges in chosen.vocabularies]
    found += [Arm("REMI", grid, None) for grid in chosen.grids]
    return found


def run(lab) -> dict:
    """One row an arm, written when all have ended."""
    chosen = lab.protocol.tokenizers
    ways = arms(lab)
    for arm in ways:  # one by one: runs share them
        lab.left()
        data(lab, arm)
    items = [(arm, seed, notes) for seed in chosen.seeds for notes in chosen.notes for arm in ways]
    found = dict(zip(items, lab.all(measured, items), strict=True))
    rows = [row(lab, arm, found) for arm in ways]
    notes = np.array(rows[0]["notes"])
    first = rows[0]
    for one in rows:
        share = first["operations_a_note"] / one["operations_a_note"]
        # the same seeds at both budgets, so that the luck of a doubling is in the interval
        moved = np.array(one["bits"]) + math.log2(share) * np.array(one["doubling_bits"])
        one["equal_operations"] = mean_bits(moved, notes)
        one["first_minus_this"] = difference(np.array(first["bits"]), np.array(one["bits"]), notes)
        one["first_minus_this_at_equal_operations"] = difference(
            np.array(first["bits"]), moved, notes
        )
    result = {"rows": rows}
    lab.write("tokenizers", result)
    return result


def row(lab, arm: Arm, found: dict) -> dict:
    """What an arm came to, over its seeds."""
    chosen = lab.protocol.tokenizers
    streams, tokenizer = data(lab, arm)
    pieces = drawn(streams.select("validation"), chosen.measured)
    notes = np.array([piece.notes for piece in pieces])
    bits = {
        budget: np.array([found[arm, seed, budget] for seed in chosen.seeds])
        for budget in chosen.notes
    }
    means = [mean_bits(bits[budget], notes) for budget in chosen.notes]
    rate = streams.tokens_a_note()
    config = lab.protocol.config
    model = build("mamba", streams.vocab_size, lab.protocol.size)
    kept = sum(tokenizer.notes_of[streams.stream(piece)].sum() for piece in pieces)
    few, many = chosen.notes[-2:]
    longest = bits[many]
    doubling = (longest - bits[few]) / math.log2(many / few)
    return {
        "kind": arm.kind,
        "grid_ms": arm.grid_ms,
        "bpe": arm.merges,
        "vocabulary": streams.vocab_size,
        "tokens_a_note": rate,
        "parameters": model.parameter_count(),
        "operations_a_note": operations(model, config.length, config.carry) * rate,
        "notes_kept": float(kept / notes.sum()),  # two strokes of a key can fall into one step
        "notes": notes.tolist(),
        "bits": longest.round(3).tolist(),  # at 10 ms, (seeds, pieces)
        "bits_per_note": means[-1],
        "interval_95": interval(longest, notes),
        "curve": list(zip(chosen.notes, means, strict=True)),
        "doubling_bits": doubling.round(3).tolist(),  # of its notes, (seeds, pieces)
        "doubling": mean_bits(doubling, notes),
        "bigram": counting_baselines(streams, pieces)["bigram"],
    }


def measured(lab, item: tuple[Arm, int, int]) -> list[float]:
    """Bits of each measured piece at 10 ms, of an arm trained with this seed on so many notes.

    They are kept.
    """
    arm, seed, notes = item
    streams, tokenizer = data(lab, arm)
    config = lab.protocol.config
    steps = round(notes * streams.tokens_a_note() / (config.batch * config.length))
    config = replace(
        config,
        transpose=0,
        louder=0,
        **settings(lab, "mamba"),
        dropout=lab.protocol.size.dropout,
        steps=max(1, steps),
        seed=seed,
    )
    name = f"tokenizers/{arm.name}-{notes}-seed{seed}"
    one = Spec(name, "mamba", lab.protocol.size, config)
    pieces = drawn(streams.select("validation"), lab.protocol.tokenizers.measured)

    facts = one.facts(streams) | {"measured": len(pieces)}

    def work():
        model = lab.model(one, streams)
        added = [dequantisation_bits(tokenizer, streams.stream(piece)) for piece in pieces]
        return {"spec": facts, "bits": (model_bits(model, streams, pieces) + added).tolist()}

    found = lab.once(kept_as(one), work, Kept)
    if completed(found["spec"]) != facts:
        raise UserError(f"{lab.kept} holds runs of another protocol: choose another --kept")
    return found["bits"]


def data(lab, arm: Arm):
    """(Streams, Tokenizer) of an arm."""
    return lab.streams(arm.grid_ms, arm.merges, kind=arm.kind)


def table(result: dict) -> str:
    """The rows in Markdown."""
    lines = [
        "| language | grid | BPE | tokens a note | bits a note at 10 ms (95 %) | first minus this "
        "| at equal operations |",
        "|---|---|---|---|---|---|---|",
    ]
    first, *_ = result["rows"]
    for one in result["rows"]:
        cells = [
            one["kind"],
            f"{one['grid_ms']:g} ms",
            str(one["bpe"] or "none"),
            f"{one['tokens_a_note']:.2f}",
            show(one),
        ]
        for key in ("first_minus_this", "first_minus_this_at_equal_operations"):
            cells.append("" if one is first else show_difference(one[key]))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
