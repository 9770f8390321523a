"""Claims about lib.lab.experiments.runner: it runs, stops and goes on;
its numbers are what they say they are.
"""

import json
import math
import shutil
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lib.env import machine as env
from lib.env.errors import UserError
from lib.lab.experiments import __main__ as command
from lib.lab.experiments import context as experiment_context
from lib.lab.experiments import efficiency, entries, intervals, original, race, tokenizers
from lib.lab.experiments import figures as experiment_figures
from lib.lab.experiments import playing as experiment_playing
from lib.lab.experiments import tokens as token_part
from lib.lab.experiments.protocol import (
    SCALES,
    Context,
    Efficiency,
    Original,
    Playing,
    Protocol,
    Race,
    Tokenizers,
    Tokens,
)
from lib.lab.experiments.runner import PARTS, Lab
from lib.lab.experiments.runs import OUTCOME, OutOfTime, Run, Spec, train
from lib.lab.rivals import matched as baselines
from lib.lab.rivals.matched import Size
from lib.music.maestro import Performance
from lib.music.notes import Music, make_notes, write_midi
from lib.music.streams import Piece, Streams
from lib.show import plots
from lib.train import bits as evaluate
from lib.train.config import TrainConfig

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = Size(16, 2, 4, window=12, fixed_state=4)
TINY = Protocol(
    "quick",
    SIZE,
    TrainConfig(
        precision="fp32",
        batch=2,
        length=12,
        carry=2,
        minutes=1e9,
        eval_every=2,
        eval_tokens=100,
        save_every=1,
    ),
    Race(
        archs=("lstm", "transformer", "mamba"),
        headline=("mamba", "transformer"),
        seeds=(0, 1, 2),
        few=1,
        rates=(1e-3, 1e-2),
        trial_tokens=48,
        tokens=96,
        budgets=(24, 48),
        orders=(1, 2, 3),
    ),
    Efficiency(
        archs=("transformer", "mamba"),
        vocabulary=20,
        lengths=(8, 16, 32),
        positions=(8, 16, 32),
        prefill=(8, 16),
        batches=(1, 3),
        prompt=9,
        repeats=3,
        tokens=2,
        seconds=0.01,
    ),
    Context(lengths=(4, 16), bins=(0, 10, 30), tokens=500),
    Playing(prompt_seconds=2.0, seconds=8.0),
    Tokens(grids=(62.5,), vocabularies=(None, 400), notes=60),
    Tokenizers(kinds=("TSD",), vocabularies=(600,), notes=(30, 60), measured=None),
    Original(
        SIZE,
        pieces=2,
        seconds=(0, 60),
        measured=1,
        passes=4,
        batch=2,
        length=24,
        vocabulary=640,
        repaired_vocabulary=None,
        copies=1,
        carry=2,
        seeds=(0, 1),
    ),
)


SCAN = env.read_results("scan_cpu_2_cores")


def quiet(*args, **kwargs):
    pass


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Eight short pieces on disk, of all splits; one title is on both sides."""
    folder, out = tmp_path_factory.mktemp("midi"), []
    for seed, split in enumerate(("train",) * 3 + ("validation",) * 2 + ("test",) * 3):
        rng = np.random.default_rng(seed)
        start = np.sort(rng.uniform(0, 8, 40))
        notes = make_notes(
            start,
            start + rng.uniform(0.05, 1, 40),
            rng.integers(50, 70, 40),
            rng.integers(40, 90, 40),
        )
        write_midi(Music(notes), folder / f"{seed}.mid")
        title = "Title 0" if seed == 7 else f"Title {seed}"
        out.append(Performance(folder / f"{seed}.mid", "Composer", title, 2004, split, 8.0))
    return out


@pytest.fixture(scope="module")
def lab(found, tmp_path_factory):
    return Lab(TINY, tmp_path_factory.mktemp("lab"), device="cpu", found=found, say=quiet)


def made_up(lengths=(60, 45, 50, 30), splits=("train", "train", "validation", "test"), vocab=13):
    rng, pieces, arrays, offset = np.random.default_rng(0), [], [], 0
    for i, (length, split) in enumerate(zip(lengths, splits)):
        arrays.append(rng.integers(1, vocab, size=length).astype(np.uint16))
        pieces.append(
            Piece(f"p{i}", "composer", f"t{i}", split, 0, offset, length, length // 3, 1.0)
        )
        offset += length
    return Streams(np.concatenate(arrays), pieces, vocab, 1, {"id": "made-up"})


def spec_of(arch, **changes):
    options = {"lr": 1e-2, "steps": 6, **changes}
    return Spec(f"x/{arch}", arch, SIZE, replace(TINY.config, **options))


# ---- one run -------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["lstm", "transformer", "s4d", "hybrid"])
def test_a_run_of_any_architecture_resumes_as_if_it_had_never_stopped(tmp_path, arch):
    streams, spec = made_up(), spec_of(arch)
    straight = Run(spec, streams, tmp_path / "a", device="cpu", say=quiet)
    losses = [straight.train_step() for _ in range(6)]
    first = Run(spec, streams, tmp_path / "b", device="cpu", say=quiet)
    begun = [first.train_step() for _ in range(3)]
    first.save()
    again = Run(spec, streams, tmp_path / "b", device="cpu", resume=True, say=quiet)
    assert begun + [again.train_step() for _ in range(3)] == losses
    assert again.training_seconds > 0


def test_time_runs_out_and_the_next_call_goes_on(tmp_path):
    streams, spec = made_up(), spec_of("lstm", steps=40)
    folder = tmp_path / "run"
    with pytest.raises(OutOfTime):
        train(spec, streams, folder, deadline=time.monotonic() - 1, device="cpu", say=quiet)
    assert not folder.exists()  # not even begun
    calls = 0
    while not (folder / OUTCOME).exists():
        calls += 1
        try:  # each call manages a step or a few
            train(spec, streams, folder, deadline=time.monotonic() + 0.05, device="cpu", say=quiet)
        except OutOfTime:
            assert (folder / "last.safetensors").exists()
        assert calls < 42
    assert calls > 1
    outcome = json.loads((folder / OUTCOME).read_text())
    assert outcome["steps"] == 40 and [row["step"] for row in outcome["log"]] == list(
        range(2, 41, 2)
    )
    assert (
        outcome["body_parameters"]
        == outcome["parameters"] - 13 * baselines.config_of("lstm", 13, SIZE).d_model
    )
    assert sorted(p.name for p in folder.iterdir() if p.name != ".lock") == [
        "best",
        "log.csv",
        OUTCOME,
    ]
    assert train(spec, streams, folder, deadline=0, say=quiet) == outcome  # opened, not trained
    with pytest.raises(UserError, match="another protocol"):
        train(spec_of("lstm", steps=41), streams, folder, say=quiet)
    del outcome["spec"]["config"]["optimizer"]  # as written before there was a choice
    (folder / OUTCOME).write_text(json.dumps(outcome))
    assert train(spec, streams, folder, deadline=0, say=quiet) == outcome


def test_the_original_schedule_cuts_the_rate_tenfold(tmp_path):
    run = Run(
        replace(spec_of("mamba", steps=7), cut_every=3),
        made_up(),
        tmp_path / "run",
        device="cpu",
        say=quiet,
    )
    rates = []
    for _ in range(7):
        run.train_step()
        rates.append(run.optimizers["optimizer"].param_groups[0]["lr"])
    np.testing.assert_allclose(rates, [1e-2] * 3 + [1e-3] * 3 + [1e-4])


def test_a_transformer_reads_each_crop_afresh_and_others_carry_on(tmp_path):
    for arch in ("transformer", "transformer_xl", "mamba"):
        run = Run(spec_of(arch), made_up(), tmp_path / arch, device="cpu", say=quiet)
        run.crops.rows = [[0, 12, 2], [1, 12, 2]]  # both rows in the middle of a piece
        run.state = [tuple(t + 1 for t in layer) for layer in run.state]
        seen = []

        def forward(tokens, state, *, seen=seen, forward=run.forward, **options):
            seen.append(state)
            return forward(tokens, state, **options)

        run.forward = forward
        run.train_step()
        empty = all(not t.any() for layer in seen[0] for t in layer)
        assert empty == (arch == "transformer")


# ---- the parts -----------------------------------------------------------------------------


def test_every_run_of_one_seed_reads_the_same_music_in_the_same_order(lab):
    batches = []
    for arch in ("mamba", "transformer"):
        spec = entries.spec(lab, arch, lr=1e-3, warmup=0.1, seed=1, tokens=96)
        run = Run(spec, lab.base, lab.folder / "never", device="cpu", say=quiet)
        batches.append([run.crops.next()[0] for _ in range(5)])
    assert all(np.array_equal(a, b) for a, b in zip(*batches))


def test_the_race_searches_trains_and_opens_the_test_once(lab, monkeypatch):
    result = race.run(lab)
    for arch in TINY.race.archs:
        trials = [row for row in result["trials"] if row["arch"] == arch]
        rates = {
            row["lr"]: row["validation_bits_per_note"] for row in trials if row["warmup"] == 0.1
        }
        inside = min(rates) < min(rates, key=rates.get) < max(rates)
        # a best rate at the edge widened the grid
        assert inside or len(rates) == 2 + TINY.race.widest
        tried = [row for row in result["whole"] if row["arch"] == arch]
        best = min(tried, key=lambda row: row["validation_bits_per_note"])
        assert result["best"][arch] == {"lr": best["lr"], "warmup": best["warmup"]}
        assert {row["steps"] for row in tried} == {4}
        assert {row["warmup"] for row in trials} == {0.1, 0.02}
    assert len(result["whole"]) > len(TINY.race.archs)  # or nothing is decided by whole runs here
    whole = [row for row in result["runs"] if row["steps"] == 4]
    assert {
        arch: [row["seed"] for row in whole if row["arch"] == arch] for arch in TINY.race.archs
    } == {"lstm": [0], "transformer": [0, 1, 2], "mamba": [0, 1, 2]}
    notes = np.array(result["pieces"]["notes"])
    kept = {
        row["name"]: np.array(bits)
        for row, bits in zip(result["runs"], result["test"], strict=True)
    }
    one = next(row for row in whole if row["arch"] == "mamba" and row["seed"] == 0)
    model = baselines.load(lab.place(one["name"]) / "best")
    stream = torch.from_numpy(lab.base.stream(lab.base.select("test")[0]).astype(np.int64))
    by_hand = F.cross_entropy(
        model(stream[None, :-1])[0], stream[1:], reduction="sum"
    ).item() / math.log(2)
    assert kept[one["name"]][0] == pytest.approx(by_hand, abs=0.01)
    rows = result["summary"]["budgets"]["tokens"]
    bits = {
        arch: np.array([kept[row["name"]] for row in whole if row["arch"] == arch])
        for arch in TINY.race.archs
    }
    for arch, mine in bits.items():
        assert rows[arch]["bits_per_note"] == pytest.approx(mine.mean(0).sum() / notes.sum())
        assert rows[arch]["seeds"] == len(mine)
    assert rows["transformer"]["first_minus_this"] == intervals.difference(
        bits["mamba"], bits["transformer"], notes
    )
    assert rows["lstm"]["first_minus_this"]["shown"] is False  # one seed shows nothing
    assert [tokens for tokens, _ in result["summary"]["curves"]["mamba"]] == sorted(
        {row["tokens"] for row in result["runs"] if row["arch"] == "mamba"}
    )
    equal = result["summary"]["budgets"]["arithmetic"]
    share = result["operations"]["mamba"] / result["operations"]["transformer"]
    worth = result["summary"]["doubling"]["transformer"]
    moved = rows["transformer"]["bits_per_note"] + math.log2(share) * worth
    assert equal["transformer"]["bits_per_note"] == pytest.approx(moved)
    assert equal["mamba"]["bits_per_note"] == pytest.approx(rows["mamba"]["bits_per_note"])
    assert "not shown" in race.table(result) and "-gram, counted" in race.table(result)
    monkeypatch.setattr(Lab, "model", lambda *args: pytest.fail("the test split was opened again"))
    assert race.run(lab)["summary"] == json.loads(json.dumps(result["summary"]))


def test_a_race_out_of_time_sums_up_what_has_ended(lab, found, tmp_path):
    whole, kept = race.run(lab), tmp_path / "kept"
    shutil.copytree(lab.kept, kept)

    def late(minutes: float = 0) -> Lab:
        return Lab(
            TINY,
            tmp_path,
            minutes=minutes,
            kept=kept,
            device="cpu",
            found=found,
            cache=lab.cache,
            say=quiet,
        )

    third = [row["name"] for row in whole["runs"] if row["seed"] == 2]
    for name in third:
        (kept / f"{name.replace('/', '-')}-test.json").unlink()
    with pytest.raises(OutOfTime):
        race.run(late())
    cut = late().read("race")
    assert cut["left"] == third and len(third) == 2
    assert len(cut["runs"]) == len(whole["runs"]) - 2
    assert cut["summary"]["budgets"]["tokens"]["mamba"]["seeds"] == 2
    assert cut["summary"]["curves"] == json.loads(json.dumps(whole["summary"]["curves"]))

    shutil.copytree(lab.kept, kept, dirs_exist_ok=True)
    race.run(late(minutes=60))
    ended = late().read("race")
    assert ended["left"] == []
    assert ended["summary"] == json.loads(json.dumps(whole["summary"]))

    late().path("race").unlink()
    lstm = next(row["name"] for row in whole["runs"] if row["arch"] == "lstm" and row["steps"] == 4)
    (kept / f"{lstm.replace('/', '-')}-test.json").unlink()
    with pytest.raises(OutOfTime):  # nothing to sum up where one has no whole run
        race.run(late())
    assert "summary" not in late().read("race")


def rows(bits):
    return [{"lr": lr, "validation_bits_per_note": value} for lr, value in bits.items()]


def test_a_grid_is_widened_while_its_best_rate_lies_at_an_edge():
    assert race.beyond(rows({1e-3: 3.0, 2e-3: 2.0, 4e-3: 1.0})) == 8e-3
    assert race.beyond(rows({1e-3: 1.0, 2e-3: 2.0, 4e-3: 3.0})) == 5e-4
    assert race.beyond(rows({1e-3: 3.0, 2e-3: 1.0, 4e-3: 2.0})) is None


def test_of_trials_that_tie_the_smallest_rate_is_tried_beside_the_best():
    trials = [
        {"lr": lr, "warmup": 0.1, "validation_bits_per_note": bits}
        for lr, bits in ((1e-3, 20.0), (2e-3, 19.45), (4e-3, 19.49), (8e-3, 19.4))
    ]
    trials.append({"lr": 2e-3, "warmup": 0.02, "validation_bits_per_note": 19.46})
    best, gentle = {"lr": 8e-3, "warmup": 0.1}, {"lr": 2e-3, "warmup": 0.1}
    assert entries.tied(trials, 0.1) == [best, gentle]
    assert entries.tied(trials, 0.01) == [best]
    assert entries.tied(trials[:1], 0.1) == [{"lr": 1e-3, "warmup": 0.1}]


def test_whole_runs_choose_among_rates_that_tie_and_longer_warm_ups(monkeypatch):
    """Rates that tie in the trials, then in whole runs, try both; the best whole run is chosen.

    The hybrid has its best at the shorter warm-up and tries no longer one. Of the two in the
    primary comparison, the one that took the longer warm-up looks beyond it, and stays.
    """
    archs = ("mamba", "s4d", "lstm", "hybrid", "transformer_xl")
    chosen = replace(TINY.race, archs=archs, headline=("mamba", "lstm"), tie=0.1)
    lab = SimpleNamespace(
        protocol=replace(TINY, race=chosen),
        all=lambda work, items: [work(lab, one) for one in items],
    )
    bits = {
        ("mamba", 1e-3): {0.1: 18.0, 0.2: 17.5, 0.4: 17.45},
        ("s4d", 1e-3): {0.1: 18.0, 0.2: 17.95},
        ("s4d", 8e-3): {0.1: 18.8},
        ("lstm", 1e-3): {0.1: 18.0, 0.2: 18.05},
        ("hybrid", 1e-3): {0.02: 18.0},
        ("transformer_xl", 1e-3): {0.1: 18.52, 0.2: 18.65},
        ("transformer_xl", 2e-3): {0.1: 18.55, 0.2: 18.45},
    }

    def run(lab, arch, one):
        found = bits[arch, one["lr"]][one["warmup"]]
        return {"arch": arch, **one, "validation_bits_per_note": found}

    monkeypatch.setattr(race, "whole", run)
    monkeypatch.setattr(race, "trained", lambda lab, one: one)
    trials = [
        {"arch": arch, "lr": lr, "warmup": min(found), "validation_bits_per_note": 20 - lr}
        for (arch, lr), found in bits.items()
    ]
    rows, best = race.choose(lab, trials)
    assert best == {
        "mamba": {"lr": 1e-3, "warmup": 0.2},
        "s4d": {"lr": 1e-3, "warmup": 0.2},
        "lstm": {"lr": 1e-3, "warmup": 0.1},
        "hybrid": {"lr": 1e-3, "warmup": 0.02},
        "transformer_xl": {"lr": 2e-3, "warmup": 0.2},
    }
    tried = {(row["arch"], row["lr"], row["warmup"]) for row in rows}
    assert tried == {(*key, w) for key, found in bits.items() for w in found if w < 0.4}
    assert [(row["arch"], row["warmup"]) for row in race.look_beyond(lab, best)] == [("mamba", 0.4)]


def test_a_doubling_is_worth_what_the_last_two_budgets_say():
    assert race.doubling([(10, 9.0), (20, 7.0), (80, 5.0)]) == pytest.approx(-1.0)
    assert race.doubling([(10, 9.0)]) is None


def test_what_ended_on_one_machine_is_not_trained_again_on_another(
    lab, found, tmp_path, monkeypatch
):
    result = race.run(lab)
    monkeypatch.setattr(Lab, "model", lambda *args: pytest.fail("no weights came along"))
    monkeypatch.setattr(Lab, "train", lambda *args: pytest.fail("trained again"))

    def elsewhere(protocol):
        return Lab(
            protocol, tmp_path, kept=lab.kept, device="cpu", found=found, cache=lab.cache, say=quiet
        )

    again = race.run(elsewhere(TINY))
    assert json.dumps(again["summary"]) == json.dumps(result["summary"])
    others = elsewhere(replace(TINY, config=replace(TINY.config, transpose=3)))
    with pytest.raises(UserError, match="another protocol"):
        race.trained(others, race.trial(others, "lstm", 1e-3, 0.1))


def test_weights_that_stayed_on_another_machine_are_trained_again(lab):
    result = race.run(lab)
    name = next(
        row["name"] for row in result["runs"] if row["arch"] == "mamba" and row["steps"] == 4
    )
    kept = {}
    for part in ("test", "context", "playing"):
        path = lab.kept / f"{name.replace('/', '-')}-{part}.json"
        kept[path] = path.read_text()
        path.unlink()
    shutil.rmtree(lab.place(name))
    lab.path("race").unlink()
    assert json.dumps(race.run(lab)["test"]) == json.dumps(result["test"])
    assert {path: path.read_text() for path in kept} == kept


def test_context_counts_each_token_at_its_place(lab):
    race.run(lab)
    result = experiment_context.run(lab)
    assert [row["arch"] for row in result["reach"][::2]] == list(TINY.race.archs)
    nats = [np.arange(1.0, 31) * math.log(2), np.ones(5) * math.log(2)]
    notes = [np.tile([1, 0], 15), np.array([1, 0, 0, 0, 0])]
    row = experiment_context._bits(nats, notes, 10, 20)
    assert row["pieces"] == 1 and row["bits_per_note"] == pytest.approx(sum(range(11, 21)) / 5)
    assert experiment_context._bits(nats, notes, 40, None)["bits_per_note"] is None
    assert "tokens" in experiment_context.table(result)


def test_figures_that_another_protocol_left_are_not_taken_for_this_one(lab, monkeypatch):
    race.run(lab)
    experiment_context.run(lab)
    one = entries.shown(lab)[0]
    arm, *_ = tokenizers.arms(lab)
    item = arm, 0, TINY.tokenizers.notes[0]
    assert tokenizers.measured(lab, item) == tokenizers.measured(lab, item)
    longer = replace(TINY.context, lengths=(*TINY.context.lengths, 64))
    monkeypatch.setattr(lab, "protocol", replace(TINY, context=longer))
    with pytest.raises(UserError, match="another protocol"):
        experiment_context.curves(lab, one)
    other = replace(TINY.config, weight_decay=0.5)
    monkeypatch.setattr(lab, "protocol", replace(TINY, config=other))
    with pytest.raises(UserError, match="another protocol"):
        tokenizers.measured(lab, item)


def test_context_needs_the_models_of_the_race(found, tmp_path):
    with pytest.raises(UserError, match="--only race"):
        experiment_context.run(Lab(TINY, tmp_path, device="cpu", found=found, say=quiet))


def test_every_architecture_continues_the_same_opening(lab):
    race.run(lab)
    result = experiment_playing.run(lab)
    assert [row["arch"] for row in result["played"]] == list(TINY.race.archs)
    tokenizer = lab.streams(10.0)[1]
    for row in result["played"]:
        assert row["tokens"] and tokenizer.notes_of[row["tokens"]].sum() > 0
    assert experiment_playing.run(lab)["played"] == result["played"]  # the same dice
    assert "tokens after" in experiment_playing.table(result)


def test_runs_side_by_side_come_to_the_same_end_as_one_after_another(lab, found, tmp_path):
    one = race.run(lab)
    two = Lab(TINY, tmp_path, device="cpu", found=found, jobs=2, cache=lab.cache, say=quiet)
    both = race.run(two)
    two.processes.shutdown()

    def without_speeds(rows):
        return [{key: row[key] for key in row if key != "tokens_per_second"} for row in rows]

    assert both["test"] == json.loads(json.dumps(one["test"]))
    for part in ("trials", "runs"):
        assert without_speeds(both[part]) == json.loads(json.dumps(without_speeds(one[part])))


def test_tokenizers_are_compared_on_one_grid(lab):
    rows = token_part.run(lab)["rows"]
    assert [row["bpe"] for row in rows] == [None, 400]
    # 62.5 ms to 10 ms: 2.64 bits for the onset, as many for durations below a second
    for row in rows:
        assert row["bits_per_note_10_ms"] - row["native_bits_per_note"] == pytest.approx(
            row["added_bits_per_note"]
        )
        assert 3.5 < row["added_bits_per_note"] <= 2 * math.log2(6.25) + 0.01
    assert rows[1]["tokens"] < rows[0]["tokens"]  # the same notes in fewer tokens


def test_languages_of_tokens_are_compared_at_equal_notes_and_at_equal_operations(lab):
    rows = tokenizers.run(lab)["rows"]
    assert [(row["kind"], row["grid_ms"], row["bpe"]) for row in rows] == [
        ("REMI", 10.0, None),
        ("TSD", 10.0, None),
        ("REMI", 10.0, 600),
        ("REMI", 62.5, None),
    ]
    notes = np.array(rows[0]["notes"])
    for row in rows:
        bits = np.array(row["bits"])
        assert bits.shape == (2, len(notes)) and row["bits_per_note"] == pytest.approx(
            bits.mean(0).sum() / notes.sum()
        )
        (few, before), (many, after) = row["curve"]
        assert row["doubling"] == pytest.approx((after - before) / math.log2(many / few))
        share = rows[0]["operations_a_note"] / row["operations_a_note"]
        assert row["equal_operations"] == pytest.approx(
            row["bits_per_note"] + math.log2(share) * row["doubling"]
        )
    assert rows[2]["tokens_a_note"] < rows[0]["tokens_a_note"]
    assert "not shown" in tokenizers.table({"rows": rows})


def test_the_same_pieces_are_drawn_whatever_the_tokens():
    pieces = made_up(lengths=(30,) * 9, splits=("validation",) * 9).pieces
    longer = [replace(piece, length=40) for piece in pieces[::-1]]
    some = token_part.drawn(pieces, 4)
    assert len(some) == 4 and {p.name for p in some} == {
        p.name for p in token_part.drawn(longer, 4)
    }
    assert token_part.drawn(pieces, None) == pieces


def test_the_original_each_repair_and_all_but_each(lab):
    result = original.run(lab)
    arms = {arm["arm"]: arm for arm in result["arms"]}
    assert list(arms) == [
        "nothing",
        *original.REPAIRS,
        "everything",
        *(f"all but {name}" for name in original.REPAIRS),
    ]
    notes = np.array(result["notes"])
    for arm in arms.values():
        bits = np.array(arm["bits"])
        assert bits.shape == (2, 1) == (len(TINY.original.seeds), len(notes))
        assert arm["bits_per_note"] == pytest.approx(bits.mean(0).sum() / notes.sum())
        assert arm["gain"]["bits_per_note"] == pytest.approx(
            arms["nothing"]["bits_per_note"] - arm["bits_per_note"], abs=0.01
        )
        assert arm["lost"]["bits_per_note"] == pytest.approx(
            arm["bits_per_note"] - arms["everything"]["bits_per_note"], abs=0.01
        )
        for curve in arm["curves"]:
            assert [point["pass"] for point in curve] == [2, 4]
    assert arms["penalty"]["bits_per_note"] == pytest.approx(
        arms["nothing"]["without_penalty"], abs=0.01
    )
    assert arms["penalty"]["curves"] == arms["nothing"]["curves"]  # one training
    assert arms["vocabulary"]["vocabulary"] == 580 < arms["nothing"]["vocabulary"] <= 640
    assert "not shown" in original.table(result)


def test_held_out_bits_of_a_curve_are_those_of_the_model_at_that_pass(lab):
    original.run(lab)
    recipe = original.ARMS["everything"]
    streams, judge = original.data(lab, recipe)
    one = original.spec(lab, original.trained_as("everything"), recipe, streams, 0)
    run = Run(one, streams, lab.folder / "again", judge, device="cpu", say=quiet)
    run.run(progress=False)
    wanted = float(
        evaluate.piece_bits(run.model, streams, judge).sum() / sum(p.notes for p in judge)
    )
    kept = next(arm for arm in original.run(lab)["arms"] if arm["arm"] == "everything")
    assert run.judged[-1] == pytest.approx(wanted)
    assert kept["curves"][0][-1]["held_out"] == pytest.approx(wanted, rel=1e-6)


def test_the_originals_chunks_overlap_and_lie_on_both_sides(lab):
    streams, measured = original.data(lab, original.Recipe())
    train, held_out = streams.select("train"), streams.select("validation")
    assert train and held_out and {p.name for p in held_out} <= {p.name for p in train}
    parts = [p for p in streams.pieces if p.split != "test"]
    assert all(p.length <= 25 and p.notes > 0 for p in parts)
    shared = [
        min(a.offset + a.length, b.offset + b.length) - max(a.offset, b.offset)
        for a in train
        for b in held_out
    ]
    assert max(shared) > 1  # the same bar is trained on and validated on
    repaired, same = original.data(lab, original.Recipe(split=True))
    assert [p.name for p in same] == [p.name for p in measured]
    sides = [{p.name for p in repaired.select(split)} for split in ("train", "validation", "test")]
    assert all(sides) and not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])
    assert sides[0] == {p.name for p in train} and sides[2] == {p.name for p in measured}
    more, _ = original.data(lab, original.Recipe(augmentation=True))
    assert {p.copy for p in more.select("train", copies=True)} == {0, 1}
    assert {p.copy for p in more.pieces if p.split == "validation"} == {0}


def test_too_few_performances_are_refused_in_a_sentence(lab):
    more = Lab(
        replace(TINY, original=replace(TINY.original, pieces=9)),
        lab.folder,
        device="cpu",
        found=lab.found,
        say=quiet,
    )
    with pytest.raises(
        UserError, match="only 3 train performances of 0 to 60 seconds are here, and 9 are needed"
    ):
        original.chosen_performances(more)


@pytest.mark.parametrize("penalty", [1.0, 0.9, 1.3])
def test_the_penalty_is_the_published_one(penalty):
    torch.manual_seed(0)
    model, streams = baselines.build("mamba", 13, SIZE).eval(), made_up()
    with torch.no_grad():
        model.backbone.embeddings.weight *= 40  # logits of both signs, far from 0
    found = original.penalised_bits(model, streams, streams.pieces[:2], penalty, segment=7)
    for bits, piece in zip(found, streams.pieces):
        ids = torch.from_numpy(streams.stream(piece).astype(np.int64))
        logits, wanted = model(ids[None, :-1])[0].detach(), 0.0
        for t, row in enumerate(logits):
            for token in set(ids[: t + 1].tolist()):
                row[token] = row[token] / penalty if row[token] > 0 else row[token] * penalty
            wanted += F.cross_entropy(row, ids[t + 1]).item()
        assert bits == pytest.approx(wanted / math.log(2), rel=1e-4)


# ---- efficiency ----------------------------------------------------------------------------


def test_efficiency_measures_every_kind_and_keeps_what_it_has(lab, monkeypatch):
    result = efficiency.run(lab)
    kinds = {(row["kind"], row["arch"]) for row in result["rows"]}
    for arch in ("mamba", "transformer"):
        assert {(kind, arch) for kind in efficiency.KINDS} <= kinds
    for row in result["rows"]:
        if row["kind"] != "memory":
            assert 0 < row["q1_ms"] <= row["median_ms"] <= row["q3_ms"] and row["count"] >= 3
    states = {
        (row["arch"], row["length"]): row["state_bytes"]
        for row in result["rows"]
        if row["kind"] == "generation"
    }
    assert states["mamba", 8] == states["mamba", 32]
    width, layers = baselines.config_of("transformer", 20, SIZE).d_model, 2
    assert states["transformer", 32] - states["transformer", 8] == 24 * layers * 2 * width * 4
    wide = {
        (row["arch"], row["batch"]): row for row in result["rows"] if row["kind"] == "throughput"
    }
    for arch in ("mamba", "transformer"):  # a row of a batch remembers as much as a piece alone
        assert wide[arch, 1]["state_bytes"] == wide[arch, 3]["state_bytes"]
        for batch in (1, 3):
            assert wide[arch, batch]["tokens_per_second"] == pytest.approx(
                1e3 * batch / wide[arch, batch]["median_ms"]
            )
    slopes = {(row["arch"], row["quantity"]): row for row in result["exponents"]}
    assert slopes["mamba", "state_bytes"]["exponent"] == pytest.approx(0)
    assert slopes["transformer", "state_bytes"]["exponent"] == pytest.approx(1, abs=0.01)
    monkeypatch.setattr(efficiency, "timed", lambda *args: pytest.fail("measured again"))
    monkeypatch.setattr(efficiency, "memory", lambda *args: pytest.fail("measured again"))
    assert efficiency.run(lab)["rows"] == json.loads(json.dumps(result["rows"]))


def test_an_exponent_is_found_with_its_error():
    x = np.array([1, 2, 4, 8, 16])
    exact = efficiency.slope(x, 3 * x**2.0)
    assert exact["exponent"] == pytest.approx(2) and exact["standard_error"] == pytest.approx(
        0, abs=1e-12
    )
    rng, inside = np.random.default_rng(0), 0
    for _ in range(300):
        one = efficiency.slope(x, 3 * x**1.5 * np.exp(rng.normal(0, 0.1, 5)))
        # 3.18 is Student's t for 3 degrees of freedom at 95 %
        inside += abs(one["exponent"] - 1.5) < 3.18 * one["standard_error"]
    assert 0.91 < inside / 300 < 0.99
    assert (
        efficiency.slope([1], [2])["exponent"] is None
        and efficiency.slope([1, 2, 3, 4], [2, 4, 6, 9])["standard_error"] is None
    )


@pytest.mark.parametrize("arch", ["lstm", "s4d", "hybrid", efficiency.STEPPER])
def test_generation_starts_at_its_position_in_every_round(arch):
    if arch == efficiency.STEPPER and not efficiency.step_cpu.KERNEL.available():
        pytest.skip("no C++ compiler")
    work, size = efficiency.Bench(SIZE, 20, "cpu").generation(arch, 9, 3)
    work()
    work()
    assert size > 0


def test_a_state_at_a_position_is_that_of_the_model():
    bench = efficiency.Bench(SIZE, 20, "cpu")
    model = bench.model("mamba", 16)
    whole = model(bench.tokens(50), return_state=True)[1]
    for ours, theirs in zip(bench.state(model, 50), whole):
        torch.testing.assert_close(ours[1], theirs[1])
    ring, count = bench.state(bench.model("transformer", 64), 50)[0]
    assert ring.shape[1] % 64 == 0 and count.item() == 50


# ---- the command, the figures --------------------------------------------------------------


def test_a_result_of_another_protocol_is_refused(lab, found):
    efficiency.run(lab)
    other = Lab(
        replace(TINY, size=replace(SIZE, d_model=18)),
        lab.folder,
        device="cpu",
        found=found,
        say=quiet,
    )
    with pytest.raises(UserError, match="another protocol"):
        efficiency.run(other)


# race and tokenizers are under way
@pytest.mark.parametrize("part", [part for part in PARTS if part != "tokenizers"])
def test_the_results_that_are_shipped_are_of_todays_protocol(part):
    lab = Lab(SCALES["cpu"], Path("unused"), device="cpu", say=quiet)
    assert lab.read(part), f"python -m lib.lab.experiments --only {part}"


def test_the_command_runs_one_part_and_says_when_the_minutes_are_used_up(
    monkeypatch, tmp_path, capsys, found
):
    monkeypatch.setitem(SCALES, "quick", TINY)
    monkeypatch.setattr("lib.music.maestro.performances", lambda *args, **options: found)
    options = ["--quick", "--folder", str(tmp_path), "--only", "race"]
    command.main([*options, "--budget-minutes", "1e-9"])
    assert "goes on from here" in capsys.readouterr().out
    command.main([*options, "--only", "context"])
    out = capsys.readouterr().out
    assert "experiments_race_quick.json" in out and "context" in out
    assert (tmp_path / "results" / "experiments_race_quick.json").exists()
    command.main([*options, "--restart", "--budget-minutes", "1e-9"])
    assert "goes on from here" in capsys.readouterr().out
    assert not (tmp_path / "results" / "experiments_race_quick.json").exists()
    for bad in (["--budget-minutes", "0"], ["--restart", "--scale", "cpu"]):
        with pytest.raises(UserError):
            command.main(bad)


def test_the_warm_up_is_shown_at_the_rate_of_the_best_trial():
    trials = [
        {"arch": "s4d", "lr": lr, "warmup": warmup, "validation_bits_per_note": bits}
        for lr, warmup, bits in ((8e-3, 0.1, 19.8), (16e-3, 0.1, 19.7), (16e-3, 0.02, 19.9))
    ]
    chosen = {"lr": 8e-3, "warmup": 0.2}  # whole runs may choose another than the trials do
    fig = experiment_figures.rates({"trials": trials, "best": {"s4d": chosen}})
    rates, warmups = fig.axes
    assert rates.lines[1].get_xdata() == [8e-3]
    assert list(warmups.lines[0].get_ydata()) == [19.9, 19.7]
    assert [tick.get_text() for tick in warmups.get_xticklabels()] == ["2%", "10%"]


def test_figures_and_tables_say_what_was_not_measured(lab, tmp_path, monkeypatch):
    monkeypatch.setattr(env, "RESULTS", tmp_path)
    assert experiment_figures.table1().count(env.UNKNOWN) == 6 * 5
    for draw in (
        experiment_figures.efficiency,
        partial(experiment_figures.figure3, {}),
        experiment_figures.context,
        experiment_figures.race,
        experiment_figures.crossings,
        experiment_figures.curves,
        experiment_figures.original,
        experiment_figures.tokens,
        experiment_figures.tokenizers,
        experiment_figures.piece_by_piece,
        experiment_figures.rates,
    ):
        assert plots.png_bytes(draw({}))[:4] == b"\x89PNG"
    race.run(lab)
    efficiency.run(lab)
    for part in ("efficiency", "race"):
        (tmp_path / f"experiments_{part}_cpu.json").write_text(lab.path(part).read_text())
    half = race.run(lab)  # what stands on disk while the floor is still counted
    half = {part: half[part] for part in ("protocol", "trials", "best", "runs", "test")}
    for draw in (
        experiment_figures.race,
        experiment_figures.crossings,
        experiment_figures.curves,
        experiment_figures.piece_by_piece,
        experiment_figures.rates,
    ):
        assert plots.png_bytes(draw(half))[:4] == b"\x89PNG"
    table = experiment_figures.table1()
    # the tiny protocol leaves out three of the six, and of the LSTM what is no likelihood
    assert table.count(env.UNKNOWN) == 3 * 5 + 4
    summary = json.loads(lab.path("race").read_text())["summary"]["budgets"]["tokens"]["mamba"]
    assert f"{summary['bits_per_note']:.2f} (" in table
    for name, draw in (
        ("efficiency", experiment_figures.efficiency),
        ("efficiency", partial(experiment_figures.figure3, SCAN)),
        ("context", experiment_figures.context),
        ("race", experiment_figures.curves),
        ("race", experiment_figures.piece_by_piece),
        ("race", experiment_figures.rates),
        ("tokens", experiment_figures.tokens),
        ("tokenizers", experiment_figures.tokenizers),
        ("original", experiment_figures.original),
        ("original", experiment_figures.overfitting),
        ("race", experiment_figures.race),
        (
            "original",
            partial(experiment_figures.never_seen, arms={"nothing": "k", "everything": "b"}),
        ),
        ("race", experiment_figures.crossings),
    ):
        module = {
            "context": experiment_context,
            "tokens": token_part,
            "tokenizers": tokenizers,
            "original": original,
            "race": race,
        }.get(name)
        result = module.run(lab) if module else experiment_figures.load(name)
        assert len(plots.png_bytes(draw(result))) > 10_000
