"""Claims about the scan's benchmark: it measures fairly, says what it leaves out,
and sums up by medians.
"""

import json
import sys
from functools import partial

import numpy as np
import pytest
import torch

from lib.env import machine as env
from lib.env.errors import UserError
from lib.lab.bench import __main__ as bench
from lib.lab.bench import scan as scan_bench
from lib.lab.bench import timing
from lib.lab.bench.timing import Contender
from lib.scan import cpu as scan_cpu
from lib.scan import native

TINY = [
    "--device",
    "cpu",
    "--lengths",
    "8,16,32",
    "--batch",
    "1",
    "--d-inner",
    "4",
    "--d-state",
    "2",
    "--repeats",
    "3",
]


# ---- lib.lab.bench.timing ------------------------------------------------------------------------


def rival(name, call=lambda x: 2 * x):
    return Contender(
        name, name, "a product", lambda given: (call, {"x": given["x"].clone().requires_grad_()})
    )


def numbers(length):
    return {"x": torch.randn(length, generator=torch.Generator().manual_seed(0))}


@pytest.fixture
def clock(monkeypatch):
    """Time that does not pass: each work is run,
    and "takes" what the contender's name says, an element.
    """

    def stopwatch(device):
        def measure(work):
            work()
            return clock.takes[clock.last]

        return measure

    clock.takes, clock.last, clock.order = {}, None, []
    monkeypatch.setattr(timing, "stopwatch", stopwatch)
    return clock


def timed_rival(clock, name, milliseconds):
    """A contender that takes milliseconds(length)."""

    def call(x):
        clock.last, clock.takes[name] = name, milliseconds(len(x))
        if torch.is_grad_enabled():
            clock.order.append((name, len(x)))
        return 2 * x

    return rival(name, call)


def run(contenders, lengths, **options):
    options = {"repeats": 5, "seconds": 10, "limit": 90, "say": str} | options
    return timing.measure(contenders, lengths, numbers, **options)


def test_contenders_take_turns_in_every_round(clock):
    run([timed_rival(clock, "a", lambda n: 1.0), timed_rival(clock, "b", lambda n: 1.0)], [8])
    assert [name for name, _ in clock.order[4:]] == ["a", "b"] * 5, "after two warm-up calls each"


def test_slow_contender_gets_fewer_rounds_but_never_under_three(clock):
    rows, cut = run(
        [
            timed_rival(clock, "slow", lambda n: 4000.0),
            timed_rival(clock, "slower", lambda n: 20_000.0),
            timed_rival(clock, "fast", lambda n: 1.0),
        ],
        [8],
        repeats=9,
        seconds=20,
    )
    assert not cut and [row["forward_backward"]["count"] for row in rows] == [5, 3, 9]
    assert rows[0]["forward"] == {"median_ms": 4000, "q1_ms": 4000, "q3_ms": 4000, "count": 5}


def test_contender_that_grows_too_slow_is_cut_with_its_reason_and_the_rest_go_on(clock):
    square, line = (
        timed_rival(clock, "square", lambda n: n * n),
        timed_rival(clock, "line", lambda n: n),
    )
    rows, cut = run([square, line], [8, 16, 32, 64, 128], limit=2)
    assert [row["length"] for row in rows if row["contender"] == "square"] == [8, 16, 32]
    assert [row["length"] for row in rows if row["contender"] == "line"] == [8, 16, 32, 64, 128]
    assert cut == [
        {"contender": "square", "length": 64, "why": "a call would take about 4 s (limit 2 s)"}
    ]
    assert ("square", 64) not in clock.order, "its own trend said so before it was tried"


def test_contender_without_a_trend_is_cut_once_a_call_took_too_long(clock):
    _, cut = run([timed_rival(clock, "a", lambda n: 5000.0)], [8, 16], limit=2)
    assert [(stop["length"], stop["why"]) for stop in cut] == [(8, "a call took 5 s (limit 2 s)")]


def test_contender_that_runs_out_of_memory_is_cut_and_the_rest_go_on(clock):
    def call(x):
        if len(x) > 8:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory\nand a long trace")
        return 2 * x

    clock.takes[None] = 1.0
    rows, cut = run([rival("big", call), timed_rival(clock, "small", lambda n: 1.0)], [8, 16, 32])
    assert [row["length"] for row in rows if row["contender"] == "small"] == [8, 16, 32]
    assert cut == [{"contender": "big", "length": 16, "why": "not enough memory"}]


def test_kept_bytes_counts_each_storage_once_and_no_argument():
    keeps = partial(timing.kept_bytes, leaves={"x": torch.randn(100, requires_grad=True)})
    assert keeps(lambda x: x * x) == 0, "x alone, an argument"
    assert keeps(torch.exp) == 400, "what it gives"
    assert keeps(lambda x: (e := x.exp())[:50] * e[50:]) == 400, "two views of one"
    assert keeps(lambda x: x.exp().exp()) == 800, "two of them"


def test_kept_bytes_sees_what_a_function_of_ours_keeps():
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x, x.new_zeros(7))
            return 2 * x

        @staticmethod
        def backward(ctx, dy):
            return 2 * dy

    assert timing.kept_bytes(Twice.apply, {"x": torch.randn(100, requires_grad=True)}) == 28


@pytest.mark.skipif(
    sys.platform != "linux", reason="a process's highest memory is read from Linux's /proc"
)
def test_peak_bytes_is_how_far_memory_rises():
    for size in (256, 64):  # MiB, given back at once; what was reached before is forgotten
        found = timing.peak_bytes(
            lambda size=size: torch.ones(size << 20, dtype=torch.uint8), "cpu"
        )
        assert size - 4 < found / 2**20 < size + 16


def test_exponent_of_a_made_up_law_is_found():
    lengths = [256, 512, 1024, 4096]
    assert timing.exponent(lengths, [3e-4 * n**1.5 for n in lengths]) == pytest.approx(1.5)
    noisy = [n * (1.05 if i % 2 else 0.95) for i, n in enumerate(lengths)]
    assert timing.exponent(lengths, noisy) == pytest.approx(1, abs=0.1)


# ---- lib.lab.bench.scan -----------------------------------------------------------------------


def row(name, length, milliseconds, **place):
    times = {"median_ms": milliseconds, "q1_ms": 1, "q3_ms": 100, "count": 3}
    return {
        "contender": name,
        "length": length,
        "dtype": "float32",
        "allocator": "tuned",
        "forward": times,
        "forward_backward": times | {"median_ms": 3 * milliseconds},
    } | place


def test_ratios_are_of_medians_of_the_same_length_type_and_allocator():
    rows = [
        row("cpu", 8, 2.0),
        row("cpu", 16, 4.0),
        row("mambapy", 8, 10.0),
        row("mambapy", 16, 40.0),
        row("mambapy", 8, 30.0, allocator="default"),
        row("cpu", 8, 3.0, allocator="default"),
        row("mambapy", 32, 1.0),
    ]
    found = {
        (r["length"], r["allocator"]): r["forward_backward"] for r in scan_bench.ratios(rows, "cpu")
    }
    assert found == {(8, "tuned"): 5, (16, "tuned"): 10, (8, "default"): 10}


@pytest.mark.parametrize(
    "dtype, forward, backward", [("bfloat16", 120, 193), ("float32", 143, 245)]
)
def test_floors_of_an_h100_are_those_worked_out_on_paper(dtype, forward, backward):
    low = scan_bench.floors("NVIDIA H100 80GB HBM3", 8, 2048, 1536, 16, dtype, chunk=64)
    assert 1e3 * low["forward"] == pytest.approx(forward, rel=0.01)
    assert 1e3 * low["forward_backward"] == pytest.approx(forward + backward, rel=0.01)
    assert scan_bench.floors("CPU, 2 cores", 8, 2048, 1536, 16, dtype) is None
    found = scan_bench.floor_rows(
        [row("triton", 2048, 0.4)],
        "triton",
        "NVIDIA H200",
        {"batch": 8, "d_inner": 1536, "d_state": 16},
    )
    assert 1 < found[0]["forward_ratio"] < 4, "an H200 has more bandwidth: its floors are lower"


def test_arguments_are_those_of_a_fresh_model():
    given = scan_bench.arguments(2, 9, 5, 3, torch.bfloat16)
    steps = torch.nn.functional.softplus(given["delta_bias"])
    assert (
        0.00099 < steps.min() and steps.max() < 0.101 and given["A"].tolist() == [[-1, -2, -3]] * 5
    )
    assert {name for name, t in given.items() if t.dtype == torch.float32} == {
        "A",
        "D",
        "delta_bias",
    }


def test_channels_first_changes_memory_but_no_value():
    given = scan_bench.arguments(2, 9, 5, 3)
    leaves = scan_bench.lay_out(given, channels_first=True)
    assert all(torch.equal(leaves[name], t) and leaves[name].is_leaf for name, t in given.items())
    assert leaves["x"].transpose(1, 2).is_contiguous() and leaves["A"].is_contiguous()


def test_long_convolution_by_fft_is_the_convolution():
    call, leaves = scan_bench.contender("convolution").prepare(scan_bench.arguments(2, 11, 5, 3))
    x, kernel = leaves["x"], leaves["kernel"]
    direct = torch.stack(
        [(x[..., : t + 1] * kernel[..., : t + 1].flip(-1)).sum(-1) for t in range(11)], -1
    )
    torch.testing.assert_close(call(**leaves), direct, rtol=1e-5, atol=1e-5)


def test_wrong_contender_is_found_by_the_check():
    right = scan_bench.contender("loop")
    assert scan_bench.check(right, 3, "float32", "cpu")["error"] < 1e-5

    def prepare(given):
        call, leaves = right.prepare(given)
        return lambda delta_bias, **more: call(
            delta_bias=1.01 * delta_bias.detach() + 0 * delta_bias, **more
        ), leaves

    wrong = Contender("wrong", "", "", prepare)
    assert scan_bench.check(wrong, 3, "float32", "cpu")["error"] > 1e-3


@pytest.mark.parametrize(
    "options, words",
    [
        (["--lengths", "8,many"], "whole numbers"),
        (["--lengths", ","], "at least 1"),
        (["--lengths", "0,8"], "at least 1"),
        (["--repeats", "0"], "at least 1"),
        (["--only", "cpu,mambo"], "'mambo'.*mambapy"),
        (["--only", "mamba_ssm_cuda"], "on a cpu device"),
        (["--dtype", "int8"], "'int8'.*float32"),
    ],
)
def test_bad_option_is_one_sentence(options, words):
    with pytest.raises(UserError, match=words) as caught:
        bench.main(["scan", *TINY, *options])
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_missing_gpu_is_one_sentence():
    with pytest.raises(UserError, match="no CUDA device"):
        bench.main(["scan", "--device", "cuda"])


@pytest.fixture
def same_process(monkeypatch):
    """The children's work in this process: it is the same, and imports torch once."""
    monkeypatch.setattr(scan_bench, "limit_memory", lambda: None)
    monkeypatch.setattr(scan_cpu, "keep_memory", lambda: None)
    tasks = []

    def here(task):
        tasks.append(task)
        return {"seconds": 1.0} if task["task"] == "compile" else scan_bench.child(task)

    monkeypatch.setattr(scan_bench, "_run", here)
    return tasks


def test_missing_peer_is_said_and_the_rest_goes_into_the_file(
    tmp_path, monkeypatch, same_process, capsys
):
    monkeypatch.setitem(sys.modules, "mambapy", None)
    monkeypatch.setitem(sys.modules, "mambapy.mamba", None)
    path = tmp_path / "scan.json"
    bench.main(["scan", *TINY, "--only", "loop,mambapy", "--output", str(path)])
    result = json.loads(path.read_text(encoding="utf-8"))
    assert result["absent"] == {
        "mambapy": "mambapy is not installed: run pip install mambapy==1.2.0"
    }
    assert "without mambapy: mambapy is not installed" in capsys.readouterr().err
    assert result["command"].startswith(
        "python -m lib.lab.bench scan --device cpu --lengths 8,16,32"
    )
    assert (
        result["versions"]["torch"]
        and result["device"]
        and result["seed"] == 0
        and result["threads"] > 0
    )
    assert (
        result["shape"] == {"batch": 1, "d_inner": 4, "d_state": 2} and result["key_length"] == 32
    )
    assert [(r["length"], r["allocator"]) for r in result["rows"]] == [
        (8, "tuned"),
        (16, "tuned"),
        (32, "tuned"),
        (32, "default"),
    ]
    for kind in ("forward", "forward_backward"):
        assert all(
            0 < r[kind]["q1_ms"] <= r[kind]["median_ms"] <= r[kind]["q3_ms"]
            and r[kind]["count"] == 3
            for r in result["rows"]
        )
    assert result["memory"][2]["kept_bytes_per_element"] > 12 * 2, (
        "the loop keeps at least three tensors (B, L, D, N)"
    )
    assert (
        set(result["exponents"]) == {"loop"} and result["checks"]["loop, float32"]["error"] < 1e-5
    )
    assert {r["contender"] for r in result["figure3"]["rows"]} == {
        "loop",
        "convolution",
        "attention",
    }
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_key_row_has_the_claims(tmp_path, monkeypatch, same_process):
    """Ratio by allocator, memory kept and exponent, as they stand in the rows."""
    pytest.importorskip("mambapy", reason="mambapy is not installed")
    path = tmp_path / "scan.json"
    bench.main(["scan", *TINY, "--only", "loop,mambapy", "--no-figure3", "--output", str(path)])
    result = json.loads(path.read_text(encoding="utf-8"))
    key, medians = result["key"], {}
    for r in result["rows"]:
        medians[r["contender"], r["length"], r["allocator"]] = r["forward_backward"]["median_ms"]
    for allocator in ("tuned", "default"):
        ratio = medians["mambapy", 32, allocator] / medians["loop", 32, allocator]
        assert key[f"float32, {allocator} allocator"]["mambapy"][
            "forward_backward"
        ] == pytest.approx(ratio, abs=0.006)
    assert key["kept_bytes_per_element"] == result["memory"][2]["kept_bytes_per_element"]
    assert key["exponent"] == result["exponents"]["loop"] and "figure3" not in result
    assert result["versions"]["mambapy"] == "1.2.0"


def test_a_contender_that_is_wrong_is_not_timed(same_process, monkeypatch):
    monkeypatch.setattr(scan_bench, "check", lambda *a: {"error": 0.5, "of": "dA"})
    found = scan_bench.child(
        {
            "task": "time",
            "names": ["loop"],
            "lengths": [8],
            "batch": 1,
            "d_inner": 4,
            "d_state": 2,
            "device": "cpu",
            "dtype": "float32",
            "allocator": "default",
            "repeats": 1,
            "seconds": 1,
            "limit": 1,
        }
    )
    assert (
        found["absent"] == {"loop": "dA differs from the float64 loop by 5.0e-01"}
        and not found["rows"]
    )


@pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler here: nothing to time")
def test_child_process_compiles_into_an_empty_folder_and_answers():
    """A task the way the command runs it, in a process of its own;
    it complains where nothing was compiled.
    """
    assert scan_bench._run({"task": "compile"})["seconds"] > 0.1


def test_child_process_that_dies_is_one_sentence():
    with pytest.raises(UserError, match="^measuring loop ended with code 1: try fewer contenders"):
        scan_bench._run({"task": "memory", "names": ["loop"]})


def made_up(**more):
    names = {"cpu": "ours, cpu", "mambapy": "mambapy"}
    rows = [
        row(name, n, factor * n)
        for name, factor in (("cpu", 0.01), ("mambapy", 0.2))
        for n in (256, 512, 1024)
    ]
    attention = [row("attention", n, n**2 / 4e4) for n in (256, 512, 1024)]
    return {
        "dtypes": ["float32"],
        "allocators": ["tuned"],
        "rows": rows,
        "key_length": 1024,
        "ours": "cpu",
        "contenders": {name: {"label": label} for name, label in names.items()},
        "key": {
            "float32, tuned allocator": {"mambapy": {"forward": 20.0, "forward_backward": 20.0}}
        },
        "figure3": {
            "contenders": {"cpu": {"label": "ours"}, "attention": {"label": "attention"}},
            "rows": [*rows[:3], *attention],
        },
    } | more


def test_figures_draw_the_medians_and_say_what_was_found():
    ax = scan_bench.draw(made_up()).axes[0]
    assert (
        ax.get_title("left")
        == "The fastest peer, mambapy, takes 20 times as long as ours at length 1,024"
    )
    np.testing.assert_allclose(
        [line.get_ydata()[-1] for line in ax.lines], [3 * 0.01 * 1024, 3 * 0.2 * 1024]
    )
    assert [text.get_text() for text in ax.texts] == ["ours, cpu", "mambapy"]
    ax = scan_bench.draw_figure3(made_up(), "forward").axes[0]
    assert ax.get_title("left") == "The scan is faster than attention from length 512 on"
    mixed = made_up()
    mixed["figure3"]["rows"] = [
        *(row("cpu", n, 1.0) for n in (1, 2, 3)),
        row("attention", 1, 2.0),
        row("attention", 2, 0.5),
        row("attention", 3, 2.0),
    ]
    assert scan_bench.draw_figure3(mixed).axes[0].get_title("left").endswith("from length 3 on")
    slow = made_up()
    slow["figure3"]["rows"] = [row("cpu", 256, 9.0), row("attention", 256, 1.0)]
    assert scan_bench.draw_figure3(slow).axes[0].get_title("left").startswith("Attention is faster")


def test_names_of_lines_do_not_lie_on_each_other():
    same = made_up()
    for r in same["rows"]:
        r["forward_backward"] = same["rows"][0]["forward_backward"]
    fig = scan_bench.draw(same)
    fig.canvas.draw()
    first, second = (text.get_window_extent() for text in fig.axes[0].texts)
    assert not first.overlaps(second)


def test_results_are_read_by_device(tmp_path, monkeypatch):
    monkeypatch.setattr(env, "RESULTS", tmp_path)
    assert scan_bench.load("cpu_2_cores") == {} == scan_bench.load()
    (tmp_path / f"scan_{scan_bench.slug(env.device_name())}.json").write_text('{"ours": "cpu"}')
    assert scan_bench.load() == {"ours": "cpu"}
    assert (
        scan_bench.slug("CPU, 2 cores") == "cpu_2_cores"
        and scan_bench.slug("NVIDIA H200") == "nvidia_h200"
    )
