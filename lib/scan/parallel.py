"""The recurrence h[t] = a[t] h[t-1] + b[t] as a parallel scan, in plain PyTorch, on any device.

A step of the recurrence is a pair (a, b): "multiply by a, then add b". Two steps in a row are one
step again, and that joining is associative, so the steps may be joined in any grouping:

    (a1, b1) then (a2, b2)  =  (a2 a1, a2 b1 + b2)        (Blelloch 1990, section 1.4.1)

Two ways to group them: `hillis_steele` needs the fewest rounds, `blelloch` the least work.
`linear_recurrence` adds gradients, and `parallel` is the selective scan made of it. Notebook 05
derives everything here.
"""

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.autograd import Function

from lib.env.errors import UserError
from lib.scan.arguments import axes, check_tensors, described
from lib.scan.operators import one_after_another

# Elements of one (rows, chunk, D, N) tensor in `parallel`. Measured on a CPU: a chunk should stay
# in the cache of a core (2^18 float32 = 1 MiB), half or twice that is no better. On a GPU it should
# be large, to keep every core busy; that value was chosen, not measured.
CHUNK_ELEMENTS = {"cpu": 2**18, "cuda": 2**24}
SHORTEST_CHUNK = 16  # steps: a state is kept for each chunk, so shorter ones would fill the memory


def hillis_steele(a: Tensor, b: Tensor) -> Tensor:
    """All h[t] = a[t] h[t-1] + b[t] along dimension 1 of (B, L, …), from h = 0 before the start.

    Hillis and Steele 1986. In round k every step is joined with the one 2^k before it: log2 L
    rounds, about L log2 L joins. Autograd can differentiate it, but keeps every round's tensors.
    """
    _same_shape(a, b)
    step = 1
    while step < b.shape[1]:  # the first `step` entries reach back to the start already
        joined = b.clone()
        joined[:, step:].addcmul_(a[:, step:], b[:, :-step])
        product = a.clone()
        product[:, step:] *= a[:, :-step]
        a = product
        b = joined
        step *= 2
    return b


def blelloch(a: Tensor, b: Tensor) -> Tensor:
    """The same states as `hillis_steele` with fewer than 2 L joins.

    For a power of two that takes 2 log2 L - 1 rounds. Blelloch 1990, with the tree of Brent and
    Kung 1982, which yields h[t] itself and takes any length. It writes over copies of a and b,
    which autograd cannot follow: `UserError` where a gradient is wanted.
    `linear_recurrence` has one.
    """
    _same_shape(a, b)
    if torch.is_grad_enabled() and (a.requires_grad or b.requires_grad):
        raise UserError("blelloch works in place and has no gradient: use linear_recurrence")
    return _blelloch_(a.clone(), b.clone())


def _blelloch_(a: Tensor, b: Tensor) -> Tensor:
    """`blelloch` in the memory of its arguments: b becomes h, a is spoilt."""
    length = b.shape[1]
    block = 2
    while block <= length:  # up: the last entry of each block sums up its block
        half = block // 2
        left = slice(half - 1, length - half, block)
        right = slice(block - 1, None, block)
        b[:, right].addcmul_(a[:, right], b[:, left])
        a[:, right] *= a[:, left]
        block *= 2
    while block > 2:  # down: a finished entry finishes the entry half a block after it
        block //= 2
        half = block // 2
        left = slice(block - 1, length - half, block)
        right = slice(block + half - 1, None, block)
        b[:, right].addcmul_(a[:, right], b[:, left])
    return b


METHODS = {"blelloch": _blelloch_, "hillis_steele": hillis_steele}  # may spoil their arguments


def linear_recurrence(
    a: Tensor, b: Tensor, h0: Tensor | None = None, method: str = "blelloch"
) -> Tensor:
    """All h[t] = a[t] h[t-1] + b[t], t = 0 … L-1, with gradients for a, b and h0.

    a, b: (B, L, …) of one shape and one dtype, real or complex. h0: the state before the first
    step, (B, …), in the same dtype; zero when None. Returns h (B, L, …), with derivatives of any
    order. `UserError` for others or an unknown method.
    """
    _same_shape(a, b)
    before = tuple(b.shape[:1] + b.shape[2:])
    check_tensors(
        "the recurrence",
        b.device,
        {"b": (b, a.shape), "a": (a, b.shape), "h0": (h0, before)},
        (b.dtype,),
        optional=("h0",),
    )
    return _LinearRecurrence.apply(a, b, h0, _method(method))


class _LinearRecurrence(Function):
    @staticmethod
    def forward(a, b, h0, scan):
        return _states(a.clone(), b.clone(), h0, scan)

    @staticmethod
    def setup_context(ctx, inputs, output):
        a, _, h0, ctx.scan = inputs
        ctx.save_for_backward(a, output, h0)

    @staticmethod
    def backward(ctx, dh):
        a, h, h0 = ctx.saved_tensors
        # the gradient is a recurrence again, so that it has a gradient too
        scan = lambda a, b: _LinearRecurrence.apply(a, b, None, ctx.scan)
        da, db, dh0 = _gradients(a, h, h0, dh, scan)
        return da, db, None if h0 is None else dh0, None

    @staticmethod
    def vmap(info, in_dims, *arguments):
        return one_after_another(_LinearRecurrence.apply)(info, in_dims, *arguments)


def _states(a: Tensor, b: Tensor, h0: Tensor | None, scan) -> Tensor:
    """h from a, b and the state before; spoils a and b."""
    if h0 is not None and b.shape[1]:
        b[:, 0].addcmul_(a[:, 0], h0)
    return scan(a, b)


def _gradients(a: Tensor, h: Tensor, h0: Tensor | None, dh: Tensor, scan):
    """Gradients of a, b and h0 from that of h: the same recurrence, backwards in time.

    g[t] = dh[t] + a[t+1] g[t+1];  db = g,  da[t] = g[t] h[t-1],  dh0 = a[0] g[0];  of complex a and
    h the conjugates.
    """
    a, h = a.conj(), h.conj()
    if not a.shape[1]:
        dh0 = None if h0 is None else torch.zeros_like(h0)
        return a, dh, dh0
    # from the last step to the first; the last has no later one, and a scan never reads its first a
    first = a[:, :1]
    later = a[:, 1:].flip(1)
    g = scan(torch.cat([first, later], 1), dh.flip(1)).flip(1)
    da = g.clone()
    da[:, 1:] *= h[:, :-1]
    da[:, 0] = 0 if h0 is None else g[:, 0] * h0.conj()
    dh0 = a[:, 0] * g[:, 0]
    return da, g, dh0


def parallel(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    h0: Tensor | None = None,
    *,
    method: str = "blelloch",
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The selective scan, as `lib.scan.loop`: y (B, L, D) and the last state h (B, D, N).

    x, delta: (B, L, D). A: (D, N). B, C: (B, L, N). h0: (B, D, N), zero when None.
    Time is cut into chunks of `chunk` steps (by default what fits, see `CHUNK_ELEMENTS`): a scan
    inside a chunk, the state carried to the next. Kept for the backward pass: the arguments and
    one state a chunk; the rest is computed again. Agrees with the loop to some roundings.
    `UserError` for a chunk below 1 or an unknown method, and for a second derivative.
    """
    if chunk is not None and chunk < 1:
        raise UserError(f"a chunk of {chunk} steps holds none: give 1 or more")
    if not x.shape[1]:
        raise UserError("parallel needs at least one step of time: selective_scan takes none too")
    batch = x.shape[0]
    if h0 is None:
        h0 = x.new_zeros(batch, *A.shape)
    if chunk is None:
        elements = CHUNK_ELEMENTS.get(x.device.type, CHUNK_ELEMENTS["cuda"])
        rows = max(1, elements // (SHORTEST_CHUNK * max(1, A.numel())))
        if rows < batch:  # too wide for one chunk
            return _some_rows_at_a_time(rows, x, delta, A, B, C, h0, method)
        chunk = max(SHORTEST_CHUNK, elements // max(1, h0.numel()))
    y, last, *_ = _Parallel.apply(x, delta, A, B, C, h0, _method(method), chunk)
    return y, last


def _some_rows_at_a_time(rows: int, x, delta, A, B, C, h0, method: str) -> tuple[Tensor, Tensor]:
    """`parallel` of so many rows of the batch after another."""
    ys = []
    last = []
    parts = zip(*(t.split(rows) for t in (x, delta, B, C, h0)))
    for x_r, delta_r, B_r, C_r, h0_r in parts:
        y, h = parallel(x_r, delta_r, A, B_r, C_r, h0_r, method=method)
        ys.append(y)
        last.append(h)
    return torch.cat(ys), torch.cat(last)


class _Parallel(Function):
    @staticmethod
    def forward(x, delta, A, B, C, h0, scan, chunk):
        """y, the last state, and the state before each chunk but the first."""
        carried = [h0]
        ys = []
        chunks = zip(*(t.split(chunk, 1) for t in (x, delta, B, C)))
        for x_c, delta_c, B_c, C_c in chunks:
            # (B, chunk, D, N)
            states = _states(*_discretise(x_c, delta_c, A, B_c), carried[-1], scan)
            ys.append((states @ C_c[..., None])[..., 0])
            carried.append(states[:, -1].clone())  # a view would keep the whole chunk alive
        return torch.cat(ys, 1), carried[-1], *carried[1:-1]

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.scan, ctx.chunk = inputs
        carried = output[2:]
        ctx.save_for_backward(*tensors, *carried)
        ctx.mark_non_differentiable(*carried)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dy, dh, *_):
        saved = ctx.saved_tensors  # once: where activations are recomputed, a second look fails
        x = saved[0]
        h0 = saved[5]
        dy = torch.zeros_like(x) if dy is None else dy
        dh = torch.zeros_like(h0) if dh is None else dh
        return *_ParallelGradients.apply(dy, dh, ctx.scan, ctx.chunk, *saved), None, None

    @staticmethod
    def vmap(info, in_dims, *arguments):
        return one_after_another(_Parallel.apply)(info, in_dims, *arguments)


class _ParallelGradients(Function):
    """The gradients of x, delta, A, B, C and h0, from the last chunk to the first."""

    @staticmethod
    def forward(dy, dh, scan, chunk, x, delta, A, B, C, *carried):
        dx = torch.empty_like(x)
        ddelta = torch.empty_like(delta)
        dA = torch.zeros_like(A)
        dB = torch.empty_like(B)
        dC = torch.empty_like(C)
        read = zip(*(t.split(chunk, 1) for t in (x, delta, B, C, dy)))
        written = zip(*(t.split(chunk, 1) for t in (dx, ddelta, dB, dC)))
        with without_autocast(x.device):  # where it is called inside one
            for h0, given, wanted in reversed(list(zip(carried, read, written))):
                x_c, delta_c, B_c, C_c, dy_c = given
                dx_c, ddelta_c, dB_c, dC_c = wanted
                A_bar, Bx_bar = _discretise(x_c, delta_c, A, B_c)
                h = _states(A_bar.clone(), Bx_bar, h0, scan)
                dh_c = dy_c[..., None] * C_c[:, :, None]
                dh_c[:, -1] += dh  # what later chunks and the last state ask for
                dC_c.copy_((dy_c[:, :, None] @ h)[:, :, 0])
                dA_bar, dBx_bar, dh = _gradients(A_bar, h, h0, dh_c, scan)
                # Bx_bar = delta x B
                dinput = (dBx_bar @ B_c[..., None])[..., 0]  # of delta x, (B, chunk, D)
                dB_c.copy_(((delta_c * x_c)[:, :, None] @ dBx_bar)[:, :, 0])
                dx_c.copy_(dinput * delta_c)
                # A_bar = exp(delta A)
                dexponent = dA_bar.mul_(A_bar)
                ddelta_c.copy_((dexponent * A).sum(-1) + dinput * x_c)
                dA += (dexponent * delta_c[..., None]).sum((0, 1))
        return dx, ddelta, dA, dB, dC, dh

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_):
        raise UserError(
            "the parallel scan has a first derivative and no second: choose backend 'loop'"
        )

    @staticmethod
    def vmap(info, in_dims, *arguments):
        return one_after_another(_ParallelGradients.apply)(info, in_dims, *arguments)


def _discretise(x: Tensor, delta: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """A_bar = exp(delta A) and Bx_bar = delta B x, both (B, L, D, N)."""
    return (delta[..., None] * A).exp_(), (delta * x)[..., None] * B[:, :, None]


def without_autocast(device: torch.device):
    """A context in which products keep the dtype of what is multiplied.

    On `meta` there is no autocast to end.
    """
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else nullcontext()


def _method(name: str):
    if name not in METHODS:
        raise UserError(f"scan method {name!r} is unknown: choose {' or '.join(METHODS)}")
    return METHODS[name]


def _same_shape(a: Tensor, b: Tensor) -> None:
    if axes(a) < 2 or axes(b) < 2 or a.shape != b.shape:
        raise UserError(
            f"the scan needs a and b of one shape (B, L, …), not {described(a)} and {described(b)}"
        )
