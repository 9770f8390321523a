"""The fused CPU scan, `cpu.cpp`, with a gradient.

`lib.scan.native` compiles it once and loads it.
"""

import ctypes
from ctypes import c_long, c_void_p
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lib.env.errors import UserError
from lib.scan.arguments import cast, check_scan, check_step, check_tensors
from lib.scan.native import Kernel, address
from lib.scan.operators import constant, differentiable, operator, saved, wants_derivative

# steps between kept states; channels and states are rounded up to these: as in cpu.cpp
CHUNK, LANES, PAD = 12, 16, 8

SOURCE = Path(__file__).with_name("cpu.cpp")
KERNEL = Kernel(
    SOURCE, "the fused CPU scan", "the scan runs in plain PyTorch, several times slower"
)
build = KERNEL.build


def available() -> bool:
    """Whether the kernel can be used here; see `Kernel.available`."""
    return KERNEL.available()


constant(available)


class Inputs(NamedTuple):
    """What a scan reads, shapes as in `lib.scan.selective_scan`.

    x, delta, B, C, z are all float32 or all bfloat16, and may be parts of longer rows;
    the rest is float32.
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
    """The gradients of a scan's inputs.

    Those of x, delta, B, C and z are in the dtype of these inputs, the others in float32.
    """

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
        *(
            (name, c_long)
            for name in ("batch", "length", "channels", "states", "softplus", "threads")
        ),
        *((name, _Rows) for name in ("x", "delta", "B", "C", "z", "y")),
        *((name, c_void_p) for name in ("A", "D", "bias", "h0", "kept", "last")),
        *((name, _Rows) for name in ("dy", "dx", "ddelta", "dB", "dC", "dz")),
        *((name, c_void_p) for name in ("dlast", "dA", "dD", "dbias", "dh0")),
    ]


def forward(given: Inputs, h0: Tensor | None, keep: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """y (B, L, D), the last state (B, D, N) in float32, and with `keep` what `backward` needs.

    Raises `UserError` for what does not fit.
    """
    return forward_unchecked(_as_read(given, h0), in_floats(h0), keep)


def backward(given: Inputs, kept: Tensor, dy: Tensor, dlast: Tensor | None) -> Gradients:
    """All gradients, from what `forward` kept and those of y and of the last state.

    Raises `UserError` as `forward` does.
    """
    given = _as_read(given)
    x, A = given.x, given.A
    shape = kept_shape(*x.shape, A.shape[1])
    check_tensors("the scan's gradient", x.device, {"kept": (kept, shape)}, (torch.float32,))
    check_tensors(
        "the scan's gradient",
        x.device,
        {"dy": (dy, x.shape), "dlast": (dlast, (len(x), *A.shape))},
        optional=("dlast",),
    )
    return backward_unchecked(given, in_floats(kept), in_rows(dy.to(x.dtype)), in_floats(dlast))


def forward_unchecked(
    given: Inputs, h0: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`forward` without a look at what it is given: for those who have looked."""
    x, A = given.x, given.A
    batch, _, channels = x.shape
    states = A.shape[1]
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    last = A.new_empty(batch, channels, states)
    kept = None
    if keep:
        # vectors of fewer lanes leave the end of the last tile as it is
        new = A.new_zeros if channels % LANES else A.new_empty
        kept = new(kept_shape(*x.shape, states))
    call = _call(given)
    call.y = _rows(y)
    call.h0, call.kept, call.last = address(h0), address(kept), address(last)
    KERNEL.library.scan_forward(ctypes.byref(call), x.dtype == torch.bfloat16)
    return y, last, kept


def backward_unchecked(
    given: Inputs,
    kept: Tensor,
    dy: Tensor,
    dlast: Tensor | None,
    *,
    dB: Tensor | None = None,
    dC: Tensor | None = None,
    dz: Tensor | None = None,
) -> Gradients:
    """`backward` without a look at what it is given.

    dB, dC and dz are written where the caller wants them, if it names a place.
    """
    x, A = given.x, given.A
    batch, _, channels = x.shape
    like = lambda t: torch.empty_like(t, memory_format=torch.contiguous_format)
    if given.z is not None and dz is None:
        dz = like(given.z)
    found = Gradients(
        like(x),
        like(given.delta),
        like(A),
        like(given.B) if dB is None else dB,
        like(given.C) if dC is None else dC,
        A.new_empty(channels),
        dz,
        A.new_empty(channels),
        A.new_empty(batch, *A.shape),
    )
    call = _call(given)
    call.kept, call.dlast = address(kept), address(dlast)
    call.dy, call.dx, call.ddelta = _rows(dy), _rows(found.x), _rows(found.delta)
    call.dB, call.dC, call.dz = _rows(found.B), _rows(found.C), _rows(found.z)
    call.dA, call.dD, call.dbias, call.dh0 = map(
        address, (found.A, found.D, found.delta_bias, found.h0)
    )
    if KERNEL.library.scan_backward(ctypes.byref(call), x.dtype == torch.bfloat16):
        raise UserError(
            "there is not enough memory for the scan's gradient: take fewer or shorter sequences"
        )
    return found


def _call(given: Inputs) -> _Scan:
    batch, length, channels = given.x.shape
    return _Scan(
        batch,
        length,
        channels,
        given.A.shape[1],
        given.delta_softplus,
        torch.get_num_threads(),
        *map(_rows, (given.x, given.delta, given.B, given.C, given.z)),
        _Rows(),
        *map(address, (given.A, given.D, given.delta_bias)),
    )


def _rows(tensor: Tensor | None) -> _Rows:
    return _Rows() if tensor is None else _Rows(address(tensor), tensor.stride(1))


def _scan_kernel(x, delta, A, B, C, D, z, delta_bias, delta_softplus, h0, keep):
    """y, the last state, and with `keep` the states that the backward pass starts from."""
    y, last, kept = forward(Inputs(x, delta, A, B, C, D, z, delta_bias, delta_softplus), h0, keep)
    return y, last, A.new_empty(0) if kept is None else kept


def _scan_fake(x, delta, A, B, C, D, z, delta_bias, delta_softplus, h0, keep):
    last = A.new_empty(x.shape[0], *A.shape)
    return x.new_empty(x.shape), last, A.new_empty(kept_shape(*x.shape, A.shape[1]) if keep else 0)


def _backward_kernel(x, delta, A, B, C, D, z, delta_bias, delta_softplus, kept, dy, dlast):
    """The gradients in the order of `Gradients`; where there is no z, an empty tensor for it."""
    found = backward(Inputs(x, delta, A, B, C, D, z, delta_bias, delta_softplus), kept, dy, dlast)
    return tuple(x.new_empty(0) if gradient is None else gradient for gradient in found)


def _backward_fake(x, delta, A, B, C, D, z, delta_bias, delta_softplus, kept, dy, dlast):
    new = lambda t: t.new_empty(t.shape)
    channels = len(A)
    return (
        new(x),
        new(delta),
        new(A),
        new(B),
        new(C),
        A.new_empty(channels),
        x.new_empty(0) if z is None else new(z),
        A.new_empty(channels),
        A.new_empty(x.shape[0], *A.shape),
    )


READ = (
    "Tensor x, Tensor delta, Tensor A, Tensor B, Tensor C, "
    "Tensor? D, Tensor? z, Tensor? delta_bias, bool delta_softplus"
)
SCAN = operator(
    "scan_cpu",
    f"({READ}, Tensor? h0, bool keep) -> (Tensor y, Tensor last, Tensor kept)",
    _scan_kernel,
    _scan_fake,
)
SCAN_BACKWARD = operator(
    "scan_cpu_backward",
    f"({READ}, Tensor kept, Tensor dy, Tensor? dlast) -> "
    f"({', '.join(f'Tensor d{name}' for name in Gradients._fields)})",
    _backward_kernel,
    _backward_fake,
)


def _keep(ctx, inputs, output):
    *tensors, softplus, h0, keep = inputs
    kept = output[2]
    if keep:
        ctx.save_for_backward(*tensors, kept)
    ctx.softplus, ctx.starts = softplus, h0 is not None
    ctx.mark_non_differentiable(kept)
    ctx.set_materialize_grads(False)


def _gradients(ctx, dy, dlast, _):
    *tensors, kept = saved(ctx, "the scan")
    x, *_, D, z, delta_bias = tensors
    dy = torch.zeros_like(x) if dy is None else dy
    *first, dD, dz, dbias, dh0 = _scan_backward(*tensors, ctx.softplus, kept, dy, dlast)
    return (
        *first,
        None if D is None else dD,
        None if z is None else dz,
        None if delta_bias is None else dbias,
        None,
        dh0 if ctx.starts else None,
        None,
    )


_scan, _scan_backward = differentiable(
    SCAN, SCAN_BACKWARD, _keep, _gradients, "the fused scan", "choose backend 'loop'"
)


def kept_shape(batch: int, length: int, channels: int, states: int) -> tuple[int, ...]:
    """The shape of the states that are kept, one every CHUNK steps.

    Each lies in tiles of LANES channels, with the number of states padded.
    """
    return batch, -(-length // CHUNK), -(-channels // LANES), -(-states // PAD) * PAD, LANES


def _as_read(given: Inputs, h0: Tensor | None = None) -> Inputs:
    """The tensors as the kernel reads them. `UserError` for what it cannot read."""
    x, delta, A, B, C, D, z, delta_bias, delta_softplus = given
    check_scan(x, delta, A, B, C, D, z, delta_bias, h0)
    fixed = {t.dtype for t in (A, D, delta_bias, h0) if t is not None}
    moving = {t.dtype for t in (x, delta, B, C, z) if t is not None}
    if fixed != {torch.float32} or moving not in ({torch.float32}, {torch.bfloat16}):
        raise UserError(
            "the operator of the scan takes x, delta, B, C and z all in float32 or all in "
            "bfloat16, and the rest in float32: call lib.scan.selective_scan, which converts them"
        )
    x, delta, B, C, z = (t if t is None else in_rows(t) for t in (x, delta, B, C, z))
    A, D, delta_bias = map(in_floats, (A, D, delta_bias))
    return Inputs(x, delta, A, B, C, D, z, delta_bias, delta_softplus)


def in_rows(tensor: Tensor) -> Tensor:
    """The tensor (B, L, columns) itself where its rows lie at equal distances, else a copy."""
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
        moving = cast(torch.float32, *moving)
    x, delta, B, C, z = moving
    A, D, delta_bias, h0 = cast(torch.float32, A, D, delta_bias, h0)
    keep = wants_derivative(x, delta, A, B, C, D, z, delta_bias, h0)
    y, last, _ = _scan(x, delta, A, B, C, D, z, delta_bias, bool(delta_softplus), h0, keep)
    return y, last


def _step_kernel(h, x, delta, A, B, C, D, z, delta_bias, delta_softplus):
    """y and the new h, both float32."""
    check_step(h, x, delta, A, B, C, D, z, delta_bias)
    x, delta, A, B, C, D, z, delta_bias = map(in_floats, (x, delta, A, B, C, D, z, delta_bias))
    h = h.float().clone(memory_format=torch.contiguous_format)
    y = torch.empty_like(x)
    sizes = [ctypes.c_long(n) for n in h.shape]
    KERNEL.library.scan_step(
        *map(address, (x, delta, A, B, C, D, z, delta_bias)),
        ctypes.c_int(bool(delta_softplus)),
        *sizes,
        address(h),
        address(y),
    )
    return y, h


def _step_fake(h, x, delta, A, B, C, D, z, delta_bias, delta_softplus):
    return x.new_empty(x.shape, dtype=torch.float32), h.new_empty(h.shape, dtype=torch.float32)


STEP = operator(
    "step_cpu", f"(Tensor h, {READ}) -> (Tensor y, Tensor after)", _step_kernel, _step_fake
)


@torch.no_grad()
def step(h, x, delta, A, B, C, D, z, delta_bias, delta_softplus):
    """One step of time, without gradients: y and the new h.

    Shapes as in `lib.scan.selective_step`. Raises `UserError` as `scan` does.
    """
    check_step(h, x, delta, A, B, C, D, z, delta_bias)
    _check(x)
    y, h = STEP(h, x, delta, A, B, C, D, z, delta_bias, bool(delta_softplus))
    return y.to(x.dtype), h


def _check(x):
    if x.device.type != "cpu" or x.dtype == torch.float64:
        raise UserError(
            "backend 'cpu' takes float32, bfloat16 or float16 tensors on a CPU: "
            "choose backend 'auto'"
        )
    if not available():
        raise UserError(
            "backend 'cpu' needs a C++ compiler (g++ or clang++): install one, or choose 'parallel'"
        )


def keep_memory() -> None:
    """Ask glibc to keep freed memory, and Linux to hand it out in large pages.

    Tensors over 32 MiB otherwise go back to the system at every training step, and a page fault
    for each 4 KiB of them costs more than the arithmetic. On other systems this does nothing.
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
