"""What the compiler makes of the Triton kernels, without a GPU: registers, spills, instructions.

    python -m lib.lab.bench triton 7.5 8.0 9.0

Triton compiles ahead of time for a compute capability, and its wheel brings cuobjdump, which reads
the machine code back.
"""

import argparse
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lib.env.errors import UserError
from lib.scan import triton_kernel

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
# arguments that are as long as the sequence; they have the dtype of x, the others are float32
LONG = {"x_ptr", "delta_ptr", "B_ptr", "C_ptr", "z_ptr", "y_ptr", "dy_ptr", "dx_ptr", "dz_ptr"}


def compiled(kernel, capability: float, dtype: torch.dtype, d_state: int = 16):
    """A kernel of `lib.scan.triton_kernel`, compiled for one GPU generation with all its options.

    Pointers and sizes are taken as multiples of 16, as they are at run time for most shapes: else
    every load would be scalar (and slow).
    """
    if triton.knobs.runtime.interpret:
        raise UserError("kernels cannot be compiled while TRITON_INTERPRET is set: unset it")
    settings = triton_kernel.options(dtype)
    warps = settings.pop("num_warps")
    constants = settings | {"N": d_state, "SOFTPLUS": True}
    signature, aligned = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        pointer = f"*{NAMES[dtype] if name in LONG else 'fp32'}"
        signature[name] = pointer if name.endswith("_ptr") else "i32"
        aligned[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    return triton.compile(
        source, target=GPUTarget("cuda", round(10 * capability), 32), options={"num_warps": warps}
    )


def cost(kernel, capability: float, dtype: torch.dtype, d_state: int = 16) -> dict:
    """Registers a thread, bytes spilled, shared memory, and machine instructions a state.

    `inner` counts the loop over N, per (b, t, d, n); `outer` what a step of time adds to it, spread
    over the N states. Raises `UserError` where cuobjdump is missing.
    """
    binary = compiled(kernel, capability, dtype, d_state).asm["cubin"]
    tool = next(Path(triton.__file__).parent.glob("backends/nvidia/bin/cuobjdump*"), None)
    if tool is None:
        raise UserError("this Triton has no cuobjdump: instructions cannot be counted")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        usage, code = (
            subprocess.run([str(tool), flag, file.name], capture_output=True, text=True, check=True)
            for flag in ("-res-usage", "-sass")
        )
    found = re.search(
        r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage.stdout + usage.stderr
    )
    registers, stack, shared, local = map(int, found.groups())
    settings = triton_kernel.options(dtype)
    elements = settings["BLOCK_D"] * settings["BLOCK_L"] / (32 * settings["num_warps"])
    inner, outer = sorted(loops(code.stdout), key=lambda body: sum(body.values()))[-2:]
    count = sum(inner.values())
    return {
        "registers": registers,
        "spilled_bytes": stack + local,
        "shared_bytes": shared,
        "inner": count / elements,
        "outer": (sum(outer.values()) - count) / elements / d_state,
        "opcodes": dict(inner.most_common(12)),
    }


def loops(code: str) -> list[Counter]:
    """The opcodes in each loop of a listing: from the target of a backward branch to the branch."""
    lines = [(int(m[1], 16), m[2]) for m in re.finditer(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", code)]
    found = []
    for address, text in lines:
        target = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if target and int(target[1], 16) < address:
            body = [t for a, t in lines if int(target[1], 16) <= a <= address]
            found.append(
                Counter(re.sub(r"^@!?U?P\w+ ", "", t).split()[0].split(".")[0] for t in body)
            )
    return found


def main(argv: list[str] | None = None) -> None:
    """Print what each kernel costs, for each compute capability that is asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m lib.lab.bench triton", description=__doc__.splitlines()[0]
    )
    parser.add_argument("capability", type=float, nargs="*", default=[7.5, 8.0, 9.0])
    print(
        "| compute capability | inputs | kernel | registers | spilled bytes "
        "| instructions a state |"
    )
    print("|---|---|---|---|---|---|")
    for capability in parser.parse_args(argv).capability:
        for dtype in (torch.float32, torch.float16 if capability < 8 else torch.bfloat16):
            for kernel in (triton_kernel.forward_kernel, triton_kernel.backward_kernel):
                c = cost(kernel, capability, dtype)
                print(
                    f"| {capability} | {NAMES[dtype]} | {kernel.fn.__name__.split('_')[0]} "
                    f"| {c['registers']} | {c['spilled_bytes']} "
                    f"| {c['inner']:.1f} + {c['outer']:.1f} |",
                    flush=True,
                )
