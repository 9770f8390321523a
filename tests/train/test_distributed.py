"""Claims about lib.train.distributed: more processes give the same run, sooner or not."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from made_up import TINY, make_streams, quiet, store

from lib.env.errors import UserError
from lib.env.machine import ROOT
from lib.train import checkpoints
from lib.train.distributed import World, start
from lib.train.trainer import Trainer

OPTIONS = dict(
    precision="fp32",
    d_model=16,
    n_layer=1,
    d_state=4,
    batch=4,
    length=20,
    steps=8,
    minutes=100.0,
    lr=0.01,
    eval_every=2,
    eval_tokens=200,
    save_every=3,
)


def train(folder, streams, *more, processes=2):
    """`lib.train` on so many CPU processes (gloo); what it printed."""
    options = [
        text
        for name, value in OPTIONS.items()
        for text in (f"--{name.replace('_', '-')}", str(value))
    ]
    launch = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        if processes > 1
        else []
    )
    done = subprocess.run(
        [
            sys.executable,
            *launch,
            "-m",
            "lib.train",
            "--preset",
            "quick",
            "--device",
            "cpu",
            "--out",
            str(folder),
            "--streams",
            str(streams),
            *options,
            *more,
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    return done


def test_two_processes_train_as_one_does_and_either_goes_on_with_the_other_s_run(tmp_path):
    """Same batches, same losses, same weights, to the rounding of sums in another order."""
    streams = store(
        make_streams(
            lengths=(90, 61, 41, 90), splits=("train", "train", "validation", "validation")
        ),
        tmp_path / "streams",
    )
    alone = Trainer(streams, replace(TINY, **OPTIONS), tmp_path / "one", device="cpu", say=quiet)
    log = alone.run(progress=False)
    done = train(tmp_path / "two", tmp_path / "streams", "--accumulate", "2", "--recompute", "yes")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("parameters") == 1 and "2 processes" in done.stdout, (
        "one of them speaks"
    )
    tensors, facts = checkpoints.read(tmp_path / "two")
    for ours, theirs in zip(log, facts["log"], strict=True):
        assert theirs["tokens"] == ours["tokens"]
        for name in ("train_bits_per_token", "validation_bits_per_note"):
            assert theirs[name] == pytest.approx(ours[name], abs=2e-5)
    assert facts["recent"] == pytest.approx(alone.losses, abs=1e-5)
    for name, tensor in alone.model.state_dict().items():
        torch.testing.assert_close(tensors[f"model.{name}"], tensor, atol=1e-4, rtol=1e-3)
    assert facts["crops"] == json.loads(json.dumps(alone.crops.position()))
    again = Trainer(
        streams, replace(TINY, **OPTIONS), tmp_path / "two", device="cpu", resume=True, say=quiet
    )
    assert again.train_step() == pytest.approx(alone.train_step(), abs=1e-4)


DYING = """
import os, signal, sys
from lib.env.errors import cli
from lib.train import __main__ as command
from lib.train.trainer import Trainer

step = Trainer.train_step

def last_step(trainer):
    if trainer.world.rank == DEAD and trainer.step == 4 and (trainer.folder / "last.safetensors").exists():
        os.kill(os.getpid(), signal.SIGKILL)
    return step(trainer)

Trainer.train_step = last_step
cli(command.main)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="kills are POSIX's")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_worker_that_is_killed_ends_the_run_in_a_sentence(tmp_path, rank):
    """torchrun itself tells of the signal, at length;
    ours is one sentence, and the run can go on.
    """
    streams = store(make_streams(), tmp_path / "streams")
    (tmp_path / "dying.py").write_text(DYING.replace("DEAD", str(rank)))
    options = [
        text
        for name, value in OPTIONS.items()
        for text in (f"--{name.replace('_', '-')}", str(value))
    ]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
            str(tmp_path / "dying.py"),
            "--preset",
            "quick",
            "--device",
            "cpu",
            "--out",
            str(tmp_path / "run"),
            "--streams",
            str(tmp_path / "streams"),
            *options,
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode != 0
    assert done.stderr.count("error: another process of this run has ended") == 1, done.stderr[
        -3000:
    ]
    assert f'File "{ROOT}' not in done.stderr, "no traceback of ours"
    again = Trainer(
        streams, replace(TINY, **OPTIONS), tmp_path / "run", device="cpu", resume=True, say=quiet
    )
    assert again.step == 3


def test_a_batch_that_cannot_be_shared_is_one_sentence():
    assert [World(rank, 3).mine(6) for rank in range(3)] == [slice(0, 2), slice(2, 4), slice(4, 6)]
    with pytest.raises(UserError, match="8 rows cannot be shared by 3 processes"):
        World(0, 3).mine(8)


def test_alone_there_is_nobody_to_ask():
    world = World()
    assert world.first and world.total(1.5, 2) == [1.5, 2] and world.agree(3.0) == [3.0]
    assert torch.equal(world.gather(torch.ones(2))[0], torch.ones(2))
    world.wait()


@pytest.mark.parametrize("name", ["LOCAL_RANK", "RANK", "WORLD_SIZE"])
def test_one_of_torchrun_s_variables_alone_is_no_torchrun(monkeypatch, name):
    """Notebooks on clusters and some containers leave one behind."""
    for variable in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv(name, "0")
    assert start("cpu") == (World(), torch.device("cpu"))
