"""Timing contenders fairly: turns, medians, the memory that they keep and the highest they reach.

Nothing here knows of scans. In `take_turns` contenders take turns within each round, so that
whatever drifts hits all of them alike.
"""

import ctypes
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from lib.env.errors import UserError, os_errors
from lib.env.paths import ROOT

MIN_ROUNDS = 3  # so that there are quartiles, however slow a contender is


@dataclass(frozen=True)
class Contender:
    """One way to do the work. `prepare` makes ready what is timed, and is not timed itself.

    Of a length's arguments, a position or a batch it makes: in the scan's benchmark a function and
    its arguments, all of them asking for a gradient, as it wants them in memory; in that of
    generation a function token -> logits (1, V) and one that counts its cache's bytes; in that of
    training a step, which returns its loss.
    """

    name: str
    label: str  # as figures and tables call it
    timed: str  # what its timing contains
    prepare: Callable
    facts: dict = field(default_factory=dict)  # what else a result says of it


def note(text: str) -> None:
    """Progress, kept apart from results."""
    print(text, file=sys.stderr, flush=True)


def apart(
    module: str, task: dict, *, what: str, advice: str, environment: dict | None = None
) -> dict | list:
    """`child(task)` of a module in a process of its own, with an environment of its own.

    What it prints is not shown. The module ends in `answer(child)`.
    Raises `UserError` with `what` and `advice` if the process fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "answer.json"
        done = subprocess.run(
            [sys.executable, "-m", module, json.dumps(task), path],
            check=False,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.DEVNULL,
        )
        if done.returncode:
            raise UserError(f"measuring {what} ended with code {done.returncode}: {advice}")
        return json.loads(path.read_text(encoding="utf-8"))


def answer(child: Callable[[dict], dict | list]) -> None:
    """The other end of `apart`: do the task on the command line, and write down what came of it."""
    with os_errors("write the answer"):
        Path(sys.argv[2]).write_text(json.dumps(child(json.loads(sys.argv[1]))), encoding="utf-8")


def without_gpu() -> dict:
    """This process's environment, but no GPU can be seen in it."""
    return {**os.environ, "CUDA_VISIBLE_DEVICES": ""}


def stopwatch(device: str) -> Callable[[Callable], float]:
    """A function that runs another one and returns milliseconds."""
    if device == "cpu":

        def clock(work):
            begin = time.perf_counter()
            work()
            return 1e3 * (time.perf_counter() - begin)

        return clock
    other = torch.empty(1 << 30, dtype=torch.uint8, device=device)  # far more than any L2 cache
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def clock(work):
        for _ in range(2):  # empties the cache, and keeps the GPU busy while Python queues the work
            other.zero_()
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end)

    return clock


def rounds_for(took: float, repeats: int, seconds: float) -> int:
    """Rounds for a work of so many ms: those that fit in `seconds`, from 3 to `repeats`."""
    return int(min(repeats, max(MIN_ROUNDS, 1e3 * seconds / took)))


def take_turns(
    works: dict[str, Callable], rounds: Mapping[str, int]
) -> tuple[dict[str, list], dict[str, str]]:
    """What each work gives in its rounds, everybody once in each;
    and the reasons of those that failed.

    A work that raises a RuntimeError, as where memory runs out, is taken out of `works` and gives
    nothing.
    """
    found: dict[str, list] = {name: [] for name in works}
    failed: dict[str, str] = {}
    for turn in range(max(rounds.values(), default=0)):
        for name in list(works):
            if turn >= rounds[name]:
                continue
            try:
                found[name].append(works[name]())
            except RuntimeError as error:
                failed[name] = why(error)
                del works[name], found[name]  # and the memory that it holds
    return found, failed


def works_of(one: Contender, given: dict) -> tuple[Callable, Callable]:
    """(forward without gradients, forward and backward) of a contender on these arguments."""
    call, leaves = one.prepare(given)
    with torch.no_grad():
        weight = torch.randn_like(call(**leaves))  # dL/dy, laid out as y is

    def forward():
        with torch.no_grad():
            call(**leaves)

    def forward_backward():
        torch.autograd.grad(call(**leaves), list(leaves.values()), weight)

    return forward, forward_backward


def why(error: Exception) -> str:
    """The reason in one line."""
    text = next(iter(str(error).splitlines()), type(error).__name__)
    return "not enough memory" if "memory" in text else text[:200]


def spread(times: Sequence[float]) -> dict:
    """Median, quartiles and number of times."""
    low, middle, high = np.percentile(times, (25, 50, 75))
    return {
        "median_ms": float(middle),
        "q1_ms": float(low),
        "q3_ms": float(high),
        "count": len(times),
    }


def measure(
    contenders: list[Contender],
    lengths: list[int],
    given_at: Callable[[int], dict],
    *,
    repeats: int,
    seconds: float,
    limit: float,
    device: str = "cpu",
    say=note,
) -> tuple[list[dict], list[dict]]:
    """Times at each length: rows, and for each contender that had to stop, where and why.

    A contender gets `repeats` rounds, or fewer (at least three) where they would take more than
    `seconds`. It stops for good where one call takes, or will by its own trend, more than `limit`.
    """
    clock = stopwatch(device)
    rows, cut = [], []
    before: dict[str, list[float]] = {one.name: [] for one in contenders}  # at shorter lengths
    for length in sorted(lengths):
        given = given_at(length)
        works, rounds = {}, {}
        stopped = {stop["contender"] for stop in cut}
        for one in contenders:
            if one.name in stopped:
                continue
            try:
                work, took = _warm(one, given, clock, before[one.name], limit, device)
            except (RuntimeError, UserError) as error:
                cut.append({"contender": one.name, "length": length, "why": why(error)})
                continue
            before[one.name].append(took)
            works[one.name] = work
            rounds[one.name] = rounds_for(took, repeats, seconds)
            say(f"length {length:6}: {one.label} {took:.1f} ms, {rounds[one.name]} rounds")
            del work
        times, failed = take_turns(works, rounds)
        cut += [
            {"contender": name, "length": length, "why": reason} for name, reason in failed.items()
        ]
        for name, pairs in times.items():
            forward, both = zip(*pairs, strict=True)
            rows.append(
                {
                    "contender": name,
                    "length": length,
                    "forward": spread(forward),
                    "forward_backward": spread(both),
                }
            )
        del given, works
        trim()
    return rows, cut


def _warm(
    one: Contender, given: dict, clock: Callable, before: list[float], limit: float, device: str
) -> tuple[Callable[[], tuple[float, float]], float]:
    """(a round: ms of forward, ms of forward and backward), and the ms of the latter, warmed up.

    Raises `UserError` where a call takes longer than the limit, or will by its trend, which is
    `before`.
    """
    expected = before[-1] ** 2 / before[-2] if len(before) > 1 else 0
    if expected > 1e3 * limit:
        raise UserError(f"a call would take about {expected / 1e3:.0f} s (limit {limit:g} s)")
    forward, forward_backward = works_of(one, given)
    took = clock(forward_backward)
    if took > 1e3 * limit:
        raise UserError(f"a call took {took / 1e3:.0f} s (limit {limit:g} s)")
    if device != "cpu" or took < 1e3:
        took = clock(forward_backward)  # the first one also compiled
    return lambda: (clock(forward), clock(forward_backward)), took


def kept_bytes(call: Callable, leaves: dict) -> int:
    """Bytes that `call(**leaves)` keeps for its backward pass beyond its arguments, each once."""
    own = {t.untyped_storage().data_ptr() for t in leaves.values()}
    alive, sizes = [], {}

    def pack(tensor):
        alive.append(tensor)  # so that no address is used twice
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = call(**leaves)
    del y
    return sum(size for address, size in sizes.items() if address not in own)


def trim() -> None:
    """Give freed memory back to the system, so that nobody measures with what another one left."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError, TypeError):  # not glibc
        return


def _resident(what: str) -> int:
    """This process's VmRSS or VmHWM (its highest) in bytes; Linux only."""
    return 1024 * int(re.search(rf"{what}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def peak_bytes(work: Callable, device: str) -> int | None:
    """How far memory rises during `work`: the allocator's on a GPU, the process's on Linux."""
    if device != "cpu":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() - before
    trim()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the highest begins again from here
        before = _resident("VmRSS")
        work()
        return max(0, _resident("VmHWM") - before)
    except (OSError, TypeError):  # not Linux
        return None


def memory(
    one: Contender, lengths: list[int], given_at: Callable[[int], dict], device: str = "cpu"
) -> list[dict]:
    """Peak of forward and backward, and what is kept between them, in bytes;
    stops where memory runs out.
    """
    rows: list[dict] = []
    works_of(one, given_at(min(lengths)))[1]()  # what the first call ever sets up is not counted
    for length in sorted(lengths):
        try:
            given = given_at(length)
            peak = peak_bytes(works_of(one, given)[1], device)
            kept = kept_bytes(*one.prepare(given)) / given["x"].numel()
        except RuntimeError:
            break
        rows.append(
            {
                "contender": one.name,
                "length": length,
                "peak_bytes": peak,
                "kept_bytes_per_element": kept,
            }
        )
    return rows


def limit_memory() -> None:
    """Let an allocation too large for this machine fail in Python, before the system kills us."""
    try:
        import resource

        free = int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024
        most = int(0.9 * free) + _resident("VmSize")
        resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))
    except (ImportError, OSError, TypeError, ValueError):
        return


def exponent(lengths: list[int], times: list[float]) -> float:
    """k of the law time = c · length^k that fits best in logarithms: 1 is linear."""
    return float(np.polyfit(np.log(lengths), np.log(times), 1)[0])
