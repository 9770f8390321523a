"""What a deck quotes: numbers out of data/results, words out of executed notebooks,
code out of lib.

    {{ results:FILE.json path.to.0.value .1f }}         a dotted path; whole numbers index lists
    {{ results:FILE.json rows[arch=mamba].bits .2f }}   the one row of a list whose values agree
    {{ results:FILE.json "facts.notes a second" .1f }}  quotes, where a key holds a space
    {{ results:FILE.json hours *60 .0f }}               scaled: * or / and a number
    {{ results:FILE.json slow.ms / fast.ms .1f }}       or a path: a ratio
    {{ notebook:01_maestro ([\\d,]+) performances }}    group 1 of a pattern, in its output
    {{ notebook:01_maestro#6 ([\\d,]+) performances }}  the same, in that of code cell 6
    {{ course:address }}                                where the course is fetched from

    <!-- code: lib/scan/ssm.py kernel -->                    a function, class or Class.method
    <!-- code: lib/scan/ssm.py kernel without docstring without comments -->
    <!-- code: lib/scan/ssm.py kernel from "ys = []" to "ys.append" -->
                                                        the lines between two that hold these texts,
                                                        both included

Everything raises `UserError` with one sentence where it finds nothing.
"""

import ast
import io
import json
import re
import textwrap
import tokenize
from functools import reduce

from lib.env.errors import UserError
from lib.env.paths import ROOT
from lib.lab.pages.address import REPOSITORY

NUMBER = re.compile(r"\{\{\s*(results|notebook|course):(.+?)\s*\}\}")
CODE = re.compile(r"^<!-- code: (.+?) -->$", re.MULTILINE)

_PATH = r'"[^"]+"|(?:[^\s\[\]]|\[[^\]]*\])+'
_RESULT = re.compile(rf"(\S+\.json)\s+({_PATH})((?:\s*[*/]\s*(?:{_PATH}))*)(?:\s+(\S+))?")
_SCALE = re.compile(rf"([*/])\s*({_PATH})")
_STEP = re.compile(r"([^.\[\]]+)|\[([^\]]*)\]|\.")


# numbers ---------------------------------------------------------------------------------------


def number(kind: str, text: str) -> str:
    """What stands in place of `{{ kind:text }}`."""
    if kind == "course":
        return course(text)
    return result(text) if kind == "results" else printed(text)


def course(text: str) -> str:
    """What the course says of itself: its `address`."""
    if text.strip() != "address":
        raise UserError(f"{{{{ course:{text} }}}} cannot be read: there is course:address")
    return REPOSITORY


def result(text: str) -> str:
    """`FILE.json path [* or / number or path …] [format]`, as it stands in a deck, formatted."""
    found = _RESULT.fullmatch(text.strip())
    if not found:
        raise UserError(
            f"{{{{ results:{text} }}}} cannot be read: write a file, a path and a format"
        )
    name, path, scales, form = found.groups()
    tree = _results(name)
    path, attached = _attached(path.strip('"'), quoted=path.startswith('"'))
    value = follow(tree, path, name)
    for sign, operand in [*attached, *_SCALE.findall(scales)]:
        operand = operand.strip('"')
        plain = re.fullmatch(r"\d+(\.\d+)?", operand)
        by = (
            float(operand)
            if plain and "." in operand
            else int(operand)
            if plain
            else follow(tree, operand, name)
        )
        if not all(isinstance(part, int | float) for part in (value, by)):
            raise UserError(
                f"data/results/{name}: {path} {sign} {operand} is no arithmetic of numbers"
            )
        if sign == "/" and not by:
            raise UserError(f"data/results/{name}: {path} / {operand} divides by zero")
        value = value * by if sign == "*" else value / by
    if isinstance(value, dict | list) or value is None:
        raise UserError(
            f"data/results/{name}: {path} is {type(value).__name__}, not a value: "
            "name one inside it"
        )
    try:
        return format(value, form or "")
    except (ValueError, TypeError) as error:
        raise UserError(
            f"data/results/{name}: {path} is {value!r}, which the format {form!r} does not fit"
        ) from error


def _attached(path: str, quoted: bool) -> tuple[str, list[tuple[str, str]]]:
    """A path and the scales that were written on to it without a space: `hours*60`."""
    scales = []
    while not quoted and (found := re.fullmatch(r"(.+)([*/])(\d+(?:\.\d+)?)", path)):
        path = found[1]
        scales.insert(0, (found[2], found[3]))
    return path, scales


def _results(name: str) -> dict:
    path = ROOT / "data" / "results" / name
    if not path.is_file():
        raise UserError(f"data/results/{name} is not there: a deck quotes a number from it")
    return json.loads(path.read_text(encoding="utf-8"))


def follow(tree, path: str, name: str):
    """The value at a dotted path; `[key=value,…]` picks the one row of a list that agrees."""
    here = tree
    for step in (match for match in _STEP.finditer(path) if match[0] != "."):
        where = path[: step.start()].rstrip(".") or "its top"
        if step[2] is not None:
            here = _row(here, step[2], f"data/results/{name}, at {where}")
        elif isinstance(here, dict) and step[1] in here:
            here = here[step[1]]
        elif (
            isinstance(here, list)
            and re.fullmatch(r"-?\d+", step[1])
            and -len(here) <= int(step[1]) < len(here)
        ):
            here = here[int(step[1])]
        else:
            has = (
                f"its keys are {', '.join(map(str, list(here)[:12]))}"
                if isinstance(here, dict)
                else (
                    f"it is a list of {len(here)}" if isinstance(here, list) else f"it is {here!r}"
                )
            )
            raise UserError(f"data/results/{name} has no {step[0]} at {where}: {has}")
    return here


def _row(rows, conditions: str, where: str):
    """The one row of a list for which every `key=value` of `conditions` holds."""
    wanted = [part.partition("=")[::2] for part in conditions.split(",")]
    if not isinstance(rows, list) or not all(key and value for key, value in wanted):
        raise UserError(f"{where}: [{conditions}] needs a list, and key=value in the brackets")

    def agrees(row) -> bool:
        return isinstance(row, dict) and all(
            key.strip() in row and value.strip() in _spellings(row[key.strip()])
            for key, value in wanted
        )

    found = [row for row in rows if agrees(row)]
    if len(found) != 1:
        raise UserError(f"{where}: [{conditions}] fits {len(found)} rows, not one")
    return found[0]


def _spellings(value) -> set[str]:
    """How a value may be written in a condition: None as null, 10.0 as 10."""
    plain = {f"{value:g}"} if isinstance(value, float) else set()
    return plain | {str(value), json.dumps(value)}


# notebooks -------------------------------------------------------------------------------------


def outputs(notebook: str, cell: int | None = None) -> list[str]:
    """What each code cell of an executed notebook printed or showed, as text.

    With `cell` (from 1), that cell's alone.
    """
    cells = [c for c in book(notebook)["cells"] if c["cell_type"] == "code"]
    if cell is not None:
        if not 1 <= cell <= len(cells):
            raise UserError(
                f"notebooks/{notebook}.ipynb has {len(cells)} code cells, and no number {cell}"
            )
        cells = [cells[cell - 1]]
    texts = []
    for c in cells:
        found = ((out, out.get("data", {})) for out in c["outputs"])
        parts = [
            "".join(
                out.get("text")
                or data.get("text/markdown")
                or data.get("text/html")
                or data.get("text/plain")
                or ""
            )
            for out, data in found
        ]
        texts.append(re.sub(r"data:[\w.+/-]+;base64,[A-Za-z0-9+/=]+", "", "\n".join(parts)))
    return texts


def book(name: str) -> dict:
    """An executed notebook, by its name without the ending."""
    path = ROOT / "notebooks" / f"{name}.ipynb"
    if not path.is_file():
        raise UserError(f"notebooks/{name}.ipynb is not there: a deck quotes it")
    return json.loads(path.read_text(encoding="utf-8"))


# while a figure is watched (slides/pictures.py): what it was told by `printed`
asked: dict[str, str] | None = None


def printed(text: str) -> str:
    """`NOTEBOOK[#CELL] pattern`: group 1 of the pattern,
    which must find one value in what was printed.
    """
    global asked
    note, asked = asked, None
    try:
        value = _printed(text)
    finally:
        asked = note
    if asked is not None:
        asked[text] = value
    return value


def _printed(text: str) -> str:
    found = re.fullmatch(r"(\w+)(?:#(\d+))?\s+(.+)", text)
    if not found:
        raise UserError(f"{{{{ notebook:{text} }}}} cannot be read: write a notebook and a pattern")
    notebook, cell, pattern = found.groups()
    try:
        hits = [
            match[1]
            for printed_text in outputs(notebook, int(cell) if cell else None)
            for match in re.finditer(pattern, printed_text)
        ]
    except (re.error, IndexError) as error:
        raise UserError(f"{pattern!r} is no pattern with a group (…): {error}") from error
    if len(set(hits)) != 1:
        where = f"notebooks/{notebook}.ipynb" + (f", code cell {cell}" if cell else "")
        raise UserError(f"{where}: {pattern!r} finds {len(set(hits))} values, not one")
    return hits[0]


# code ------------------------------------------------------------------------------------------


def excerpt(text: str) -> str:
    """`FILE SYMBOL [without docstring] [without comments] [from "TEXT" to "TEXT"]`:
    the source of that symbol.

    The last option takes the lines from the first that holds one text to the next that holds the
    other, so that lines written above or between them do not move what is quoted.
    """
    options = r'(?:\s+(?:without docstring|without comments|from "[^"]+" to "[^"]+"))*'
    found = re.fullmatch(rf"(\S+\.py)\s+([\w.]+)({options})", text.strip())
    if not found:
        raise UserError(
            f"<!-- code: {text} --> cannot be read: write a file, a symbol, "
            'and perhaps `without docstring`, `without comments` or `from "TEXT" to "TEXT"`'
        )
    file, symbol, options = found.groups()
    lines, node = symbol_lines(file, symbol)
    if "without docstring" in options:
        lines = without_docstring(lines, node)
    if "without comments" in options:
        lines = without_comments(lines)
    if ends := re.search(r'from "([^"]+)" to "([^"]+)"', options):
        lines = between(lines, *ends.groups(), where=f"{file}: {symbol}")
    return textwrap.dedent("\n".join(lines)).strip("\n")


def between(lines: list[str], first: str, last: str, where: str) -> list[str]:
    """The lines from the first that holds `first` to the next, or the same, that holds `last`."""
    begin = next((number for number, line in enumerate(lines) if first in line), None)
    if begin is None:
        raise UserError(f"{where} has no line with {first!r} here")
    end = next((number for number in range(begin, len(lines)) if last in lines[number]), None)
    if end is None:
        raise UserError(f"{where} has no line with {last!r} behind the one with {first!r} here")
    return lines[begin : end + 1]


def without_comments(lines: list[str]) -> list[str]:
    """The lines without comments; a line that was only a comment goes."""
    source, cut = textwrap.dedent("\n".join(lines)), {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            cut[token.start[0] - 1] = token.start[1]
    found = [line[: cut.get(number)].rstrip() for number, line in enumerate(source.splitlines())]
    return [line for number, line in enumerate(found) if line or number not in cut]


def symbol_lines(file: str, symbol: str) -> tuple[list[str], ast.AST]:
    """The lines of a function, class or Class.method, decorators included, and its node.

    A name that a module assigns at its top level counts as well.
    """
    path = ROOT / file
    if not path.is_file():
        raise UserError(f"{file} is not there: a deck takes code from it")
    source = path.read_text(encoding="utf-8")
    try:
        node = reduce(member, symbol.split("."), ast.parse(source))
    except KeyError as error:
        raise UserError(f"{file} has no {symbol}: was it renamed?") from error
    return source.splitlines()[first_line(node) - 1 : node.end_lineno], node


def member(parent: ast.AST, name: str) -> ast.AST:
    """The definition or assignment of `name` right inside a module or class; KeyError if none."""
    for node in getattr(parent, "body", []):
        if (
            isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            and node.name == name
        ):
            return node
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in targets:
            if any(
                isinstance(part, ast.Name) and part.id == name
                for part in getattr(target, "elts", [target])
            ):
                return node
    raise KeyError(name)


def first_line(node: ast.AST) -> int:
    """The line on which a definition begins, its decorators counted."""
    return min(
        [node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))]
    )


def without_docstring(lines: list[str], node: ast.AST) -> list[str]:
    """The lines of a definition without its docstring and those of what is defined in it."""
    begin, drop = first_line(node), set()
    for inner in ast.walk(node):
        if isinstance(
            inner, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
        ) and ast.get_docstring(inner):
            text = inner.body[0]
            drop |= set(range(text.lineno - begin, text.end_lineno - begin + 1))
    return [line for number, line in enumerate(lines) if number not in drop]
