"""Claims about what a teacher carries: pages that need nothing, exercises without their solutions,
links that hold.
"""

import re

import nbformat
import pytest
from test_slides import fetched

from lib.env import machine as env
from lib.env.errors import UserError
from lib.lab.pages import __main__ as command
from lib.lab.pages import address, teaching

EXERCISE = """\
**1 · Twice** ★ · 10 minutes. Double it: $2x$.

<details><summary>Hint 1</summary>Add.</details>
<details><summary>Solution</summary>

```python
def twice(x: int) -> int:
    return 2 * x
```
</details>
"""
STUB = "def twice(x: int) -> int:\n    ..."


@pytest.fixture
def book():
    """A notebook with a badge, links, formulas, a figure and an exercise."""
    title = nbformat.v4.new_markdown_cell(
        "# 01 · Two\n\n[![Open in Colab](https://colab.org/badge.svg)](https://colab.org/x)\n\n"
        "See [02](02_next.ipynb#more), [results](../data/results/x.json) "
        "and [a paper](https://a.org/p).\n\n"
        "For $a_t$ and $b_t$: $$h_t = e^{\\Delta_t A} h_{t-1}$$ and `cost = $5 or $6`, some $5.\n\n"
        "```\n$not$ math\n```"
    )
    drawn = nbformat.v4.new_output(
        "display_data", {"text/html": '<img alt="a" src="data:image/png;base64,AAAA">'}
    )
    cells = [
        title,
        nbformat.v4.new_code_cell("start = 1", outputs=[drawn]),
        nbformat.v4.new_markdown_cell(EXERCISE),
        nbformat.v4.new_code_cell(STUB),
    ]
    return nbformat.v4.new_notebook(cells=cells)


def test_a_page_fetches_nothing_and_shows_formulas(book):
    page = teaching.page(book, "Two")
    assert not fetched(page) and '<html lang="en">' in page and "<title>Two</title>" in page
    assert page.count("<math") == 4 and "FORMULA" not in page and "colab.org" not in page
    assert "$not$ math" in page and "cost = $5 or $6" in page and "some $5" in page
    assert 'src="data:image/png;base64,AAAA"' in page


def test_links_of_a_page_lead_to_pages_or_to_the_course(book):
    page = teaching.page(book, "Two")
    assert 'href="02_next.html#more"' in page and 'href="https://a.org/p"' in page
    assert f'href="{address.REPOSITORY}/blob/{address.BRANCH}/data/results/x.json"' in page


def test_solutions_lie_apart_from_the_stubs(book):
    alone = teaching.exercises(book)
    assert [cell.source for cell in alone.cells[:2]] == ["# 01 · Two: exercises", "start = 1"]
    text = nbformat.writes(alone)
    assert "Twice" in text and "Hint 1" in text and "..." in text and "return 2 * x" not in text
    assert "return 2 * x" not in teaching.page(teaching.without_solutions(book), "Two")
    solved = teaching.solutions({"01_two": book}).cells[0].source
    assert "## 01.1 · Twice" in solved and "return 2 * x" in solved
    assert "return 2 * x" in nbformat.writes(book), "the notebook itself was changed"
    assert teaching.exercises(nbformat.v4.new_notebook(cells=book.cells[:2])) is None


def test_every_exercise_of_the_course_is_given_out_and_solved():
    course = teaching.books()
    told = {
        (name, cell.source)
        for name, book in course.items()
        for cell in book.cells
        if cell.cell_type == "markdown" and teaching.HEADING.search(cell.source)
    }
    solved = teaching.solutions(course).cells[0].source
    assert (
        len(re.findall(r"^## \d\d\.\d · ", solved, re.MULTILINE))
        == solved.count("```python")
        == len(told)
        > 20
    )
    for name, text in told:
        given = nbformat.writes(teaching.exercises(course[name]))
        assert "Solution</summary>" not in given and teaching.HEADING.search(text)[2] in given


def test_all_formulas_of_the_course_are_understood():
    for name, book in teaching.books().items():
        formulas = []
        for cell in book.cells:
            if cell.cell_type == "markdown":
                teaching._without_formulas(cell.source, formulas)
        unknown = [
            found for formula in formulas for found in re.findall(r">(\\\\[a-zA-Z]+)<", formula)
        ]
        assert not unknown, f"{name}: {unknown}"


@pytest.fixture
def course(tmp_path, monkeypatch, book):
    """A small course of one notebook, a deck of a route, a paper and the mails."""
    root = tmp_path / "course"
    for name, text in (
        ("notebooks/01_two.ipynb", nbformat.writes(book)),
        ("slides/route_45.html", "deck"),
        ("slides/room/quiz.pdf", "paper"),
        ("slides/room/mail.md", "git clone ADDRESS course"),
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    monkeypatch.setattr(env, "ROOT", root)
    return root


def test_the_index_leads_to_every_file(course, tmp_path, capsys):
    folder = tmp_path / "teaching"
    command.main(["teaching", str(folder)])
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert there == {
        "index.html",
        "solutions.html",
        "mail.md",
        "pages/01_two.html",
        "exercises/01_two_exercises.ipynb",
        "route_45.html",
        "room/quiz.pdf",
    }
    linked = set(re.findall(r'<a href="([^"#]+)"', (folder / "index.html").read_text()))
    assert linked == there - {"index.html"}
    assert (folder / "mail.md").read_text() == f"git clone {address.REPOSITORY} course"
    assert "leads to 6 files" in capsys.readouterr().out


def test_a_second_call_gives_the_same_files_and_leaves_others_alone(course, tmp_path):
    folder = tmp_path / "teaching"
    teaching.main(folder, say=lambda _: None)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    (folder / "mine.txt").write_text("stays")
    teaching.main(folder, say=lambda _: None)
    assert (folder / "mine.txt").exists() and {path: path.read_bytes() for path in before} == before


def test_a_damaged_notebook_is_one_sentence(course):
    (course / "notebooks" / "01_two.ipynb").write_text("{")
    with pytest.raises(UserError, match="01_two.ipynb is damaged"):
        teaching.books()
