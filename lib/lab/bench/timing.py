"""Timing rivals fairly: turns, medians, the memory that they keep and the highest they reach.

Nothing here knows of scans. `measure` lets contenders take turns within each round, so that whatever
drifts hits all of them alike.
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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lib.env.errors import UserError, os_errors
from lib.env.paths import ROOT

MIN_ROUNDS = 3  # so that there are quartiles, however slow a contender is


@dataclass(frozen=True)
class Contender:
    """One way to do the work: `call(**prepare(arguments))` is timed, `prepare` is not."""

    name: str
    label: str  # as the figures call it
    timed: str  # what its timing contains
    call: Callable
    prepare: Callable  # the arguments as it wants them in memory, all of them asking for a gradient


def note(text: str) -> None:
    """Progress, kept apart from results."""
    print(text, file=sys.stderr, flush=True)


def apart(module: str, task: dict, *, what: str, advice: str, environment: dict | None = None) -> dict:
    """`child(task)` of a module in a process of its own, with an environment of its own; what it prints is not shown.

    The module ends in `answer(child)`. Raises `UserError` with `what` and `advice` if the process fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "answer.json"
        done = subprocess.run([sys.executable, "-m", module, json.dumps(task), path], check=False, cwd=ROOT,
                              env=environment, stdout=subprocess.DEVNULL)
        if done.returncode:
            raise UserError(f"measuring {what} ended with code {done.returncode}: {advice}")
        return json.loads(path.read_text(encoding="utf-8"))


def answer(child: Callable[[dict], dict]) -> None:
    """The other end of `apart`: do the task that the command line holds, and write down what came of it."""
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


def works_of(one: Contender, given: dict) -> tuple[Callable, Callable]:
    """(forward without gradients, forward and backward) of a contender on these arguments."""
    leaves = one.prepare(given)
    with torch.no_grad():
        weight = torch.randn_like(one.call(**leaves))  # dL/dy, laid out as y is

    def forward():
        with torch.no_grad():
            one.call(**leaves)

    def forward_backward():
        torch.autograd.grad(one.call(**leaves), list(leaves.values()), weight)
    return forward, forward_backward


def why(error: Exception) -> str:
    """The reason in one line."""
    text = next(iter(str(error).splitlines()), type(error).__name__)
    return "not enough memory" if "memory" in text else text[:200]


def spread(times: list[float]) -> dict:
    """Median, quartiles and number of times."""
    low, middle, high = np.percentile(times, (25, 50, 75))
    return {"median_ms": float(middle), "q1_ms": float(low), "q3_ms": float(high), "count": len(times)}


def measure(contenders: list[Contender], lengths: list[int], given_at: Callable[[int], dict], *, repeats: int,
            seconds: float, limit: float, device: str = "cpu", say=note) -> tuple[list[dict], list[dict]]:
    """Times at each length: rows, and for each contender that had to stop, where and why.

    A contender gets `repeats` rounds, or fewer (at least three) where they would take more than
    `seconds`. It stops for good where one call takes, or will by its own trend, more than `limit`.
    """
    clock, rows, cut, before = stopwatch(device), [], [], {}
    for length in sorted(lengths):
        given, works, rounds = given_at(length), {}, {}
        for one in contenders:
            if one.name in {stop["contender"] for stop in cut}:
                continue
            taken = before.get(one.name, [])
            expected = taken[-1] ** 2 / taken[-2] if len(taken) > 1 else 0
            try:
                if expected > 1e3 * limit:
                    raise UserError(f"a call would take about {expected / 1e3:.0f} s (limit {limit:g} s)")
                works[one.name] = works_of(one, given)
                took = clock(works[one.name][1])
                if took > 1e3 * limit:
                    raise UserError(f"a call took {took / 1e3:.0f} s (limit {limit:g} s)")
                if device != "cpu" or took < 1e3:
                    took = clock(works[one.name][1])  # the first one also compiled and warmed up
                before[one.name] = [*taken, took]
                rounds[one.name] = int(min(repeats, max(MIN_ROUNDS, 1e3 * seconds / took)))
                say(f"length {length:6}: {one.label} {took:.1f} ms, {rounds[one.name]} rounds")
            except (RuntimeError, UserError) as error:
                works.pop(one.name, None)
                cut.append({"contender": one.name, "length": length, "why": why(error)})
        times = {name: ([], []) for name in rounds}
        for turn in range(max(rounds.values(), default=0)):
            for name in [name for name in rounds if turn < rounds[name]]:
                try:
                    for work, out in zip(works[name], times[name], strict=True):
                        out.append(clock(work))
                except RuntimeError as error:
                    cut.append({"contender": name, "length": length, "why": why(error)})
                    del rounds[name], times[name], works[name]
        rows += [{"contender": name, "length": length, "forward": spread(first), "forward_backward": spread(both)}
                 for name, (first, both) in times.items()]
        del given, works
        trim()
    return rows, cut


def kept_bytes(one: Contender, leaves: dict) -> int:
    """Bytes that a forward pass keeps for its backward pass, beyond its arguments; each counted once."""
    own = {t.untyped_storage().data_ptr() for t in leaves.values()}
    alive, sizes = [], {}

    def pack(tensor):
        alive.append(tensor)  # so that no address is used twice
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = one.call(**leaves)
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


def memory(one: Contender, lengths: list[int], given_at: Callable[[int], dict], device: str = "cpu") -> list[dict]:
    """Peak of forward and backward, and what is kept between them, in bytes; stops where memory runs out."""
    rows: list[dict] = []
    works_of(one, given_at(min(lengths)))[1]()  # what the first call ever sets up is not counted
    for length in sorted(lengths):
        try:
            given = given_at(length)
            peak = peak_bytes(works_of(one, given)[1], device)
            kept = kept_bytes(one, one.prepare(given)) / given["x"].numel()
        except RuntimeError:
            break
        rows.append({"contender": one.name, "length": length, "peak_bytes": peak, "kept_bytes_per_element": kept})
    return rows


def limit_memory() -> None:
    """Let an allocation that this machine cannot serve fail in Python, before the system kills us."""
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
