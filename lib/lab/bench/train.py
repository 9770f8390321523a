"""A whole training step, ours and other people's, side by side: `python -m lib.lab.bench train`.

Forward, loss, backward, clipping and AdamW's step, on a CPU in float32, ours and the
Transformer in bfloat16 as well; language models of equal size (embedding, blocks, tied output).
Beside them stand the floors of our step: its matrix products alone, and its scan alone.
Contenders take turns in one process, with the allocator as the system gives it or told to keep
freed memory. Writes data/results/train_cpu.json.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib.env import machine as env
from lib.env.errors import UserError
from lib.env.files import write_json
from lib.lab.bench.timing import (
    Contender,
    answer,
    apart,
    limit_memory,
    note,
    rounds_for,
    spread,
    stopwatch,
    take_turns,
    trim,
    why,
    without_gpu,
)
from lib.lab.peers import language_models
from lib.lab.rivals import matched
from lib.mamba.model import MambaConfig, MambaLM
from lib.scan import cpu as scan_cpu
from lib.scan import native
from lib.train.optim import parameter_groups

KEY_LENGTH = 1024
# relative difference of the loss from ours, with equal weights: float32 sums in another order
TOLERANCE = 1e-4


class MambapyLM(nn.Module):
    """mambapy's blocks between our embedding, norm and output.

    Its own language model imports einops.
    """

    def __init__(self, config: MambaConfig):
        from mambapy.mamba import Mamba
        from mambapy.mamba import MambaConfig as Theirs

        super().__init__()
        self.embeddings = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = Mamba(
            Theirs(
                d_model=config.d_model,
                n_layers=config.n_layer,
                dt_rank=config.rank,
                d_state=config.d_state,
                expand_factor=config.expand,
                d_conv=config.d_conv,
                rms_norm_eps=config.norm_eps,
            )
        )
        self.norm = nn.RMSNorm(config.d_model, config.norm_eps)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(self.norm(self.blocks(self.embeddings(tokens))), self.embeddings.weight)

    def take(self, ours: MambaLM) -> None:
        """Our weights."""
        renamed = {k.removeprefix("backbone."): v for k, v in ours.state_dict().items()}
        self.load_state_dict(
            {
                ("blocks." + k if k.startswith("layers.") else k.replace("norm_f", "norm")): v
                for k, v in renamed.items()
            }
        )


def contender(name: str, ours: MambaLM, length: int) -> Contender:
    """Bring a contender; those that are Mambas get our weights.

    `UserError` where it cannot be had.
    """
    config = ours.config
    bf16 = name.endswith("_bf16")
    if name in ("ours", "ours_bf16", "ours_compiled"):
        model = MambaLM(config)
        model.load_state_dict(ours.state_dict())
        if name == "ours_compiled":
            return _contender(
                name,
                "lib.mamba, compiled",
                "the same under torch.compile",
                model,
                _entropy(torch.compile(model)),
            )
        mean = lambda tokens, targets: model(tokens, targets=targets) / targets.numel()
        if bf16:
            return _contender(
                name, "lib.mamba, bf16", "the same under autocast in bfloat16", model, mean, bf16
            )
        return _contender(name, "lib.mamba", "our MambaLM, as lib.train runs it", model, mean)
    if name in ("transformer", "transformer_bf16"):
        size = matched.Size(config.d_model, config.n_layer, config.d_state, window=length)
        model = matched.build("transformer", config.vocab_size, size)
        timed = "our TransformerLM: rotary, SwiGLU, scaled_dot_product_attention"
        if bf16:
            return _contender(
                name,
                "Transformer, bf16",
                f"{timed}, under autocast in bfloat16",
                model,
                _entropy(model),
                bf16,
            )
        return _contender(name, "Transformer", timed, model, _entropy(model))
    if name == "mambapy":
        try:
            model = MambapyLM(config)
        except ImportError as error:
            raise UserError(
                f"{error.name or name} is not installed: run pip install -r requirements.txt"
            ) from error
        model.take(ours)
        return _contender(
            name,
            "mambapy",
            "its Mamba blocks (pscan), our embedding and output",
            model,
            _entropy(model),
        )
    if name == "gpt2":
        model = language_models.gpt2(ours, length)
        label, timed = "GPT-2", "transformers' GPT2LMHeadModel with scaled_dot_product_attention"
    else:
        model = language_models.mamba(ours)
        # its other two CPU paths, mambapy's scan and an associative one,
        # have to be asked for or compiled
        label = "transformers' Mamba"
        timed = "its MambaForCausalLM, the path without kernels: a loop over time"
    return _contender(
        name, label, timed, model, _entropy(lambda tokens: model(tokens, use_cache=False).logits)
    )


NAMES = (
    "ours",
    "ours_bf16",
    "ours_compiled",
    "transformer",
    "transformer_bf16",
    "gpt2",
    "mambapy",
    "transformers_mamba",
)
MAMBAS = ("ours_compiled", "mambapy", "transformers_mamba")


def _contender(
    name: str,
    label: str,
    timed: str,
    model: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    bf16: bool = False,
) -> Contender:
    return Contender(
        name,
        label,
        timed,
        lambda tokens: step_of(model.train(), loss, tokens, bf16),
        {"parameters": language_models.count(model)},
    )


def _entropy(logits: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """The mean cross entropy of a model that gives logits (B, L, V) of tokens (B, L)."""
    return lambda tokens, targets: F.cross_entropy(
        logits(tokens).float().flatten(0, 1), targets.flatten()
    )


def step_of(
    model: nn.Module, loss_of: Callable[[Tensor, Tensor], Tensor], tokens: Tensor, bf16: bool
) -> Callable[[], float]:
    """One training step as a function; it returns the loss before the step.

    With `bf16` products under autocast.
    """
    optimizer = torch.optim.AdamW(
        parameter_groups(model, 0.1), lr=1e-4, betas=(0.9, 0.95), fused=True
    )
    read, targets = tokens[:, :-1], tokens[:, 1:].contiguous()

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = loss_of(read, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def measure(task: dict, names: list[str], length: int) -> tuple[list[dict], list[dict]]:
    """Times of all contenders at one length, who take turns;
    and who had to be left out, with the reason.
    """
    torch.manual_seed(task["seed"])
    ours = MambaLM(
        MambaConfig(task["vocab_size"], task["d_model"], task["n_layer"], task["d_state"])
    )
    tokens = torch.randint(task["vocab_size"], (task["batch"], length + 1))
    steps, about, rounds, cut, wanted = {}, {}, {}, [], None
    for name in names:
        try:
            one = contender(name, ours, length)
            steps[name] = one.prepare(tokens)
            clock = time.perf_counter()
            loss = steps[name]()
            first = time.perf_counter() - clock
            wanted = loss if name == "ours" else wanted
            if name in MAMBAS and wanted and abs(loss / wanted - 1) > TOLERANCE:
                raise UserError(
                    f"its loss {loss:.6f} is not ours, {wanted:.6f}, with the same weights"
                )
            if first > task["limit"] and name != "ours_compiled":
                raise UserError(f"a step took {first:.0f} s (limit {task['limit']:g} s)")
            clock = time.perf_counter()
            steps[name]()
            took = time.perf_counter() - clock
            rounds[name] = rounds_for(1e3 * took, task["repeats"], task["seconds"])
            about[name] = {
                "label": one.label,
                "timed": one.timed,
                **one.facts,
                "first_seconds": first,
                "loss": loss,
            }
            note(f"length {length}: {one.label} {took:.3f} s a step, {rounds[name]} rounds")
        except (RuntimeError, UserError) as error:
            steps.pop(name, None)
            cut.append({"contender": name, "length": length, "why": why(error)})
            note(f"length {length}: without {name}: {cut[-1]['why']}")
    clock = stopwatch("cpu")
    times, failed = take_turns({name: partial(clock, step) for name, step in steps.items()}, rounds)
    cut += [{"contender": name, "length": length, "why": reason} for name, reason in failed.items()]
    rows = [
        {
            "contender": name,
            "length": length,
            "allocator": task["allocator"],
            **about[name],
            **spread(found),
            "tokens_per_second": 1e3 * task["batch"] * length / spread(found)["median_ms"],
        }
        for name, found in times.items()
    ]
    steps.clear()
    trim()
    return rows, cut


def child(task: dict) -> dict:
    """All lengths with one allocator, in this process."""
    limit_memory()
    scan_cpu.build(note)
    if task["allocator"] == "tuned":
        scan_cpu.keep_memory()
    rows, cut = [], []
    for length in sorted(task["lengths"]):
        slow = {stop["contender"] for stop in cut}
        found, stopped = measure(task, [n for n in task["names"] if n not in slow], length)
        rows += found
        cut += stopped
        for row in found:  # four times the length takes at least four times as long
            longest = max(task["lengths"]) / length * row["median_ms"] / 1e3
            if row["length"] < max(task["lengths"]) and longest > task["limit"]:
                cut.append(
                    {
                        "contender": row["contender"],
                        "length": max(task["lengths"]),
                        "why": f"a step would take {longest:.0f} s or more "
                        f"(limit {task['limit']:g} s)",
                    }
                )
    rows.sort(key=lambda row: (row["length"], task["names"].index(row["contender"])))
    least = floors(task) if scan_cpu.available() and "ours" in task["names"] else None
    machine = env.provenance("") | {
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }
    machine["versions"] |= {name: version(name) for name in ("transformers", "mambapy")}
    machine["processor"] = native.units()
    return {"rows": rows, "cut": cut, "machine": machine, "floors": least}


def _run(task: dict) -> dict:
    """`child(task)` in a process of its own, which cannot see a GPU
    and whose allocator nobody has touched.
    """
    clean = {k: v for k, v in without_gpu().items() if not k.startswith("MALLOC_")}
    return apart(
        "lib.lab.bench.train",
        task,
        what="training steps",
        advice="try fewer contenders with --only",
        environment=clean,
    )


def floors(task: dict) -> dict:
    """What our step cannot do without, in ms: its matrix products alone, and its scan,
    in float32 and in bfloat16.

    Products are those of torch at the step's shapes, y = x W^T and both gradients, each on memory
    that it has just read; the scan is `lib.scan.cpu`, forward and backward, likewise.
    """
    rows, width, inner = task["batch"] * KEY_LENGTH, task["d_model"], 2 * task["d_model"]
    config = MambaConfig(task["vocab_size"], width, task["n_layer"], task["d_state"])
    low = config.rank + 2 * config.d_state
    shapes = [
        (width, 2 * inner),
        (inner, low),
        (config.rank, inner),
        (inner, width),
    ] * config.n_layer
    found = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        times = {
            shape: _products(rows, *shape, dtype)
            for shape in {*shapes, (width, task["vocab_size"])}
        }
        found[name] = {
            "products_ms": sum(times[shape] for shape in [*shapes, (width, task["vocab_size"])]),
            "scan_ms": config.n_layer
            * _scan(task["batch"], KEY_LENGTH, inner, config.d_state, dtype),
        }
    return found


def _products(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> float:
    x, weight, dy = (
        torch.randn(*shape).to(dtype)
        for shape in ((rows, inputs), (outputs, inputs), (rows, outputs))
    )
    return sum(
        _median(call)
        for call in (lambda: F.linear(x, weight), lambda: dy @ weight, lambda: dy.t() @ x)
    )


def _scan(batch: int, length: int, channels: int, states: int, dtype: torch.dtype) -> float:
    x, delta, z, dy = (torch.randn(batch, length, channels).to(dtype) for _ in range(4))
    B, C = (torch.randn(batch, length, states).to(dtype) for _ in range(2))
    A = -torch.arange(1.0, states + 1).repeat(channels, 1)
    given = scan_cpu.Inputs(
        x, delta, A, B, C, torch.ones(channels), z, torch.full((channels,), -3.0), True
    )
    _, _, kept = scan_cpu.forward(given, None, keep=True)
    return _median(lambda: scan_cpu.forward(given, None, keep=True)) + _median(
        lambda: scan_cpu.backward(given, kept, dy, None)
    )


def _median(call: Callable[[], object], rounds: int = 9) -> float:
    """Milliseconds, after two calls that do not count."""
    times = []
    for _ in range(rounds + 2):
        clock = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - clock))
    return float(np.median(times[2:]))


def ratios(rows: list[dict]) -> list[dict]:
    """How many times as long as ours each other step takes, by medians in the same run."""
    base = {
        (row["allocator"], row["length"]): row["median_ms"]
        for row in rows
        if row["contender"] == "ours"
    }
    return [
        {
            "contender": row["contender"],
            "length": row["length"],
            "allocator": row["allocator"],
            "times": row["median_ms"] / base[row["allocator"], row["length"]],
        }
        for row in rows
        if row["contender"] != "ours" and (row["allocator"], row["length"]) in base
    ]


def table(result: dict) -> str:
    """The rows in Markdown."""
    lines = [
        "| contender | parameters | length | allocator | ms a step (quartiles, rounds) "
        "| tokens/s | times ours |",
        "|---|---:|---:|---|---:|---:|---:|",
    ]
    times = {
        (r["contender"], r["length"], r["allocator"]): f"{r['times']:.2f}" for r in result["ratios"]
    }
    for row in result["rows"]:
        key = row["contender"], row["length"], row["allocator"]
        lines.append(
            "| {label} | {parameters:,} | {length} | {allocator} "
            "| {median_ms:.0f} ({q1_ms:.0f}–{q3_ms:.0f}, n={count}) "
            "| {tokens_per_second:,.0f} | ".format(**row)
            + f"{times.get(key, '1')} |"
        )
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    """Time a training step of language models of equal size."""
    parser = argparse.ArgumentParser(prog="python -m lib.lab.bench train", description=main.__doc__)
    add = parser.add_argument
    defaults = {
        "d-model": 256,
        "n-layer": 6,
        "d-state": 16,
        "vocab-size": 1024,
        "batch": 4,
        "repeats": 7,
    }
    for name, value in defaults.items():
        add(f"--{name}", type=int, default=value, help="%(default)s")
    add(
        "--lengths",
        type=lambda text: [int(n) for n in text.split(",")],
        default=[256, KEY_LENGTH],
        help="with commas between",
    )
    add(
        "--seconds",
        type=float,
        default=12,
        help="a slow contender gets fewer rounds, though three (%(default)s)",
    )
    add("--limit", type=float, default=20, help="seconds a step may take (%(default)s)")
    add(
        "--only",
        type=lambda text: text.split(","),
        default=list(NAMES),
        help=f"of {', '.join(NAMES)}",
    )
    add("--allocator", choices=("both", "default", "tuned"), default="both")
    add("--output", type=Path, default=env.RESULTS / "train_cpu.json")
    args = parser.parse_args(argv)
    sizes = {
        k: getattr(args, k)
        for k in ("d_model", "n_layer", "d_state", "vocab_size", "batch", "repeats")
    }
    if min(*sizes.values(), *args.lengths) < 1:
        raise UserError("sizes, lengths and --repeats are numbers: give at least 1 of each")
    if unknown := [name for name in args.only if name not in NAMES]:
        raise UserError(f"--only does not know {unknown[0]!r}: choose from {', '.join(NAMES)}")
    result: dict = {"sizes": sizes, "key_length": KEY_LENGTH, "rows": [], "cut": []}
    for allocator in ("default", "tuned") if args.allocator == "both" else (args.allocator,):
        task = sizes | {k: getattr(args, k) for k in ("lengths", "seconds", "limit")}
        found = _run(task | {"allocator": allocator, "names": args.only, "seed": 0})
        result["rows"] += found["rows"]
        result["cut"] += [stop | {"allocator": allocator} for stop in found["cut"]]
        result.setdefault("floors", {})[allocator] = found["floors"]
    command = env.command_line("python", "-m", "lib.lab.bench", "train", *argv)
    result |= {"ratios": ratios(result["rows"]), **found["machine"], "command": command}
    write_json(args.output, result)
    print(table(result))
    for allocator, least in result["floors"].items():
        for dtype, floor in (least or {}).items():
            print(
                f"floors of our step at length {KEY_LENGTH}, {dtype}, {allocator} allocator: "
                f"products {floor['products_ms']:.0f} ms, scan {floor['scan_ms']:.0f} ms"
            )
    for stop in result["cut"]:
        print(
            f"left out at length {stop['length']}, {stop['allocator']} allocator: "
            f"{stop['contender']}: {stop['why']}"
        )


if __name__ == "__main__":
    answer(child)
