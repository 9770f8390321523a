"""The ladder of the fused training step, and the curves that compare it with the plain one."""

from dataclasses import asdict

import numpy as np
import pytest
import torch

from lib.env.errors import UserError
from lib.lab.bench import curves, ladder
from lib.mamba import block_cpu
from lib.mamba.model import MambaConfig, MambaLM
from lib.scan import cpu as scan_cpu

needs_compiler = pytest.mark.skipif(
    not (scan_cpu.available() and block_cpu.available()), reason="no C++ compiler"
)


def test_each_rung_changes_one_thing():
    for bf16 in (False, True):
        fields = [asdict(rung) for rung in ladder.rungs(bf16)]
        for before, after in zip(fields, fields[1:]):
            assert sum(before[name] != after[name] for name in before) == 2, (
                "the change, and the words for it"
            )
        assert fields[-1]["muon"] and fields[-1]["bf16"] == bf16


@needs_compiler
def test_all_rungs_take_the_same_step(monkeypatch):
    monkeypatch.setattr(
        ladder, "SIZES", {"vocab_size": 17, "d_model": 24, "n_layer": 2, "d_state": 4}
    )
    torch.manual_seed(0)
    weights = MambaLM(MambaConfig(**ladder.SIZES)).state_dict()
    tokens = torch.randint(17, (2, 30))
    curves_of = {}
    for rung in ladder.rungs(bf16=False):
        step = ladder.step_of(rung, weights, tokens)
        curves_of[rung.change] = [step() for _ in range(3)]
    *adamw, muon = curves_of.values()
    for other in adamw[1:]:
        assert other == pytest.approx(adamw[0], abs=1e-4)
    assert muon[0] == pytest.approx(adamw[0][0], abs=1e-4)
    assert muon[2] != pytest.approx(adamw[0][2], abs=1e-3), (
        "the first step is a loss; then optimisers part"
    )


def test_too_few_rounds_are_refused():
    with pytest.raises(UserError, match="quartiles"):
        ladder.main(["--rounds", "2"])


@needs_compiler
def test_plain_and_fused_give_one_loss():
    torch.manual_seed(1)
    model = MambaLM(MambaConfig(19, 16, 2, 4))
    tokens = torch.randint(19, (3, 21))
    targets = torch.randint(-1, 19, (3, 21))
    plain, fused = (curves.loss_of(model, tokens, targets, fused).item() for fused in (False, True))
    assert plain == pytest.approx(fused, abs=0.02), "products are in bfloat16"


def test_the_summary_pairs_seeds():
    runs = {}
    for seed, level in enumerate((1.0, 2.0, 4.0)):
        runs[f"fused {seed}"] = [9.0] * 12 + [level] * curves.LAST
        runs[f"plain {seed}"] = [9.0] * 12 + [level + 0.1] * curves.LAST
    found = curves.summary(runs, [0, 1, 2])
    assert "muon" not in found, "it has not run"
    assert found["fused"] == {"mean": pytest.approx(7 / 3), "lowest": 1.0, "highest": 4.0}
    assert found["plain"]["minus_fused"] == pytest.approx(0.1)
    assert found["plain"]["half_interval"] == pytest.approx(0, abs=1e-9), (
        "the same gap at every seed"
    )
    runs["plain 2"][-curves.LAST :] = [5.0] * curves.LAST
    gaps = np.array([0.1, 0.1, 1.0])
    half = 4.302653 * gaps.std(ddof=1) / 3**0.5  # Student's t for two degrees of freedom
    assert curves.summary(runs, [0, 1, 2])["plain"]["half_interval"] == pytest.approx(
        half, rel=1e-5
    )
