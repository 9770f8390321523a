"""The parallel scans are the loop: outputs, gradients, any length, and the work they promise."""

import math
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lib.env.errors import UserError
from lib.scan.parallel import (
    CHUNK_ELEMENTS,
    METHODS,
    SHORTEST_CHUNK,
    blelloch,
    hillis_steele,
    linear_recurrence,
    parallel,
)
from lib.scan.selective import loop

LENGTHS = [1, 2, 3, 63, 64, 65, 257]
SCANS = {"hillis_steele": hillis_steele, "blelloch": blelloch}
each_method = pytest.mark.parametrize("method", SCANS)


def steps_one_by_one(a, b, h0=None):
    """The recurrence as it is written down."""
    h, states = torch.zeros_like(b[:, 0]) if h0 is None else h0, []
    for a_t, b_t in zip(a.unbind(1), b.unbind(1)):
        h = a_t * h + b_t
        states.append(h)
    return torch.stack(states, 1)


def chain(length, *rest, dtype=torch.float64, seed=0):
    """a in (-1.2, 1.2), b and h0 normal: growing, shrinking and changing sign."""
    torch.manual_seed(seed)
    a = 2.4 * torch.rand(2, length, *rest, dtype=dtype) - 1.2
    return a, torch.randn(2, length, *rest, dtype=dtype), torch.randn(2, *rest, dtype=dtype)


def problem(length, d_inner=5, d_state=3, dtype=torch.float64, seed=0):
    """x, delta, A, B, C, h0 as `loop` and `parallel` take them."""
    torch.manual_seed(seed)
    new = partial(torch.randn, dtype=torch.float64)
    arguments = (
        new(2, length, d_inner),
        new(2, length, d_inner).exp() / 5,
        -new(d_inner, d_state).exp(),
        new(2, length, d_state),
        new(2, length, d_state),
        new(2, d_inner, d_state),
    )
    return [t.to(dtype).requires_grad_() for t in arguments]


def run(function, arguments):
    """y, the last state and the gradient of every argument, for random weights of y and state."""
    y, h = function(*arguments)
    torch.manual_seed(1)
    weights = [torch.randn(t.shape, dtype=torch.float64).to(t.dtype) for t in (y, h)]
    gradients = torch.autograd.grad((y, h), arguments, weights)
    return dict(zip(("y", "h", "dx", "ddelta", "dA", "dB", "dC", "dh0"), (y, h, *gradients)))


def worst(ours, exact):
    """The largest error of any output, each relative to the largest entry of that output."""
    return max(((ours[k] - exact[k]).abs().max() / exact[k].abs().max()).item() for k in exact)


class Joins(TorchDispatchMode):
    """Counts the joins that a scan makes along dimension 1, and its rounds: one `addcmul` each."""

    def __init__(self):
        super().__init__()
        self.count = self.rounds = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if (
            function.overloadpacket in (torch.ops.aten.addcmul, torch.ops.aten.addcmul_)
            and args[0].numel()
        ):
            self.count += args[0].shape[1]
            self.rounds += 1
        return function(*args, **(kwargs or {}))


@each_method
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("rest", [(), (1,), (7,), (5, 3)])
def test_scan_is_the_recurrence(method, length, rest):
    a, b, _ = chain(length, *rest)
    before = a.clone(), b.clone()
    # another order of the same sums, in float64
    torch.testing.assert_close(SCANS[method](a, b), steps_one_by_one(a, b), rtol=1e-11, atol=1e-11)
    assert torch.equal(a, before[0]) and torch.equal(b, before[1]), (
        "a scan leaves its arguments alone"
    )


@each_method
def test_float32_error_is_a_few_roundings(method):
    # |a| <= 1 as in a model, where old errors fade: 6e-8 a rounding, a few of them at any length
    a, b, _ = chain(257, 7)
    a = a.clamp(-1, 1)
    exact = steps_one_by_one(a, b)
    error = (SCANS[method](a.float(), b.float()) - exact).abs().max() / exact.abs().max()
    assert error < 1e-6


@pytest.mark.parametrize("length", [*LENGTHS, 1000, 1024])
def test_hillis_steele_makes_l_log_l_joins_in_log_l_rounds(length):
    with Joins() as joins:
        hillis_steele(*chain(length, 3)[:2])
    rounds = math.ceil(math.log2(length))
    assert joins.rounds == rounds
    assert joins.count == length * rounds - (2**rounds - 1)  # round k joins all but the first 2^k


@pytest.mark.parametrize("length", [*LENGTHS, 1000, 1024])
def test_blelloch_makes_under_two_l_joins_in_two_log_l_rounds(length):
    with Joins() as joins:
        blelloch(*chain(length, 3)[:2])
    assert joins.count < 2 * length
    assert joins.rounds <= 2 * math.log2(length)
    if length == 1024:  # up: L - 1; down: L - 1 - log2 L, for the last of each block is done
        assert joins.count == 1023 + 1023 - 10 and joins.rounds == 10 + 9


@each_method
@pytest.mark.parametrize("length", [1, 2, 3, 8, 13])
def test_gradients_of_the_recurrence_are_numerical_gradients(method, length):
    a, b, h0 = (t.requires_grad_() for t in chain(length, 3))
    assert torch.autograd.gradcheck(lambda *t: linear_recurrence(*t, method=method), (a, b, h0))
    assert torch.autograd.gradcheck(lambda *t: linear_recurrence(*t, method=method), (a, b))


@each_method
@pytest.mark.parametrize("length", [1, 2, 5, 9])
def test_a_complex_recurrence_and_its_gradients_are_those_of_the_loop(method, length):
    a, b, h0 = (torch.complex(t, t.flip(-1) / 2).requires_grad_() for t in chain(length, 3))
    ours = linear_recurrence(a, b, h0, method)
    torch.testing.assert_close(ours, steps_one_by_one(a, b, h0), rtol=1e-11, atol=1e-11)
    assert torch.autograd.gradcheck(lambda *t: linear_recurrence(*t, method=method), (a, b, h0))


def test_real_beside_complex_is_refused_in_a_sentence():
    a, b, _ = chain(3, 2)
    for wrong in ((a, b + 0j), (a + 0j, b), (a, b.float()), (a, b, b[:, 0] + 0j)):
        with pytest.raises(UserError, match="the recurrence needs .* convert it first"):
            linear_recurrence(*wrong)


@each_method
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_second_gradients_of_the_recurrence_are_numerical_gradients(method, dtype):
    given = [t.requires_grad_() for t in chain(4, 2, dtype=torch.float64)]
    if dtype.is_complex:
        given = [(t + 0.5j * t.flip(0)).detach().requires_grad_() for t in given]
    assert torch.autograd.gradgradcheck(partial(linear_recurrence, method=method), given)
    without = lambda a, b: linear_recurrence(a, b, None, method)
    assert torch.autograd.gradgradcheck(without, given[:2])


def test_a_second_gradient_of_parallel_is_refused_in_a_sentence():
    """Where a graph of the first is asked for and only a part of it differentiated, too."""
    given = problem(7)
    y, h = parallel(*given)
    (first,) = torch.autograd.grad(y.square().sum(), given[0], create_graph=True)
    with pytest.raises(UserError, match="a first derivative and no second: choose backend 'loop'"):
        torch.autograd.grad(first.sum(), given[0])


def test_torch_func_maps_over_the_gradients():
    """Gradients a row, and a whole Jacobian: the loop's."""
    given = [t.detach() for t in problem(5, 3, 2)]
    rest = given[1:]

    def loss(x, delta, B, C, h0, how):
        delta, B, C, h0 = (t[None] for t in (delta, B, C, h0))
        y, h = how(x[None], delta, rest[1], B, C, h0)
        return y.square().sum() + h.sum()

    rows = torch.func.vmap(torch.func.grad(loss, (0, 1, 4)), (0, 0, 0, 0, 0, None))
    mapped = given[0], rest[0], rest[2], rest[3], rest[4]
    torch.testing.assert_close(rows(*mapped, parallel), rows(*mapped, loop))
    jacobian = lambda how: torch.func.jacrev(lambda x: how(x, *rest)[0])(given[0])
    torch.testing.assert_close(jacobian(parallel), jacobian(loop))
    a, b, h0 = chain(5, 2)
    whole = torch.func.jacrev(linear_recurrence, (0, 1, 2))(a, b, h0)
    torch.testing.assert_close(whole, torch.func.jacrev(steps_one_by_one, (0, 1, 2))(a, b, h0))


def test_torch_func_differentiates_the_plain_scan():
    torch.manual_seed(0)
    x, delta = torch.randn(2, 7, 2).double(), torch.rand(2, 7, 2).double()
    A, B, C = -torch.rand(2, 4).double(), *torch.randn(2, 2, 7, 4).double()

    def gradients(how):
        def loss(*given):
            y, last = how(*given, None)
            return y.square().sum() + last.sum()

        return torch.func.grad(loss, (0, 1, 2, 3, 4))(x, delta, A, B, C)

    torch.testing.assert_close(gradients(partial(parallel, chunk=3)), gradients(loop))
    found = torch.func.grad(lambda a: linear_recurrence(a, x).square().sum())(delta)
    delta.requires_grad_()
    linear_recurrence(delta, x).square().sum().backward()
    torch.testing.assert_close(found, delta.grad)


@each_method
@pytest.mark.parametrize("length", LENGTHS)
def test_gradients_of_the_recurrence_are_those_of_the_loop(method, length):
    arguments = [t.requires_grad_() for t in chain(length, 5, 3)]
    ours, exact = linear_recurrence(*arguments, method=method), steps_one_by_one(*arguments)
    weights = torch.randn_like(exact)
    torch.testing.assert_close(ours, exact, rtol=1e-11, atol=1e-11)
    for mine, theirs in zip(*(torch.autograd.grad(h, arguments, weights) for h in (ours, exact))):
        # gradients of A grow by up to 1.2 a step here, so compare with the largest
        assert (mine - theirs).abs().max() <= 1e-11 * theirs.abs().max()


def test_autograd_through_hillis_steele_is_the_written_backward():
    a, b, _ = (t.requires_grad_() for t in chain(65, 3))
    weights = torch.randn(2, 65, 3, dtype=torch.float64)
    through, written = (
        torch.autograd.grad(f(a, b), (a, b), weights) for f in (hillis_steele, linear_recurrence)
    )
    for one, two in zip(through, written):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)


@each_method
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("d_inner, d_state", [(1, 1), (7, 3), (5, 16), (33, 4)])
def test_parallel_is_the_loop(method, length, d_inner, d_state):
    exact = run(loop, problem(length, d_inner, d_state))
    # one chunk, and chunks that do not divide the length
    for chunk in (None, 20):
        ours = run(partial(parallel, method=method, chunk=chunk), problem(length, d_inner, d_state))
        assert worst(ours, exact) < 1e-12  # the same sums in another order, float64


@each_method
@pytest.mark.parametrize("length", [65, 257])
def test_parallel_in_float32(method, length):
    exact = run(loop, problem(length, 33, 4))
    ours = run(lambda *t: parallel(*t, method=method), problem(length, 33, 4, dtype=torch.float32))
    assert all(t.dtype == torch.float32 for t in ours.values())
    # float32 has 6e-8 a rounding; sums over 257 steps and 33 channels collect some dozens of them
    assert worst(ours, exact) < 5e-6


@each_method
@pytest.mark.parametrize("length, chunk", [(1, 4), (7, 3), (8, 4), (9, 20)])
def test_gradients_of_parallel_are_numerical_gradients(method, length, chunk):
    arguments = problem(length, 3, 2)
    assert torch.autograd.gradcheck(lambda *t: parallel(*t, method=method, chunk=chunk), arguments)


@pytest.mark.parametrize("chunk", [1, 2, 3, 64, 65, 1000])
def test_any_chunk_gives_the_same(chunk):
    exact = run(loop, problem(65))
    assert worst(run(lambda *t: parallel(*t, chunk=chunk), problem(65)), exact) < 1e-12


def test_large_problems_are_cut_into_rows_and_chunks(monkeypatch):
    """The peak of memory is that of a chunk: no tensor of (B, L, D, N) is ever made."""
    d_inner, d_state, length, largest = 7, 13, 4 * SHORTEST_CHUNK + 1, 0
    exact = run(loop, problem(length, d_inner, d_state))
    monkeypatch.setitem(CHUNK_ELEMENTS, "cpu", 1)

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            largest = max(largest, out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    with Largest():
        ours = run(parallel, problem(length, d_inner, d_state))
    assert worst(ours, exact) < 1e-12
    # the largest tensor is a chunk, or B and C
    assert largest <= max(SHORTEST_CHUNK * d_inner * d_state, 2 * length * d_state)


def test_no_initial_state_is_a_state_of_zeros():
    *arguments, h0 = problem(65)
    y, h = parallel(*arguments, torch.zeros_like(h0))
    for ours in (parallel(*arguments), parallel(*arguments, None)):
        assert torch.equal(ours[0], y) and torch.equal(ours[1], h)
    a, b, h0 = chain(65, 3)
    torch.testing.assert_close(
        linear_recurrence(a, b), linear_recurrence(a, b, torch.zeros_like(h0))
    )


@each_method
def test_strided_arguments(method):
    def strided(t):
        """The same values in memory that skips every second entry, two dimensions exchanged."""
        wide = t.detach().transpose(0, 1).repeat_interleave(2, -1)
        return wide[..., ::2].transpose(0, 1).requires_grad_()

    exact = run(loop, problem(65))
    arguments = [strided(t) for t in problem(65)]
    assert not any(t.is_contiguous() for t in arguments)
    assert worst(run(lambda *t: parallel(*t, method=method), arguments), exact) < 1e-12
    a, b, h0 = (strided(t).detach() for t in chain(65, 5, 3))
    torch.testing.assert_close(SCANS[method](a, b), steps_one_by_one(a, b), rtol=1e-11, atol=1e-11)
    # a gradient that arrives expanded has stride 0
    leaf = b.clone().requires_grad_()
    linear_recurrence(a, leaf, h0, method).sum().backward()
    again = b.clone().requires_grad_()
    steps_one_by_one(a, again, h0).sum().backward()
    torch.testing.assert_close(leaf.grad, again.grad, rtol=1e-11, atol=1e-9)


@each_method
@pytest.mark.parametrize("step", [0.0, 1e-30, 1e-8, 50.0, 1e4, 1e30])
def test_extreme_steps_neither_overflow_nor_become_nan(method, step):
    """exp(delta A) runs from 1 to 0; products of it may underflow to 0, which is right."""
    arguments = problem(65, dtype=torch.float32)
    arguments[1] = torch.full_like(arguments[1], step).requires_grad_()
    exact = [t.detach().double().requires_grad_() for t in arguments]
    ours, exact = run(lambda *t: parallel(*t, method=method), arguments), run(loop, exact)
    assert all(torch.isfinite(t).all() for t in ours.values())
    for name, value in exact.items():
        # sums over 65 steps and 5 channels; what is below the smallest float32 may be 0
        bound = 5e-6 * value.abs().max() + torch.finfo(torch.float32).tiny
        assert (ours[name] - value).abs().max() <= bound, name


def test_states_that_are_carried_are_the_whole():
    x, delta, A, B, C, h0 = (t.detach() for t in problem(65))
    y, last = parallel(x, delta, A, B, C, h0)
    h, parts = h0, []
    for begin, end in ((0, 1), (1, 40), (40, 65)):
        part, h = parallel(
            *(t[:, begin:end] for t in (x, delta)), A, *(t[:, begin:end] for t in (B, C)), h
        )
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 1), y)
    torch.testing.assert_close(h, last)


@pytest.mark.parametrize("seed", range(5))
def test_nothing_later_reaches_back(seed):
    """Changing the input at step t changes no output before t."""
    torch.manual_seed(seed)
    x, delta, A, B, C, h0 = (t.detach() for t in problem(65, seed=seed))
    t = int(torch.randint(1, 65, ()))
    other = x.clone()
    other[:, t:] += 1
    one, two = (parallel(v, delta, A, B, C, h0, chunk=16)[0] for v in (x, other))
    assert torch.equal(one[:, :t], two[:, :t]) and not torch.equal(one[:, t], two[:, t])


def test_mistakes_are_one_sentence():
    a, b, h0 = chain(9, 3)
    with pytest.raises(UserError, match=r"one shape \(B, L, …\), not \(2, 8, 3\) and \(2, 9, 3\)"):
        blelloch(a[:, 1:], b)
    with pytest.raises(UserError, match=r"h0 of shape \(2, 3\), not \(2, 1\)"):
        linear_recurrence(a, b, h0[:, :1])
    with pytest.raises(UserError, match="'tree' is unknown: choose blelloch or hillis_steele"):
        linear_recurrence(a, b, method="tree")
    with pytest.raises(UserError, match="not list and"):
        linear_recurrence([1.0], b)
    with pytest.raises(UserError, match="a chunk of 0 steps holds none"):
        parallel(*problem(3), chunk=0)
    with pytest.raises(UserError, match="at least one step of time"):
        parallel(*problem(0))
    with pytest.raises(UserError, match="no gradient: use linear_recurrence"):
        blelloch(a, b.requires_grad_())
    assert set(METHODS) == set(SCANS)


@each_method
def test_an_empty_sequence_is_empty(method):
    a, b, h0 = (t.requires_grad_() for t in chain(0, 3))
    h = linear_recurrence(a, b, h0, method)
    assert h.shape == (2, 0, 3)
    h.sum().backward()
    assert torch.equal(h0.grad, torch.zeros_like(h0))
