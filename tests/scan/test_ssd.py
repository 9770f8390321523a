"""Claims about lib.scan.ssd: the chunks are the loop, the loop is the selective scan,
and nothing is lost.
"""

import pytest
import torch

from lib.env.errors import UserError
from lib.scan import selective_scan, ssd_scan, ssd_step
from lib.scan.ssd import chunked, segment_sum

LENGTHS = (1, 2, 63, 64, 65, 257)
ARGUMENTS = ("x", "delta", "A", "B", "C", "D", "h0")


def problem(length, heads=3, channels=5, d_state=4, batch=2, dtype=torch.float64, seed=0):
    """Random arguments, all of them asking for a gradient; rates as models have them, -16 to -1."""
    random = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=random, dtype=torch.float64)
    arguments = {
        "x": draw(batch, length, heads, channels),
        "delta": 0.3 * draw(batch, length, heads).abs(),
        "A": -1 - 15 * torch.rand(heads, generator=random, dtype=torch.float64),
        "B": draw(batch, length, d_state),
        "C": draw(batch, length, d_state),
        "D": draw(heads),
        "h0": draw(batch, heads, channels, d_state),
    }
    return {name: tensor.to(dtype).requires_grad_() for name, tensor in arguments.items()}


def run(arguments, scan):
    """Outputs and every gradient of a random loss, in float64."""
    y, h = scan(**arguments)
    random = torch.Generator().manual_seed(1)
    weigh = lambda t: (
        t.double() * torch.randn(t.shape, generator=random, dtype=torch.float64)
    ).sum()
    loss = weigh(y) + weigh(h)
    gradients = torch.autograd.grad(loss, [arguments[name] for name in ARGUMENTS])
    found = {"y": y, "h": h} | {f"d{name}": g for name, g in zip(ARGUMENTS, gradients)}
    return {name: tensor.detach().double() for name, tensor in found.items()}


def with_backend(backend):
    return lambda **arguments: ssd_scan(**arguments, return_last_state=True, backend=backend)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_chunks_are_the_loop_with_every_gradient(length, dtype, tolerance):
    """float32: sums of some hundred terms near 1 in another order;
    relative to the largest entry.
    """
    wanted = run(problem(length), with_backend("loop"))
    found = run(problem(length, dtype=dtype), with_backend("chunked"))
    for name, right in wanted.items():
        scale = right.abs().max().clamp(min=1)
        assert (found[name] - right).abs().max() <= tolerance * scale, name


@pytest.mark.parametrize("chunk", [1, 2, 7, 64, 300])
def test_any_length_of_a_chunk_gives_the_same(chunk):
    arguments = {name: tensor.detach() for name, tensor in problem(65).items() if name != "D"}
    y, h = chunked(**arguments, chunk=chunk)
    wanted, last = chunked(**arguments, chunk=65)
    torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(h, last, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("length", [1, 65])
def test_it_is_the_selective_scan_whose_decay_is_the_same_in_a_head(length):
    """Mamba's scan with A (D, N) filled from one number a head,
    and the step of a head at all its channels.
    """
    heads, channels, d_state = 3, 5, 4
    a = {
        name: tensor.detach() for name, tensor in problem(length, heads, channels, d_state).items()
    }
    y, h = ssd_scan(**a, return_last_state=True)
    each = lambda t: t.repeat_interleave(channels, -1)
    wanted, last = selective_scan(
        a["x"].flatten(2),
        each(a["delta"]),
        each(a["A"])[:, None].expand(-1, d_state),
        a["B"],
        a["C"],
        each(a["D"]),
        h0=a["h0"].flatten(1, 2),
        return_last_state=True,
        backend="loop",
    )
    torch.testing.assert_close(y.flatten(2), wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(h.flatten(1, 2), last, rtol=1e-12, atol=1e-12)


def test_it_is_attention_under_the_decaying_mask():
    a = {name: tensor.detach() for name, tensor in problem(40).items() if name not in ("D", "h0")}
    log_decay = (a["delta"] * a["A"]).transpose(1, 2)  # (B, H, L)
    mask = torch.zeros(*log_decay.shape, 40, dtype=torch.float64)
    for t in range(40):
        for s in range(t + 1):
            mask[..., t, s] = torch.exp(log_decay[..., s + 1 : t + 1].sum(-1))
    scores = torch.einsum("btn,bsn->bts", a["C"], a["B"])[:, None]
    wanted = torch.einsum("bhts,bsh,bshp->bthp", mask * scores, a["delta"], a["x"])
    torch.testing.assert_close(ssd_scan(**a), wanted, rtol=1e-11, atol=1e-11)


def test_gradients_are_numerical_gradients():
    arguments = problem(5, 2, 2, 2, 1)
    function = lambda *tensors: with_backend("chunked")(**dict(zip(ARGUMENTS, tensors)))
    assert torch.autograd.gradcheck(function, [arguments[name] for name in ARGUMENTS])


@pytest.mark.parametrize("cuts", [(0, 1, 64, 130), (0, 65, 130), (0, 0, 129, 130)])
def test_the_state_goes_on_from_segment_to_segment(cuts):
    a = {name: tensor.detach() for name, tensor in problem(130).items()}
    wanted, last = ssd_scan(**a, return_last_state=True)
    h, parts = a.pop("h0"), []
    for begin, end in zip(cuts, cuts[1:]):
        piece = {name: a[name][:, begin:end] for name in ("x", "delta", "B", "C")}
        y, h = ssd_scan(**(a | piece), h0=h, return_last_state=True)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(h, last, rtol=1e-12, atol=1e-12)


def test_step_is_the_scan_one_position_at_a_time_and_leaves_its_state_alone():
    a = {name: tensor.detach() for name, tensor in problem(30).items()}
    wanted, last = ssd_scan(**a, return_last_state=True)
    h = a["h0"]
    for t in range(30):
        before = h.clone()
        y, after = ssd_step(
            h, a["x"][:, t], a["delta"][:, t], a["A"], a["B"][:, t], a["C"][:, t], a["D"]
        )
        assert torch.equal(h, before)
        torch.testing.assert_close(y, wanted[:, t], rtol=1e-12, atol=1e-12)
        h = after
    torch.testing.assert_close(h, last, rtol=1e-12, atol=1e-12)


def test_segment_sums_are_sums_and_keep_small_ones_beside_large_ones():
    """Near 10,000 a float32 knows thousandths at best,
    so that a difference of totals loses a decay of 1e-4.
    """
    log_decay = torch.full((300,), -1e-4)
    log_decay[0] = -1e4
    exact = log_decay.double()
    wanted = torch.stack(
        [torch.stack([exact[s + 1 : t + 1].sum() for s in range(300)]) for t in range(300)]
    )
    found = segment_sum(log_decay)
    below = torch.ones(300, 300, dtype=torch.bool).tril()
    assert torch.all(found[~below] == -torch.inf)
    assert torch.all(found[below] <= 0)
    torch.testing.assert_close(found[below].double(), wanted[below], rtol=1e-5, atol=0)
    totals = log_decay.cumsum(0)
    naive = totals[:, None] - totals
    assert (naive.double() - wanted)[below].abs().max() > 5e-4  # the trap of notebook 11


def test_decays_that_underflow_give_zeros_and_no_nan():
    a = problem(130, dtype=torch.float32)
    a["delta"] = torch.full_like(a["delta"], 100.0).requires_grad_()
    found = run(a, with_backend("chunked"))
    assert all(torch.isfinite(tensor).all() for tensor in found.values())


def test_bfloat16_products_stay_near_and_the_state_is_float32():
    a = {name: tensor.detach() for name, tensor in problem(130, dtype=torch.float32).items()}
    wanted = ssd_scan(**a)
    with torch.autocast("cpu", torch.bfloat16):
        y, h = ssd_scan(
            **{name: t.bfloat16() if name in "xBC" else t for name, t in a.items()},
            return_last_state=True,
        )
    assert y.dtype == h.dtype == torch.float32
    # bfloat16 keeps 8 bits: each factor is off by 2^-9 at most, three of them in a product
    assert (y - wanted).norm() < 0.01 * wanted.norm()


def test_what_does_not_fit_is_named_in_one_sentence():
    a = {name: tensor.detach() for name, tensor in problem(4).items()}
    for name, wrong in [
        ("x", a["x"][0]),
        ("delta", a["delta"][:, :3]),
        ("A", a["A"][:2]),
        ("C", a["C"][..., :2]),
        ("h0", a["h0"][..., :1]),
        ("D", a["x"]),
    ]:
        with pytest.raises(UserError, match=f"\\b{name}\\b"):
            ssd_scan(**(a | {name: wrong}))
    with pytest.raises(UserError, match="choose loop or chunked"):
        ssd_scan(**a, backend="fast")
    with pytest.raises(UserError, match="step needs"):
        ssd_step(a["h0"], a["x"], a["delta"], a["A"], a["B"], a["C"])


@pytest.mark.parametrize("shape", [(0, 3, 2, 4, 5), (2, 0, 2, 4, 5), (2, 3, 2, 4, 0)])
def test_nothing_to_scan_is_nothing(shape):
    batch, length, heads, channels, d_state = shape
    a = {
        name: tensor.detach()
        for name, tensor in problem(length, heads, channels, d_state, batch).items()
    }
    y, h = ssd_scan(**a, return_last_state=True)
    assert y.shape == a["x"].shape and h.shape == a["h0"].shape


@pytest.mark.parametrize("backend", ["loop", "chunked"])
def test_y_and_the_state_are_float32_under_autocast_and_the_loop_is_not_rounded(backend):
    given = {k: v.detach().float() for k, v in problem(70).items() if k != "D"}
    scan = lambda: ssd_scan(**given, return_last_state=True, backend=backend)
    plain = scan()
    with torch.autocast("cpu", torch.bfloat16):
        inside = scan()
    for one, other in zip(inside, plain):
        assert one.dtype == torch.float32
        # bfloat16 has 8 bits: products of `chunked` are autocast's to round
        assert (one - other).abs().max() <= (0 if backend == "loop" else 0.02) * other.abs().max()


def test_no_step_of_time_leaves_the_state_in_memory_of_its_own():
    given = {k: v.detach() for k, v in problem(0).items()}
    _, last = ssd_scan(**given, return_last_state=True)
    last.zero_()
    assert given["h0"].abs().max() > 0


def test_a_chunk_of_no_steps_is_refused():
    given = [problem(3)[name] for name in ("x", "delta", "A", "B", "C")]
    with pytest.raises(UserError, match="a chunk of 0 steps holds none"):
        chunked(*given, chunk=0)
