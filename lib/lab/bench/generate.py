"""Generation on a CPU, ours and other people's, side by side: `python -m lib.lab.bench generate`.

One sequence, token by token, at growing positions; the sampled token is the likeliest. Times are
taken in one child process where contenders take turns, memory in another. Writes
data/results/generate_DEVICE.json and draws it into a PNG of the same name.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from lib.env import machine as env
from lib.env.errors import UserError
from lib.env.files import atomic_write, write_json
from lib.lab.bench.generate_contenders import NAMES, WARM, Contenders
from lib.lab.bench.scan import listed, slug
from lib.lab.bench.timing import (
    Contender,
    answer,
    apart,
    limit_memory,
    note,
    peak_bytes,
    spread,
    take_turns,
    trim,
    why,
    without_gpu,
)
from lib.mamba import model as mamba
from lib.mamba.step_cpu import Stepper
from lib.show import plots

POSITIONS = (512, 2048, 8192, 32768)
BATCHES = (1, 8, 64)  # pieces at once

# ---- measuring, each part in a process of its own ------------------------------------------


def check(contenders: Contenders, one: Contender, position: int = 64) -> float:
    """The largest difference of a Mamba's logits from `MambaLM.forward`'s over eight tokens."""
    tokens = torch.arange(8) % contenders.model.config.vocab_size
    read, _ = one.prepare(position)
    found = torch.stack([read(token[None]) for token in tokens], 1)
    return float((contenders.model(tokens[None], contenders.state(position)) - found).abs().max())


@torch.inference_mode()
def generate(read: Callable[[Tensor], Tensor], tokens: int) -> float:
    """Milliseconds a token, taking the likeliest each time."""
    token = torch.zeros(1, dtype=torch.long)
    for _ in range(WARM):
        token = read(token).argmax(-1)
    begin = time.perf_counter()
    for _ in range(tokens):
        token = read(token).argmax(-1)
    return 1e3 * (time.perf_counter() - begin) / tokens


@torch.inference_mode()
def measure(
    contenders: list[Contender],
    positions: list[int],
    *,
    repeats: int,
    tokens: int,
    seconds: float,
    limit: float,
    say=note,
) -> tuple[list[dict], list[dict]]:
    """Times at each position: rows, and what had to be left out with the reason.

    Contenders take turns, `repeats` rounds of `tokens` tokens each, or of fewer (at least four)
    where a round would take more than `seconds`; each round starts at the position again. A
    contender stops for good where a token takes more than `limit` seconds.
    """
    rows, cut = [], []
    for position in sorted(positions):
        works, counts = {}, {}
        stopped = {stop["contender"] for stop in cut}
        for one in contenders:
            if one.name in stopped:
                continue
            try:
                took = generate(one.prepare(position)[0], 1)
                if took > 1e3 * limit:
                    raise UserError(f"a token took {took / 1e3:.0f} s (limit {limit:g} s)")
            except (RuntimeError, UserError) as error:
                cut.append({"contender": one.name, "position": position, "why": why(error)})
                continue
            say(f"position {position:6}: {one.label} {took:.2f} ms a token")
            counts[one.name] = int(min(tokens, max(4, 1e3 * seconds / took)))
            works[one.name] = partial(_round, one, position, counts[one.name])
        found, failed = take_turns(works, dict.fromkeys(works, repeats))
        trim()
        cut += [
            {"contender": name, "position": position, "why": reason}
            for name, reason in failed.items()
        ]
        for name, pairs in found.items():
            times, sizes = zip(*pairs, strict=True)
            row = {"contender": name, "position": position, **spread(times), "tokens": counts[name]}
            rows.append(
                row | {"tokens_per_second": 1e3 / row["median_ms"], "cache_bytes": sizes[-1]}
            )
    return rows, cut


def _round(one: Contender, position: int, tokens: int) -> tuple[float, int]:
    """(milliseconds a token, bytes of the cache at the position), from the position anew."""
    trim()  # of what the one before has left
    read, size = one.prepare(position)
    held = size()
    return generate(read, tokens), held


def batches(model: mamba.MambaLM, repeats: int, tokens: int) -> list[dict]:
    """Tokens a second of our step for several pieces at once, which take turns."""
    works = {rows: partial(_rows_round, Stepper(model, rows), tokens) for rows in BATCHES}
    found, _ = take_turns(works, dict.fromkeys(works, repeats))
    return [
        {
            "rows": rows,
            **spread(times),
            "tokens_per_second": 1e3 * rows / spread(times)["median_ms"],
        }
        for rows, times in found.items()
    ]


def _rows_round(stepper: Stepper, tokens: int) -> float:
    """Milliseconds a step of all rows."""
    count = max(4, tokens // stepper.batch)
    token = torch.arange(stepper.batch) % stepper.config.vocab_size
    stepper.load()
    stepper.step(token)
    begin = time.perf_counter()
    for _ in range(count):
        stepper.step(token)
    return 1e3 * (time.perf_counter() - begin) / count


@torch.inference_mode()
def growth(contenders: Contenders, tokens: int) -> dict:
    """How far the process's memory rises while ours generates so many tokens, in one go."""
    read, _ = contenders.get("stepper").prepare(1)
    generate(read, 200)  # what the first calls ever set up is not counted
    found = peak_bytes(lambda: generate(read, tokens), "cpu")
    return {"tokens": tokens, "growth_mib": None if found is None else found / 2**20}


def child(task: dict) -> dict:
    """What one process measures; see `_run`."""
    limit_memory()
    contenders = Contenders(
        mamba.MambaConfig(**task["config"]), task["positions"], task["tokens"], task["seed"]
    )
    if task["task"] == "memory":
        return growth(contenders, task["memory_tokens"])
    found: dict = {"contenders": {}, "absent": {}, "checks": {}}
    present = []
    for name in task["names"]:
        try:
            one = contenders.get(name)
            if not name.startswith("gpt2"):
                with torch.inference_mode():
                    found["checks"][name] = check(contenders, one)
                if not found["checks"][name] < 1e-4:  # some hundred float32 roundings
                    raise UserError(f"its logits differ from ours by {found['checks'][name]:.1e}")
            present.append(one)
            found["contenders"][name] = {"label": one.label, "timed": one.timed, **one.facts}
        except UserError as error:
            note(f"without {name}: {error}")
            found["absent"][name] = str(error)
    rows, cut = measure(
        present, **{k: task[k] for k in ("positions", "repeats", "tokens", "seconds", "limit")}
    )
    machine = env.provenance("") | {
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }
    if any(name not in ("stepper", "pytorch") for name in found["contenders"]):
        machine["versions"]["transformers"] = version("transformers")
    if "stepper" in found["contenders"]:
        found["batches"] = batches(contenders.model, task["repeats"], task["tokens"])
    return found | {"rows": rows, "cut": cut, "machine": machine}


def _run(task: dict) -> dict:
    """`child(task)` in a process of its own, which cannot see a GPU."""
    return apart(
        "lib.lab.bench.generate",
        task,
        what=task["task"],
        environment=without_gpu(),
        advice="try fewer contenders with --only or shorter --positions",
    )


# ---- what the times say -------------------------------------------------------------------


def ratios(rows: list[dict], ours: str) -> list[dict]:
    """How many times as long as `ours` each other contender takes for a token, by medians."""
    base = {row["position"]: row["median_ms"] for row in rows if row["contender"] == ours}
    return [
        {
            "contender": row["contender"],
            "position": row["position"],
            "times": row["median_ms"] / base[row["position"]],
        }
        for row in rows
        if row["contender"] != ours and row["position"] in base
    ]


def key_row(result: dict) -> dict:
    """What it comes down to: our speed, and how much slower each other one is, by position."""
    found = {"ours": result["ours"], "tokens_per_second": {}, "times_as_long": {}}
    for row in result["rows"]:
        if row["contender"] == result["ours"]:
            found["tokens_per_second"][str(row["position"])] = round(row["tokens_per_second"])
            found["state_mib"] = round(row["cache_bytes"] / 2**20, 3)
    for row in result["ratios"]:
        found["times_as_long"].setdefault(row["contender"], {})[str(row["position"])] = round(
            row["times"], 2
        )
    for row in result.get("batches", []):
        at_once = found.setdefault("tokens_per_second_by_pieces_at_once", {})
        at_once[str(row["rows"])] = round(row["tokens_per_second"])
    if "memory" in result:
        found["growth_mib"] = result["memory"]["growth_mib"]
    return found


LOOKS = {  # ours in ink, others in colours that have no other meaning in this course
    "stepper": (plots.INK, "-"),
    "pytorch": (plots.INK, "--"),
    "transformers_mamba": (plots.OTHER[1], "-"),
    "gpt2": (plots.OTHER[0], "-"),
    "gpt2_static": (plots.OTHER[0], "--"),
}


def draw(result: dict, ax=None):
    """Tokens a second against position, both in logarithms, a line a contender;
    returns the figure.
    """
    import matplotlib

    if ax is None:
        _, ax = plots.figure(height=4.6)
    lines = []
    for name, about in result["contenders"].items():
        points = [
            (row["position"], *(1e3 / row[q] for q in ("q3_ms", "median_ms", "q1_ms")))
            for row in result["rows"]
            if row["contender"] == name
        ]
        if points:
            lines.append((about["label"], *LOOKS[name], points))
    plots.quartile_lines(ax, lines, room=0.32)
    ax.set_xlabel("tokens in the piece so far")
    ax.set_ylabel("tokens a second")
    with matplotlib.rc_context(plots.STYLE):
        ax.set_title(_title(result))
    return ax.figure


def _title(result: dict) -> str:
    """The finding: how much slower others are at the last position; of two GPT-2s, the faster."""
    last = max((row["position"] for row in result["ratios"]), default=0)
    times = {row["contender"]: row["times"] for row in result["ratios"] if row["position"] == last}
    groups = {"transformers' Mamba": ("transformers_mamba",), "GPT-2": ("gpt2", "gpt2_static")}
    parts = []
    for label, names in groups.items():
        of_group = [times[name] for name in names if name in times]
        if of_group:
            fastest = min(of_group)
            digits = 0 if fastest >= 10 else 1
            parts.append(f"{fastest:,.{digits}f} times as fast as {label}")
    if not parts:
        return "Tokens a second against position"
    return f"At position {last:,}, ours is {', '.join(parts)}"


# ---- command line -------------------------------------------------------------------------


def load(device: str = "") -> dict:
    """The measurement on a device such as "cpu_2_cores" (default: this one);
    empty if there is none.
    """
    return env.read_results(f"generate_{device or slug(env.device_name())}")


def table(result: dict) -> str:
    """The rows in Markdown, which also reads well in a terminal."""
    times = {(row["contender"], row["position"]): row["times"] for row in result["ratios"]}
    heads = (
        "contender",
        "position",
        "ms a token",
        "tokens a second",
        f"times as long as {result['ours']}",
        "state or cache, MiB",
    )
    lines = [heads, ["---"] * len(heads)]
    for row in sorted(result["rows"], key=lambda row: row["position"]):
        ratio = times.get((row["contender"], row["position"]))
        lines.append(
            [
                row["contender"],
                f"{row['position']:,}",
                "{median_ms:.3f} ({q1_ms:.3f}–{q3_ms:.3f}, n={count})".format(**row),
                f"{row['tokens_per_second']:,.0f}",
                "" if ratio is None else f"{ratio:.1f}",
                f"{row['cache_bytes'] / 2**20:.2f}",
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _options(argv: list[str]) -> argparse.Namespace:
    """The command line; `UserError` where it makes no sense."""
    parser = argparse.ArgumentParser(
        prog="python -m lib.lab.bench generate", description=main.__doc__
    )
    add = parser.add_argument
    add(
        "--positions",
        type=listed,
        default=POSITIONS,
        help="positions, with commas between (512,2048,8192,32768)",
    )
    add("--d-model", type=int, default=256, help="width of the residual (%(default)s)")
    add("--n-layer", type=int, default=8, help="layers of the Mamba (%(default)s)")
    add("--d-state", type=int, default=16, help="states a channel (%(default)s)")
    add("--vocab-size", type=int, default=1024, help="tokens in the vocabulary (%(default)s)")
    add("--repeats", type=int, default=15, help="rounds (%(default)s)")
    add("--tokens", type=int, default=128, help="tokens a round (%(default)s)")
    add(
        "--seconds",
        type=float,
        default=1,
        help="a slow contender gets fewer tokens a round, though four, where they "
        "would take longer than this (%(default)s)",
    )
    add(
        "--limit",
        type=float,
        default=10,
        help="a contender stops where a token takes longer than so many seconds (%(default)s)",
    )
    add(
        "--memory-tokens",
        type=int,
        default=32768,
        help="tokens that ours generates while its memory is watched; 0 for no watch (%(default)s)",
    )
    add(
        "--only",
        type=listed,
        default=NAMES,
        help=f"contenders, with commas between ({','.join(NAMES)})",
    )
    add("--seed", type=int, default=0, help="of weights and tokens (%(default)s)")
    add("--output", type=Path, help="the JSON file (default data/results/generate_DEVICE.json)")
    args = parser.parse_args(argv)
    try:
        args.positions = sorted({int(position) for position in args.positions})
    except ValueError as error:
        raise UserError(
            "--positions takes whole numbers with commas between, such as 512,2048,8192"
        ) from error
    sizes = (args.d_model, args.n_layer, args.d_state, args.vocab_size, args.repeats, args.tokens)
    if not args.positions or min(*args.positions, *sizes) < 1 or args.memory_tokens < 0:
        raise UserError(
            "--positions, --d-model, --n-layer, --d-state, --vocab-size, "
            "--repeats and --tokens are sizes: give at least 1 of each"
        )
    if unknown := [name for name in args.only if name not in NAMES]:
        raise UserError(f"--only does not know {unknown[0]!r}: choose from {', '.join(NAMES)}")
    return args


def main(argv: list[str]) -> None:
    """Time generation on a CPU: ours, in C++ and in PyTorch, transformers' Mamba,
    and a GPT-2 of equal size.
    """
    args = _options(argv)
    config = {
        "vocab_size": args.vocab_size,
        "d_model": args.d_model,
        "n_layer": args.n_layer,
        "d_state": args.d_state,
    }
    task = {
        "config": config,
        **{
            name: getattr(args, name)
            for name in (
                "positions",
                "repeats",
                "tokens",
                "seconds",
                "limit",
                "memory_tokens",
                "seed",
            )
        },
    }
    found = _run(task | {"task": "time", "names": [name for name in NAMES if name in args.only]})
    if not found["rows"]:
        reasons = "; ".join([*found["absent"].values(), *(stop["why"] for stop in found["cut"])])
        raise UserError(f"nothing could be measured: {reasons}")
    rows = found["rows"]
    result = found.pop("machine") | {
        "command": env.command_line("python", "-m", "lib.lab.bench", "generate", *argv),
        "seed": args.seed,
        "config": config,
        "positions": args.positions,
        "ours": next(name for name in NAMES if name in found["contenders"]),
        **found,
    }
    result["ratios"] = ratios(rows, result["ours"])
    if args.memory_tokens and "stepper" in found["contenders"]:
        note(f"memory over {args.memory_tokens:,} tokens")
        result["memory"] = _run(task | {"task": "memory"})
    result["key"] = key_row(result)
    path = args.output or env.RESULTS / f"generate_{slug(result['device'])}.json"
    write_json(path, result, path.name)
    with atomic_write(path.with_suffix(".png")) as part:
        part.write_bytes(plots.png_bytes(draw(result)))
    print(table(result))
    print(json.dumps(result["key"], indent=1))
    print(f"in {path.name} and {path.with_suffix('.png').name}: {len(rows)} rows")


if __name__ == "__main__":
    answer(child)
