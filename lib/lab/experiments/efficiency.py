"""Part (b): what a training step, a prompt and a generated token cost, against length and position.

Models of one size, attention over all that was read. Times: architectures take turns at each
length, medians. Memory: each architecture in a process of its own. Then exponents, by least squares
on the logarithms: what stands as O(N) in the original's table 1, measured.
"""

import gc
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch.nn import functional as F

from lib.env import machine as env
from lib.lab.bench.timing import (
    answer,
    apart,
    limit_memory,
    peak_bytes,
    rounds_for,
    spread,
    take_turns,
    trim,
)
from lib.lab.rivals import matched
from lib.lab.rivals.matched import LABELS, Size, build
from lib.mamba import step_cpu
from lib.mamba.model import LanguageModel, State
from lib.train.optim import choose_precision, parameter_groups
from lib.train.trainer import prepare_processor

SEGMENT = 2048  # a prompt is read in pieces of this length on the way to a position
# the same Mamba by its whole-model step in C++: another implementation, so a row of its own
STEPPER = "mamba_cpp"
KINDS = ("training", "prefill", "generation", "throughput", "memory")
GENERATED = ("generation", "throughput")  # a token a row at a time
AXIS = {"throughput": "batch"}  # what a kind is measured against, if not the length


class Bench:
    """The models of one comparison."""

    def __init__(self, size: Size, vocabulary: int, device: str):
        self.size, self.vocabulary, self.device = size, vocabulary, torch.device(device)
        self.precision = choose_precision("auto", self.device)

    def model(self, arch: str, window: int) -> LanguageModel:
        torch.manual_seed(0)
        return build(arch, self.vocabulary, replace(self.size, window=window, dropout=0.0)).to(
            self.device
        )

    def tokens(self, length: int) -> torch.Tensor:
        random = torch.Generator().manual_seed(length)
        return torch.randint(self.vocabulary, (1, length), generator=random).to(self.device)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def clock(self, work: Callable) -> float:
        """Milliseconds of a call."""
        self.wait()
        begin = time.perf_counter()
        work()
        self.wait()
        return 1e3 * (time.perf_counter() - begin)

    def training(self, arch: str, length: int) -> Callable:
        """One step of AdamW at batch 1; attention reaches over the whole length,
        other states are carried on.
        """
        model, tokens = self.model(arch, length), self.tokens(length + 1)
        optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=1e-4)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()  # its moments are there from now on, as in a run that goes on
        optimizer.zero_grad(set_to_none=True)
        state = model.new_state(1)

        def work():
            nonlocal state
            if model.grows:  # the length is all that attention sees
                state = model.new_state(1)
            with torch.autocast(
                self.device.type, self.precision, enabled=self.precision is not None
            ):
                logits, after = model(tokens[:, :-1], state, return_state=True)
            F.cross_entropy(logits.float()[0], tokens[0, 1:]).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            state = [tuple(t.detach().float() for t in memory) for memory in after]

        return work

    def prefill(self, arch: str, length: int) -> Callable:
        model, tokens = self.model(arch, length).eval(), self.tokens(length)
        return lambda: model.prefill(tokens)

    def generation(
        self, arch: str, position: int, tokens: int, batch: int = 1
    ) -> tuple[Callable, int]:
        """(a call that generates so many tokens a row from a position,
        bytes of a row's state there).
        """
        model = self.model("mamba" if arch == STEPPER else arch, position + 3 * tokens + 8).eval()
        state = self.state(model, position)
        size = matched.state_bytes(model, state, position)
        first = [
            tuple(t.expand(batch, *t.shape[1:]).contiguous() for t in memory) for memory in state
        ]
        token = torch.zeros(batch, dtype=torch.long, device=self.device)

        @torch.inference_mode()
        def work():
            nonlocal token
            state = first  # each round at the position again
            for _ in range(tokens):
                logits, state = model.step(token, state)
                token = logits.argmax(-1)

        if arch != STEPPER:
            return work, size
        fast = step_cpu.Stepper(model, batch)
        fast.load(first)

        @torch.inference_mode()
        def work_in_cpp():
            nonlocal token
            for _ in range(tokens):
                token = fast.step(token).argmax(-1)

        return work_in_cpp, fast.state_bytes() // batch

    def state(self, model: LanguageModel, position: int) -> State:
        """The state at a position.

        Random tokens are read up to there, or, where it grows, noise fills the cache.
        """
        state = None
        read = min(position, 64) if model.grows else position
        for part in self.tokens(read).split(SEGMENT, 1):
            _, state = model.prefill(part, state)
        random = torch.Generator(self.device).manual_seed(position)
        return [
            layer.mixer.noise(memory, position, random) if layer.grows else memory
            for layer, memory in zip(model.backbone.layers, state)
        ]


def turns(
    bench: Bench, works: dict[str, Callable], chosen, limit: set[str]
) -> dict[str, list[float]]:
    """Times of each work, taking turns; the first call of each warms it up and is not counted.

    One that takes longer than the limit gets one round and stops for good.
    So does one for which memory runs out, without a time.
    """
    first, rounds = {}, {}
    for arch, work in works.items():
        bench.clock(work)
        first[arch] = took = bench.clock(work)
        if took >= 1e3 * chosen.limit:
            limit.add(arch)
        rounds[arch] = 0 if arch in limit else rounds_for(took, chosen.repeats, chosen.seconds) - 1
    more, failed = take_turns(
        {arch: partial(bench.clock, work) for arch, work in works.items()}, rounds
    )
    limit |= failed.keys()
    return {arch: [first[arch], *times] for arch, times in more.items()}


def timed(
    bench: Bench, kind: str, length: int, archs: tuple[str, ...], chosen, limit: set[str]
) -> list[dict]:
    """Rows of one kind at one length; of throughput, at one number of pieces side by side."""
    works, sizes = {}, {}
    for arch in archs:
        if arch in limit:
            continue
        if kind == "generation":
            works[arch], sizes[arch] = bench.generation(arch, length, chosen.tokens)
        elif kind == "throughput":
            works[arch], sizes[arch] = bench.generation(
                arch, chosen.prompt, chosen.tokens, batch=length
            )
        else:
            works[arch] = getattr(bench, kind)(arch, length)
    rows = []
    count = {"generation": chosen.tokens, "throughput": chosen.tokens * length}.get(kind, length)
    for arch, times in turns(bench, works, chosen, limit).items():
        a_token = [t / chosen.tokens for t in times]
        row = {
            "kind": kind,
            "arch": arch,
            AXIS.get(kind, "length"): length,
            **spread(a_token if kind in GENERATED else times),
            "tokens_per_second": 1e3 * count / float(np.median(times)),
        }
        if kind in GENERATED:
            row["state_bytes"] = sizes[arch]
        rows.append(row)
    works.clear()
    trim()
    return rows


def child(task: dict) -> list[dict]:
    """How far memory rises during a training step of one architecture, at each length,
    until it does not fit.
    """
    limit_memory()
    bench, rows = Bench(Size(**task["size"]), task["vocabulary"], task["device"]), []
    # what the first call ever sets up is not counted
    bench.training(task["arch"], min(task["lengths"]))()
    for length in task["lengths"]:
        try:
            work = bench.training(task["arch"], length)
            found = peak_bytes(work, task["device"])
        except RuntimeError:
            break
        rows.append({"kind": "memory", "arch": task["arch"], "length": length, "peak_bytes": found})
        del work
        gc.collect()
    return rows


def memory(task: dict) -> list[dict]:
    """`child(task)` in a process of its own."""
    return apart(
        "lib.lab.experiments.efficiency",
        task,
        what=f"the memory of {task['arch']}",
        advice="shorten the lengths",
    )


def run(lab) -> dict:
    """Everything that is not in the result yet; it is written after every length."""
    chosen, protocol = lab.protocol.efficiency, lab.protocol
    prepare_processor(lab.say)  # as training does: what a page fault costs is not the model's
    bench = Bench(protocol.size, chosen.vocabulary, lab.device)
    result = lab.read("efficiency") or {"rows": [], "exponents": []}
    result["threads"] = torch.get_num_threads()
    result["body_parameters"] = {arch: matched.body(bench.model(arch, 8)) for arch in chosen.archs}
    grids = {
        "training": chosen.lengths,
        "prefill": chosen.prefill,
        "generation": chosen.positions,
        "throughput": chosen.batches,
    }
    for kind, lengths in grids.items():
        _add_times(lab, bench, kind, lengths, result)
    for arch in chosen.archs:
        if any((row["kind"], row["arch"]) == ("memory", arch) for row in result["rows"]):
            continue
        lab.left()
        lab.say(f"efficiency: memory of {arch}")
        lengths = [
            row["length"]
            for row in result["rows"]
            if (row["kind"], row["arch"]) == ("training", arch)
        ]
        result["rows"] += memory(
            {
                "arch": arch,
                "size": vars(protocol.size),
                "vocabulary": chosen.vocabulary,
                "device": lab.device,
                "lengths": sorted(lengths),
            }
        )
        _keep(lab, result)
    return result


def _add_times(lab, bench: Bench, kind: str, lengths: tuple[int, ...], result: dict) -> None:
    """One kind of measurement at each length that the result does not have yet."""
    chosen = lab.protocol.efficiency
    archs = chosen.archs
    if kind in GENERATED and lab.device == "cpu" and step_cpu.KERNEL.available():
        archs = (*archs, STEPPER)
    a_round = chosen.tokens if kind in GENERATED else 1
    limit: set[str] = set()  # who has taken too long
    for length in lengths:
        mine = [
            row
            for row in result["rows"]
            if row["kind"] == kind and row[AXIS.get(kind, "length")] == length
        ]
        if not mine:
            lab.left()
            lab.say(f"efficiency: {kind} at {length:,}")
            mine = timed(bench, kind, length, archs, chosen, limit)
            result["rows"] += mine
            _keep(lab, result)
        limit |= {row["arch"] for row in mine if row["median_ms"] * a_round >= 1e3 * chosen.limit}
        limit |= {*archs} - {row["arch"] for row in mine}


def _keep(lab, result: dict) -> None:
    result["exponents"] = exponents(result["rows"])
    lab.write("efficiency", result)


def slope(x, y) -> dict:
    """k of y = c · x^k by least squares on the logarithms, and its standard error.

    None for the error below five points: three residuals with two numbers fitted say nothing.
    """
    x = np.log(np.asarray(x, float))
    y = np.log(np.asarray(y, float))
    points = len(x)
    if points < 2:
        return {"exponent": None, "standard_error": None, "points": points}
    x = x - x.mean()
    y = y - y.mean()
    squares = x @ x
    k = float(x @ y / squares)
    rest = y - k * x
    error = float(np.sqrt(rest @ rest / (points - 2) / squares)) if points >= 5 else None
    return {"exponent": k, "standard_error": error, "points": points}


QUANTITIES = (
    ("training", "median_ms"),
    ("memory", "peak_bytes"),
    ("prefill", "median_ms"),
    ("generation", "median_ms"),
    ("generation", "state_bytes"),
)


def exponents(rows: list[dict]) -> list[dict]:
    """The slope of every quantity against length or position,
    over all of it and over its upper half.
    """
    found = []
    for kind, quantity in QUANTITIES:
        for arch in dict.fromkeys(row["arch"] for row in rows if row["kind"] == kind):
            mine = sorted(
                (row["length"], row[quantity])
                for row in rows
                if (row["kind"], row["arch"]) == (kind, arch) and row.get(quantity)
            )
            if not mine:
                continue
            upper = mine[-max(3, (len(mine) + 1) // 2) :]
            upper_half = {"from": upper[0][0], **slope(*zip(*upper, strict=True))}
            found.append(
                {
                    "kind": kind,
                    "quantity": quantity,
                    "arch": arch,
                    **slope(*zip(*mine, strict=True)),
                    "upper_half": upper_half,
                }
            )
    return found


def label(arch: str) -> str:
    """The name of an architecture in figures and tables."""
    return "Mamba, step in C++" if arch == STEPPER else LABELS[arch]


def table(result: dict) -> str:
    """The exponents in Markdown."""
    lines = [
        "| architecture | training time | training memory | prefill time | time a token "
        "| bytes of state |",
        "|---|---|---|---|---|---|",
    ]
    for arch in dict.fromkeys(row["arch"] for row in result["exponents"]):
        cells = [show(result, arch, kind, quantity) for kind, quantity in QUANTITIES]
        lines.append(f"| {label(arch)} | {' | '.join(cells)} |")
    fitted = "; ".join(
        f"{kind} {fitted_on(result, kind)}"
        for kind in dict.fromkeys(kind for kind, _ in QUANTITIES)
    )
    return "\n".join(lines) + f"\n\nexponents of length or position, fitted on {fitted}"


def fitted_on(result: dict, kind: str) -> str:
    """The range of lengths or positions that the exponents of a kind are fitted on:
    the upper half of those measured.
    """
    first = [
        row["upper_half"]["from"] for row in result.get("exponents", []) if row["kind"] == kind
    ]
    lengths = [row["length"] for row in result.get("rows", []) if row["kind"] == kind]
    return f"{min(first):,} to {max(lengths):,} tokens" if first else env.UNKNOWN


def show(result: dict, arch: str, kind: str, quantity: str) -> str:
    """One exponent of the upper half, in words.

    Below that half, fixed costs and a mixture of two powers bend the curve.
    """
    for row in result.get("exponents", []):
        if (row["arch"], row["kind"], row["quantity"]) == (arch, kind, quantity):
            upper = row["upper_half"]
            if upper["exponent"] is None:
                return env.UNKNOWN
            error = upper["standard_error"]
            spread = f" ± {error:.2f}" if error is not None else ""
            return f"{upper['exponent']:z.2f}{spread}"
    return env.UNKNOWN


if __name__ == "__main__":
    answer(child)
