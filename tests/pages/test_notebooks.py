"""The committed notebooks are clean: what a reader sees is what a full run printed."""

import base64
import re

from pages import (
    DATA_URI,
    LINK,
    NOTEBOOKS,
    code_cells,
    each_notebook,
    load,
    outputs,
    shown,
    text_of,
)

from lib.env.paths import RESULTS
from lib.lab.pages import address, stamp

LARGEST = 1_048_576  # bytes
TAGS = {"tags"}  # the only cell metadata that a reader needs

# a folder of one machine: a slash, one of these names, a slash, not inside a longer path or address
MACHINE_PATH = re.compile(
    r"(?<![\w.:/~-])/(?:home|Users|tmp|work|root|var|private|mnt|opt|usr|content)/\w"
    r"|\b[A-Z]:\\+Users"
)
IMG = re.compile(r"<img\b[^>]*>", re.IGNORECASE | re.DOTALL)
ALT = re.compile(r"""\balt\s*=\s*(?:"([^"]*)"|'([^']*)')""", re.IGNORECASE)


def alt_of(tag):
    found = ALT.search(tag)
    return (found.group(1) or found.group(2) or "").strip() if found else ""


@each_notebook
def test_executed_from_top_to_bottom(path):
    counts = [cell["execution_count"] for cell in code_cells(load(path))]
    assert counts == list(range(1, len(counts) + 1)), (
        f"run it again, whole: python notebooks/execute.py {path.stem}"
    )
    assert any(cell["outputs"] for cell in code_cells(load(path)))


@each_notebook
def test_no_error_and_no_warning_is_stored(path):
    for number, out in outputs(load(path)):
        assert out["output_type"] != "error", f"cell {number} stored an error"
        assert out.get("name") != "stderr", f"cell {number} stored stderr: {text_of(out['text'])}"


@each_notebook
def test_no_widget_state(path):
    book = load(path)
    assert "widgets" not in book["metadata"]
    for number, out in outputs(book):
        kinds = [kind for kind, _ in shown(out)]
        assert not any("widget" in kind for kind in kinds), f"cell {number} stored a widget"


@each_notebook
def test_no_path_of_one_machine(path):
    book = load(path)
    texts = [text_of(cell["source"]) for cell in book["cells"]]
    texts += [text for _, out in outputs(book) for _, text in shown(out)]
    for text in texts:
        found = MACHINE_PATH.search(DATA_URI.sub("", text))
        assert not found, f"a path of one machine: {text[found.start() :][:80]!r}"


@each_notebook
def test_no_timing_and_no_stray_metadata(path):
    book = load(path)
    assert set(book["metadata"]) <= {"kernelspec", "language_info"}
    for cell in book["cells"]:
        assert set(cell["metadata"]) <= TAGS, f"cell {cell['id']} holds {set(cell['metadata'])}"


@each_notebook
def test_at_most_one_megabyte(path):
    assert path.stat().st_size <= LARGEST


@each_notebook
def test_every_cell_has_an_id_of_its_own(path):
    ids = [cell["id"] for cell in load(path)["cells"]]
    assert len(set(ids)) == len(ids)


@each_notebook
def test_every_picture_has_alt_text(path):
    book = load(path)
    for number, out in outputs(book):
        for kind, text in shown(out):
            assert not kind.startswith("image/"), (
                f"cell {number}: show a figure with plots.show(fig, alt), so that it has alt text"
            )
            if kind == "text/html":
                for tag in IMG.findall(text):
                    assert len(alt_of(tag).split()) >= 3, f"cell {number}: {tag[:60]} says nothing"
    for cell in book["cells"]:
        if cell["cell_type"] == "markdown":
            source = text_of(cell["source"])
            for tag in IMG.findall(source):
                assert alt_of(tag), f"{tag[:60]} has no alt text"
            for picture, words, target in LINK.findall(source):
                assert not picture or words.strip(), f"{target} has no alt text"


@each_notebook
def test_says_what_it_is_for(path):
    """Each opens with a title and a promise, and its first code cell says where it runs."""
    book = load(path)
    first = book["cells"][0]
    assert first["cell_type"] == "markdown" and text_of(first["source"]).startswith("# ")
    start = code_cells(book)[0]
    printed = "".join(text for out in start["outputs"] for _, text in shown(out))
    assert "torch" in printed and "full run" in printed, "commit the full run, not the quick one"


def test_first_code_cell_is_the_same_in_all():
    firsts = {text_of(code_cells(load(path))[0]["source"]) for path in NOTEBOOKS}
    assert firsts == {address.first_cell()}, "run python -m lib.lab.pages stamp"


@each_notebook
def test_badge_opens_this_notebook(path):
    text = path.read_text(encoding="utf-8")
    assert stamp.notebook(text, path.stem) == text, "run python -m lib.lab.pages stamp"
    assert f"/notebooks/{path.name})" in text_of(load(path)["cells"][0]["source"])


def test_no_result_names_a_path_of_one_machine():
    for path in sorted(RESULTS.rglob("*.json")):
        found = MACHINE_PATH.search(path.read_text(encoding="utf-8"))
        assert not found, f"{path.name}: {found}"


# The checks above would pass on anything if their patterns were wrong. So:


def test_patterns_find_what_they_should():
    machine = ["see /ho" + "me/ada/x.mid", "'/tm" + "p/x'", "C:\\Users\\ada", "(/us" + "r/lib/x)"]
    assert all(MACHINE_PATH.search(text) for text in machine)
    fine = ["data/home/x", "https://example.org/home/x", "../work/x", "and/or", "~/home/x"]
    assert not any(MACHINE_PATH.search(text) for text in fine)
    picture = base64.b64encode(bytes(range(256)) * 9).decode()
    assert DATA_URI.sub("", f"src='data:image/png;base64,{picture}'") == "src=''"
    assert alt_of('<img alt="a b c" src="x">') == "a b c"
    assert alt_of("<img src='x' alt='d e'>") == "d e"
    assert alt_of('<img src="x">') == alt_of('<img alt="">') == ""
