"""Claims about lib.scan.ssm: three discretisations, recurrence = convolution, HiPPO,
S4D in all its ways to run.
"""

import math

import numpy as np
import pytest
import torch
from numpy.polynomial.legendre import Legendre

from lib.env.errors import UserError
from lib.scan import ssm
from lib.scan.selective import selective_scan

LENGTHS = (1, 2, 63, 64, 65, 257)
SPRING = torch.tensor([[0.0, 1], [-((2 * math.pi) ** 2), -1]], dtype=torch.float64)
PUSH, SEEN = (
    torch.tensor([0.0, 1], dtype=torch.float64),
    torch.tensor([1.0, 0], dtype=torch.float64),
)
# float64 rounds at 1e-16; a few hundred steps collect some of it
CLOSE = {"rtol": 1e-11, "atol": 1e-11}


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def diagonal(*shape):
    """A, B, C of damped springs, complex."""
    A = torch.complex(-draw(*shape).exp(), 3 * draw(*shape, seed=1))
    return A, *(torch.complex(draw(*shape, seed=s), draw(*shape, seed=s + 1)) for s in (2, 4))


def layer(d_model=5, d_state=6, dtype=torch.float64):
    torch.manual_seed(0)
    return ssm.S4D(d_model, d_state).to(dtype)


# Discretisation


def test_zoh_is_the_integral_over_one_step():
    """B_bar against the integral of exp(sA) B, added up by Simpson's rule."""
    delta, pieces = 0.3, 400
    s = torch.linspace(0, delta, pieces + 1, dtype=torch.float64)
    weight = (
        torch.tensor([1.0] + [4, 2] * (pieces // 2 - 1) + [4, 1], dtype=torch.float64)
        * delta
        / pieces
        / 3
    )
    A_bar, B_bar = ssm.discretize(SPRING, PUSH, delta)
    integral = (weight[:, None] * (torch.linalg.matrix_exp(s[:, None, None] * SPRING) @ PUSH)).sum(
        0
    )
    torch.testing.assert_close(B_bar, integral, rtol=0, atol=1e-9)  # Simpson's own error
    torch.testing.assert_close(A_bar, torch.linalg.matrix_exp(delta * SPRING), **CLOSE)


@pytest.mark.parametrize("method", ssm.METHODS)
def test_diagonal_is_dense_with_zeros_beside(method):
    a, b = -draw(4).exp(), draw(4, seed=1)
    A_bar, B_bar = ssm.discretize(torch.diag(a), b, 0.2, method)
    a_bar, b_bar = ssm.discretize(a, b, 0.2, method)
    torch.testing.assert_close(A_bar, torch.diag(a_bar), **CLOSE)
    torch.testing.assert_close(B_bar, b_bar, **CLOSE)


def test_a_spring_is_one_complex_number():
    values, vectors = torch.linalg.eig(SPRING)
    B, C = torch.linalg.solve(vectors, PUSH.to(vectors.dtype)), SEEN.to(vectors.dtype) @ vectors
    x = draw(65)
    dense, _ = ssm.recurrence(*ssm.discretize(SPRING, PUSH, 0.1), SEEN, x)
    one, _ = ssm.recurrence(*ssm.discretize(values[:1], B[:1], 0.1), C[:1], x)
    torch.testing.assert_close(2 * one.real, dense, **CLOSE)


@pytest.mark.parametrize("method, order", [("euler", 1), ("bilinear", 2)])
def test_order_of_convergence(method, order):
    """Left alone for a second: halving the step divides the error by 2 to the order."""
    truth = (torch.linalg.matrix_exp(SPRING) @ SEEN)[0]
    error = []
    for steps in (1024, 2048):
        system = ssm.discretize(SPRING, PUSH, 1 / steps, method)
        y, _ = ssm.recurrence(*system, SEEN, torch.zeros(steps, dtype=torch.float64), SEEN)
        error.append(abs(y[-1] - truth))
    assert math.log2(error[0] / error[1]) == pytest.approx(order, abs=0.05)


@pytest.mark.parametrize("method", ["zoh", "euler"])
def test_zoh_is_exact_at_any_step_and_euler_explodes(method):
    """A push held for 6 s, seen every 0.1 s, against the closed solution."""
    x = torch.ones(60, dtype=torch.float64)
    y, _ = ssm.recurrence(*ssm.discretize(SPRING, PUSH, 0.1, method), SEEN, x)
    t = 0.1 * torch.arange(1, 61, dtype=torch.float64)
    rest = -torch.linalg.solve(SPRING, PUSH)
    truth = (rest + torch.linalg.matrix_exp(t[:, None, None] * SPRING) @ -rest)[:, 0]
    error = (y - truth).abs().max()
    assert error < 1e-12 if method == "zoh" else error > 1


def test_phi_is_exact_near_zero_and_so_is_its_gradient():
    # the quotient's gradient loses eps/z
    for dtype, close in ((torch.float32, 3e-4), (torch.float64, 1e-12)):
        z = torch.tensor([0, 1e-8, -9e-4, -1.1e-3, -0.5, -30], dtype=dtype, requires_grad=True)
        high = [
            (
                math.expm1(v) / v if v else 1.0,
                (v * math.exp(v) - math.expm1(v)) / v**2
                if abs(v) > 1e-2
                else 0.5 + v / 3 + v * v / 8 + v**3 / 30,
            )
            for v in z.tolist()
        ]
        y = ssm.phi(z)
        y.sum().backward()
        torch.testing.assert_close(y, torch.tensor([h[0] for h in high], dtype=dtype))
        torch.testing.assert_close(
            z.grad, torch.tensor([h[1] for h in high], dtype=dtype), rtol=close, atol=close
        )
    z = torch.tensor(
        [0, 1e-4 + 1e-4j, 9e-4j, 2e-3j, -0.3 + 5j], dtype=torch.complex128, requires_grad=True
    )
    assert torch.autograd.gradcheck(ssm.phi, z)


def test_a_singular_matrix_has_a_zero_order_hold():
    """A mass without a spring: position is the double sum of the force."""
    A = torch.tensor([[0.0, 1], [0, 0]], dtype=torch.float64)
    _, B_bar = ssm.discretize(A, PUSH, 0.5)
    torch.testing.assert_close(B_bar, torch.tensor([0.125, 0.5], dtype=torch.float64), **CLOSE)


def test_the_scan_multiplies_by_delta_times_B():
    """lib.scan is the method "mamba", not the exact hold: the official choice."""
    a, b, x = -draw(7, 3).exp(), draw(7, 3, seed=1), draw(1, 65, 7, seed=2)
    y, _ = ssm.recurrence(*ssm.discretize(a, b[:1].expand(7, 3), 0.3, "mamba"), b, x)
    for channel in range(7):
        scanned = selective_scan(
            x,
            torch.full_like(x, 0.3),
            a,
            b[:1].expand(1, 65, 3),
            b[channel].expand(1, 65, 3),
            backend="loop",
        )
        torch.testing.assert_close(scanned[..., channel], y[..., channel], **CLOSE)
    exact, _ = ssm.recurrence(*ssm.discretize(a, b[:1].expand(7, 3), 0.3), b, x)
    assert (exact - y).abs().max() > 0.01


def test_many_steps_at_once():
    delta = torch.tensor([0.1, 0.7], dtype=torch.float64)
    for method in ssm.METHODS:
        many = ssm.discretize(SPRING, PUSH, delta, method)
        for i in range(2):
            for a, b in zip(ssm.discretize(SPRING, PUSH, delta[i].item(), method), many):
                torch.testing.assert_close(a, b[i], **CLOSE)


# Recurrence = convolution


@pytest.mark.parametrize("length", LENGTHS)
def test_convolution_is_recurrence_dense(length):
    system, x = ssm.discretize(SPRING, PUSH, 0.05), draw(length)
    y, _ = ssm.recurrence(*system, SEEN, x)
    torch.testing.assert_close(ssm.convolve(x, ssm.kernel(*system, SEEN, length)), y, **CLOSE)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("shape", [(3,), (5, 3), (3, 3)])
def test_convolution_is_recurrence_diagonal(length, shape):
    """One system for all channels, one a channel, and as many systems as states."""
    A, B, C = diagonal(*shape)
    system, x = ssm.discretize(A, B, 0.1), draw(2, length, shape[0] if len(shape) > 1 else 5)
    y, _ = ssm.recurrence(*system, C, x)
    torch.testing.assert_close(
        ssm.convolve(x, ssm.kernel(*system, C, length).real), y.real, **CLOSE
    )


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("chunk", [1, 7, 32, 300])
def test_chunks_are_recurrence(length, chunk):
    """From a state on, to the state after it, with every gradient."""
    A, B, C = diagonal(5, 3)
    system = [*ssm.discretize(A, B, 0.1), C]
    h0 = torch.complex(draw(2, 5, 3, seed=1), draw(2, 5, 3, seed=2))
    inputs = [t.clone().requires_grad_() for t in (*system, draw(2, length, 5), h0)]
    y, h = ssm.recurrence(*inputs)
    found, last = ssm.chunked(*inputs, chunk=chunk)
    assert not found.is_complex()
    torch.testing.assert_close(found, y.real, **CLOSE)
    torch.testing.assert_close(last, h, **CLOSE)

    def gradients(y, h):
        loss = (y * draw(*y.shape, seed=3)).sum() + torch.view_as_real(h).square().sum()
        return torch.autograd.grad(loss, inputs, materialize_grads=True)

    for ours, theirs in zip(gradients(found, last), gradients(y.real, h)):
        torch.testing.assert_close(ours, theirs, **CLOSE)


@pytest.mark.parametrize("length", LENGTHS)
def test_kernel_is_the_powers_of_A_bar(length):
    A_bar, B_bar = ssm.discretize(*diagonal(2, 3)[:2], 0.1)
    C = diagonal(2, 3)[2]
    power = A_bar[None] ** torch.arange(length)[:, None, None]
    torch.testing.assert_close(
        ssm.kernel(A_bar, B_bar, C, length), (C * power * B_bar).sum(-1), **CLOSE
    )


def test_kernel_takes_systems_that_explode_or_alternate():
    a, b = torch.tensor([-1.5, 0.0, 1.0]), torch.ones(3)
    expected = [(-1.5) ** k + (k == 0) + 1 for k in range(9)]
    torch.testing.assert_close(ssm.kernel(a, b, b, 9), torch.tensor(expected))


def test_nothing_wraps_around():
    """A push at the very end does not come back at the beginning, at any length."""
    for length in LENGTHS[1:]:
        x = torch.zeros(length, dtype=torch.float64)
        x[-1] = 1
        y = ssm.convolve(x, torch.ones(length, dtype=torch.float64))
        assert y[:-1].abs().max() < 1e-12 and abs(y[-1] - 1) < 1e-12


def test_a_state_carries_the_past():
    x = draw(65)
    for system, C in (
        (ssm.discretize(SPRING, PUSH, 0.1), SEEN),
        (ssm.discretize(*diagonal(3)[:2], 0.1), diagonal(3)[2]),
    ):
        whole, last = ssm.recurrence(*system, C, x)
        first, h = ssm.recurrence(*system, C, x[:40])
        second, h = ssm.recurrence(*system, C, x[40:], h)
        torch.testing.assert_close(torch.cat([first, second]), whole, **CLOSE)
        torch.testing.assert_close(h, last, **CLOSE)


# HiPPO


@pytest.mark.parametrize("n", [1, 2, 17, 32])
def test_hippo_keeps_the_legendre_coefficients_of_the_whole_past(n):
    """By zero-order hold in the clock of log t, against integrals;
    exact, as x holds still in a step.
    """
    x = draw(65)
    A, B = ssm.hippo_legs(n)
    k = torch.arange(1, 65, dtype=torch.float64)
    h = torch.cat([x[:1], torch.zeros(n - 1, dtype=torch.float64)])
    for A_bar, B_bar, x_k in zip(*ssm.discretize(A, B, torch.log((k + 1) / k)), x[1:]):
        h = A_bar @ h + B_bar * x_k
    edges = np.linspace(-1, 1, 66)
    direct = [
        math.sqrt(2 * m + 1) / 2 * np.diff(Legendre.basis(m).integ()(edges)) @ x.numpy()
        for m in range(n)
    ]
    torch.testing.assert_close(h, torch.tensor(np.array(direct)), rtol=0, atol=1e-10)


def test_hippo_is_a_normal_matrix_and_a_rank_one():
    """A + B Bᵀ/2 is -1/2 and a skew part: all its springs decay alike, as S4D's do at the start."""
    A, B = ssm.hippo_legs(31)
    normal = A + torch.outer(B, B) / 2 + torch.eye(31) / 2
    torch.testing.assert_close(normal, -normal.T)
    assert torch.allclose(-layer().A_log.exp(), torch.tensor(-0.5, dtype=torch.float64))


# S4D


def test_s4d_is_its_definition():
    """Both halves of every conjugate pair, B = 1, in a loop; then D, GELU and the gate."""
    model, u = layer(), draw(2, 65, 5)
    A = torch.complex(-model.A_log.exp(), model.A_imag)
    A, C = (torch.cat([half, half.conj()], -1) for half in (A, torch.view_as_complex(model.C)))
    system = ssm.discretize(A, torch.ones_like(A), model.log_delta.exp()[:, None])
    y, _ = ssm.recurrence(*system, C, u)
    assert A.shape == (5, 6) and y.imag.abs().max() < 1e-12
    value, gate = model.out_proj(torch.nn.functional.gelu(y.real + model.D * u)).chunk(2, -1)
    torch.testing.assert_close(model(u), value * torch.sigmoid(gate), **CLOSE)


def test_s4d_starts_as_published():
    model = layer(500, 8)
    delta = model.log_delta.detach().exp()
    assert (
        0.001 <= delta.min() < 0.0011
        and 0.09 < delta.max() <= 0.1
        and 0.008 < delta.median() < 0.0125
    )
    even = math.pi * torch.arange(4, dtype=torch.float64)
    torch.testing.assert_close(model.A_imag[3].detach(), even, rtol=1e-6, atol=0)
    assert model.C.square().sum(-1).mean().item() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("length", LENGTHS)
def test_step_matches_forward(length):
    model, u = layer(), draw(2, length, 5)
    y, last = model(u, return_state=True)
    state, ys = model.new_state(2), []
    for u_k in u.unbind(1):
        y_k, state = model.step(u_k, state)
        ys.append(y_k)
    torch.testing.assert_close(torch.stack(ys, 1), y, **CLOSE)
    torch.testing.assert_close(state, last, **CLOSE)


@pytest.mark.parametrize("length", LENGTHS)
def test_segments_with_carried_state_are_the_whole(length):
    model, u, past = layer(), draw(2, length, 5), draw(2, 9, 5, seed=1)
    _, begin = model(past, return_state=True)
    whole, last = model(u, begin, return_state=True)
    state, parts = begin, []
    for part in (u[:, :1], u[:, 1:1], u[:, 1:40], u[:, 40:]):  # an empty one too
        y, state = model(part, state, return_state=True)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole, **CLOSE)
    torch.testing.assert_close(state, last, **CLOSE)
    torch.testing.assert_close(
        torch.cat([model(past), whole], 1), model(torch.cat([past, u], 1)), **CLOSE
    )


def test_in_float32_a_long_piece_keeps_its_numbers():
    model, u = layer(3, 64, torch.float32), draw(1, 2000, 3, dtype=torch.float32)
    exact = layer(3, 64)
    with torch.no_grad():
        for p, q in zip(exact.parameters(), model.parameters()):
            p.copy_(q)
        y, last = model(u, return_state=True)
        y_64, last_64 = exact(u.double(), return_state=True)
    # A_bar is rounded once (6e-8) and taken to powers of up to 2,000
    torch.testing.assert_close(y.double(), y_64, rtol=0, atol=1e-4)
    torch.testing.assert_close(
        last.to(torch.complex128), last_64, rtol=0, atol=1e-4 * last_64.abs().max().item()
    )


def test_gradients_of_forward_are_those_of_step():
    model, u = layer(), draw(2, 33, 5)
    _, begin = model(draw(2, 9, 5, seed=1), return_state=True)
    gradients = []
    for way in ("forward", "step"):
        model.zero_grad()
        x, h = u.clone().requires_grad_(), begin.detach().clone().requires_grad_()
        if way == "forward":
            y, last = model(x, h, return_state=True)
        else:
            last, ys = h, []
            for x_k in x.unbind(1):
                y_k, last = model.step(x_k, last)
                ys.append(y_k)
            y = torch.stack(ys, 1)
        ((y * draw(*y.shape, seed=3)).sum() + last.real.square().sum() + last.imag.sum()).backward()
        gradients.append(
            {"u": x.grad, "state": h.grad}
            | {k: p.grad.clone() for k, p in model.named_parameters()}
        )
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0, f"{name} gets no gradient"
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-9, atol=1e-9, msg=name)


def test_s4d_is_causal():
    model, u = layer(), draw(1, 64, 5)
    other = u.clone()
    other[:, 40:] += 1
    y, changed = model(u), model(other)
    torch.testing.assert_close(y[:, :40], changed[:, :40], **CLOSE)  # an FFT rounds everywhere
    assert (y[:, 40:] - changed[:, 40:]).abs().max() > 0.01


def test_s4d_learns_to_repeat_after_a_delay():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(1, 8), ssm.S4D(8, 32, 0.01), torch.nn.Linear(8, 1))
    optimizer, losses = torch.optim.Adam(model.parameters(), 0.02), []
    for _ in range(80):
        x = torch.randn(8, 64, 1)
        loss = (model(x)[:, 10:] - x[:, :-10]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # guessing 0 gives 1
    assert losses[0] > 0.9 and losses[-1] < 0.4, f"{losses[0]:.2f} to {losses[-1]:.2f}"


def test_s4d_under_autocast_keeps_its_systems_in_float32():
    model, u = layer(dtype=torch.float32), draw(1, 64, 5, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = model(u, return_state=True)
    half = model.bfloat16()(u.bfloat16())
    stepped, _ = model.step(u[:, 0].bfloat16(), model.new_state(1))
    torch.testing.assert_close(stepped, half[:, 0], rtol=0, atol=0.02)
    assert y.dtype == torch.bfloat16 and state.dtype == torch.complex64
    # bfloat16 has 8 bits
    torch.testing.assert_close(y.float(), layer(dtype=torch.float32)(u), rtol=0, atol=0.02)
    assert half.dtype == torch.bfloat16 and torch.isfinite(half).all()


# A user's mistakes


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: ssm.discretize(SPRING, PUSH, 0.1, "rk4"), "method 'rk4' is unknown.*zoh"),
        (lambda: ssm.discretize(SPRING, PUSH, 0), "delta must be positive"),
        (lambda: ssm.discretize(SPRING, PUSH, math.nan), "delta must be positive"),
        (lambda: ssm.discretize(SPRING, torch.ones(3), 0.1), "A and B do not fit"),
        (lambda: ssm.discretize(torch.tensor(-1.0), torch.tensor(1.0), 0.1), "A and B do not fit"),
        (lambda: ssm.kernel(SPRING, PUSH, SEEN, -1), "-1 steps"),
        (lambda: ssm.recurrence(SPRING, PUSH, SEEN, torch.ones(2, 3)), r"a signal is of shape"),
        (
            lambda: ssm.recurrence(SPRING, PUSH, SEEN, torch.ones(3), torch.ones(3)),
            r"state must be of shape \(2,\)",
        ),
        (lambda: ssm.convolve(torch.ones(2, 9, 5), torch.ones(9, 4)), "kernel must be of shape"),
        (lambda: ssm.convolve(torch.ones(9), torch.ones(9) * 1j), "real"),
        (lambda: ssm.hippo_legs(0), "at least one"),
        (lambda: ssm.S4D(4, 5), "even number of states"),
        (lambda: ssm.S4D(4, 6, 0.1, 0.01), "dt_min"),
        (lambda: ssm.S4D(4)(torch.ones(2, 9, 3)), r"\(B, L, 4\)"),
        (lambda: ssm.S4D(4).step(torch.ones(2, 3), ssm.S4D(4).new_state(2)), r"\(B, 4\)"),
        (lambda: ssm.S4D(4).step(torch.ones(2, 4), ssm.S4D(4).new_state(3)), "a state of shape"),
        (lambda: ssm.S4D(4).step(torch.tensor(1.0), ssm.S4D(4).new_state(1)), r"\(B, 4\)"),
    ],
)
def test_a_mistake_is_one_sentence(call, words):
    with pytest.raises(UserError, match=words):
        call()
