"""Claims about lib.train and lib.evaluate: it learns, it resumes exactly, its numbers are right."""

import copy
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lib import mamba
from lib.errors import UserError
from lib.evaluate import bits_per_note, counting_baselines, piece_bits
from lib.mamba import MambaConfig, MambaLM
from lib.streams import Piece, Streams
from lib.train import (Crops, TrainConfig, Trainer, choose_precision, learning_rate, parameter_groups,
                       validation_pieces)

TINY = TrainConfig(d_model=16, n_layer=1, d_state=4, batch=3, length=20, steps=12, minutes=100, lr=1e-2,
                   eval_every=6, eval_tokens=200, save_every=4)


def make_streams(vocab=11, lengths=(70, 41, 20, 90), splits=("train", "train", "validation", "test")):
    """Made-up streams: token 1 begins a piece, 2 ends it, the rest counts upwards and around."""
    pieces, arrays, offset = [], [], 0
    for i, (length, split) in enumerate(zip(lengths, splits)):
        body = 3 + (np.arange(length - 2) + 5 * i) % (vocab - 3)
        arrays.append(np.concatenate([[1], body, [2]]).astype(np.uint16))
        pieces.append(Piece(f"piece{i}", "composer", f"title{i}", split, 0, offset, length, length // 3, 10.0))
        offset += length
    return Streams(np.concatenate(arrays), pieces, vocab, 1, {"id": "made-up"})


def quiet(*args, **kwargs):
    pass


def test_training_learns_a_sequence_that_can_be_learnt(tmp_path):
    streams = make_streams()
    trainer = Trainer(streams, replace(TINY, steps=150), tmp_path / "run", device="cpu", say=quiet)
    first = trainer.train_step()
    log = trainer.run(progress=False)
    assert abs(first - math.log2(11)) < 0.3  # nothing known: log2 of the vocabulary
    assert log[-1]["train_bits_per_token"] < 0.3
    assert log[-1]["validation_bits_per_note"] < counting_baselines(streams, streams.select("validation"))["unigram"] / 3


def test_resuming_is_as_if_it_had_never_stopped(tmp_path):
    """The same losses to the last digit, in float32 on a CPU, from a stop between two saves too."""
    streams = make_streams()
    straight = Trainer(streams, TINY, tmp_path / "a", device="cpu", say=quiet)
    losses = [straight.train_step() for _ in range(12)]
    broken = Trainer(streams, TINY, tmp_path / "b", device="cpu", say=quiet)
    first = [broken.train_step() for _ in range(5)]
    broken._save()
    broken.train_step()  # work that is lost
    torch.rand(7)  # the random state of another process
    again = Trainer(streams, TINY, tmp_path / "b", device="cpu", resume=True, say=quiet)
    assert first + [again.train_step() for _ in range(7)] == losses
    for a, b in zip(straight.model.parameters(), again.model.parameters()):
        assert torch.equal(a, b)


def test_a_run_leaves_a_log_a_best_checkpoint_and_no_rubbish(tmp_path):
    log = Trainer(make_streams(), TINY, tmp_path / "run", device="cpu", say=quiet).run(progress=False)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["best", "last.safetensors", "log.csv"]
    best = mamba.load(tmp_path / "run" / "best")
    streams = make_streams()
    bits = bits_per_note(best, streams, validation_pieces(streams, TINY.eval_tokens))
    assert bits == pytest.approx(min(row["validation_bits_per_note"] for row in log), abs=1e-3)
    lines = (tmp_path / "run" / "log.csv").read_text().splitlines()
    assert len(lines) == 1 + len(log) and lines[0].startswith("step,tokens,minutes")


@pytest.mark.parametrize("change, words", [("exists", "--resume"), ("damaged", "damaged"), ("data", "token streams"),
                                           ("size", "d_model")])
def test_a_run_that_cannot_go_on_is_one_sentence(tmp_path, change, words):
    folder, streams, config = tmp_path / "run", make_streams(), TINY
    Trainer(streams, TINY, folder, device="cpu", say=quiet)._save()
    before = (folder / "last.safetensors").read_bytes()
    if change == "damaged":
        before = before[:500]
        (folder / "last.safetensors").write_bytes(before)
    elif change == "data":
        streams = replace(streams, settings={"id": "other"})
    elif change == "size":
        config = replace(TINY, d_model=18)
    with pytest.raises(UserError, match=words) as error:
        Trainer(streams, config, folder, device="cpu", resume=change != "exists", say=quiet)
    assert "\n" not in str(error.value)
    assert (folder / "last.safetensors").read_bytes() == before  # nothing lost


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_checkpoint(tmp_path):
    trainer = Trainer(make_streams(), TINY, tmp_path / "run", device="cpu", say=quiet)
    trainer.train_step()
    trainer._save()
    before = (tmp_path / "run" / "last.safetensors").read_bytes()
    with torch.no_grad():
        trainer.model.backbone.embeddings.weight.fill_(math.nan)
    with pytest.raises(UserError, match="no longer a number"):
        trainer.run(progress=False)
    assert (tmp_path / "run" / "last.safetensors").read_bytes() == before


def test_crops_read_on_in_a_piece_and_never_cross_its_end():
    streams = make_streams(lengths=(70, 41, 20, 90))
    config = replace(TINY, batch=2, length=16, carry=3)
    crops = Crops(streams, streams.select("train"), config)
    previous = None
    for _ in range(60):
        tokens, jumped = crops.next()
        for row in range(2):
            valid = tokens[row][tokens[row] >= 0]
            assert len(valid) >= 2 and 2 not in valid[:-1] and 1 not in valid[1:]  # one piece, whole order
            if not jumped[row]:
                assert tokens[row][0] == previous[row][-1]  # goes on where it stopped
        previous = tokens


def loss_by_hand(trainer, state):
    """Bits per token of the trainer's next batch, from a given state, and which rows jump."""
    twin = Crops(trainer.streams, trainer.streams.select("train"), trainer.config)
    twin.load(copy.deepcopy(trainer.crops.position()))
    tokens, jumped = twin.next()
    tokens = torch.from_numpy(tokens)
    with torch.no_grad():
        logits = trainer.model(tokens[:, :-1].clamp(min=0), state)
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=-1).item() / math.log(2), jumped


@pytest.mark.parametrize("carry", [1, 1000])
def test_a_row_that_jumps_starts_empty_and_one_that_reads_on_keeps_its_state(tmp_path, carry):
    config = replace(TINY, batch=1, length=5, carry=carry, lr=0.1)
    trainer = Trainer(make_streams(), config, tmp_path / "run", device="cpu", say=quiet)
    seen = set()
    for _ in range(6):
        trainer.train_step()
        empty, jumped = loss_by_hand(trainer, None)
        kept, _ = loss_by_hand(trainer, [tuple(t.detach() for t in layer) for layer in trainer.state])
        assert abs(empty - kept) > 1e-6  # the state matters
        assert trainer.train_step() == pytest.approx(empty if jumped.all() else kept, abs=1e-6)
        seen.add(bool(jumped.all()))
    assert (True in seen) if carry == 1 else (False in seen)


def test_crops_meet_every_token_of_the_train_split():
    streams = make_streams()
    crops = Crops(streams, streams.select("train"), TINY)
    seen = sum(np.bincount(t[t >= 0], minlength=11) for t, _ in (crops.next() for _ in range(50)))
    assert (seen[1:] > 0).all()


def test_weight_decay_spares_what_it_should():
    model = MambaLM(MambaConfig(9, 16, 1))
    decay, rest = (set(map(id, g["params"])) for g in parameter_groups(model, 0.1))
    for name, parameter in model.named_parameters():
        spared = name.endswith(("A_log", "D", "bias", "norm.weight", "norm_f.weight", "conv1d.weight"))
        assert (id(parameter) in rest) == spared and (id(parameter) in decay) != spared, name


def test_learning_rate_warms_up_and_comes_down():
    rates = [learning_rate(p, TINY) for p in np.linspace(0, 1, 201)]
    top = int(np.argmax(rates))
    assert rates[top] == pytest.approx(TINY.lr) and abs(top / 200 - TINY.warmup) < 0.01
    assert rates[-1] == pytest.approx(TINY.lr * TINY.final_lr)
    assert all(a > b for a, b in zip(rates[top:], rates[top + 1 :]))


def test_precision_is_chosen_by_what_the_device_computes_in():
    cpu = torch.device("cpu")
    assert choose_precision("auto", cpu) is None and choose_precision("bf16", cpu) is torch.bfloat16
    with pytest.raises(UserError, match="fp8"):
        choose_precision("fp8", cpu)


def test_bits_of_a_piece_are_exact_whatever_the_segments_and_the_batch():
    streams = make_streams()
    torch.manual_seed(0)
    model = MambaLM(MambaConfig(11, 16, 2, 4)).eval()
    exact = []
    for piece in streams.pieces:
        ids = torch.from_numpy(streams.stream(piece).astype(np.int64))[None]
        nats = F.cross_entropy(model(ids[:, :-1])[0].double(), ids[0, 1:], reduction="sum").item()
        exact.append(nats / math.log(2))
    for batch, segment in ((1, 7), (2, 16), (4, 512)):
        np.testing.assert_allclose(piece_bits(model, streams, streams.pieces, batch=batch, segment=segment),
                                   exact, rtol=1e-5)
    notes = sum(p.notes for p in streams.pieces)
    assert bits_per_note(model, streams, streams.pieces) == pytest.approx(sum(exact) / notes, rel=1e-5)


def test_counting_baselines_are_ordered_and_exact_for_uniform():
    streams = make_streams()
    pieces = streams.select("test")
    bits = counting_baselines(streams, pieces)
    assert bits["uniform"] == pytest.approx((90 - 1) * math.log2(11) / 30)
    assert bits["bigram"] < bits["unigram"] <= bits["uniform"] + 0.1


def test_bits_of_no_piece_is_one_sentence():
    with pytest.raises(UserError, match="no piece"):
        bits_per_note(None, make_streams(), [])


def test_the_checkpoint_of_a_run_is_plain_data(tmp_path):
    """No pickle: the file opens with safetensors, its facts are JSON."""
    from safetensors import safe_open

    Trainer(make_streams(), TINY, tmp_path, device="cpu", say=quiet)._save()
    with safe_open(tmp_path / "last.safetensors", "pt") as file:
        assert json.loads(file.metadata()["run"])["step"] == 0
