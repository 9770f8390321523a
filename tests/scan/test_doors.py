"""Claims about the doors of the scans: what does not fit is refused in a sentence,
what fits is right.
"""

import inspect

import numpy as np
import pytest
import torch
from test_selective import HAVE_COMPILER, ORDER, poisoned, problem, run

from lib.env.errors import UserError
from lib.scan import cpu as scan_cpu
from lib.scan.selective import BACKENDS, selective_scan, selective_step

pytestmark = pytest.mark.usefixtures("one_thread")
needs_compiler = pytest.mark.skipif(
    not HAVE_COMPILER, reason="no C++ compiler here: the cpu backend cannot be built"
)
# what may come instead of a tensor of floats on x's device, and the word that says what is wrong
# with it
BAD = {
    "elsewhere": (lambda t: t.to("meta"), "on one device"),
    "complex": (lambda t: t.to(torch.complex64), "complex64"),
    "whole": (lambda t: t.long(), "int64"),
    "yes or no": (lambda t: t > 0, "bool"),
    "sparse": (lambda t: t.to_sparse(), "dense"),
    "nothing": (lambda t: None, "NoneType"),
    "one more axis": (lambda t: t[None], "shape"),
    "one element": (lambda t: t.flatten()[:1], "shape"),
}


def arguments(length=4):
    return {k: v.detach() for k, v in problem(length, 20, 3, dtype=torch.float32).items()}


def one_step():
    given = arguments(1)
    one = {k: v[:, 0] if k in ("x", "delta", "B", "C", "z") else v for k, v in given.items()}
    return {"h": one.pop("h0")} | one


def by_cpu_scan(**given):
    return scan_cpu.scan(*(given[name] for name in ORDER[:-1]), True, given["h0"])


def by_cpu_step(**given):
    return scan_cpu.step(*(given[name] for name in ("h", *ORDER[:-1])), True)


# without the tests' own check of types, which a reader's program does not have
DOORS = {
    "selective_scan": (inspect.unwrap(selective_scan), arguments),
    "selective_step": (inspect.unwrap(selective_step), one_step),
    "scan_cpu.scan": (by_cpu_scan, arguments),
    "scan_cpu.step": (by_cpu_step, one_step),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("door", DOORS)
def test_what_does_not_fit_is_one_sentence_at_every_door(door, bad):
    """Each argument in turn is spoilt beside others that are right.

    Some of these once ended the process.
    """
    call, given = DOORS[door]
    spoil, word = BAD[bad]
    for name, tensor in given().items():
        if bad == "nothing" and name in ("D", "z", "delta_bias", "h0"):
            continue  # these may be left out
        with pytest.raises(UserError) as error:
            call(**given() | {name: spoil(tensor)})
        sentence = str(error.value)
        assert "\n" not in sentence and (word in sentence or name == "x"), sentence


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "name, other", [("A", torch.complex64), ("x", torch.int64), ("B", torch.complex128)]
)
def test_every_backend_refuses_what_is_no_real_number(backend, name, other):
    given = arguments()
    with pytest.raises(UserError, match=rf"needs {name} in one of .*not {str(other)[6:]}"):
        selective_scan(**given | {name: given[name].to(other)}, backend=backend)


def test_what_is_no_tensor_is_refused():
    for name in ("x", "A", "D"):
        given = arguments()
        with pytest.raises(UserError, match=f"needs a tensor as {name}, not ndarray"):
            by_cpu_scan(**given | {name: given[name].numpy()})


@pytest.mark.parametrize("backend", ["auto", "loop", "parallel"])
def test_a_scan_that_is_all_on_meta_says_the_shapes(backend):
    """Where there are no numbers, as for a model of which only the sizes are asked;
    its gradients too.
    """
    given = {k: v.to("meta").requires_grad_() for k, v in arguments().items()}
    y, h = selective_scan(**given, return_last_state=True, backend=backend)
    assert y.device.type == "meta" and y.shape == given["x"].shape and h.shape == given["h0"].shape
    (y.sum() + h.sum()).backward()
    assert all(t.grad.shape == t.shape for t in given.values())


def test_a_step_that_is_all_on_meta_says_the_shapes():
    given = {k: v.to("meta") for k, v in one_step().items()}
    y, h = selective_step(**given)
    assert y.shape == given["x"].shape and h.shape == given["h"].shape


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_a_kernel_is_not_given_what_is_all_on_meta(backend):
    given = {k: v.to("meta") for k, v in arguments().items()}
    with pytest.raises(UserError, match=f"backend '{backend}' (takes|needs)"):
        selective_scan(**given, backend=backend)


def test_a_state_or_an_input_elsewhere_is_refused_by_the_step():
    for name in ("x", "h"):
        given = one_step()
        with pytest.raises(UserError, match="on one device"):
            selective_step(**given | {name: given[name].to("meta")})


def test_one_row_for_all_channels_is_refused_by_the_step():
    """They were read as if there were as many as channels: beyond their end."""
    given = one_step()
    for name, wrong in (
        ("A", given["A"][:1]),
        ("D", given["D"][:1]),
        ("delta_bias", given["D"][:1]),
    ):
        for call in (selective_step, by_cpu_step):
            with pytest.raises(UserError, match="shape"):
                call(**given | {name: wrong})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_step_in_half_precision_is_the_scan_s(dtype):
    given = {k: v.to(dtype) if k not in ("h", "A") else v for k, v in one_step().items()}
    y, h = selective_step(**given, delta_softplus=True)
    long = {k: v[:, None] if k in ("x", "delta", "B", "C", "z") else v for k, v in given.items()}
    y_scan, h_scan = selective_scan(
        h0=long.pop("h"), **long, delta_softplus=True, return_last_state=True, backend="loop"
    )
    assert y.dtype == dtype and h.dtype == torch.float32
    torch.testing.assert_close(y, y_scan[:, 0])
    torch.testing.assert_close(h, h_scan)


def laid_out(tensor, draw):
    """The same numbers, as a tensor that lies in memory in one of the ways that torch allows."""
    way = draw(5)
    if way == 0 and tensor.dim() > 1:  # axes the other way round
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if way == 1:  # every second number of something longer
        return torch.stack([tensor, torch.full_like(tensor, torch.nan)], -1).flatten(-2)[..., ::2]
    if way == 2:  # the middle of longer rows
        around = torch.full((*tensor.shape[:-1], 3), torch.nan, dtype=tensor.dtype)
        return torch.cat([around, tensor, around], -1)[..., 3 : 3 + tensor.shape[-1]]
    if way == 3:  # numbers that are only marked as negative
        return (
            torch.complex(torch.zeros_like(tensor), -tensor).conj().imag
            if tensor.dtype.itemsize > 2
            else tensor
        )
    return tensor


def random_problem(seed):
    """Arguments of a scan of a random shape: odd ones, small ones, single ones;
    some arguments left out.
    """
    random = np.random.default_rng(seed)
    draw = lambda top: int(random.integers(top))
    length, batch = (1, 2, 11, 12, 13, 25, 40)[draw(7)], 1 + draw(5)
    given = problem(length, 1 + draw(40), 1 + draw(20), batch, torch.float32, seed)
    given = {k: v for k, v in given.items() if k in ("x", "delta", "A", "B", "C") or draw(2)}
    return {k: laid_out(v.detach(), draw).requires_grad_() for k, v in given.items()}


@needs_compiler
@pytest.mark.parametrize("group", range(6))
def test_any_shape_and_layout_is_the_loop_with_every_gradient_and_reads_nothing_unwritten(group):
    """Sixty random shapes, memory poisoned with NaN;
    the worst error of 360 was 5.4e-6 of the largest number.
    """
    for seed in range(10 * group, 10 * group + 10):
        given = random_problem(seed)
        exact = run({k: v.detach().double().requires_grad_() for k, v in given.items()}, "loop")
        with poisoned():
            ours = run(given, "cpu")
        for name, value in exact.items():
            assert ours[name].shape == value.shape
            error = (ours[name] - value).abs().max() / value.abs().max().clamp(min=1e-3)
            assert error < 2e-5, f"seed {seed}, {name}: {error:.1e}"


@needs_compiler
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "batch, length, d_inner, d_state", [(0, 3, 4, 2), (2, 0, 4, 2), (5, 3, 0, 2), (2, 3, 4, 0)]
)
def test_nothing_to_scan_has_an_answer(backend, batch, length, d_inner, d_state):
    """No row, no step of time, no channel, no state:
    the state stays, and y is what passes beside it.
    """
    given = problem(length, d_inner, d_state, batch, torch.float32)
    y, h = selective_scan(**given, return_last_state=True, backend=backend)
    assert torch.equal(y, (given["D"] * given["x"]) * torch.nn.functional.silu(given["z"]))
    assert torch.equal(h, given["h0"])
    again, h = scan_cpu.scan(*(given[name] for name in ORDER[:-1]), False, given["h0"])
    (again.sum() + h.sum()).backward()
    torch.testing.assert_close(again, y)
    assert torch.equal(h, given["h0"]) and torch.equal(given["h0"].grad, torch.ones_like(h))
    assert not given["A"].grad.any()


@needs_compiler
def test_one_step_of_time_may_lie_anywhere():
    """The distance of the rows of an axis of one says nothing."""
    given = arguments(1)
    given["x"] = torch.randn(1, 2, 20).transpose(0, 1)
    assert given["x"].is_contiguous() and given["x"].stride() == (20, 40, 1)
    torch.testing.assert_close(
        selective_scan(**given, backend="cpu"), selective_scan(**given, backend="loop")
    )
