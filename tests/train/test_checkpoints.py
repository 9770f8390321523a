"""Claims about a run's files: whole or not at all, few, checked,
and enough to go on as if nothing had happened.
"""

import itertools
import json
import os
import struct
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from made_up import TINY, make_streams, quiet
from safetensors import SafetensorError

from lib import mamba
from lib.env import files
from lib.env.errors import UserError
from lib.env.machine import read_results
from lib.generate.player import MODEL
from lib.lab.bench.interruptions import torture
from lib.mamba.model import MambaConfig, MambaLM
from lib.train import checkpoints
from lib.train.trainer import Trainer

LINUX = pytest.mark.skipif(
    not os.path.exists("/dev/full"), reason="needs Linux's /dev/full, a disk that is always full"
)


@pytest.fixture
def run(tmp_path):
    """A folder with two checkpoints, of steps 4 and 8, and the run's streams."""
    streams = make_streams()
    trainer = Trainer(streams, replace(TINY, steps=8), tmp_path / "run", device="cpu", say=quiet)
    trainer.run(progress=False)
    return tmp_path / "run", streams


def resume(folder, streams, say=quiet, **changes):
    return Trainer(streams, replace(TINY, **changes), folder, device="cpu", resume=True, say=say)


def flip(path, at):
    """Turn over one bit, `at` bytes behind the header."""
    data = bytearray(path.read_bytes())
    data[8 + struct.unpack("<Q", data[:8])[0] + at] ^= 1
    path.write_bytes(data)


def test_a_killed_process_loses_what_followed_the_last_checkpoint_and_nothing_else(tmp_path):
    """Twenty and ten kills: python -m lib.lab.bench interruptions."""
    found = torture(2, 1, tmp_path, say=quiet)
    assert found["damaged"] == 0 and found["most_lost"] <= found["save_every"]
    assert found["while_writing"] >= 1 and found["same_end"] and found["same_log"]


def test_the_stored_figures_of_the_full_torture_hold_the_promise():
    found = read_results("interruptions")
    assert found["at_random"] >= 20 and len(found["rows"]) == found["kills"]
    assert found["damaged"] == 0 and found["same_end"] and found["same_log"]
    assert all(0 <= row["lost"] <= found["save_every"] for row in found["rows"])


def test_two_checkpoints_are_kept(run):
    folder, _ = run
    steps = [
        checkpoints.open_one(folder / name)[1]["step"]
        for name in (checkpoints.PREVIOUS, checkpoints.LAST)
    ]
    assert steps == [4, 8] and len(list(folder.glob("*.safetensors"))) == 2


@pytest.mark.parametrize(
    "damage", ["truncated", "emptied", "one bit of a weight", "one letter of the facts", "gone"]
)
def test_a_damaged_last_checkpoint_falls_back_to_the_one_before(run, damage):
    folder, streams = run
    last, said = folder / checkpoints.LAST, []
    if damage == "truncated":
        last.write_bytes(last.read_bytes()[:700])
    elif damage == "emptied":
        last.write_bytes(b"")
    elif damage == "one bit of a weight":
        flip(last, 40)
    elif damage == "one letter of the facts":
        data = last.read_bytes()
        last.write_bytes(data.replace(b'\\"step\\": 8, \\"tokens', b'\\"step\\": 9, \\"tokens', 1))
        assert last.read_bytes() != data
    else:  # killed between the two renames
        last.unlink()
    trainer = resume(folder, streams, said.append)
    assert trainer.step == 4 and ("damaged" in said[0]) == (damage != "gone")


def test_a_run_goes_on_in_a_folder_whose_name_is_no_utf8(tmp_path):
    folder, streams = tmp_path / os.fsdecode(b"M\xfcller") / "run", make_streams()
    try:
        folder.mkdir(parents=True)
    except OSError:
        pytest.skip("this file system wants names in UTF-8")
    Trainer(streams, replace(TINY, steps=4), folder, device="cpu", say=quiet).run(progress=False)
    assert resume(folder, streams).step == 4
    assert checkpoints.history(folder / "best")["steps"] > 0
    mamba.load(folder / "best")


@pytest.mark.parametrize(
    "what, words",
    [
        ("pipe", "is a pipe"),
        ("folder", "is a folder"),
        ("loop", "symbolic links"),
        ("lost", "No such file"),
    ],
)
def test_a_checkpoint_that_cannot_be_read_is_not_called_damaged(run, what, words):
    """It may be whole, on a disk that is not there just now:
    nothing is told to be deleted, nothing begins anew.
    """
    folder, streams = run
    last = folder / checkpoints.LAST
    last.unlink()
    (folder / checkpoints.PREVIOUS).unlink()
    if what == "pipe":
        os.mkfifo(last)
    elif what == "folder":
        last.mkdir()
    else:
        last.symlink_to(checkpoints.LAST if what == "loop" else "/nowhere/last.safetensors")
    with pytest.raises(UserError, match=words) as error:
        resume(folder, streams)
    assert "\n" not in str(error.value) and "delete" not in str(error.value)
    with pytest.raises(UserError, match="holds a run already"):
        Trainer(streams, TINY, folder, device="cpu", say=quiet)
    assert os.path.lexists(last)


def test_a_checkpoint_that_is_far_too_large_is_refused_unread(run, monkeypatch):
    folder, streams = run
    last = folder / checkpoints.LAST
    data = last.read_bytes()
    size = int.from_bytes(data[:8], "little")
    notes, more = json.loads(data[8 : 8 + size]), 3 << 30
    end = len(data) - 8 - size
    notes["junk"] = {"dtype": "U8", "shape": [more], "data_offsets": [end, end + more]}
    header = json.dumps(notes).encode()
    with last.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header + data[8 + size :])
        file.truncate(8 + len(header) + end + more)  # sparse: it takes no room
    monkeypatch.delattr(checkpoints, "checksum")
    for work in (lambda: resume(folder, streams), lambda: checkpoints.history(folder / "best")):
        with pytest.raises(
            UserError, match="takes 3,22[0-9] MB, and training this model keeps less than"
        ):
            work()
    # where the reason is known, it is said
    with pytest.raises(UserError, match="d_model=16, not 18"):
        resume(folder, streams, d_model=18)


@pytest.mark.parametrize(
    "sizes",
    [
        {"d_model": 8, "n_layer": 1, "d_state": 1024, "batch": 2000},
        {"d_model": 64, "n_layer": 8, "d_state": 256, "batch": 512},
        {"d_model": 32, "n_layer": 6, "d_state": 16, "batch": 4096},
        {"d_model": 1, "n_layer": 1, "d_state": 1, "batch": 4096},
    ],
)
def test_a_run_with_the_states_of_many_rows_is_not_too_large(sizes):
    config = replace(TINY, **sizes)
    with torch.device("meta"):
        model = MambaLM(MambaConfig(13, config.d_model, config.n_layer, config.d_state))
        states = [t.nbytes for memory in model.new_state(config.batch) for t in memory]
    weights = sum(t.nbytes for t in model.state_dict().values())
    checkpoints.check_size(Path("run"), 3 * weights + sum(states), weights, config.batch)


def test_when_both_checkpoints_are_damaged_it_says_so_in_one_sentence(run):
    folder, streams = run
    for name in (checkpoints.LAST, checkpoints.PREVIOUS):
        flip(folder / name, 40)
    with pytest.raises(UserError, match="no checkpoint .* is whole") as error:
        resume(folder, streams)
    assert "\n" not in str(error.value)


@LINUX
@pytest.mark.parametrize("what", ["checkpoint", "log", "best model"])
def test_a_full_disk_is_one_sentence_and_costs_nothing_that_was_there(run, what, monkeypatch):
    folder, streams = run
    trainer = resume(folder, streams, steps=100)
    before = {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    if what == "best model":  # safetensors' own words on a full disk, as they were read from one

        def full(*_, **__):
            raise SafetensorError(
                "Error while serializing: I/O error: No space left on device (os error 28)"
            )

        monkeypatch.setattr(safetensors.torch, "save_file", full)
    else:  # where the next version is written first
        name = checkpoints.LAST if what == "checkpoint" else checkpoints.LOG
        files._beside(folder / name).symlink_to("/dev/full")
    trainer.best = 1e9
    with pytest.raises(UserError, match="disk is full") as error:
        trainer.validate() if what == "best model" else trainer.save()
    assert "\n" not in str(error.value)
    after = {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    if what == "log":  # the checkpoint was written before
        before = {k: v for k, v in before.items() if not k.endswith("safetensors")}
    assert all(after[k] == v for k, v in before.items())
    assert resume(folder, streams).step == 8
    mamba.load(folder / "best")


@pytest.mark.parametrize(
    "change, words",
    [
        ("exists", "--resume"),
        ("data", "token streams"),
        ("tokens", "token streams"),
        ("size", "d_model"),
        ("order", "carry"),
        ("seed", "seed"),
    ],
)
def test_a_run_that_cannot_go_on_is_one_sentence(run, change, words):
    folder, streams = run
    before = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    changes = {"size": {"d_model": 18}, "order": {"carry": 2}, "seed": {"seed": 3}}.get(change, {})
    if change == "data":
        streams = replace(streams, settings={"id": "other"})
    elif change == "tokens":  # the same settings and sizes, other content
        tokens = streams.tokens.copy()
        tokens[5] += 1
        streams = replace(streams, tokens=tokens)
    with pytest.raises(UserError, match=words) as error:
        Trainer(
            streams,
            replace(TINY, **changes),
            folder,
            device="cpu",
            resume=change != "exists",
            say=quiet,
        )
    assert "\n" not in str(error.value)
    # nothing is lost
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()} == before


def test_tokens_that_change_while_they_are_read_stop_the_run(tmp_path):
    streams = make_streams()
    trainer = Trainer(streams, TINY, tmp_path / "run", device="cpu", say=quiet)
    trainer.train_step()
    trainer.save()
    streams.tokens[:] = 400  # of another vocabulary
    with pytest.raises(UserError, match="changed while they were read"):
        trainer.run(progress=False)
    assert checkpoints.read(tmp_path / "run", quiet)[1]["step"] == 1


@pytest.mark.parametrize("sick", ["loss", "weight"])
def test_what_is_no_number_stops_the_run_and_keeps_the_last_checkpoint(run, sick):
    folder, streams = run
    trainer = resume(folder, streams, steps=100)
    before = (folder / checkpoints.LAST).read_bytes()
    with torch.no_grad():
        trainer.model.backbone.embeddings.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="no longer a number"):
        trainer.run(progress=False) if sick == "loss" else trainer.save()
    assert (folder / checkpoints.LAST).read_bytes() == before


def test_a_second_process_is_kept_out_and_rubbish_is_swept_up(run):
    folder, streams = run
    (folder / ".last.77.part.safetensors").write_bytes(b"half")
    with checkpoints.alone(folder):
        assert not list(folder.glob(".*.part*"))
        with pytest.raises(UserError, match="another process trains"):
            resume(folder, streams, steps=20).run(progress=False)


def test_a_trainer_that_another_has_overtaken_does_not_go_back(run):
    """Both opened the run at step 8, one after the other trains: the second knows an old state."""
    folder, streams = run
    first, second = (resume(folder, streams, steps=20) for _ in range(2))
    first.run(progress=False)
    before = {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(UserError, match="another process has trained on"):
        second.run(progress=False)
    assert {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    third = resume(folder, streams, steps=24)
    assert third.step == 20
    third.run(progress=False)
    assert checkpoints.read(folder)[1]["step"] == 24


def test_a_clock_that_jumps_back_costs_no_time_and_no_order(run, monkeypatch):
    """An hour back at every other look: the minutes of the log never shrink,
    and nothing ends too early.
    """
    folder, streams = run
    trainer = resume(folder, streams, steps=20, minutes=1.0)
    before, looks, real = trainer.seconds, itertools.count(), time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: real() - 3600 * (next(looks) // 2))
    log = trainer.run(progress=False)
    assert trainer.step == 20 and before <= trainer.seconds < 60
    minutes = [row["minutes"] for row in log]
    assert minutes == sorted(minutes)
    assert resume(folder, streams, steps=20).seconds == trainer.seconds


def test_the_checkpoint_of_a_run_is_plain_data(run):
    """No pickle: the file opens with safetensors, its facts are JSON."""
    from safetensors import safe_open

    with safe_open(run[0] / checkpoints.LAST, "pt") as file:
        assert json.loads(file.metadata()["run"])["step"] == 8


def test_a_checkpoint_of_the_first_version_opens(run):
    """No checksum, one random state, rows without transposition:
    a run that began with it goes on.
    """
    from safetensors.torch import save_file

    folder, streams = run
    tensors, facts = checkpoints.read(folder)
    tensors["rng"] = tensors.pop("rng.0")
    for name in ("data", "init", "recent"):
        del facts[name]
    del facts["crops"]["drawn"]
    facts["config"] = {
        k: v
        for k, v in facts["config"].items()
        if k not in ("transpose", "louder", "copies", "patience")
    }
    save_file(tensors, folder / checkpoints.LAST, metadata={"run": json.dumps(facts)})
    old, new = resume(folder, streams), resume(folder, streams)
    assert old.step == 8 and old.train_step() == new.train_step()


def test_weights_to_start_from_are_those_and_what_is_known_of_them_is_recorded(run, tmp_path):
    folder, streams = run
    trainer = Trainer(
        streams, TINY, tmp_path / "next", device="cpu", init=folder / "best", say=quiet
    )
    for a, b in zip(trainer.model.parameters(), mamba.load(folder / "best").parameters()):
        assert torch.equal(a, b)
    assert not trainer.optimizers["optimizer"].state and trainer.step == 0
    row = min(checkpoints.read(folder)[1]["log"], key=lambda row: row["validation_bits_per_note"])
    assert trainer.init["steps"] == row["step"] and trainer.init["tokens"] == row["tokens"]
    trainer.run(progress=False)
    assert checkpoints.read(tmp_path / "next")[1]["init"] == trainer.init
    again = checkpoints.history(tmp_path / "next" / "best")  # what went before is counted in
    assert again["steps"] > row["step"] and again["folder"] == "best"


def test_training_that_made_nothing_better_is_not_counted(run, tmp_path):
    folder, streams = run
    start = folder / "best"
    trainer = Trainer(streams, TINY, tmp_path / "next", device="cpu", init=start, say=quiet)
    first = trainer.validate()  # the weights that it begins with are kept
    trainer.evaluate = lambda: first + 1
    trainer.run(progress=False)
    found = checkpoints.history(tmp_path / "next" / "best")
    assert found["steps"] == trainer.init["steps"] and found["tokens"] == trainer.init["tokens"]


def test_weights_that_do_not_fit_are_refused_in_one_sentence(run, tmp_path):
    folder, streams = run
    with pytest.raises(UserError, match="d_model=16, the run d_model=18"):
        Trainer(
            streams,
            replace(TINY, d_model=18),
            tmp_path / "a",
            device="cpu",
            init=folder / "best",
            say=quiet,
        )
    with pytest.raises(UserError, match="vocab_size"):
        Trainer(
            make_streams(vocab=12),
            TINY,
            tmp_path / "a",
            device="cpu",
            init=folder / "best",
            say=quiet,
        )
    here = replace(streams, folder=tmp_path)
    # equal but for who wrote it
    for place, version in ((tmp_path, "0.5.9"), (folder / "best", "0.6.0")):
        (place / "tokenizer.json").write_text(
            json.dumps({"vocab": [1, 2], "symusic_version": version})
        )
    warm = Trainer(here, TINY, tmp_path / "b", device="cpu", init=folder / "best", say=quiet)
    assert warm.init["n_layer"] == TINY.n_layer
    (tmp_path / "tokens.json").write_text('{"grid_ms": 10.0}')
    theirs = folder / "best" / "tokens.json"
    for damaged in ("theirs", "[1]", "[" * 100_000):
        theirs.write_text(damaged)
        with pytest.raises(UserError, match="tokens.json is damaged"):
            Trainer(here, TINY, tmp_path / "a", device="cpu", init=folder / "best", say=quiet)
    theirs.write_text('{"grid_ms": 20.0}')
    with pytest.raises(UserError, match="speak other tokens"):
        Trainer(
            replace(streams, folder=tmp_path),
            TINY,
            tmp_path / "a",
            device="cpu",
            init=folder / "best",
            say=quiet,
        )


def test_the_history_of_the_shipped_model_is_that_of_its_results():
    model, known = read_results("model"), checkpoints.history(MODEL)
    assert (known["steps"], known["tokens"]) == (model["steps"], model["tokens_seen"])
    assert known["folder"] == "data/model" and "steps" not in checkpoints.history(MODEL.parent)


if sys.platform == "win32":
    pytestmark = pytest.mark.skip(reason="kills and locks here are POSIX's")
