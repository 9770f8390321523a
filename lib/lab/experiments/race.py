"""Part (a): which architecture predicts held-out music best.

Each architecture searches its learning rate and warm-up on validation pieces, at a quarter of the
budget and then with whole runs of the first seed. Then all train at their best, with several
seeds; and with the first seed at shorter budgets too. These read the test split as they end:
nothing is chosen by it, though the rules of the whole runs were added when the test bits of the
first ones were known (`lib.lab.experiments.protocol`). An n-gram that was only counted is the
floor.

A day of one core goes into it. What a run that has ended leaves is a small file or two;
where they lie, no machine trains it again:
`python -m lib.lab.experiments --only race --jobs 2 --kept data/results/race`.

Two budgets are compared: equal tokens, and equal arithmetic. For the second no model is trained
again: from its bits at two budgets follows what a doubling of its tokens is worth to it, and so
what it would have had with the tokens that as many operations as Mamba's allow. That worth is the
difference of two single runs, and how far single runs lie apart is in the intervals.
"""

import math
from collections.abc import Iterable
from contextlib import suppress

import numpy as np

from lib.env.errors import UserError
from lib.env.schema import Amount
from lib.lab.experiments import context, playing
from lib.lab.experiments.entries import (
    best_of,
    entries,
    is_shown,
    is_whole,
    kept_as,
    near,
    tied,
    trial,
    whole,
)
from lib.lab.experiments.intervals import (
    Spread,
    difference,
    interval,
    mean_bits,
    show,
    show_difference,
    spread,
)
from lib.lab.experiments.runs import OutOfTime, Spec, completed
from lib.lab.rivals.arithmetic import operations
from lib.lab.rivals.matched import LABELS, build
from lib.lab.rivals.ngram import NGram
from lib.lab.rivals.windows import model_bits
from lib.train.bits import counting_baselines

KEPT = ("body_parameters", "parameters", "steps", "tokens", "validation_bits_per_note", "best_step")


def run(lab) -> dict:
    """Everything, as far as the minutes go; the result is written after every stage.

    Where they end among the seeds, what has ended is summed up, and `left` names the other runs.
    Raises `OutOfTime` then.
    """
    chosen = lab.protocol.race
    result = lab.read("race") or {}
    if result.get("summary") and not result["left"]:
        return result
    result["trials"] = search(lab)
    result["whole"], result["best"] = choose(lab, result["trials"])
    result["beyond"] = look_beyond(lab, result["best"])
    lab.write("race", result)
    planned = list(entries(lab, result["best"]))
    with suppress(OutOfTime):
        lab.all(judged, planned)
    ended = [one for one in planned if has_ended(lab, one)]
    result["left"] = [one.name for one in planned if one not in ended]
    if {one.arch for one in ended if is_whole(lab, one)} != set(chosen.archs):
        raise OutOfTime
    found = [tested(lab, one) for one in ended]
    result["runs"], result["test"] = map(list, zip(*found, strict=True))
    result |= floor(lab)
    result["operations"] = {arch: counted(lab, arch) for arch in chosen.archs}
    result["summary"] = summarise(result, chosen.headline[0])
    lab.write("race", result)
    if result["left"]:
        raise OutOfTime
    return result


def search(lab) -> list[dict]:
    """The trials: all rates, further rates where the best lies at an edge,
    then the other warm-ups at the best.
    """
    chosen = lab.protocol.race
    first, *others = chosen.warmups
    rows = lab.all(
        trained, [trial(lab, arch, lr, first) for arch in chosen.archs for lr in chosen.rates]
    )

    for _ in range(chosen.widest):
        rates = {arch: beyond(rows_of(rows, arch)) for arch in chosen.archs}
        rows += lab.all(trained, [trial(lab, arch, lr, first) for arch, lr in rates.items() if lr])
    best = {arch: best_of(rows_of(rows, arch))["lr"] for arch in chosen.archs}
    rows += lab.all(
        trained, [trial(lab, arch, best[arch], share) for arch in chosen.archs for share in others]
    )
    return rows


def choose(lab, trials: list[dict]) -> tuple[list[dict], dict[str, dict]]:
    """Whole runs of the first seed, and the rate and warm-up of each architecture's best.

    A trial is too short to tell: Mamba's gained 0.13 bits by a longer warm-up, its whole run 0.36.
    So rates that tie in the trials train whole runs, and those that tie in these train another
    with a longer warm-up, where the longest was the better one.
    """
    chosen = lab.protocol.race
    longest = max(chosen.warmups)
    found = {arch: tied(rows_of(trials, arch), chosen.tie) for arch in chosen.archs}
    rows = lab.all(trained, [whole(lab, arch, one) for arch in found for one in found[arch]])
    alike = [
        row
        for arch in chosen.archs
        for row in near(rows_of(rows, arch), chosen.tie)
        if row["warmup"] == longest
    ]
    rows += lab.all(trained, [longer(lab, row) for row in alike])
    return rows, {arch: best_of(rows_of(rows, arch)) for arch in chosen.archs}


def look_beyond(lab, best: dict[str, dict]) -> list[dict]:
    """The primary comparison with a warm-up that is longer once more: does the choice end too soon?

    Nothing is chosen by these runs, as no other architecture has them.
    """
    chosen = lab.protocol.race
    ones = [{"arch": arch, **best[arch]} for arch in chosen.headline[:2]]
    last = [one for one in ones if one["warmup"] > max(chosen.warmups)]
    return lab.all(trained, [longer(lab, one) for one in last])


def longer(lab, row: dict) -> Spec:
    """The whole run of this architecture and rate with a longer warm-up."""
    warmup = lab.protocol.race.longer * row["warmup"]
    return whole(lab, row["arch"], {"lr": row["lr"], "warmup": warmup})


def rows_of(rows: list[dict], arch: str) -> list[dict]:
    """The rows of one architecture."""
    return [row for row in rows if row["arch"] == arch]


def beyond(rows: list[dict]) -> float | None:
    """Half or twice the best of the rates tried where it is the least or the largest, else None."""
    bits = {row["lr"]: row["validation_bits_per_note"] for row in rows}
    best = min(bits, key=bits.get)
    if best == max(bits):
        return 2 * best
    if best == min(bits):
        return best / 2
    return None


def trained(lab, one: Spec) -> dict:
    """The row of a run, trained where it is not there yet; kept."""
    facts = one.facts(lab.base)

    def work():
        outcome = lab.train(one, lab.base)
        curve = [[row["tokens"], row["validation_bits_per_note"]] for row in outcome["log"]]
        return {"spec": facts, **{key: outcome[key] for key in KEPT}, "curve": curve}

    found = lab.once(kept_as(one), work)
    if completed(found.pop("spec")) != facts:
        raise UserError(f"{lab.kept} holds runs of another protocol: choose another --kept")
    config = one.config
    choices = {"lr": config.lr, "warmup": config.warmup, "seed": config.seed, "name": one.name}
    known = {key: found[key] for key in (*KEPT, "curve")}  # older files have a speed as well
    return {"arch": one.arch, **choices, **known}


def has_ended(lab, one: Spec) -> bool:
    """Is a run trained, and tested?"""
    return (lab.kept / f"{kept_as(one)}-test.json").exists()


def judged(lab, one: Spec) -> tuple[dict, list[float]]:
    """`tested`, and what other parts need of the weights, while the machine still has them."""
    found = tested(lab, one)
    if is_shown(lab, one):
        context.curves(lab, one)
        if not lab.base_folder:  # a machine without the music libraries reads streams alone
            playing.continued(lab, one)
    return found


def tested(lab, one: Spec) -> tuple[dict, list[float]]:
    """The row of a run, and its bits of every test piece, from which nothing is chosen; kept."""

    def test():
        lab.say(f"{one.name}: test")
        found = model_bits(lab.model(one, lab.base), lab.base, lab.base.select("test"))
        return [round(float(bits), 3) for bits in found]

    row = trained(lab, one)
    return row, lab.once(f"{kept_as(one)}-test", test, list[Amount])


# ---- floors and arithmetic -------------------------------------------------------------------


def floor(lab) -> dict:
    """The test pieces, and what models that only count need for them."""
    test = lab.base.select("test")
    notes = [piece.notes for piece in test]
    found = lab.once("race-ngram", lambda: counted_grams(lab))
    counting = counting_baselines(lab.base, test)
    counting[f"{found['order']}-gram"] = sum(found["bits"]) / sum(notes)
    return {
        "pieces": {
            "names": [piece.name for piece in test],
            "notes": notes,
            "leaks": [(piece.composer, piece.title) in lab.leaks for piece in test],
        },
        "counting": counting,
        "ngram": found,
    }


def counted_grams(lab) -> dict:
    """The n-gram, counted on the whole train split, and its bits of each test piece.

    Validation chooses each order's doubt, from the lowest on, and then the order.
    """
    streams, chosen = lab.base, lab.protocol.race
    train = [streams.stream(piece) for piece in streams.select("train")]
    longest = NGram(max(chosen.orders), streams.vocab_size).fit(train)
    held_out = streams.select("validation")
    notes = sum(piece.notes for piece in held_out)

    def bits_a_note(doubt: list[float]) -> float:
        model = longest.shorter(len(doubt), doubt)
        return sum(model.bits(streams.stream(piece)) for piece in held_out) / notes

    doubts: list[float] = []
    validation = {}
    for order in range(1, max(chosen.orders) + 1):
        tried = {one: bits_a_note([*doubts, one]) for one in chosen.doubts}
        doubts.append(min(tried, key=tried.get))
        if order in chosen.orders:
            validation[order] = min(tried.values())
    best = min(validation, key=validation.get)
    model = longest.shorter(best, doubts[:best])
    bits = [model.bits(streams.stream(piece)) for piece in streams.select("test")]
    return {"order": best, "doubt": doubts, "validation": validation, "bits": bits}


def counted(lab, arch: str) -> float:
    """Operations for each token of a training step."""
    model = build(arch, lab.base.vocab_size, lab.protocol.size)
    config = lab.protocol.config
    return operations(model, config.length, config.carry)


# ---- the summary -----------------------------------------------------------------------------


def summarise(result: dict, first: str) -> dict:
    """For both budgets a row each: bits a note, and the difference between `first` and it."""
    notes = np.array(result["pieces"]["notes"])
    honest = ~np.array(result["pieces"]["leaks"], bool)
    models = whole_runs(result)
    curves = {arch: curve(result, arch) for arch in models}
    worth = {arch: doubling(points) for arch, points in curves.items()}
    one_run = pooled(models.values(), notes)
    budgets = {}
    for budget in ("tokens", "arithmetic"):
        rows = {}
        for arch, mine in models.items():
            tokens = max(row["tokens"] for row in result["runs"] if row["arch"] == arch)
            luck = None
            if budget == "arithmetic":
                if worth[arch] is None:
                    continue
                share = result["operations"][first] / result["operations"][arch]
                tokens, doublings = share * tokens, math.log2(share)
                # bits of each piece with so many more tokens
                mine = mine + doublings * worth[arch] * notes
                if one_run:  # what a doubling is worth is the difference of two single runs
                    luck = 2 * doublings**2 * one_run[0], one_run[1]
            rows[arch] = {
                "tokens": tokens,
                **estimate(mine, notes, luck),
                "without_leaks": estimate(mine[:, honest], notes[honest], luck),
            }
            if arch != first:
                rows[arch]["first_minus_this"] = difference(models[first], mine, notes, luck=luck)
        budgets[budget] = rows
    return {"first": first, "budgets": budgets, "curves": curves, "doubling": worth}


def pooled(models: Iterable[np.ndarray], notes: np.ndarray) -> Spread | None:
    """The variance of a single run's bits a note, by the seeds of all architectures together."""
    found = [spread(bits, notes) for bits in models if len(bits) > 1]
    free = sum(degrees for _, degrees in found)
    if not free:
        return None
    # s² / n of n seeds
    squares = sum(variance * (degrees + 1) * degrees for variance, degrees in found)
    return squares / free, free


def whole_runs(result: dict) -> dict[str, np.ndarray]:
    """Bits of each test piece by the runs of all tokens, (seeds, pieces) of each architecture."""
    longest = max(row["steps"] for row in result["runs"])
    bits: dict[str, list] = {}
    for row, found in zip(result["runs"], result["test"], strict=True):
        if row["steps"] == longest:
            bits.setdefault(row["arch"], []).append(found)
    return {arch: np.array(rows) for arch, rows in bits.items()}


def curve(result: dict, arch: str) -> list[tuple[int, float]]:
    """(tokens, bits a note on the test pieces) of an architecture's first seed, at every budget."""
    total = sum(result["pieces"]["notes"])
    seed = min(row["seed"] for row in result["runs"])
    points = {
        row["tokens"]: sum(bits) / total
        for row, bits in zip(result["runs"], result["test"], strict=True)
        if row["arch"] == arch and row["seed"] == seed
    }
    return sorted(points.items())


def doubling(points: list[tuple[int, float]]) -> float | None:
    """Bits a note that the last doubling of the tokens brought: a line through the last two
    budgets. None where there is one alone.
    """
    if len(points) < 2:
        return None
    (few, before), (many, after) = points[-2:]
    return (after - before) / math.log2(many / few)


def estimate(bits: np.ndarray, notes: np.ndarray, luck: Spread | None = None) -> dict:
    """Bits a note, of every seed too, with the interval: bits (seeds, pieces), notes (pieces,)."""
    if not len(notes):  # the sample's only test piece may be one of the leaking titles
        return {"pieces": 0, "bits_per_note": None, "interval_95": None}
    return {
        "pieces": len(notes),
        "seeds": len(bits),
        "by_seed": [float(one.sum() / notes.sum()) for one in bits],
        "bits_per_note": mean_bits(bits, notes),
        "interval_95": interval(bits, notes, luck=luck),
    }


def table(result: dict) -> str:
    """The summary in Markdown."""
    first = LABELS[result["summary"]["first"]]
    lines = [
        f"| equal | architecture | seeds | bits a note, test (95 %) | {first} minus this (95 %) "
        "| p, over seeds |",
        "|---|---|---|---|---|---|",
    ]
    for budget, rows in result["summary"]["budgets"].items():
        for arch, row in sorted(rows.items(), key=lambda item: item[1]["bits_per_note"]):
            found = row.get("first_minus_this")
            gap = show_difference(found) if found else ""
            p = "" if not found else "one seed" if found["p"] is None else f"{found['p']:.2g}"
            lines.append(
                f"| {budget} | {LABELS[arch]} | {row['seeds']} | {show(row)} | {gap} | {p} |"
            )
    for name, bits in result["counting"].items():
        lines.append(f"| | {name}, counted | | {bits:.2f} | | |")
    return "\n".join(lines)
