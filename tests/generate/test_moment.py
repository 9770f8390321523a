"""Claims about lib.generate.moment: a place in a piece can be kept, forked, saved,
and only what is sound is opened.
"""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lib.env.errors import UserError
from lib.generate import moment as moments
from lib.generate.grammar import Grammar
from lib.generate.moment import hear
from lib.generate.player import Player, play
from lib.mamba.model import MambaConfig, MambaLM
from lib.music.tokens import TokenConfig, Tokenizer


@pytest.fixture(scope="module")
def small():
    """A random model over a small vocabulary: it plays anything."""
    tokenizer = Tokenizer(TokenConfig(grid_ms=62.5, vocab_size=None))
    torch.manual_seed(0)
    return MambaLM(MambaConfig(tokenizer.vocab_size, d_model=24, n_layer=2)).eval(), tokenizer


def tokens_of(model, tokenizer, start, seed, until):
    return [t for _, t, _ in play(Player(model, tokenizer, [start], [seed]), until)]


def test_a_long_prompt_read_in_segments_is_the_prompt_read_at_once(small):
    model, tokenizer = small
    ids = [
        tokenizer.bos,
        *tokens_of(model, tokenizer, hear(model, tokenizer, [tokenizer.bos]), 3, 80),
    ]
    assert len(ids) > 2 * moments.SEGMENT + 1
    logits, state = model.prefill(torch.tensor([ids]))
    heard = hear(model, tokenizer, ids)
    torch.testing.assert_close(heard.logits, logits, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(heard.state, state):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    in_two = hear(model, tokenizer, ids[700:], hear(model, tokenizer, ids[:700]))
    torch.testing.assert_close(in_two.logits, logits, rtol=1e-4, atol=1e-4)
    assert (in_two.grammar.bar, in_two.grammar.position) == (
        heard.grammar.bar,
        heard.grammar.position,
    )


def test_playing_on_leaves_the_moment_as_it_was_and_forks_differ(small):
    model, tokenizer = small
    start = hear(model, tokenizer, [tokenizer.bos])
    before = [part.clone() for layer in start.state for part in layer]
    futures = [tokens_of(model, tokenizer, start, seed, 5) for seed in (1, 2, 3, 1)]
    assert futures[0] == futures[3] and futures[0] != futures[1] != futures[2]
    assert all(
        torch.equal(a, b) for a, b in zip(before, (p for layer in start.state for p in layer))
    )
    assert start.grammar.bar == -1


def test_a_moment_has_the_same_size_wherever_it_is(small):
    model, tokenizer = small
    player = Player(model, tokenizer, [hear(model, tokenizer, [tokenizer.bos])], [0])
    sizes = []
    for _ in range(600):
        player.step()
        sizes.append(player.moment().nbytes())
    assert len(set(sizes)) == 1


def test_a_saved_state_plays_on_as_if_it_had_never_stopped(small, tmp_path):
    """To the last token, with the same seed: weights, grammar and dice stand where they stood."""
    model, tokenizer = small
    player = Player(model, tokenizer, [hear(model, tokenizer, [tokenizer.bos])], [7])
    first = [player.step()[0] for _ in range(150)]
    moments.save(player.moment(), model, tmp_path / "here.safetensors")
    on = [player.step()[0] for _ in range(150)]
    back = moments.load(tmp_path / "here.safetensors", model, tokenizer)
    again = Player(model, tokenizer, [back], [7])
    assert [again.step()[0] for _ in range(150)] == on
    other = Player(model, tokenizer, [back], [8])
    assert [other.step()[0] for _ in range(150)] != on
    assert (
        back.recent[1:] == tuple(first) and again.grammars[0].seconds == player.grammars[0].seconds
    )


def rewritten(path, change):
    """The file at `path` with its tensors and metadata changed, still a valid safetensors file."""
    with safe_open(path, "pt") as file:
        tensors, notes = {k: file.get_tensor(k) for k in file.keys()}, dict(file.metadata())
    change(tensors, notes)
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata=notes)


def facts(**new):
    def change(tensors, notes):
        notes["facts"] = json.dumps(json.loads(notes["facts"]) | new)

    return change


BROKEN = {
    "a truncated file": (lambda p: p.write_bytes(p.read_bytes()[:-9]), "damaged"),
    "noise": (lambda p: p.write_bytes(b"\x01" * 300), "damaged"),
    "a number that is none": (
        lambda p: rewritten(p, lambda t, n: t["1.h"].fill_(float("nan"))),
        "damaged",
    ),
    "a layer missing": (lambda p: rewritten(p, lambda t, n: t.pop("1.h")), "damaged"),
    "another shape": (
        lambda p: rewritten(p, lambda t, n: t.update({"0.h": t["0.h"][:, :-1]})),
        "damaged",
    ),
    "another precision": (
        lambda p: rewritten(p, lambda t, n: t.update({"0.h": t["0.h"].double()})),
        "damaged",
    ),
    "a token outside the vocabulary": (
        lambda p: rewritten(p, lambda t, n: t["recent"].fill_(60_000)),
        "damaged",
    ),
    "a place that is none": (lambda p: rewritten(p, facts(bar=-5)), "damaged"),
    "an end that is none": (lambda p: rewritten(p, facts(end="Coda")), "damaged"),
    "dice thrown less than never": (lambda p: rewritten(p, facts(drawn=-1)), "damaged"),
    "facts that are no facts": (
        lambda p: rewritten(p, lambda t, n: n.update(facts="[1]")),
        "damaged",
    ),
    "no state": (lambda p: rewritten(p, lambda t, n: n.update(format="weights")), "no state"),
    "another model's": (
        lambda p: rewritten(p, lambda t, n: n.update(model="0" * 16)),
        "another model",
    ),
    "no file": (lambda p: p.unlink(), "no file"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_state_that_is_not_sound_is_one_sentence(small, tmp_path, case):
    model, tokenizer = small
    path, (change, words) = tmp_path / "x.safetensors", BROKEN[case]
    moments.save(hear(model, tokenizer, [tokenizer.bos]), model, path)
    moments.load(path, model, tokenizer)
    change(path)
    with pytest.raises(UserError, match=words) as error:
        moments.load(path, model, tokenizer)
    assert "\n" not in str(error.value)


def test_a_piece_needs_a_beginning(small):
    with pytest.raises(UserError, match="BOS"):
        hear(*small, [])


def test_copies_of_a_grammar_part(small):
    grammar = Grammar(small[1])
    grammar.read(small[1].bos)
    other = grammar.copy()
    other.read(small[1].base["Bar_None"])
    assert (grammar.bar, other.bar) == (-1, 0) and np.array_equal(grammar.struck, set())
