"""Claims about lib.mamba.block_cpu: it is torch's convolution and SiLU, gradients included, with what came before."""

import pytest
import torch
from torch.nn import functional as F

from lib.mamba import block_cpu
from lib.mamba import model as mamba
from lib.mamba.model import MambaConfig, MambaMixer

pytestmark = [pytest.mark.skipif(not block_cpu.available(), reason="no C++ compiler here"),
              pytest.mark.usefixtures("one_thread")]

LENGTHS = [1, 2, 3, 63, 64, 65, 67, 129, 257]  # around its shares of 64 steps


def problem(length, channels, K, bias=True, batch=2):
    random = torch.Generator().manual_seed(length + channels + K)
    draw = lambda *shape: torch.randn(shape, generator=random).requires_grad_()
    return {"x": draw(batch, length, channels), "taps": draw(channels, K), "bias": draw(channels) if bias else None,
            "before": draw(batch, K - 1, channels)}


def by_torch(x, taps, bias, before):
    """The same by torch's conv1d, in float64."""
    both = torch.cat([before, x], 1).transpose(1, 2)
    return F.silu(F.conv1d(both, taps[:, None], bias, groups=len(taps))).transpose(1, 2)


def result_and_gradients(call, given, weight):
    leaves = [t for t in given.values() if t is not None]
    y = call(**given)
    return y.detach(), *torch.autograd.grad((y * weight.to(y.dtype)).sum(), leaves)


def assert_close(given, weight):
    exact = result_and_gradients(by_torch, {k: t if t is None else t.detach().double().requires_grad_()
                                            for k, t in given.items()}, weight)
    for ours, theirs in zip(result_and_gradients(block_cpu.convolve_silu, given, weight), exact, strict=True):
        # float32: some ten roundings of the largest; a tap's gradient sums over all steps
        assert ours.shape == theirs.shape
        assert ours.numel() == 0 or (ours - theirs).abs().max() <= 3e-6 * theirs.abs().max()


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("channels, K", [(1, 4), (7, 1), (16, 2), (33, 3), (50, 5)])
def test_convolution_is_torch_s_with_every_gradient(length, channels, K):
    given = problem(length, channels, K, bias=channels != 33)
    assert_close(given, torch.randn(given["x"].shape))


def test_input_may_be_a_view():
    """Half of in_proj's output, and a gradient that is not laid out as the output is."""
    given = problem(65, 12, 4)
    given["x"] = torch.randn(2, 65, 24).chunk(2, -1)[0].detach().requires_grad_()
    given["x"].data = torch.randn(2, 65, 24).chunk(2, -1)[0]
    assert not given["x"].is_contiguous()
    assert_close(given, torch.randn(2, 12, 65).transpose(1, 2))


def test_digits_do_not_depend_on_the_number_of_threads(monkeypatch):
    monkeypatch.setattr(block_cpu, "ONE_THREAD", 0)
    given, found, threads = problem(257, 40, 4), [], torch.get_num_threads()
    weight = torch.randn(2, 257, 40)
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(result_and_gradients(block_cpu.convolve_silu, given, weight))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_nothing_is_left_unwritten(monkeypatch):
    """Where memory comes filled with NaN, none of it is in the results."""
    empty = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda t, **how: empty(t, **how).fill_(torch.nan))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda t, *shape: torch.full(shape, torch.nan))
    given = problem(65, 17, 4)
    assert all(t.isfinite().all() for t in result_and_gradients(block_cpu.convolve_silu, given, torch.ones(2, 65, 17)))


@pytest.mark.parametrize("config", [MambaConfig(9, 12, 1, 4), MambaConfig(9, 7, 1, 3, d_conv=2, conv_bias=False),
                                    MambaConfig(9, 5, 1, 2, d_conv=1), MambaConfig(9, 5, 1, 2, d_conv=6)])
@pytest.mark.parametrize("length", [1, 2, 3, 40])
def test_mixer_convolves_alike_with_and_without_the_kernel(config, length, monkeypatch):
    """Outputs, what is remembered, and the gradients of both; the last by what reaches the first input."""
    torch.manual_seed(0)
    mixer = MambaMixer(config)
    x, before = torch.randn(2, length, config.d_inner), torch.randn(2, config.d_conv - 1, config.d_inner)
    found = []
    for ready in (True, False):
        monkeypatch.setattr(mamba.block_cpu, "available", lambda ready=ready: ready)
        here, earlier = x.clone().requires_grad_(), before.clone().requires_grad_()
        y, after = mixer.convolve(here, earlier)
        assert after.shape == before.shape
        found.append((y, after, *torch.autograd.grad(y.square().sum() + after.sin().sum(),
                                                     [here, earlier, mixer.conv1d.weight])))
    for with_it, without in zip(*found, strict=True):
        torch.testing.assert_close(with_it, without, rtol=1e-5, atol=1e-5)


def test_float64_goes_through_plain_pytorch():
    mixer = MambaMixer(MambaConfig(9, 12, 1, 4))
    y, after = mixer.convolve(torch.randn(2, 9, 24, dtype=torch.float64), torch.zeros(2, 3, 24))
    assert y.dtype == after.dtype == torch.float64


def test_bfloat16_is_rounded_once():
    """Computed in float32: as exact as the eight bits of the answer, its gradient too."""
    mixer = MambaMixer(MambaConfig(9, 12, 1, 4))
    x, before = torch.randn(2, 67, 24).bfloat16().requires_grad_(), torch.randn(2, 3, 24).bfloat16()
    weight = torch.randn(2, 67, 24).bfloat16()
    y, after = mixer.convolve(x, before)
    (dx,) = torch.autograd.grad((y * weight).sum(), x)
    assert y.dtype == after.dtype == dx.dtype == torch.bfloat16
    wide = x.detach().double().requires_grad_()
    exact = by_torch(wide, *(t.detach().bfloat16().double() for t in (mixer.conv1d.weight[:, 0], mixer.conv1d.bias)),
                     before.double())
    (exact_dx,) = torch.autograd.grad((exact * weight.double()).sum(), wide)
    torch.testing.assert_close(y.double(), exact.detach(), rtol=2**-8, atol=1e-5)
    torch.testing.assert_close(dx.double(), exact_dx, rtol=2**-8, atol=1e-5)
