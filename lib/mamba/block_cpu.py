"""A Mamba block and the loss on a CPU, fused: torch's matrix products, and one pass of ours between two of them.

What a plain block writes to memory and reads again operation by operation (casts, norm, convolution,
SiLU, gates, residual), `block_cpu.cpp` and `lib.scan.cpu` do in one pass each; activations travel in
bfloat16 where that is asked for, and one function a block keeps what its backward pass needs, nothing
twice. The numbers are those of `MambaBlock` in plain PyTorch, up to rounding.
"""

import ctypes
from ctypes import c_float, c_int, c_long, c_void_p
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib.env.errors import UserError
from lib.scan import cpu as scan_cpu
from lib.scan.arguments import axes, check_tensors, described
from lib.scan.native import Kernel, address

SHARE = 64  # rows in a share of work, as in block_cpu.cpp
MOST_TAPS = 8  # of the convolution; with more, plain PyTorch computes it
ONE_THREAD = 32_768  # fewer numbers than this are done sooner than a second thread wakes up

SOURCE = Path(__file__).with_name("block_cpu.cpp")
KERNEL = Kernel(SOURCE, "the fused block", "the block runs in plain PyTorch, several times slower")
available = KERNEL.available


# -- the passes between the products ---------------------------------------------------------------
def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """x / rms(x) * weight over the last axis, from float32 to `dtype`."""
    u = torch.empty_like(x, dtype=dtype)
    KERNEL.library.norm(_half(u), c_long(x[..., 0].numel()), c_long(x.shape[-1]), c_float(eps), _threads(x),
                        *map(address, (x, weight, u)))
    return u


def rms_norm_backward(x: Tensor, weight: Tensor, eps: float, du: Tensor, dy: Tensor | None) -> tuple[Tensor, Tensor]:
    """From du, the gradient of the norm, and dy, that of the residual beside it: those of x and weight."""
    rows, width = x[..., 0].numel(), x.shape[-1]
    dx, parts = torch.empty_like(x), x.new_empty(-(-rows // SHARE), width)
    KERNEL.library.norm_backward(_half(du), c_long(rows), c_long(width), c_float(eps), _threads(x),
                                 *map(address, (x, weight, du, dy, dx, parts)))
    return dx, parts.sum(0)


def add(x: Tensor, out: Tensor) -> Tensor:
    """x + out in float32."""
    y = torch.empty_like(x)
    KERNEL.library.add(_half(out), c_long(x.numel()), _threads(x), *map(address, (x, out, y)))
    return y


class _Call(ctypes.Structure):
    """`Convolution` in block_cpu.cpp."""

    _fields_ = [*((name, c_long) for name in ("batch", "length", "channels", "taps")),
                ("threads", c_int), *((name, c_long) for name in ("x_row", "dx_row")),
                *((name, c_void_p) for name in ("x", "weight", "bias", "before", "y", "dy", "dx", "dbefore", "parts"))]


def convolve(x: Tensor, taps: Tensor, bias: Tensor | None, before: Tensor) -> Tensor:
    """SiLU of the causal depthwise convolution: x (B, L, D) in regular rows, taps (K, D), before (B, K-1, D)."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    call = _Call(*x.shape, len(taps), _threads(x), x.stride(1), 0,
                 *map(address, (x, taps, bias, before, y)))
    KERNEL.library.conv_forward(_half(x), ctypes.byref(call))
    return y


def convolve_backward(x: Tensor, taps: Tensor, bias: Tensor | None, before: Tensor, dy: Tensor,
                      dx: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Writes dx, in regular rows; returns the gradients of taps, bias and before."""
    batch, length, channels = x.shape
    dbefore = torch.zeros_like(before)  # at length 0 the kernel writes nothing
    parts = before.new_empty(batch * -(-length // SHARE), len(taps) + 1, channels)
    call = _Call(batch, length, channels, len(taps), _threads(x), x.stride(1), dx.stride(1),
                 *map(address, (x, taps, bias, before, None, dy, dx, dbefore, parts)))
    KERNEL.library.conv_backward(_half(x), ctypes.byref(call))
    sums = parts.sum(0)
    return sums[:-1], sums[-1], dbefore


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, taps, bias, before):
        ctx.save_for_backward(x, taps, bias, before)
        return convolve(x, taps, bias, before)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, taps, bias, before = ctx.saved_tensors
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        dtaps, dbias, dbefore = convolve_backward(x, taps, bias, before, dy.contiguous(), dx)
        return dx, dtaps, None if bias is None else dbias, dbefore


def convolve_silu(x: Tensor, taps: Tensor, bias: Tensor | None, before: Tensor) -> Tensor:
    """SiLU of the causal depthwise convolution of x (B, L, D), of which `before` (B, K-1, D) came earlier.

    taps (D, K), the last one for the present step; bias (D,). x is float32 or bfloat16 on a CPU, and so is the
    result; the rest is used in float32. Ask `available` first. Raises `UserError` for what does not fit.
    """
    if axes(x) != 3 or axes(taps) != 2 or not 1 <= taps.shape[1] <= MOST_TAPS:
        raise UserError("the convolution needs x of shape (B, L, D) and taps of shape (D, K), "
                        f"K from 1 to {MOST_TAPS}, not {described(x)} and {described(taps)}")
    cpu = torch.device("cpu")
    batch, _, channels = x.shape
    window = taps.shape[1] - 1
    check_tensors("the convolution", cpu, {"x": (x, x.shape)}, (torch.float32, torch.bfloat16))
    check_tensors("the convolution", cpu, {
        "taps": (taps, (channels, window + 1)), "bias": (bias, (channels,)),
        "before": (before, (batch, window, channels))}, optional=("bias",))
    taps, bias, before = map(scan_cpu.in_floats, (taps.t(), bias, before))
    return _Convolution.apply(scan_cpu.in_rows(x), taps, bias, before)


# -- the block -------------------------------------------------------------------------------------
class _Block(torch.autograd.Function):
    """x + mixer(norm(x)) and the memory after it; weights in the order of `_weights`."""

    @staticmethod
    def forward(ctx, x, before, h0, mask, dtype, eps, norm, in_w, in_b, conv_w, conv_b, x_w, dt_w, dt_b, A_log, D,
                out_w, out_b):
        d_inner, d_state = A_log.shape
        rank, window = dt_w.shape[1], conv_w.shape[-1] - 1
        cast = [w if w is None else w.to(dtype) for w in (in_w, in_b, x_w, dt_w, out_w, out_b)]
        in_w, in_b, x_w, dt_w, out_w, out_b = cast
        A, taps = -torch.exp(A_log), conv_w[:, 0].t().contiguous()
        u = rms_norm(x, norm, eps, dtype)
        xz = F.linear(u, in_w, in_b)
        x_in, z = xz.split(d_inner, -1)
        x_conv = convolve(x_in, taps, conv_b, before)
        selected = F.linear(x_conv, x_w)
        low, B, C = selected.split([rank, d_state, d_state], -1)
        given = scan_cpu.Inputs(x_conv, F.linear(low, dt_w), A, B, C, D, z, dt_b, True)
        y, last, kept = scan_cpu.forward(given, h0, keep=any(ctx.needs_input_grad))
        out = F.linear(y, out_w, out_b)
        result = add(x, out if mask is None else out * mask)
        newest = x_in[:, max(0, x.shape[1] - window):].float()
        after = torch.cat([before, newest], 1)[:, newest.shape[1]:]  # the last K-1 inputs
        ctx.save_for_backward(x, before, mask, norm, in_w, taps, conv_b, x_w, dt_w, dt_b, A, D, out_w, u, xz, x_conv,
                              selected, given.delta, y, kept)
        ctx.eps, ctx.biased = eps, (in_b is not None, out_b is not None)
        return result, after, last

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dresult, dafter, dlast):
        (x, before, mask, norm, in_w, taps, conv_b, x_w, dt_w, dt_b, A, D, out_w, u, xz, x_conv, selected, delta, y,
         kept) = ctx.saved_tensors
        d_inner, d_state = A.shape
        rank, window = dt_w.shape[1], len(taps) - 1
        dresult = dresult.contiguous()
        d_out = (dresult if mask is None else dresult * mask).to(u.dtype)
        dy = d_out @ out_w
        x_in, z = xz.split(d_inner, -1)
        low, B, C = selected.split([rank, d_state, d_state], -1)
        dxz, dselected = torch.empty_like(xz), torch.empty_like(selected)
        dx_in, dz = dxz.split(d_inner, -1)
        dlow, dB, dC = dselected.split([rank, d_state, d_state], -1)
        given = scan_cpu.Inputs(x_conv, delta, A, B, C, D, z, dt_b, True)
        scan = scan_cpu.backward(given, kept, dy, dlast if dlast is None else dlast.contiguous(), dB=dB, dC=dC, dz=dz)
        dlow.copy_(scan.delta @ dt_w)
        dx_conv = torch.addmm(_flat(scan.x), _flat(dselected), x_w).view_as(x_conv)
        dtaps, dconv_b, dbefore = convolve_backward(x_in, taps, conv_b, before, dx_conv, dx_in)
        if dafter is not None:  # the memory is made of inputs: what is asked of it goes back to them
            _add_to_inputs(dafter, dx_in, dbefore, window)
        dx, dnorm = rms_norm_backward(x, norm, ctx.eps, dxz @ in_w, dresult)
        return (dx, dbefore, scan.h0, None, None, None, dnorm, _outer(dxz, u), _sum(dxz) if ctx.biased[0] else None,
                dtaps.t()[:, None], None if conv_b is None else dconv_b, _outer(dselected, x_conv),
                _outer(scan.delta, low), scan.delta_bias, scan.A * A, scan.D, _outer(d_out, y),
                _sum(d_out) if ctx.biased[1] else None)


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
        dx_in[:, dx_in.shape[1] - new:] += dafter[:, window - new:].to(dx_in.dtype)
    if new < window:
        dbefore[:, new:] += dafter[:, : window - new]


def _weights(block: nn.Module) -> tuple[Tensor | None, ...]:
    mixer = block.mixer
    found = (block.norm.weight, mixer.in_proj.weight, mixer.in_proj.bias, mixer.conv1d.weight, mixer.conv1d.bias,
            mixer.x_proj.weight, mixer.dt_proj.weight, mixer.dt_proj.bias, mixer.A_log, mixer.D,
            mixer.out_proj.weight, mixer.out_proj.bias)
    return tuple(w if w is None else w.contiguous() for w in found)


def precision(x: Tensor) -> torch.dtype | None:
    """What the fused block computes in here: float32, bfloat16 under autocast; None where it cannot run."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or not x.numel() or not available():
        return None
    if not torch.is_autocast_enabled("cpu"):
        return torch.float32
    return torch.bfloat16 if torch.get_autocast_dtype("cpu") == torch.bfloat16 else None


def suits(block: nn.Module, x: Tensor) -> bool:
    """Whether `block` can run fused: its weights are float32 beside x, and nobody listens at its inner modules."""
    plain = all(p.dtype == torch.float32 and p.device == x.device for p in block.parameters())
    watched = any(m._forward_hooks or m._forward_pre_hooks for m in block.modules() if m is not block)
    few_taps = block.mixer.conv1d.weight.shape[-1] <= MOST_TAPS
    return plain and few_taps and not watched and precision(x) is not None and scan_cpu.available()


def block(module: nn.Module, x: Tensor, memory: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """What `MambaBlock.forward` returns, fused; ask `suits` first. Raises `UserError` for what does not fit."""
    config = module.mixer.config
    if axes(x) != 3 or x.shape[2] != config.d_model or not suits(module, x):
        raise UserError(f"the fused block takes x of shape (B, L, {config.d_model}) and weights, all in "
                        f"float32 on a CPU, and not such an x of {described(x)}: use the block itself")
    before, h0 = memory
    check_tensors("this layer", x.device, {
        "x": (x, x.shape),
        "the inputs that it remembers": (before, (len(x), config.d_conv - 1, config.d_inner)),
        "its state": (h0, (len(x), config.d_inner, config.d_state))})
    dtype = precision(x)
    rate = module.dropout.p if module.training else 0.0
    mask = torch.empty_like(x, dtype=dtype).bernoulli_(1 - rate).div_(1 - rate) if rate else None
    before, h0 = map(scan_cpu.in_floats, memory)
    with torch.autocast("cpu", enabled=False):
        x, *after = _Block.apply(x.contiguous(), before, h0, mask, dtype, module.norm.eps, *_weights(module))
    return x, tuple(after)


# -- the loss --------------------------------------------------------------------------------------
def _entropies(u: Tensor, head: Tensor, targets: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
    """Nats a row (R,), and the logits, or over them with `gradient` the gradients of the nats."""
    logits = F.linear(u, head)
    nats = u.new_empty(len(u), dtype=torch.float32)
    KERNEL.library.cross_entropy(_half(u), c_long(len(u)), c_long(len(head)), _threads(logits), c_int(gradient),
                                 *map(address, (logits, targets, nats)))
    return nats, logits


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, norm, head, targets, eps, dtype):
        u, cast = _flat(rms_norm(x, norm, eps, dtype)), head.to(dtype)
        nats, dlogits = _entropies(u, cast, targets, gradient=True)
        ctx.save_for_backward(x, norm, dlogits @ cast, dlogits.t() @ u)
        ctx.eps = eps
        return nats.sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dloss):
        x, norm, du, dhead = ctx.saved_tensors
        dx, dnorm = rms_norm_backward(x, norm, ctx.eps, du, None)
        return dx.mul_(dloss), dnorm * dloss, dhead.float() * dloss, None, None, None


def cross_entropy(x: Tensor, norm: Tensor, head: Tensor, targets: Tensor, eps: float, dtype: torch.dtype,
                  reduce: bool) -> Tensor:
    """Nats of targets (B, L) under softmax(rms_norm(x) head^T), x (B, L, M): their sum, with gradients, or each.

    A target below 0 counts nothing; raises `UserError` for one beyond the vocabulary, or for what does not fit.
    """
    if axes(x) != 3 or axes(head) != 2 or not x.shape[2]:
        raise UserError("the loss needs x of shape (B, L, M) and a head of shape (V, M), "
                        f"not {described(x)} and {described(head)}")
    width = x.shape[2]
    check_tensors("the loss", torch.device("cpu"), {
        "x": (x, x.shape), "norm": (norm, (width,)), "head": (head, (len(head), width))}, (torch.float32,))
    if getattr(targets, "dtype", None) != torch.long or targets.shape != x.shape[:2]:
        raise UserError(f"the loss needs whole numbers of shape {tuple(x.shape[:2])} as targets, "
                        f"not {described(targets)} of {getattr(targets, 'dtype', 'another kind')}")
    check_tensors("the loss", x.device, {"targets": (targets, targets.shape)}, (torch.long,))
    if targets.numel() and targets.max() >= len(head):
        raise UserError(f"a target is {targets.max().item()}, and the vocabulary has {len(head)} tokens")
    x, norm, targets = (t.contiguous() for t in (x, norm, targets))
    with torch.autocast("cpu", enabled=False):
        if reduce and torch.is_grad_enabled():
            return _Loss.apply(x, norm, head, targets.flatten(), eps, dtype)
        u = _flat(rms_norm(x.detach(), norm.detach(), eps, dtype))
        nats, _ = _entropies(u, head.detach().to(dtype), targets.flatten(), gradient=False)
        return nats.sum() if reduce else nats.view(targets.shape)


def _half(t: Tensor) -> c_int:
    return c_int(t.dtype == torch.bfloat16)


def _threads(t: Tensor) -> c_int:
    return c_int(torch.get_num_threads() if t.numel() > ONE_THREAD else 1)
