"""Claims about lib.scan.triton_kernel: without a GPU it runs in Triton's interpreter,
and compiles all the same.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from test_selective import HAVE_COMPILER, LENGTHS, poisoned, problem, run

from lib.env.errors import UserError
from lib.scan.selective import selective_scan

triton = pytest.importorskip("triton", reason="no Triton for this system")
from lib.scan import triton_kernel  # noqa: E402
from lib.scan.triton_interpreter import fast_interpreter  # noqa: E402

fast_interpreter()
# sigmoid(-10,000) = 1 / (1 + inf) = 0 is right; numpy, which interprets, remarks on the inf
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning:triton")
interpreted = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="a GPU is here: kernels are compiled"
)
each_device = pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=interpreted), pytest.param("cuda", marks=pytest.mark.gpu)]
)
# dtype, and the largest error of a result that is stored in it: half a unit in the last place; a
# whole one for bfloat16, which the interpreter cuts off where a GPU rounds
DTYPES = [(torch.float32, 1e-5), (torch.bfloat16, 2**-7), (torch.float16, 2**-11)]


def on(device, arguments, dtype=torch.float32):
    """The arguments on a device: the long ones in `dtype`, the parameters in float32."""
    return {
        k: v.detach()
        .to(device, dtype if k in ("x", "delta", "B", "C", "z") else torch.float32)
        .requires_grad_()
        for k, v in arguments.items()
    }


def worst(ours, exact, close):
    """The largest error of each result, as a part of what is allowed:
    1e-5 where float32 is kept.
    """
    short = ("y", "dx", "ddelta", "dB", "dC", "dz")
    error = {k: (ours[k].cpu() - v).abs().max() / v.abs().max() for k, v in exact.items()}
    return {k: float(e / (close if k in short else 1e-5)) for k, e in error.items()}


@each_device
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("d_inner, d_state", [(1, 1), (7, 3), (33, 2)])
def test_kernels_match_the_loop(device, length, d_inner, d_state):
    """Outputs and all nine gradients, in float32,
    at lengths and widths around and between the blocks of 32.
    """
    given = problem(length, d_inner, d_state, dtype=torch.float32)
    exact = run({k: v.detach().double().requires_grad_() for k, v in given.items()}, "loop")
    excess = worst(run(on(device, given), "triton"), exact, 1e-5)
    assert max(excess.values()) < 1, excess


@each_device
@pytest.mark.parametrize("dtype, close", DTYPES)
@pytest.mark.parametrize("d_inner, d_state, length", [(5, 4, 65), (64, 2, 40)])
def test_short_dtypes_lose_only_their_own_rounding(device, dtype, close, d_inner, d_state, length):
    given = on(device, problem(length, d_inner, d_state, dtype=torch.float32), dtype)
    exact = run({k: v.detach().cpu().double().requires_grad_() for k, v in given.items()}, "loop")
    excess = worst(run(given, "triton"), exact, close)
    assert max(excess.values()) < 1, excess
    y, h = selective_scan(**given, delta_softplus=True, return_last_state=True, backend="triton")
    assert y.dtype == dtype and h.dtype == torch.float32


@each_device
def test_many_states(device):
    """N = 256, the most that it takes; one more is refused in a sentence."""
    given = problem(33, 2, 256, batch=1, dtype=torch.float32)
    exact = run({k: v.detach().double().requires_grad_() for k, v in given.items()}, "loop")
    excess = worst(run(on(device, given), "triton"), exact, 1e-5)
    assert max(excess.values()) < 1, excess
    with pytest.raises(UserError, match="at most 256 states"):
        selective_scan(**on(device, problem(2, 2, 257)), backend="triton")


@each_device
@pytest.mark.parametrize("present", [(), ("D",), ("z",), ("delta_bias",), ("h0",)])
def test_optional_arguments_may_be_left_out(device, present):
    # delta as it is, without softplus
    steps = torch.rand(2, 37, 3, generator=torch.Generator().manual_seed(0))
    given = {
        k: v
        for k, v in problem(37, 3, 2, dtype=torch.float32).items()
        if k in ("x", "A", "B", "C", *present)
    } | {"delta": steps}
    results = []
    for backend, where, dtype in (
        ("loop", "cpu", torch.float64),
        ("triton", device, torch.float32),
    ):
        a = {k: v.detach().to(where, dtype).requires_grad_() for k, v in given.items()}
        y = selective_scan(**a, backend=backend)
        (
            y * torch.linspace(-1, 1, y.numel(), dtype=dtype, device=where).view_as(y)
        ).sum().backward()
        results.append({"y": y} | {k: v.grad for k, v in a.items()})
    for name, value in results[0].items():
        torch.testing.assert_close(
            results[1][name].cpu().double(), value, rtol=1e-5, atol=1e-5, msg=name
        )


@each_device
def test_strided_inputs(device):
    given = on(device, problem(40, 6, 3))
    turned = {
        k: v.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_()
        for k, v in given.items()
    }
    straight, strided = run(given, "triton"), run(turned, "triton")
    assert all(torch.equal(straight[k], strided[k]) for k in straight)


@each_device
def test_a_tensor_that_is_only_marked_as_negative_is_read_with_its_sign(device):
    given = {k: v.detach() for k, v in on(device, problem(20, 3, 2)).items()}
    marked = {k: torch.complex(torch.zeros_like(v), -v).conj().imag for k, v in given.items()}
    assert all(v.is_neg() for v in marked.values())
    straight, signed = (
        selective_scan(**each, delta_softplus=True, return_last_state=True, backend="triton")
        for each in (given, marked)
    )
    assert all(map(torch.equal, straight, signed))


@each_device
@pytest.mark.parametrize("extreme", [-1e4, -50.0, 50.0, 1e4])
def test_extreme_steps_give_no_nan_and_no_overflow(device, extreme):
    a = problem(40, dtype=torch.float32) | {
        "delta": torch.full((2, 40, 5), extreme, requires_grad=True)
    }
    exact = run({k: v.detach().double().requires_grad_() for k, v in a.items()}, "loop")
    ours = run(on(device, a), "triton")
    for name, value in exact.items():
        assert torch.isfinite(ours[name]).all(), name
        error = (ours[name].cpu() - value).abs().max() / value.abs().max().clamp(min=1e-6)
        assert error < 1e-4, f"{name}: {error:.1e}"


@each_device
def test_no_result_depends_on_memory_that_was_never_written(device):
    clean = run(on(device, problem(45, 7, 3)), "triton")
    with poisoned():
        again = run(on(device, problem(45, 7, 3)), "triton")
    assert all(torch.equal(clean[k], again[k]) for k in clean)


@each_device
def test_gradients_are_reproducible_to_the_last_bit(device):
    """dB and dC are sums over channels in one fixed order: no atomics."""
    one, two = (run(on(device, problem(70, 40, 3)), "triton") for _ in range(2))
    assert all(torch.equal(one[k], two[k]) for k in one)


@each_device
def test_segments_with_carried_state_are_the_whole(device):
    a = {k: v.detach() for k, v in on(device, problem(65)).items()}
    whole, last = selective_scan(**a, delta_softplus=True, return_last_state=True, backend="triton")
    h, parts = a["h0"], []
    for begin, end in ((0, 1), (1, 40), (40, 65)):
        cut = {
            k: v[:, begin:end] if k in ("x", "delta", "B", "C", "z") else v for k, v in a.items()
        }
        y, h = selective_scan(
            **(cut | {"h0": h}), delta_softplus=True, return_last_state=True, backend="triton"
        )
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(h, last, rtol=1e-5, atol=1e-5)


@each_device
def test_nothing_of_size_bldn_is_kept(device):
    """Beside its arguments it keeps one state a block, and no tensor is larger than x."""
    a, kept = on(device, problem(64, 32, 16)), {}
    note = lambda t: kept.update({t.data_ptr(): t.numel() * t.element_size()}) or t
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        selective_scan(**a, delta_softplus=True, backend="triton")
    states = 2 * (64 // triton_kernel.BLOCK_L + 1) * 32 * 16 * 4
    assert states in kept.values() and max(kept.values()) <= a["x"].numel() * 4


def test_other_tensors_are_refused_in_a_sentence():
    a = problem(3)
    if triton.knobs.runtime.interpret:
        with pytest.raises(UserError, match="takes float32, bfloat16 or float16"):
            selective_scan(**a, backend="triton")
    else:
        with pytest.raises(UserError, match="CUDA device"):
            selective_scan(**a, backend="triton")


AOT = """
import json, sys, torch
from lib.scan import triton_kernel
from lib.lab.bench import triton_cost as triton_aot
found = []
for capability, dtype in ((7.5, torch.float32), (7.5, torch.float16), (8.0, torch.float32), (8.0, torch.bfloat16),
                          (9.0, torch.float32), (9.0, torch.bfloat16)):
    for kernel in (triton_kernel.forward_kernel, triton_kernel.backward_kernel):
        cost = triton_aot.cost(kernel, capability, dtype)
        found.append(cost | {"name": kernel.fn.__name__, "capability": capability, "dtype": str(dtype)})
print(json.dumps(found))
"""
# Registers a thread: four warps of 128 leave room for four programs on a multiprocessor, 255 is the
# most there is. Instructions a state, in the inner loop and what the outer one adds to it.
BUDGET = {"forward_kernel": (128, 20), "backward_kernel": (255, 68)}


def test_kernels_compile_ahead_of_time_within_their_budget(tmp_path):
    """For compute capabilities 7.5, 8.0 and 9.0: no spills,
    registers and instructions within `BUDGET`.
    """
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "TRITON_CACHE_DIR": str(tmp_path)
    }
    run = subprocess.run([sys.executable, "-c", AOT], env=clean, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    costs = json.loads(run.stdout)
    assert len(costs) == 12
    for cost in costs:
        registers, instructions = BUDGET[cost["name"]]
        assert cost["spilled_bytes"] == 0, cost
        assert cost["registers"] <= registers, cost
        assert 8 < cost["inner"] + cost["outer"] <= instructions, cost
        assert cost["opcodes"]["MUFU"] >= 8, (
            "the loop over states has an exponential for each of eight elements"
        )


@interpreted
def test_what_stands_beside_x_may_be_wider():
    """As on the other backends: float64 beside a float32 x is rounded to it."""
    a = {k: v.detach() for k, v in problem(9, dtype=torch.float32).items()}
    exact = selective_scan(**a, delta_softplus=True, backend="loop")
    a["delta"] = a["delta"].double()
    backends = ("cpu", "parallel", "triton") if HAVE_COMPILER else ("parallel", "triton")
    for backend in backends:
        y = selective_scan(**a, delta_softplus=True, backend=backend)
        torch.testing.assert_close(y, exact, rtol=1e-5, atol=1e-5)
