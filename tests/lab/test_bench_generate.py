"""Claims about the benchmark of generation: contenders are equal, take turns,
and are summed up by medians.
"""

import json
import sys

import numpy as np
import pytest
import torch

from lib.env import machine as env
from lib.env.errors import UserError
from lib.lab.bench import __main__ as bench
from lib.lab.bench import generate as generate_bench
from lib.lab.bench.generate import Contenders
from lib.lab.bench.timing import Contender
from lib.lab.peers import language_models
from lib.mamba import model as mamba
from lib.mamba import step_cpu

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = [
    "--positions",
    "5,9",
    "--d-model",
    "24",
    "--n-layer",
    "2",
    "--d-state",
    "4",
    "--vocab-size",
    "40",
    "--repeats",
    "3",
    "--tokens",
    "4",
    "--memory-tokens",
    "64",
]
CONFIG = mamba.MambaConfig(40, 24, 2, 4)
needs_compiler = pytest.mark.skipif(not step_cpu.KERNEL.available(), reason="no C++ compiler here")


@pytest.fixture(scope="module")
def contenders():
    return Contenders(CONFIG, [5, 9], 16)


# ---- the contenders -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [pytest.param("stepper", marks=needs_compiler), "pytorch", "transformers_mamba"]
)
def test_three_mambas_give_the_same_logits_from_the_same_position(contenders, name):
    with torch.inference_mode():
        assert (
            generate_bench.check(contenders, contenders.get(name), 9) < 1e-5
        )  # float32, logits below one


def test_wrong_contender_is_found_by_the_check(contenders):
    right = contenders.get("pytorch")

    def begin(position):
        read, size = right.prepare(position)
        return (lambda token: 1.01 * read(token)), size

    with torch.inference_mode():
        assert generate_bench.check(contenders, Contender("wrong", "", "", begin), 9) > 1e-3


@pytest.mark.parametrize("name", ["gpt2", "gpt2_static"])
def test_gpt2_is_of_equal_size_and_its_cache_is_full_up_to_the_position(contenders, name):
    one = contenders.get(name)
    assert (
        abs(one.facts["parameters"] - contenders.model.parameter_count())
        < 0.03 * contenders.model.parameter_count()
    )
    sizes = []
    for position in (5, 9):
        read, size = one.prepare(position)
        sizes.append(size())
        with torch.inference_mode():
            assert read(torch.tensor([3])).shape == (1, 40)
    config = language_models.gpt2(contenders.model, 9).config
    kept = 2 * 24 * 4 * config.n_layer  # a key and a value, float32
    assert sizes == (
        [contenders.longest * kept] * 2 if name == "gpt2_static" else [5 * kept, 9 * kept]
    )


@pytest.mark.parametrize(
    "name", [pytest.param("stepper", marks=needs_compiler), "pytorch", "transformers_mamba"]
)
def test_a_mamba_keeps_as_much_at_any_position(contenders, name):
    one = contenders.get(name)
    assert one.prepare(5)[1]() == one.prepare(9)[1]() > 4 * 2 * 48 * 4, (
        "two layers, 48 channels, 4 states, float32"
    )


def test_each_round_starts_at_the_position_again(contenders):
    """Also where the function that was given before has read on."""
    one = contenders.get("pytorch")
    with torch.inference_mode():
        read, _ = one.prepare(5)
        first = [read(torch.tensor([t])) for t in (1, 2, 3)]
        read, _ = one.prepare(5)
        assert all(
            torch.equal(read(torch.tensor([t])), logits) for t, logits in zip((1, 2, 3), first)
        )


# ---- measuring ----------------------------------------------------------------------------


class Clock:
    """Time that does not pass: a token "takes" what its contender says, in milliseconds."""

    def __init__(self, monkeypatch):
        self.now, self.turns = 0.0, []
        monkeypatch.setattr(generate_bench.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(generate_bench, "trim", lambda: None)

    def rival(self, name, milliseconds):
        def begin(position):
            self.turns.append((name, position))

            def read(token):
                self.now += 1e-3 * milliseconds(position)
                return torch.zeros(1, 40)

            return read, lambda: 8 * position

        return Contender(name, name, "", begin)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def run(contenders, positions=(5,), **options):
    options = {"repeats": 3, "tokens": 100, "seconds": 2, "limit": 10, "say": str} | options
    return generate_bench.measure(contenders, list(positions), **options)


def test_contenders_take_turns_and_a_row_says_what_was_measured(clock):
    rows, cut = run([clock.rival("a", lambda p: p), clock.rival("b", lambda p: 2.0)], [9, 5])
    assert not cut and clock.turns == [(name, p) for p in (5, 9) for name in "ab" * 4], (
        "one to see, three rounds"
    )
    assert rows[0] == {
        "contender": "a",
        "position": 5,
        "median_ms": pytest.approx(5),
        "q1_ms": pytest.approx(5),
        "q3_ms": pytest.approx(5),
        "count": 3,
        "tokens": 100,
        "tokens_per_second": pytest.approx(200),
        "cache_bytes": 40,
    }
    assert [row["median_ms"] for row in rows] == pytest.approx([5, 2, 9, 2])


def test_slow_contender_gets_fewer_tokens_a_round_but_never_under_four(clock):
    rows, _ = run(
        [
            clock.rival("fast", lambda p: 1.0),
            clock.rival("slow", lambda p: 100.0),
            clock.rival("slower", lambda p: 3000.0),
        ]
    )
    assert [row["tokens"] for row in rows] == [100, 20, 4]


def test_contender_that_grows_too_slow_stops_with_its_reason_and_the_rest_go_on(clock):
    rows, cut = run(
        [clock.rival("square", lambda p: p * p), clock.rival("flat", lambda p: 1.0)],
        [5, 50, 500, 5000],
        limit=10,
    )
    assert [row["position"] for row in rows if row["contender"] == "square"] == [5, 50]
    assert len([row for row in rows if row["contender"] == "flat"]) == 4
    assert cut == [
        {"contender": "square", "position": 500, "why": "a token took 250 s (limit 10 s)"}
    ]
    assert ("square", 5000) not in clock.turns


def test_contender_without_memory_stops_and_the_rest_go_on(clock):
    flat = clock.rival("flat", lambda p: 1.0)

    def begin(position):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory\nand a long trace")

    rows, cut = run([Contender("big", "big", "", begin), flat])
    assert [row["contender"] for row in rows] == ["flat"]
    assert cut == [{"contender": "big", "position": 5, "why": "not enough memory"}]


# ---- what the times say -------------------------------------------------------------------


def made_up():
    rows = [
        {
            "contender": name,
            "position": p,
            "median_ms": ms,
            "q1_ms": 0.9 * ms,
            "q3_ms": 1.1 * ms,
            "count": 9,
            "tokens": 64,
            "tokens_per_second": 1e3 / ms,
            "cache_bytes": 2**20,
        }
        for name, times in (
            ("stepper", (0.2, 0.25)),
            ("transformers_mamba", (6.0, 6.0)),
            ("gpt2", (3.0, 15.0)),
        )
        for p, ms in zip((512, 8192), times)
    ]
    labels = {"stepper": "ours, C++", "transformers_mamba": "transformers' Mamba", "gpt2": "GPT-2"}
    result = {
        "ours": "stepper",
        "rows": rows,
        "contenders": {name: {"label": label} for name, label in labels.items()},
        "memory": {"tokens": 99, "growth_mib": 0.125},
    }
    result["ratios"] = generate_bench.ratios(rows, "stepper")
    return result


def test_ratios_are_of_medians_at_the_same_position():
    found = {(r["contender"], r["position"]): r["times"] for r in made_up()["ratios"]}
    assert found == {
        ("transformers_mamba", 512): pytest.approx(30),
        ("transformers_mamba", 8192): pytest.approx(24),
        ("gpt2", 512): pytest.approx(15),
        ("gpt2", 8192): pytest.approx(60),
    }


def test_key_row_has_the_claims():
    assert generate_bench.key_row(made_up()) == {
        "ours": "stepper",
        "tokens_per_second": {"512": 5000, "8192": 4000},
        "state_mib": 1.0,
        "growth_mib": 0.125,
        "times_as_long": {
            "transformers_mamba": {"512": 30.0, "8192": 24.0},
            "gpt2": {"512": 15.0, "8192": 60.0},
        },
    }


def test_table_has_a_line_a_row_and_ratios_only_for_others():
    lines = generate_bench.table(made_up()).splitlines()
    assert len(lines) == 2 + 6 and all(line.count("|") == 7 for line in lines)
    assert "| 3.000 (2.700–3.300, n=9) | 333 | 15.0 | 1.00 |" in lines[4]
    assert lines[2].endswith("| 5,000 |  | 1.00 |")


def test_figure_draws_the_medians_and_says_what_was_found():
    fig = generate_bench.draw(made_up())
    ax = fig.axes[0]
    assert ax.get_title("left") == (
        "At position 8,192, ours is 24 times as fast as transformers' Mamba, "
        "60 times as fast as GPT-2"
    )
    np.testing.assert_allclose(
        [line.get_ydata()[-1] for line in ax.lines], [4000, 1e3 / 6, 1e3 / 15]
    )
    fig.canvas.draw()
    boxes = [text.get_window_extent() for text in ax.texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    outside = ax.get_window_extent()
    assert all(box.x1 <= outside.x1 for box in boxes)


def test_title_speaks_of_the_faster_gpt2_at_the_last_position_that_anyone_reached():
    result = made_up()
    result["ratios"] += [{"contender": "gpt2_static", "position": 8192, "times": 9.96}]
    assert generate_bench._title(result).endswith(
        "24 times as fast as transformers' Mamba, 10.0 times as fast as GPT-2"
    )
    assert generate_bench._title({"ratios": []}) == "Tokens a second against position"


# ---- the command --------------------------------------------------------------------------


@pytest.fixture
def same_process(monkeypatch):
    """The children's work in this process: it is the same, and imports torch once."""
    monkeypatch.setattr(generate_bench, "limit_memory", lambda: None)
    monkeypatch.setattr(generate_bench, "_run", generate_bench.child)


@needs_compiler
def test_command_measures_and_writes_everything_down(tmp_path, same_process, capsys):
    path = tmp_path / "generate.json"
    bench.main(["generate", *TINY, "--only", "stepper,pytorch,gpt2", "--output", str(path)])
    result = json.loads(path.read_text(encoding="utf-8"))
    assert [(row["contender"], row["position"]) for row in result["rows"]] == [
        (name, p) for p in (5, 9) for name in ("stepper", "pytorch", "gpt2")
    ]
    assert all(
        0 < row["q1_ms"] <= row["median_ms"] <= row["q3_ms"] and row["count"] == 3
        for row in result["rows"]
    )
    assert result["command"].startswith("python -m lib.lab.bench generate --positions 5,9")
    assert (
        result["versions"]["transformers"]
        and result["device"]
        and result["seed"] == 0
        and result["threads"] > 0
    )
    assert result["config"] == {"vocab_size": 40, "d_model": 24, "n_layer": 2, "d_state": 4}
    assert set(result["checks"]) == {"stepper", "pytorch"} and max(result["checks"].values()) < 1e-5
    assert result["ours"] == "stepper" and set(result["key"]["times_as_long"]) == {
        "pytorch",
        "gpt2",
    }
    if sys.platform == "linux":
        assert result["memory"]["tokens"] == 64 and 0 <= result["memory"]["growth_mib"] < 1
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "| stepper | 5 |" in capsys.readouterr().out


def test_missing_peer_and_missing_compiler_are_said_and_the_rest_is_measured(
    tmp_path, same_process, monkeypatch, capsys
):
    monkeypatch.setattr(step_cpu.KERNEL, "available", lambda: False)
    monkeypatch.setitem(sys.modules, "transformers", None)
    path = tmp_path / "generate.json"
    bench.main(["generate", *TINY, "--only", "stepper,pytorch,gpt2", "--output", str(path)])
    result = json.loads(path.read_text(encoding="utf-8"))
    assert (
        result["ours"] == "pytorch"
        and set(result["absent"]) == {"stepper", "gpt2"}
        and "memory" not in result
    )
    assert "without gpt2: transformers is not installed: run pip install" in capsys.readouterr().err


def test_contender_that_is_wrong_is_not_timed(same_process, monkeypatch):
    monkeypatch.setattr(generate_bench, "check", lambda *a: 0.5)
    with pytest.raises(
        UserError, match="nothing could be measured: its logits differ from ours by 5.0e-01"
    ):
        bench.main(["generate", *TINY, "--only", "pytorch"])


@pytest.mark.parametrize(
    "options, words",
    [
        (["--positions", "8,many"], "whole numbers"),
        (["--positions", ","], "at least 1"),
        (["--repeats", "0"], "at least 1"),
        (["--positions", "0"], "at least 1"),
        (["--memory-tokens", "-1"], "at least 1"),
        (["--only", "pytorch,gpt5"], "'gpt5'.*gpt2"),
    ],
)
def test_bad_option_is_one_sentence(options, words):
    with pytest.raises(UserError, match=words) as caught:
        bench.main(["generate", *TINY, *options])
    assert "\n" not in str(caught.value)


def test_child_process_answers_and_one_that_dies_is_one_sentence():
    """A task the way the command runs it, in a process of its own."""
    with pytest.raises(
        UserError, match="^measuring memory ended with code 1: try fewer contenders"
    ):
        generate_bench._run({"task": "memory"})


def test_results_are_read_by_device(tmp_path, monkeypatch):
    monkeypatch.setattr(env, "RESULTS", tmp_path)
    assert generate_bench.load("cpu_2_cores") == {} == generate_bench.load()
    (tmp_path / f"generate_{generate_bench.slug(env.device_name())}.json").write_text(
        '{"ours": "stepper"}'
    )
    assert generate_bench.load() == {"ours": "stepper"}
