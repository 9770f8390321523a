"""The README keeps its word: its commands, its numbers and its links."""

import shutil
import subprocess

import numpy as np
import pytest
from pages import LINK, ROOT

from lib.env import machine as env
from lib.env.errors import UserError
from lib.lab.pages import stamp
from lib.lab.rivals.matched import LABELS

README = (ROOT / "README.md").read_text(encoding="utf-8")
TEST_COMMAND = "pytest --nbmake notebooks tests"


def test_the_two_commands_are_there_as_written():
    lines = [line.strip() for line in README.splitlines()]
    assert "pip install -r requirements.txt && jupyter lab notebooks/00_tour.ipynb" in lines
    assert f"pip install -r requirements.txt && {TEST_COMMAND}" in lines


def test_ci_runs_the_readme_command_and_adds_nothing():
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.startswith("pip")] == ["pip install -r requirements.txt"]
    assert [line for line in lines if line.startswith("pytest")] == [TEST_COMMAND]
    assert lines[-1] == TEST_COMMAND


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_ci_script_parses():
    assert subprocess.run(["bash", "-n", str(ROOT / ".ci" / "run")]).returncode == 0


def test_stamped_numbers_agree_with_the_results():
    assert stamp.readme(README) == README, "run python -m lib.lab.pages stamp"


def test_every_notebook_is_in_the_table():
    table = README.partition("<!-- minutes -->")[2].partition("<!-- /minutes -->")[0]
    for name in env.notebook_names():
        assert f"[{name}](notebooks/{name}.ipynb)" in table


def test_readme_shows_a_piano_roll_in_words_too():
    pictures = [(words, target) for mark, words, target in LINK.findall(README) if mark]
    assert [target for _, target in pictures] == ["data/results/tour_roll.png"]
    assert len(pictures[0][0].split()) > 5


EMPTY = """top
<!-- badges --><!-- /badges -->
<!-- minutes -->
| notebook | leaves | full | quick |
|---|---|---|---|
| 00_tour | a piece | | |
| 01_maestro | the data | | |
| 03_state_spaces | a spring | 9 | 9 |
<!-- /minutes -->
middle
<!-- results --><!-- /results -->
<!-- model --><!-- /model -->
<!-- spine --><!-- /spine -->
end"""


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A made-up data/results with two notebooks that exist."""
    monkeypatch.setattr(env, "RESULTS", tmp_path)
    monkeypatch.setattr(env, "notebook_names", lambda: ["00_tour", "01_maestro"])
    return tmp_path


def test_stamp_says_not_measured_where_nothing_was(results):
    text = stamp.readme(EMPTY)
    assert "| [00_tour](notebooks/00_tour.ipynb) | a piece | not measured | not measured |" in text
    assert "| 03_state_spaces | a spring | to come | |" in text
    assert text.count("not measured") == 4 + 9 + 7
    assert text.startswith("top\n") and "\nmiddle\n" in text and text.endswith("\nend")


def test_stamp_puts_the_measured_numbers_in(results):
    (results / "notebooks.json").write_text(
        '{"00_tour": {"full_minutes": 1.234, "full_run": {"device": "CPU, 2 cores"}}}'
    )
    (results / "model.json").write_text(
        '{"params": 3600000, "steps": 12000, "hours": 1.25, "device": "CPU, 2 cores",'
        ' "test_bits_per_note": 17.256}'
    )
    text = stamp.readme(EMPTY)
    assert "| a piece | 1.2 | not measured |" in text and "Measured on: CPU, 2 cores." in text
    assert "| parameters | 3,600,000 |" in text and "| 1.2 hours on CPU, 2 cores |" in text
    assert "| bits per note, test pieces | 17.26 |" in text
    assert stamp.readme(text) == text


def test_stamp_asks_for_lost_markers(results):
    with pytest.raises(UserError, match="<!-- model -->"):
        stamp.readme(EMPTY.replace("<!-- /model -->", ""))


def test_damaged_results_are_one_sentence(results):
    for damage in (b"{", b"[]", b"\xff\xfe"):
        (results / "model.json").write_bytes(damage)
        with pytest.raises(UserError, match="model.json is damaged"):
            stamp.readme(EMPTY)


def test_the_quoted_difference_is_that_of_the_pieces():
    found = env.read_results("experiments_race_cpu")
    longest = max(row["steps"] for row in found["runs"])
    bits = {"mamba": [], "transformer": []}
    for row, pieces in zip(found["runs"], found["test"], strict=True):
        if row["arch"] in bits and row["steps"] == longest:
            bits[row["arch"]].append(sum(pieces))
    assert min(map(len, bits.values())) >= 2
    difference = np.mean(bits["mamba"]) - np.mean(bits["transformer"])
    difference /= sum(found["pieces"]["notes"])
    assert f"| {LABELS['transformer']} {difference:+.2f} (" in README
