"""The block's causal convolution with its SiLU on a CPU, `conv_cpu.cpp`, with a gradient."""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from lib.scan.native import Kernel, address

ROWS = 64  # steps of a share of work, as in conv_cpu.cpp
ONE_THREAD = 32_768  # fewer numbers than this are done sooner than a second thread wakes up

SOURCE = Path(__file__).with_name("conv_cpu.cpp")
KERNEL = Kernel(SOURCE, "the causal convolution", "the convolution runs in plain PyTorch")
available = KERNEL.available


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, taps, bias, before):
        batch, length, channels = x.shape
        y = torch.empty_like(x)
        threads = torch.get_num_threads() if x.numel() > ONE_THREAD else 1
        ctx.fixed = (ctypes.c_int(threads),
                     *(ctypes.c_long(n) for n in (batch, length, channels, len(taps))))
        KERNEL.library.conv_forward(*map(address, (x, taps, bias, before)), *ctx.fixed, address(y))
        ctx.save_for_backward(x, taps, bias, before)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, taps, bias, before = ctx.saved_tensors
        batch, length, channels = x.shape
        dy, dx, dbefore = dy.contiguous(), torch.empty_like(x), torch.empty_like(before)
        sums = x.new_empty(batch * -(-length // ROWS), len(taps) + 1, channels)
        KERNEL.library.conv_backward(*map(address, (x, taps, bias, before)), *ctx.fixed,
                                     *map(address, (dy, dx, dbefore, sums)))
        *dtaps, dbias = sums.sum(0)
        return dx, torch.stack(dtaps), None if bias is None else dbias, dbefore


def convolve_silu(x: Tensor, taps: Tensor, bias: Tensor | None, before: Tensor) -> Tensor:
    """SiLU of the causal depthwise convolution of x (B, L, D), of which `before` (B, K-1, D) came earlier.

    taps (D, K), the last one for the present step; bias (D,). All float32 on a CPU; ask `available` first.
    """
    x, taps, before = x.contiguous(), taps.t().contiguous(), before.contiguous()
    return _Convolution.apply(x, taps, bias, before)
