"""Claims about lib.lab.release: what is shipped is what was measured."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import soundfile

from lib.env.errors import UserError
from lib.env.machine import read_results
from lib.generate.player import MODEL, load_model
from lib.lab import release
from lib.music.encode import Augmentation, build
from lib.music.maestro import Performance
from lib.music.notes import Music, make_notes, write_midi
from lib.music.streams import Streams
from lib.music.tokens import TokenConfig
from lib.train.bits import bits_per_note, interval
from lib.train.config import TrainConfig
from lib.train.trainer import Trainer

TINY = TrainConfig(
    precision="fp32",
    d_model=16,
    n_layer=1,
    d_state=4,
    batch=2,
    length=32,
    steps=6,
    minutes=100,
    eval_every=3,
    eval_tokens=300,
    save_every=3,
)


@pytest.fixture(scope="module")
def road(tmp_path_factory):
    """Made-up performances, their streams and a finished run; one title crosses the splits."""
    home, pieces = tmp_path_factory.mktemp("road"), []
    titles = {"train": ["a", "b"], "validation": ["c"], "test": ["a", "d"]}
    for split, names in titles.items():
        for i, title in enumerate(names):
            rng = np.random.default_rng(len(pieces))
            start = np.cumsum(rng.uniform(0.02, 0.4, 60))
            notes = make_notes(
                start, start + 0.3, rng.integers(40, 80, 60), rng.integers(30, 100, 60)
            )
            path = home / f"{split}{i}.mid"
            write_midi(Music(notes), path)
            pieces.append(Performance(path, "composer", title, 2000, split, float(start[-1])))
    streams, _ = build(
        pieces,
        TokenConfig(vocab_size=None),
        Augmentation(copies=1),
        folder=home / "cache",
        progress=False,
        say=lambda text: None,
    )
    Trainer(streams, TINY, home / "run", device="cpu", say=lambda text: None).run(progress=False)
    return home, streams


def test_the_figures_are_those_of_the_stored_model(road, monkeypatch, capsys):
    home, streams = road
    monkeypatch.setattr(release, "DATA", home / "data")
    out = home / "data" / "model"
    release.main(
        [
            str(home / "run"),
            "--streams",
            str(streams.folder),
            "--out",
            str(out),
            "--data",
            "Made up.",
        ]
    )
    figures = json.loads((home / "data" / "results" / "model.json").read_text())
    model, tokenizer = load_model(out)
    test = streams.select("test")
    assert figures["test_bits_per_note"] == pytest.approx(
        bits_per_note(model, streams, test), rel=1e-6
    )
    clean = [p for p in test if p.title == "d"]
    assert figures["test_bits_per_note_without_leaks"] == pytest.approx(
        bits_per_note(model, streams, clean), rel=1e-6
    )
    assert figures["validation_bits_per_note"] == pytest.approx(
        bits_per_note(model, streams, streams.select("validation")), rel=1e-6
    )
    assert (
        figures["leaking_titles"] == [["composer", "a"]]
        and figures["test_pieces_without_leaks"] == 1
    )
    assert (
        figures["params"] == model.parameter_count() and tokenizer.vocab_size == streams.vocab_size
    )
    assert (home / "data" / "results" / "tour_roll.png").read_bytes()[:4] == b"\x89PNG"
    assert soundfile.info(home / "data" / "results" / "tour.mp3").duration > 5
    low, high = figures["test_interval_95"]
    assert low <= figures["test_bits_per_note"] <= high
    card = (out / "README.md").read_text()
    assert (
        f"{figures['test_bits_per_note']:.2f}" in card
        and "CC BY-NC-SA 4.0" in card
        and "Made up." in card
    )
    assert (home / "data" / "results" / "training_log.csv").read_bytes() == (
        home / "run" / "log.csv"
    ).read_bytes()


def test_the_best_checkpoint_of_a_run_plays(road):
    """It has its tokenizer beside it."""
    home, streams = road
    assert load_model(home / "run" / "best")[1].vocab_size == streams.vocab_size


def test_the_card_says_what_the_run_started_from():
    assert release.earlier(None) == ""
    known = {"folder": "data/model", "steps": 7000, "tokens": 29_000_000, "hours": 1.5}
    assert (
        "data/model from which it started: 1.50 hours, 7,000 steps, 29,000,000 tokens"
        in release.earlier(known)
    )
    assert "it started (5 layers then): 1.50 hours" in release.earlier(known | {"n_layer": 5}, 8)
    assert "not known" in release.earlier({"folder": "elsewhere"})


def test_streams_of_another_run_are_refused(road, tmp_path, monkeypatch):
    home, streams = road
    other = replace(streams, settings={"id": "other"}, folder=home)
    monkeypatch.setattr(Streams, "load", lambda folder: other)
    with pytest.raises(UserError, match="not the token streams"):
        release.main(
            [str(home / "run"), "--streams", str(home), "--out", str(tmp_path / "m"), "--data", "x"]
        )
    assert not (tmp_path / "m").exists()


def test_the_interval_covers_the_mean_and_narrows_with_more_pieces():
    rng = np.random.default_rng(0)
    few, many = (
        interval(10 * n + rng.normal(0, 30, len(n)), n)
        for n in (np.full(10, 100.0), np.full(1000, 100.0))
    )
    assert few[0] < 10 < few[1] and many[1] - many[0] < few[1] - few[0]


def test_the_shipped_card_agrees_with_the_results():
    figures, card = read_results("model"), (MODEL / "README.md").read_text()
    for key in (
        "validation_bits_per_note",
        "test_bits_per_note",
        "test_bits_per_note_without_leaks",
    ):
        assert f"{figures[key]:.2f}" in card
    assert (
        f"{figures['params']:,}" in card and figures["params"] == load_model()[0].parameter_count()
    )


def test_the_log_counts_on_from_the_weights_it_started_from(tmp_path):
    row = {
        "step": 5,
        "tokens": 50,
        "minutes": 3.0,
        "lr": 0.1,
        "train_bits_per_token": 4.0,
        "validation_bits_per_note": 16.0,
    }
    log = tmp_path / "training_log.csv"
    with open(log, "w", newline="") as file:
        writer = csv.DictWriter(file, row)
        writer.writeheader()
        writer.writerow(row)
    known = {"folder": "data/model", "steps": 5, "tokens": 50, "hours": 0.05}
    first, second = release.whole_log([row], log, known)
    assert int(first["step"]) == 5 and (second["step"], second["tokens"], second["minutes"]) == (
        10,
        100,
        6.0,
    )
    # no start, an unknown one, and another model's log
    for init in (None, {"folder": "elsewhere"}, known | {"steps": 4}):
        assert release.whole_log([row], log, init) == [row]
