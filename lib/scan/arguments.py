"""What a scan or a kernel is given, looked at in one place before an address leaves Python.

A kernel in C++ believes what it is told: a tensor that is smaller than it should be, or lies
in the memory of another device, would end the process. Every public function that calls one
asks here first.
"""

import torch
from torch import Tensor

from lib.env.errors import UserError

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
OPTIONAL = ("D", "z", "delta_bias", "h0")  # what a scan may be given or not
# what is asked for, by its name: the tensor and the shape that it should have
Wanted = dict[str, tuple[Tensor | None, tuple[int, ...]]]


def check_tensors(
    what: str, device: torch.device, wanted: Wanted, dtypes=FLOATS, optional=()
) -> None:
    """Raise `UserError` naming the first tensor of another shape, device, dtype or layout.

    None is right only for a name in `optional`.
    """
    for name, (tensor, shape) in wanted.items():
        if tensor is None and name in optional:
            continue
        if not isinstance(tensor, Tensor):
            raise UserError(f"{what} needs a tensor as {name}, not {type(tensor).__name__}")
        if tensor.shape != shape:
            raise UserError(f"{what} needs {name} of shape {shape}, not {tuple(tensor.shape)}")
        if tensor.device != device:
            raise UserError(
                f"{what} needs all tensors on one device: "
                f"{name} is on {tensor.device}, not on {device}"
            )
        if tensor.dtype not in dtypes:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise UserError(
                f"{what} needs {name} in one of {known}, "
                f"not {str(tensor.dtype).removeprefix('torch.')}: convert it first"
            )
        if tensor.layout != torch.strided:
            raise UserError(
                f"{what} needs {name} as a dense tensor, not {tensor.layout}: take its to_dense()"
            )


def cast(dtype: torch.dtype, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors in this dtype; what is None stays None."""
    return tuple(None if t is None else t.to(dtype) for t in tensors)


def axes(value) -> int:
    """How many axes a tensor has; -1 for what is none."""
    return value.dim() if isinstance(value, Tensor) else -1


def described(value) -> str:
    """A tensor's shape, or the name of what stands in its place."""
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def check_scan(x, delta, A, B, C, D=None, z=None, delta_bias=None, h0=None) -> None:
    """Raise `UserError` for the first argument of `lib.scan.selective_scan` that does not fit."""
    _check_sizes("the scan", x, 3, A)
    batch, length, d_inner = x.shape
    d_state = A.shape[1]
    check_tensors(
        "the scan",
        x.device,
        {
            "x": (x, (batch, length, d_inner)),
            "A": (A, (d_inner, d_state)),
            "delta": (delta, (batch, length, d_inner)),
            "B": (B, (batch, length, d_state)),
            "C": (C, (batch, length, d_state)),
            "D": (D, (d_inner,)),
            "z": (z, (batch, length, d_inner)),
            "delta_bias": (delta_bias, (d_inner,)),
            "h0": (h0, (batch, d_inner, d_state)),
        },
        optional=OPTIONAL,
    )


def check_step(h, x, delta, A, B, C, D=None, z=None, delta_bias=None) -> None:
    """Raise `UserError` for the first argument of `lib.scan.selective_step` that does not fit."""
    _check_sizes("the step", x, 2, A)
    batch, d_inner = x.shape
    d_state = A.shape[1]
    check_tensors(
        "the step",
        x.device,
        {
            "x": (x, (batch, d_inner)),
            "A": (A, (d_inner, d_state)),
            "h": (h, (batch, d_inner, d_state)),
            "delta": (delta, (batch, d_inner)),
            "B": (B, (batch, d_state)),
            "C": (C, (batch, d_state)),
            "D": (D, (d_inner,)),
            "z": (z, (batch, d_inner)),
            "delta_bias": (delta_bias, (d_inner,)),
        },
        optional=OPTIONAL,
    )


def _check_sizes(what: str, x, x_axes: int, A) -> None:
    """x and A say what all the others should be."""
    for name, tensor in (("x", x), ("A", A)):
        if not isinstance(tensor, Tensor):
            raise UserError(f"{what} needs a tensor as {name}, not {type(tensor).__name__}")
    if x.dim() != x_axes or A.dim() != 2 or A.shape[0] != x.shape[-1]:
        x_shape = {2: "(B, D)", 3: "(B, L, D)"}[x_axes]
        raise UserError(
            f"{what} needs x of shape {x_shape} and A of shape (D, N), not "
            f"{tuple(x.shape)} and {tuple(A.shape)}"
        )
