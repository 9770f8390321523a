"""Claims about the benchmark of training steps and the experiment on overfitting,
and about what they stored.
"""

import json

import pytest
import torch

from lib.env.errors import UserError
from lib.env.machine import read_results
from lib.lab.bench import __main__ as bench
from lib.lab.bench import train as train_bench
from lib.mamba.model import MambaConfig, MambaLM

TINY = [
    "--d-model",
    "32",
    "--n-layer",
    "1",
    "--d-state",
    "4",
    "--vocab-size",
    "50",
    "--batch",
    "1",
    "--lengths",
    "8,16",
    "--repeats",
    "3",
]


def test_everybody_s_mamba_has_our_weights_and_our_loss():
    torch.manual_seed(0)
    ours, tokens = MambaLM(MambaConfig(50, 32, 2, 4)), torch.randint(50, (2, 17))
    first, then = {}, {}
    for name in ("ours", "mambapy", "transformers_mamba"):
        step = train_bench.contender(name, ours, 16).prepare(tokens)
        first[name], then[name] = step(), step()
    for losses in (first, then):  # the second after a step of AdamW
        assert losses["mambapy"] == pytest.approx(losses["ours"], rel=1e-5)
        assert losses["transformers_mamba"] == pytest.approx(losses["ours"], rel=1e-5)
    assert then["ours"] != first["ours"]


def test_the_transformers_are_of_our_size():
    ours = MambaLM(MambaConfig(1024, 256, 6))
    for name in ("transformer", "gpt2"):
        theirs = train_bench.contender(name, ours, 64).facts["parameters"]
        assert abs(theirs / ours.parameter_count() - 1) < 0.03


def test_the_benchmark_measures_in_a_process_of_its_own_and_says_who_was_left_out(tmp_path, capsys):
    bench.main(
        [
            "train",
            *TINY,
            "--only",
            "ours,mambapy",
            "--allocator",
            "default",
            "--output",
            str(tmp_path / "t.json"),
        ]
    )
    found = json.loads((tmp_path / "t.json").read_text())
    assert {(r["contender"], r["length"]) for r in found["rows"]} == {
        (n, s) for n in ("ours", "mambapy") for s in (8, 16)
    }
    for row in found["ratios"]:
        pair = {
            r["contender"]: r["median_ms"] for r in found["rows"] if r["length"] == row["length"]
        }
        assert row["times"] == pytest.approx(pair["mambapy"] / pair["ours"])
    assert "mambapy" in capsys.readouterr().out
    assert found["command"].startswith("python -m lib.lab.bench train --d-model 32")


def test_a_slow_contender_and_a_wrong_one_are_left_out_with_their_reason(monkeypatch):
    task = dict(
        seed=0,
        vocab_size=50,
        d_model=32,
        n_layer=1,
        d_state=4,
        batch=1,
        repeats=3,
        seconds=1,
        limit=0,
        allocator="default",
    )
    rows, cut = train_bench.measure(task, ["ours"], 8)
    assert not rows and "limit 0 s" in cut[0]["why"]
    monkeypatch.setattr(train_bench.MambapyLM, "take", lambda self, ours: None)
    _, cut = train_bench.measure(task | {"limit": 60}, ["ours", "mambapy"], 8)
    assert "is not ours" in cut[0]["why"]


@pytest.mark.parametrize(
    "options, words", [(["--only", "nobody"], "does not know"), (["--batch", "0"], "at least 1")]
)
def test_options_that_make_no_sense_are_one_sentence(options, words):
    with pytest.raises(UserError, match=words):
        train_bench.main(options)


def test_the_stored_figures_keep_the_promise():
    found = read_results("train_cpu")
    assert found["sizes"] == {
        "d_model": 256,
        "n_layer": 6,
        "d_state": 16,
        "vocab_size": 1024,
        "batch": 4,
        "repeats": 7,
    }
    times = {
        r["contender"]: r["times"]
        for r in found["ratios"]
        if (r["length"], r["allocator"]) == (1024, "default")
    }
    assert times["mambapy"] >= 4 and times["transformer"] >= 1 / 1.5 and times["gpt2"] >= 1 / 1.5
