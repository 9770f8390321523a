"""The selective scan: one operation, one signature, several implementations that agree.

    h[t] = exp(delta[t] A) h[t-1] + delta[t] B[t] x[t]        (Gu and Dao 2023, equation 2)
    y[t] = C[t] h[t] + D x[t],  then y[t] silu(z[t])

(delta B stands for the paper's exact B_bar of equation 4, as in the official code; notebook 04
shows the gap.)

Backends: `loop` is the oracle, as short as the equations. `parallel` is plain PyTorch and runs on
any device (`lib.scan.parallel`, notebook 05). `cpu` is a fused C++ kernel, compiled on first use
where there is a compiler (`lib.scan.cpu`). `triton` is a fused GPU kernel
(`lib.scan.triton_kernel`, notebook 06). `auto` takes the fastest that works here.
"""

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from lib.env.errors import UserError
from lib.scan import cpu as scan_cpu
from lib.scan.arguments import cast, check_scan, check_step
from lib.scan.operators import wants_derivative
from lib.scan.parallel import parallel, without_autocast


def loop(x, delta, A, B, C, h0=None):
    """The recurrence, one step of time after another. Returns y (B, L, D) and h (B, D, N)."""
    h = h0 if h0 is not None else x.new_zeros(x.shape[0], *A.shape)
    if not x.shape[1]:  # no step of time: the state as it was, in memory of its own
        return x, h.clone()
    ys = []
    # unbind, not x[:, t]: the gradient of a slice is a whole tensor of zeros, L times over
    for x_t, delta_t, B_t, C_t in zip(x.unbind(1), delta.unbind(1), B.unbind(1), C.unbind(1)):
        A_bar = torch.exp(delta_t[..., None] * A)  # (B, D, N)
        Bx_bar = (delta_t * x_t)[..., None] * B_t[:, None]  # (B, D, N)
        h = A_bar * h + Bx_bar
        ys.append((h @ C_t[..., None])[..., 0])  # (B, D)
    return torch.stack(ys, 1), h


def step_size(delta: Tensor, delta_bias: Tensor | None, delta_softplus: bool) -> Tensor:
    """The step itself, with its bias where there is one, through softplus where it is wanted."""
    if delta_bias is not None:
        delta = delta + delta_bias
    return F.softplus(delta) if delta_softplus else delta


def skip_and_gate(y: Tensor, x: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    """What comes after the recurrence: D x beside it, and the gate."""
    if D is not None:
        y = y + D * x
    return y if z is None else y * F.silu(z)


def plain(recurrence, x, delta, A, B, C, D, z, delta_bias, delta_softplus, h0):
    """A whole scan in plain PyTorch, in float32 or float64, around `loop` or `parallel`."""
    high = torch.promote_types(x.dtype, torch.float32)
    x, delta, A, B, C, D, z, delta_bias, h0 = cast(high, x, delta, A, B, C, D, z, delta_bias, h0)
    with without_autocast(x.device):  # which would take C h in bfloat16
        y, last = recurrence(x, step_size(delta, delta_bias, delta_softplus), A, B, C, h0)
        return skip_and_gate(y, x, D, z), last


def triton(*arguments):
    """The fused scan on a GPU, imported where it is wanted: many systems have no Triton."""
    try:
        from lib.scan import triton_kernel
    except ImportError as error:
        raise UserError(
            "backend 'triton' needs the package triton, which is not installed: "
            "choose backend 'auto'"
        ) from error
    return triton_kernel.fused(*arguments)


# each takes (x, delta, A, B, C, D, z, delta_bias, delta_softplus, h0) and returns y and the last h
SCANS = {
    "loop": partial(plain, loop),
    "parallel": partial(plain, parallel),
    "cpu": scan_cpu.scan,
    "triton": triton,
}
BACKENDS = tuple(SCANS)


def fastest_backend(device: torch.device, dtype: torch.dtype, d_state: int) -> str:
    """The fastest backend for tensors of this kind on this machine.

    May compile, once, and says so.
    """
    if device.type == "cpu" and dtype != torch.float64:
        return "cpu" if scan_cpu.available() else "parallel"
    if device.type == "cuda" and dtype != torch.float64:
        try:
            from lib.scan import triton_kernel
        except ImportError:  # no Triton for this system
            return "parallel"
        return "triton" if d_state <= triton_kernel.LARGEST_STATE else "parallel"
    return "parallel"


def selective_scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    h0: Tensor | None = None,
    return_last_state: bool = False,
    backend: str = "auto",
) -> Float[Tensor, "B L D"] | tuple[Float[Tensor, "B L D"], Float[Tensor, "B D N"]]:
    """The scan of a selective state space model (Gu and Dao 2023, algorithm 2).

    x, delta, z: (B, L, D), input, step and gate: y is multiplied by silu(z) at the end.
    A: (D, N), negative. B, C: (B, L, N). D: (D,), what of the input is added.
    delta_bias: (D,), added to delta, before the softplus where `delta_softplus` asks for one.
    h0: state before the first step, (B, D, N); zero when None.
    backend: see the top of this file. All have first derivatives, backward; "loop" has all others.
    Returns y of shape (B, L, D) in the dtype of `x`, and with `return_last_state` also the
    state after the last step, (B, D, N), in float32 (float64 for float64 input). The state and all
    sums are kept in that dtype, whatever `x` is.
    Raises `UserError` for shapes, dtypes or devices that do not fit, or a backend that is not
    available.

    `selective_scan_fn` of mamba-ssm has its axes as (B, D, L), and takes no h0. In its terms:
    `selective_scan(u.mT, delta.mT, A, B.mT, C.mT, D, z.mT, delta_bias, delta_softplus).mT`.
    Its groups of B and C, B and C that do not change, and complex A are not taken here.
    """
    check_scan(x, delta, A, B, C, D, z, delta_bias, h0)
    if backend not in ("auto", *BACKENDS):
        raise UserError(f"backend {backend!r} is unknown: choose auto, {', '.join(BACKENDS)}")
    # nothing to scan: no step of time, no row, no channel or no state
    if 0 in (*x.shape, A.shape[1]):
        backend = "loop"
    if backend == "auto":
        backend = fastest_backend(x.device, torch.promote_types(x.dtype, torch.float32), A.shape[1])
    y, last = SCANS[backend](x, delta, A, B, C, D, z, delta_bias, delta_softplus, h0)
    y = y.to(x.dtype)
    return (y, last) if return_last_state else y


def selective_step(
    h: Tensor,
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    backend: str = "auto",
) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B D N"]]:
    """One step of time, for generation: `selective_scan` at L = 1 with the state first.

    h: (B, D, N). x, delta, z: (B, D). A: (D, N). B, C: (B, N). D, delta_bias: (D,).
    Returns y and the new h, in the dtypes of `selective_scan`; the old h is left as it was. No
    gradients flow through the `cpu` backend, so `auto` takes it only where none is asked for.
    Raises `UserError` for shapes, dtypes or devices that do not fit.
    """
    if backend not in ("auto", "loop", "cpu"):
        raise UserError(f"backend {backend!r} has no single step: choose auto, loop, cpu")
    check_step(h, x, delta, A, B, C, D, z, delta_bias)
    tensors = (h, x, delta, A, B, C, D, z, delta_bias)
    if backend == "auto":
        suits = x.device.type == "cpu" and x.dtype == h.dtype == torch.float32
        fused = suits and not wants_derivative(*tensors) and scan_cpu.available()
        backend = "cpu" if fused else "loop"
    if backend == "cpu":
        return scan_cpu.step(h, x, delta, A, B, C, D, z, delta_bias, delta_softplus)
    dtype, high = x.dtype, torch.promote_types(x.dtype, torch.float32)
    h, x, delta, A, B, C, D, z, delta_bias = cast(high, *tensors)
    with without_autocast(x.device):
        delta = step_size(delta, delta_bias, delta_softplus)
        h = torch.exp(delta[..., None] * A) * h + (delta * x)[..., None] * B[:, None]
        y = (h @ C[..., None])[..., 0]
        return skip_and_gate(y, x, D, z).to(dtype), h
