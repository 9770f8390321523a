"""The rule of the house: a room imports only rooms named before it, inside functions too,
and none imports `lab`.
"""

import ast
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter

import pytest

from lib.env.paths import ROOT

# as lib/__init__.py has them
ROOMS = ["env", "music", "show", "scan", "mamba", "train", "generate", "lab"]
HEAVY = {
    "muspy",
    "miditok",
    "symusic",
    "midirenderer",
    "pretty_midi",
    "mido",
    "soundfile",
    "IPython",
    "matplotlib",
}


@pytest.fixture(scope="module")
def sources() -> dict[str, ast.Module]:
    """Dotted name -> what a file of lib says; a room's face goes by the room's name,
    the house's door by "lib".
    """
    found = {}
    for path in sorted(ROOT.glob("lib/**/*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


@cache
def telling(tree: ast.Module) -> list[ast.AST]:
    """All in a file that may name a module, found once for all rules that are broken below."""
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, (ast.ImportFrom, ast.Import, ast.Constant))
    ]


def imports(tree: ast.Module, modules) -> set[str]:
    """The modules of lib that a file imports, at its top or inside a function;
    "lib" where it takes the whole house.
    """
    found = set()
    for node in telling(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "write `from lib` and not `from .`"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in modules else node.module)
        elif isinstance(node, ast.Import):
            # `import lib.scan as scan` names one room; without the name it brings in them all
            found |= {
                alias.name if alias.asname else alias.name.split(".")[0] for alias in node.names
            }
            found |= {alias.name for alias in node.names}
        elif (
            isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in modules
        ):
            found.add(node.value)  # for import_module
    return {name for name in found if name.split(".")[0] == "lib"}


def broken(files: dict[str, ast.Module]) -> list[str]:
    """What breaks the rule, a sentence each."""
    names = set(files) | {"lib"}
    graph = {name: imports(tree, names) - {name} for name, tree in files.items() if name != "lib"}
    room = lambda name: ROOMS.index(name.split(".")[1])
    wrong = [
        f"{name} is no room's"
        for name in files
        if name != "lib" and name.split(".")[1] not in ROOMS
    ]
    if found := imports(files["lib"], names):
        wrong.append(f"lib/__init__.py must not import {min(found)}")
    for name, others in graph.items():
        if name.split(".")[1] not in ROOMS:
            continue
        for other in sorted(others):
            if other == "lib" and room(name) < len(ROOMS) - 1:  # the last room may look at all
                wrong.append(f"{name} imports lib as a whole: name the room")
            elif other != "lib" and room(other) > room(name):
                wrong.append(f"{name} must not import {other}")
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        wrong.append(f"a circle: {' <- '.join(error.args[1])}")
    return wrong


def test_each_room_imports_only_rooms_named_before_it_and_nothing_comes_back_to_itself(sources):
    assert {name.split(".")[1] for name in sources if name != "lib"} == set(ROOMS)
    assert not broken(sources)


@pytest.mark.parametrize(
    "place, line, says",
    [
        (
            "lib.scan.selective",
            "from lib.mamba import MambaLM",
            "lib.scan.selective must not import lib.mamba",
        ),
        (
            "lib.train.trainer",
            "def late():\n    from lib.lab.bench import timing",
            "must not import lib.lab.bench.timing",
        ),
        ("lib.music.notes", "def late():\n    from lib.music import tokens", "a circle: "),
        (
            "lib.scan.cpu",
            "import_module('lib.lab.bench.timing')",
            "must not import lib.lab.bench.timing",
        ),
        ("lib.scan.cpu", "import lib\nlib.lab", "lib.scan.cpu imports lib as a whole"),
        ("lib.scan.cpu", "def late():\n    import lib.env", "lib.scan.cpu imports lib as a whole"),
        ("lib", "from lib.lab import bench", "lib/__init__.py must not import lib.lab"),
        ("lib.tools", "from lib.lab import bench", "lib.tools is no room's"),
    ],
)
def test_a_broken_rule_is_found(sources, place, line, says):
    before = sources[place].body if place in sources else []
    files = sources | {place: ast.Module([*before, *ast.parse(line).body], [])}
    assert any(says in sentence for sentence in broken(files))


def test_a_machine_without_a_music_library_can_train():
    rooms = ", ".join(f"lib.{room}" for room in ROOMS)
    code = (
        f"import sys, lib.lab.rivals.matched, {rooms}\nprint(*sorted({HEAVY} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []
