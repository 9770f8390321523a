"""Claims about lib.scan: every backend is the loop, outputs and every gradient."""

import os
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch

from lib.env.errors import UserError
from lib.scan import native, operators
from lib.scan.selective import BACKENDS, fastest_backend, selective_scan, selective_step

LENGTHS = (1, 2, 63, 64, 65, 257)
HAVE_COMPILER = native.compiler() is not None
needs_compiler = pytest.mark.skipif(
    not HAVE_COMPILER, reason="no C++ compiler here: the cpu backend cannot be built"
)
on_the_cpu = pytest.mark.parametrize(
    "backend", ["parallel", pytest.param("cpu", marks=needs_compiler)]
)
ORDER = ("x", "delta", "A", "B", "C", "D", "z", "delta_bias", "h0")


def problem(length, d_inner=5, d_state=3, batch=2, dtype=torch.float64, seed=0):
    """Random arguments of the scan, all of them asking for a gradient."""
    random = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=random, dtype=torch.float64)
    arguments = {
        "x": draw(batch, length, d_inner),
        "delta": draw(batch, length, d_inner),
        "A": -torch.exp(draw(d_inner, d_state)),
        "B": draw(batch, length, d_state),
        "C": draw(batch, length, d_state),
        "D": draw(d_inner),
        "z": draw(batch, length, d_inner),
        "delta_bias": draw(d_inner),
        "h0": draw(batch, d_inner, d_state),
    }
    return {k: v.to(dtype).detach().requires_grad_() for k, v in arguments.items()}


def run(arguments, backend, autocast=False):
    """Outputs and all gradients of a random loss, by name, in float64. The weights of the loss are
    numbers that every dtype holds, so that the gradient of y is the same for all."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y, h = selective_scan(
            **arguments, delta_softplus=True, return_last_state=True, backend=backend
        )
    random = torch.Generator().manual_seed(1)
    weigh = lambda t: (
        t.double() * torch.randn(t.shape, generator=random).bfloat16().double()
    ).sum()
    (weigh(y) + weigh(h)).backward()
    results = {"y": y, "h": h} | {f"d{k}": v.grad for k, v in arguments.items()}
    return {k: v.detach().double() for k, v in results.items()}


@pytest.mark.parametrize("backend", ["loop", "parallel"])
def test_autocast_changes_no_digit_of_the_scan_nor_of_its_gradients(backend):
    plain = run(problem(37, dtype=torch.float32), backend)
    inside = run(problem(37, dtype=torch.float32), backend, autocast=True)
    for name, value in plain.items():
        assert torch.equal(value, inside[name]), name


def test_autocast_around_the_backward_pass_changes_no_digit_of_the_parallel_scan():
    plain = run(problem(37, dtype=torch.float32), "parallel")
    with torch.autocast("cpu", torch.bfloat16):
        inside = run(problem(37, dtype=torch.float32), "parallel")
    assert torch.equal(plain["dC"], inside["dC"]) and torch.equal(plain["dB"], inside["dB"])


def test_autocast_changes_no_digit_of_a_step():
    a = {k: v.detach().float() for k, v in problem(1).items()}
    h = a.pop("h0")
    one = [a[k][:, 0] for k in ("x", "delta")] + [a["A"]] + [a[k][:, 0] for k in ("B", "C")]
    with torch.autocast("cpu", torch.bfloat16):
        inside = selective_step(h, *one, backend="loop")
    for ours, plain in zip(inside, selective_step(h, *one, backend="loop")):
        assert torch.equal(ours, plain)


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
    function = lambda *a: selective_scan(
        **dict(zip(names, a)), delta_softplus=True, return_last_state=True, backend="loop"
    )
    assert torch.autograd.gradcheck(function, tuple(problem(3).values()))


@on_the_cpu
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("d_inner, d_state", [(1, 1), (7, 3), (16, 16), (33, 4), (129, 17)])
def test_backend_matches_loop(backend, length, d_inner, d_state):
    exact = run(problem(length, d_inner, d_state), "loop")
    ours = run(problem(length, d_inner, d_state, dtype=torch.float32), backend)
    for name, value in exact.items():
        # float32 has 6e-8 a rounding; sums over 257 steps and 129 channels collect some dozens of
        # them, and in the smallest problem the two terms of dA cancel to a hundredth
        error = (ours[name] - value).abs().max() / value.abs().max()
        assert error < (1e-5 if d_inner == 1 else 5e-6), f"{name}: {error:.1e}"


def test_parallel_in_float64_is_the_loop_to_the_last_digits():
    exact, ours = (run(problem(65), name) for name in ("loop", "parallel"))
    for name, value in exact.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-11, atol=1e-12, msg=name)


def test_gradients_of_parallel_are_numerical_gradients():
    function = lambda *a: selective_scan(
        **dict(zip(ORDER, a)), delta_softplus=True, return_last_state=True, backend="parallel"
    )
    assert torch.autograd.gradcheck(function, tuple(problem(5).values()))


@on_the_cpu
@pytest.mark.parametrize("dtype, close", [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_half_precision_loses_only_its_own_rounding(backend, dtype, close):
    """The state and the sums stay in float32:
    what is lost is the rounding of inputs and outputs.
    """
    half = {
        k: v.detach()
        .to(dtype if k in ("x", "delta", "B", "C", "z") else torch.float32)
        .requires_grad_()
        for k, v in problem(65, dtype=torch.float32).items()
    }
    exact = run({k: v.detach().double().requires_grad_() for k, v in half.items()}, "loop")
    ours = run(half, backend)
    y, h = selective_scan(**half, delta_softplus=True, return_last_state=True, backend=backend)
    assert y.dtype == dtype and h.dtype == torch.float32
    for name, value in exact.items():
        rounds = name in ("y", "dx", "ddelta", "dB", "dC", "dz")  # stored in the short dtype
        error = (ours[name] - value).abs().max() / value.abs().max()
        assert error < (close if rounds else 1e-5), f"{name}: {error:.1e}"


@on_the_cpu
def test_backend_is_reproducible_to_the_last_bit(backend):
    one, two = (run(problem(130, 20, 5, dtype=torch.float32), backend) for _ in range(2))
    assert all(torch.equal(one[k], two[k]) for k in one)


@needs_compiler
@pytest.mark.parametrize("batch", [1, 5])
def test_cpu_gradients_do_not_depend_on_the_number_of_cores(batch):
    """Each sum has one order, however many threads share the work."""
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(problem(70, 260, 3, batch, torch.float32), "cpu"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0][k], other[k]) for other in results[1:] for k in other)


@on_the_cpu
def test_strided_inputs(backend):
    a = {k: v.detach() for k, v in problem(40, dtype=torch.float32).items()}
    turned = {k: v.transpose(0, -1).contiguous().transpose(0, -1) for k, v in a.items()}
    turned["x"] = a["x"].repeat(1, 1, 2)[..., ::2].copy_(a["x"])
    turned["D"] = a["D"].repeat_interleave(2)[::2]
    assert not any(turned[k].is_contiguous() for k in turned if k != "delta_bias")
    grads = []
    for given in (a, turned):
        grads.append(run({k: v.detach().requires_grad_() for k, v in given.items()}, backend))
    # the order of a sum may follow the strides: a few roundings
    for name, value in grads[0].items():
        torch.testing.assert_close(grads[1][name], value, rtol=1e-5, atol=1e-5, msg=name)


@on_the_cpu
@pytest.mark.parametrize("extreme", [-1e4, -50.0, 50.0, 1e4])
def test_extreme_steps_give_no_nan_and_no_overflow(backend, extreme):
    """A step of 10,000 forgets all and one of 1e-22 does nothing;
    gradients stay finite, as the loop's do.
    """
    a = problem(40, dtype=torch.float32) | {
        "delta": torch.full((2, 40, 5), extreme, requires_grad=True)
    }
    ours = run(a, backend)
    exact = run({k: v.detach().double().requires_grad_() for k, v in a.items()}, "loop")
    for name, value in exact.items():
        assert torch.isfinite(ours[name]).all(), name
        # relative to the largest; where all is below 1e-6 both are rounding
        error = (ours[name] - value).abs().max() / value.abs().max().clamp(min=1e-6)
        assert error < 1e-4, f"{name}: {error:.1e}"


@contextmanager
def poisoned():
    """Whatever memory is asked for without a value holds NaN, inside operators too."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all() and torch.ones(3).new_empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@on_the_cpu
@pytest.mark.parametrize("length", LENGTHS)
def test_no_result_depends_on_memory_that_was_never_written(backend, length):
    clean = run(problem(length, 7, 3, dtype=torch.float32), backend)
    with poisoned():
        again = run(problem(length, 7, 3, dtype=torch.float32), backend)
    assert all(torch.equal(clean[k], again[k]) for k in clean)


@needs_compiler
def test_a_kernel_that_leaves_memory_unwritten_is_found():
    """The poison reaches what an operator asks for inside."""
    lazy = operators.operator(
        "lazy", "(Tensor x) -> Tensor", torch.empty_like, lambda x: x.new_empty(x.shape)
    )
    with poisoned():
        assert lazy(torch.ones(3)).isnan().all()


@needs_compiler
def test_the_cpu_scan_keeps_one_state_in_twelve_steps():
    """Beside its arguments: 4 bytes * 16 states / 12 a step and channel,
    and nothing where no gradient is wanted.
    """
    a, kept = problem(1020, 64, 16, dtype=torch.float32), {}
    given = {v.data_ptr() for v in a.values()}
    note = lambda t: kept.update({t.data_ptr(): t.numel() * t.element_size()}) or t
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        selective_scan(**a, delta_softplus=True, backend="cpu")
    ours = sum(size for address, size in kept.items() if address not in given)
    assert ours == 4 * 16 * a["x"].numel() / 12


def test_optional_arguments_may_be_left_out():
    a = problem(9)
    small = {k: a[k].detach() for k in ("x", "delta", "A", "B", "C")}
    y = selective_scan(**small, backend="loop")
    torch.testing.assert_close(selective_scan(**small, backend="parallel"), y)
    with_zeros = selective_scan(
        **small, D=torch.zeros_like(a["D"]), h0=torch.zeros_like(a["h0"]), backend="loop"
    )
    torch.testing.assert_close(y, with_zeros)
    if HAVE_COMPILER:
        single = {k: v.float() for k, v in small.items()}
        torch.testing.assert_close(
            selective_scan(**single, backend="cpu").double(), y, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("backend", ["loop", "parallel", pytest.param("cpu", marks=needs_compiler)])
def test_segments_with_carried_state_are_the_whole(backend):
    dtype = torch.float32 if backend == "cpu" else torch.float64
    a = {k: v.detach() for k, v in problem(65, dtype=dtype).items()}
    whole, last = selective_scan(**a, return_last_state=True, backend=backend)
    h, parts = a["h0"], []
    for begin, end in ((0, 1), (1, 40), (40, 65)):
        cut = {
            k: v[:, begin:end] if k in ("x", "delta", "B", "C", "z") else v for k, v in a.items()
        }
        y, h = selective_scan(**(cut | {"h0": h}), return_last_state=True, backend=backend)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    torch.testing.assert_close(h, last)


@pytest.mark.parametrize("backend", ["loop", pytest.param("cpu", marks=needs_compiler)])
@pytest.mark.parametrize("d_inner, d_state", [(5, 3), (16, 16), (37, 19)])
@pytest.mark.parametrize("everything", [True, False])
def test_step_is_one_step_of_the_scan(backend, d_inner, d_state, everything):
    a = {k: v.detach() for k, v in problem(1, d_inner, d_state, dtype=torch.float32).items()}
    if not everything:
        a = {k: a[k] for k in ("x", "A", "B", "C", "h0")} | {"delta": a["delta"].abs()}
    y, h = selective_scan(**a, delta_softplus=everything, return_last_state=True, backend="loop")
    one = {k: v[:, 0] if k in ("x", "delta", "B", "C", "z") else v for k, v in a.items()}
    before = one.pop("h0")
    copy = before.clone()
    y_step, h_step = selective_step(before, **one, delta_softplus=everything, backend=backend)
    torch.testing.assert_close(y[:, 0], y_step, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(h, h_step, rtol=2e-6, atol=2e-6)
    assert torch.equal(before, copy), "the old state was written over"


def test_step_lets_gradients_through_where_they_are_asked_for():
    a = problem(1, dtype=torch.float32)
    one = {k: v[:, 0] if k in ("x", "delta", "B", "C", "z") else v for k, v in a.items()}
    y, _ = selective_step(one.pop("h0"), **one, delta_softplus=True)
    y.sum().backward()
    assert all(v.grad is not None for v in a.values())


def test_a_step_has_gradients_under_torch_func_too():
    """Where `requires_grad` does not tell that they are wanted."""
    a = problem(2, dtype=torch.float32)
    one = {
        k: v.detach()[:, 0] if k in ("x", "delta", "B", "C", "z") else v.detach()
        for k, v in a.items()
    }
    h, x = one.pop("h0"), one.pop("x")

    def loss(x, backend):
        step = lambda x: selective_step(h, x, **one, delta_softplus=True, backend=backend)[0]
        return torch.func.vmap(step)(x).square().sum()

    many = torch.stack([x, 2 * x])
    ours, plain = (torch.func.grad(loss)(many, backend) for backend in ("auto", "loop"))
    assert plain.abs().max() > 0.1
    torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_empty_sequence_keeps_the_state(backend):
    a = {k: v.detach() for k, v in problem(0).items()}
    y, h = selective_scan(**a, return_last_state=True, backend=backend)
    assert y.shape == (2, 0, 5) and torch.equal(h, a["h0"])


def test_auto_takes_the_fastest_that_works_here():
    cpu, half = torch.device("cpu"), torch.bfloat16
    assert fastest_backend(cpu, torch.float32, 16) == ("cpu" if HAVE_COMPILER else "parallel")
    assert fastest_backend(cpu, torch.float64, 16) == "parallel"
    pytest.importorskip("triton", reason="no Triton for this system")
    assert fastest_backend(torch.device("cuda"), half, 16) == "triton"
    assert (
        fastest_backend(torch.device("cuda"), half, 257)
        == fastest_backend(torch.device("cuda"), torch.float64, 16)
        == "parallel"
    )


@pytest.mark.parametrize(
    "name, shape",
    [
        ("delta", (2, 4, 6)),
        ("B", (2, 4, 9)),
        ("C", (1, 4, 3)),
        ("D", (4,)),
        ("z", (2, 3, 5)),
        ("delta_bias", (1,)),
        ("h0", (2, 3, 5)),
        ("A", (4, 3)),
    ],
)
def test_a_wrong_shape_is_one_sentence_that_names_it(name, shape):
    arguments = {k: v.detach() for k, v in problem(4).items()} | {name: torch.zeros(shape)}
    with pytest.raises(UserError, match=rf"\b{name}\b.*shape"):
        selective_scan(**arguments)


def test_unknown_backend_is_one_sentence():
    with pytest.raises(UserError, match="backend 'gpu' is unknown"):
        selective_scan(**problem(2), backend="gpu")


def test_step_and_cpu_refuse_what_they_cannot_do():
    a = {k: v.detach() for k, v in problem(1).items()}
    with pytest.raises(UserError, match="no single step"):
        selective_step(
            a["h0"],
            a["x"][:, 0],
            a["delta"][:, 0],
            a["A"],
            a["B"][:, 0],
            a["C"][:, 0],
            backend="triton",
        )
    with pytest.raises(UserError, match="takes float32"):
        selective_scan(**a, backend="cpu")


def in_a_fresh_process(code, cache, **environment):
    """Run `code` where the compiled kernels are kept in `cache`; returns what it printed."""
    start = (
        "import pathlib, torch\nfrom lib.scan import native, selective as scan\n"
        f"native.CACHE = pathlib.Path({str(cache)!r})\n"
    )
    return subprocess.run(
        [sys.executable, "-c", start + code],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | environment,
    ).stdout


USE = """
one = torch.ones(1, 3, 2); A = -torch.ones(2, 2); B = torch.ones(1, 3, 2)
y = scan.selective_scan(one, one, A, B, B)
torch.testing.assert_close(y, scan.selective_scan(one, one, A, B, B, backend="loop"))
"""


def test_without_a_compiler_one_sentence_and_plain_pytorch(tmp_path):
    """`auto` works and says so once; `cpu` says what to do."""
    printed = in_a_fresh_process(
        "native.compiler = lambda: None"
        + USE
        + USE
        + """
from lib.env.errors import UserError
try: scan.selective_scan(one, one, A, B, B, backend="cpu")
except UserError as e: assert "compiler" in str(e)
else: raise SystemExit("no error")
""",
        tmp_path,
    )
    assert printed.count("no C++ compiler") == 1 and len(printed.splitlines()) == 1


def test_a_compiler_that_fails_is_one_sentence_and_plain_pytorch(tmp_path):
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    printed = in_a_fresh_process(USE + USE, tmp_path / "cache", CXX=str(broken))
    assert printed.count("could not compile") == 1
    assert list((tmp_path / "cache").iterdir()) == []
