"""The rule of the house: a room imports only rooms named before it, inside functions too, and none imports `lab`."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter

import pytest

from lib.env.paths import ROOT

ROOMS = ["env", "music", "show", "scan", "mamba", "train", "generate", "lab"]  # as lib/__init__.py has them
HEAVY = {"muspy", "miditok", "symusic", "midirenderer", "pretty_midi", "mido", "soundfile", "IPython", "matplotlib"}


def sources() -> dict[str, ast.Module]:
    """Dotted name -> what a file of lib says; a room's face goes by the room's name."""
    found = {}
    for path in sorted(ROOT.glob("lib/*/**/*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def imports(tree: ast.Module, modules) -> set[str]:
    """The modules of lib that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "write `from lib` and not `from .`"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in modules else node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.startswith("lib.")}


def broken(files: dict[str, ast.Module]) -> list[str]:
    """What breaks the rule, a sentence each."""
    graph = {name: imports(tree, files) for name, tree in files.items()}
    room = lambda name: ROOMS.index(name.split(".")[1])
    wrong = [f"{name} must not import {other}" for name, others in graph.items() for other in sorted(others)
             if room(other) > room(name)]
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        wrong.append(f"a circle: {' <- '.join(error.args[1])}")
    return wrong


def test_each_room_imports_only_rooms_named_before_it_and_nothing_comes_back_to_itself():
    assert {name.split(".")[1] for name in sources()} == set(ROOMS)
    assert not broken(sources())


@pytest.mark.parametrize("place, line, says", [
    ("lib.scan.selective", "from lib.mamba import MambaLM", "lib.scan.selective must not import lib.mamba"),
    ("lib.train.trainer", "def late():\n    from lib.lab.bench import timing", "must not import lib.lab.bench.timing"),
    ("lib.music.notes", "def late():\n    import lib.music.tokens", "a circle: ")])
def test_a_broken_rule_is_found(place, line, says):
    files = sources()
    files[place].body += ast.parse(line).body
    assert any(says in sentence for sentence in broken(files))


def test_a_machine_without_a_music_library_can_train():
    rooms = ", ".join(f"lib.{room}" for room in ROOMS)
    code = f"import sys, lib.lab.rivals.matched, {rooms}\nprint(*sorted({HEAVY} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
