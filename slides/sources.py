"""Which code a figure is made of: its function, and all in this repository that it calls.

A figure cannot be compared with itself cheaply, so the build notes what it was made of instead: the
source of the figure's function and, step by step, of every function, class and constant of `lib`
and `slides` that it names. Docstrings and comments do not count, nor where the code lies: a file
may move, and its importers may follow it, without a figure going stale.
"""

import ast
import hashlib
from functools import cache

from lib.env.errors import UserError
from slides.quotes import ROOT, first_line, member, without_docstring

PACKAGES = ("lib", "slides")


def code_hash(file: str, name: str) -> str:
    """A short hash of the code behind the symbol `name` of `file` (such as slides/figures.py)."""
    texts = sorted(f"{what}\n{_text(where, what)}" for where, what in closure(file, name))
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


def closure(file: str, name: str) -> set[tuple[str, str]]:
    """Every (file, symbol) that the symbol rests on, itself included."""
    seen, todo = set(), [(file, name)]
    while todo:
        here = todo.pop()
        if here not in seen:
            seen.add(here)
            todo += _names(*here)
    return seen


@cache
def _tree(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text(encoding="utf-8"))


def _node(file: str, name: str) -> ast.AST:
    try:
        return member(_tree(file), name)
    except KeyError as error:
        raise UserError(f"{file} has no {name}: was it renamed?") from error


def _text(file: str, name: str) -> str:
    """A symbol's source lines without docstrings, comment lines,
    blank lines and imports from this repository.
    """
    node = _node(file, name)
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    for part in ast.walk(node):
        if isinstance(part, ast.ImportFrom) and _ours(part):
            lines[part.lineno - 1 : part.end_lineno] = [""] * (part.end_lineno - part.lineno + 1)
    lines = lines[first_line(node) - 1 : node.end_lineno]
    kept = (line.rstrip() for line in without_docstring(lines, node))
    return "\n".join(line for line in kept if line.strip() and not line.strip().startswith("#"))


@cache
def _names(file: str, name: str) -> tuple[tuple[str, str], ...]:
    """The symbols of this repository that one symbol names."""
    module, node = _tree(file), _node(file, name)
    known = _imports(module.body) | _imports(ast.walk(node))
    found = set()
    for part in ast.walk(node):
        if isinstance(part, ast.Name):
            if part.id in known and known[part.id][1]:
                found.add(known[part.id])
            elif _has(file, part.id):
                found.add((file, part.id))
        elif isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name):
            home, symbol = known.get(part.value.id, ("", ""))
            if home and not symbol and _has(home, part.attr):
                found.add((home, part.attr))
    return tuple(sorted(found))


def _has(file: str, name: str) -> bool:
    try:
        member(_tree(file), name)
    except KeyError:
        return False
    return True


def _ours(node: ast.ImportFrom) -> bool:
    return (node.module or "").split(".")[0] in PACKAGES


def _file(module: str) -> str:
    """The file of a module or package of this repository, "" where there is none."""
    path = module.replace(".", "/")
    return next(
        (file for file in (f"{path}.py", f"{path}/__init__.py") if (ROOT / file).is_file()), ""
    )


def _imports(nodes) -> dict[str, tuple[str, str]]:
    """Local name -> (file, symbol) for what is imported from this repository;
    "" for a whole module.
    """
    found = {}
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and _ours(node):
            for alias in node.names:
                inner, outer = _file(f"{node.module}.{alias.name}"), _file(node.module)
                local = alias.asname or alias.name
                if inner:
                    found[local] = (inner, "")
                elif outer and _has(outer, alias.name):
                    found[local] = (outer, alias.name)
                elif outer.endswith("/__init__.py"):  # a package hands on what its modules define
                    handed_on = _imports(_tree(outer).body)
                    found |= {local: handed_on[alias.name]} if alias.name in handed_on else {}
    return found
