"""Claims about the rungs, the live plot and the reciting of what was learnt by heart."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from made_up import TINY, make_streams, quiet
from torch import nn

from lib.mamba.model import MambaConfig, MambaLM
from lib.train.live import LivePlot
from lib.train.rungs import HEART, by_heart, climb, memorise, recite
from lib.train.trainer import Trainer


def test_a_mamba_learns_a_sequence_by_heart_and_recites_it(tmp_path):
    rung = climb("1", np.arange(150), 150, tmp_path, config=replace(HEART, d_model=32))
    assert rung.passed and rung.loss < 0.02 and "150 of 150" in rung.said


def test_a_model_with_a_bug_does_not_climb(tmp_path):
    """One that cannot see what it has just read; the loss stays at what chance gives."""

    class Blind(MambaLM):
        def forward(self, tokens, *args, **options):
            return super().forward(torch.zeros_like(tokens), *args, **options)

    rung = climb(
        "1",
        np.arange(100),
        100,
        tmp_path,
        build=lambda: Blind(MambaConfig(100, 16, 1)),
        config=replace(HEART, steps=30),
    )
    assert not rung.passed and rung.loss > 3


def test_another_architecture_can_climb(tmp_path):
    """Anything with MambaLM's interface: here a table of pairs,
    which is all that counting needs.
    """

    class Pairs(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(60, 60)
            self.device = torch.device("cpu")

        def new_state(self, batch=1):
            return [(torch.zeros(batch, 1, 1),) * 2]

        def forward(self, tokens, state=None, *, return_state=False, last_only=False):
            return (self.table(tokens), state) if return_state else self.table(tokens)

        def step(self, tokens, state):
            return self.table(tokens), state

    trainer = memorise(by_heart(np.arange(60), 60), tmp_path, replace(HEART, lr=0.5), build=Pairs)
    assert (recite(trainer.model, 0, 60) == np.arange(60)).all()


def test_the_live_plot_shows_the_run_in_bits_per_note(tmp_path):
    trainer = Trainer(make_streams(), TINY, tmp_path / "run", device="cpu", say=quiet)
    plot = LivePlot({"uniform": 9.0, "bigram": 4.5}, 3.0, every=0)
    trainer.run(progress=False, watch=plot)  # outside a notebook it stays silent
    fig, alt = plot.figure(trainer)
    lines = {line.get_label(): line for line in fig.axes[0].lines}
    assert np.allclose(
        lines["validation"].get_ydata(), [row["validation_bits_per_note"] for row in trainer.log]
    )
    assert lines["training"].get_ydata()[-1] == pytest.approx(3.0 * np.mean(trainer.losses[-3:]))
    assert "bigram" in alt and [t.get_text().strip() for t in fig.axes[0].texts] == [
        "uniform 9.0",
        "bigram 4.5",
    ]


def test_the_live_plot_is_one_output_that_is_redrawn(tmp_path, monkeypatch):
    """In a notebook: displayed once, then updated."""
    import IPython
    from IPython import display as module

    shown = []

    class Handle:
        def update(self, image):
            shown.append("update")

    monkeypatch.setattr(IPython, "get_ipython", lambda: object())
    monkeypatch.setattr(
        module, "display", lambda image, display_id: shown.append("display") or Handle()
    )
    trainer = Trainer(
        make_streams(), replace(TINY, steps=4), tmp_path / "run", device="cpu", say=quiet
    )
    trainer.run(progress=False, watch=LivePlot({"bigram": 4.5}, 3.0, every=0))
    assert shown == ["display", "update", "update", "update"]
