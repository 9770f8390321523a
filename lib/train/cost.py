"""What a run will cost, measured on its own first steps before it starts."""

import json
import sys
import textwrap
import time
from dataclasses import asdict

import numpy as np
import torch

from lib.scan import native

ROWS = 16  # pieces that validation reads side by side, as `lib.train.bits.piece_bits` does


def rehearse(trainer, steps: int = 4) -> dict:
    """Seconds a step, tokens a second, bytes at most, expected minutes and steps of a `Trainer`.

    It takes a few real steps and puts the run back to where it was, as a resumed one is: what
    follows is the same, to the last digit, as without a rehearsal.
    """
    config = trainer.config
    world = trainer.world
    tensors, facts = trainer.snapshot()
    times = []
    for _ in range(steps):
        begin = time.perf_counter()
        trainer.train_step()  # reads its loss, so it has waited for the device
        times.append(time.perf_counter() - begin)
    seen = (trainer.tokens - facts["tokens"]) / steps  # tokens a step
    held_out = sum(p.length for p in trainer.held_out)
    evaluation = _seconds_a_token(trainer) * held_out / world.size
    trainer.restore(tensors, facts)

    step, evaluation = world.agree(float(np.median(times[1:] or times)), evaluation)
    each = step + evaluation / config.eval_every  # seconds a step, its part of validation included
    minutes_of_steps = (config.steps - trainer.step) * each / 60
    minutes_left = config.minutes - trainer.seconds / 60
    minutes = max(0.0, min(minutes_of_steps, minutes_left))
    expected = minutes * 60 / each  # steps
    return {
        "step_seconds": step,
        "tokens_per_second": seen / step,
        "bytes": peak_memory(trainer.device),
        "minutes": minutes,
        "steps": int(expected),
        "tokens": expected * seen,
    }


@torch.inference_mode()
def _seconds_a_token(trainer) -> float:
    """What a token of validation takes, computed as `Trainer.evaluate` does."""
    rows = min(ROWS, len(trainer.held_out))
    tokens = torch.zeros(rows, trainer.config.length, dtype=torch.long, device=trainer.device)
    low = trainer.precision is not None
    begin = time.perf_counter()
    with torch.autocast(trainer.device.type, trainer.precision, enabled=low):
        trainer.model.eval()(tokens).sum().item()
    return (time.perf_counter() - begin) / tokens.numel()


def plan(trainer, steps: int = 4) -> str:
    """Everything about the run, to be read before it starts."""
    found = rehearse(trainer, steps)
    choices = ", ".join(f"{name}={value}" for name, value in asdict(trainer.config).items())
    model = f"{trainer.model.parameter_count():,} parameters"
    if trainer.init:
        model += f", from {json.dumps(trainer.init)}"
    streams = trainer.crops.pieces
    tokens = sum(p.length for p in streams)
    data = (
        f"{tokens:,} training tokens in {_count(len(streams), 'stream', 'streams')}, "
        f"validation on {_count(len(trainer.held_out), 'whole piece', 'whole pieces')}"
    )
    machine = (
        f"on {where(trainer.device)} in {trainer.precision or torch.float32}, "
        f"{_count(trainer.world.size, 'process', 'processes')}"
    )
    measured = (
        f"measured over {steps} steps: {found['step_seconds']:.3g} s a step, "
        f"{found['tokens_per_second']:,.0f} tokens/s, "
        f"{found['bytes'] / 2**30:.2f} GiB of memory at most"
    )
    expected = (
        f"expected: {found['minutes']:.1f} minutes, {found['steps']:,} steps, "
        f"{found['tokens'] / 1e6:,.1f} million tokens, "
        f"{found['tokens'] / tokens:.2f} passes over the data"
    )
    choices = textwrap.fill(choices, 110, break_on_hyphens=False)
    return "\n".join([choices, model, data, machine, measured, expected])


def where(device: torch.device) -> str:
    """The device, and what arithmetic a processor has."""
    return f"cpu ({native.units()})" if device.type == "cpu" else str(device)


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has held so far, PyTorch's on a GPU; 0 where unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024  # macOS counts bytes, Linux KiB
