"""Claims about lib.train.bits: whole pieces, to the bit;
and about `python -m lib.lab.judge`.
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
from lib.train.bits import held_out, piece_bits


@pytest.fixture(scope="module")
def quick():
    return performances(quick=True, say=lambda text: None)


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
