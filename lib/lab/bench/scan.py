"""Our scan and other people's, side by side: `python -m lib.lab.bench scan`.

Everything is measured in child processes: memory in one for each contender, time in one for each
allocator and type of number, where contenders take turns (`lib.lab.bench.timing`). Writes
data/results/scan_DEVICE.json, and draws it into a PNG of the same name.
"""

import argparse
import json
import os
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch

from lib.env import machine as env
from lib.env.errors import UserError
from lib.env.files import atomic_write, write_json
from lib.lab.bench.scan_contenders import arguments, contender, lay_out, names
from lib.lab.bench.scan_figures import draw, draw_figure3, picture
from lib.lab.bench.timing import (
    Contender,
    answer,
    apart,
    exponent,
    limit_memory,
    measure,
    memory,
    note,
    stopwatch,
    why,
    without_gpu,
)
from lib.lab.peers import scans as peers
from lib.scan import cpu as scan_cpu
from lib.scan import native
from lib.scan import selective as scan

__all__ = ["draw", "draw_figure3", "load", "main"]

KEY = {"cpu": 1024, "cuda": 2048}  # the length that the comparison is summed up at
FIGURE3 = 16_384  # the longest there, and where memory is measured
# bytes a second: nine tenths of what the box says
BANDWIDTH = {"H100 80GB HBM3": 3.0e12, "H200": 4.3e12}
# of the largest entry: some hundred roundings each
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 4e-2}
DEFAULTS = {  # a GPU's shape is that of a model with 130 M parameters; a CPU's fits a laptop
    "cpu": {
        "lengths": [2**k for k in range(8, 17)],
        "batch": 4,
        "d_inner": 256,
        "dtype": ["float32"],
    },
    "cuda": {
        "lengths": [2**k for k in range(9, 16)],
        "batch": 8,
        "d_inner": 1536,
        "dtype": ["bfloat16", "float32"],
    },
}


# ---- what is measured ---------------------------------------------------------------------


def check(one: Contender, d_state: int, dtype: str, device: str) -> dict:
    """The largest error of output and gradients against the float64 loop, and whose it is."""
    given = arguments(2, 128, 64, d_state, getattr(torch, dtype), device)
    weight = torch.randn(2, 128, 64, generator=torch.Generator().manual_seed(1)).to(device)

    def results(call, leaves):
        y = call(**leaves)
        found = torch.autograd.grad((y.double() * weight).sum(), leaves.values())
        return {"y": y.detach(), **{f"d{name}": t for name, t in zip(leaves, found, strict=True)}}

    oracle = partial(scan.selective_scan, delta_softplus=True, backend="loop")
    exact = results(oracle, lay_out({name: t.double() for name, t in given.items()}))
    mine = results(*one.prepare(given))
    errors = {}
    for name, wanted in exact.items():
        difference = (mine[name].double() - wanted).abs().max()
        errors[name] = float(difference / wanted.abs().max())
    worst = max(errors, key=lambda name: np.nan_to_num(errors[name], nan=np.inf))
    return {"error": errors[worst], "of": worst, "ok": errors[worst] < TOLERANCE[dtype]}


# ---- child processes ----------------------------------------------------------------------


def child(task: dict) -> dict:
    """One task of the parent, in this process: "compile", "memory" or "time"."""
    if task["task"] == "compile":
        native.CACHE = Path(task["cache"])  # an empty folder, so that there is something to compile
        os.environ["XDG_CACHE_HOME"] = task["cache"]  # nor is it in the user's own
        seconds = stopwatch("cpu")(lambda: scan_cpu.build(say=note)) / 1e3
        if not list(Path(task["cache"]).glob("*.so")):
            raise UserError("the scan's kernel was not compiled where its time is taken")
        return {"seconds": seconds}
    device, dtype = task["device"], task["dtype"]
    if device == "cpu":
        limit_memory()
        if task["allocator"] == "tuned":
            scan_cpu.keep_memory()

    def given_at(length):
        return arguments(
            task["batch"], length, task["d_inner"], task["d_state"], getattr(torch, dtype), device
        )

    if task["task"] == "memory":
        return {"rows": memory(contender(task["names"][0]), task["lengths"], given_at, device)}
    ready, absent, checks = [], {}, {}
    for name in task["names"]:
        try:
            one = contender(name)
            if name in names(device):
                checks[name] = found = check(one, task["d_state"], dtype, device)
                if not found["error"] < TOLERANCE[dtype]:
                    raise UserError(
                        f"{found['of']} differs from the float64 loop by {found['error']:.1e}"
                    )
            ready.append(one)
        except (RuntimeError, UserError) as error:
            absent[name] = why(error)
            note(f"without {name}: {absent[name]}")
    options = {key: task[key] for key in ("repeats", "seconds", "limit", "device")}
    rows, cut = measure(ready, task["lengths"], given_at, **options)
    return {
        "rows": rows,
        "cut": cut,
        "absent": absent,
        "checks": checks,
        "contenders": {one.name: {"label": one.label, "timed": one.timed} for one in ready},
        "machine": env.provenance("")
        | {
            "threads": torch.get_num_threads(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
        },
    }


def _run(task: dict) -> dict:
    """`child(task)` in a process of its own, which cannot see a GPU unless it is to use one."""
    with tempfile.TemporaryDirectory() as folder:
        return apart(
            "lib.lab.bench.scan",
            task | {"cache": folder},
            what=", ".join(task.get("names", [task["task"]])),
            advice="try fewer contenders with --only or shorter --lengths",
            environment=without_gpu() if task.get("device", "cpu") == "cpu" else None,
        )


# ---- what the times say -------------------------------------------------------------------


def ratios(rows: list[dict], ours: str) -> list[dict]:
    """How many times as long as `ours` each other contender takes, by medians, in the same run."""

    def place(row):
        return row["dtype"], row["allocator"], row["length"]

    base = {place(row): row for row in rows if row["contender"] == ours}
    found = []
    for row in rows:
        if row["contender"] == ours or place(row) not in base:
            continue
        times = {
            kind: row[kind]["median_ms"] / base[place(row)][kind]["median_ms"]
            for kind in ("forward", "forward_backward")
        }
        found.append(
            {key: row[key] for key in ("contender", "dtype", "allocator", "length")} | times
        )
    return found


def floors(device: str, batch, length, d_inner, d_state, dtype: str, chunk=32) -> dict | None:
    """Milliseconds that no kernel on an H100 or H200 can beat, or None elsewhere.

    Bytes to move over the bandwidth; exponentials at 16, instructions at 128 a clock on each of
    132 processors at 1.98 GHz. About 16 instructions a state backward; a float32 state kept
    every `chunk` steps.
    """
    bandwidth = next((speed for name, speed in BANDWIDTH.items() if name in device), None)
    if bandwidth is None:
        return None
    positions = batch * length
    inputs = positions * d_inner  # numbers in x, delta, z and y each
    selection = positions * d_state  # numbers in B and C each
    states = positions * d_inner * d_state
    width = getattr(torch, dtype).itemsize
    kept = 4 * states / chunk  # bytes
    clock = 132 * 1.98e9  # of all processors, a second
    memory_forward = (4 * width * inputs + 2 * width * selection + kept) / bandwidth
    memory_backward = (7 * width * inputs + (2 * width + 8) * selection + kept) / bandwidth
    exponentials = inputs * (d_state + 4) / (16 * clock)
    instructions = 16 * states / (128 * clock)
    forward = max(memory_forward, exponentials)
    backward = max(memory_backward, instructions)
    return {"forward": 1e3 * forward, "forward_backward": 1e3 * (forward + backward)}


def floor_rows(rows: list[dict], ours: str, device: str, shape: dict) -> list[dict]:
    """The floors at each length and type of number, and how many times them `ours` takes."""
    found = []
    for row in rows:
        if row["contender"] == ours and (
            low := floors(device, length=row["length"], dtype=row["dtype"], **shape)
        ):
            times = {f"{kind}_ratio": row[kind]["median_ms"] / low[kind] for kind in low}
            found.append({"length": row["length"], "dtype": row["dtype"], "floor_ms": low, **times})
    return found


def key_row(result: dict) -> dict:
    """What the comparison comes down to: ratios at the key length, memory kept, the exponent."""
    ours, length = result["ours"], result["key_length"]
    found = {"length": length, "ours": ours}
    for row in result["ratios"]:
        if row["length"] == length:
            place = found.setdefault(f"{row['dtype']}, {row['allocator']} allocator", {})
            place[row["contender"]] = {
                kind: round(row[kind], 2) for kind in ("forward", "forward_backward")
            }
    kept = [row for row in result["memory"] if (row["contender"], row["length"]) == (ours, length)]
    found["kept_bytes_per_element"] = kept[0]["kept_bytes_per_element"] if kept else None
    found["exponent"] = result["exponents"].get(ours)
    return found


# ---- command line -------------------------------------------------------------------------


def load(device: str = "") -> dict:
    """The measurement on a device such as "cpu_2_cores" (default: this one);
    empty if there is none.
    """
    return env.read_results(f"scan_{device or slug(env.device_name())}")


def slug(device: str) -> str:
    """ "CPU, 2 cores" as a part of a file's name: cpu_2_cores."""
    return "_".join("".join(c if c.isalnum() else " " for c in device.lower()).split())


def table(result: dict) -> str:
    """The rows in Markdown, which also reads well in a terminal."""
    memory_of = {(row["contender"], row["length"], row["dtype"]): row for row in result["memory"]}
    heads = (
        "contender",
        "length",
        "type, allocator",
        "forward ms",
        "forward + backward ms",
        "kept, bytes a (b, l, d)",
        "peak MiB",
    )
    lines = [heads, ["---"] * len(heads)]
    for row in result["rows"]:
        times = (
            "{median_ms:.2f} ({q1_ms:.2f}–{q3_ms:.2f}, n={count})".format(**row[kind])
            for kind in ("forward", "forward_backward")
        )
        found = memory_of.get((row["contender"], row["length"], row["dtype"]), {})
        kept, peak = found.get("kept_bytes_per_element"), found.get("peak_bytes")
        lines.append(
            [
                row["contender"],
                str(row["length"]),
                f"{row['dtype']}, {row['allocator']}",
                *times,
                "" if kept is None else f"{kept:.2f}",
                "" if peak is None else f"{peak / 2**20:.0f}",
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def listed(text: str) -> list[str]:
    """What stands between the commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def _options(argv: list[str]) -> argparse.Namespace:
    """The command line with the device's defaults filled in;
    `UserError` where it makes no sense.
    """
    parser = argparse.ArgumentParser(prog="python -m lib.lab.bench scan", description=main.__doc__)
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), help="default: a GPU where there is one")
    add("--lengths", type=listed, help="lengths, with commas between")
    add("--batch", type=int, help="sequences at once (CPU 4, GPU 8)")
    add("--d-inner", type=int, help="channels (CPU 256, GPU 1536)")
    add("--d-state", type=int, default=16, help="states a channel (%(default)s)")
    add(
        "--dtype",
        type=listed,
        help="types of number, with commas between (CPU float32, GPU bfloat16,float32)",
    )
    add("--repeats", type=int, default=15, help="rounds (%(default)s)")
    add(
        "--seconds",
        type=float,
        default=10,
        help="a slow contender gets fewer rounds, though three, where they would "
        "take longer than this (%(default)s)",
    )
    add(
        "--limit",
        type=float,
        default=20,
        help="a contender stops where a call takes longer than so many seconds, "
        "with a second allocator five times as many (%(default)s)",
    )
    add("--only", type=listed, help="names of contenders, with commas between")
    add(
        "--allocator",
        choices=("both", "default", "tuned"),
        default="both",
        help="on a CPU: glibc as it is; told to "
        "keep freed memory, as training does; or tuned, and both at one length (%(default)s)",
    )
    add(
        "--figure3",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also attention and a long convolution against length",
    )
    add("--output", type=Path, help="the JSON file (default data/results/scan_DEVICE.json)")
    args = parser.parse_args(argv)
    args.device = args.device or env.choose_device()[0]
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("no CUDA device was found: leave --device out")
    for name, value in DEFAULTS[args.device].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    try:
        args.lengths = sorted({int(length) for length in args.lengths})
    except ValueError as error:
        raise UserError(
            "--lengths takes whole numbers with commas between, such as 256,512,1024"
        ) from error
    if (
        not args.lengths
        or min(*args.lengths, args.batch, args.d_inner, args.d_state, args.repeats) < 1
    ):
        raise UserError(
            "--lengths, --batch, --d-inner, --d-state and --repeats are sizes: "
            "give at least 1 of each"
        )
    for option, given, known in (
        ("--only", args.only, names(args.device)),
        ("--dtype", args.dtype, list(TOLERANCE)),
    ):
        if unknown := [name for name in given or [] if name not in known]:
            raise UserError(
                f"{option} does not know {unknown[0]!r} on a {args.device} device: choose from "
                f"{', '.join(known)}"
            )
    return args


def _measure_all(args: argparse.Namespace) -> dict:
    """Every measurement that the options ask for, one child process after another."""
    wanted = [name for name in names(args.device) if args.only is None or name in args.only]
    key = min(args.lengths, key=lambda length: abs(np.log(length / KEY[args.device])))
    shape = {name: getattr(args, name) for name in ("batch", "d_inner", "d_state")}
    allocators = ["tuned", "default"] if args.allocator == "both" else [args.allocator]
    if args.device == "cuda":
        allocators = ["GPU"]
    options = {
        name: getattr(args, name) for name in ("device", "lengths", "repeats", "seconds", "limit")
    }
    task = shape | options | {"task": "time", "names": wanted}
    result = {
        "shape": shape,
        "dtypes": args.dtype,
        "allocators": allocators,
        "key_length": key,
        "ours": "",
        "contenders": {},
        "absent": {},
        "checks": {},
        "rows": [],
        "cut": [],
        "memory": [],
    }
    for dtype in args.dtype:
        for allocator in allocators:
            here = task | {"dtype": dtype, "allocator": allocator}
            if allocator != allocators[0]:  # page faults make a call up to five times as long
                here |= {
                    "lengths": [key],
                    "names": list(result["contenders"]),
                    "limit": 5 * args.limit,
                }
            machine = _add_times(result, here)
        _add_memory(result, task, dtype)
    if not result["rows"]:
        reasons = [*result["absent"].values(), *(stop["why"] for stop in result["cut"])]
        raise UserError(f"nothing could be measured: {'; '.join(reasons)}")
    contenders = result["contenders"]
    result["ours"] = next(name for name in wanted if name in contenders)
    result = machine | result
    result["versions"] |= {
        peers.PEERS[name].package: peers.version_of(name)
        for name in contenders
        if name in peers.PEERS
    }
    if result["ours"] == "cpu":
        result["compile_seconds"] = _run({"task": "compile"})["seconds"]
    if args.figure3:
        result["figure3"] = _figure3(result, task)
    return result


def _add_times(result: dict, task: dict) -> dict:
    """Time one type of number with one allocator; returns what is known of the machine."""
    note(f"time, {task['dtype']}, {task['allocator']} allocator")
    found = _run(task)
    place = {"dtype": task["dtype"], "allocator": task["allocator"]}
    for part in ("rows", "cut"):
        result[part] += [row | place for row in found[part]]
    for part in ("contenders", "absent"):
        result[part] |= found[part]
    result["checks"] |= {
        f"{name}, {task['dtype']}": error for name, error in found["checks"].items()
    }
    return found["machine"]


def _add_memory(result: dict, task: dict, dtype: str) -> None:
    """The memory of each contender at the lengths that it was timed at."""
    longest = max(result["key_length"], FIGURE3)  # bytes a step are the same from there on
    for name in result["contenders"]:
        lengths = sorted(
            {
                row["length"]
                for row in result["rows"]
                if row["length"] <= longest and (row["contender"], row["dtype"]) == (name, dtype)
            }
        )
        note(f"memory, {dtype}, {name}")
        if lengths:
            place = {
                "task": "memory",
                "dtype": dtype,
                "allocator": "default",
                "names": [name],
                "lengths": lengths,
            }
            result["memory"] += [row | {"dtype": dtype} for row in _run(task | place)["rows"]]


def _figure3(result: dict, task: dict) -> dict:
    """Our scan beside plain PyTorch, a long convolution and attention, against length."""
    note("figure 3")
    ours = result["ours"]
    plain = [name for name in ("loop", "parallel") if name in result["contenders"] and name != ours]
    lengths = [length for length in task["lengths"] if length <= FIGURE3] or [result["key_length"]]
    found = _run(
        task
        | {
            "names": [ours, *plain, "convolution", "attention"],
            "lengths": lengths,
            "dtype": result["dtypes"][0],
            "allocator": result["allocators"][0],
        }
    )
    return {part: found[part] for part in ("contenders", "rows", "cut")}


def main(argv: list[str]) -> None:
    """Time our scan and its peers over a range of lengths, with the memory they take."""
    args = _options(argv)
    command = env.command_line("python", "-m", "lib.lab.bench", "scan", *argv)
    result = _measure_all(args) | {"command": command}
    rows, ours = result["rows"], result["ours"]
    first = (result["dtypes"][0], result["allocators"][0])
    result["ratios"] = ratios(rows, ours)
    result["exponents"] = {}
    for name in result["contenders"]:
        line = [
            (row["length"], row["forward_backward"]["median_ms"])
            for row in rows
            if (row["contender"], row["dtype"], row["allocator"]) == (name, *first)
        ]
        if len(line) > 1:
            result["exponents"][name] = exponent(*zip(*line, strict=True))
    result["floors"] = floor_rows(rows, ours, result["device"], result["shape"])
    result["key"] = key_row(result)
    path = args.output or env.RESULTS / f"scan_{slug(result['device'])}.json"
    write_json(path, result, path.name)
    with atomic_write(path.with_suffix(".png")) as part:
        part.write_bytes(picture(result))
    print(table(result))
    print(json.dumps(result["key"], indent=1))
    print(f"in {path.name} and {path.with_suffix('.png').name}: {len(rows)} rows")


if __name__ == "__main__":
    answer(child)
