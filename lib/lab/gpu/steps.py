"""What each step of the GPU hour does.

A step runs in a process of its own, and its answer is JSON.
"""

import itertools
import json
import os
import shutil
import subprocess
import sys
import tarfile
from functools import partial
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib.env import machine as env
from lib.env.tensors import load_tensors, save_tensors
from lib.lab.bench.timing import spread, stopwatch, take_turns
from lib.lab.gpu.hour import Hour, keep
from lib.scan.selective import selective_scan

# the types of number, and the error that each explains
DTYPES = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}
# (B, L, D, N): a single step, odd ones, across the borders of tiles, many states, a long one
SHAPES = (
    (1, 1, 1, 1),
    (2, 17, 5, 3),
    (3, 257, 33, 16),
    (2, 1025, 65, 16),
    (1, 130, 16, 128),
    (2, 300, 48, 64),
    (1, 4096, 256, 16),
)
RESULTS = ("y", "last", "dx", "ddelta", "dA", "dB", "dC", "dD", "dz", "dbias", "dh0")


def take(name: str, hour: Hour, minutes: float) -> None:
    """Take a step and keep its answer."""
    if hour.tiny:
        from lib.scan.triton_interpreter import fast_interpreter

        fast_interpreter()
    answer = STEPS[name](hour, minutes)
    facts = env.provenance("python -m lib.lab.gpu run" + " --tiny" * hour.tiny)
    keep(hour, name, answer | facts)


def device() -> str:
    """Where it runs: on a GPU, or in a rehearsal on the processor."""
    return "cuda" if torch.cuda.is_available() else "cpu"


# ---- the kernels -----------------------------------------------------------------------------


def problem(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> tuple[Tensor, ...]:
    """Random arguments of a scan: x, delta, A, B, C, D, z, delta_bias, h0."""
    batch, length, channels, states = shape
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*size, generator=generator)
    like_x = batch, length, channels
    x, delta, z = draw(*like_x), draw(*like_x) - 1, draw(*like_x)
    A = -torch.rand(channels, states, generator=generator) * 4 - 0.1
    B, C = draw(batch, length, states), draw(batch, length, states)
    D, bias, h0 = draw(channels), draw(channels), draw(batch, channels, states)
    x, delta, B, C, z = (t.to(device(), dtype) for t in (x, delta, B, C, z))
    A, D, bias, h0 = (t.to(device()) for t in (A, D, bias, h0))
    return x, delta, A, B, C, D, z, bias, h0


def weighting(arguments) -> list[Tensor]:
    """Random numbers like y and the last state, which a gradient begins with."""
    x, h0 = arguments[0], arguments[-1]
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(t.shape, generator=generator).to(t) for t in (x, h0)]


def results_of(arguments, optional: bool, backend: str, weights: list[Tensor]) -> list[Tensor]:
    """y, the last state and every gradient, under one weighting of both results."""
    x, delta, A, B, C, D, z, bias, h0 = (t.detach().requires_grad_() for t in arguments)
    rest = (D, z, bias, True, h0) if optional else (None, None, None, True, None)
    y, last = selective_scan(x, delta, A, B, C, *rest, True, backend)
    leaves = [x, delta, A, B, C, *([D, z, bias, h0] if optional else [])]
    grads = torch.autograd.grad([y, last], leaves, weights)
    return [y.detach(), last.detach(), *grads]


def apart(ours: Tensor, true: Tensor) -> float:
    """|ours - true| / |true|; infinite where anything is no number."""
    error = ((ours.double() - true).norm() / true.norm().clamp(min=1e-30)).item()
    return error if error == error else float("inf")


def correct(hour: Hour, minutes: float) -> dict:
    """The Triton scan against the loop in float64;
    a case that is wrong is listed, and fails the step at its end.
    """
    shapes = SHAPES[1:2] if hour.tiny else SHAPES
    dtypes = dict(itertools.islice(DTYPES.items(), 1)) if hour.tiny else DTYPES
    rows = []
    for seed, (shape, dtype, optional) in enumerate(
        itertools.product(shapes, dtypes, (True, False))
    ):
        arguments = problem(shape, dtype, seed)
        weights = weighting(arguments)
        exact = [t.double() for t in arguments]
        true = results_of(exact, optional, "loop", [t.double() for t in weights])
        ours = results_of(arguments, optional, "triton", weights)
        errors = [apart(a, b) for a, b in zip(ours, true, strict=True)]
        names = RESULTS if optional else RESULTS[:7]
        rows.append({
            "shape": shape, "dtype": str(dtype)[6:], "optional": optional,
            "errors": dict(zip(names, errors, strict=True)),
            "right": max(errors) < dtypes[dtype],
        })  # fmt: skip
        keep(hour, "correct", {"cases": rows})
        print(shape, dtype, "optional" if optional else "plain", f"{max(errors):.1e}")
    return {"cases": rows, "wrong": [row for row in rows if not row["right"]]}


def peer(hour: Hour, minutes: float) -> dict:
    """mamba-ssm from its sources, for this GPU alone."""
    sources = sorted(hour.folder.glob("in*/peer/mamba_ssm-*.tar.gz"))
    if not sources:
        return {"built": False, "why": "its sources were not carried over"}
    if shutil.which("nvcc") is None:
        return {"built": False, "why": "there is no CUDA compiler (nvcc) here"}
    major, minor = torch.cuda.get_device_capability()
    wanted = {
        "MAMBA_FORCE_BUILD": "TRUE", "MAMBA_KEEP_CUDA_BUILD": "TRUE",
        "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}", "MAX_JOBS": str(os.cpu_count()),
    }  # fmt: skip
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-index",
        "--no-deps",
        "--no-build-isolation",
        "--target",
        hour.work / "peer",
        sources[0],
    ]
    done = subprocess.run(
        command, check=False, env={**os.environ, **wanted}, capture_output=True, text=True
    )
    print(done.stdout, done.stderr)
    return {"built": done.returncode == 0, "why": done.stderr.strip()[-300:]}


def scan(hour: Hour, minutes: float) -> dict:
    """`python -m lib.lab.bench scan`, with sizes that fit the minutes."""
    from lib.lab.bench import scan as bench

    output = hour.result("scan_gpu")
    options = [
        "--repeats",
        "9",
        "--seconds",
        "2",
        "--limit",
        "2",
        "--lengths",
        "512,2048,8192,32768",
    ]
    if hour.tiny:
        options = [
            "--device",
            "cpu",
            "--repeats",
            "3",
            "--seconds",
            "0.1",
            "--lengths",
            "64",
            "--batch",
            "1",
            "--d-inner",
            "8",
            "--only",
            "parallel,loop",
            "--allocator",
            "default",
            "--no-figure3",
        ]
    bench.main([*options, "--output", str(output)])
    return {"file": output.name}


def tiles(hour: Hour, minutes: float) -> dict:
    """Forward and backward in milliseconds for each way to cut a tile."""
    from lib.scan import triton_kernel

    shape = (1, 40, 8, 4) if hour.tiny else (8, 2048, 1536, 16)
    dtype = torch.float32 if hour.tiny else torch.bfloat16
    arguments = problem(shape, dtype, 0)
    weights = weighting(arguments)  # drawn here: the clock runs over the kernels alone
    choices = list(itertools.product((16, 32, 64), (32, 64), (2, 4)))
    clock = stopwatch(device())
    rows = []
    for channels, steps, warps in choices[: 2 if hour.tiny else None]:
        cut = {"BLOCK_D": channels, "BLOCK_L": steps}
        options = lambda dtype, cut=cut, warps=warps: (
            cut | {"RUN": 16 // dtype.itemsize, "num_warps": warps}
        )
        work = partial(results_of, arguments, True, "triton", weights)
        row = cut | {"warps": warps}
        with mock.patch.multiple(triton_kernel, **cut, options=options):
            try:
                work()  # compiles
                row |= spread([clock(work) for _ in range(3 if hour.tiny else 9)])
            except RuntimeError as error:  # it may not fit into the GPU's shared memory
                row["why"] = str(error)[:200]
        rows.append(row)
        keep(hour, "tiles", {"rows": rows})
    timed = [row for row in rows if "median_ms" in row]
    return {"shape": shape, "rows": rows, "best": min(timed, key=lambda row: row["median_ms"])}


# ---- training --------------------------------------------------------------------------------


def train_step(hour: Hour, minutes: float) -> dict:
    """A training step in bfloat16: Mamba with the fused scan and with plain PyTorch's,
    two rivals beside it.
    """
    from lib.lab.rivals.matched import Size, build

    size = Size(32, 2, 4, window=16) if hour.tiny else Size(512, 12, 16, window=1024)
    batch, length = (2, 16) if hour.tiny else (16, 1024)
    contenders = {
        "mamba": ("mamba", "auto"),
        "mamba, plain scan": ("mamba", "parallel"),
        "transformer": ("transformer", None),
        "lstm": ("lstm", None),
    }
    tokens = torch.randint(580, (batch, length + 1), device=device())
    steps, rows = {}, {}
    for name, (arch, backend) in contenders.items():
        torch.manual_seed(0)
        model = build(arch, 580, size).to(device()).train()
        rows[name] = {"parameters": model.parameter_count()}
        steps[name] = partial(
            _step,
            model,
            tokens,
            {} if backend is None else {"backend": backend},
            torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True),
        )
        steps[name]()
    clock = stopwatch(device())
    works = {name: partial(clock, step) for name, step in steps.items()}
    times, failed = take_turns(works, dict.fromkeys(works, 3 if hour.tiny else 10))
    for name, taken in times.items():
        found = spread(taken)
        rows[name] |= found | {"tokens_per_second": 1e3 * batch * length / found["median_ms"]}
    return {"batch": batch, "length": length, "rows": rows, "failed": failed}


def _step(model: nn.Module, tokens: Tensor, options: dict, optimizer) -> None:
    with torch.autocast(device(), torch.bfloat16):
        logits = model(tokens[:, :-1], **options)
        loss = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def flagship(hour: Hour, minutes: float) -> dict:
    """Train on the base tokens until the minutes are over;
    the best weights come back as float16.
    """
    from lib.train.__main__ import main
    from lib.train.checkpoints import exists

    folder = hour.work / "flagship"
    # what is kept back is for imports, compiling and validation
    budget = 0.05 if hour.tiny else max(0.2, minutes - 0.8)
    options = [
        "--preset",
        "quick" if hour.tiny else "h100",
        "--transpose",
        "5",
        "--louder",
        "2",
        "--copies",
        "no",
        "--steps",
        "1000000",
        "--minutes",
        f"{budget:.2f}",
    ]
    if hour.tiny:
        options += ["--eval-every", "5", "--save-every", "5", "--eval-tokens", "500"]
    resume = ["--resume"] if exists(folder) else []
    main(["--streams", str(hour.streams), "--out", str(folder), *options, *resume])
    return {"best": _halved(hour), "options": options}


def _halved(hour: Hour) -> dict:
    """The best checkpoint as float16 in one archive, ready to be carried; what is known of it."""
    best = hour.work / "flagship" / "best"
    half = hour.work / "flagship_half"
    shutil.copytree(best, half, dirs_exist_ok=True)
    weights = half / "model.safetensors"
    tensors = load_tensors(weights, do="run the step again")
    save_tensors({name: tensor.half() for name, tensor in tensors.items()}, weights)
    with tarfile.open(hour.work / "flagship_half.tar", "w") as tar:
        tar.add(half, "flagship")
    return json.loads((best / "config.json").read_text(encoding="utf-8"))


def race(hour: Hour, minutes: float) -> dict:
    """The race of the experiments, at the scale of the hour; it goes on where it was stopped."""
    from lib.lab.experiments.__main__ import main

    scale = "quick" if hour.tiny else "hour"
    jobs = 1 if hour.tiny else min(8, os.cpu_count() or 1)
    main(
        [
            "--scale",
            scale,
            "--only",
            "race",
            "--jobs",
            str(jobs),
            "--streams",
            str(hour.streams),
            "--folder",
            str(hour.work / "race"),
            "--kept",
            str(hour.work / "results" / "race"),  # what has ended comes home with the results
            "--results",
            str(hour.work / "results"),
            "--budget-minutes",
            f"{max(0.1, minutes - 0.3):.2f}",
        ]
    )
    found = hour.read(f"experiments_race_{scale}")
    finished = "summary" in found and not found["left"]
    return {"file": f"experiments_race_{scale}.json", "finished": finished}


STEPS = {step.__name__: step for step in (correct, peer, scan, tiles, train_step, flagship, race)}
