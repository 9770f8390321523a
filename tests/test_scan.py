"""Claims about lib.scan: every backend is the loop, outputs and every gradient."""

import subprocess
import sys

import pytest
import torch

from lib import scan_cpu
from lib.errors import UserError
from lib.scan import selective_scan, selective_step

LENGTHS = (1, 2, 63, 64, 65, 257)
HAVE_COMPILER = scan_cpu._compiler() is not None


def problem(length, d_inner=5, d_state=3, batch=2, dtype=torch.float64, seed=0):
    """Random arguments of the scan, all of them asking for a gradient."""
    random = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=random, dtype=torch.float64)  # noqa: E731
    arguments = {
        "x": draw(batch, length, d_inner), "delta": draw(batch, length, d_inner),
        "A": -torch.exp(draw(d_inner, d_state)), "B": draw(batch, length, d_state),
        "C": draw(batch, length, d_state), "D": draw(d_inner), "z": draw(batch, length, d_inner),
        "delta_bias": draw(d_inner), "h0": draw(batch, d_inner, d_state)}
    return {k: v.to(dtype).detach().requires_grad_() for k, v in arguments.items()}


def run(arguments, backend):
    """Outputs and all gradients of a random loss, by name, in float64."""
    y, h = selective_scan(**arguments, delta_softplus=True, return_last_state=True, backend=backend)
    random = torch.Generator().manual_seed(1)
    weigh = lambda t: (t.double() * torch.randn(t.shape, generator=random, dtype=torch.float64)).sum()  # noqa: E731
    (weigh(y) + weigh(h)).backward()
    results = {"y": y, "h": h} | {f"d{k}": v.grad for k, v in arguments.items()}
    return {k: v.detach().double() for k, v in results.items()}


def test_loop_is_the_equations():
    """The recurrence written out for one channel and one state, by hand."""
    a = {k: v.detach() for k, v in problem(4, 1, 1, 1).items()}
    h, expected = a["h0"][0, 0, 0], []
    for t in range(4):
        delta = torch.log1p(torch.exp(a["delta"][0, t, 0] + a["delta_bias"][0]))
        h = torch.exp(delta * a["A"][0, 0]) * h + delta * a["B"][0, t, 0] * a["x"][0, t, 0]
        y = a["C"][0, t, 0] * h + a["D"][0] * a["x"][0, t, 0]
        expected.append(y * a["z"][0, t, 0] * torch.sigmoid(a["z"][0, t, 0]))
    y = selective_scan(**a, delta_softplus=True, backend="loop")
    torch.testing.assert_close(y[0, :, 0], torch.stack(expected), rtol=1e-12, atol=1e-12)


def test_loop_gradients_are_numerical_gradients():
    names = list(problem(3))
    function = lambda *a: selective_scan(**dict(zip(names, a)), delta_softplus=True,  # noqa: E731
                                         return_last_state=True, backend="loop")
    assert torch.autograd.gradcheck(function, tuple(problem(3).values()))


@pytest.mark.skipif(not HAVE_COMPILER, reason="no C++ compiler here: the cpu backend cannot be built")
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("d_inner, d_state", [(1, 1), (7, 3), (16, 16), (33, 4)])
def test_cpu_scan_matches_loop(length, d_inner, d_state):
    assert scan_cpu.build(say=lambda text: None)
    exact = run(problem(length, d_inner, d_state), "loop")
    ours = run(problem(length, d_inner, d_state, dtype=torch.float32), "cpu")
    for name, value in exact.items():
        # float32 has 6e-8 a rounding; sums over 257 steps and 33 channels collect some dozens of them
        error = (ours[name] - value).abs().max() / value.abs().max()
        assert error < 5e-6, f"{name}: {error:.1e}"


@pytest.mark.skipif(not HAVE_COMPILER, reason="no C++ compiler here: the cpu backend cannot be built")
def test_cpu_scan_is_reproducible_to_the_last_bit():
    scan_cpu.build(say=lambda text: None)
    one, two = (run(problem(130, 20, 5, dtype=torch.float32), "cpu") for _ in range(2))
    assert all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.skipif(not HAVE_COMPILER, reason="no C++ compiler here: the cpu backend cannot be built")
def test_cpu_scan_takes_strided_inputs_and_survives_extreme_steps():
    scan_cpu.build(say=lambda text: None)
    a = {k: v.detach() for k, v in problem(40, dtype=torch.float32).items()}
    strided = a | {"x": a["x"].repeat(1, 1, 2)[..., ::2], "B": a["B"].transpose(1, 2).contiguous().transpose(1, 2)}
    strided["x"].copy_(a["x"])
    assert not strided["x"].is_contiguous() and not strided["B"].is_contiguous()
    assert torch.equal(selective_scan(**strided, backend="cpu"), selective_scan(**a, backend="cpu"))
    for extreme in (-1e4, -50.0, 50.0, 1e4):
        b = a | {"delta": torch.full_like(a["delta"], extreme)}
        ours, exact = (selective_scan(**b, delta_softplus=True, backend=name) for name in ("cpu", "loop"))
        assert torch.isfinite(ours).all()
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-5)


def test_optional_arguments_may_be_left_out():
    a = problem(9)
    small = {k: a[k].detach() for k in ("x", "delta", "A", "B", "C")}
    y = selective_scan(**small, backend="loop")
    with_zeros = selective_scan(**small, D=torch.zeros_like(a["D"]), h0=torch.zeros_like(a["h0"]), backend="loop")
    torch.testing.assert_close(y, with_zeros)
    if HAVE_COMPILER:
        scan_cpu.build(say=lambda text: None)
        single = {k: v.float() for k, v in small.items()}
        torch.testing.assert_close(selective_scan(**single, backend="cpu").double(), y, rtol=1e-5, atol=1e-5)


def test_segments_with_carried_state_are_the_whole():
    a = {k: v.detach() for k, v in problem(65).items()}
    whole, last = selective_scan(**a, return_last_state=True, backend="loop")
    h, parts = a["h0"], []
    for begin, end in ((0, 1), (1, 40), (40, 65)):
        cut = {k: v[:, begin:end] if k in ("x", "delta", "B", "C", "z") else v for k, v in a.items()}
        y, h = selective_scan(**(cut | {"h0": h}), return_last_state=True, backend="loop")
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    torch.testing.assert_close(h, last)


def test_step_is_one_step_of_the_scan():
    a = {k: v.detach() for k, v in problem(1).items()}
    y, h = selective_scan(a["x"], a["delta"].abs(), a["A"], a["B"], a["C"], a["D"], h0=a["h0"],
                          return_last_state=True, backend="loop")
    y_step, h_step = selective_step(a["h0"], a["x"][:, 0], a["delta"].abs()[:, 0], a["A"], a["B"][:, 0],
                                    a["C"][:, 0], a["D"])
    torch.testing.assert_close(y[:, 0], y_step)
    torch.testing.assert_close(h, h_step)


def test_empty_sequence_keeps_the_state():
    a = {k: v.detach() for k, v in problem(0).items()}
    y, h = selective_scan(**a, return_last_state=True)
    assert y.shape == (2, 0, 5) and torch.equal(h, a["h0"])


@pytest.mark.parametrize("name, shape", [("delta", (2, 4, 6)), ("B", (2, 4, 9)), ("C", (1, 4, 3)), ("D", (4,)),
                                         ("z", (2, 3, 5)), ("delta_bias", (1,)), ("h0", (2, 3, 5)), ("A", (4, 3))])
def test_a_wrong_shape_is_one_sentence_that_names_it(name, shape):
    arguments = {k: v.detach() for k, v in problem(4).items()} | {name: torch.zeros(shape)}
    with pytest.raises(UserError, match=rf"\b{name}\b.*shape"):
        selective_scan(**arguments)


def test_unknown_backend_is_one_sentence():
    with pytest.raises(UserError, match="backend 'gpu' is unknown"):
        selective_scan(**problem(2), backend="gpu")


def test_without_a_compiler_one_sentence_and_the_loop(tmp_path):
    """In a fresh process with no compiler and no cache: `auto` works, `cpu` says what to do."""
    code = f"""
import pathlib, torch
from lib import scan, scan_cpu
from lib.errors import UserError
scan_cpu.CACHE = pathlib.Path({str(tmp_path)!r}); scan_cpu._compiler = lambda: None
said = []
assert not scan_cpu.build(said.append) and len(said) == 1 and "compiler" in said[0]
one = torch.ones(1, 3, 2); A = -torch.ones(2, 2); B = torch.ones(1, 3, 2)
assert scan.selective_scan(one, one, A, B, B).shape == (1, 3, 2)
try: scan.selective_scan(one, one, A, B, B, backend="cpu")
except UserError as e: assert "compiler" in str(e)
else: raise SystemExit("no error")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(not HAVE_COMPILER, reason="no C++ compiler here: the cpu backend cannot be built")
def test_a_damaged_library_is_built_again(tmp_path):
    """A cached library that does not load must not stop anybody."""
    code = f"""
import pathlib
from lib import scan_cpu
scan_cpu.CACHE = pathlib.Path({str(tmp_path)!r})
scan_cpu._target().write_bytes(b"half a library")
assert scan_cpu.build(lambda text: None) and scan_cpu.ready()
assert [p.name for p in scan_cpu.CACHE.iterdir()] == [scan_cpu._target().name]
"""
    subprocess.run([sys.executable, "-c", code], check=True)
