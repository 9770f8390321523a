"""The fused selective scan on a GPU, in Triton: forward and backward, one kernel each.

A program owns BLOCK_D channels of one sequence and walks over time in blocks of BLOCK_L steps.
What is as large as (B, L, D, N), the discretised inputs and the states, lives in registers only.
One state a block is kept, (B, blocks, D, N); the backward pass recomputes the others from it
(Gu and Dao 2023, section 3.3.2 and appendix D). Notebook 06 derives both kernels step by step.

In the kernels a tile is (BLOCK_D, BLOCK_L), a row of it one channel. Memory runs along time, so
that neighbouring threads read neighbouring steps. Past the end delta is 0: then a = 1, b = 0, the
neutral pair, and the state passes through.
"""

import torch
import triton
import triton.language as tl

from lib.env.errors import UserError
from lib.scan.arguments import cast, check_scan, check_tensors
from lib.scan.operators import differentiable, operator

LOG2E = tl.constexpr(1.4426950408889634)
BLOCK_D, BLOCK_L = 32, 32  # channels and steps of a tile; a state is kept every BLOCK_L steps
LARGEST_STATE = 256
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def combine(a1, b1, a2, b2):
    """First h -> a1 h + b1, then h -> a2 h + b2: one map again. This is what makes it a scan."""
    return a2 * a1, a2 * b1 + b2


@triton.jit
def up(a, b, REVERSE: tl.constexpr):
    """Up-sweep: compose the maps of neighbours.

    (R, C) to the first of each pair and to (R, C / 2).
    """
    a0, a1 = tl.split(tl.reshape(a, (a.shape[0], a.shape[1] // 2, 2)))
    b0, b1 = tl.split(tl.reshape(b, (a.shape[0], a.shape[1] // 2, 2)))
    if REVERSE:
        a0, b0, a1, b1 = a1, b1, a0, b0
    a_pair, b_pair = combine(a0, b0, a1, b1)
    return a0, b0, a_pair, b_pair


@triton.jit
def down(before, a0, b0, REVERSE: tl.constexpr):
    """Down-sweep: from the state before each pair to the state before each of its two."""
    between = a0 * before + b0
    both = tl.join(between, before) if REVERSE else tl.join(before, between)
    return tl.reshape(both, (a0.shape[0], a0.shape[1] * 2))


@triton.jit
def scan(a, b, carry, RUN: tl.constexpr, REVERSE: tl.constexpr):
    """Every h[t] = a[t] h[t-1] + b[t] of a tile (BLOCK_D, BLOCK_L).

    `carry` (BLOCK_D, 1) comes before the tile. In reverse t - 1 reads t + 1, and `carry` comes
    after the tile. A thread holds a run of RUN (4 or 8) steps and sweeps over it in its registers,
    up and down as Blelloch does; the threads of a channel scan their runs in between. Also returns
    the states after each run, the last of which is the tile's last.
    """
    a1, b1, a_run, b_run = up(a, b, REVERSE)
    a2, b2, a_run, b_run = up(a_run, b_run, REVERSE)
    if RUN == 8:
        a4, b4, a_run, b_run = up(a_run, b_run, REVERSE)
    RUNS: tl.constexpr = a.shape[1] // RUN
    run = tl.broadcast_to(tl.arange(0, RUNS)[None, :], (a.shape[0], RUNS))
    if REVERSE:
        run = -run + (RUNS - 1)
        a_run, b_run = tl.gather(a_run, run, 1), tl.gather(b_run, run, 1)
    a_run, b_run = tl.associative_scan((a_run, b_run), 1, combine)
    after = a_run * carry + b_run
    before = tl.where(run == 0, carry, tl.gather(after, tl.maximum(run - 1, 0), 1))
    if RUN == 8:
        before = down(before, a4, b4, REVERSE)
    before = down(down(before, a2, b2, REVERSE), a1, b1, REVERSE)
    return a * before + b, after


@triton.jit
def sigmoid(v):
    """1 / (1 + e^-v)."""
    return 1 / (1 + tl.exp2(v * -LOG2E))


@triton.jit
def softplus(v):
    """log(1 + e^v) = max(v, 0) + log1p(u) with u = e^-|v|.

    log1p(u) = 2 atanh(u / (2 + u)), a short series.
    """
    u = tl.exp2(tl.abs(v) * -LOG2E)
    q = u / (2 + u)
    q2 = q * q
    p = q2 * (2 / 11) + 2 / 9
    p = p * q2 + 2 / 7
    p = p * q2 + 2 / 5
    p = p * q2 + 2 / 3
    return tl.maximum(v, 0) + (p * q2 + 2) * q


@triton.jit
def load_step(delta_ptr, offs, mask, bias, SOFTPLUS: tl.constexpr):
    """The step itself: bias and softplus applied, and 0 where there is no time to step over."""
    delta = tl.load(delta_ptr + offs, mask, 0).to(tl.float32) + bias
    return tl.where(mask, softplus(delta) if SOFTPLUS else delta, 0)


@triton.jit
def forward_kernel(
    x_ptr,
    delta_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    z_ptr,
    bias_ptr,
    y_ptr,
    kept_ptr,
    length,
    channels,
    N: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_L: tl.constexpr,
    RUN: tl.constexpr,
):
    """y, and the state after each block in `kept`.

    A program owns BLOCK_D channels of one sequence.
    """
    b = tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)[:, None]
    offs_l = tl.arange(0, BLOCK_L)[None, :]
    RUNS: tl.constexpr = BLOCK_L // RUN
    offs_run = tl.arange(0, RUNS)[None, :]
    mask_d = offs_d < channels
    is_last = mask_d & (offs_run == RUNS - 1)  # the run at whose end the block ends
    skip = tl.load(D_ptr + offs_d, mask_d, 0) if D_ptr is not None else 0.0
    bias = tl.load(bias_ptr + offs_d, mask_d, 0) if bias_ptr is not None else 0.0
    rows = (b * channels + offs_d) * length
    kept_ptr += b * (tl.cdiv(length, BLOCK_L) + 1) * channels * N + offs_d * N
    for start in range(0, length, BLOCK_L):
        offs = rows + start + offs_l
        mask = mask_d & (start + offs_l < length)
        offs_bc = b * N * length + start + offs_l + 0 * offs_d
        delta = load_step(delta_ptr, offs, mask, bias, SOFTPLUS)
        x = tl.load(x_ptr + offs, mask, 0).to(tl.float32)
        y = skip * x
        delta_x = delta * x
        for n in range(N):
            A = tl.load(A_ptr + offs_d * N + n, mask_d, 0) * LOG2E
            B = tl.load(B_ptr + offs_bc + n * length, mask, 0).to(tl.float32)
            C = tl.load(C_ptr + offs_bc + n * length, mask, 0).to(tl.float32)
            before = tl.load(kept_ptr + n, mask_d, 0)
            h, h_run = scan(tl.exp2(delta * A), delta_x * B, before, RUN, False)
            y += h * C
            tl.store(kept_ptr + channels * N + n + 0 * offs_run, h_run, is_last)
        kept_ptr += channels * N
        tl.debug_barrier()  # the next block reads what this one stored
        if z_ptr is not None:
            z = tl.load(z_ptr + offs, mask, 0).to(tl.float32)
            y *= z * sigmoid(z)
        tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask)


@triton.jit
def backward_kernel(
    x_ptr,
    delta_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    z_ptr,
    bias_ptr,
    kept_ptr,
    dy_ptr,
    dx_ptr,
    ddelta_ptr,
    dA_ptr,
    dB_ptr,
    dC_ptr,
    dD_ptr,
    dz_ptr,
    dh_ptr,
    length,
    channels,
    N: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_L: tl.constexpr,
    RUN: tl.constexpr,
):
    """Every gradient, block by block from the last.

    The states are recomputed from `kept` (notebook 06, section 8).
    """
    b, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    offs_d = group * BLOCK_D + tl.arange(0, BLOCK_D)[:, None]
    offs_l = tl.arange(0, BLOCK_L)[None, :]
    RUNS: tl.constexpr = BLOCK_L // RUN
    offs_run = tl.arange(0, RUNS)[None, :]
    mask_d = offs_d < channels
    skip = tl.load(D_ptr + offs_d, mask_d, 0) if D_ptr is not None else 0.0
    bias = tl.load(bias_ptr + offs_d, mask_d, 0) if bias_ptr is not None else 0.0
    rows = (b * channels + offs_d) * length
    blocks = tl.cdiv(length, BLOCK_L)
    state = (b * channels + offs_d) * N  # of dA and dh: (B, D, N)
    kept_ptr += (b * (blocks + 1) + blocks) * channels * N + offs_d * N
    partial = (b * tl.num_programs(1) + group) * N * length  # of dB and dC: (B, groups, N, L)
    dD = tl.zeros((BLOCK_D, 1), tl.float32)
    for i in range(0, length, BLOCK_L):
        start = (blocks - 1) * BLOCK_L - i
        kept_ptr -= channels * N
        offs = rows + start + offs_l
        mask_l = start + offs_l < length
        mask = mask_d & mask_l
        offs_bc = b * N * length + start + offs_l + 0 * offs_d
        delta = load_step(delta_ptr, offs, mask, bias, SOFTPLUS)
        delta_first = tl.sum(tl.where(offs_l == 0, delta, 0), 1, keep_dims=True)
        mask_next = mask_d & (start + offs_l + 1 < length) & (offs_l < BLOCK_L - 1)
        delta_next = load_step(delta_ptr, offs + 1, mask_next, bias, SOFTPLUS)
        x = tl.load(x_ptr + offs, mask, 0).to(tl.float32)
        dy = tl.load(dy_ptr + offs, mask, 0).to(tl.float32)
        if z_ptr is not None:
            z = tl.load(z_ptr + offs, mask, 0).to(tl.float32)
            dy *= z * sigmoid(z)
        y = skip * x  # before the gate, again
        delta_x, dBx, ddelta = delta * x, tl.zeros_like(x), tl.zeros_like(x)
        for n in range(N):
            A = tl.load(A_ptr + offs_d * N + n, mask_d, 0)
            B = tl.load(B_ptr + offs_bc + n * length, mask, 0).to(tl.float32)
            C = tl.load(C_ptr + offs_bc + n * length, mask, 0).to(tl.float32)
            Bx = delta_x * B
            h, _ = scan(
                tl.exp2(delta * (A * LOG2E)), Bx, tl.load(kept_ptr + n, mask_d, 0), RUN, False
            )
            y += h * C
            # g[t] = C[t] dy[t] + a[t+1] g[t+1]: a scan in reverse
            after = tl.load(dh_ptr + state + n, mask_d, 0)
            g, g_run = scan(tl.exp2(delta_next * (A * LOG2E)), C * dy, after, RUN, True)
            dBx += g * B
            decayed = g * (h - Bx)  # g[t] a[t] h[t-1]
            ddelta += decayed * A
            dA = tl.sum(decayed * delta, 1, keep_dims=True)
            tl.store(dA_ptr + state + n, dA + tl.load(dA_ptr + state + n, mask_d, 0), mask_d)
            through = g_run * tl.exp2(delta_first * (A * LOG2E))
            tl.store(dh_ptr + state + n + 0 * offs_run, through, mask_d & (offs_run == RUNS - 1))
            offs_n = partial + n * length + start + offs_l
            tl.store(dB_ptr + offs_n, tl.sum(g * delta_x, 0, keep_dims=True), mask_l)
            tl.store(dC_ptr + offs_n, tl.sum(dy * h, 0, keep_dims=True), mask_l)
        tl.debug_barrier()  # the next block reads what this one stored
        ddelta += dBx * x
        if SOFTPLUS:  # its slope is sigmoid(v) = 1 - exp(-softplus(v))
            raw = tl.load(delta_ptr + offs, mask, 0).to(tl.float32) + bias
            ddelta *= sigmoid(raw)
        dD += tl.sum(dy * x, 1, keep_dims=True)
        tl.store(dx_ptr + offs, (dBx * delta + dy * skip).to(dx_ptr.dtype.element_ty), mask)
        tl.store(ddelta_ptr + offs, ddelta, mask)
        if z_ptr is not None:  # read again: a register is dearer than a load
            z = tl.load(z_ptr + offs, mask, 0).to(tl.float32)
            gate = sigmoid(z)
            dz = tl.load(dy_ptr + offs, mask, 0).to(tl.float32) * y * gate * (1 + z * (1 - gate))
            tl.store(dz_ptr + offs, dz.to(dz_ptr.dtype.element_ty), mask)
    tl.store(dD_ptr + b * channels + offs_d, dD, mask_d)


def along_time(tensor):
    """(B, L, D) whose memory runs along L; copied unless it is so already."""
    return None if tensor is None else _plain(tensor.transpose(1, 2)).transpose(1, 2)


def _plain(tensor):
    """In a row and with its own signs: torch may only have marked a tensor as negative."""
    return tensor.resolve_neg().contiguous()


def like(x):
    """Room for one (B, L, D) tensor whose memory runs along L."""
    return torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format).transpose(
        1, 2
    )


def options(dtype):
    """How a tile is cut for (B, L, D) tensors of `dtype`.

    A thread loads 16 bytes, RUN steps of one channel.
    """
    return dict(BLOCK_D=BLOCK_D, BLOCK_L=BLOCK_L, RUN=16 // dtype.itemsize, num_warps=4)


def _scan_kernel(x, delta, A, B, C, D, z, delta_bias, delta_softplus, h0):
    """y, the last state, and for the backward pass the states that are kept.

    Those are the states before every block and after the last one.
    """
    *given, h0 = _as_read(x, delta, A, B, C, D, z, delta_bias, h0)
    x = given[0]
    batch, length, channels = x.shape
    states = A.shape[1]
    kept = x.new_empty(kept_shape(x, A), dtype=torch.float32)
    kept[:, 0] = 0 if h0 is None else h0
    y = like(x)
    grid = (batch, triton.cdiv(channels, BLOCK_D))
    with torch.cuda.device_of(x):  # Triton launches on the current device
        forward_kernel[grid](
            *given, y, kept, length, channels, states, delta_softplus, **options(x.dtype)
        )
    return y, kept[:, -1].clone(), kept


def _scan_fake(x, delta, A, B, C, D, z, delta_bias, delta_softplus, h0):
    return like(x), A.new_empty(x.shape[0], *A.shape), A.new_empty(kept_shape(x, A))


def _backward_kernel(x, delta, A, B, C, D, z, delta_bias, delta_softplus, kept, dy, dlast):
    """The gradients of x, delta, A, B, C, D, z, delta_bias and h0.

    Where there is no z, an empty tensor stands for its gradient.
    """
    given = _as_read(x, delta, A, B, C, D, z, delta_bias)[:-1]
    check_tensors(
        "the scan's gradient", x.device, {"kept": (kept, kept_shape(x, A))}, (torch.float32,)
    )
    check_tensors(
        "the scan's gradient", x.device, {"dy": (dy, x.shape), "dlast": (dlast, (len(x), *A.shape))}
    )
    x, delta, _, _, _, _, z, _ = given
    batch, length, channels = x.shape
    states = A.shape[1]
    grid = (batch, triton.cdiv(channels, BLOCK_D))
    dx, ddelta, dz = like(x), like(delta.float()), None if z is None else like(z)
    dA, dh = (
        x.new_zeros(batch, channels, states, dtype=torch.float32),
        _plain(dlast.float()).clone(),
    )
    dB, dC = (x.new_empty(*grid, states, length, dtype=torch.float32) for _ in range(2))
    dD = x.new_empty(batch, channels, dtype=torch.float32)
    with torch.cuda.device_of(x):
        backward_kernel[grid](
            *given,
            _plain(kept),
            along_time(dy),
            dx,
            ddelta,
            dA,
            dB,
            dC,
            dD,
            dz,
            dh,
            length,
            channels,
            states,
            delta_softplus,
            **options(x.dtype),
        )
    # summed in one fixed order: the same digits always
    dB, dC = (d.sum(1).transpose(1, 2).to(x.dtype) for d in (dB, dC))
    return (
        dx,
        ddelta.to(delta.dtype),
        dA.sum(0),
        dB,
        dC,
        dD.sum(0),
        x.new_empty(0) if z is None else dz,
        ddelta.sum((0, 1)),
        dh,
    )


def _backward_fake(x, delta, A, B, C, D, z, delta_bias, delta_softplus, kept, dy, dlast):
    channels = len(A)
    return (
        like(x),
        like(delta),
        A.new_empty(A.shape),
        like(B),
        like(C),
        A.new_empty(channels),
        x.new_empty(0) if z is None else like(z),
        A.new_empty(channels),
        A.new_empty(x.shape[0], *A.shape),
    )


READ = (
    "Tensor x, Tensor delta, Tensor A, Tensor B, Tensor C, "
    "Tensor? D, Tensor? z, Tensor? delta_bias, bool delta_softplus"
)
SCAN = operator(
    "scan_triton",
    f"({READ}, Tensor? h0) -> (Tensor y, Tensor last, Tensor kept)",
    _scan_kernel,
    _scan_fake,
)
SCAN_BACKWARD = operator(
    "scan_triton_backward",
    f"({READ}, Tensor kept, Tensor dy, Tensor dlast) -> (Tensor dx, Tensor ddelta, Tensor dA, "
    "Tensor dB, Tensor dC, Tensor dD, Tensor dz, Tensor dbias, Tensor dh0)",
    _backward_kernel,
    _backward_fake,
)


def _keep(ctx, inputs, output):
    *tensors, softplus, h0 = inputs
    kept = output[2]
    ctx.save_for_backward(*tensors, kept)
    ctx.softplus, ctx.starts = softplus, h0 is not None
    ctx.mark_non_differentiable(kept)


def _gradients(ctx, dy, dlast, _):
    *tensors, kept = ctx.saved_tensors
    *_, D, z, delta_bias = tensors
    *first, dD, dz, dbias, dh0 = _scan_backward(*tensors, ctx.softplus, kept, dy, dlast)
    return (
        *first,
        None if D is None else dD,
        None if z is None else dz,
        None if delta_bias is None else dbias,
        None,
        dh0 if ctx.starts else None,
    )


_scan, _scan_backward = differentiable(
    SCAN, SCAN_BACKWARD, _keep, _gradients, "the fused scan", "choose backend 'loop'"
)


def kept_shape(x, A):
    """The shape of the states that are kept: one before each block, and the last."""
    batch, length, _ = x.shape
    return batch, -(-length // BLOCK_L) + 1, *A.shape


def _check_device(x):
    interpreted = triton.knobs.runtime.interpret and x.device.type == "cpu"
    if not (x.is_cuda or interpreted):
        raise UserError(
            "backend 'triton' takes tensors on a CUDA device: move them, or choose backend 'auto'"
        )


def _as_read(x, delta, A, B, C, D, z, delta_bias, h0=None):
    """What an operator was given, as the kernels read it. `UserError` for what they cannot read."""
    check_scan(x, delta, A, B, C, D, z, delta_bias, h0)
    _check_device(x)
    fixed = {t.dtype for t in (A, D, delta_bias, h0) if t is not None}
    moving = {t.dtype for t in (x, delta, B, C, z) if t is not None}
    if fixed != {torch.float32} or len(moving) > 1 or x.dtype not in DTYPES:
        raise UserError(
            "the operator of the scan takes x, delta, B, C and z all in one of float32, "
            "bfloat16 and float16, and the rest in float32: "
            "call lib.scan.selective_scan, which converts them"
        )
    x, delta, B, C, z = map(along_time, (x, delta, B, C, z))
    A, D, delta_bias, h0 = (t if t is None else _plain(t) for t in (A, D, delta_bias, h0))
    return x, delta, A, B, C, D, z, delta_bias, h0


def fused(x, delta, A, B, C, D, z, delta_bias, delta_softplus, h0):
    """The fused scan on CUDA; shapes as in `lib.scan.selective_scan`. Returns y, last h (float32).

    x, delta, B, C and z are read in the widest dtype among them, at most float32, the parameters
    and the state in float32. A tensor whose memory runs along L is read as it is, any
    other is copied once. Raises `UserError` for another device, an x in float64 and N > 256.
    """
    _check_device(x)
    if A.shape[1] > LARGEST_STATE:
        raise UserError(
            f"backend 'triton' holds at most {LARGEST_STATE} states a channel, not {A.shape[1]}"
        )
    if x.dtype not in DTYPES:
        raise UserError(
            f"backend 'triton' takes float32, bfloat16 or float16, not {str(x.dtype)[6:]}"
        )
    dtype = x.dtype
    for t in (delta, B, C, z):
        dtype = dtype if t is None else torch.promote_types(dtype, t.dtype)
    if dtype == torch.float64:  # beside an x that is none
        dtype = torch.float32
    x, delta, B, C, z = cast(dtype, x, delta, B, C, z)
    A, D, delta_bias, h0 = cast(torch.float32, A, D, delta_bias, h0)
    y, last, _ = _scan(x, delta, A, B, C, D, z, delta_bias, bool(delta_softplus), h0)
    return y, last
