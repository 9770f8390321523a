"""What each part of the fused step buys on a CPU, rung by rung: `python -m lib.lab.bench ladder`.

The same training step of the shipped size, from plain modules to the way `lib.train` runs it,
one change a rung; the rungs take turns in one process. Writes data/results/ladder_cpu.json.
"""

import argparse
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib.env import machine as env
from lib.env.errors import UserError
from lib.env.files import write_json
from lib.env.paths import RESULTS
from lib.lab.bench.timing import limit_memory, spread, stopwatch, take_turns
from lib.mamba import block_cpu
from lib.mamba.model import MambaConfig, MambaLM
from lib.scan import cpu as scan_cpu
from lib.scan import native
from lib.train import optim
from lib.train.config import TrainConfig

SIZES = {"vocab_size": 1024, "d_model": 256, "n_layer": 8, "d_state": 16}
BATCH, LENGTH = 8, 512


@dataclass(frozen=True)
class Rung:
    """A way to take the step; each differs from the one before in one field."""

    change: str
    scan: str = "parallel"  # the backend: in plain PyTorch, or `cpu`, fused
    bf16: bool = False  # matrix products, and what lies between them in the fused block
    convolution: bool = False  # with its SiLU in one pass
    block: bool = (
        False  # one function: no activation is written that the next pass could make itself
    )
    loss: bool = False  # norm, output layer and cross entropy in one function
    adamw: bool = False  # all parameters in one pass
    muon: bool = False  # for the matrices of the blocks: it costs time, and buys learning


def rungs(bf16: bool) -> list[Rung]:
    """The ladder; in float32 to its end where bfloat16 is not fast here."""
    ladder = [Rung("plain PyTorch, float32")]
    changes = [
        ("the scan fused", {"scan": "cpu"}),
        ("products in bfloat16", {"bf16": True}),
        ("convolution and SiLU fused", {"convolution": True}),
        ("the whole block one function", {"block": True}),
        ("norm, output and loss one function", {"loss": True}),
        ("AdamW in one pass", {"adamw": True}),
        ("Muon for the blocks' matrices", {"muon": True}),
    ]
    for words, change in changes:
        if bf16 or "bf16" not in change:
            ladder.append(replace(ladder[-1], change=words, **change))
    return ladder


@contextmanager
def fused_convolution(wanted: bool):
    """Unless it is wanted the modules find none, as on a machine without a compiler."""
    if wanted:
        yield
    else:
        with mock.patch.object(block_cpu, "available", lambda: False):
            yield


def step_of(rung: Rung, weights: dict[str, Tensor], tokens: Tensor) -> Callable[[], float]:
    """One training step as a function, which returns the loss before the step."""
    model = MambaLM(MambaConfig(**SIZES)).train()
    model.load_state_dict(weights)
    optimizers = optimizers_of(rung, model)
    read, targets = tokens[:, :-1], tokens[:, 1:].contiguous()
    backend = "auto" if rung.block else rung.scan

    def step() -> float:
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=rung.bf16),
            fused_convolution(rung.convolution),
        ):
            if rung.loss:
                loss = model(read, targets=targets, backend=backend) / targets.numel()
            else:
                logits = model(read, backend=backend)
                loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def optimizers_of(rung: Rung, model: MambaLM) -> list[torch.optim.Optimizer]:
    """AdamW, in one pass or not; beside Muon as `lib.train` has the two."""
    if rung.muon:
        config = TrainConfig(optimizer="muon", lr=1e-4)
        return list(optim.optimizers(model, config, torch.device("cpu")).values())
    groups = optim.parameter_groups(model, 0.1)
    return [torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=rung.adamw)]


def measure(rounds: int) -> list[dict]:
    """A row for each rung."""
    torch.manual_seed(0)
    weights = MambaLM(MambaConfig(**SIZES)).state_dict()
    tokens = torch.randint(SIZES["vocab_size"], (BATCH, LENGTH + 1))
    ladder = rungs(native.bfloat16_is_fast())
    steps = {rung.change: step_of(rung, weights, tokens) for rung in ladder}
    losses = {change: step() for change, step in steps.items()}
    clock = stopwatch("cpu")
    for step in steps.values():
        clock(step)  # the second call still warms up
    works = {change: partial(clock, step) for change, step in steps.items()}
    times, _ = take_turns(works, dict.fromkeys(works, rounds))
    rows = []
    for change, taken in times.items():
        found = spread(taken)
        speed = 1e3 * BATCH * LENGTH / found["median_ms"]
        rows.append({"change": change, "loss": losses[change], **found, "tokens_per_second": speed})
    return rows


def main(argv: list[str] | None = None) -> None:
    """Time a training step of the shipped size, rung by rung."""
    parser = argparse.ArgumentParser(
        prog="python -m lib.lab.bench ladder", description=main.__doc__
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=RESULTS / "ladder_cpu.json")
    args = parser.parse_args(argv)
    if args.rounds < 3:
        raise UserError(f"{args.rounds} rounds have no quartiles: give at least 3")
    limit_memory()
    if not (scan_cpu.available() and block_cpu.available()):
        raise UserError("the ladder is climbed in C++: install a compiler (g++ or clang++)")
    scan_cpu.keep_memory()
    rows = measure(args.rounds)
    machine = env.provenance("python -m lib.lab.bench ladder") | {
        "threads": torch.get_num_threads()
    }
    write_json(
        args.output,
        {
            "sizes": SIZES,
            "batch": BATCH,
            "length": LENGTH,
            "processor": native.units(),
            "rows": rows,
            **machine,
        },
    )
    for row in rows:
        print(
            f"{row['change']:40} {row['median_ms']:7.0f} ms "
            f"({row['q1_ms']:.0f} to {row['q3_ms']:.0f}), "
            f"{row['tokens_per_second']:7,.0f} tokens/s"
        )
