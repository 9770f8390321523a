"""Claims about lib.lab.judge.likelihood: likelihoods that can be compared between grids."""

import math

import numpy as np
import pytest
import torch

from lib.env.errors import UserError
from lib.lab.judge.likelihood import dequantisation_bits, likelihood, with_interval
from lib.mamba.model import MambaConfig, MambaLM
from lib.music.maestro import performances
from lib.music.notes import Music, make_notes
from lib.music.tokens import TokenConfig, Tokenizer
from lib.train.bits import held_out, piece_bits


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


@pytest.mark.parametrize("kind", ["TSD", "MIDILike"])
def test_each_language_pays_for_the_onsets_of_its_notes_or_is_refused(kind):
    notes = make_notes([0.0, 1.0, 2.0], [0.5, 1.5, 2.5], [60, 62, 64], [70] * 3)
    for grid in (10.0, 62.5):
        tokenizer = Tokenizer(TokenConfig(grid_ms=grid, vocab_size=None, kind=kind))
        ids = tokenizer.encode(Music(notes), end=True)
        assert dequantisation_bits(tokenizer, ids, grid_ms=grid) == 0  # its own
        if kind == "MIDILike":  # no token says how long a note lasts
            with pytest.raises(UserError, match="compared on their own grid only: .* not 20"):
                dequantisation_bits(tokenizer, ids, grid_ms=20)
        else:
            wanted = 3 * 2 * math.log2(grid / 20)  # an onset and a duration each
            assert dequantisation_bits(tokenizer, ids, grid_ms=20) == pytest.approx(wanted)


def test_bits_at_10_ms_are_those_of_the_tokens_and_of_their_cells():
    """Zero weights give equal logits: log2 of the vocabulary a token."""
    tokenizer = Tokenizer(TokenConfig(grid_ms=62.5, vocab_size=None))
    model = MambaLM(MambaConfig(tokenizer.vocab_size, d_model=16, n_layer=1)).eval()
    torch.nn.init.zeros_(model.backbone.embeddings.weight)
    some = [p for p in performances(quick=True, say=lambda text: None) if p.split != "train"]
    streams = held_out(tokenizer, some)
    wanted = sum((p.length - 1) * math.log2(tokenizer.vocab_size) for p in streams.pieces)
    result = likelihood(model, tokenizer, some)
    native, fine = result["native"], result["dequantised_10_ms"]
    assert native["bits_per_note"] == pytest.approx(wanted / result["notes"], rel=1e-5)
    # log2(6.25) more for the onset, and at least as much for the duration
    assert fine["bits_per_note"] > native["bits_per_note"] + 2 * math.log2(6.25) * 0.99
    assert native["interval_95"][0] <= native["bits_per_note"] <= native["interval_95"][1]
    bits = piece_bits(model, streams, streams.pieces)
    assert with_interval(bits, np.array([p.notes for p in streams.pieces])) == native
    with pytest.raises(UserError, match="no piece"):
        likelihood(model, tokenizer, [])
