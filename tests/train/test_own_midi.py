"""Claims about learning from a folder of one's own: what is written, chosen and measured."""

import json
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

from lib import mamba
from lib.env.errors import UserError
from lib.env.paths import DATA
from lib.music import maestro
from lib.music.encode import Augmentation, build
from lib.music.notes import Music, make_notes, write_midi
from lib.music.tokens import Tokenizer
from lib.train import own_midi
from lib.train.__main__ import main, parse, stopping_politely
from lib.train.config import PRESETS
from lib.train.warm_start import warm_start


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six scales of different steps, long enough to learn from."""
    folder = tmp_path_factory.mktemp("scales")
    for step in range(1, 7):
        start = np.arange(80) * 0.25
        pitch = 30 + (np.arange(80) * step + 5 * (np.arange(80) // 7)) % 60
        write_midi(
            Music(make_notes(start, start + 0.2, pitch, np.full(80, 64))), folder / f"{step}.mid"
        )
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A tiny model that knows nothing, with the shipped words."""
    folder = tmp_path_factory.mktemp("weights")
    tokenizer = Tokenizer.load(DATA / "model")
    torch.manual_seed(0)
    mamba.save(
        mamba.MambaLM(mamba.MambaConfig(tokenizer.vocab_size, d_model=16, n_layer=1, d_state=4)),
        folder,
    )
    tokenizer.save(folder)
    return folder


@pytest.fixture
def no_maestro(monkeypatch):
    def nothing(*args, **kwargs):
        raise UserError("no MAESTRO was found: connect to a network")

    monkeypatch.setattr(own_midi, "performances", nothing)


FEW = ("--steps", "3", "--minutes", "1")


def learn(weights, folder, out, *more):
    main(
        [
            "--init",
            str(weights),
            "--midi",
            str(folder),
            "--out",
            str(out),
            "--batch",
            "2",
            "--length",
            "32",
            "--precision",
            "fp32",
            *more,
        ]
    )


def test_a_run_leaves_a_model_a_card_and_what_was_gained(
    tmp_path, weights, folder, no_maestro, capsys
):
    out = tmp_path / "run"
    learn(weights, folder, out, "--steps", "12", "--eval-every", "4", "--lr", "1e-2")
    said = capsys.readouterr().out
    facts = json.loads((out / "best" / own_midi.FACTS).read_text())
    assert facts["folder"]["after"] < facts["folder"]["before"]
    assert facts["folder"]["interval_95"] is None and facts["folder"]["pieces"] == 1
    assert sorted(sum(facts["files"].values(), [])) == [f"{i}.mid" for i in range(1, 7)]
    assert "maestro" not in facts and "what is forgotten of MAESTRO is not measured" in said
    assert "python -m lib.train --init" in facts["command"] and facts["seed"] == 0
    card = (out / "best" / "README.md").read_text()
    assert f"{facts['folder']['before']:.2f} | {facts['folder']['after']:.2f}" in card
    assert "| held-out pieces of MAESTRO | not measured |" in card
    assert mamba.load(out / "best").config.d_model == 16
    assert Tokenizer.load(out / "best").vocab_size == Tokenizer.load(weights).vocab_size


def test_a_run_that_does_harm_keeps_the_weights_as_they_were(tmp_path, weights, folder, no_maestro):
    taught, ruined = tmp_path / "taught", tmp_path / "ruined"
    learn(weights, folder, taught, "--steps", "10", "--lr", "1e-2")
    learn(
        taught / "best",
        folder,
        ruined,
        "--steps",
        "3",
        "--lr",
        "30",
        "--warmup",
        "0",
        "--eval-every",
        "1",
    )
    before, after = (mamba.load(run / "best").state_dict() for run in (taught, ruined))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_words_written_by_another_version_of_a_library_are_the_same_words(
    tmp_path, weights, folder
):
    older = tmp_path / "older"
    shutil.copytree(weights, older)
    facts = json.loads((older / "tokenizer.json").read_text())
    (older / "tokenizer.json").write_text(json.dumps(facts | {"symusic_version": "0.4.0"}))
    streams = own_midi.open_streams(folder, older, tmp_path / "run", say=lambda text: None)
    config = replace(PRESETS["quick"], d_model=16, n_layer=1, d_state=4)
    assert warm_start(older, streams, config)[0].config.d_model == 16


def test_what_is_measured_of_maestro_is_never_a_piece_to_learn_from(tmp_path, weights, monkeypatch):
    rows = []
    for i, side in enumerate(("train", "train", "validation", "test")):
        path = tmp_path / f"{i}.mid"
        start = np.arange(5) * 0.5
        write_midi(Music(make_notes(start, start + 0.2, 40 + np.arange(5), np.full(5, 64))), path)
        rows.append(maestro.Performance(path, "composer", "title", 2000, side, 3.0))
    tokenizer = Tokenizer.load(weights)
    monkeypatch.setattr(own_midi, "performances", lambda **options: rows)
    assert [p.name for p in own_midi.maestro_pieces(tokenizer).pieces] == ["2.mid"]
    monkeypatch.setattr(own_midi, "performances", lambda **options: [rows[0], rows[3]])
    assert [p.name for p in own_midi.maestro_pieces(tokenizer).pieces] == ["3.mid"]


def test_the_same_weights_twice_differ_by_nothing(weights, folder, tmp_path):
    streams = own_midi.open_streams(folder, weights, tmp_path, say=lambda text: None)
    model = mamba.load(weights)
    pieces = streams.select("train")
    found = own_midi.before_and_after(model, model, streams, pieces, Tokenizer.load(weights))
    assert found["difference"] == 0 and found["before"] == found["after"]
    assert found["files"] == len(pieces)


def test_copies_of_one_piece_are_one_piece_to_the_interval(weights, tmp_path, monkeypatch):
    """Six files of six pieces have an interval; six transposed copies of one have none."""
    tokenizer = Tokenizer.load(weights)
    random = np.random.default_rng(0)
    monkeypatch.setattr(own_midi, "piece_bits", lambda model, streams, pieces: np.ones(len(pieces)))

    def measured(name: str, pieces: list[np.ndarray]) -> dict:
        rows = []
        for i, keys in enumerate(pieces):
            path = tmp_path / f"{name}{i}.mid"
            start = 0.25 * np.arange(len(keys))
            write_midi(Music(make_notes(start, start + 0.2, keys, np.full(len(keys), 64))), path)
            rows.append(maestro.Performance(path, "composer", f"{i}", 2000, "train", 3.0))
        plain = {"augmentation": Augmentation(copies=0), "tokenizer": tokenizer, "folder": tmp_path}
        streams = build(rows, **plain, progress=False, say=lambda text: None)[0]
        return own_midi.before_and_after(None, None, streams, streams.pieces, tokenizer)

    piece = random.integers(50, 70, 80)
    found = measured("copy", [piece + up for up in range(6)])
    assert (found["files"], found["pieces"], found["interval_95"]) == (6, 1, None)
    found = measured("piece", [random.integers(50, 70, 80) for _ in range(6)])
    assert (found["files"], found["pieces"]) == (6, 6) and found["interval_95"] == (0, 0)


def test_the_choices_are_gentle_and_the_command_line_has_the_last_word():
    config = own_midi.gentle(PRESETS["laptop"])
    assert config.minutes == 10 and config.lr < PRESETS["laptop"].lr
    assert own_midi.gentle(replace(config, minutes=1)).minutes == 1


@pytest.mark.parametrize(
    "words, says",
    [
        (["--midi", "somewhere"], "add --init data/model"),
        (["--midi", "somewhere", "--init", "data/model", "--streams", "there"], "name one of them"),
    ],
)
def test_words_that_do_not_go_together_are_refused(words, says):
    with pytest.raises(UserError, match=says):
        parse(words)


def test_a_folder_that_cannot_be_used_ends_in_a_sentence_before_anything_is_written(
    tmp_path, weights
):
    with pytest.raises(UserError, match="there is no folder"):
        learn(weights, tmp_path / "nowhere", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_goes_on_from_the_weights_it_began_with_and_from_no_others(
    tmp_path, weights, folder, no_maestro
):
    """What was gained is measured against them."""
    out = tmp_path / "run"
    learn(weights, folder, out, *FEW)
    facts = json.loads((out / "best" / own_midi.FACTS).read_text())
    other = tmp_path / "other"
    shutil.copytree(weights, other)
    model = mamba.load(other)
    with torch.no_grad():
        model.head.add_(0.1)
    mamba.save(model, other)
    with pytest.raises(UserError, match="began with other weights.*name them with --init"):
        learn(other, folder, out, *FEW, "--resume")
    assert json.loads((out / "best" / own_midi.FACTS).read_text()) == facts
    learn(weights, folder, out, *FEW, "--resume")
    again = json.loads((out / "best" / own_midi.FACTS).read_text())
    assert again["folder"] == facts["folder"]


@pytest.mark.parametrize("precision", ["fp32", "fp61"])
def test_what_will_be_refused_is_refused_before_anything_is_encoded(
    tmp_path, weights, folder, precision, monkeypatch
):
    monkeypatch.setattr(own_midi, "build", lambda *a, **k: pytest.fail("it encoded"))
    out = tmp_path / "run"
    out.mkdir()
    if precision == "fp32":
        (out / "last.safetensors").touch()
    with pytest.raises(UserError, match="holds a run already|precision 'fp61' is unknown"):
        learn(weights, folder, out, "--precision", precision)
    assert [path.name for path in out.iterdir()] == ["last.safetensors"] * (precision == "fp32")


def test_ctrl_c_is_polite_while_training_and_ends_the_process_after_it(tmp_path):
    """Once: after this step. Twice: at once. Behind the block the signal is Python's again."""

    class Run:
        stop_asked = False
        said = []
        say = said.append

    before = signal.getsignal(signal.SIGINT)
    with stopping_politely(Run):
        signal.raise_signal(signal.SIGINT)
        assert Run.stop_asked and "stopping after this step" in Run.said[0]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_files_of_one_name_in_two_folders_are_told_apart(tmp_path, weights, folder, no_maestro):
    for part in ("one", "two"):
        (tmp_path / "mine" / part).mkdir(parents=True)
    for i, path in enumerate(sorted(folder.iterdir())):
        part = "one" if i % 2 else "two"
        shutil.copy(path, tmp_path / "mine" / part / f"take{i // 2}.mid")
    learn(weights, tmp_path / "mine", tmp_path / "run", *FEW)
    facts = json.loads((tmp_path / "run" / "best" / own_midi.FACTS).read_text())
    names = sorted(name for side in facts["files"].values() for name in side)
    assert names == sorted(f"{part}/take{i}.mid" for part in ("one", "two") for i in range(3))
