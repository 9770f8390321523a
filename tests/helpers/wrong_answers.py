"""Put an answer into an exercise's stub and hear what its check says."""

import ast
import textwrap

from test_exercises import STUB, exercises, outcome

from lib.env import exercises as home


def codes() -> dict[str, str]:
    """{"05.1": the code cell of that exercise} for all exercises."""
    return {
        f"{found.id[:2]}.{found.values[0].split(' · ')[0][-1]}": found.values[1]
        for found in exercises()
    }


def silent(code: str) -> list[str]:
    """The asserts of a check that say nothing when they fail."""
    return [
        ast.unparse(node)
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Assert) and not node.msg
    ]


def said(code: str, answer: str, tmp_path, capsys) -> str:
    """What the exercise prints last when the lines of `answer` are the body of its function."""
    head = STUB.search(code)[0].partition('    """')[0]
    body = textwrap.indent(textwrap.dedent(answer).strip(), "    ")
    return outcome(STUB.sub(lambda _: f"{head}{body}\n", code), tmp_path, capsys)


def refused(code: str, answer: str, words: str, tmp_path, capsys, monkeypatch) -> None:
    """Assert that the check refuses the answer, with these words.

    One that never ends gets a second, not twenty.
    """
    if words.startswith("stopped after"):
        monkeypatch.setattr(home, "SECONDS", 1)
    found = said(code, answer, tmp_path, capsys)
    assert found.startswith("not yet: ") and words in found, found
