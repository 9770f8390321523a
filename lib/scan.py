"""The selective scan: one operation, one signature, several implementations that agree.

    h[t] = exp(delta[t] A) h[t-1] + delta[t] B[t] x[t]        (Gu and Dao 2023, equation 2)
    y[t] = C[t] h[t] + D x[t],  then y[t] silu(z[t])

Backends: `loop` is the oracle, as short as the equations; `cpu` is a fused C++ kernel that is
compiled on first use where there is a compiler (`lib.scan_cpu`).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from lib.errors import UserError

BACKENDS = ("loop", "cpu")


def check_shapes(x, delta, A, B, C, D=None, z=None, delta_bias=None, h0=None) -> None:
    """Raise `UserError` naming the first argument whose shape does not fit."""
    if x.dim() != 3 or A.dim() != 2 or A.shape[0] != x.shape[2]:
        raise UserError(f"the scan needs x of shape (B, L, D) and A of shape (D, N), not "
                        f"{tuple(x.shape)} and {tuple(A.shape)}")
    batch, length, d_inner = x.shape
    d_state = A.shape[1]
    expected = {"delta": (delta, (batch, length, d_inner)), "B": (B, (batch, length, d_state)),
                "C": (C, (batch, length, d_state)), "D": (D, (d_inner,)),
                "z": (z, (batch, length, d_inner)), "delta_bias": (delta_bias, (d_inner,)),
                "h0": (h0, (batch, d_inner, d_state))}
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise UserError(f"the scan needs {name} of shape {shape}, not {tuple(tensor.shape)}")


def loop(x, delta, A, B, C, h0):
    """The recurrence, one step of time after another. Returns y (B, L, D) and h (B, D, N)."""
    h = h0 if h0 is not None else x.new_zeros(x.shape[0], *A.shape)
    ys = []
    # unbind, not x[:, t]: the gradient of a slice is a whole tensor of zeros, L times over
    for x_t, delta_t, B_t, C_t in zip(x.unbind(1), delta.unbind(1), B.unbind(1), C.unbind(1)):
        A_bar = torch.exp(delta_t[..., None] * A)  # (B, D, N)
        Bx_bar = (delta_t * x_t)[..., None] * B_t[:, None]  # (B, D, N)
        h = A_bar * h + Bx_bar
        ys.append((h @ C_t[..., None])[..., 0])  # (B, D)
    return torch.stack(ys, 1), h


def selective_scan(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor,
                   D: Tensor | None = None, z: Tensor | None = None,
                   delta_bias: Tensor | None = None, delta_softplus: bool = False,
                   h0: Tensor | None = None, return_last_state: bool = False,
                   backend: str = "auto") -> Tensor | tuple[Tensor, Tensor]:
    """The scan of a selective state space model (Gu and Dao 2023, algorithm 2).

    x, delta, z: (B, L, D), input, step and gate. A: (D, N), negative. B, C: (B, L, N).
    D, delta_bias: (D,). h0: state before the first step, (B, D, N); zero when None.
    Returns y of shape (B, L, D) in the dtype of `x`, and with `return_last_state` also the
    state after the last step, (B, D, N), in float32 (float64 for float64 input).
    Raises `UserError` for shapes that do not fit or a backend that is not available.
    """
    check_shapes(x, delta, A, B, C, D, z, delta_bias, h0)
    if backend not in ("auto", *BACKENDS):
        raise UserError(f"backend {backend!r} is unknown: choose auto, {', '.join(BACKENDS)}")
    dtype, high = x.dtype, torch.promote_types(x.dtype, torch.float32)
    if backend == "auto":
        backend = "loop"
        if x.device.type == "cpu" and high == torch.float32:
            from lib import scan_cpu

            backend = "cpu" if scan_cpu.ready() else "loop"
    if x.shape[1] == 0:
        last = h0 if h0 is not None else x.new_zeros(x.shape[0], *A.shape, dtype=high)
        return (x, last) if return_last_state else x
    x, delta, A, B, C, D, z, delta_bias, h0 = (
        t if t is None else t.to(high) for t in (x, delta, A, B, C, D, z, delta_bias, h0))
    if backend == "cpu":
        from lib import scan_cpu

        y, last = scan_cpu.scan(x, delta, A, B, C, D, z, delta_bias, delta_softplus, h0)
    else:
        if delta_bias is not None:
            delta = delta + delta_bias
        if delta_softplus:
            delta = F.softplus(delta)
        y, last = loop(x, delta, A, B, C, h0)
        if D is not None:
            y = y + D * x
        if z is not None:
            y = y * F.silu(z)
    y = y.to(dtype)
    return (y, last) if return_last_state else y


def selective_step(h: Tensor, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor,
                   D: Tensor) -> tuple[Tensor, Tensor]:
    """One step of time, for generation: h (B, D, N), x and delta (B, D), B and C (B, N).

    `delta` is the step itself, after bias and softplus. Returns y (B, D) and the new h.
    """
    h = torch.exp(delta[..., None] * A) * h + (delta * x)[..., None] * B[:, None]
    return (h @ C[..., None])[..., 0] + D * x, h
