"""One decay a head against one a state: `python -m lib.lab.bench ssd`.

The same scan in two forms, forward and with every gradient: `lib.scan.ssd_scan`, which is matrix
products in plain PyTorch, in float32 and with its products in bfloat16, and
`lib.scan.selective_scan`, which takes any decay, fused in C++. Both get the same problem, one decay
a head, so that their outputs must be equal. Against the length at a state of 16, and against the
size of the state. Writes data/results/ssd_cpu.json.
"""

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lib.env import machine as env
from lib.env.errors import UserError
from lib.env.files import write_json
from lib.env.paths import RESULTS
from lib.lab.bench.timing import limit_memory, rounds_for, spread, stopwatch, take_turns
from lib.scan import cpu as scan_cpu
from lib.scan import native, selective_scan, ssd_scan
from lib.scan.ssd import CHUNK

FORMS = {
    "scan": "selective scan, fused in C++",
    "ssd": "matrix products, float32",
    "ssd_bf16": "matrix products, bfloat16",
}


@dataclass(frozen=True)
class Sizes:
    """What is scanned: the channels of a model of width 256, as lib.train cuts its batches."""

    batch: int = 4
    heads: int = 8
    head_dim: int = 64
    lengths: tuple[int, ...] = (64, 256, 1024, 4096)
    states: tuple[int, ...] = (4, 16, 64, 128, 256)
    length: int = 512  # where the size of the state varies
    state: int = 16  # where the length varies: that of Mamba


def problem(sizes: Sizes, length: int, d_state: int) -> dict[str, Tensor]:
    """Random arguments of `ssd_scan`, by seed 0; rates as a fresh Mamba-2 has them."""
    random = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=random)
    a_step = sizes.batch, length, sizes.heads
    return {
        "x": draw(*a_step, sizes.head_dim),
        "delta": 0.1 * torch.rand(*a_step, generator=random),
        "A": -1 - 15 * torch.rand(sizes.heads, generator=random),
        "B": draw(sizes.batch, length, d_state),
        "C": draw(sizes.batch, length, d_state),
        "D": draw(sizes.heads),
    }


def as_channels(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same for `selective_scan`: each head's step, rate and D at all of its channels."""
    channels, d_state = given["x"].shape[-1], given["B"].shape[-1]
    each = lambda t: t.repeat_interleave(channels, -1)
    return given | {
        "x": given["x"].flatten(2),
        "delta": each(given["delta"]),
        "D": each(given["D"]),
        "A": each(given["A"])[:, None].repeat(1, d_state),
    }


def works(form: str, given: dict[str, Tensor]) -> tuple[Callable[[], Tensor], Callable[[], None]]:
    """(forward without gradients, forward and backward) of one form."""
    leaves = as_channels(given) if form == "scan" else given
    leaves = {name: t.clone().requires_grad_() for name, t in leaves.items()}
    call = partial(selective_scan, backend="cpu") if form == "scan" else ssd_scan

    def scan() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=form == "ssd_bf16"):
            return call(**leaves).flatten(2)

    def forward() -> Tensor:
        with torch.no_grad():
            return scan()

    def both() -> None:
        torch.autograd.grad(scan().sum(), list(leaves.values()))

    return forward, both


def measure(sizes: Sizes, repeats: int, seconds: float) -> list[dict]:
    """A row for each form, length and state; at each of them the forms take turns."""
    clock = stopwatch("cpu")
    places = [(length, sizes.state) for length in sizes.lengths] + [
        (sizes.length, n) for n in sizes.states
    ]
    rows = []
    for length, d_state in dict.fromkeys(places):
        given = problem(sizes, length, d_state)
        wanted = ssd_scan(**given, backend="loop").flatten(2)
        turns, rounds, off = {}, {}, {}
        for form in FORMS:
            forward, both = works(form, given)
            off[form] = ((forward() - wanted).norm() / wanted.norm()).item()
            both()
            for part, work in (("forward", forward), ("both", both)):
                turns[form, part] = partial(clock, work)
                rounds[form, part] = rounds_for(clock(work), repeats, seconds)
        taken, failed = take_turns(turns, rounds)
        if failed:
            raise UserError(
                f"at length {length} and a state of {d_state}: {next(iter(failed.values()))}"
            )
        rows += [
            {
                "form": form,
                "length": length,
                "d_state": d_state,
                "off": off[form],
                "forward": spread(taken[form, "forward"]),
                "both": spread(taken[form, "both"]),
            }
            for form in FORMS
        ]
    return rows


def main(argv: list[str] | None = None) -> None:
    """Time the selective scan against matrix products, at equal state, against length and state."""
    parser = argparse.ArgumentParser(prog="python -m lib.lab.bench ssd", description=main.__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--seconds", type=float, default=0.5, help="for each of the works at each place"
    )
    parser.add_argument("--output", type=Path, default=RESULTS / "ssd_cpu.json")
    args = parser.parse_args(argv)
    if args.repeats < 3:
        raise UserError(f"{args.repeats} rounds have no quartiles: give at least 3")
    limit_memory()
    if not scan_cpu.available():
        raise UserError(
            "the selective scan is measured in C++: install a compiler (g++ or clang++)"
        )
    scan_cpu.keep_memory()
    sizes = Sizes()
    rows = measure(sizes, args.repeats, args.seconds)
    machine = env.provenance("python -m lib.lab.bench ssd") | {
        "threads": torch.get_num_threads(),
        "seed": 0,
    }
    write_json(
        args.output,
        {
            "sizes": asdict(sizes),
            "forms": FORMS,
            "processor": native.units(),
            "chunk": CHUNK,
            "rows": rows,
            **machine,
        },
    )
    for row in rows:
        print(
            f"{FORMS[row['form']]:30} L {row['length']:5} N {row['d_state']:4}: "
            f"forward {row['forward']['median_ms']:7.1f} ms, "
            f"with gradients {row['both']['median_ms']:7.1f} ms, off by {row['off']:.0e}"
        )
