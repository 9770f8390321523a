"""One direction: what may import what in `lib`, read from the source, whether a line is reached or not.

Music flows from MAESTRO to tokens to a model to sound, and so do the imports: data knows nothing of
tokens, tokens nothing of models, the scan nothing of music, Mamba nothing of training. Every module
belongs to one group, and a new one has to be put into a group here.
"""

import ast
import sys
from functools import cache
from pathlib import Path

import pytest

LIB = Path(__file__).resolve().parents[1] / "lib"

GROUPS = {  # group -> its modules
    "ground": "errors files download native timing env exercises",
    "data": "sample data midi notes corpus",
    "tokens": "tokens streams grammar",
    "scan": "scan scan_cpu scan_parallel scan_triton conv_cpu ssm peers triton_aot triton_lab",
    "models": "mamba mamba_cpu mamba_peers language_model lstm transformer hybrid s4d_lm baselines selective_copying",
    "judging": "evaluate windows memorisation music_metrics anchors",
    "training": "train recipe crops checkpoints distributed rehearsal rungs",
    "playing": "sampling control moment generate endless",
    "showing": "plots listen cells live listening_page figures_memory",
    "measuring": "bench token_survey scan_rivals scan_bench scan_figures generate_rivals generate_bench "
                 "generation_report train_bench overfit_bench interruptions release experiments experiment_* "
                 "results_table",
    "house": "stamp colab colab_check workshop",
}
MAY = {  # group -> the other groups that it may import
    "ground": "",
    "data": "ground",
    "tokens": "ground data",
    "scan": "ground",
    "models": "ground scan",
    "judging": "ground data tokens models",
    "training": "ground tokens models judging",
    "playing": "ground data tokens models",
    "showing": "ground data",
    "measuring": "ground data tokens scan models judging training playing showing",
    "house": "ground data measuring",
}
# Against the stream, inside a function only: a command line gathers what its module must not need.
LATE = {
    ("env", "colab"), ("env", "colab_check"), ("env", "stamp"), ("env", "workshop"),  # python -m lib.env
    ("evaluate", "generate"), ("evaluate", "plots"), ("evaluate", "listening_page"),  # python -m lib.evaluate
    ("anchors", "plots"),  # draws its own comparison
    ("generate", "plots"), ("generate", "listen"),  # python -m lib.generate
    ("train", "data"), ("rungs", "data"),  # python -m lib.train
    ("train", "scan_cpu"),  # keeps freed memory
}
HEAVY = {"muspy", "miditok", "symusic", "midirenderer", "pretty_midi", "mido", "soundfile", "IPython", "matplotlib"}
LIGHT = {"torch", "numpy", "safetensors", "tqdm", "filelock", "jaxtyping"}  # "torch, numpy and the like"


def modules() -> list[str]:
    return sorted(path.stem for path in LIB.glob("*.py") if path.stem != "__init__")


def group_of(module: str) -> str:
    """The one group that a module is in; AssertionError, saying what to do, where there is none or more."""
    found = [group for group, names in GROUPS.items() if module in names.split()]
    if not found:
        found = [group for group, names in GROUPS.items()
                 if any(name.endswith("*") and module.startswith(name[:-1]) for name in names.split())]
    assert len(found) == 1, f"lib/{module}.py is in {found or 'no group'}: put it into one in tests/test_imports.py"
    return found[0]


@cache
def imports(module: str) -> tuple[frozenset[str], frozenset[str]]:
    """What a module imports when it is imported, and what inside functions: dotted names."""
    early, late = set(), set()

    def visit(node, inside):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                (late if inside else early).update(alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"lib/{module}.py: write `from lib` and not `from .`"
                (late if inside else early).update(f"{child.module}.{alias.name}" for alias in child.names)
            visit(child, inside or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))

    visit(ast.parse((LIB / f"{module}.py").read_text(encoding="utf-8")), False)
    return frozenset(early), frozenset(late)


def ours(names) -> set[str]:
    """The modules of lib among dotted names."""
    return {name.split(".")[1] for name in names if name.startswith("lib.")}


def allowed(module: str, other: str) -> bool:
    here, there = group_of(module), group_of(other)
    return here == there or there in MAY[here].split()


@cache
def reached(module: str) -> set[str]:
    """All modules of lib that an import of this one brings in, itself included."""
    seen, todo = set(), [module]
    while todo:
        here = todo.pop()
        if here not in seen:
            seen.add(here)
            todo += ours(imports(here)[0])
    return seen


@pytest.mark.parametrize("module", modules())
def test_imports_go_with_the_stream(module):
    early, late = (ours(names) for names in imports(module))
    wrong = sorted(other for other in early if not allowed(module, other))
    assert not wrong, f"lib/{module}.py ({group_of(module)}) must not import {wrong}"
    wrong = sorted(other for other in late if not allowed(module, other) and (module, other) not in LATE)
    assert not wrong, f"lib/{module}.py ({group_of(module)}) must not import {wrong}, not even inside a function"


def test_groups_name_modules_that_exist_and_are_ordered():
    named = {name for names in GROUPS.values() for name in names.split() if not name.endswith("*")}
    assert named <= set(modules()), f"no such module: {sorted(named - set(modules()))}"
    order = list(GROUPS)
    assert list(MAY) == order
    for group, others in MAY.items():
        assert all(order.index(other) < order.index(group) for other in others.split()), group


def test_no_exception_is_left_over():
    unused = {pair for pair in LATE if pair[1] not in ours(imports(pair[0])[1]) or allowed(*pair)}
    assert not unused, f"needed no more: {sorted(unused)}"


def test_no_module_comes_back_to_itself():
    for module in modules():
        for other in ours(imports(module)[0]):
            assert module not in reached(other), f"lib/{module}.py and lib/{other}.py import each other"


@pytest.mark.parametrize("group, never", [
    ("data", "tokens scan models judging training playing"), ("tokens", "scan models judging training playing"),
    ("scan", "data tokens models judging training playing"), ("models", "data tokens judging training playing"),
    ("showing", "tokens scan models judging training playing")])
def test_the_stream_of_the_design(group, never):
    """What the design says in words, over everything that an import brings in."""
    for module in filter(lambda module: group_of(module) == group, modules()):
        found = {other for other in reached(module) if group_of(other) in never.split()}
        assert not found, f"lib/{module}.py brings in {sorted(found)}"


def test_plots_and_listen_are_leaves():
    """Only what shows something needs them when it is imported."""
    users = {m for m in modules() if {"plots", "listen"} & reached(m)}
    assert {group_of(module) for module in users} <= {"showing", "measuring"}


@pytest.mark.parametrize("module", ["scan", "mamba", "baselines", "train", "windows", "mamba_cpu", "crops"])
def test_a_machine_without_a_music_library_can_train(module):
    early = {name.split(".")[0] for other in reached(module) for name in imports(other)[0]}
    assert not early & HEAVY, f"lib/{module}.py needs {sorted(early & HEAVY)} when it is imported"
    extra = early - LIGHT - {"lib"} - set(sys.stdlib_module_names)
    assert not extra, f"lib/{module}.py needs {sorted(extra)} beyond torch and numpy"


@pytest.mark.parametrize("names, module, other, fits", [
    (("lib.tokens.encode",), "data", "tokens", False), (("lib.notes.crop",), "tokens", "notes", True),
    (("lib.train",), "mamba", "train", False), (("lib.generate",), "scan", "generate", False)])
def test_the_rules_can_be_broken(names, module, other, fits):
    assert ours(names) == {other} and allowed(module, other) is fits


def test_a_module_without_a_group_is_found():
    with pytest.raises(AssertionError, match="put it into one"):
        group_of("brand_new")
