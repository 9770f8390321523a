"""Claims about lib.scan.trapezoid: the equations of Mamba-3, in complex numbers,
and its two ends of a step.
"""

import math

import pytest
import torch

from lib.env.errors import UserError
from lib.scan import ssd_scan, trapezoid_scan
from lib.scan.trapezoid import angles, turn

LENGTHS = (1, 2, 63, 64, 65, 257)
HEADS, CHANNELS, STATE, ANGLES = 3, 4, 6, 2


def problem(length, batch=2, dtype=torch.float64, seed=0):
    """Random arguments as a block makes them, B and C not yet turned, and the angular speeds."""
    random = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=random, dtype=torch.float64)
    a_step = batch, length, HEADS
    delta = 0.5 * draw(*a_step).abs()
    arguments = {
        "x": draw(*a_step, CHANNELS),
        "delta": delta,
        "log_decay": -delta * draw(*a_step).abs(),
        "B": draw(*a_step, STATE),
        "C": draw(*a_step, STATE),
        "lam": torch.sigmoid(draw(*a_step)),
        "D": draw(HEADS),
    }
    return {name: t.to(dtype) for name, t in arguments.items()}, draw(batch, length, ANGLES).to(
        dtype
    )


def by_complex_numbers(a, speed):
    """Mamba-3 from the paper's equations, in float64:
    a complex state that turns back while it decays.

    The pairs (B[0], B[1]), … are complex numbers b. Written at s and read at t they count as
    Re(conj(c) b exp(i (θ_s - θ_t))), so the state is turned by exp(-i φ_t) at every step.
    """
    paired = lambda t: torch.view_as_complex(
        t[..., : 2 * ANGLES].unflatten(-1, (-1, 2)).contiguous()
    )
    x, B, C = a["x"], a["B"], a["C"]
    batch, length = x.shape[:2]
    h = torch.zeros(batch, HEADS, CHANNELS, ANGLES, dtype=torch.complex128)  # what turns
    # what does not turn
    g = torch.zeros(batch, HEADS, CHANNELS, STATE - 2 * ANGLES, dtype=torch.float64)
    ys = []
    for t in range(length):
        alpha = torch.exp(a["log_decay"][:, t])
        phi = math.pi * torch.tanh(speed[:, t])[:, None] * a["delta"][:, t][..., None]  # (B, H, R)
        back = torch.exp(-1j * phi)[:, :, None]
        early = (1 - a["lam"][:, t]) * a["delta"][:, t] * alpha
        late = a["lam"][:, t] * a["delta"][:, t]
        wide = lambda t: t[..., None, None]
        outer = lambda x, b: x[..., None] * b[..., None, :]
        h = wide(alpha) * back * h + wide(late) * outer(x[:, t], paired(B[:, t]))
        g = wide(alpha) * g + wide(late) * outer(x[:, t], B[:, t, :, 2 * ANGLES :])
        if t:
            h = h + wide(early) * back * outer(x[:, t - 1], paired(B[:, t - 1]))
            g = g + wide(early) * outer(x[:, t - 1], B[:, t - 1, :, 2 * ANGLES :])
        y = (h * paired(C[:, t]).conj()[:, :, None]).sum(-1).real
        y = y + (g * C[:, t, :, None, 2 * ANGLES :]).sum(-1)
        ys.append(y + a["D"][:, None] * x[:, t])
    return torch.stack(ys, 1)


def turned(a, speed):
    """The arguments with B and C turned."""
    theta = angles(speed, a["delta"], torch.zeros(len(speed), HEADS, ANGLES))
    return a | {"B": turn(a["B"], theta), "C": turn(a["C"], theta)}


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("backend", ["loop", "chunked"])
def test_turned_b_and_c_are_the_complex_state_of_the_paper(length, backend):
    a, speed = problem(length)
    y, _ = trapezoid_scan(**turned(a, speed), backend=backend)
    torch.testing.assert_close(y, by_complex_numbers(a, speed), rtol=1e-11, atol=1e-11)


def run(backend, length, dtype):
    """Outputs and every gradient of a random loss, from a random state, in float64."""
    random = torch.Generator().manual_seed(5)
    draw = lambda *shape: torch.randn(*shape, generator=random, dtype=torch.float64)
    state = {
        "h": draw(2, HEADS, CHANNELS, STATE),
        "B before": draw(2, HEADS, STATE),
        "x before": draw(2, HEADS, CHANNELS),
    }
    a, _ = problem(length)
    leaves = {name: t.to(dtype).clone().requires_grad_() for name, t in (a | state).items()}
    y, after = trapezoid_scan(
        **{name: leaves[name] for name in a},
        state=tuple(leaves[name] for name in state),
        backend=backend,
    )
    loss = sum((t.double() * draw(*t.shape)).sum() for t in (y, *after))
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    found = {"y": y, "h": after[0]} | {f"d{name}": g for name, g in zip(leaves, gradients)}
    return {name: t.detach().double() for name, t in found.items()}


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_chunks_are_the_loop_with_every_gradient(length, dtype, tolerance):
    wanted = run("loop", length, torch.float64)
    found = run("chunked", length, dtype)
    for name, right in wanted.items():
        scale = right.abs().max().clamp(min=1)
        assert (found[name] - right).abs().max() <= tolerance * scale, name


def test_lambda_of_one_is_mamba_2():
    a, _ = problem(70)
    rates = torch.tensor([-1.0, -4.0, -9.0], dtype=torch.float64)
    shared = {name: a[name][:, :, :1] for name in ("B", "C")}
    y, (h, _, _) = trapezoid_scan(
        a["x"],
        a["delta"],
        a["delta"] * rates,
        *(t.expand(-1, -1, HEADS, -1) for t in shared.values()),
        torch.ones_like(a["lam"]),
        a["D"],
    )
    wanted, last = ssd_scan(
        a["x"],
        a["delta"],
        rates,
        *(t[:, :, 0] for t in shared.values()),
        a["D"],
        return_last_state=True,
    )
    torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(h, last, rtol=1e-12, atol=1e-12)


def error_at(steps, lam):
    """How far h' = -2 h + cos 5 t is off at t = 2, in so many steps,
    x taken at the ends of each.
    """
    rate, omega, end = 2.0, 5.0, 2.0
    time = torch.linspace(0, end, steps + 1, dtype=torch.float64)
    ones = torch.ones(1, steps, 1, dtype=torch.float64)
    delta = end / steps * ones
    state = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1), torch.cos(omega * time[:1])[None, None]
    state = tuple(t.double() for t in state)
    y, _ = trapezoid_scan(
        torch.cos(omega * time[1:])[None, :, None, None],
        delta,
        -rate * delta,
        ones[..., None],
        ones[..., None],
        lam * ones,
        state=state,
    )
    steady = lambda t: (
        (rate * math.cos(omega * t) + omega * math.sin(omega * t)) / (rate**2 + omega**2)
    )
    exact = steady(end) - steady(0) * math.exp(-rate * end)
    return abs(y[0, -1, 0, 0].item() - exact)


@pytest.mark.parametrize("lam, order", [(1.0, 1), (0.5, 2), (0.0, 1)])
def test_the_trapezium_is_of_second_order_and_either_end_alone_of_first(lam, order):
    ratio = math.log2(error_at(512, lam) / error_at(1024, lam))
    assert abs(ratio - order) < 0.05


def test_the_state_goes_on_from_segment_to_segment():
    a, speed = problem(130)
    wanted, last = trapezoid_scan(**turned(a, speed))
    state, theta, parts = None, torch.zeros(2, HEADS, ANGLES), []
    for begin, end in ((0, 1), (1, 64), (64, 130)):
        piece = {name: t if name == "D" else t[:, begin:end] for name, t in a.items()}
        turns = angles(speed[:, begin:end], piece["delta"], theta)
        piece |= {"B": turn(piece["B"], turns), "C": turn(piece["C"], turns)}
        y, state = trapezoid_scan(**piece, state=state)
        theta = turns[:, -1]
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), wanted, rtol=1e-10, atol=1e-10)
    for ours, theirs in zip(state, last):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_a_full_turn_is_no_turn_and_only_differences_count():
    random = torch.Generator().manual_seed(0)
    b, c = torch.randn(2, 7, STATE, generator=random, dtype=torch.float64)
    theta, more = torch.randn(2, 7, ANGLES, generator=random, dtype=torch.float64)
    torch.testing.assert_close(turn(b, theta + 2 * math.pi), turn(b, theta))
    read = (turn(b, theta) * turn(c, theta + more)).sum(-1)
    torch.testing.assert_close(read, (turn(b, -more) * c).sum(-1))
    assert torch.equal(turn(b, theta[..., :0]), b)


def test_what_does_not_fit_is_named_in_one_sentence():
    a, _ = problem(4)
    for name, wrong in [
        ("delta", a["delta"][:, :3]),
        ("lam", a["x"]),
        ("C", a["C"][..., :2]),
        ("D", a["D"][:1]),
    ]:
        with pytest.raises(UserError, match=f"\\b{name}\\b"):
            trapezoid_scan(**(a | {name: wrong}))
    with pytest.raises(UserError, match="choose loop or chunked"):
        trapezoid_scan(**a, backend="fast")
    with pytest.raises(UserError, match="4 angles turn 8 numbers"):
        turn(a["B"], torch.zeros(2, 4, HEADS, 4))


@pytest.mark.parametrize("backend", ["loop", "chunked"])
def test_y_and_the_state_are_float32_under_autocast_and_the_loop_is_not_rounded(backend):
    given, _ = problem(70, dtype=torch.float32)
    plain, state = trapezoid_scan(**given, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        inside, after = trapezoid_scan(**given, backend=backend)
    for one, other in zip((inside, *after), (plain, *state)):
        assert one.dtype == torch.float32
        # bfloat16 has 8 bits: products of `chunked` are autocast's to round
        assert (one - other).abs().max() <= (0 if backend == "loop" else 0.02) * other.abs().max()


def test_a_state_of_another_length_is_refused():
    given, _ = problem(3)
    with pytest.raises(UserError, match="three tensors"):
        trapezoid_scan(**given, state=(given["x"],))
