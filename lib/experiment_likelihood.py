"""Part (a): which architecture predicts held-out music best, at equal tokens and at equal time.

A grid of learning rates for each, at a part of the budget; then both budgets at each one's best rate;
then, once, when all of these have ended, the test split.
"""

from dataclasses import replace

import numpy as np

from lib.baselines import LABELS
from lib.evaluate import counting_baselines, interval
from lib.experiment_runs import Spec, best_model
from lib.windows import model_bits

BUDGETS = ("tokens", "minutes")


def spec(lab, arch: str, *, lr: float, seed: int, budget: str) -> Spec:
    """One run: `budget` is "grid", "tokens" or "minutes"."""
    protocol, chosen = lab.protocol, lab.protocol.likelihood
    config = replace(protocol.config, lr=lr, seed=seed, dropout=protocol.size.dropout)
    if budget == "minutes":
        config = replace(config, minutes=chosen.minutes)
    else:
        tokens = chosen.grid_tokens if budget == "grid" else chosen.tokens
        config = replace(config, steps=max(1, tokens // (config.batch * config.length)))
    return Spec(f"likelihood/{budget}/{arch}-lr{lr:g}-seed{seed}", arch, protocol.size, config)


def seeds(chosen, arch: str) -> tuple[int, ...]:
    """Three for the headline pair, one for the others."""
    return chosen.seeds if arch in chosen.headline else chosen.seeds[:1]


def run(lab) -> dict:
    """Everything, as far as the minutes go; the result is written after every run."""
    chosen, streams = lab.protocol.likelihood, lab.base
    result = lab.read("likelihood") or {"grid": [], "rates": {}, "runs": [], "test": []}
    if result.get("summary"):
        return result
    result |= {"grid": [], "runs": []}  # filled again from the outcomes
    for arch in chosen.archs:
        for lr in chosen.rates:
            one = spec(lab, arch, lr=lr, seed=chosen.seeds[0], budget="grid")
            result["grid"].append(_row(arch, "grid", one, lab.train(one, streams)))
            lab.write("likelihood", result)
        mine = [row for row in result["grid"] if row["arch"] == arch]
        result["rates"][arch] = min(mine, key=lambda row: row["validation_bits_per_note"])["lr"]
    for budget in BUDGETS:
        for arch in sorted(chosen.archs, key=lambda arch: arch not in chosen.headline):
            for seed in seeds(chosen, arch):
                one = spec(lab, arch, lr=result["rates"][arch], seed=seed, budget=budget)
                result["runs"].append(_row(arch, budget, one, lab.train(one, streams)))
                lab.write("likelihood", result)
    result["test"] = open_test(lab, result["runs"])
    result["pieces"], result["counting"] = _pieces(lab), counting_baselines(streams, streams.select("test"))
    result["summary"] = summarise(result, chosen.headline)
    lab.write("likelihood", result)
    return result


def _row(arch: str, budget: str, one: Spec, outcome: dict) -> dict:
    config = one.config
    return {"arch": arch, "budget": budget, "lr": config.lr, "seed": config.seed, "name": one.name,
            **{k: outcome[k] for k in ("body_parameters", "parameters", "steps", "tokens", "training_seconds",
                                       "tokens_per_second", "validation_bits_per_note", "best_step")}}


def _pieces(lab) -> dict:
    """The test pieces, and which of them have a title that is also in another split."""
    test = lab.base.select("test")
    return {"names": [p.name for p in test], "notes": [p.notes for p in test],
            "leaks": [(p.composer, p.title) in lab.leaks for p in test]}


def open_test(lab, runs: list[dict]) -> list[dict]:
    """Bits of every test piece for every run; each is computed once and kept."""
    test, found = lab.base.select("test"), []
    for row in runs:
        def work(name=row["name"]):
            lab.say(f"{name}: test")
            model = best_model(lab.place(name), lab.device)
            return [round(float(bits), 3) for bits in model_bits(model, lab.base, test)]
        found.append({k: row[k] for k in ("arch", "budget", "seed", "name")} | {
            "bits": lab.once(row["name"].replace("/", "-") + "-test", work)})
    return found


def summarise(result: dict, headline: tuple[str, str]) -> dict:
    """Bits per note with intervals over pieces, and paired differences to the headline's first architecture.

    An architecture's bits of a piece are the mean over its seeds. Of a difference the interval is that
    of the pieces' differences: what makes a piece hard for all falls out.
    """
    notes, leaks = np.array(result["pieces"]["notes"]), np.array(result["pieces"]["leaks"], bool)
    summary: dict = {}
    for budget in sorted({row["budget"] for row in result["test"]}):
        bits: dict[str, list] = {}
        for row in result["test"]:
            if row["budget"] == budget:
                bits.setdefault(row["arch"], []).append(np.array(row["bits"]))
        mean = {arch: np.mean(rows, 0) for arch, rows in bits.items()}
        rows = {}
        for arch, mine in mean.items():
            by_seed = [float(one.sum() / notes.sum()) for one in bits[arch]]
            rows[arch] = {"seeds": len(by_seed), "by_seed": by_seed, **_estimate(mine, notes),
                          "without_leaks": _estimate(mine[~leaks], notes[~leaks])}
            if arch != headline[0] and headline[0] in mean:
                both = mean[headline[0]] - mine
                rows[arch]["first_minus_this"] = _estimate(both, notes) | {
                    "without_leaks": _estimate(both[~leaks], notes[~leaks])}
        summary[budget] = rows
    first, second = headline
    primary = summary.get("tokens", {}).get(second, {}).get("first_minus_this")
    return {"budgets": summary, "primary": {"what": f"{first} minus {second}, equal tokens, bits a note", **(primary or {})}}


def _estimate(bits: np.ndarray, notes: np.ndarray) -> dict:
    if not len(bits):  # the sample's only test piece may be one of the leaking titles
        return {"pieces": 0, "bits_per_note": None, "interval_95": None}
    return {"pieces": len(bits), "bits_per_note": float(bits.sum() / notes.sum()), "interval_95": interval(bits, notes)}


def table(result: dict) -> str:
    """The summary in Markdown."""
    lines = ["| budget | architecture | seeds | bits a note, test (95 %) | without leaking titles | Mamba minus this (95 %) |",
             "|---|---|---|---|---|---|"]
    for budget, rows in result["summary"]["budgets"].items():
        for arch, row in sorted(rows.items(), key=lambda item: item[1]["bits_per_note"]):
            difference = row.get("first_minus_this")
            lines.append(f"| equal {budget} | {LABELS[arch]} | {row['seeds']} | {_show(row)} | {_show(row['without_leaks'])} | "
                         f"{_show(difference, '+') if difference else ''} |")
    return "\n".join(lines)


def _show(row: dict, sign: str = "") -> str:
    if row["bits_per_note"] is None:
        return "no piece"
    low, high = row["interval_95"]
    return f"{row['bits_per_note']:{sign}.2f} ({low:{sign}.2f} to {high:{sign}.2f})"
