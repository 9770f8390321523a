"""Claims about the runs behind notebooks 03 and 04:
they can be put down, and what they say can be told apart.
"""

import json

import pytest
import torch

from lib.env import machine as env
from lib.env.errors import UserError
from lib.lab.experiments import canon, copying
from lib.lab.experiments.copying import Arm
from lib.music.notes import Music, make_notes


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(env, "RESULTS", tmp_path)
    return tmp_path


# ---- selective copying --------------------------------------------------------------------


def test_every_arm_has_a_name_of_its_own():
    names = [arm.name for arm in copying.arms()]
    assert len(names) == len(set(names))
    for system, layers in (("fixed", {1, 2, 3}), ("selective", {1, 2, 3}), ("gru", {1, 2})):
        for n_layer in layers:
            seeds = {
                a.seed
                for a in copying.arms()
                if (a.group, a.system, a.n_layer) == ("layers", system, n_layer)
            }
            assert seeds == set(copying.SEEDS)


def test_an_arm_is_what_it_says():
    arm = Arm(
        "parts",
        "selective",
        1,
        selective=("delta",),
        d_state=3,
        lengths=(20, 30),
        learning_rate=0.5,
    )
    training = arm.training()
    system = training.model.layers[0].system
    assert (
        len(training.model.layers) == 1
        and system.selective == ("delta",)
        and system.A.shape[1] == 3
    )
    assert training.lengths == (20, 30) and training.learning_rate == 0.5


def test_runs_are_put_down_and_taken_up(results):
    """A minute that is over trains nothing; the next call goes on,
    and a third has nothing to do.
    """
    arms = [Arm("layers", "selective", 1), Arm("layers", "gru", 1)]
    said = []
    run = lambda minutes: copying.run(
        minutes, results / "runs", arms, steps=4, settle=2, say=said.append
    )
    assert not run(0) and said == [
        "time is up in selective_1_layers_seed_0: the same command goes on"
    ]
    assert run(1) and len(said) == 3
    assert run(1) and len(said) == 3
    found = json.loads((results / "selective_copying.json").read_text())
    for arm in arms:
        outcome = found["arms"][arm.name]
        assert outcome["steps"] == 6 and outcome["curve"][-1][0] == 6 and 0 < outcome["notes"] < 0.4
        assert (
            outcome["command"] == copying.COMMAND
            and outcome["seed"] == 0
            and "torch" in outcome["versions"]
        )
        assert list(outcome["other_lengths"]) == [str(length) for length in copying.LENGTHS]


def test_results_of_other_settings_are_not_mixed(results):
    copying.run(
        1, results / "runs", [Arm("layers", "gru", 1)], steps=2, settle=1, say=lambda text: None
    )
    with pytest.raises(UserError, match="measured with other settings"):
        copying.run(1, results / "runs", [], steps=3, settle=1)


# ---- holding and choosing -----------------------------------------------------------------


def test_the_top_line_follows_the_highest_key():
    starts, ends = [0.0, 0.01, 1.0, 1.5, 3.0], [1.0, 1.0, 2.0, 1.9, 4.0]
    # a chord, a lower note when it is over, a higher one, and one below middle C
    keys = [64, 72, 60, 76, 50]
    line = canon.top_line(
        Music(make_notes(*(torch.tensor(v).numpy() for v in (starts, ends, keys, [80] * 5)))), 2
    )
    assert line.tolist() == [72, 72, 60, 76, 76, 76, 76, 76]


def test_tasks_ask_for_what_they_say():
    torch.manual_seed(0)
    melody = torch.randn(4, 100, 1)
    inputs, target, counts = canon.canon(melody)
    assert torch.equal(inputs, melody) and torch.equal(target[:, 32:], melody[:, :-32])
    assert not counts[:, :32].any() and counts[:, 32:].all()
    inputs, target, counts = canon.marked(melody)
    for line, right, known in zip(inputs, target[..., 0], counts[..., 0], strict=True):
        last = None
        for t, (key, mark) in enumerate(line.tolist()):
            last = key if mark else last
            assert known[t] == (last is not None) and (last is None or right[t] == last)
    torch.manual_seed(7)
    inputs, target, _ = canon.silenced(melody)
    torch.manual_seed(7)
    loud, same, _ = canon.marked(melody)
    assert torch.equal(target, same) and torch.equal(inputs[..., 1], loud[..., 1])
    assert torch.equal(inputs[..., 0] != 0, loud[..., 1] == 1)


def test_layers_to_compare_are_about_equally_large():
    count = lambda name: sum(
        p.numel() for p in canon.build(name, "canon", 0).parameters() if p.requires_grad
    )
    sizes = [count(name) for name in ("S4D", "GRU", "Mamba")]
    assert max(sizes) < 1.06 * min(sizes), sizes
    assert not canon.build("S4D without waves", "canon", 0)[1].A_imag.any()


@pytest.mark.parametrize("layer", list(canon.LAYERS))
@pytest.mark.parametrize("task", list(canon.TASKS))
def test_a_layer_hears_the_past_only_and_learns(layer, task):
    torch.manual_seed(1)
    melody = torch.randn(2, 40, 1)
    model, (inputs, _, _) = canon.build(layer, task, 0), canon.TASKS[task](melody)
    later = inputs.clone()
    later[:, 30:] += 1
    with torch.no_grad():
        torch.testing.assert_close(
            model(later)[:, :30], model(inputs)[:, :30], rtol=1e-4, atol=1e-4
        )
    draw = lambda: canon.TASKS[task](torch.randn(2, 40, 1))
    before = [p.detach().clone() for p in model.parameters()]
    losses = canon.fit(model, draw, 3, 0.01)
    assert len(losses) == 3
    moved = [not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True)]
    assert sum(moved) == sum(p.requires_grad for p in model.parameters())


def test_the_score_counts_half_semitones():
    task = (
        torch.tensor([[[0.0], [0.1], [1.0], [9.0]]]),
        torch.tensor([[[0.0], [0.12], [1.5], [0.0]]]),
        torch.tensor([[[True], [True], [True], [False]]]),
    )
    right, off = canon.score(torch.nn.Identity(), task)
    assert right == pytest.approx(2 / 3) and off == pytest.approx(
        12 * (0.25036 / 3) ** 0.5, rel=1e-3
    )


def test_the_best_rate_is_chosen_by_the_training_loss():
    # rate, seed, last loss, right
    found = [
        (0.1, 0, 2, 0.9),
        (0.1, 1, 2, 0.9),
        (0.2, 0, 1, 0.1),
        (0.2, 1, 2, 0.2),
        (0.3, 0, 0.9, 0.8),
        (0.3, 1, 9, 0.8),
    ]
    keys = ("learning_rate", "seed", "last_loss", "right")
    runs = {
        str(n): dict(layer="GRU", task="canon", steps=400, **dict(zip(keys, run)))
        for n, run in enumerate(found)
    }
    right = lambda rates: [run["right"] for run in canon.best(runs, "GRU", "canon", rates=rates)]
    assert right((0.1, 0.2, 0.3)) == [0.1, 0.2] and right((0.1, 0.3)) == [0.9, 0.9]


def test_every_run_has_a_name_of_its_own():
    names = [arm.name for arm in canon.arms()]
    assert len(names) == len(set(names))
