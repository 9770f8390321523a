"""The fused CPU scan: compile `scan_cpu.cpp` once, load it, give it a gradient.

The library is plain C called through ctypes: it compiles in seconds and needs no header of
torch. It is kept in data/cache under a name made of the source, the compiler and the
processor's features, so that a cache carried to another machine is never loaded there.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch

from lib.errors import UserError
from lib.files import whole

SOURCE = Path(__file__).with_name("scan_cpu.cpp")
CACHE = Path(__file__).resolve().parents[1] / "data" / "cache"
FLAGS = ["-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fopenmp",
         "-std=c++17", "-shared", "-fPIC", "-w"]
CHUNK, SLAB = 32, 128  # steps between two kept states, channels of a share of work: as in scan_cpu.cpp


def _compiler() -> str | None:
    return next((c for c in (os.environ.get("CXX"), "g++", "clang++") if c and shutil.which(c)), None)


def _processor() -> str:
    """What this machine's processor can do; code that was compiled for it may crash another."""
    try:
        return next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):
        return platform.processor() + platform.machine()


def _target() -> Path:
    """Where this machine's library is kept."""
    key = "\n".join([SOURCE.read_text(), str(_compiler()), " ".join(FLAGS), _processor(), platform.platform()])
    return CACHE / f"scan-{hashlib.sha256(key.encode()).hexdigest()[:12]}.so"


def build(say=print) -> bool:
    """Compile the kernel if it is not there yet; say so. Returns whether it can be used."""
    target, compiler = _target(), _compiler()
    if target.exists() and _library() is None:  # damaged: compile it again
        target.unlink()
    if not target.exists():
        if compiler is None:
            say("no C++ compiler found: the scan runs in plain PyTorch, several times slower")
            return False
        say("compiling the fused CPU scan (a few seconds, once)")
        try:
            with whole(target) as part:
                subprocess.run([compiler, *FLAGS, str(SOURCE), "-o", str(part)], check=True,
                               capture_output=True, timeout=300)
        except (UserError, subprocess.SubprocessError):
            say(f"{compiler} could not compile the fused scan: it runs in plain PyTorch, several times slower")
            return False
        _library.cache_clear()
    return _library() is not None


@functools.cache
def _library():
    """The loaded library, or None where it is not built."""
    target = _target()
    if not target.exists():
        return None
    try:
        library = ctypes.CDLL(str(target))
    except OSError:
        return None
    for function in (library.scan_forward, library.scan_backward, library.scan_step):
        function.restype = None
    return library


def ready() -> bool:
    """Whether the kernel is built and loads here. Never compiles."""
    return _library() is not None


@functools.cache
def available() -> bool:
    """Whether the kernel can be used here; compiles it if need be. Tries, and says so, once a process."""
    return ready() or build()


def keep_memory() -> None:
    """Ask glibc to keep freed memory: tensors over 32 MiB otherwise go back to the system at every
    training step, and the page faults cost more than the arithmetic. Elsewhere it does nothing.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    for option, size in ((-4, 0), (-1, 2_000_000_000), (-2, 1 << 28)):  # no mmap, no trim, top pad
        mallopt(ctypes.c_int(option), ctypes.c_int(size))


def _address(tensor):
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, delta, A, B, C, D, z, bias, softplus, h0):
        batch, length, channels = x.shape
        states = A.shape[1]
        y, last = torch.empty_like(x), x.new_empty(batch, channels, states)
        kept = x.new_empty(batch, -(-length // CHUNK), channels, states)
        ctx.sizes = [ctypes.c_long(n) for n in (batch, length, channels, states)]
        ctx.options = ctypes.c_int(softplus), ctypes.c_int(torch.get_num_threads())
        _library().scan_forward(*map(_address, (x, delta, A, B, C, D, z, bias, h0)), *ctx.options,
                                *ctx.sizes, *map(_address, (y, kept, last)))
        ctx.save_for_backward(x, delta, A, B, C, D, z, bias, kept)
        return y, last

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dlast):
        x, delta, A, B, C, D, z, bias, kept = ctx.saved_tensors
        batch, length, channels = x.shape
        states = A.shape[1]
        dy = dy.contiguous()
        dlast = dlast.contiguous() if dlast is not None else None
        dx, ddelta = torch.empty_like(x), torch.empty_like(x)
        dz = torch.empty_like(z) if z is not None else None
        dA, dh0 = x.new_empty(batch, channels, states), x.new_empty(batch, channels, states)
        slabs = -(-channels // SLAB)
        dB, dC, dD = B.new_empty(slabs, *B.shape), C.new_empty(slabs, *C.shape), x.new_empty(batch, channels)
        _library().scan_backward(*map(_address, (x, delta, A, B, C, D, z, bias)), *ctx.options, *ctx.sizes,
                                 *map(_address, (kept, dy, dlast, dx, ddelta, dA, dB, dC, dD, dz, dh0)))
        dbias = ddelta.sum((0, 1)) if bias is not None else None
        return (dx, ddelta, dA.sum(0), dB.sum(0), dC.sum(0), dD.sum(0) if D is not None else None, dz, dbias, None,
                dh0 if ctx.needs_input_grad[9] else None)


def scan(x, delta, A, B, C, D, z, delta_bias, delta_softplus, h0):
    """The fused scan, float32 on a CPU; shapes as in `lib.scan.selective_scan`. Returns y, last h."""
    _check(x)
    tensors = [t if t is None else t.contiguous() for t in (x, delta, A, B, C, D, z, delta_bias, h0)]
    return _Scan.apply(*tensors[:8], delta_softplus, tensors[8])


def step(h, x, delta, A, B, C, D, z, delta_bias, delta_softplus):
    """One step of time, without gradients; shapes as in `lib.scan.selective_step`. Returns y, new h."""
    _check(x)
    x, delta, A, B, C, D, z, delta_bias = (t if t is None else t.detach().float().contiguous()
                                           for t in (x, delta, A, B, C, D, z, delta_bias))
    h, y = h.detach().float().clone(memory_format=torch.contiguous_format), torch.empty_like(x)
    sizes = [ctypes.c_long(n) for n in h.shape]
    _library().scan_step(*map(_address, (x, delta, A, B, C, D, z, delta_bias)), ctypes.c_int(delta_softplus), *sizes,
                         _address(h), _address(y))
    return y, h


def _check(x):
    if x.device.type != "cpu" or x.dtype != torch.float32:
        raise UserError("backend 'cpu' takes float32 tensors on a CPU: choose backend 'auto'")
    if not available():
        raise UserError("backend 'cpu' needs a C++ compiler (g++ or clang++): install one, or choose 'parallel'")
