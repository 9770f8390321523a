"""Claims about the scans as operators of PyTorch:
compiled, exported, differentiated and mapped, they are right.
"""

import inspect

import pytest
import torch
from test_selective import HAVE_COMPILER, problem
from torch.autograd import forward_ad

from lib.env.errors import UserError
from lib.scan import cpu, selective

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning:triton"),
]
needs_compiler = pytest.mark.skipif(
    not HAVE_COMPILER, reason="no C++ compiler here: the cpu backend cannot be built"
)
# without the tests' own check of types, which no compiler sees in a reader's program
selective_scan = inspect.unwrap(selective.selective_scan)
selective_step = inspect.unwrap(selective.selective_step)


def triton_kernel():
    pytest.importorskip("triton", reason="no Triton for this system")
    from lib.scan import triton_kernel
    from lib.scan.triton_interpreter import fast_interpreter

    if torch.cuda.is_available():
        pytest.skip("a GPU is here: the interpreter is off")
    fast_interpreter()
    return triton_kernel


def arguments(length=5, channels=3, states=2, optional=True, dtype=torch.float32):
    """What the operators take, in their order, without `keep`."""
    given = problem(length, channels, states, dtype=torch.float32)
    moving = ("x", "delta", "B", "C", "z")
    given = {
        k: v.detach().to(dtype if k in moving else torch.float32).requires_grad_()
        for k, v in given.items()
    }
    D, z, bias, h0 = (given[name] if optional else None for name in ("D", "z", "delta_bias", "h0"))
    return (*(given[name] for name in ("x", "delta", "A", "B", "C")), D, z, bias, True, h0)


@needs_compiler
@pytest.mark.parametrize("optional", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_scan_of_the_cpu_is_a_sound_operator(optional, dtype):
    given = arguments(13, 17, 9, optional, dtype)
    torch.library.opcheck(cpu.SCAN, (*given, True))
    torch.library.opcheck(
        cpu.SCAN, (*(g.detach() if isinstance(g, torch.Tensor) else g for g in given), False)
    )
    given = tuple(g.detach() if isinstance(g, torch.Tensor) else g for g in given)
    y, last, kept = cpu.SCAN(*given, True)
    for dlast in (last, None):
        torch.library.opcheck(cpu.SCAN_BACKWARD, (*given[:9], kept, y, dlast))


@needs_compiler
def test_the_step_of_the_cpu_is_a_sound_operator():
    given = (g.detach() if isinstance(g, torch.Tensor) else g for g in arguments(1))
    x, delta, A, B, C, D, z, bias, softplus, h0 = given
    torch.library.opcheck(
        cpu.STEP, (h0, x[:, 0], delta[:, 0], A, B[:, 0], C[:, 0], D, z[:, 0], bias, softplus)
    )
    torch.library.opcheck(
        cpu.STEP, (h0, x[:, 0], delta[:, 0], A, B[:, 0], C[:, 0], None, None, None, False)
    )


@pytest.mark.parametrize("optional", [True, False])
def test_the_scan_of_triton_is_a_sound_operator(optional):
    kernel = triton_kernel()
    given = arguments(optional=optional)
    tests = [
        "test_schema",
        "test_autograd_registration",
        "test_faketensor",
        "test_aot_dispatch_dynamic",
    ]
    torch.library.opcheck(kernel.SCAN, given, test_utils=tests)
    given = tuple(g.detach() if isinstance(g, torch.Tensor) else g for g in given)
    y, last, kept = kernel.SCAN(*given)
    torch.library.opcheck(kernel.SCAN_BACKWARD, (*given[:9], kept, y, last), test_utils=tests)


def named(length=13, channels=5, states=3):
    return {
        k: v.detach() for k, v in problem(length, channels, states, dtype=torch.float32).items()
    }


@needs_compiler
def test_a_compiled_scan_has_no_graph_break_and_the_same_numbers():
    given = {k: v.requires_grad_() for k, v in named().items()}

    def run(**tensors):
        y, last = selective_scan(**tensors, delta_softplus=True, return_last_state=True)
        return y.sin().sum() + last.cos().sum()

    torch._dynamo.reset()
    found = run(**given), torch.compile(run, fullgraph=True, backend="aot_eager")(**given)
    for ours, compiled in zip(
        *(torch.autograd.grad(f, list(given.values())) for f in found), strict=True
    ):
        torch.testing.assert_close(ours, compiled)


@needs_compiler
def test_a_compiler_may_meet_a_kernel_that_nobody_asked_for_yet(monkeypatch):
    """It asks whether there is a compiler as it traces, and looks no deeper."""
    given = named()
    expected = selective_scan(**given)
    monkeypatch.setattr(cpu.KERNEL, "_tried", False)
    monkeypatch.setattr(cpu.KERNEL, "_library", None)
    torch._dynamo.reset()
    torch.testing.assert_close(
        torch.compile(selective_scan, fullgraph=True, backend="aot_eager")(**given), expected
    )


@needs_compiler
def test_a_compiled_step_is_the_step():
    given = {k: v[:, 0] if k in ("x", "delta", "B", "C", "z") else v for k, v in named(1).items()}
    h = given.pop("h0")
    expected = selective_step(h, **given, delta_softplus=True)
    torch._dynamo.reset()
    with torch.no_grad():
        found = torch.compile(selective_step, fullgraph=True, backend="aot_eager")(
            h, **given, delta_softplus=True
        )
    torch.testing.assert_close(found, expected)


@needs_compiler
def test_an_exported_scan_takes_other_lengths():
    class Scan(torch.nn.Module):
        def forward(self, x, delta, A, B, C):
            return selective_scan(x, delta, A, B, C, delta_softplus=True)

    names = ("x", "delta", "A", "B", "C")
    given, other = ({k: t for k, t in named(length).items() if k in names} for length in (13, 40))
    length = torch.export.Dim("length", min=2, max=1000)
    shapes = {k: {1: length} if k != "A" else None for k in given}
    with torch.no_grad():
        program = torch.export.export(Scan(), (), given, dynamic_shapes=shapes)
    assert any("scan_cpu" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(**other), Scan()(**other))


@needs_compiler
def test_torch_func_differentiates_the_scan_and_maps_over_it():
    """Gradients a row of the batch, one of the parameters mapped over too; against the loop."""
    given = named(7)
    x = given.pop("x")

    def loss(x, A, backend):
        rows = {
            k: v[:1] if k in ("delta", "B", "C", "z", "h0") else v for k, v in given.items()
        } | {"A": A}
        return selective_scan(x[None], **rows, delta_softplus=True, backend=backend).square().sum()

    rates = given["A"] * torch.tensor([1.0, 2.0])[:, None, None]
    gradients = torch.func.vmap(torch.func.grad(loss, (0, 1)), (0, 0, None))
    torch.testing.assert_close(
        gradients(x, rates, "cpu"), gradients(x, rates, "loop"), rtol=1e-4, atol=1e-5
    )


def refused_twice(y, x):
    (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(
        UserError, match="has a first derivative and no second: choose backend 'loop'"
    ):
        torch.autograd.grad(first.sum(), x)


@needs_compiler
def test_a_second_derivative_is_refused_in_a_sentence():
    given = named()
    x = given.pop("x").requires_grad_()
    refused_twice(selective_scan(x, **given, backend="cpu"), x)


def test_a_second_derivative_of_triton_s_scan_is_refused_in_a_sentence():
    triton_kernel()
    given = named(3, 2, 1)
    x = given.pop("x").requires_grad_()
    refused_twice(selective_scan(x, **given, backend="triton"), x)


@pytest.mark.parametrize("backend", [pytest.param("cpu", marks=needs_compiler), "triton"])
@pytest.mark.parametrize("gradients", [True, False])
def test_a_derivative_in_forward_mode_is_refused_in_a_sentence(backend, gradients):
    """With gradients and without: a tangent that is dropped would be a derivative of zero."""
    if backend == "triton":
        triton_kernel()
    given = {k: v.detach() for k, v in named(3, 2, 1).items()}
    x = given.pop("x")
    scan = lambda x: selective_scan(x, **given, backend=backend)
    refused = pytest.raises(UserError, match="no derivative in forward mode: choose backend 'loop'")
    with torch.set_grad_enabled(gradients):
        with refused:
            torch.func.jvp(scan, (x,), (torch.ones_like(x),))
        with refused, forward_ad.dual_level():
            scan(forward_ad.make_dual(x, torch.ones_like(x)))


def test_a_step_in_forward_mode_is_the_loop_s():
    given = {k: v.detach() for k, v in named(1).items()}
    h, x = given.pop("h0"), given.pop("x")[:, 0]
    rest = {k: v[:, 0] if k in ("delta", "B", "C", "z") else v for k, v in given.items()}

    def tangent(backend):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, torch.ones_like(x))
            y, _ = selective_step(h, dual, **rest, backend=backend)
            return forward_ad.unpack_dual(y).tangent

    assert tangent("loop").abs().max() > 0
    assert torch.equal(tangent("auto"), tangent("loop"))


def test_the_loop_has_a_second_derivative():
    """And it is that of the exponential: y = delta B x at the first step."""
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    delta = one.clone().requires_grad_()
    x, h0 = one * 0, one
    # y = exp(-delta) h0, so its second derivative is y again
    y = selective_scan(x, delta, -one[0], one, one, h0=h0, backend="loop")
    (first,) = torch.autograd.grad(y.sum(), delta, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), delta)
    torch.testing.assert_close(second, y.detach())


@needs_compiler
def test_autocast_leaves_the_precision_of_the_scan_alone():
    given = named()
    with torch.autocast("cpu", torch.bfloat16):
        inside = selective_scan(**given, delta_softplus=True, backend="cpu")
    assert torch.equal(inside, selective_scan(**given, delta_softplus=True, backend="cpu"))


@needs_compiler
@pytest.mark.parametrize(
    "spoil, says",
    [
        (lambda t: t.double(), "the operator of the scan takes"),
        (lambda t: t.flatten()[:1], "shape"),
        (lambda t: t.to(torch.complex64), "complex64"),
        (lambda t: t.long(), "int64"),
    ],
)
def test_the_bare_operator_refuses_what_its_kernel_cannot_read(spoil, says):
    """The same door as that of the functions: no address of a wrong tensor leaves Python."""
    given = tuple(g.detach() if isinstance(g, torch.Tensor) else g for g in arguments())
    for i in (0, 2, 3, 5, 9):
        wrong = list(given)
        wrong[i] = spoil(wrong[i])
        with pytest.raises(UserError, match=says if i else "the "):
            cpu.SCAN(*wrong, True)


@needs_compiler
def test_a_bare_operator_that_kept_nothing_says_so():
    y, *_ = cpu.SCAN(*arguments(), False)
    with pytest.raises(UserError, match="keep=False"):
        y.sum().backward()
