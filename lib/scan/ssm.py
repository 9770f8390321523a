"""State space models that treat every input alike: from a spring to S4D, a layer that learns.

    h'(t) = A h(t) + B x(t)     becomes     h[k] = A_bar h[k-1] + B_bar x[k]
    y(t)  = C h(t)                          y[k] = C h[k]

A is dense, of shape (N, N) with B (N,), or diagonal, of any shape with B of the same shape: (N,)
for one system, (D, N) for D of them. A signal is (L,), or (B, L, D) with one system a channel, or
with the same for all. Sources: Gu et al. 2020 (HiPPO), Gu, Goel, Ré 2022 (S4), Gu, Gupta et al.
2022 (S4D).
"""

import math
from numbers import Real

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib.env.errors import UserError
from lib.scan.parallel import without_autocast

METHODS = ("zoh", "bilinear", "euler", "mamba")
CHUNK = 32  # steps of time that `chunked` does at once


def is_dense(A: Tensor, B: Tensor) -> bool:
    """Whether A is a matrix (N, N) for B (N,). Diagonal: B ends in A's shape. Else `UserError`."""
    if A.dim() == 2 and B.dim() == 1 and A.shape == (len(B), len(B)):
        return True
    if A.dim() >= 1 and B.shape[-A.dim() :] == A.shape:
        return False
    raise UserError(
        f"A and B do not fit: a dense A is (N, N) with B (N,), a diagonal A has the "
        f"shape of B, not {tuple(A.shape)} and {tuple(B.shape)}"
    )


def phi(z: Tensor) -> Tensor:
    """(exp(z) - 1) / z, exact also at and near z = 0, where it is 1; real or complex."""
    small = z.abs() < 1e-3
    series = 1 + z / 2 * (1 + z / 3 * (1 + z / 4 * (1 + z / 5)))
    # dividing by 1 where z is small keeps that branch's gradient finite: where() adds both branches
    divisor = torch.where(small, 1, z)
    return torch.where(small, series, torch.expm1(z) / divisor)


def discretize(
    A: Tensor, B: Tensor, delta: float | Tensor, method: str = "zoh"
) -> tuple[Tensor, Tensor]:
    """A_bar and B_bar of a system whose time goes in steps of `delta`.

    zoh        exact if x holds still within a step: A_bar = exp(ΔA), B_bar = A⁻¹ (exp(ΔA) - 1) B
    bilinear   A_bar = (1 - ΔA/2)⁻¹ (1 + ΔA/2), B_bar = (1 - ΔA/2)⁻¹ ΔB        (S4, equation 3)
    euler      A_bar = 1 + ΔA, B_bar = ΔB
    mamba      A_bar = exp(ΔA), B_bar = ΔB, as the official selective scan does

    A dense (N, N) with B (N,), and `delta` of shape (…): results (…, N, N) and (…, N). Or A
    diagonal with B of its shape, and `delta` that broadcasts against them. Raises `UserError` for
    an unknown method, shapes that do not fit, or a step that is a number and not positive.
    """
    if method not in METHODS:
        raise UserError(f"method {method!r} is unknown: choose {', '.join(METHODS)}")
    if isinstance(delta, Real) and not 0 < delta < math.inf:
        raise UserError(f"a step of {delta} is no step: delta must be positive")
    dense = is_dense(A, B)
    delta = torch.as_tensor(delta, dtype=A.real.dtype, device=A.device)
    if dense:
        return _discretize_dense(A, B, delta[..., None], method)
    Delta_A = delta * A
    Delta_B = delta * B
    if method == "euler":
        return 1 + Delta_A, Delta_B
    if method == "bilinear":
        below = 1 - Delta_A / 2
        return (1 + Delta_A / 2) / below, Delta_B / below
    A_bar = torch.exp(Delta_A)
    if method == "mamba":
        return A_bar, Delta_B
    return A_bar, phi(Delta_A) * Delta_B


def _discretize_dense(A, B, delta, method):
    """As `discretize`, for a matrix A; delta has an axis of length one at its end."""
    n = len(B)
    one = torch.eye(n, dtype=A.dtype, device=A.device)
    Delta_A = delta[..., None] * A
    Delta_B = delta * B
    column = Delta_B[..., None]
    if method == "euler":
        return one + Delta_A, Delta_B
    if method == "bilinear":
        right = torch.cat([one + Delta_A / 2, column], -1)
        both = torch.linalg.solve(one - Delta_A / 2, right)
        return both[..., :n], both[..., n]
    if method == "mamba":
        return torch.linalg.matrix_exp(Delta_A), Delta_B
    # x as one more state that never changes: exp of the larger matrix holds both, and divides by
    # nothing
    larger = F.pad(torch.cat([Delta_A, column], -1), (0, 0, 0, 1))
    both = torch.linalg.matrix_exp(larger)
    return both[..., :n, :n], both[..., :n, n]


def recurrence(
    A_bar: Tensor, B_bar: Tensor, C: Tensor, x: Tensor, h0: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One step after another: the oracle. x (L,) or (B, L, D); gives y of x's shape and the last h.

    A_bar, B_bar as `discretize` gives them, C like B_bar. h and `h0` are (N,) for x (L,), else
    (B, D, N). Of a complex system y is complex: take the part you mean.
    """
    dense = is_dense(A_bar, B_bar)
    time = _time_axis(x)
    shape = (*x.movedim(time, 0).shape[1:], B_bar.shape[-1])
    h = h0 if h0 is not None else torch.zeros(shape, dtype=A_bar.dtype, device=x.device)
    if h.shape != shape:
        raise UserError(f"the state must be of shape {shape} for this input, not {tuple(h.shape)}")
    ys = []
    # unbind, not x[:, k]: the gradient of a slice is a whole tensor of zeros
    for x_k in x.unbind(time):
        kept = h @ A_bar.mT if dense else A_bar * h
        h = kept + B_bar * x_k[..., None]
        ys.append((C * h).sum(-1))
    y = torch.stack(ys, time) if ys else x.to(h.dtype)
    return y, h


def _time_axis(x: Tensor) -> int:
    if x.dim() not in (1, 3):
        raise UserError(f"a signal is of shape (L,) or (B, L, D), not {tuple(x.shape)}")
    return 0 if x.dim() == 1 else 1


def _orbit(A_bar: Tensor, v: Tensor, count: int) -> Tensor:
    """v, A_bar v, A_bar² v, …: (count, *v.shape), doubling what there is until it is enough."""
    dense = is_dense(A_bar, v)
    powers = v[None]
    while len(powers) < count:
        further = powers @ A_bar.mT if dense else A_bar * powers
        powers = torch.cat([powers, further])
        A_bar = A_bar @ A_bar if dense else A_bar * A_bar
    return powers[:count]


def _power(A_bar: Tensor, exponent: int) -> Tensor:
    """Diagonal A_bar to a whole power, by squaring."""
    result = torch.ones_like(A_bar)
    while exponent:
        if exponent & 1:
            result = result * A_bar
        A_bar = A_bar * A_bar
        exponent >>= 1
    return result


def kernel(A_bar: Tensor, B_bar: Tensor, C: Tensor, length: int) -> Tensor:
    """K[k] = C A_bar^k B_bar, what an impulse leaves k steps later: (L,), or (L, D) for D systems.

    For a diagonal system the exponent is split, k = i·width + j, so that the powers in memory are
    2·√L, not L: the sum over the N states is then one matrix product.
    """
    if length < 0:
        raise UserError(f"a kernel of {length} steps is no kernel: give a length of 0 or more")
    if is_dense(A_bar, B_bar):
        return _orbit(A_bar, B_bar, length) @ C
    width = math.isqrt(length) or 1
    rows = -(-length // width)
    fine = _orbit(A_bar, torch.ones_like(A_bar), width)
    coarse = _orbit(_power(A_bar, width), C * B_bar, rows)
    table = torch.einsum("i...n,j...n->ij...", coarse, fine)
    return table.flatten(0, 1)[:length]


def convolve(x: Tensor, K: Tensor) -> Tensor:
    """y[t] = Σ K[k] x[t-k] over the past, by FFT; real x (L,) or (B, L, D), K (M,) or (M, D).

    Both are padded with zeros to at least L + M - 1, so that the end does not wrap around.
    """
    time = _time_axis(x)
    if x.is_complex() or K.is_complex():
        raise UserError("convolve takes real signals: of a complex kernel take the real part first")
    if K.dim() == 1 and x.dim() == 3:
        K = K[:, None]
    if K.shape[1:] != x.shape[2:] and K.shape[1:] != (1,):
        raise UserError(
            f"the kernel must be of shape (M,) or (M, D) for x {tuple(x.shape)}, "
            f"not {tuple(K.shape)}"
        )
    length = x.shape[time]
    dtype = torch.promote_types(x.dtype, K.dtype)
    if length == 0 or len(K) == 0:
        return torch.zeros_like(x, dtype=dtype)
    size = 1 << (length + len(K) - 2).bit_length()  # the next power of two is the fastest
    x_f = torch.fft.rfft(x.to(dtype), size, dim=time)
    K_f = torch.fft.rfft(K.to(dtype), size, dim=0)
    y = torch.fft.irfft(x_f * K_f, size, dim=time)
    return y.narrow(time, 0, length)


def chunked(
    A_bar: Tensor, B_bar: Tensor, C: Tensor, x: Tensor, h0: Tensor, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """`recurrence` for a diagonal system (D, N), by matrix products in chunks of time.

    It gives the real part of y. Inside a chunk y is the kernel's matrix times x, and what the chunk
    leaves is added to a state that is handed on: the plan of notebook 11, for a system that is
    fixed. x real (B, L, D), h0 (B, D, N), both also what comes back.
    """
    length = x.shape[1]
    whole = length - length % chunk
    ys = [x[:, :0]]
    for begin, end, size in ((0, whole, chunk), (whole, length, length - whole)):
        if begin < end:
            y, h0 = _chunks(A_bar, B_bar, C, x[:, begin:end], h0, size)
            ys.append(y)
    return torch.cat(ys, 1), h0


def _chunks(
    A_bar: Tensor, B_bar: Tensor, C: Tensor, x: Tensor, h: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """`chunked` for a whole number of chunks of `size` steps."""
    batch, length, channels = x.shape
    powers = _orbit(A_bar, torch.ones_like(A_bar), size + 1).movedim(0, 1)  # (D, Q + 1, N)
    K = _reals(powers[:, :-1]) @ _reals((C * B_bar).conj())[..., None]  # (D, Q, 1)
    time = torch.arange(size, device=x.device)
    # the way from step s (row) to t as an index, in which 0 is the longest way back
    reach = time - time[:, None] + size - 1
    within = F.pad(K[..., 0], (size - 1, 0))[:, reach]  # (D, Q, Q), zero for t < s
    # (D, Q, 2N): what each step leaves, as decayed as it is at the chunk's end
    leave = _reals(powers[:, :-1].flip(1) * B_bar[:, None])
    # (D, Q, 2N): what each step reads of the state before
    find = _reals((C[:, None] * powers[:, 1:]).conj())

    rows = x.flatten(0, 1).T.reshape(channels, -1, size)  # (D, B · chunks, Q)
    y, left = (rows @ torch.cat([within, leave], 2)).split([size, leave.shape[2]], 2)
    left = torch.view_as_complex(left.unflatten(2, (-1, 2)).contiguous())
    h = h.movedim(1, 0)  # (D, B, N)
    before = []
    for left_c in left.unflatten(1, (batch, -1)).unbind(2):
        before.append(h)
        h = powers[:, -1:] * h + left_c
    y = torch.baddbmm(y, _reals(torch.stack(before, 2).flatten(1, 2)), find.mT)
    return y.reshape(channels, -1).T.unflatten(0, (batch, length)), h.movedim(0, 1)


def _reals(z: Tensor) -> Tensor:
    """(…, N) complex as (…, 2N) real.

    The real part of w·z is the dot product of conj(w)'s with z's.
    """
    return torch.view_as_real(z.resolve_conj()).flatten(-2)


def hippo_legs(n: int) -> tuple[Tensor, Tensor]:
    """HiPPO-LegS, A (n, n) and B (n,) in float64 (Gu et al. 2020, theorem 2, with the sign of S4).

    h' = (A h + B x) / t keeps in h the coefficients of all of x until t in Legendre polynomials
    that are orthonormal over [0, t]. With log t for a clock, it is an ordinary h' = A h + B x.
    """
    if n < 1:
        raise UserError(f"HiPPO needs at least one coefficient, not {n}")
    k = torch.arange(n, dtype=torch.float64)
    root = torch.sqrt(2 * k + 1)
    A = -torch.tril(root[:, None] * root, -1) - torch.diag(k + 1)
    return A, root


class DiagonalSystems(nn.Module):
    """One diagonal system a channel, (B, L, d_model) to (B, L, d_model): the inside of S4D.

    The systems begin as those of S4D-Lin. The states come in conjugate pairs, of which one is kept:
    `d_state` counts both, N = d_state / 2 complex numbers are stored, and y = 2 Re(C h) + D x. B is
    1: only its product with C matters. `forward` convolves, or goes on from a state chunk by chunk;
    `step` recurs. So a piece can be read in segments.
    """

    def __init__(self, d_model: int, d_state: int = 64, dt_min: float = 0.001, dt_max: float = 0.1):
        super().__init__()
        if d_model < 1 or d_state < 2 or d_state % 2:
            raise UserError(
                f"S4D needs a width of at least 1 and an even number of states, "
                f"not {d_model} and {d_state}"
            )
        if not 0 < dt_min <= dt_max < math.inf:
            raise UserError(
                f"delta starts between dt_min and dt_max, positive and in this order, "
                f"not {dt_min} and {dt_max}"
            )
        n = d_state // 2
        self.d_model = d_model
        # S4D-Lin: A = -1/2 + iπn; the logarithm keeps its real part negative
        self.A_log = nn.Parameter(torch.full((d_model, n), math.log(0.5)))
        self.A_imag = nn.Parameter(math.pi * torch.arange(n).float().repeat(d_model, 1))
        self.C = nn.Parameter(torch.randn(d_model, n, 2) * 0.5**0.5)  # real and imaginary part
        self.D = nn.Parameter(torch.ones(d_model))
        low = math.log(dt_min)
        high = math.log(dt_max)
        self.log_delta = nn.Parameter(low + (high - low) * torch.rand(d_model))

    def system(self) -> tuple[Tensor, Tensor, Tensor]:
        """A_bar, B_bar and 2 C, complex (D, N), of the parameters as they are now."""
        high = torch.promote_types(self.C.dtype, torch.float32)
        real = -torch.exp(self.A_log.to(high))
        A = torch.complex(real, self.A_imag.to(high))
        delta = torch.exp(self.log_delta.to(high))[:, None]
        A_bar, B_bar = discretize(A, torch.ones_like(A), delta)
        C = torch.view_as_complex(self.C.to(high))
        return A_bar, B_bar, 2 * C

    def new_state(self, batch: int = 1) -> Tensor:
        """The state before the first input: zeros, complex (B, D, N)."""
        dtype = torch.promote_types(self.C.dtype, torch.float32).to_complex()
        return torch.zeros(batch, *self.A_imag.shape, dtype=dtype, device=self.C.device)

    def mix(self, y: Tensor) -> Tensor:
        """What becomes of the systems' outputs (…, d_model): here the channels stay apart."""
        return y

    def forward(self, u: Tensor, state: Tensor | None = None, return_state: bool = False):
        """u (B, L, d_model) to y, going on from `state`; with `return_state` also the state after.

        The systems compute in float32 at least (an FFT knows no bfloat16).
        """
        if u.dim() != 3 or u.shape[2] != self.d_model:
            raise UserError(
                f"S4D needs an input of shape (B, L, {self.d_model}), not {tuple(u.shape)}"
            )
        batch, length, _ = u.shape
        A_bar, B_bar, C = self.system()
        x = u.to(A_bar.real.dtype)
        if state is None and not return_state:
            y = convolve(x, kernel(A_bar, B_bar, C, length).real)
        else:
            state = self.new_state(batch) if state is None else state
            with without_autocast(x.device):  # whose products would be rounded, and the state too
                y, state = chunked(A_bar, B_bar, C, x, state)
        y = self.mix((y + self.D * x).to(u.dtype))
        return (y, state) if return_state else y

    def step(self, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One position: u (B, d_model). The same numbers as `forward`, from the state alone."""
        self.check_step(u, state)
        A_bar, B_bar, C = self.system()
        x = u.to(A_bar.real.dtype)
        state = A_bar * state + B_bar * x[..., None]
        y = (C * state).sum(-1).real + self.D * x
        return self.mix(y.to(u.dtype)), state

    def check_step(self, u: Tensor, state: Tensor) -> None:
        """Raise `UserError` where the input or the state of `step` is of another shape."""
        wanted = (*u.shape[:1], *self.A_imag.shape)
        if u.dim() != 2 or u.shape[1] != self.d_model or state.shape != wanted:
            raise UserError(
                f"a step of S4D needs u of shape (B, {self.d_model}) and a state of shape "
                f"{wanted}, not {tuple(u.shape)} and {tuple(state.shape)}"
            )


class S4D(DiagonalSystems):
    """The S4D layer as published.

    Behind the systems GELU and a gated linear layer mix the channels.
    """

    def __init__(self, d_model: int, d_state: int = 64, dt_min: float = 0.001, dt_max: float = 0.1):
        super().__init__(d_model, d_state, dt_min, dt_max)
        self.out_proj = nn.Linear(d_model, 2 * d_model)

    def mix(self, y: Tensor) -> Tensor:
        """GELU, then a linear layer whose second half opens and closes the first."""
        return F.glu(self.out_proj(F.gelu(y)), -1)
