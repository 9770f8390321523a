"""Claims about Mamba-3's block beyond those that all rivals keep (tests/lab/test_rivals.py):
its parts, one by one.
"""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from lib.env.errors import UserError
from lib.mamba.mamba3 import Mamba3Config, Mamba3LM, Mamba3Mixer

CONFIG = Mamba3Config(11, d_model=12, n_layer=1, d_state=8, head_dim=8)


def make(config=CONFIG, seed=0):
    torch.manual_seed(seed)
    mixer = Mamba3Mixer(config).double().eval()
    with torch.no_grad():  # as after training
        for parameter in mixer.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return mixer


def by_hand(mixer, u):
    """The block from the paper's equations, position by position,
    with a complex state, in float64.
    """
    c, w = mixer.config, dict(mixer.named_parameters())
    H, P, N, R = c.n_head, c.head_dim, c.d_state, c.n_angle
    norm = lambda t, weight: t / (t.square().mean(-1, keepdim=True) + c.norm_eps).sqrt() * weight
    h = torch.zeros(len(u), H, P, N // 2, dtype=torch.complex128)
    write = torch.zeros_like(h)
    out = []
    for t in range(u.shape[1]):
        parts = (u[:, t] @ w["in_proj.weight"].T).split([H * P, H * P, N, N, H, H, H, R], -1)
        z, x, B, C, delta, rate, trap, speed = parts
        delta = F.softplus(delta + w["dt_bias"])
        alpha = torch.exp(-F.softplus(rate).clamp(min=1e-4) * delta)[..., None, None]
        lam = torch.sigmoid(trap)
        B = norm(B, w["B_norm.weight"])[:, None] + w["B_bias"][:, 0]
        C = norm(C, w["C_norm.weight"])[:, None] + w["C_bias"][:, 0]
        b, c_ = (torch.view_as_complex(v.unflatten(-1, (-1, 2)).contiguous()) for v in (B, C))
        # the first R pairs turn, the rest does not
        phi = F.pad(math.pi * torch.tanh(speed)[:, None] * delta[..., None], (0, N // 2 - R))
        back = torch.exp(-1j * phi)[:, :, None]
        x = x.unflatten(-1, (H, P))
        now = x[..., None] * b[:, :, None]
        wide = lambda v: v[..., None, None]
        h = (
            alpha * back * h
            + wide((1 - lam) * delta) * alpha * back * write
            + wide(lam * delta) * now
        )
        write = now
        y = (h * c_.conj()[:, :, None]).sum(-1).real + w["D"][:, None] * x
        out.append((y.flatten(1) * F.silu(z)) @ w["out_proj.weight"].T)
    return torch.stack(out, 1)


@pytest.mark.parametrize("rope_fraction", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("length", [1, 70])
def test_the_block_is_the_papers_equations_with_a_complex_state(rope_fraction, length):
    mixer = make(replace(CONFIG, rope_fraction=rope_fraction))
    u = torch.randn(2, length, 12, dtype=torch.float64)
    memory = tuple(t.double() for t in mixer.new_memory(2))
    for backend in ("loop", "chunked"):
        # norms are computed in float32, as in every block here
        torch.testing.assert_close(
            mixer(u, memory, backend)[0], by_hand(mixer, u), rtol=1e-5, atol=1e-5
        )


def test_without_turn_and_trapezium_nothing_asks_for_them():
    names = dict(make(replace(CONFIG, rope_fraction=0.0, trapezoid=False)).named_parameters())
    heads = CONFIG.n_head
    assert names["in_proj.weight"].shape[0] == 2 * CONFIG.d_inner + 2 * CONFIG.d_state + 2 * heads
    full = dict(make().named_parameters())
    assert (
        full["in_proj.weight"].shape[0] == names["in_proj.weight"].shape[0] + heads + CONFIG.n_angle
    )


def test_sizes_that_no_block_has_are_one_sentence():
    with pytest.raises(UserError, match="do not split into heads"):
        replace(CONFIG, head_dim=7)
    with pytest.raises(UserError, match="rope_fraction"):
        replace(CONFIG, rope_fraction=1.5)


def test_nothing_read_leaves_the_memory_as_it_is():
    torch.manual_seed(0)
    model = Mamba3LM(CONFIG).eval()
    ids = torch.randint(11, (2, 5))
    _, state = model(ids, return_state=True)
    _, same = model(ids[:, :0], state, return_state=True)
    assert all(torch.equal(a, b) for x, y in zip(state, same) for a, b in zip(x, y))
