"""Claims about lib.train and lib.train.bits: it learns, it resumes exactly,
its numbers are right.
"""

import copy
import math
import subprocess
import sys
from dataclasses import asdict, fields, replace

import numpy as np
import pytest
import torch
from made_up import TINY, make_streams, quiet, store
from torch.nn import functional as F

from lib import mamba
from lib.env.errors import UserError
from lib.env.machine import ROOT
from lib.mamba.mamba2 import Mamba2Config, Mamba2LM
from lib.mamba.model import MambaConfig, MambaLM
from lib.scan import native
from lib.scan.native import compiler
from lib.train import distributed
from lib.train.__main__ import main
from lib.train.batches import Batches, validation_pieces
from lib.train.bits import bits_per_note, counting_baselines, piece_bits
from lib.train.config import OPTIMIZERS, PRESETS, TrainConfig
from lib.train.cost import plan, rehearse
from lib.train.optim import choose_precision, learning_rate, optimizers, parameter_groups
from lib.train.trainer import Trainer


def test_training_learns_a_sequence_that_can_be_learnt(tmp_path):
    streams = make_streams()
    trainer = Trainer(streams, replace(TINY, steps=150), tmp_path / "run", device="cpu", say=quiet)
    first = trainer.train_step()
    log = trainer.run(progress=False)
    assert abs(first - math.log2(11)) < 0.3  # nothing known: log2 of the vocabulary
    assert log[-1]["train_bits_per_token"] < 0.3
    floor = counting_baselines(streams, streams.select("validation"))
    assert log[-1]["validation_bits_per_note"] < floor["unigram"] / 3


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_resuming_is_as_if_it_had_never_stopped(tmp_path, optimizer):
    """The same losses to the last digit, in float32 on a CPU, from a stop between two saves too."""
    streams, config = make_streams(), replace(TINY, optimizer=optimizer)
    straight = Trainer(streams, config, tmp_path / "a", device="cpu", say=quiet)
    losses = [straight.train_step() for _ in range(12)]
    broken = Trainer(streams, config, tmp_path / "b", device="cpu", say=quiet)
    first = [broken.train_step() for _ in range(5)]
    broken.save()
    broken.train_step()  # work that is lost
    torch.rand(7)  # the random state of another process
    again = Trainer(streams, config, tmp_path / "b", device="cpu", resume=True, say=quiet)
    assert first + [again.train_step() for _ in range(7)] == losses
    for a, b in zip(straight.model.parameters(), again.model.parameters()):
        assert torch.equal(a, b)


def test_a_run_goes_back_to_a_snapshot(tmp_path):
    """Whatever it did since: the same losses again to the last digit,
    dropout, optimiser and log included.
    """
    trainer = Trainer(
        make_streams(), replace(TINY, dropout=0.3), tmp_path / "run", device="cpu", say=quiet
    )
    for _ in range(3):
        trainer.train_step()
    tensors, facts = trainer.snapshot()
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    after = [trainer.train_step() for _ in range(4)]
    trainer.log.append({"validation_bits_per_note": trainer.validate()})
    assert all(torch.equal(tensors[name], copies[name]) for name in copies), (
        "a snapshot shares nothing with the run"
    )
    trainer.restore(tensors, facts)
    assert (trainer.step, trainer.log, trainer.best) == (3, [], math.inf)
    assert [trainer.train_step() for _ in range(4)] == after


def test_what_is_evaluated_is_kept_where_it_is_the_best(tmp_path):
    trainer = Trainer(make_streams(), TINY, tmp_path / "run", device="cpu", say=quiet)
    bits = trainer.evaluate()
    assert trainer.best == math.inf and not (tmp_path / "run" / "best").exists()
    assert trainer.validate() == bits == trainer.best
    kept = mamba.load(tmp_path / "run" / "best")
    assert bits == pytest.approx(bits_per_note(kept, trainer.streams, trainer.held_out))


def test_a_clock_that_stands_still_stops_no_run(tmp_path, monkeypatch):
    """A coarse clock may read the same after a fast step:
    no speed is known then, and nothing divides by zero.
    """
    monkeypatch.setattr("lib.train.trainer.time.monotonic", lambda: 7.0)
    trainer = Trainer(
        make_streams(), replace(TINY, steps=2), tmp_path / "run", device="cpu", say=quiet
    )
    trainer.run()
    assert trainer.step == 2 and trainer.seconds == 0


def test_muon_takes_the_matrices_of_the_blocks_and_nothing_else(tmp_path):
    """Each parameter has one optimiser;
    a step of Muon spreads over more directions than the gradient does.
    """
    config = replace(TINY, optimizer="muon")
    trainer = Trainer(make_streams(), config, tmp_path / "run", device="cpu", say=quiet)
    adamw, muon = optimizers(trainer.model, config, torch.device("cpu")).values()
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    taken, left = (
        [names[id(p)] for group in o.param_groups for p in group["params"]] for o in (muon, adamw)
    )
    assert sorted(taken + left) == sorted(names.values())
    assert {name.split(".")[-2] for name in taken} == {"in_proj", "x_proj", "dt_proj", "out_proj"}
    weight = trainer.model.backbone.layers[0].mixer.out_proj.weight
    before = weight.detach().clone()
    trainer.train_step()
    moved, gradient = (
        torch.linalg.svdvals(m.float())
        for m in (
            weight.detach() - before,
            trainer.optimizers["muon"].state[weight]["momentum_buffer"],
        )
    )
    directions = lambda s: (s.sum() ** 2 / (s**2).sum()).item()
    assert directions(moved) > 1.5 * directions(gradient), (directions(moved), directions(gradient))


def test_a_run_of_one_optimiser_is_not_resumed_with_another(tmp_path):
    streams = make_streams()
    Trainer(streams, replace(TINY, steps=2), tmp_path / "run", device="cpu", say=quiet).run(
        progress=False
    )
    with pytest.raises(UserError, match="optimizer=adamw, not muon"):
        Trainer(
            streams,
            replace(TINY, optimizer="muon"),
            tmp_path / "run",
            device="cpu",
            resume=True,
            say=quiet,
        )


def test_a_run_leaves_a_log_a_best_checkpoint_and_no_rubbish(tmp_path):
    log = Trainer(make_streams(), TINY, tmp_path / "run", device="cpu", say=quiet).run(
        progress=False
    )
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        ".lock",
        "best",
        "last.safetensors",
        "log.csv",
        "previous.safetensors",
    ]
    best = mamba.load(tmp_path / "run" / "best")
    streams = make_streams()
    bits = bits_per_note(best, streams, validation_pieces(streams, TINY.eval_tokens))
    assert bits == pytest.approx(min(row["validation_bits_per_note"] for row in log), abs=1e-3)
    lines = (tmp_path / "run" / "log.csv").read_text().splitlines()
    assert len(lines) == 1 + len(log) and lines[0].startswith("step,tokens,minutes")


def test_crops_read_on_in_a_piece_and_never_cross_its_end():
    streams = make_streams(lengths=(70, 41, 20, 90))
    config = replace(TINY, batch=2, length=16, carry=3)
    batches = Batches(streams, streams.select("train"), config)
    previous = None
    for _ in range(60):
        tokens, jumped = batches.next()
        for row in range(2):
            valid = tokens[row][tokens[row] >= 0]
            # one piece, in whole order: its start can only be first, its end only last
            assert len(valid) >= 2 and 2 not in valid[:-1] and 1 not in valid[1:]
            if not jumped[row]:
                assert tokens[row][0] == previous[row][-1]  # goes on where it stopped
        previous = tokens


def loss_by_hand(trainer, state):
    """Bits per token of the trainer's next batch, from a given state, and which rows jump."""
    twin = Batches(trainer.streams, trainer.streams.select("train"), trainer.config)
    twin.load(copy.deepcopy(trainer.crops.position()))
    tokens, jumped = twin.next()
    tokens = torch.from_numpy(tokens)
    with torch.no_grad():
        logits = trainer.model(tokens[:, :-1].clamp(min=0), state)
    return F.cross_entropy(
        logits.flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=-1
    ).item() / math.log(2), jumped


@pytest.mark.parametrize("carry", [1, 1000])
def test_a_row_that_jumps_starts_empty_and_one_that_reads_on_keeps_its_state(tmp_path, carry):
    config = replace(TINY, batch=1, length=5, carry=carry, lr=0.1)
    trainer = Trainer(make_streams(), config, tmp_path / "run", device="cpu", say=quiet)
    seen = set()
    for _ in range(6):
        trainer.train_step()
        empty, jumped = loss_by_hand(trainer, None)
        kept, _ = loss_by_hand(
            trainer, [tuple(t.detach() for t in layer) for layer in trainer.state]
        )
        assert abs(empty - kept) > 1e-6  # the state matters
        assert trainer.train_step() == pytest.approx(empty if jumped.all() else kept, abs=1e-6)
        seen.add(bool(jumped.all()))
    assert (True in seen) if carry == 1 else (False in seen)


def test_crops_meet_every_token_of_the_train_split():
    streams = make_streams()
    batches = Batches(streams, streams.select("train"), TINY)
    seen = sum(np.bincount(t[t >= 0], minlength=11) for t, _ in (batches.next() for _ in range(50)))
    assert (seen[1:] > 0).all()


def test_weight_decay_spares_what_it_should():
    model = MambaLM(MambaConfig(9, 16, 1))
    decay, rest = (set(map(id, g["params"])) for g in parameter_groups(model, 0.1))
    for name, parameter in model.named_parameters():
        spared = name.endswith(
            ("A_log", "D", "bias", "norm.weight", "norm_f.weight", "conv1d.weight")
        )
        assert (id(parameter) in rest) == spared and (id(parameter) in decay) != spared, name


def test_learning_rate_warms_up_and_comes_down():
    rates = [learning_rate(p, TINY) for p in np.linspace(0, 1, 201)]
    top = int(np.argmax(rates))
    assert rates[top] == pytest.approx(TINY.lr) and abs(top / 200 - TINY.warmup) < 0.01
    assert rates[-1] == pytest.approx(TINY.lr * TINY.final_lr)
    assert all(a > b for a, b in zip(rates[top:], rates[top + 1 :]))


def test_a_held_rate_stays_at_its_top_and_then_comes_down():
    held = replace(TINY, hold=0.5)
    rates = [learning_rate(p, held) for p in np.linspace(0, 1, 201)]
    plateau = [p for p, rate in zip(np.linspace(0, 1, 201), rates) if rate == held.lr]
    assert plateau[0] == pytest.approx(held.warmup, abs=0.01)
    assert plateau[-1] == pytest.approx(held.warmup + 0.5, abs=0.01)
    assert rates[-1] == pytest.approx(held.lr * held.final_lr)
    with pytest.raises(UserError, match="no time for the rate to come down"):
        replace(TINY, warmup=0.5, hold=0.5)


def test_precision_is_chosen_by_what_the_device_computes_in(monkeypatch):
    cpu = torch.device("cpu")
    assert choose_precision("fp32", cpu) is None and choose_precision("bf16", cpu) is torch.bfloat16
    for flags, wanted in (
        ("flags : avx2 avx512dq amx_bf16", torch.bfloat16),
        ("flags : avx2 avx512dq", None),
    ):
        monkeypatch.setattr(native, "processor", lambda flags=flags: flags)
        assert choose_precision("auto", cpu) is wanted
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
        np.testing.assert_allclose(
            piece_bits(model, streams, streams.pieces, batch=batch, segment=segment),
            exact,
            rtol=1e-5,
        )
    notes = sum(p.notes for p in streams.pieces)
    assert bits_per_note(model, streams, streams.pieces) == pytest.approx(
        sum(exact) / notes, rel=1e-5
    )


def test_counting_baselines_are_ordered_and_exact_for_uniform():
    streams = make_streams()
    pieces = streams.select("test")
    bits = counting_baselines(streams, pieces)
    assert bits["uniform"] == pytest.approx((90 - 1) * math.log2(11) / 30)
    assert bits["bigram"] < bits["unigram"] <= bits["uniform"] + 0.1


def test_bits_of_no_piece_is_one_sentence():
    with pytest.raises(UserError, match="no piece"):
        bits_per_note(None, make_streams(), [])


@pytest.mark.parametrize(
    "changes", [{"accumulate": 3}, {"recompute": True}, {"accumulate": 3, "recompute": True}]
)
def test_less_memory_gives_the_same_run(tmp_path, changes):
    """A batch read in parts, blocks computed again:
    the same losses, to the rounding of sums in another order.
    """
    streams = make_streams()
    plain, thrifty = (
        Trainer(streams, replace(TINY, **c), tmp_path / str(bool(c)), device="cpu", say=quiet)
        for c in ({}, changes)
    )
    for _ in range(8):
        assert thrifty.train_step() == pytest.approx(plain.train_step(), abs=1e-5)
    assert thrifty.tokens == plain.tokens and len(thrifty.state[0][0]) == TINY.batch


def test_recomputing_keeps_less_between_forward_and_backward():
    def kept(recomputed):
        model = MambaLM(MambaConfig(11, 32, 2))
        if recomputed:
            model.recomputes = True
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: (
                sizes.__setitem__(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) or t
            ),
            lambda t: t,
        ):
            model(torch.zeros(2, 200, dtype=torch.long))
        return sum(sizes.values())

    assert kept(True) < 0.6 * kept(False)


def test_resuming_brings_back_dropout_and_the_log(tmp_path):
    """The same rows of the log, the mean training loss included,
    from a stop between two validations.
    """
    streams, config = make_streams(), replace(TINY, dropout=0.3)
    straight = Trainer(streams, config, tmp_path / "a", device="cpu", say=quiet).run(progress=False)
    broken = Trainer(streams, config, tmp_path / "b", device="cpu", say=quiet)
    broken.run(progress=False, watch=lambda run: setattr(run, "stop_asked", run.step == 4))
    assert broken.step == 5 and not broken.finished, "it was asked to stop, and saved"
    torch.manual_seed(99)
    again = Trainer(streams, config, tmp_path / "b", device="cpu", resume=True, say=quiet).run(
        progress=False
    )
    timeless = lambda log: [{k: v for k, v in row.items() if k != "minutes"} for row in log]
    assert timeless(again) == timeless(straight)


def test_a_rehearsal_tells_the_cost_and_leaves_no_trace(tmp_path):
    streams, config = make_streams(), replace(TINY, dropout=0.3)
    plain = Trainer(streams, config, tmp_path / "a", device="cpu", say=quiet)
    losses = [plain.train_step() for _ in range(6)]
    rehearsed = Trainer(streams, config, tmp_path / "b", device="cpu", say=quiet)
    for at in range(6):
        if at in (0, 3):
            found = rehearse(rehearsed)
            assert (
                found["tokens_per_second"] > 0
                and found["bytes"] > 0
                and found["steps"] <= config.steps
            )
        assert rehearsed.train_step() == losses[at]
    assert rehearsed.tokens == plain.tokens


def test_a_rehearsal_validates_in_the_precision_of_the_run(tmp_path):
    config = replace(TINY, precision="bf16")
    trainer = Trainer(make_streams(), config, tmp_path / "run", device="cpu", say=quiet)
    seen = set()

    def look(module, inputs, output):
        if not module.training:
            seen.add(output.dtype)

    with trainer.model.backbone.layers[0].mixer.in_proj.register_forward_hook(look):
        rehearse(trainer)
    assert seen == {torch.bfloat16}


def test_everything_is_said_before_the_start(tmp_path):
    trainer = Trainer(make_streams(), TINY, tmp_path / "run", device="cpu", say=quiet)
    text = plan(trainer)
    for name, value in asdict(TINY).items():
        assert f"{name}={value}" in text
    for word in (
        f"{trainer.model.parameter_count():,} parameters",
        "training tokens",
        "minutes",
        "GiB",
    ):
        assert word in text


def test_training_stops_early_when_validation_no_longer_falls(tmp_path):
    trainer = Trainer(
        make_streams(),
        replace(TINY, steps=100, eval_every=1, patience=3),
        tmp_path / "run",
        device="cpu",
        say=quiet,
    )
    bits = iter([9.0, 8.0, 8.5, 8.1, 8.0, 7.0])
    trainer.validate = lambda: next(bits)
    assert [row["validation_bits_per_note"] for row in trainer.run(progress=False)] == [
        9.0,
        8.0,
        8.5,
        8.1,
        8.0,
    ]
    assert trainer.finished and trainer.progress < 1


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"batch": 0}, "batch=0"),
        ({"dropout": 1.0}, "dropout"),
        ({"lr": math.nan}, "lr"),
        ({"optimizer": "sgd"}, "adamw or muon"),
        ({"transpose": -1}, "transpose"),
        ({"accumulate": 2}, "equal parts"),
    ],
)
def test_a_choice_that_makes_no_sense_is_one_sentence(changes, words):
    with pytest.raises(UserError, match=words) as error:
        replace(TINY, **changes)
    assert "\n" not in str(error.value)


def test_every_preset_can_be_built_and_the_large_one_is_large():
    sizes = {
        name: MambaLM(MambaConfig(1024, p.d_model, p.n_layer, p.d_state)).parameter_count()
        for name, p in PRESETS.items()
    }
    assert set(sizes) == {"quick", "laptop", "colab", "h100"} and 10e6 < sizes["h100"] < 30e6
    large = PRESETS["h100"]
    assert large.batch * large.length * large.steps == pytest.approx(600e6, rel=0.02)


def test_the_command_line_overrides_any_field_resumes_and_starts_from_weights(tmp_path, capsys):
    streams = make_streams()
    store(streams, tmp_path / "streams")
    line = [
        "--preset",
        "quick",
        "--device",
        "cpu",
        "--streams",
        str(tmp_path / "streams"),
        "--steps",
        "4",
        "--d-model",
        "16",
        "--n-layer",
        "1",
        "--length",
        "16",
        "--minutes",
        "5",
        "--copies",
        "no",
        "--eval-every",
        "2",
    ]
    main([*line, "--out", str(tmp_path / "run")])
    said, bar = capsys.readouterr()
    assert bar.count("\rtraining") <= 4, (
        "begin, end, and after each of two validations: no line a step"
    )
    assert (
        "d_model=16" in said
        and "copies=False" in said
        and "expected:" in said
        and "best validation" in said
    )
    main([*line, "--out", str(tmp_path / "run"), "--resume", "--steps", "6"])
    assert "resuming at step 4" in capsys.readouterr().out
    with pytest.raises(UserError, match="--resume"):
        main([*line, "--out", str(tmp_path / "run")])
    main(
        [
            *line[:8],
            "--minutes",
            "5",
            "--length",
            "16",
            "--out",
            str(tmp_path / "next"),
            "--init",
            str(tmp_path / "run" / "best"),
        ]
    )
    said = capsys.readouterr().out
    assert "d_model=16" in said and '"steps"' in said, (
        "the checkpoint's sizes, and what it had learnt"
    )


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_sixteen_bits_train_too(tmp_path, dtype):
    trainer = Trainer(
        make_streams(),
        replace(TINY, precision=dtype, steps=80),
        tmp_path / "run",
        device="cpu",
        say=quiet,
    )
    first = trainer.train_step()
    trainer.run(progress=False)
    assert (
        trainer.losses[-1] < first / 2
        and trainer.model.backbone.embeddings.weight.dtype == torch.float32
    )
    assert trainer.scaler.is_enabled() == (dtype == "fp16")


def test_compiled_it_is_the_same_run(tmp_path):
    """In a process of its own, for the shape checks of the tests cannot be compiled;
    equal to rounding.
    """
    if compiler() is None:
        pytest.skip("torch.compile needs a C++ compiler")
    code = """if True:
        import sys
        from dataclasses import replace
        sys.path[:0] = sys.argv[2:]
        from made_up import TINY, make_streams, quiet
        from lib.train import Trainer
        for yes in (False, True):
            run = Trainer(make_streams(), replace(TINY, compile=yes), f"{sys.argv[1]}/{yes}", device="cpu", say=quiet)
            print(*(run.train_step() for _ in range(3)))
    """
    line = [sys.executable, "-c", code, str(tmp_path), str(ROOT), str(ROOT / "tests" / "helpers")]
    done = subprocess.run(line, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr[-1000:]
    plain, compiled = ([float(v) for v in line.split()] for line in done.stdout.splitlines()[-2:])
    assert len(plain) == 3 and compiled == pytest.approx(plain, abs=1e-4)


def test_a_run_on_a_processor_counts_subnormal_numbers_as_zero(tmp_path):
    if not torch.set_flush_denormal(False):
        pytest.skip("this processor cannot flush them")
    tiny = torch.tensor([1e-38, 1.0])
    assert (tiny * 0.01)[0] != 0
    try:
        Trainer(make_streams(), TINY, tmp_path, device="cpu", say=quiet)
        assert (tiny * 0.01)[0] == 0
    finally:
        torch.set_flush_denormal(False)


def test_the_help_explains_every_choice(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    for field in fields(TrainConfig):
        option = f"--{field.name.replace('_', '-')} "
        assert option in said
        words = said.split(option)[-1].split("\n  --")[0].split()
        assert len(words) > 1, f"{option}has no word of help"


def test_what_cannot_be_trained_is_said_before_the_first_step(tmp_path):
    def other():
        return Mamba2LM(Mamba2Config(11, 16, 1, 8, 8))

    trainer = Trainer(make_streams(), TINY, tmp_path, device="cpu", build=other, say=quiet)
    with pytest.raises(UserError, match="give `save` for a Mamba2LM"):
        trainer.run()
    assert trainer.step == 0
    with pytest.raises(UserError, match="a Mamba2LM is no Mamba of transformers"):
        mamba.save(other(), tmp_path / "saved")
    for device in ("gpu", "nine:0", "mps"):
        with pytest.raises(UserError, match=f"does not run on '{device}' here: choose cpu"):
            distributed.start(device)
    assert distributed.start(torch.device("cpu"))[1].type == "cpu"


def test_judging_leaves_a_model_as_it_was():
    model, streams = MambaLM(MambaConfig(11, 16, 1, dropout=0.5)).train(), make_streams()
    first, second = (bits_per_note(model, streams, streams.pieces) for _ in range(2))
    assert first == second and model.training
    model.backbone.layers[0].eval()
    assert bits_per_note(model, streams, streams.pieces) == first
    assert model.training and not model.backbone.layers[0].training


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_step_that_overflows_in_float16_is_skipped_by_all_optimisers(tmp_path, bad):
    config = replace(TINY, precision="fp16", optimizer="muon", steps=100)
    trainer = Trainer(make_streams(), config, tmp_path, device="cpu", say=quiet)
    trainer.train_step()
    before = copy.deepcopy(trainer.model.state_dict())
    scale = trainer.scaler.get_scale()
    for parameter in trainer.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    trainer.model.backbone.embeddings.weight.grad[3, 2] = bad
    trainer._update(1.0)
    after = trainer.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert trainer.scaler.get_scale() < scale
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


def test_a_validation_that_is_no_number_ends_the_run_and_spoils_no_checkpoint(tmp_path):
    config, streams = replace(TINY, eval_every=2, save_every=1, steps=100), make_streams()
    trainer = Trainer(streams, config, tmp_path, device="cpu", say=quiet)
    trainer.run(progress=False, watch=lambda run: setattr(run, "stop_asked", run.step == 2))
    trainer.evaluate = lambda: math.nan
    trainer.stop_asked = False
    with pytest.raises(UserError, match="the validation is no longer a number at step 4"):
        trainer.run(progress=False)
    again = Trainer(streams, config, tmp_path, device="cpu", resume=True, say=quiet)
    assert again.step == 3


def test_a_seed_of_too_many_bits_is_one_sentence():
    with pytest.raises(UserError, match="more than 63 bits"):
        replace(TINY, seed=2**64)


@pytest.mark.parametrize(
    "wrong, says",
    [
        ({"eval_tokens": -5}, "eval_tokens=-5 makes no sense"),
        ({"weight_decay": math.inf}, "weight_decay=inf makes no sense"),
        ({"seed": -1}, "seed=-1 makes no sense"),
    ],
)
def test_choices_that_would_end_a_run_later_are_refused_at_once(wrong, says):
    with pytest.raises(UserError, match=says):
        TrainConfig(**wrong)
