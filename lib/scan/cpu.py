"""The fused CPU scan, `cpu.cpp`, with a gradient; `lib.scan.native` compiles it once and loads it."""

import ctypes
from pathlib import Path

import torch

from lib.env.errors import UserError
from lib.scan.native import Kernel, address

CHUNK, SLAB = 32, 128  # steps between two kept states, channels of a share of work: as in cpu.cpp

SOURCE = Path(__file__).with_name("cpu.cpp")
KERNEL = Kernel(SOURCE, "the fused CPU scan", "the scan runs in plain PyTorch, several times slower")
available, build = KERNEL.available, KERNEL.build


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


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, delta, A, B, C, D, z, bias, softplus, h0):
        batch, length, channels = x.shape
        states = A.shape[1]
        y, last = torch.empty_like(x), x.new_empty(batch, channels, states)
        kept = x.new_empty(batch, -(-length // CHUNK), channels, states)
        ctx.sizes = [ctypes.c_long(n) for n in (batch, length, channels, states)]
        ctx.options = ctypes.c_int(softplus), ctypes.c_int(torch.get_num_threads())
        KERNEL.library.scan_forward(*map(address, (x, delta, A, B, C, D, z, bias, h0)), *ctx.options,
                                *ctx.sizes, *map(address, (y, kept, last)))
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
        KERNEL.library.scan_backward(*map(address, (x, delta, A, B, C, D, z, bias)), *ctx.options, *ctx.sizes,
                                 *map(address, (kept, dy, dlast, dx, ddelta, dA, dB, dC, dD, dz, dh0)))
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
    KERNEL.library.scan_step(*map(address, (x, delta, A, B, C, D, z, delta_bias)), ctypes.c_int(delta_softplus), *sizes,
                         address(h), address(y))
    return y, h


def _check(x):
    if x.device.type != "cpu" or x.dtype != torch.float32:
        raise UserError("backend 'cpu' takes float32 tensors on a CPU: choose backend 'auto'")
    if not available():
        raise UserError("backend 'cpu' needs a C++ compiler (g++ or clang++): install one, or choose 'parallel'")
