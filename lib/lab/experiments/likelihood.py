"""Part (a): which architecture predicts held-out music best, at equal tokens and at equal time.

A grid of learning rates for each, at a part of the budget; then both budgets at each one's best
rate; then, once, when all of these have ended, the test split. Equal time is that which the first
of the headline pair takes for its tokens, at speeds that are measured side by side before the runs.
"""

from dataclasses import replace
from functools import partial
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated

import numpy as np
import torch
from pydantic import Field

from lib.env.errors import UserError
from lib.env.schema import Amount
from lib.lab.bench.timing import stopwatch, take_turns
from lib.lab.experiments.intervals import show
from lib.lab.experiments.runs import Run, Spec, best_model
from lib.lab.rivals.matched import LABELS
from lib.lab.rivals.windows import model_bits
from lib.train.bits import counting_baselines, interval

BUDGETS = ("tokens", "minutes")
Speeds = dict[str, Annotated[float, Field(gt=0, le=1e12)]]  # tokens a second


def spec(lab, arch: str, *, lr: float, seed: int, budget: str, speeds: dict | None = None) -> Spec:
    """One run: `budget` is "grid", "tokens" or "minutes", which needs the tokens a second of all.

    Runs of the same number of steps are one run.
    """
    protocol, chosen = lab.protocol, lab.protocol.likelihood
    tokens = chosen.grid_tokens if budget == "grid" else chosen.tokens
    if budget == "minutes":
        tokens = tokens * speeds[arch] / speeds[chosen.headline[0]]
    steps = max(1, int(tokens // (protocol.config.batch * protocol.config.length)))
    config = replace(protocol.config, lr=lr, seed=seed, dropout=protocol.size.dropout, steps=steps)
    return Spec(f"likelihood/{arch}-lr{lr:g}-seed{seed}-steps{steps}", arch, protocol.size, config)


def measure_speeds(lab) -> dict[str, float]:
    """Tokens a second of each architecture's training steps:
    medians of rounds in which all take turns.

    On as many threads as a run has.
    """
    chosen, config, threads = lab.protocol.likelihood, lab.protocol.config, torch.get_num_threads()
    torch.set_num_threads(lab.threads)
    with TemporaryDirectory() as folder:
        runs = {
            arch: Run(
                spec(lab, arch, lr=chosen.rates[0], seed=0, budget="grid"),
                lab.base,
                folder,
                device=lab.device,
                say=lambda text: None,
            )
            for arch in chosen.archs
        }
        # a step asks for the loss: it waits for a GPU
        steps = {arch: partial(stopwatch("cpu"), one.train_step) for arch, one in runs.items()}
        times, failed = take_turns(steps, dict.fromkeys(steps, chosen.rounds + 1))
    torch.set_num_threads(threads)
    if failed:
        arch, reason = next(iter(failed.items()))
        raise UserError(f"the speed of {arch} could not be measured: {reason}")
    tokens = config.batch * config.length
    return {
        arch: 1e3 * tokens / median(values[1:]) for arch, values in times.items()
    }  # the first warms up


def seeds(chosen, arch: str) -> tuple[int, ...]:
    """Three for the headline pair, one for the others."""
    return chosen.seeds if arch in chosen.headline else chosen.seeds[:1]


def run(lab) -> dict:
    """Everything, as far as the minutes go; the result is written after every stage."""
    chosen, streams = lab.protocol.likelihood, lab.base
    result = lab.read("likelihood") or {
        "speeds": {},
        "grid": [],
        "rates": {},
        "runs": [],
        "test": [],
    }
    if result.get("summary"):
        return result
    result["speeds"] = lab.once("speeds", lambda: measure_speeds(lab), Speeds)
    result["minutes"] = chosen.tokens / result["speeds"][chosen.headline[0]] / 60
    grid = [
        ("grid", spec(lab, arch, lr=lr, seed=chosen.seeds[0], budget="grid"))
        for arch in chosen.archs
        for lr in chosen.rates
    ]
    result["grid"] = trained(lab, grid, result["speeds"])
    for arch in chosen.archs:
        mine = [row for row in result["grid"] if row["arch"] == arch]
        result["rates"][arch] = min(mine, key=lambda row: row["validation_bits_per_note"])["lr"]
    lab.write("likelihood", result)
    result["runs"] = trained(
        lab,
        [
            (
                budget,
                spec(
                    lab,
                    arch,
                    lr=result["rates"][arch],
                    seed=seed,
                    budget=budget,
                    speeds=result["speeds"],
                ),
            )
            for budget in BUDGETS
            for arch in sorted(chosen.archs, key=lambda arch: arch not in chosen.headline)
            for seed in seeds(chosen, arch)
        ],
        result["speeds"],
    )
    lab.write("likelihood", result)
    result["checks"] = checks(lab, result)
    lab.write("likelihood", result)
    result["test"] = open_test(lab, result["runs"])
    result["pieces"], result["counting"] = (
        _pieces(lab),
        counting_baselines(streams, streams.select("test")),
    )
    result["summary"] = summarise(result, chosen.headline)
    lab.write("likelihood", result)
    return result


def checks(lab, result: dict) -> list[dict]:
    """The headline pair, first seed, with a longer warm-up and all else equal;
    judged on validation only.
    """
    chosen, rows = lab.protocol.likelihood, []
    for arch in chosen.headline:
        one = spec(lab, arch, lr=result["rates"][arch], seed=chosen.seeds[0], budget="tokens")
        rows.append(
            (
                "check",
                replace(
                    one,
                    name=f"{one.name}-warmup{chosen.warmup:g}",
                    config=replace(one.config, warmup=chosen.warmup),
                ),
            )
        )
    return [row | {"warmup": chosen.warmup} for row in trained(lab, rows, result["speeds"])]


def train_one(lab, one: Spec) -> dict:
    """A run on the base streams."""
    return lab.train(one, lab.base)


def trained(lab, runs: list[tuple[str, Spec]], speeds: dict[str, float]) -> list[dict]:
    """A row each; those with the same name are trained once, the longest first."""
    specs = sorted(
        {one.name: one for _, one in runs}.values(),
        key=lambda one: -one.config.steps / speeds[one.arch],
    )
    outcomes = dict(zip((one.name for one in specs), lab.all(train_one, specs), strict=True))
    return [
        {
            "arch": one.arch,
            "budget": budget,
            "lr": one.config.lr,
            "seed": one.config.seed,
            "name": one.name,
            **{
                k: outcomes[one.name][k]
                for k in (
                    "body_parameters",
                    "parameters",
                    "steps",
                    "tokens",
                    "validation_bits_per_note",
                    "best_step",
                )
            },
            "curve": [
                [row["tokens"], row["validation_bits_per_note"]]
                for row in outcomes[one.name]["log"]
            ],
        }
        for budget, one in runs
    ]


def _pieces(lab) -> dict:
    """The test pieces, and which of them have a title that is also in another split."""
    test = lab.base.select("test")
    return {
        "names": [p.name for p in test],
        "notes": [p.notes for p in test],
        "leaks": [(p.composer, p.title) in lab.leaks for p in test],
    }


def open_test(lab, runs: list[dict]) -> list[dict]:
    """Bits of every test piece for every run; each is computed once and kept."""
    names = list(dict.fromkeys(row["name"] for row in runs))
    bits = dict(zip(names, lab.all(test_bits, names), strict=True))
    return [
        {k: row[k] for k in ("arch", "budget", "seed", "name")} | {"bits": bits[row["name"]]}
        for row in runs
    ]


def test_bits(lab, name: str) -> list[float]:
    """Bits of every test piece for a run that has ended; kept."""

    def work():
        lab.say(f"{name}: test")
        model = best_model(lab.place(name), lab.device)
        return [
            round(float(bits), 3) for bits in model_bits(model, lab.base, lab.base.select("test"))
        ]

    return lab.once(name.replace("/", "-") + "-test", work, list[Amount])


def summarise(result: dict, headline: tuple[str, str]) -> dict:
    """Bits per note with intervals over pieces,
    and paired differences to the headline's first architecture.

    An architecture's bits of a piece are the mean over its seeds. Of a difference the interval is
    that of the pieces' differences: what makes a piece hard for all falls out.
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
            rows[arch] = {
                "seeds": len(by_seed),
                "by_seed": by_seed,
                **_estimate(mine, notes),
                "without_leaks": _estimate(mine[~leaks], notes[~leaks]),
            }
            if arch != headline[0] and headline[0] in mean:
                both = mean[headline[0]] - mine
                rows[arch]["first_minus_this"] = _estimate(both, notes) | {
                    "without_leaks": _estimate(both[~leaks], notes[~leaks])
                }
        summary[budget] = rows
    first, second = headline
    primary = summary.get("tokens", {}).get(second, {}).get("first_minus_this")
    return {
        "budgets": summary,
        "primary": {
            "what": f"{first} minus {second}, equal tokens, bits a note",
            **(primary or {}),
        },
    }


def _estimate(bits: np.ndarray, notes: np.ndarray) -> dict:
    if not len(bits):  # the sample's only test piece may be one of the leaking titles
        return {"pieces": 0, "bits_per_note": None, "interval_95": None}
    return {
        "pieces": len(bits),
        "bits_per_note": float(bits.sum() / notes.sum()),
        "interval_95": interval(bits, notes),
    }


def table(result: dict) -> str:
    """The summary in Markdown."""
    lines = [
        "| budget | architecture | seeds | bits a note, test (95 %) "
        "| without leaking titles | Mamba minus this (95 %) |",
        "|---|---|---|---|---|---|",
    ]
    for budget, rows in result["summary"]["budgets"].items():
        name = {"minutes": "time"}.get(budget, budget)
        for arch, row in sorted(rows.items(), key=lambda item: item[1]["bits_per_note"]):
            difference = row.get("first_minus_this")
            lines.append(
                f"| equal {name} | {LABELS[arch]} | {row['seeds']} | {show(row)} | "
                f"{show(row['without_leaks'])} | {show(difference, '+') if difference else ''} |"
            )
    return "\n".join(lines)
