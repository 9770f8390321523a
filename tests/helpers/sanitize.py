"""Drive the kernels under AddressSanitizer and UBSan:
`python tests/helpers/sanitize.py [SEEDS]`, by hand, on Linux.

The sources are compiled again with g++'s sanitizers (a minute or two, once), and this process
begins anew with their library loaded before all others. Random shapes of the scan, its step, the
convolution, the block, the loss and the whole-model step follow, in float32 and bfloat16, on one
to three threads. A read or write that is out of bounds ends it with a report; without one it says
what was run.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# -O1: at -O3 the compiler takes some minutes a kernel
FLAGS = (
    "-march=native -O1 -g -fno-omit-frame-pointer -fno-sanitize-recover=all "
    "-fsanitize=address,bounds,integer-divide-by-zero,shift,signed-integer-overflow,alignment"
)
BUILD = """
from lib.mamba import block_cpu, step_cpu
from lib.scan import cpu, native
for kernel in (block_cpu.KERNEL, step_cpu.KERNEL, cpu.KERNEL):
    if not kernel.target().exists():
        print("compiling", kernel.what)
        kernel.compile(kernel.target(), "g++", native.THREADS[0])
"""
MOVING = ("x", "delta", "B", "C", "z")  # what a scan has at every step of time


def begin_anew() -> None:
    """Compile in a process like any other, then start with the sanitizer in front."""
    where = lambda name: subprocess.run(
        ["g++", f"-print-file-name={name}"], check=True, capture_output=True, text=True
    ).stdout.strip()
    environment = os.environ | {"CPU_FLAGS": FLAGS, "CXX": "g++", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", BUILD], check=True, cwd=ROOT, env=environment)
    # libstdc++ beside it, or the sanitizer does not find what throws exceptions
    environment |= {
        "LD_PRELOAD": f"{where('libasan.so')} {where('libstdc++.so')}",
        "ASAN_OPTIONS": "detect_leaks=0",
    }
    os.execve(sys.executable, [sys.executable, *sys.argv], environment)


def drive(seeds: int) -> None:
    """Every kernel, forward and backward, on so many random shapes each."""
    sys.path[:0] = [str(ROOT / "tests" / room) for room in ("scan", "mamba")]
    import torch
    from test_block_cpu import result_and_gradients
    from test_doors import random_problem, run
    from test_kernel_doors import random_block, random_convolution, random_model

    from lib.mamba import block_cpu
    from lib.mamba.step_cpu import Stepper
    from lib.scan.selective import selective_step

    block_cpu.ONE_THREAD = 0
    for seed in range(seeds):
        torch.manual_seed(seed)
        torch.set_num_threads(1 + seed % 3)
        given = random_problem(seed)
        run(given, "cpu")
        given = {k: v.detach() for k, v in given.items()}
        half = {k: v.bfloat16() if k in MOVING else v.clone() for k, v in given.items()}
        run({k: v.requires_grad_() for k, v in half.items()}, "cpu")
        one = {k: v[:, 0] if k in MOVING else v for k, v in given.items()}
        h = one.pop("h0", torch.zeros(len(one["x"]), *one["A"].shape))
        selective_step(h, **one, delta_softplus=True, backend="cpu")

        given = random_convolution(seed)
        result_and_gradients(block_cpu.convolve_silu, given, torch.ones(given["x"].shape))
        given["x"] = given["x"].detach().bfloat16().requires_grad_()
        result_and_gradients(block_cpu.convolve_silu, given, torch.ones(given["x"].shape))

        module, x, memory = random_block(seed)
        model, rows = random_model(seed)
        tokens = torch.randint(model.config.vocab_size, (rows, 14))
        for dtype in (None, torch.bfloat16):
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                y, after = block_cpu.block(module, x.requires_grad_(), memory)
                (y.sum() + sum(t.sum() for t in after)).backward()
                model(tokens[:, :-1], targets=tokens[:, 1:]).backward()
                with torch.no_grad():
                    model(tokens[:, :-1], targets=tokens[:, 1:])

        for weights in ("float32", "float16"):
            fast = Stepper(model, rows, weights)
            fast.load(model.prefill(tokens)[1])
            for token in tokens[:, :3].unbind(1):
                fast.step(token)
    print(f"{seeds} random shapes of every kernel: the sanitizers found nothing")


if __name__ == "__main__":
    if "libasan" not in os.environ.get("LD_PRELOAD", ""):
        begin_anew()
    drive(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
