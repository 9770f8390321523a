"""Who takes part in the scan's benchmark: our backends, other people's scans, a convolution and
attention.

Each is a `lib.lab.bench.timing.Contender`: what is called, and how its arguments lie in memory.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch.nn import functional as F

from lib.env.errors import UserError
from lib.lab.bench.timing import Contender, note
from lib.lab.peers import scans as peers
from lib.scan import cpu as scan_cpu
from lib.scan import selective as scan


def arguments(batch, length, d_inner, d_state, dtype=torch.float32, device="cpu", seed=0) -> dict:
    """A scan's arguments as a fresh Mamba has them: A = -1 … -N, steps from 0.001 to 0.1."""
    random = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=random)
    steps = torch.exp(torch.empty(d_inner).uniform_(np.log(1e-3), np.log(0.1), generator=random))
    found = {
        "x": draw(batch, length, d_inner),
        "delta": 0.1 * draw(batch, length, d_inner),
        "A": -torch.arange(1.0, d_state + 1).repeat(d_inner, 1),
        "B": draw(batch, length, d_state),
        "C": draw(batch, length, d_state),
        "D": torch.ones(d_inner),
        "z": draw(batch, length, d_inner),
        "delta_bias": steps + torch.log(-torch.expm1(-steps)),  # softplus of it is `steps`
    }
    # the parameters stay in float32, as in mixed precision
    return {
        name: t.to(device, torch.float32 if name in ("A", "D", "delta_bias") else dtype)
        for name, t in found.items()
    }


def lay_out(given: dict, channels_first: bool = False) -> dict:
    """Fresh leaves; `channels_first` keeps the shape (B, L, D) and puts (B, D, L) in memory."""

    def leaf(t):
        if channels_first and t.dim() == 3:
            return (
                t.transpose(1, 2)
                .clone(memory_format=torch.contiguous_format)
                .transpose(1, 2)
                .requires_grad_()
            )
        return t.clone().requires_grad_()

    return {name: leaf(t) for name, t in given.items()}


def _with(
    call: Callable, lay: Callable[[dict], dict] = lay_out
) -> Callable[[dict], tuple[Callable, dict]]:
    """What `Contender.prepare` asks for: the function, and its arguments laid out."""
    return lambda given: (call, lay(given))


def _ours(backend: str) -> Contender:
    if backend not in scan.BACKENDS:
        raise UserError(f"lib.scan has no backend {backend!r} here")
    if backend == "cpu" and not scan_cpu.build(say=note):
        raise UserError("backend 'cpu' needs a C++ compiler: install g++ or clang++")
    return Contender(
        backend,
        f"ours, {backend}",
        f"lib.scan.selective_scan(backend={backend!r})",
        _with(partial(scan.selective_scan, delta_softplus=True, backend=backend)),
    )


def _peer(name: str) -> Contender:
    peer, theirs = peers.PEERS[name], peers.load(name)
    return Contender(
        name,
        peer.label,
        peer.timed,
        _with(
            partial(theirs, delta_softplus=True),
            partial(lay_out, channels_first=peer.channels_first),
        ),
    )


def _convolution() -> Contender:
    """A fixed (S4-like) SSM as one long convolution, by FFT of twice the length (no wrapping)."""

    def call(x, kernel):  # (B, D, L), (D, L)
        length = x.shape[-1]
        product = torch.fft.rfft(x, 2 * length) * torch.fft.rfft(kernel, 2 * length)
        return torch.fft.irfft(product, 2 * length)[..., :length]

    def lay(given):
        x = given["x"].transpose(1, 2).float().contiguous()  # the FFT knows no bfloat16
        return {"x": x.requires_grad_(), "kernel": x[0].clone().detach().requires_grad_()}

    return Contender(
        "convolution",
        "FFT convolution",
        "transforms of x and of a kernel of length L, product, inverse transform, in float32",
        _with(call, lay),
    )


def _attention() -> Contender:
    def lay(given):
        def heads(t):  # (B, L, D) to (B, D/64, L, 64)
            return (
                t.unflatten(2, (max(1, t.shape[2] // 64), -1))
                .transpose(1, 2)
                .contiguous()
                .requires_grad_()
            )

        return {
            "query": heads(given["x"]),
            "key": heads(given["delta"]),
            "value": heads(given["z"]),
        }

    return Contender(
        "attention",
        "attention",
        "scaled_dot_product_attention, causal, heads of 64, no projections",
        _with(partial(F.scaled_dot_product_attention, is_causal=True), lay),
    )


def names(device: str) -> list[str]:
    """Every contender on this device, ours first; the first is the one that the ratios are of."""
    ours = ["cpu", "parallel", "loop"] if device == "cpu" else ["triton", "parallel", "loop"]
    return ours + [name for name, peer in peers.PEERS.items() if device in peer.devices]


def contender(name: str) -> Contender:
    """Bring a contender by its name, or raise `UserError` saying why it cannot be had."""
    if name in ("convolution", "attention"):
        return {"convolution": _convolution, "attention": _attention}[name]()
    return _peer(name) if name in peers.PEERS else _ours(name)
