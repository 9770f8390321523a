"""The scan of Mamba-3: a trapezium in time, and a state that turns.

    h[t] = α[t] h[t-1] + (1 - λ[t]) Δ[t] α[t] x[t-1] B[t-1]ᵀ + λ[t] Δ[t] x[t] B[t]ᵀ
    α[t] = exp(log_decay[t])
    y[t] = h[t] C[t] + D x[t]

A step takes in the inputs at both of its ends (Lahoti et al. 2026, arXiv:2603.15569). λ = 1 is the
rule of Mamba and Mamba-2 (only the later end counts), λ = ½ the trapezoidal rule. Each write comes
in two parts, then, now and one step later, and that makes it `decaying_attention` again, less the
part that has not come yet.

`turn` rotates B and C by angles that add up along the piece. What is read then depends on how
far the state has turned since it was written: that is a complex state by other means
(proposition 4 there).

Shapes: B batch, L length, H heads, P channels a head, N state size, R angles, at most N / 2.
"""

import math
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F

from lib.env.errors import UserError
from lib.scan.arguments import axes, cast, check_tensors, described
from lib.scan.parallel import without_autocast
from lib.scan.ssd import decaying_attention

# h (B, H, P, N), and of the step before: B (B, H, N), turned already, and x (B, H, P)
TrapezoidState = tuple[Tensor, Tensor, Tensor]


def turn(vectors: Tensor, theta: Tensor) -> Tensor:
    """(…, N) with its first 2 R numbers turned, pair by pair, by the angles theta (…, R)."""
    turning = 2 * theta.shape[-1]
    if turning > vectors.shape[-1]:
        raise UserError(
            f"{theta.shape[-1]} angles turn {turning} numbers, but there are {vectors.shape[-1]}"
        )
    first, second = vectors[..., :turning].unflatten(-1, (-1, 2)).unbind(-1)
    cos = theta.cos().to(vectors.dtype)
    sin = theta.sin().to(vectors.dtype)
    turned = torch.stack([first * cos - second * sin, first * sin + second * cos], -1).flatten(-2)
    return torch.cat([turned, vectors[..., turning:]], -1)


def angles(speed: Tensor, delta: Tensor, before: Tensor) -> Tensor:
    """How far each head has turned, (B, L, H, R): before[…] + Σ π tanh(speed) Δ, within [0, 2 π).

    speed: (B, L, R), the same for all heads. delta: (B, L, H). before: (B, H, R). In float64:
    the sum of a long piece is large, and what counts is what is left of it after whole turns.
    """
    each = math.pi * torch.tanh(speed.double())[:, :, None] * delta.double()[..., None]
    return (before.double()[:, None] + each.cumsum(1)) % (2 * math.pi)


def loop(
    x: Tensor,
    delta: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    lam: Tensor,
    state: TrapezoidState,
) -> tuple[Tensor, TrapezoidState]:
    """The recurrence, one step of time after another. Arguments as `trapezoid_scan`."""
    h, B_before, x_before = state
    if not x.shape[1]:  # no step of time: the state as it was, in memory of its own
        return x, tuple(t.clone() for t in state)
    ys = []
    for x_t, delta_t, log_t, B_t, C_t, lam_t in zip(
        *(t.unbind(1) for t in (x, delta, log_decay, B, C, lam))
    ):
        alpha = torch.exp(log_t)  # (B, H)
        late = lam_t * delta_t
        early = (1 - lam_t) * delta_t * alpha
        h = (
            alpha[..., None, None] * h
            + early[..., None, None] * _outer(x_before, B_before)
            + late[..., None, None] * _outer(x_t, B_t)
        )
        ys.append((h @ C_t[..., None])[..., 0])  # (B, H, P)
        B_before = B_t
        x_before = x_t
    return torch.stack(ys, 1), (h, B_before, x_before)


def chunked(
    x: Tensor,
    delta: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    lam: Tensor,
    state: TrapezoidState,
) -> tuple[Tensor, TrapezoidState]:
    """The same by matrix products: each step writes both of its parts at once."""
    h, B_before, x_before = state
    late = lam * delta
    early = (1 - lam) * delta
    h = h + early[:, 0, :, None, None] * _outer(x_before, B_before)
    later = F.pad(early[:, 1:], (0, 0, 0, 1))  # what the next step adds of this one, (B, L, H)
    y, h = decaying_attention((late + later)[..., None] * x, log_decay, B, C, h)
    not_yet = later * (B * C).sum(-1)
    return y - not_yet[..., None] * x, (h, B[:, -1], x[:, -1])


BACKENDS = {"loop": loop, "chunked": chunked}


def trapezoid_scan(
    x: Tensor,
    delta: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    lam: Tensor,
    D: Tensor | None = None,
    state: TrapezoidState | None = None,
    *,
    backend: str = "chunked",
) -> tuple[Tensor, TrapezoidState]:
    """y (B, L, H, P), and the state after the last step.

    x: (B, L, H, P). delta, positive, log_decay, negative, and lam, from 0 to 1: (B, L, H).
    B, C: (B, L, H, N), turned already where they shall turn. D: (H,). state: see `TrapezoidState`,
    zeros when None. All is computed in float32 (float64 for float64 input), in which y and the
    state are; the products of `chunked` are autocast's to round.
    Raises `UserError` for shapes, dtypes or devices that do not fit or an unknown backend.
    """
    if axes(x) != 4 or axes(B) != 4:
        raise UserError(
            "the scan needs x of shape (B, L, H, P) and B of shape (B, L, H, N), not "
            f"{described(x)} and {described(B)}"
        )
    if backend not in BACKENDS:
        raise UserError(f"backend {backend!r} is unknown: choose {' or '.join(BACKENDS)}")
    batch, length, heads, channels = x.shape
    d_state = B.shape[3]
    if state is None:
        zeros = x.new_zeros
        state = (
            zeros(batch, heads, channels, d_state),
            zeros(batch, heads, d_state),
            zeros(batch, heads, channels),
        )
    if not isinstance(state, tuple | list) or len(state) != 3:
        raise UserError("the scan goes on from three tensors: h, and B and x of the step before")
    h, B_before, x_before = state
    a_step = (batch, length, heads)
    check_tensors(
        "the scan",
        x.device,
        {
            "x": (x, x.shape),
            "delta": (delta, a_step),
            "log_decay": (log_decay, a_step),
            "lam": (lam, a_step),
            "B": (B, (*a_step, d_state)),
            "C": (C, (*a_step, d_state)),
            "D": (D, (heads,)),
            "the state": (h, (batch, heads, channels, d_state)),
            "the B before": (B_before, (batch, heads, d_state)),
            "the x before": (x_before, (batch, heads, channels)),
        },
        optional=("D",),
    )
    high = torch.promote_types(x.dtype, torch.float32)
    x, delta, log_decay, B, C, lam, *state = cast(
        high, x, delta, log_decay, B, C, lam, h, B_before, x_before
    )
    if 0 in (*x.shape, d_state):  # nothing to scan
        backend = "loop"
    with without_autocast(x.device) if backend == "loop" else nullcontext():
        y, state = BACKENDS[backend](x, delta, log_decay, B, C, lam, tuple(state))
    if D is not None:
        y = y + D[:, None].to(high) * x
    return y.to(high), state


def _outer(x: Tensor, B: Tensor) -> Tensor:
    """(…, P) and (…, N) to (…, P, N)."""
    return x[..., None] * B[..., None, :]
