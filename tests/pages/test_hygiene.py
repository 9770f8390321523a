"""The house is in order: links lead somewhere, words are spelt, code is clean."""

import re
import subprocess
import sys

import pytest
from pages import LINK, NOTEBOOKS, ROOT, broken_links, files, load, markdown, text_of

SPELT = ["*.md", "*.py", "*.toml", "*.txt", "*.cff", "*.cpp", "*.ini"]


# ---- links --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "page", files("*.md") + NOTEBOOKS, ids=lambda p: p.relative_to(ROOT).as_posix()
)
def test_links_lead_somewhere(page):
    text = (
        "\n\n".join(markdown(load(page)))
        if page.suffix == ".ipynb"
        else page.read_text(encoding="utf-8")
    )
    # what a deck's build puts in
    text = re.sub(r"(figure|sound):[\w/#]+", "https://built.in", text)
    assert not broken_links(text, page)
    assert not [target for _, said, target in LINK.findall(text) if not said.strip()], (
        "a link or picture without words"
    )


def test_broken_links_are_found():
    page = ROOT / "README.md"
    text = "# A `b` c\n[a](no_such.md) ![b](#x) [c](https://example.org) [[d]](tests) [e](#a-b-c)\n```\n[f](none)\n```"
    assert broken_links(text, page) == ["no_such.md", "#x"]
    assert broken_links("[a](notebooks/03_state_spaces.ipynb#nothing-like-this)", page)


# ---- spelling -----------------------------------------------------------------------------


def misspelt(folder, *paths) -> str:
    """What codespell has to say of the files: a word list of slips,
    so that names and notation pass.
    """
    done = subprocess.run(
        [sys.executable, "-m", "codespell_lib", *map(str, paths)],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.stderr, done.stderr
    return done.stdout


def test_words_are_spelt_as_they_should(tmp_path):
    for path in NOTEBOOKS:  # the sources alone: pictures and sound are letters too
        text = "\n\n".join(text_of(cell["source"]) for cell in load(path)["cells"])
        (tmp_path / f"{path.stem}.txt").write_text(text, encoding="utf-8")
    found = misspelt(ROOT, *files(*SPELT), tmp_path)
    assert not found, found


def test_a_slip_is_found(tmp_path):
    slip = "rec{}ve".format("ie")  # in two parts, for this file is looked through as well
    (tmp_path / "page.md").write_text(f"To {slip} a colour.", encoding="utf-8")
    assert "receive" in misspelt(tmp_path, "page.md")


# ---- code ---------------------------------------------------------------------------------


def ruff(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "ruff", *arguments, "--no-cache"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("job", [("check",), ("format", "--check")])
def test_code_keeps_the_rules_of_the_house(job):
    done = ruff(*job)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_broken_rule_is_found(tmp_path):
    (tmp_path / "careless.py").write_text("import os\nx = dict( a=1 )\n")
    done = ruff("check", "--config", "ruff.toml", str(tmp_path))
    assert done.returncode == 1 and "F401" in done.stdout and "D100" in done.stdout
    assert ruff("format", "--check", "--config", "ruff.toml", str(tmp_path)).returncode == 1
