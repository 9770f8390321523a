"""State space duality: the selective scan with one decay a head, computed by matrix products.

    h[t] = exp(delta[t] A) h[t-1] + delta[t] x[t] B[t]ᵀ        h: (P, N), A: one number a head
    y[t] = h[t] C[t] + D x[t]

Unrolled, this is attention without a softmax, under a mask that decays:

    y[t] = Σ_s≤t  L[t, s] (C[t] · B[s]) delta[s] x[s],    L[t, s] = exp Σ_s<k≤t delta[k] A

(Dao and Gu 2024, arXiv:2405.21060, sections 5 and 6). Because the decay knows nothing of n, C · B
can be computed once, by a matrix product, for all channels of all heads. `decaying_attention`
does so inside short stretches of time and hands one state on from each to the next. Notebook 11
derives everything here.

Shapes: B batch, L length, H heads, P channels a head, N state size, Q length of a chunk.
"""

from contextlib import nullcontext

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from lib.env.errors import UserError
from lib.scan.arguments import axes, cast, check_tensors, described
from lib.scan.parallel import without_autocast

CHUNK = 64  # Q, steps of time: longer ones make larger masks, shorter ones more states


def loop(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h0: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence, one step of time after another: y (B, L, H, P) and the last h (B, H, P, N).

    x: (B, L, H, P). delta: (B, L, H), positive. A: (H,), negative.
    B, C: (B, L, N), shared by all heads.
    """
    h = _at_first(x, B) if h0 is None else h0
    if not x.shape[1]:  # no step of time: the state as it was, in memory of its own
        return x, h.clone()
    ys = []
    for x_t, delta_t, B_t, C_t in zip(x.unbind(1), delta.unbind(1), B.unbind(1), C.unbind(1)):
        decay = torch.exp(delta_t * A)[..., None, None]  # (B, H, 1, 1)
        write = (delta_t[..., None] * x_t)[..., None] * B_t[:, None, None]  # (B, H, P, N)
        h = decay * h + write
        ys.append((h @ C_t[:, None, :, None])[..., 0])  # (B, H, P)
    return torch.stack(ys, 1), h


def segment_sum(log_decay: Tensor) -> Tensor:
    """(…, Q) to (…, Q, Q): entry (t, s) is the sum over s < k ≤ t, and -inf above the diagonal.

    Each column is a sum of its own. The difference of two running totals would be quicker to write,
    and loses what a small segment has between two large totals: both are rounded to their own size.
    """
    time = torch.arange(log_decay.shape[-1], device=log_decay.device)
    later = time[:, None] > time  # (t, s): k = t counts in the segments that begin at s < t
    each = torch.where(later, log_decay[..., None], 0)
    sums = each.cumsum(-2)
    return sums.masked_fill(time[:, None] < time, -torch.inf)


def decaying_attention(
    write: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, h0: Tensor, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """What C reads of all writes so far, each decayed since then.

    It takes matrix products inside chunks of time (Dao and Gu 2024, section 6).

    write: (B, L, H, P), the step's size in it. log_decay: (B, L, H), its logarithm, negative.
    B, C: (B, L, H, N), or (B, L, 1, N) for one that all heads share. h0: (B, H, P, N).
    Returns y (B, L, H, P) and the last state (B, H, P, N). Decays, and the state that is handed on,
    are kept in the dtype of the arguments; the products are autocast's to round, as in the official
    kernel.
    """
    if chunk < 1:
        raise UserError(f"a chunk of {chunk} steps holds none: give 1 or more")
    length = write.shape[1]
    chunk = min(chunk, length)
    missing = -length % chunk  # steps in which nothing decays and nothing is written
    cut = lambda t: (
        F.pad(t, (0, 0) * (t.dim() - 2) + (0, missing)).unflatten(1, (-1, chunk)).transpose(2, 3)
    )
    write = cut(write)  # (B, chunks, H, Q, P)
    B = cut(B)  # (B, chunks, H or 1, Q, N)
    C = cut(C)
    log_decay = cut(log_decay)  # (B, chunks, H, Q)

    # inside a chunk: attention under the decaying mask
    mask = torch.exp(segment_sum(log_decay))  # (B, chunks, H, Q, Q)
    y = (mask * (C @ B.mT)) @ write

    # what a chunk leaves behind, each step as far decayed as it is from the chunk's end
    until_end = mask[..., -1, :, None]  # (B, chunks, H, Q, 1)
    left = (until_end * write).mT @ B  # (B, chunks, H, P, N)

    # from chunk to chunk: the recurrence, once for Q steps
    since_start = torch.exp(log_decay.cumsum(-1))[..., None]  # (B, chunks, H, Q, 1)
    h = h0
    before = []
    for left_c, decay_c in zip(left.unbind(1), since_start[:, :, :, -1:].unbind(1)):
        before.append(h)
        h = decay_c * h + left_c

    # what a chunk reads of all that came before it
    y = y + since_start * (C @ torch.stack(before, 1).mT)
    return y.transpose(2, 3).flatten(1, 2)[:, :length], h


def chunked(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    h0: Tensor | None = None,
    *,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """The same as `loop`, as `decaying_attention`."""
    h0 = _at_first(x, B) if h0 is None else h0
    return decaying_attention(
        delta[..., None] * x, delta * A, B[:, :, None], C[:, :, None], h0, chunk
    )


BACKENDS = {"loop": loop, "chunked": chunked}


def ssd_scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    h0: Tensor | None = None,
    return_last_state: bool = False,
    backend: str = "chunked",
) -> Float[Tensor, "B L H P"] | tuple[Float[Tensor, "B L H P"], Float[Tensor, "B H P N"]]:
    """The selective scan of Mamba-2: one decay a head, B and C shared by all heads.

    x: (B, L, H, P), input. delta: (B, L, H), the step, positive. A: (H,), negative.
    B, C: (B, L, N). D: (H,), what of the input is added.
    h0: state before the first step, (B, H, P, N); zero when None.
    Returns y (B, L, H, P) and, with `return_last_state`, the state after the last step, both in
    float32 (float64 for float64 input), in which the decays are computed, whatever `x` is; the
    products of `chunked` are autocast's to round. (`selective_scan` gives y in the dtype of x.)
    Raises `UserError` for shapes, dtypes or devices that do not fit or an unknown backend.
    """
    _check(x, delta, A, B, C, D, h0)
    if backend not in BACKENDS:
        raise UserError(f"backend {backend!r} is unknown: choose {' or '.join(BACKENDS)}")
    if 0 in (*x.shape, B.shape[2]):  # nothing to scan
        backend = "loop"
    high = torch.promote_types(x.dtype, torch.float32)
    x, delta, A, B, C, D, h0 = cast(high, x, delta, A, B, C, D, h0)
    with without_autocast(x.device) if backend == "loop" else nullcontext():
        y, last = BACKENDS[backend](x, delta, A, B, C, h0)
    if D is not None:
        y = y + D[:, None] * x
    y = y.to(high)  # autocast's products are narrower
    return (y, last) if return_last_state else y


def ssd_step(
    h: Tensor, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None
) -> tuple[Float[Tensor, "B H P"], Float[Tensor, "B H P N"]]:
    """One step of time, for generation: `ssd_scan` at L = 1 with the state first.

    h: (B, H, P, N). x: (B, H, P). delta: (B, H). A, D: (H,). B, C: (B, N).
    The old state is left as it was.
    """
    if axes(x) != 3 or axes(delta) != 2 or axes(B) != 2 or axes(C) != 2:
        raise UserError(
            f"the step needs x (B, H, P), delta (B, H), B and C (B, N), not {described(x)}, "
            f"{described(delta)}, {described(B)} and {described(C)}"
        )
    y, h = ssd_scan(x[:, None], delta[:, None], A, B[:, None], C[:, None], D, h, True, "loop")
    return y[:, 0], h


def _at_first(x: Tensor, B: Tensor) -> Tensor:
    """The state before anything was read, (B, H, P, N), for x (B, …, H, P) and B (B, …, N)."""
    return x.new_zeros(x.shape[0], *x.shape[-2:], B.shape[-1])


def _check(x, delta, A, B, C, D, h0) -> None:
    """Raise `UserError` naming the first argument that does not fit.

    x and B say what the others should be.
    """
    if axes(x) != 4 or axes(B) != 3:
        raise UserError(
            "ssd_scan needs x of shape (B, L, H, P) and B of shape (B, L, N), not "
            f"{described(x)} and {described(B)}"
        )
    batch, length, heads, channels = x.shape
    d_state = B.shape[2]
    check_tensors(
        "ssd_scan",
        x.device,
        {
            "x": (x, x.shape),
            "delta": (delta, (batch, length, heads)),
            "A": (A, (heads,)),
            "B": (B, (batch, length, d_state)),
            "C": (C, (batch, length, d_state)),
            "D": (D, (heads,)),
            "h0": (h0, (batch, heads, channels, d_state)),
        },
        optional=("D", "h0"),
    )
