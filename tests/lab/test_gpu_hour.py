"""The GPU hour, rehearsed: a bare machine, no music library, parts carried there and back,
a call that is cut.
"""

import os
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from made_up import make_streams, store

from lib import mamba
from lib.env.errors import UserError
from lib.env.paths import ROOT
from lib.lab.gpu import hour as hours
from lib.lab.gpu import parts, plan, steps
from lib.lab.gpu.__main__ import main
from lib.lab.gpu.hour import Hour
from lib.music.notes import Music, make_notes
from lib.music.streams import Streams
from lib.music.tokens import TokenConfig, Tokenizer

pytest.importorskip("triton", reason="no Triton for this system")
POPEN = subprocess.Popen
ABSENT = ("muspy", "miditok", "symusic", "requests", "pretty_midi")  # on the machine with the GPU


@pytest.fixture(scope="module")
def streams(tmp_path_factory):
    """Base tokens of one made-up piece, five times over:
    three to train on, one of which is in the test split too.
    """
    rng = np.random.default_rng(3)
    start = np.cumsum(rng.uniform(0.02, 0.4, 60))
    music = Music(
        make_notes(start, start + 0.3, rng.integers(40, 80, 60), rng.integers(40, 90, 60))
    )
    tokenizer = Tokenizer(TokenConfig(vocab_size=None))
    ids = tokenizer.encode(music, end=True)
    made = make_streams(lengths=(9,) * 5, splits=("train", "train", "train", "validation", "test"))
    pieces = [
        replace(p, offset=i * len(ids), length=len(ids), notes=60)
        for i, p in enumerate(made.pieces)
    ]
    pieces[4] = replace(pieces[4], title=pieces[0].title)
    whole = Streams(np.tile(ids, 5), pieces, tokenizer.vocab_size, tokenizer.bos, {"id": "base"})
    names = [names[0] for names in tokenizer.pieces]
    return store(whole, tmp_path_factory.mktemp("base"), names)


@pytest.fixture
def packed(streams, tmp_path):
    """A folder with what is carried over, in three parts at least."""
    folder = tmp_path / "gpu"
    assert parts.cut(streams.folder, folder, 700) >= 3
    return folder


def call(folder: Path, *options: str) -> str:
    """`run --tiny` as on the machine:
    a process of its own in which no music library can be imported.
    """
    site = folder / "work" / "site"
    site.mkdir(parents=True, exist_ok=True)
    for name in ABSENT:
        (site / f"{name}.py").write_text(f"raise ImportError('{name} is not on this machine')\n")
    done = subprocess.run(
        [sys.executable, "-m", "lib.lab.gpu", "run", "--tiny", "--folder", folder, *options],
        check=False, cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_whole_hour_in_small_in_two_calls_and_what_comes_back(packed):
    late = packed / "in2"
    late.rename(packed / "later")
    first = call(packed, "--minutes", "5")
    assert "flagship: waits for the streams" in first and "the same command goes on" in first
    (packed / "later").rename(late)
    before = (packed / "work" / "results" / "correct.json").read_bytes()
    second = call(packed, "--minutes", "5")
    assert "correct" not in second, "what is done is not done again"
    assert (packed / "work" / "results" / "correct.json").read_bytes() == before

    results = {step.name: Hour(packed).read(step.name) for step in plan.STEPS}
    assert {name: found["ended"] for name, found in results.items()} == dict.fromkeys(
        results, "done"
    )
    assert results["correct"]["cases"] and not results["correct"]["wrong"]
    assert results["peer"]["why"] == "its sources were not carried over"
    assert results["tiles"]["best"] in results["tiles"]["rows"]
    assert set(results["train_step"]["rows"]) == {
        "mamba",
        "mamba, plain scan",
        "transformer",
        "lstm",
    }
    assert results["race"]["finished"]

    back = sorted((packed / "out").iterdir())
    assert len(back) <= parts.MOST_FILES and max(f.stat().st_size for f in back) <= parts.LARGEST
    with tarfile.open(packed / "out" / "results.tar.xz.1") as tar:
        names = tar.getnames()
    for name in ("results/experiments_race_quick.json", "results/scan_gpu.json", "logs/tiles.txt"):
        assert name in names
    with tarfile.open(packed / "out" / "flagship.tar.1") as tar:
        tar.extractall(packed / "home", filter="data")
    model = mamba.load(packed / "home" / "flagship")
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_parts_come_together_as_they_were_and_a_foreign_one_is_refused(packed, streams, tmp_path):
    parts.join(packed, tmp_path / "there")
    again = Streams.load(tmp_path / "there")
    assert np.array_equal(again.tokens, streams.tokens) and again.pieces == streams.pieces
    part = packed / "in2" / "streams.2"
    part.write_bytes(bytes([part.read_bytes()[0] ^ 1]) + part.read_bytes()[1:])
    with pytest.raises(UserError, match="do not belong together"):
        parts.join(packed, tmp_path / "there")
    assert np.array_equal(Streams.load(tmp_path / "there").tokens, streams.tokens), (
        "the old ones are kept"
    )


def sleeper(monkeypatch, code: str) -> None:
    """Every step becomes a program of ours."""
    monkeypatch.setattr(
        hours.subprocess,
        "Popen",
        lambda command, **options: POPEN([sys.executable, "-c", code], **options),
    )


def test_a_step_that_outstays_its_limit_is_stopped_and_said(tmp_path, monkeypatch):
    sleeper(monkeypatch, "import time; time.sleep(60)")
    said = []
    hours.take(plan.step_of("tiles"), Hour(tmp_path), 0.01, said.append)
    assert Hour(tmp_path).read("tiles")["ended"] == "time" and "time after" in said[0]
    assert hours.over(Hour(tmp_path), plan.step_of("tiles")), "it would outstay its limit again"
    hours.take(plan.step_of("race"), Hour(tmp_path), 0.01, said.append)
    hours.take(plan.step_of("race"), Hour(tmp_path), 0.01, said.append)
    race = Hour(tmp_path).read("race")
    assert race["minutes"] >= 0.02, "of both calls"
    assert not hours.over(Hour(tmp_path), plan.step_of("race")), (
        "it goes on from where it was stopped"
    )


def test_a_step_that_fails_says_its_last_words_and_the_next_ones_go_on(tmp_path, monkeypatch):
    sleeper(monkeypatch, "raise SystemExit('the GPU is on fire')")
    said = []
    assert hours.run(Hour(tmp_path, tiny=True), 5, say=said.append) is False
    for name in ("correct", "peer", "scan", "tiles", "train_step"):
        found = Hour(tmp_path).read(name)
        assert found["ended"] == "failed" and found["last words"] == ["the GPU is on fire"]
    assert any("waits for the streams" in line for line in said)
    sleeper(monkeypatch, "pass")
    hours.run(Hour(tmp_path, tiny=True), 5, again={"tiles"}, say=said.append)
    assert Hour(tmp_path).read("tiles")["ended"] == "done"
    assert Hour(tmp_path).read("scan")["ended"] == "failed", "it was not asked for again"


def test_few_minutes_begin_nothing_that_could_not_end(tmp_path, monkeypatch):
    sleeper(monkeypatch, "pass")
    said = []
    hours.run(Hour(tmp_path), 0.4, say=said.append)
    assert not Hour(tmp_path).read("correct") and "too few to begin" in said[0]


def test_a_wrong_gradient_fails_the_step(tmp_path, monkeypatch):
    true = steps.results_of

    def wrong(arguments, optional, backend, weights):
        found = true(arguments, optional, "loop", weights)
        if backend == "triton":
            found[4] = found[4] * 1.01  # dA
        return found

    monkeypatch.setattr(steps, "results_of", wrong)
    answer = steps.correct(Hour(tmp_path, tiny=True), 1)
    assert (
        len(answer["wrong"]) == len(answer["cases"]) and answer["wrong"][0]["errors"]["dA"] > 0.005
    )
    assert steps.apart(torch.tensor([float("nan")]), torch.ones(1).double()) == float("inf")


def test_too_large_a_file_stays_behind_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "LARGEST", 10)
    parts._lay(tmp_path, "weights", b"x" * 25, 3)
    assert b"".join(p.read_bytes() for p in sorted(tmp_path.glob("weights.*"))) == b"x" * 25
    parts._lay(tmp_path, "huge", b"x" * 31, 3)
    assert "too many" in (tmp_path / "huge.left_behind.txt").read_text()


def test_the_plan_fits_three_calls_of_ten_minutes_and_mistakes_are_a_sentence(capsys):
    main(["plan"])
    assert "together at most" in capsys.readouterr().out
    assert sum(step.limit for step in plan.STEPS) <= 30
    assert set(steps.STEPS) == {step.name for step in plan.STEPS}
    with pytest.raises(UserError, match="must be above 0"):
        main(["run", "--minutes", "0"])
    with pytest.raises(UserError, match="is unknown"):
        main(["run", "--again", "breakfast"])
    with pytest.raises(UserError, match="--part-mib"):
        main(["pack", "--part-mib", "0"])
