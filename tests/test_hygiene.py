"""The house is in order: the notebooks keep to their measures, links lead somewhere, words are spelt, code is clean."""

import re
import statistics
import subprocess
import sys

import pytest
from pages import (
    FENCED,
    LINK,
    NOTEBOOKS,
    ROOT,
    broken_links,
    code_cells,
    each_notebook,
    files,
    load,
    markdown,
    pieces,
    text_of,
)

SHORT = {"00_tour": 15}  # the least number of code cells where it is not 25: a tour is over in a quarter of an hour
LONGEST = 350  # lines of a file of code, and a few more
LONG = {  # where more is better than two files, and why
    "tests/test_data.py": "one server that misbehaves in every way serves all its tests",
    "tests/test_mamba_parity.py": "one table of configurations for three implementations",
    "tests/test_experiments.py": "one made-up set of runs for every figure and table",
    "slides/figures_scans.py": "one deck's figures",
    "slides/figures_training.py": "one deck's figures",
}
SPELT = ["*.md", "*.py", "*.toml", "*.txt", "*.cff", "*.cpp", "*.ini"]


# ---- the measures of a notebook -----------------------------------------------------------


def lines(cell) -> int:
    return sum(bool(line.strip()) for line in text_of(cell["source"]).splitlines())


def words(text: str) -> int:
    """Words of prose: not the code in fences, not addresses, not signs."""
    text = re.sub(r"\]\([^)]*\)|<[^>]*>", " ", FENCED.sub("", text))
    return len(re.findall(r"[A-Za-zÀ-ž0-9][\w'’-]*", text))


@each_notebook
def test_notebook_has_as_many_cells_as_can_be_read_in_one_sitting(path):
    assert SHORT.get(path.stem, 25) <= len(code_cells(load(path))) <= 45


@each_notebook
def test_cells_are_short(path):
    sizes = [lines(cell) for cell in code_cells(load(path))]
    assert 6 <= statistics.median(sizes) <= 11, "lines of the median cell"
    assert sorted(sizes)[-max(1, len(sizes) // 10)] < 30, "lines of the longest tenth"


@each_notebook
def test_six_to_nine_words_of_prose_for_a_line_of_code(path):
    book = load(path)
    code = sum(map(lines, code_cells(book)[1:]))  # the first cell is the same in all, and nobody has to read it
    most = 11 if path.stem.startswith("10") else 9  # notebook 10 is the missing text of a paper
    assert 6 <= sum(map(words, markdown(book))) / code <= most


@each_notebook
def test_nine_cells_in_ten_are_led_by_prose(path):
    cells = [c for c in load(path)["cells"] if text_of(c["source"]).strip()]
    led = [before["cell_type"] == "markdown" for before, cell in zip(cells, cells[1:]) if cell["cell_type"] == "code"]
    assert sum(led) >= 0.9 * len(led)


@each_notebook
def test_a_cell_shows_one_thing(path):
    found = {n: pieces(cell) for n, cell in enumerate(code_cells(load(path)), 1)}
    crowded = {n: shows for n, shows in found.items() if len(shows) > 2}
    assert not crowded, f"a thing and a line are enough: {crowded}"
    many = [n for n, p in found.items() if len(p) > 1]
    assert len(many) <= 0.1 * len(found), f"more than one output: code cells {many}"


def test_measures_find_what_they_should():
    html = [{"output_type": "display_data", "data": {"text/html": page}} for page in ("<img>", "<audio>", "<audio>")]
    line = {"output_type": "stream", "name": "stdout", "text": "x"}
    assert pieces({"outputs": [line, *html]}) == ["text", "clip"] and pieces({"outputs": []}) == []
    assert pieces({"outputs": [html[1], html[0], line]}) == ["clip", "figure", "text"]
    assert words("# Two words\n```python\nnot these\n```\n[and three](https://a.b/c) **x = 1**") == 6
    assert lines({"source": "a\n\n  \nb"}) == 2


# ---- links --------------------------------------------------------------------------------


@pytest.mark.parametrize("page", files("*.md") + NOTEBOOKS, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    text = "\n\n".join(markdown(load(page))) if page.suffix == ".ipynb" else page.read_text(encoding="utf-8")
    text = re.sub(r"(figure|sound):[\w/#]+", "https://built.in", text)  # what a deck's build puts in
    assert not broken_links(text, page)
    assert not [target for _, said, target in LINK.findall(text) if not said.strip()], "a link or picture without words"


def test_broken_links_are_found():
    page = ROOT / "README.md"
    text = "# A `b` c\n[a](no_such.md) ![b](#x) [c](https://example.org) [[d]](tests) [e](#a-b-c)\n```\n[f](none)\n```"
    assert broken_links(text, page) == ["no_such.md", "#x"]
    assert broken_links("[a](notebooks/03_state_spaces.ipynb#nothing-like-this)", page)


# ---- spelling -----------------------------------------------------------------------------


def misspelt(folder, *paths) -> str:
    """What codespell has to say of the files: a word list of slips, so that names and notation pass."""
    done = subprocess.run([sys.executable, "-m", "codespell_lib", *map(str, paths)], cwd=folder, capture_output=True,
                          text=True, check=False)
    assert not done.stderr, done.stderr
    return done.stdout


def test_words_are_spelt_as_they_should(tmp_path):
    for path in NOTEBOOKS:  # the sources alone: pictures and sound are letters too
        text = "\n\n".join(text_of(cell["source"]) for cell in load(path)["cells"])
        (tmp_path / f"{path.stem}.txt").write_text(text, encoding="utf-8")
    found = misspelt(ROOT, *files(*SPELT), tmp_path)
    assert not found, found


def test_a_slip_is_found(tmp_path):
    (tmp_path / "page.md").write_text("To re" "cieve a colour.", encoding="utf-8")
    assert "receive" in misspelt(tmp_path, "page.md")


# ---- code ---------------------------------------------------------------------------------


def ruff(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format", "concise", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_code_keeps_the_rules_of_the_house():
    done = ruff()
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_broken_rule_is_found(tmp_path):
    (tmp_path / "careless.py").write_text("import os\n")
    done = ruff("--config", "ruff.toml", str(tmp_path))
    assert done.returncode == 1 and "F401" in done.stdout and "D100" in done.stdout


def test_files_can_be_read_in_one_sitting():
    sizes = {path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
             for path in files("*.py", "*.cpp")}
    long = {name for name, size in sizes.items() if size > 1.05 * LONGEST}
    assert long <= set(LONG), f"more than about {LONGEST} lines: {sorted(long - set(LONG))}"
    assert not set(LONG) - {name for name, size in sizes.items() if size > LONGEST}, "an excuse that nobody needs"
