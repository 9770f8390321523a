"""Claims about lib.lab.judge.bigram: it is the bigram of the course, and plays by the grammar."""

import math

import numpy as np
import pytest
import torch

from lib.generate.moment import hear
from lib.generate.player import continuations, load_model
from lib.lab.judge.bigram import BigramLM
from lib.music.encode import Augmentation, build
from lib.music.maestro import performances
from lib.train.bits import counting_baselines


@pytest.fixture(scope="module")
def tokenizer():
    return load_model()[1]


@pytest.fixture(scope="module")
def streams(tokenizer, tmp_path_factory):
    found = performances(quick=True, say=lambda text: None)
    return build(
        found,
        None,
        Augmentation(copies=0),
        folder=tmp_path_factory.mktemp("streams"),
        tokenizer=tokenizer,
        progress=False,
        say=lambda text: None,
    )[0]


def test_its_bits_are_those_of_the_counting_baseline(streams):
    model = BigramLM(streams)
    pieces = streams.select("test")
    nats = 0.0
    for piece in pieces:
        ids = torch.from_numpy(streams.stream(piece).astype(np.int64))
        rows, _ = model.step(ids[:-1])
        nats -= rows.gather(1, ids[1:, None]).double().sum().item()
    wanted = counting_baselines(streams, pieces)["bigram"]
    assert nats / math.log(2) / sum(p.notes for p in pieces) == pytest.approx(wanted, rel=1e-5)


def test_it_plays_music_that_the_grammar_allows(streams, tokenizer):
    model = BigramLM(streams)
    start = hear(model, tokenizer, [tokenizer.bos])
    notes, tokens = continuations(model, tokenizer, [start] * 2, [0, 1], until=6.0)
    assert min(map(len, notes)) > 3
    assert not np.array_equal(tokens[0], tokens[1])
    again, _ = continuations(model, tokenizer, [start], [1], until=6.0)
    np.testing.assert_array_equal(again[0], notes[1])


def test_after_a_prompt_it_knows_the_last_token_and_no_other(streams):
    model = BigramLM(streams)
    ids = torch.from_numpy(streams.stream(streams.select("test")[0])[:9].astype(np.int64))
    after, _ = model.prefill(ids[None])
    torch.testing.assert_close(after[0], model.step(ids[-1:])[0][0])
    torch.testing.assert_close(after, model.prefill(torch.cat([ids[3:4], ids[-1:]])[None])[0])
