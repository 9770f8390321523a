"""Claims about the exercises: the stub fails its check, the folded solution passes it,
both in a moment.

An exercise is a Markdown cell with stars, minutes, two folded hints and a folded solution, and
right after it a code cell with its imports, the stub and the check. That cell stands alone, so
nothing else of the notebook has to run.
"""

import ast
import json
import re
import runpy
import threading
import time

import pytest
import torch

from lib.env import exercises as home
from lib.env.exercises import attempt
from lib.env.paths import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SOLUTION = re.compile(
    r"<details><summary>Solution</summary>\s*```python\n(.*?)```\s*</details>", re.DOTALL
)
STUB = re.compile(r"^(?:@triton\.jit\n)?def .*\n(?:(?:    .*)?\n)*?    \.\.\.\n", re.MULTILINE)


def exercises():
    for path in NOTEBOOKS:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        for cell, after in zip(cells, cells[1:], strict=False):
            text, code = "".join(cell["source"]), "".join(after["source"])
            if cell["cell_type"] == "markdown" and SOLUTION.search(text):
                yield pytest.param(text, code, id=f"{path.stem}-{cell['id']}")


ALL = list(exercises())


def outcome(code, tmp_path, capsys):
    """The last line that the cell prints, run alone
    (as a file, because Triton reads the source of its kernels).

    Before it, a machine that compiles a scan for the first time says so.
    """
    path = tmp_path / "exercise.py"
    path.write_text(code, encoding="utf-8")
    capsys.readouterr()
    runpy.run_path(str(path))
    return capsys.readouterr().out.splitlines(keepends=True)[-1]


@pytest.mark.parametrize("text, code", ALL)
def test_stub_fails_and_solution_passes(text, code, tmp_path, capsys):
    if "triton" in code:
        pytest.importorskip("triton", reason="no Triton for this system")
    solution = SOLUTION.search(text)[1]
    solved, stubs = STUB.subn(lambda _: solution, code)
    assert stubs == 1, "one stub, whose body is a docstring and '...'"
    assert outcome(code, tmp_path, capsys).startswith("not yet: ")
    assert outcome(solved, tmp_path, capsys) == "solved\n"


@pytest.mark.parametrize("text, code", ALL)
def test_exercise_says_what_it_is(text, code):
    assert re.search(r"\*\*\d · [^*]+\*\* ★{1,3} · \d+ minutes\.", text)
    assert (
        len(re.findall(r"<details><summary>Hint \d</summary>.+?</details>", text, re.DOTALL)) == 2
    )
    assert "attempt(check_" in code and '"""' in code


@pytest.mark.parametrize("text, code", ALL)
def test_exercise_is_a_typed_spec_a_stub_and_one_check(text, code):
    tree = ast.parse(code)
    stubs = [
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        and isinstance(node.body[-1], ast.Expr)
        and getattr(node.body[-1].value, "value", None) is ...
    ]
    assert len(stubs) == 1 and code.count("attempt(") == 1, "one stub and one check"
    stub = stubs[0]
    # the arguments of a kernel are addresses: they need no types
    kernel = any("triton" in ast.unparse(mark) for mark in stub.decorator_list)
    assert kernel or (stub.returns and all(argument.annotation for argument in stub.args.args)), (
        "types are missing"
    )
    assert ast.get_docstring(stub), "what goes in, what comes out"


@pytest.mark.parametrize(
    "path", [path for path in NOTEBOOKS if path.stem != "00_tour"], ids=lambda path: path.stem
)
def test_two_to_four_exercises_a_notebook(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    numbers = [
        found[1]
        for text in texts
        if (found := re.search(r"^\*\*(\d) · .+?\*\* ★", text, re.MULTILINE))
    ]
    assert 2 <= len(numbers) <= 4 and numbers == [str(n + 1) for n in range(len(numbers))]
    assert sum(bool(SOLUTION.search(text)) for text in texts) == len(numbers), (
        "each has a solution, and only they"
    )


def test_attempt_says_what_is_missing(tmp_path, capsys):
    def wrong():
        assert 2 == 3, "two is not three"

    def deep():
        return torch.zeros(2) @ torch.zeros(3)

    def helper():
        return len(None)

    def hidden():
        return helper()

    # a None inside the reader's own code is theirs to find
    helper_line = helper.__code__.co_firstlineno + 1

    def words(check):
        assert not attempt(check)
        return capsys.readouterr().out.splitlines()

    assert attempt(lambda: None) and capsys.readouterr().out == "solved\n"
    assert words(wrong) == ["not yet: two is not three"]
    silent = "from lib.env.exercises import attempt\n\ndef check():\n    assert 2 == 3\n\nattempt(check)\n"
    assert outcome(silent, tmp_path, capsys) == "not yet: this should hold: 2 == 3\n"
    for given_none in (
        lambda: len(None),
        torch.no_grad()(lambda: sum(len(None) for _ in range(2))),
    ):
        assert words(given_none) == [
            "not yet: there is None where a value is needed: "
            "does the function return its result yet?"
        ]
    assert words(hidden) == [
        "not yet: TypeError, object of type 'NoneType' has no len() "
        f"(in helper, line {helper_line})"
    ]
    here = deep.__code__.co_firstlineno + 1  # and not a line inside torch
    (found,) = words(deep)
    assert found.startswith("not yet: RuntimeError, ") and found.endswith(
        f" (in deep, line {here})"
    )


def for_ever():
    while True:
        try:
            raise ValueError
        except Exception:  # noqa: BLE001  as a reader may write it
            continue


def test_a_check_that_never_ends_is_stopped(monkeypatch, capsys):
    monkeypatch.setattr(home, "SECONDS", 0.2)
    assert not attempt(for_ever)
    assert capsys.readouterr().out.startswith("not yet: stopped after 0.2 seconds.")
    assert attempt(lambda: None), "the clock of one check strikes in no other"


def test_a_check_is_stopped_in_any_thread(monkeypatch, capsys):
    monkeypatch.setattr(home, "SECONDS", 0.2)
    other = threading.Thread(target=attempt, args=(for_ever,))
    other.start()
    other.join()
    assert capsys.readouterr().out.startswith("not yet: stopped after 0.2 seconds.")


def test_a_check_that_ends_in_time_leaves_no_clock_behind(monkeypatch):
    monkeypatch.setattr(home, "SECONDS", 0.2)
    assert attempt(lambda: None)
    time.sleep(0.4)  # a clock that still ran would strike here
