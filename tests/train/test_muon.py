"""Muon for many matrices at once: singular values near one, and the steps of torch's own Muon."""

import pytest
import torch

from lib.mamba import MambaConfig, MambaLM
from lib.train import muon
from lib.train.config import TrainConfig
from lib.train.muon import Muon, orthogonal
from lib.train.optim import optimizers

SHAPES = [(64, 24), (7, 40), (33, 33), (64, 24), (1, 9)]


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_come_near_one_and_directions_stay(shape):
    u, s, vt = torch.linalg.svd(torch.randn(3, *shape), full_matrices=False)
    found = orthogonal(u @ torch.diag_embed(s) @ vt)
    values = torch.diagonal(u.mT @ found @ vt.mT, dim1=-2, dim2=-1)
    # five rounds bring a twentieth of the largest near one
    clear = s > 0.05 * s.max(-1, keepdim=True).values
    assert values[clear].min() > 0.6 and values[clear].max() < 1.3
    rest = found - u @ torch.diag_embed(values) @ vt
    assert rest.abs().max() < 1e-4, "nothing but the singular values changed"


@pytest.mark.parametrize("low", [False, True])
def test_steps_are_those_of_torch_up_to_rounding(monkeypatch, low):
    monkeypatch.setattr(muon, "bfloat16_is_fast", lambda: low)
    ours, theirs = ([torch.nn.Parameter(torch.ones(shape)) for shape in SHAPES] for _ in range(2))
    mine = Muon(ours, lr=0.1, weight_decay=0.2)
    torchs = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.2, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        mine.step()
        torchs.step()
    for a, b in zip(ours, theirs):
        assert (a - b).norm() < 0.03 * (b - 1).norm(), "theirs multiplies in bfloat16"
    for a, b in zip(ours, theirs):
        kept, wanted = (o.state[p]["momentum_buffer"] for o, p in ((mine, a), (torchs, b)))
        assert torch.allclose(kept, wanted, atol=1e-6)


def test_a_matrix_without_a_gradient_stays_as_it_is():
    a, b = (torch.nn.Parameter(torch.ones(4, 6)) for _ in range(2))
    a.grad = torch.randn(4, 6)
    Muon([a, b], lr=0.1).step()
    assert not torch.equal(a, torch.ones(4, 6)) and torch.equal(b, torch.ones(4, 6))


def test_it_takes_the_matrices_inside_the_blocks_and_adamw_the_rest():
    model = MambaLM(MambaConfig(11, 16, 2, 4))
    chosen = optimizers(model, TrainConfig(optimizer="muon"), torch.device("cpu"))
    taken = [p for group in chosen["muon"].param_groups for p in group["params"]]
    names = {name for name, p in model.named_parameters() if any(p is q for q in taken)}
    inside = {name.split("mixer.")[1] for name in names}
    assert inside == {"in_proj.weight", "x_proj.weight", "dt_proj.weight", "out_proj.weight"}
    others = [p for group in chosen["optimizer"].param_groups for p in group["params"]]
    assert len(taken) + len(others) == len(list(model.parameters()))
