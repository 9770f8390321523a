"""A Mamba block and the loss on a CPU, fused.

The matrix products are torch's, with one pass of ours between two of them. What a plain block
writes to memory and reads again operation by operation (casts, norm, convolution, SiLU, gates,
residual), `block_cpu.cpp` and `lib.scan.cpu` do in one pass each; activations travel in bfloat16
where that is asked for, and one function a block keeps what its backward pass needs, nothing twice.
The numbers are those of `MambaBlock` in plain PyTorch, up to rounding.
"""

import ctypes
from ctypes import c_float, c_int, c_long, c_void_p
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib.env.errors import UserError
from lib.scan import cpu as scan_cpu
from lib.scan.arguments import FLOATS, axes, cast, check_tensors, described
from lib.scan.native import Kernel, address
from lib.scan.operators import constant, differentiable, operator, saved, wants_derivative

SHARE = 64  # rows in a share of work, as in block_cpu.cpp
MOST_TAPS = 8  # of the convolution; with more, plain PyTorch computes it
ONE_THREAD = 32_768  # fewer numbers than this are done sooner than a second thread wakes up
PRECISIONS = (torch.float32, torch.bfloat16)  # of what the kernels read and write
CPU = torch.device("cpu")

SOURCE = Path(__file__).with_name("block_cpu.cpp")
KERNEL = Kernel(SOURCE, "the fused block", "the block runs in plain PyTorch, several times slower")


def available() -> bool:
    """Whether the kernel can be used here; see `Kernel.available`."""
    return KERNEL.available()


constant(available)


# -- the passes between the products ---------------------------------------------------------------
# Each hands addresses to the kernel as they come: whoever calls one has checked them.
def _rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """x / rms(x) * weight over the last axis, from float32 to `dtype`."""
    u = torch.empty_like(x, dtype=dtype)
    KERNEL.library.norm(
        _half(u),
        c_long(x.shape[:-1].numel()),
        c_long(x.shape[-1]),
        c_float(eps),
        _threads(x),
        *map(address, (x, weight, u)),
    )
    return u


def _rms_norm_backward(
    x: Tensor, weight: Tensor, eps: float, du: Tensor, dy: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gradients of x and weight.

    They come from du, the gradient of the norm, and dy, that of the residual beside it.
    """
    rows, width = x.shape[:-1].numel(), x.shape[-1]
    dx, parts = torch.empty_like(x), x.new_empty(-(-rows // SHARE), width)
    KERNEL.library.norm_backward(
        _half(du),
        c_long(rows),
        c_long(width),
        c_float(eps),
        _threads(x),
        *map(address, (x, weight, du, dy, dx, parts)),
    )
    return dx, parts.sum(0)


def _add(x: Tensor, out: Tensor) -> Tensor:
    """x + out in float32."""
    y = torch.empty_like(x)
    KERNEL.library.add(_half(out), c_long(x.numel()), _threads(x), *map(address, (x, out, y)))
    return y


class _Call(ctypes.Structure):
    """`Convolution` in block_cpu.cpp."""

    _fields_ = [
        *((name, c_long) for name in ("batch", "length", "channels", "taps")),
        ("threads", c_int),
        *((name, c_long) for name in ("x_row", "dx_row")),
        *(
            (name, c_void_p)
            for name in ("x", "weight", "bias", "before", "y", "dy", "dx", "dbefore", "parts")
        ),
    ]


def _convolve(x: Tensor, taps: Tensor, bias: Tensor | None, before: Tensor) -> Tensor:
    """SiLU of the causal depthwise convolution.

    x (B, L, D) in regular rows, taps (K, D), before (B, K-1, D).
    """
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    call = _Call(
        *x.shape, len(taps), _threads(x), x.stride(1), 0, *map(address, (x, taps, bias, before, y))
    )
    KERNEL.library.conv_forward(_half(x), ctypes.byref(call))
    return y


def _convolve_backward(
    x: Tensor, taps: Tensor, bias: Tensor | None, before: Tensor, dy: Tensor, dx: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Writes dx, in regular rows; returns the gradients of taps, bias and before."""
    batch, length, channels = x.shape
    dbefore = torch.zeros_like(before)  # at length 0 the kernel writes nothing
    parts = before.new_empty(batch * -(-length // SHARE), len(taps) + 1, channels)
    call = _Call(
        batch,
        length,
        channels,
        len(taps),
        _threads(x),
        x.stride(1),
        dx.stride(1),
        *map(address, (x, taps, bias, before, None, dy, dx, dbefore, parts)),
    )
    KERNEL.library.conv_backward(_half(x), ctypes.byref(call))
    sums = parts.sum(0)
    return sums[:-1].clone(), sums[-1].clone(), dbefore  # results of an operator share no memory


def _convolution_kernel(x, taps, bias, before):
    _check_convolution(x, taps.t() if axes(taps) == 2 else taps, bias, before, (torch.float32,))
    taps, bias, before = map(scan_cpu.in_floats, (taps, bias, before))
    return _convolve(scan_cpu.in_rows(x), taps, bias, before)


def _convolution_backward_kernel(x, taps, bias, before, dy):
    _check_convolution(x, taps.t() if axes(taps) == 2 else taps, bias, before, (torch.float32,))
    check_tensors("the convolution's gradient", x.device, {"dy": (dy, x.shape)})
    x, dy = scan_cpu.in_rows(x), dy.to(x.dtype).resolve_neg().contiguous()
    taps, bias, before = map(scan_cpu.in_floats, (taps, bias, before))
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    return dx, *_convolve_backward(x, taps, bias, before, dy, dx)


def _convolution_backward_fake(x, taps, bias, before, dy):
    new = lambda t: t.new_empty(t.shape)
    return new(x), new(taps), taps.new_empty(x.shape[2]), new(before)


CONVOLUTION = operator(
    "convolve_silu_cpu",
    "(Tensor x, Tensor taps, Tensor? bias, Tensor before) -> Tensor",
    _convolution_kernel,
    lambda x, taps, bias, before: x.new_empty(x.shape),
)
CONVOLUTION_BACKWARD = operator(
    "convolve_silu_cpu_backward",
    "(Tensor x, Tensor taps, Tensor? bias, Tensor before, Tensor dy) -> "
    "(Tensor dx, Tensor dtaps, Tensor dbias, Tensor dbefore)",
    _convolution_backward_kernel,
    _convolution_backward_fake,
)


def _keep_convolution(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _convolution_gradients(ctx, dy):
    x, taps, bias, before = ctx.saved_tensors
    dx, dtaps, dbias, dbefore = _convolution_backward(x, taps, bias, before, dy)
    return dx, dtaps, None if bias is None else dbias, dbefore


_convolution, _convolution_backward = differentiable(
    CONVOLUTION,
    CONVOLUTION_BACKWARD,
    _keep_convolution,
    _convolution_gradients,
    "the fused convolution",
    "take torch's conv1d and silu",
)


def convolve_silu(x: Tensor, taps: Tensor, bias: Tensor | None, before: Tensor) -> Tensor:
    """SiLU of the causal depthwise convolution of x (B, L, D).

    `before` (B, K-1, D) are the inputs that came before x. taps (D, K), the last one for the
    present step; bias (D,). x is float32 or bfloat16 on a CPU, and so is the result; the rest is
    used in float32. Ask `available` first. Raises `UserError` for what does not fit.
    """
    _check_convolution(x, taps, bias, before)
    taps, bias, before = cast(torch.float32, taps.t(), bias, before)
    return _convolution(x, taps, bias, before)


def _check_convolution(x, taps, bias, before, dtypes=FLOATS) -> None:
    """Raise `UserError` naming the first argument of `convolve_silu` that does not fit."""
    if axes(x) != 3 or axes(taps) != 2 or not 1 <= taps.shape[1] <= MOST_TAPS:
        raise UserError(
            "the convolution needs x of shape (B, L, D) and taps of shape (D, K), "
            f"K from 1 to {MOST_TAPS}, not {described(x)} and {described(taps)}"
        )
    batch, _, channels = x.shape
    window = taps.shape[1] - 1
    check_tensors("the convolution", CPU, {"x": (x, x.shape)}, PRECISIONS)
    check_tensors(
        "the convolution",
        CPU,
        {
            "taps": (taps, (channels, window + 1)),
            "bias": (bias, (channels,)),
            "before": (before, (batch, window, channels)),
        },
        dtypes,
        optional=("bias",),
    )


# -- the block -------------------------------------------------------------------------------------
# arguments of both operators of the block; weights in the order of `weights_of`
READ = (
    "Tensor? mask, ScalarType dtype, float eps, Tensor norm, Tensor in_w, Tensor? in_b, "
    "Tensor conv_w, Tensor? conv_b, Tensor x_w, Tensor dt_w, Tensor dt_b, Tensor A_log, "
    "Tensor D, Tensor out_w, Tensor? out_b"
)


class Weights(NamedTuple):
    """A block's weights in the order of `READ`; `check_weights` has their shapes."""

    norm: Tensor
    in_w: Tensor
    in_b: Tensor | None
    conv_w: Tensor
    conv_b: Tensor | None
    x_w: Tensor
    dt_w: Tensor
    dt_b: Tensor
    A_log: Tensor
    D: Tensor
    out_w: Tensor
    out_b: Tensor | None


class Kept(NamedTuple):
    """What the forward pass keeps for the backward pass, in the dtype of the block's products.

    Only the states are always float32.
    """

    u: Tensor
    xz: Tensor
    x_conv: Tensor
    selected: Tensor
    delta: Tensor
    y: Tensor
    states: Tensor


KEPT = Kept._fields


def _block_kernel(x, before, h0, mask, dtype, eps, *rest):
    """x + mixer(norm(x)), the memory after it (two tensors), and with `keep` those of `Kept`."""
    *weights, keep = rest
    w = Weights(*weights)
    _check_block(x, before, mask, dtype, w)
    check_tensors("the block", CPU, {"h0": (h0, (len(x), *w.A_log.shape))})
    d_inner, d_state = w.A_log.shape
    rank, window = w.dt_w.shape[1], w.conv_w.shape[2] - 1
    x, before, h0 = map(scan_cpu.in_floats, (x, before, h0))
    A, taps = -torch.exp(scan_cpu.in_floats(w.A_log)), scan_cpu.in_floats(w.conv_w[:, 0].t())
    w = _as_computed(w, dtype)
    with torch.autocast("cpu", enabled=False):
        u = _rms_norm(x, w.norm, eps, dtype)
        xz = F.linear(u, w.in_w, w.in_b)
        x_in, z = xz.split([d_inner, d_inner], -1)
        x_conv = _convolve(x_in, taps, w.conv_b, before)
        selected = F.linear(x_conv, w.x_w)
        low, B, C = selected.split([rank, d_state, d_state], -1)
        delta = F.linear(low, w.dt_w)
        given = scan_cpu.Inputs(x_conv, delta, A, B, C, w.D, z, w.dt_b, True)
        y, last, states = scan_cpu.forward_unchecked(given, h0, keep)
        out = F.linear(y, w.out_w, w.out_b)
    result = _add(x, out if mask is None else (out * mask).contiguous())
    newest = x_in[:, max(0, x.shape[1] - window) :].float()
    after = torch.cat([before, newest], 1)[:, newest.shape[1] :].clone()  # the last K-1 inputs
    kept = (u, xz, x_conv, selected, delta, y, states) if keep else (x.new_empty(0) for _ in KEPT)
    return result, after, last, *kept


def _block_fake(x, before, h0, mask, dtype, eps, *rest):
    *weights, keep = rest
    w = Weights(*weights)
    new = lambda *shape: x.new_empty(shape)
    results = new(*x.shape), new(*before.shape), new(*h0.shape)
    if not keep:
        return *results, *(new(0) for _ in KEPT)
    *moving, states = _kept_shapes(x, w)
    return *results, *(x.new_empty(shape, dtype=dtype) for shape in moving), new(*states)


def _as_computed(w: Weights, dtype: torch.dtype) -> Weights:
    """The weights of the products in their dtype, the others in float32."""
    products = ("in_w", "in_b", "x_w", "dt_w", "out_w", "out_b")
    cast = {name: getattr(w, name) for name in products}
    cast = {name: None if t is None else t.to(dtype) for name, t in cast.items()}
    norm, conv_b, dt_b, D = map(scan_cpu.in_floats, (w.norm, w.conv_b, w.dt_b, w.D))
    return w._replace(norm=norm, conv_b=conv_b, dt_b=dt_b, D=D, **cast)


def _kept_shapes(x: Tensor, w: Weights) -> list[tuple[int, ...]]:
    """The shapes of `Kept`."""
    batch, length, width = x.shape
    d_inner, d_state = w.A_log.shape
    widths = width, 2 * d_inner, d_inner, len(w.x_w), d_inner, d_inner
    return [
        *((batch, length, width) for width in widths),
        scan_cpu.kept_shape(batch, length, d_inner, d_state),
    ]


def _block_backward_kernel(x, before, mask, dtype, eps, *rest):
    """The gradients of x, before, h0 and the weights.

    For a bias that is not there it is an empty tensor.
    """
    count = len(Weights._fields)
    w, kept = Weights(*rest[:count]), Kept(*rest[count:-3])
    dresult, dafter, dlast = rest[-3:]
    _check_block(x, before, mask, dtype, w)
    _check_block_backward(x, before, dtype, w, kept, dresult, dafter, dlast)
    u, xz, x_conv, selected, delta, y, states = kept
    d_inner, d_state = w.A_log.shape
    rank, window = w.dt_w.shape[1], w.conv_w.shape[2] - 1
    xz, x_conv, selected, delta = map(scan_cpu.in_rows, (xz, x_conv, selected, delta))
    x, before, states = map(scan_cpu.in_floats, (x, before, states))
    dresult, dafter, dlast = map(scan_cpu.in_floats, (dresult, dafter, dlast))
    A, taps = -torch.exp(scan_cpu.in_floats(w.A_log)), scan_cpu.in_floats(w.conv_w[:, 0].t())
    w = _as_computed(w, dtype)
    with torch.autocast("cpu", enabled=False):
        d_out = (dresult if mask is None else dresult * mask).to(dtype)
        dy = d_out @ w.out_w
        x_in, z = xz.split([d_inner, d_inner], -1)
        low, B, C = selected.split([rank, d_state, d_state], -1)
        dxz, dselected = torch.empty_like(xz), torch.empty_like(selected)
        dx_in, dz = dxz.split([d_inner, d_inner], -1)
        dlow, dB, dC = dselected.split([rank, d_state, d_state], -1)
        given = scan_cpu.Inputs(x_conv, delta, A, B, C, w.D, z, w.dt_b, True)
        scan = scan_cpu.backward_unchecked(given, states, dy, dlast, dB=dB, dC=dC, dz=dz)
        dlow.copy_(scan.delta @ w.dt_w)
        dx_conv = torch.addmm(_flat(scan.x), _flat(dselected), w.x_w).view_as(x_conv)
        dtaps, dconv_b, dbefore = _convolve_backward(x_in, taps, w.conv_b, before, dx_conv, dx_in)
        # the memory is made of inputs: what is asked of it goes back to them
        if dafter is not None:
            _add_to_inputs(dafter, dx_in, dbefore, window)
        dx, dnorm = _rms_norm_backward(x, w.norm, eps, dxz @ w.in_w, dresult)
        nothing = x.new_empty
        return (
            dx,
            dbefore,
            scan.h0,
            dnorm,
            _outer(dxz, u),
            nothing(0) if w.in_b is None else _sum(dxz),
            dtaps.t()[:, None].contiguous(),
            nothing(0) if w.conv_b is None else dconv_b,
            _outer(dselected, x_conv),
            _outer(scan.delta, low),
            scan.delta_bias,
            scan.A * A,
            scan.D,
            _outer(d_out, y),
            nothing(0) if w.out_b is None else _sum(d_out),
        )


def _block_backward_fake(x, before, mask, dtype, eps, *rest):
    w = Weights(*rest[: len(Weights._fields)])
    memory = x.new_empty(before.shape), x.new_empty(x.shape[0], *w.A_log.shape)
    return (x.new_empty(x.shape), *memory, *(x.new_empty(0 if t is None else t.shape) for t in w))


BLOCK = operator(
    "mamba_block_cpu",
    f"(Tensor x, Tensor before, Tensor h0, {READ}, bool keep) -> "
    f"(Tensor result, Tensor after, Tensor last, {', '.join(f'Tensor {name}' for name in KEPT)})",
    _block_kernel,
    _block_fake,
)
BLOCK_BACKWARD = operator(
    "mamba_block_cpu_backward",
    f"(Tensor x, Tensor before, {READ}, {', '.join(f'Tensor {name}' for name in KEPT)}, "
    f"Tensor dresult, Tensor? dafter, Tensor? dlast) -> ({', '.join(15 * ['Tensor'])})",
    _block_backward_kernel,
    _block_backward_fake,
)


def _keep_block(ctx, inputs, output):
    x, before, _, mask, dtype, eps, *weights, keep = inputs
    kept = output[3:]
    if keep:
        ctx.save_for_backward(x, before, mask, *weights, *kept)
    ctx.dtype, ctx.eps = dtype, eps
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)


def _block_gradients(ctx, dresult, dafter, dlast, *_):
    x, before, mask, *weights_and_kept = saved(ctx, "the block")
    dresult = torch.zeros_like(x) if dresult is None else dresult
    found = _block_backward(
        x, before, mask, ctx.dtype, ctx.eps, *weights_and_kept, dresult, dafter, dlast
    )
    dx, dbefore, dh0, *dweights = found
    dweights = (None if w is None else dw for w, dw in zip(weights_and_kept, dweights))
    return dx, dbefore, dh0, None, None, None, *dweights, None


_block, _block_backward = differentiable(
    BLOCK,
    BLOCK_BACKWARD,
    _keep_block,
    _block_gradients,
    "the fused block",
    "give it backend='loop'",
)


def _flat(t: Tensor) -> Tensor:
    return t.flatten(0, 1)


def _outer(dy: Tensor, x: Tensor) -> Tensor:
    """The gradient of W in y = x W^T, summed over all positions, in float32."""
    return (_flat(dy).t() @ _flat(x)).float()


def _sum(dy: Tensor) -> Tensor:
    return dy.sum((0, 1), dtype=torch.float32)


def _add_to_inputs(dafter: Tensor, dx_in: Tensor, dbefore: Tensor, window: int) -> None:
    new = min(window, dx_in.shape[1])  # how many of the memory's inputs are of this sequence
    if new:
        dx_in[:, dx_in.shape[1] - new :] += dafter[:, window - new :].to(dx_in.dtype)
    if new < window:
        dbefore[:, new:] += dafter[:, : window - new]


def weights_of(block: nn.Module) -> Weights:
    """A block's weights; None for a bias that it has not."""
    mixer = block.mixer
    return Weights(
        block.norm.weight,
        mixer.in_proj.weight,
        mixer.in_proj.bias,
        mixer.conv1d.weight,
        mixer.conv1d.bias,
        mixer.x_proj.weight,
        mixer.dt_proj.weight,
        mixer.dt_proj.bias,
        mixer.A_log,
        mixer.D,
        mixer.out_proj.weight,
        mixer.out_proj.bias,
    )


def precision(x: Tensor) -> torch.dtype | None:
    """What the fused block computes in here, or None where it cannot run.

    That is float32, or bfloat16 under autocast.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32 or not x.numel() or not available():
        return None
    if not torch.is_autocast_enabled("cpu"):
        return torch.float32
    return torch.bfloat16 if torch.get_autocast_dtype("cpu") == torch.bfloat16 else None


def as_made(module: nn.Module, kind: type) -> bool:
    """Whether a module is of this very kind and nobody listens at it: its weights say all it does.

    An adapter in the place of a projection, say, is of another kind.
    """
    listeners = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    patched = "forward" in vars(module)
    heard = any(listeners) or torch.nn.modules.module._has_any_global_hook()
    return type(module) is kind and not patched and not heard


def suits(block: nn.Module, x: Tensor) -> bool:
    """Whether a `MambaBlock` can run fused.

    Its weights have to be float32 beside x, and its inner modules as they were made.
    """
    if not block.inside_as_made() or not block.dropout.p < 1:
        return False
    plain = all(p.dtype == torch.float32 and p.device == x.device for p in block.parameters())
    few_taps = block.mixer.conv1d.weight.shape[-1] <= MOST_TAPS
    return plain and few_taps and precision(x) is not None and scan_cpu.available()


def block(
    module: nn.Module, x: Tensor, memory: tuple[Tensor, Tensor]
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """What `MambaBlock.forward` returns, fused; ask `suits` first.

    Raises `UserError` for what does not fit.
    """
    config = module.mixer.config
    if axes(x) != 3 or x.shape[2] != config.d_model or not suits(module, x):
        raise UserError(
            f"the fused block takes x of shape (B, L, {config.d_model}) and weights, "
            f"all in float32 on a CPU, and not such an x of {described(x)}: use the block itself"
        )
    before, h0 = memory
    check_memory(x, before, h0, config.d_conv - 1, config.d_inner, config.d_state)
    dtype = precision(x)
    rate = module.dropout.p if module.dropout.training else 0.0
    mask = torch.empty_like(x, dtype=dtype).bernoulli_(1 - rate).div_(1 - rate) if rate else None
    tensors = x, before.float(), h0.float()
    weights = weights_of(module)
    keep = wants_derivative(*tensors, *weights)
    x, before, h0, *_ = _block(*tensors, mask, dtype, module.norm.eps, *weights, keep)
    return x, (before, h0)


def check_memory(x, before, h0, window: int, d_inner: int, d_state: int) -> None:
    """Raise `UserError` where a layer's input or memory does not fit."""
    check_tensors(
        "this layer",
        x.device,
        {
            "x": (x, x.shape),
            "the inputs that it remembers": (before, (x.shape[0], window, d_inner)),
            "its state": (h0, (x.shape[0], d_inner, d_state)),
        },
    )


def check_weights(
    what: str,
    w: Weights,
    width: int,
    d_inner: int,
    d_state: int,
    window: int,
    rank: int,
    dtypes=FLOATS,
) -> None:
    """Raise `UserError` naming the first of a block's weights that does not fit."""
    shapes = Weights(
        norm=(width,),
        in_w=(2 * d_inner, width),
        in_b=(2 * d_inner,),
        conv_w=(d_inner, 1, window + 1),
        conv_b=(d_inner,),
        x_w=(rank + 2 * d_state, d_inner),
        dt_w=(d_inner, rank),
        dt_b=(d_inner,),
        A_log=(d_inner, d_state),
        D=(d_inner,),
        out_w=(width, d_inner),
        out_b=(width,),
    )
    wanted = dict(zip(Weights._fields, zip(w, shapes)))
    check_tensors(what, CPU, wanted, dtypes, optional=("in_b", "conv_b", "out_b"))


def _check_block(x, before, mask, dtype, w: Weights) -> None:
    """Raise `UserError` naming the first argument that does not fit.

    It looks at the arguments that both operators of the block have.
    """
    known_axes = [axes(t) for t in (x, w.A_log, w.dt_w, w.conv_w)] == [3, 2, 2, 3]
    if not known_axes or not 1 <= w.conv_w.shape[2] <= MOST_TAPS:
        raise UserError(
            "the block needs x of shape (B, L, M), A_log of shape (D, N), dt_w of shape (D, R) "
            "and conv_w of shape (D, 1, K), not "
            f"{', '.join(map(described, (x, w.A_log, w.dt_w, w.conv_w)))}"
        )
    _check_precision("the block", dtype)
    width = x.shape[2]
    d_inner, d_state = w.A_log.shape
    window = w.conv_w.shape[2] - 1
    check_tensors("the block", CPU, {"x": (x, x.shape)}, (torch.float32,))
    check_tensors("the block", CPU, {"before": (before, (len(x), window, d_inner))})
    check_tensors("the block", CPU, {"mask": (mask, x.shape)}, (dtype,), optional=("mask",))
    check_weights(
        "the block", w, width, d_inner, d_state, window, w.dt_w.shape[1], (torch.float32,)
    )


def _check_block_backward(x, before, dtype, w: Weights, kept: Kept, dresult, dafter, dlast) -> None:
    """Raise `UserError` naming the first thing kept, or gradient, that does not fit the rest."""
    *moving, states = zip(KEPT, zip(kept, _kept_shapes(x, w)))
    check_tensors("the block's gradient", CPU, dict(moving), (dtype,))
    check_tensors("the block's gradient", CPU, dict([states]), (torch.float32,))
    check_tensors(
        "the block's gradient",
        CPU,
        {
            "dresult": (dresult, x.shape),
            "dafter": (dafter, before.shape),
            "dlast": (dlast, (len(x), *w.A_log.shape)),
        },
        optional=("dafter", "dlast"),
    )


def _check_precision(what: str, dtype) -> None:
    if dtype not in PRECISIONS:
        raise UserError(
            f"{what} is computed in float32 or bfloat16, not in {str(dtype).removeprefix('torch.')}"
        )


# -- the loss --------------------------------------------------------------------------------------
def _entropies(u: Tensor, head: Tensor, targets: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
    """Nats a row (R,), and the logits, or over them with `gradient` the gradients of the nats."""
    logits = F.linear(u, head)
    nats = u.new_empty(len(u), dtype=torch.float32)
    KERNEL.library.cross_entropy(
        _half(u),
        c_long(len(u)),
        c_long(len(head)),
        _threads(logits),
        c_int(gradient),
        *map(address, (logits, targets, nats)),
    )
    return nats, logits


def _loss_kernel(x, norm, head, targets, eps, dtype, keep):
    """The sum of the nats, each of them, and with `keep` the sum's gradients.

    Those are the gradients of the normed x and of the head.
    """
    _check_loss(x, norm, head, targets, dtype)
    if targets.numel() and targets.max() >= len(head):
        raise UserError(
            f"a target is {targets.max().item()}, and the vocabulary has {len(head)} tokens"
        )
    x, norm, targets = scan_cpu.in_floats(x), scan_cpu.in_floats(norm), targets.contiguous()
    with torch.autocast("cpu", enabled=False):
        u, cast = _flat(_rms_norm(x, norm, eps, dtype)), head.to(dtype)
        nats, dlogits = _entropies(u, cast, targets.flatten(), keep)
        gradients = (dlogits @ cast, dlogits.t() @ u) if keep else (x.new_empty(0), x.new_empty(0))
    return nats.sum(), nats.view(targets.shape), *gradients


def _loss_fake(x, norm, head, targets, eps, dtype, keep):
    rows = x.shape[0] * x.shape[1]
    shapes = ((rows, x.shape[2]), head.shape) if keep else ((0,), (0,))
    gradients = (x.new_empty(shape, dtype=dtype if keep else x.dtype) for shape in shapes)
    return x.new_empty(()), x.new_empty(targets.shape), *gradients


def _loss_backward_kernel(x, norm, eps, du, dhead, dloss):
    _check_loss_backward(x, norm, du, dhead, dloss)
    du = du.resolve_neg().contiguous()
    dx, dnorm = _rms_norm_backward(*map(scan_cpu.in_floats, (x, norm)), eps, du, None)
    return dx.mul_(dloss), dnorm * dloss, dhead.float() * dloss


def _loss_backward_fake(x, norm, eps, du, dhead, dloss):
    return x.new_empty(x.shape), norm.new_empty(norm.shape), x.new_empty(dhead.shape)


LOSS = operator(
    "cross_entropy_cpu",
    "(Tensor x, Tensor norm, Tensor head, Tensor targets, float eps, "
    "ScalarType dtype, bool keep) -> (Tensor total, Tensor each, Tensor du, Tensor dhead)",
    _loss_kernel,
    _loss_fake,
)
LOSS_BACKWARD = operator(
    "cross_entropy_cpu_backward",
    "(Tensor x, Tensor norm, float eps, Tensor du, Tensor dhead, Tensor dloss) -> "
    "(Tensor, Tensor, Tensor)",
    _loss_backward_kernel,
    _loss_backward_fake,
)


def _keep_loss(ctx, inputs, output):
    x, norm, _, _, eps, _, keep = inputs
    _, *others = output
    if keep:
        ctx.save_for_backward(x, norm, *others[1:])
    ctx.eps = eps
    ctx.mark_non_differentiable(*others)


def _loss_gradients(ctx, dloss, *_):
    x, norm, du, dhead = saved(ctx, "the loss")
    return *_loss_backward(x, norm, ctx.eps, du, dhead, dloss), None, None, None, None


_loss, _loss_backward = differentiable(
    LOSS, LOSS_BACKWARD, _keep_loss, _loss_gradients, "the fused loss", "take torch's cross_entropy"
)


def cross_entropy(
    x: Tensor,
    norm: Tensor,
    head: Tensor,
    targets: Tensor,
    eps: float,
    dtype: torch.dtype,
    total: bool,
) -> Tensor:
    """Nats of targets (B, L) under softmax(rms_norm(x) head^T), x (B, L, M).

    With `total` it is their sum, which has gradients, else each of them. `dtype` is what the
    products are computed in, float32 or bfloat16. A target below 0 counts nothing; raises
    `UserError` for one beyond the vocabulary, or for what does not fit.
    """
    _check_loss(x, norm, head, targets, dtype)
    if total:
        return _loss(x, norm, head, targets, eps, dtype, wants_derivative(x, norm, head))[0]
    return _loss(x.detach(), norm.detach(), head.detach(), targets, eps, dtype, False)[1]


def _check_loss(x, norm, head, targets, dtype) -> None:
    """Raise `UserError` naming the first argument of `cross_entropy` that does not fit."""
    _check_loss_axes(x, head)
    _check_precision("the loss", dtype)
    width = x.shape[2]
    check_tensors(
        "the loss",
        CPU,
        {"x": (x, x.shape), "norm": (norm, (width,)), "head": (head, (len(head), width))},
        (torch.float32,),
    )
    if getattr(targets, "dtype", None) != torch.long or targets.shape != x.shape[:2]:
        raise UserError(
            f"the loss needs whole numbers of shape {tuple(x.shape[:2])} as targets, "
            f"not {described(targets)} of {getattr(targets, 'dtype', 'another kind')}"
        )
    check_tensors("the loss", CPU, {"targets": (targets, targets.shape)}, (torch.long,))


def _check_loss_backward(x, norm, du, dhead, dloss) -> None:
    """The same for the operator of its gradient."""
    _check_loss_axes(x, dhead)
    batch, length, width = x.shape
    check_tensors(
        "the loss's gradient", CPU, {"x": (x, x.shape), "norm": (norm, (width,))}, (torch.float32,)
    )
    check_tensors(
        "the loss's gradient",
        CPU,
        {"du": (du, (batch * length, width)), "dhead": (dhead, (len(dhead), width))},
        PRECISIONS,
    )
    check_tensors("the loss's gradient", CPU, {"dloss": (dloss, ())})


def _check_loss_axes(x, head) -> None:
    if axes(x) != 3 or axes(head) != 2 or not x.shape[2]:
        raise UserError(
            "the loss needs x of shape (B, L, M) and a head of shape (V, M), "
            f"not {described(x)} and {described(head)}"
        )


def _half(t: Tensor) -> c_int:
    return c_int(t.dtype == torch.bfloat16)


def _threads(t: Tensor) -> c_int:
    return c_int(torch.get_num_threads() if t.numel() > ONE_THREAD else 1)
