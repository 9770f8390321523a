"""Claims about lib.scan.triton_interpreter: the interpreter's scans give the same, sooner."""

import os
import subprocess
import sys

import pytest

KERNELS = """
import sys, time
import torch, triton, triton.language as tl
from lib.scan.triton_interpreter import fast_interpreter
fast = "fast" in sys.argv
if fast:
    assert fast_interpreter() is True and fast_interpreter() is True

@triton.jit
def affine(a1, b1, a2, b2):
    return a2 * a1, a2 * b1 + b2

@triton.jit
def larger(u, v):
    return tl.maximum(u, v)

@triton.jit
def branch(u, v):
    return u if u > v else v  # asks of two numbers, and cannot ask of two tiles

@triton.jit
def pairs(a_ptr, b_ptr, h_ptr, R: tl.constexpr, C: tl.constexpr, AXIS: tl.constexpr, REVERSE: tl.constexpr):
    offs = tl.arange(0, R)[:, None] * C + tl.arange(0, C)[None, :]
    a, h = tl.associative_scan((tl.load(a_ptr + offs), tl.load(b_ptr + offs)), AXIS, affine, REVERSE)
    tl.store(h_ptr + offs, h)
    tl.store(a_ptr + offs, a)

@triton.jit
def numbers(x_ptr, y_ptr, w_ptr, L: tl.constexpr):
    offs = tl.arange(0, L)
    x = tl.load(x_ptr + offs)
    tl.store(y_ptr + offs, tl.associative_scan(x, 0, larger))
    tl.store(w_ptr + offs, tl.associative_scan(x, 0, branch))

@triton.jit
def count(n_ptr, length):
    n = 0
    for i in range(0, length):
        n += i
    tl.store(n_ptr, n)

results, random = {}, torch.Generator().manual_seed(0)
for rows, columns in (1, 1), (2, 1), (1, 64), (4, 16):
    for axis in 0, 1:
        for reverse in False, True:
            # small integers: float32 holds every product and sum exactly, in any order
            a, b = (torch.randint(-1, 2, (rows, columns), generator=random).float() for _ in range(2))
            h = torch.full_like(b, float("nan"))
            pairs[(1,)](a, b, h, rows, columns, axis, reverse)
            results[rows, columns, axis, reverse] = h, a
x = torch.randint(-9, 10, (32,), generator=random, dtype=torch.int16)
y, w = torch.empty_like(x), torch.empty_like(x)
numbers[(1,)](x, y, w, 32)
results["numbers"] = y, w
if fast:
    n = torch.zeros(1, dtype=torch.int32)
    count[(1,)](n, 5)
    results["count"] = n,
a, b, h = torch.rand(64, 64), torch.rand(64, 64), torch.empty(64, 64)
start = time.perf_counter()
pairs[(1,)](a, b, h, 64, 64, 1, False)
torch.save((results, time.perf_counter() - start), sys.argv[1])
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same kernels with and without the fast scan, each in a process of its own:
    (results, seconds).
    """
    torch = pytest.importorskip("torch")
    pytest.importorskip("triton", reason="needs Triton (pip install triton)")
    folder, environment = tmp_path_factory.mktemp("lab"), os.environ | {"TRITON_INTERPRET": "1"}
    (folder / "kernels.py").write_text(KERNELS)
    for way in "slow", "fast":
        subprocess.run(
            [sys.executable, folder / "kernels.py", folder / way, way],
            check=True,
            env=environment | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
    return {way: torch.load(folder / way) for way in ("slow", "fast")}


def test_fast_scans_equal_slow_scans_exactly(runs):
    """Tuples and single tiles, both axes, both directions, sizes 1 to 64;
    and a combine function that branches.
    """
    slow, fast = runs["slow"][0], runs["fast"][0]
    fast = {k: v for k, v in fast.items() if k != "count"}
    assert len(slow) == 17 and slow.keys() == fast.keys()
    for case in slow:
        for s, f in zip(slow[case], fast[case]):
            assert s.dtype == f.dtype and s.equal(f), case


def test_a_kernel_may_loop_up_to_a_number(runs):
    """`range(0, length)`, which Triton before 3.7 cannot interpret beside numpy 2.4."""
    assert runs["fast"][0]["count"][0].item() == 0 + 1 + 2 + 3 + 4


def test_fast_scan_does_not_call_python_an_element(runs):
    """4,096 elements: 0.4 s one by one, some milliseconds at once;
    a wide margin for a busy machine.
    """
    assert runs["fast"][1] < runs["slow"][1] / 5


def test_compiled_kernels_are_left_alone():
    pytest.importorskip("triton", reason="needs Triton (pip install triton)")
    code = "from lib.scan.triton_interpreter import fast_interpreter; raise SystemExit(fast_interpreter())"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        env=environment | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )


BOUNDS = """
import torch, triton, triton.language as tl
from lib.scan.triton_interpreter import in_bounds

@triton.jit
def copy(x_ptr, y_ptr, reads, writes, BLOCK: tl.constexpr, FIRST: tl.constexpr):
    offs = tl.arange(0, BLOCK) + FIRST
    x = tl.load(x_ptr + offs, offs < reads, 0)
    tl.store(y_ptr + offs, x, offs < writes)

@triton.jit
def open_copy(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs))

def words(kernel, *sizes, x, y):
    try:
        with in_bounds(x=x, y=y):
            kernel[(1,)](x, y, *sizes)
    except AssertionError as error:
        return str(error)

room = torch.zeros(300)  # one allocation, so that which tensor is the nearest is known
x, y = torch.randn(100), room[100:200]
assert words(copy, 100, 100, 128, 0, x=x, y=y) is None and y.equal(x)
assert words(copy, 100, 101, 128, 0, x=x, y=y) == "the kernel writes y[100], and y has 100 numbers"
assert words(copy, -1, 100, 128, -1, x=x, y=y) == "the kernel writes y[-1], and y has 100 numbers"
assert words(copy, 101, 100, 128, 0, x=room[:100], y=x) == "the kernel reads x[100], and x has 100 numbers"
assert words(open_copy, 128, x=room[:100], y=x) == "the kernel reads x[100], and x has 100 numbers"
assert room[:100].eq(0).all() and room[200:].eq(0).all(), "stopped before it wrote"
open_copy[(1,)](x, room, 64)  # outside the block everything is as before
assert room[:64].equal(x[:64])
"""


def test_a_kernel_without_its_mask_is_stopped_and_named(tmp_path):
    pytest.importorskip("triton", reason="needs Triton (pip install triton)")
    (tmp_path / "bounds.py").write_text(BOUNDS)
    done = subprocess.run(
        [sys.executable, tmp_path / "bounds.py"],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
