"""The fused CPU scan, `cpu.cpp`, with a gradient; `lib.scan.native` compiles it once and loads it."""

import ctypes
from ctypes import c_long, c_void_p
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lib.env.errors import UserError
from lib.scan.arguments import check_scan, check_step
from lib.scan.native import Kernel, address

# steps between kept states; channels and states are rounded up to these: as in cpu.cpp
CHUNK, LANES, PAD = 12, 16, 8

SOURCE = Path(__file__).with_name("cpu.cpp")
KERNEL = Kernel(SOURCE, "the fused CPU scan", "the scan runs in plain PyTorch, several times slower")
available, build = KERNEL.available, KERNEL.build


class Inputs(NamedTuple):
    """What a scan reads, shapes as in `lib.scan.selective_scan`.

    x, delta, B, C, z are all float32 or all bfloat16, and may be parts of longer rows; the rest is float32.
    """

    x: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    delta_bias: Tensor | None
    delta_softplus: bool


class Gradients(NamedTuple):
    """The gradients of a scan's inputs; x, delta, B, C and z in their dtype, the others in float32."""

    x: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    z: Tensor | None
    delta_bias: Tensor
    h0: Tensor


class _Rows(ctypes.Structure):
    """A tensor (B, L, columns): where it begins, and the numbers from one step to the next."""

    _fields_ = [("data", c_void_p), ("row", c_long)]


class _Scan(ctypes.Structure):
    """`Scan` in cpu.cpp."""

    _fields_ = [
        *((name, c_long) for name in ("batch", "length", "channels", "states", "softplus", "threads")),
        *((name, _Rows) for name in ("x", "delta", "B", "C", "z", "y")),
        *((name, c_void_p) for name in ("A", "D", "bias", "h0", "kept", "last")),
        *((name, _Rows) for name in ("dy", "dx", "ddelta", "dB", "dC", "dz")),
        *((name, c_void_p) for name in ("dlast", "dA", "dD", "dbias", "dh0")),
    ]


def forward(given: Inputs, h0: Tensor | None, keep: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """y (B, L, D), the last state (B, D, N) in float32, and with `keep` what the backward pass needs."""
    x, A = given.x, given.A
    batch, length, channels = x.shape
    states = A.shape[1]
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    last = A.new_empty(batch, channels, states)
    kept = None
    if keep:
        tiles, padded = -(-channels // LANES), -(-states // PAD) * PAD
        kept = A.new_empty(batch, -(-length // CHUNK), tiles, padded, LANES)
    call = _call(given)
    call.y = _rows(y)
    call.h0, call.kept, call.last = address(h0), address(kept), address(last)
    KERNEL.library.scan_forward(ctypes.byref(call), x.dtype == torch.bfloat16)
    return y, last, kept


def backward(given: Inputs, kept: Tensor, dy: Tensor, dlast: Tensor | None, *, dB: Tensor | None = None,
             dC: Tensor | None = None, dz: Tensor | None = None) -> Gradients:
    """All gradients. dB, dC and dz are written where the caller wants them, if it names a place."""
    x, A = given.x, given.A
    batch, _, channels = x.shape
    like = lambda t: torch.empty_like(t, memory_format=torch.contiguous_format)
    if given.z is not None and dz is None:
        dz = like(given.z)
    found = Gradients(like(x), like(given.delta), like(A), like(given.B) if dB is None else dB,
                      like(given.C) if dC is None else dC, A.new_empty(channels), dz, A.new_empty(channels),
                      A.new_empty(batch, *A.shape))
    call = _call(given)
    call.kept, call.dlast = address(kept), address(dlast)
    call.dy, call.dx, call.ddelta = _rows(dy), _rows(found.x), _rows(found.delta)
    call.dB, call.dC, call.dz = _rows(found.B), _rows(found.C), _rows(found.z)
    call.dA, call.dD, call.dbias, call.dh0 = map(address, (found.A, found.D, found.delta_bias, found.h0))
    KERNEL.library.scan_backward(ctypes.byref(call), x.dtype == torch.bfloat16)
    return found


def _call(given: Inputs) -> _Scan:
    batch, length, channels = given.x.shape
    return _Scan(batch, length, channels, given.A.shape[1], given.delta_softplus, torch.get_num_threads(),
                 *map(_rows, (given.x, given.delta, given.B, given.C, given.z)), _Rows(),
                 *map(address, (given.A, given.D, given.delta_bias)))


def _rows(tensor: Tensor | None) -> _Rows:
    return _Rows() if tensor is None else _Rows(address(tensor), tensor.stride(1))


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, delta, A, B, C, D, z, delta_bias, delta_softplus, h0):
        given = Inputs(x, delta, A, B, C, D, z, delta_bias, delta_softplus)
        y, last, kept = forward(given, h0, keep=any(ctx.needs_input_grad))
        ctx.save_for_backward(*given[:8], kept)
        ctx.softplus = delta_softplus
        return y, last

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dlast):
        *tensors, kept = ctx.saved_tensors
        given = Inputs(*tensors, ctx.softplus)
        found = backward(given, kept, in_rows(dy), None if dlast is None else dlast.contiguous())
        return (*found[:5], None if given.D is None else found.D, found.z,
                None if given.delta_bias is None else found.delta_bias, None,
                found.h0 if ctx.needs_input_grad[9] else None)


def in_rows(tensor: Tensor) -> Tensor:
    """The tensor (B, L, columns) itself where its rows lie at equal distances, else a copy of it."""
    tensor = tensor.resolve_neg()
    regular = tensor.stride(2) == 1 and tensor.stride(0) == tensor.shape[1] * tensor.stride(1)
    # not `contiguous`: that keeps the odd strides of a dimension of one
    return tensor if regular else tensor.clone(memory_format=torch.contiguous_format)


def in_floats(tensor: Tensor | None) -> Tensor | None:
    """The tensor as float32 whose numbers follow on each other, as the kernel reads them."""
    return None if tensor is None else tensor.float().resolve_neg().contiguous()


def scan(x, delta, A, B, C, D, z, delta_bias, delta_softplus, h0):
    """The fused scan on a CPU; shapes as in `lib.scan.selective_scan`. Returns y, last h.

    Where x, delta, B, C and z are all bfloat16 they are read and written so; else as float32.
    Raises `UserError` for arguments that do not fit, and where there is no compiler.
    """
    check_scan(x, delta, A, B, C, D, z, delta_bias, h0)
    _check(x)
    moving = [x, delta, B, C, z]
    if any(t is not None and t.dtype != torch.bfloat16 for t in moving):
        moving = [t if t is None else t.float() for t in moving]
    x, delta, B, C, z = (t if t is None else in_rows(t) for t in moving)
    A, D, delta_bias, h0 = map(in_floats, (A, D, delta_bias, h0))
    return _SelectiveScan.apply(x, delta, A, B, C, D, z, delta_bias, bool(delta_softplus), h0)


@torch.no_grad()
def step(h, x, delta, A, B, C, D, z, delta_bias, delta_softplus):
    """One step of time, without gradients; shapes as in `lib.scan.selective_step`. Returns y, new h.

    Raises `UserError` as `scan` does.
    """
    check_step(h, x, delta, A, B, C, D, z, delta_bias)
    _check(x)
    dtype = x.dtype
    x, delta, A, B, C, D, z, delta_bias = map(in_floats, (x, delta, A, B, C, D, z, delta_bias))
    h = h.float().clone(memory_format=torch.contiguous_format)
    y = torch.empty_like(x)
    sizes = [ctypes.c_long(n) for n in h.shape]
    KERNEL.library.scan_step(*map(address, (x, delta, A, B, C, D, z, delta_bias)),
                             ctypes.c_int(bool(delta_softplus)), *sizes, address(h), address(y))
    return y.to(dtype), h


def _check(x):
    if x.device.type != "cpu" or x.dtype == torch.float64:
        raise UserError("backend 'cpu' takes float32, bfloat16 or float16 tensors on a CPU: choose backend 'auto'")
    if not available():
        raise UserError("backend 'cpu' needs a C++ compiler (g++ or clang++): install one, or choose 'parallel'")


def keep_memory() -> None:
    """Ask glibc to keep freed memory, and Linux to hand it out in large pages. Elsewhere it does nothing.

    Tensors over 32 MiB otherwise go back to the system at every training step, and a page fault for each
    4 KiB of them costs more than the arithmetic.
    """
    try:
        libc = ctypes.CDLL(None)
        mallopt, malloc, free, madvise = libc.mallopt, libc.malloc, libc.free, libc.madvise
    except (OSError, AttributeError, TypeError):
        return
    for option, size in ((-4, 0), (-1, 2_000_000_000), (-2, 1 << 28)):  # no mmap, no trim, top pad
        mallopt(ctypes.c_int(option), ctypes.c_int(size))
    reserve, large_page, advice = 2_000_000_000 - (1 << 28), 2 << 20, 14  # MADV_HUGEPAGE
    malloc.restype, malloc.argtypes, free.argtypes = c_void_p, [ctypes.c_size_t], [c_void_p]
    madvise.argtypes = [c_void_p, ctypes.c_size_t, ctypes.c_int]
    block = malloc(reserve)  # addresses alone: no memory until it is written
    if block:
        first = -(-block // large_page) * large_page
        madvise(first, block + reserve - first, advice)
        free(block)
