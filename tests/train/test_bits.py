"""Claims about lib.train.bits: likelihoods that can be compared between grids,
and its command line.
"""

import json
import math

import numpy as np
import pytest
import torch

from lib.env.errors import UserError
from lib.lab.judge import listening_page
from lib.lab.judge.__main__ import main
from lib.mamba.model import MambaConfig, MambaLM
from lib.music.maestro import performances
from lib.music.notes import Music, make_notes, write_midi
from lib.music.tokens import TokenConfig, Tokenizer
from lib.train.bits import dequantisation_bits, held_out, likelihood, piece_bits


@pytest.fixture(scope="module")
def quick():
    return performances(quick=True, say=lambda text: None)


def test_dequantisation_is_the_width_of_the_cells():
    # durations 0.5, 2 and 6 s
    notes = make_notes([0.0, 1.0, 2.0], [0.5, 3.0, 8.0], [60, 62, 64], [70] * 3)
    for grid in (10.0, 62.5):
        tokenizer = Tokenizer(TokenConfig(grid_ms=grid, vocab_size=None))
        ids = tokenizer.encode(Music(notes))
        names = [n for t in tokenizer.names(ids) for n in t if n.startswith("Duration_")]
        cells = [500 / int(n.split(".")[2]) for n in names]  # ms
        assert cells == {10.0: [10, 50, 125], 62.5: [62.5, 62.5, 125]}[grid]
        wanted = 3 * math.log2(grid / 10) + sum(math.log2(c / 10) for c in cells)
        assert dequantisation_bits(tokenizer, ids) == pytest.approx(wanted)


def test_a_uniform_model_costs_what_it_must(quick):
    """Zero weights give equal logits: log2 of the vocabulary a token, whole pieces, both ends."""
    tokenizer = Tokenizer(TokenConfig(grid_ms=62.5, vocab_size=None))
    model = MambaLM(MambaConfig(tokenizer.vocab_size, d_model=16, n_layer=1)).eval()
    torch.nn.init.zeros_(model.backbone.embeddings.weight)
    some = [p for p in quick if p.split != "train"]
    streams = held_out(tokenizer, some)
    assert [p.length for p in streams.pieces] == [len(streams.stream(p)) for p in streams.pieces]
    wanted = [(p.length - 1) * math.log2(tokenizer.vocab_size) for p in streams.pieces]
    np.testing.assert_allclose(piece_bits(model, streams, streams.pieces), wanted, rtol=1e-5)
    result = likelihood(model, tokenizer, some)
    native, fine = result["native"], result["dequantised_10_ms"]
    assert native["bits_per_note"] == pytest.approx(sum(wanted) / result["notes"], rel=1e-5)
    # log2(6.25) more for the onset, and at least as much for the duration
    assert fine["bits_per_note"] > native["bits_per_note"] + 2 * math.log2(6.25) * 0.99
    assert native["interval_95"][0] <= native["bits_per_note"] <= native["interval_95"][1]
    with pytest.raises(UserError, match="no piece"):
        likelihood(model, tokenizer, [])


def test_the_command_prints_the_table_and_draws(tmp_path, capsys):
    folder, rng = tmp_path / "mine", np.random.default_rng(0)
    for i in range(3):
        start = np.sort(rng.uniform(0, 15, 60))
        write_midi(
            Music(
                make_notes(start, start + 0.5, rng.integers(40, 80, 60), rng.integers(30, 90, 60))
            ),
            folder / f"{i}.mid",
        )
    main([str(folder), "--quick", "--seconds", "12"])
    printed = capsys.readouterr().out
    assert (
        "| | real | mine | noise |" in printed
        and "overlap area" in printed
        and "shared with train" in printed
    )
    assert (folder / "evaluation.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((folder / "evaluation.json").read_text())["pieces"]["mine"] == 3


@pytest.mark.parametrize("arguments, words", [(["nowhere"], "no folder"), (["."], "MIDI files")])
def test_a_folder_with_nothing_is_one_sentence(tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words):
        main([*arguments, "--quick"])


def test_ratings_are_analysed_by_the_command(tmp_path, capsys):
    """Made-up answers, in the test alone."""
    answers = [
        {
            "pair": i,
            "clips": ["real/0", "noise/1"] if i % 2 else ["noise/2", "real/1"],
            "choice": "a" if i % 2 else "b",
        }
        for i in range(10)
    ]
    for name in ("x", "y"):
        (tmp_path / f"{name}.json").write_text(
            json.dumps(
                {"format": listening_page.FORMAT, "test": "t", "listener": name, "ratings": answers}
            )
        )
    main(["--ratings", str(tmp_path / "x.json"), str(tmp_path / "y.json")])
    printed = capsys.readouterr().out
    assert "listeners: 2;" in printed and "noise over real: 0% (0% to 0%), 20 answers" in printed
