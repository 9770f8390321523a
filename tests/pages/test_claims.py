"""What the pages claim is so: names of `lib` exist, numbers were measured,
what a notebook builds equals its home.
"""

import ast
import re
from functools import cache

import pytest
from pages import (
    FENCED,
    NOTEBOOKS,
    ROOT,
    code_cells,
    each_notebook,
    files,
    load,
    markdown,
    outputs,
    shown,
    text_of,
)

from slides.quotes import result

# ---- names --------------------------------------------------------------------------------

NAME = re.compile(r"`(lib(?:\.\w+)+)")


def home(module: str):
    """The file of a module or of a room's face ("scan.ssm", "scan"), None where there is none."""
    path = ROOT / "lib" / module.replace(".", "/")
    return next(
        (file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None
    )


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(home(module).read_text(encoding="utf-8"))


@cache
def defined(module: str) -> frozenset[str]:
    """Every name that a module of lib defines or imports at its top, and `Class.member`;
    a face hands on both.
    """
    found = set()
    for node in tree(module).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {
                f"{node.name}.{m.name}" for m in ast.walk(node) if isinstance(m, ast.FunctionDef)
            }
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {
                part.id
                for target in targets
                for part in ast.walk(target)
                if isinstance(part, ast.Name)
            }
        if isinstance(node, ast.ImportFrom | ast.Import):
            found |= {alias.asname or alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and home(module).name == "__init__.py":
            handed_on = tuple(f"{alias.name}." for alias in node.names)
            found |= {
                name
                for name in defined(node.module.removeprefix("lib."))
                if name.startswith(handed_on)
            }
    return frozenset(found)


def exists(name: str) -> bool:
    """Whether a room or module of lib is there, or what it defines, imports or hands on:
    a symbol or Class.member.
    """
    parts = name.split(".")
    for end in range(len(parts), 1, -1):
        module, symbol = ".".join(parts[1:end]), ".".join(parts[end:])
        if home(module):
            return not symbol or symbol in defined(module)
    return False


def prose(page) -> str:
    return (
        "\n\n".join(markdown(load(page)))
        if page.suffix == ".ipynb"
        else page.read_text(encoding="utf-8")
    )


@pytest.mark.parametrize(
    "page", files("*.md") + NOTEBOOKS, ids=lambda p: p.relative_to(ROOT).as_posix()
)
def test_names_of_lib_exist(page):
    missing = sorted({name for name in NAME.findall(prose(page)) if not exists(name)})
    assert not missing, f"renamed or moved: {missing}"


def test_missing_names_are_found():
    assert (
        exists("lib.scan.ssm.kernel")
        and exists("lib.mamba.MambaMixer.split")
        and exists("lib.music.tokens.BAR")
    )
    for missing in ("lib.nowhere", "lib.scan.ssm.kernels", "lib.mamba.MambaMixer.splits"):
        assert not exists(missing)
    assert NAME.findall("`lib.a.b(c)` and lib.d, `x`") == ["lib.a.b"]


def test_glossary_has_the_letters_of_the_course():
    text = (ROOT / "GLOSSARY.md").read_text(encoding="utf-8")
    rows = [
        line
        for line in text.splitlines()
        if line.startswith("| ") and not line.startswith(("| name", "|---"))
    ]
    assert all(len(NAME.findall(row)) >= 1 for row in rows), [
        row for row in rows if not NAME.findall(row)
    ]
    for letter in "x h y z u A B C D K delta A_bar B_bar Bx_bar h0 d_model d_inner d_state".split():
        assert any(f"`{letter}`" in row.split("|")[1] for row in rows), letter


# ---- numbers ------------------------------------------------------------------------------

# A number with a decimal point, thousands or a percent sign looks measured. In a notebook's prose
# it must have been printed by that notebook or stand in its code, which a reader can run.
# Everything else is here, with where it is from.
NUMBER = re.compile(
    r"(?<![\w.,^_{\\=/-])(\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+\.\d+|\d+(?=\s?%))(?![\w.]\w|\w)"
)
SOURCED = {
    "00_tour": {"1.82": "Perceiver AR, its paper", "10.5": "1.82 nats · 4 events a note / ln 2"},
    "01_maestro": {"4.0": "the licence's version"},
    "02_remi_bpe": {"0.37": "0.37.50 in steps of 10 ms", "0.475": "95 % of half a step"},
    "03_state_spaces": {"98": "S4's paper, section 4", "3.6": "a section of Mamba's paper"},
    "04_selection": {"1.4": "Mamba's paper, its largest model, in billions"},
    "06_triton_scan": {
        "3.35": "H100 data sheet",
        "0.001": "Mamba's paper, section 3.6",
        "0.69": "ln 2",
    },
    "07_mamba": {"0.69": "ln 2"},
    "08_training": {
        "1.001": "an example",
        "70,000": "an example",
        "8,192": "32 rows of 256",
        "8.0": "a compute capability",
        "20,000": "the original work",
    },
    "09_generation": {
        "2.5": "4 to the power of 1 / 1.5",
        "200,000": "results:generation.json stream.tokens ,d",
    },
    "10_experiments": {
        "62.5": "the original work",
        "20,000": "the original work",
        "0.9": "the original work",
    },
}
README = {
    "1,276": "MAESTRO's list",
    "4.0": "the licence's version",
    "3.11": "Python",
    "3.0.0": "MAESTRO's version",
}

DECKS = {  # all decks together
    "4.0": "the licence's version",
    "62.5": "MidiTok's default grid",
    "31.25": "half of it",
    "16,000": "a sample rate",
    "1,024": "a length",
    "8,192": "a position",
    "16,384": "a length",
    "20,000": "the original work",
    "95": "an interval",
    "0.001": "Mamba's paper, section 3.6",
    "0.1": "Mamba's paper, section 3.6",
    "3.4": "a section of Mamba's paper",
    "8.0": "a compute capability",
    "65,536": "2 to the power of 16",
    "3.65": "results:tokens.json rows[grid_ms=62.5,pedal=extend,bpe=null].tokens_per_note .2f",
    "3.89": "results:tokens.json rows[grid_ms=10,pedal=extend,bpe=null].tokens_per_note .2f",
}


def numbers(text: str) -> list[str]:
    """Numbers of a prose text that look measured; formulas, code and addresses left out."""
    text = re.sub(r"<details>.*?</details>", "", FENCED.sub("", text), flags=re.DOTALL)
    text = re.sub(
        r"^    .*$|`[^`]*`|\$\$.*?\$\$|\$[^$]*\$|\]\([^)]*\)",
        " ",
        text,
        flags=re.MULTILINE | re.DOTALL,
    )
    return NUMBER.findall(text)


def stands_in(number: str, text: str) -> bool:
    """Whether exactly these digits stand in a text, thousands written in any way."""
    digits = re.escape(number.replace(",", ""))
    return (
        re.search(rf"(?<![\d.]){digits}(?![\d]|\.\d)", re.sub(r"(?<=\d)[,_](?=\d{3})", "", text))
        is not None
    )


def unsourced(found: list[str], text: str, sourced: dict) -> list[str]:
    return sorted({n for n in found if n not in sourced and not stands_in(n, text)})


@each_notebook
def test_numbers_in_prose_were_printed_or_have_a_source(path):
    book = load(path)
    texts = [
        text for _, out in outputs(book) for kind, text in shown(out) if kind.startswith("text/")
    ]
    text = "\n".join([*(text_of(cell["source"]) for cell in code_cells(book)), *texts])
    text = re.sub(r"base64,[A-Za-z0-9+/=\s]+", "", text)
    sourced = SOURCED.get(path.stem, {})
    found = [number for text_ in markdown(book) for number in numbers(text_)]
    assert not unsourced(found, text, sourced), (
        "print it in a cell, or name its source in tests/pages/test_claims.py"
    )
    assert set(sourced) <= set(found), f"said no more: {set(sourced) - set(found)}"
    check_results(sourced)


def check_results(sourced: dict) -> None:
    for number, source in sourced.items():
        if source.startswith("results:"):
            assert result(source.removeprefix("results:")) == number, source


def test_numbers_in_the_readme_are_stamped_or_have_a_source():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    # the rest is checked in test_readme
    by_hand = re.sub(r"<!-- (\w+) -->.*?<!-- /\1 -->", "", text, flags=re.DOTALL)
    assert not unsourced(numbers(by_hand), "", README), (
        "stamp it, or name its source in tests/pages/test_claims.py"
    )


def test_numbers_on_slides_are_quoted_or_have_a_source():
    """What stands in {{ … }} a deck's build fetches and tests; here is what was typed."""
    found = set()
    for deck in files("slides/[0-9]_*.md"):
        text = re.sub(r"\{\{.*?\}\}|<(?!!--)[^>]*>", " ", deck.read_text(encoding="utf-8"))
        # 05.1 is an exercise
        found |= {number for number in numbers(text) if not re.fullmatch(r"0\d\.\d", number)}
    assert not unsourced(found, "", DECKS), (
        "quote it, or name its source in tests/pages/test_claims.py"
    )
    assert set(DECKS) <= found, f"said no more: {set(DECKS) - found}"
    check_results(DECKS)


def test_a_number_without_a_source_is_found():
    text = "It takes 3.5 ms, 1,234 notes and 12 % of `0.7` $x = 0.8$ [a](b/0.9) in 2024, or v1.2.3 (see 4.2)."
    assert numbers(text) == ["3.5", "1,234", "12", "4.2"]
    assert unsourced(["3.5", "1,234", "12"], "took 13.51 ms, 1234 notes, 12.5", {}) == ["12", "3.5"]
    assert unsourced(["0.5", "20,000"], "x = 0.5; y = 20_000", {}) == []


# ---- definitions --------------------------------------------------------------------------

# notebook -> what it builds -> its home. Some later cell must name both and compare them.
BUILT = {
    "01_maestro": {"ring": "lib.music.notes.sustain"},
    "02_remi_bpe": {"remi": "lib.music.tokens.Tokenizer.encode_base"},
    "03_state_spaces": {
        "zoh": "lib.scan.ssm.discretize",
        "bilinear": "lib.scan.ssm.discretize",
        "euler": "lib.scan.ssm.discretize",
        "loop": "lib.scan.ssm.recurrence",
        "vandermonde_kernel": "lib.scan.ssm.kernel",
        "fft_convolution": "lib.scan.ssm.convolve",
        "hippo": "lib.scan.ssm.hippo_legs",
        "OurS4D": "lib.scan.ssm.S4D",
        "canon": "lib.lab.experiments.canon.canon",
        "marked": "lib.lab.experiments.canon.marked",
    },
    "04_selection": {
        "sequences": "lib.scan.copying.Task.batch",
        "Selective": "lib.scan.copying.SelectiveSystem",
    },
    "05_parallel_scan": {
        "our_hillis_steele": "lib.scan.parallel.hillis_steele",
        "our_blelloch": "lib.scan.parallel.blelloch",
        "OurRecurrence": "lib.scan.parallel.linear_recurrence",
    },
    "06_triton_scan": {
        "scan_runs": "lib.scan.triton_kernel.scan",
        "fused_here": "lib.scan.selective_scan",
    },
    "07_mamba": {
        "rms_norm": "lib.mamba.RMSNorm",
        "scan": "lib.scan.selective_scan",
        "open_mixer": "lib.mamba.MambaMixer",
        "language_model": "lib.mamba.MambaLM",
        "open_step": "lib.mamba.MambaMixer.step",
    },
    "08_training": {
        "reading_plan": "lib.train.batches.Batches",
        "train_by_hand": "lib.train.Trainer",
    },
    "09_generation": {
        "probabilities": "lib.generate.sampling.Sampling.probabilities",
        "play": "lib.generate.sample",
        "may_follow": "lib.generate.grammar.Grammar.may_follow",
        "tilt": "lib.generate.control.Steering",
    },
    "11_after_mamba": {
        "our_loop": "lib.scan.ssd.loop",
        "our_segment_sum": "lib.scan.ssd.segment_sum",
        "our_chunks": "lib.scan.ssd.chunked",
        "open_mixer": "lib.mamba.Mamba2Mixer",
        "our_trapezoid": "lib.scan.trapezoid.loop",
        "our_turn": "lib.scan.trapezoid.turn",
    },
}
# The same name, another thing; or a part of what is compared as a whole.
ELSEWHERE = {
    "05_parallel_scan": {
        "our_loop": "the oracle of this notebook, as lib.scan.loop is of the course",
        "chunked": "the recurrence in chunks, as in lib.scan.parallel.parallel",
        "train": "one gradient",
    },
    "06_triton_scan": {
        "combine": "part of scan_runs",
        "up": "part of scan_runs",
        "down": "part of scan_runs",
        "recurrence": "a kernel, compared with the loop",
        "draw": "random numbers",
    },
    "09_generation": {"draw": "tokens without end"},
    "11_after_mamba": {"rms_norm": "part of open_mixer", "train": "the waltz counter"},
}
TAUGHT = (
    "music.notes",
    "music.tokens",
    "scan.ssm",
    "scan.selective",
    "scan.parallel",
    "scan.triton_kernel",
    "scan.copying",
    "scan.ssd",
    "scan.trapezoid",
    "mamba.model",
    "mamba.mamba2",
    "mamba.mamba3",
    "train.config",
    "train.optim",
    "generate.sampling",
    "lab.rivals.transformer",
)


def definitions(book) -> dict[str, int]:
    """Functions and classes that a notebook defines, with the number of their cell."""
    found = {}
    for number, cell in enumerate(code_cells(book), 1):
        for node in ast.parse(text_of(cell["source"])).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.setdefault(node.name, number)
    return found


def compares(source: str, name: str, home: str) -> bool:
    """Whether a cell names both and fails where they differ."""
    last = home.split(".")[-1]
    ours = re.search(rf"(?<!def )(?<!class )(?<![.\w]){name}\b", source)
    theirs = re.search(rf"\.{last}\b" if last == name else rf"\b{last}\b", source)
    return bool(ours and theirs and re.search(r"\bassert\b|\b(check|compare)\(", source))


@pytest.mark.parametrize(
    "notebook, name, home",
    [(notebook, name, home) for notebook, built in BUILT.items() for name, home in built.items()],
)
def test_what_is_built_equals_its_home(notebook, name, home):
    book = load(ROOT / "notebooks" / f"{notebook}.ipynb")
    first = definitions(book)[name]
    later = [text_of(cell["source"]) for cell in code_cells(book)[first - 1 :]]
    assert exists(home), f"{home} is gone"
    assert any(compares(source, name, home) for source in later), (
        f"no cell compares {name} with {home}"
    )


@each_notebook
def test_a_definition_with_a_home_is_compared_with_it(path):
    """Whoever defines in a notebook what lib defines under that name must say so in BUILT."""
    homes = {
        node.name
        for module in TAUGHT
        for node in tree(module).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    }
    known = {**BUILT.get(path.stem, {}), **ELSEWHERE.get(path.stem, {})}
    bare = {name: name.removeprefix("our_").removeprefix("Our") for name in definitions(load(path))}
    found = sorted(name for name, plain in bare.items() if plain in homes and name not in known)
    assert not found, f"compare with the home in lib, in a later cell, and add to BUILT: {found}"
    assert set(known) <= set(bare), f"defined no more: {set(known) - set(bare)}"


def test_a_comparison_that_cannot_fail_is_none():
    assert compares(
        "ours, theirs = zoh(A), ssm.discretize(A)\nassert ours == theirs",
        "zoh",
        "lib.scan.ssm.discretize",
    )
    assert not compares("print(zoh(A) - ssm.discretize(A))", "zoh", "lib.scan.ssm.discretize")
    assert not compares(
        "def zoh(A): ...\nassert ssm.discretize(A)", "zoh", "lib.scan.ssm.discretize"
    )
