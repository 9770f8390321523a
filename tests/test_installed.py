"""Claims about the package that `pip install .` gives:
a stranger's program runs with it, far from the repository.
"""

import os
import re
import shutil
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement

from lib.env.install import requirements
from lib.env.paths import CACHE, ROOT
from lib.scan import cpu

STRANGER = """
import torch
from state_space_music.scan import selective_scan

x, delta = torch.randn(2, 65, 8, requires_grad=True), torch.rand(2, 65, 8)
A = -torch.rand(8, 4)
B, C = torch.randn(2, 2, 65, 4)
y = selective_scan(x, delta, A, B, C, delta_softplus=True)
y.square().mean().backward()
by_loop = selective_scan(x, delta, A, B, C, delta_softplus=True, backend="loop")
torch.testing.assert_close(y, by_loop, rtol=1e-4, atol=1e-5)
print("the scan agrees with the loop")
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder into which pip installed the package, from a copy of the repository's sources."""
    folder = tmp_path_factory.mktemp("installed")
    source = folder / "source"
    shutil.copytree(ROOT / "lib", source / "lib", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    quickly = ["--no-deps", "--no-build-isolation", "--no-compile", "--quiet"]
    subprocess.run(
        [sys.executable, "-m", "pip", "install", *quickly, "--target", folder / "site", source],
        check=True,
        capture_output=True,
    )
    return folder / "site"


def run(site, *arguments):
    """Python far from the repository,
    with the installed package and the other packages of this Python.
    """
    cache = site.parent / "cache"
    environment = {**os.environ, "PYTHONPATH": str(site), "XDG_CACHE_HOME": str(cache)}
    kernels = cache / "music-with-state-spaces" / "data" / "cache"
    if not kernels.exists():  # the same sources: what this machine has compiled once is found
        kernels.mkdir(parents=True)
        for library in CACHE.glob("*.so"):
            shutil.copy(library, kernels)
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=site.parent,
        capture_output=True,
        text=True,
        env=environment,
    )


def test_a_stranger_s_script_runs(site):
    done = run(site, "-c", STRANGER)
    assert done.stdout.endswith("the scan agrees with the loop\n"), done.stderr


@pytest.mark.skipif(not cpu.available(), reason="no C++ compiler here")
def test_the_kernels_come_along(site):
    assert {p.name for p in site.rglob("*.cpp")} == {"cpu.cpp", "block_cpu.cpp", "step_cpu.cpp"}
    done = run(site, "-c", "from state_space_music.scan import cpu; assert cpu.KERNEL.ready()")
    assert done.returncode == 0, done.stderr


def test_nothing_is_called_lib(site):
    assert {p.name for p in site.iterdir() if p.suffix != ".dist-info"} == {"state_space_music"}
    for path in site.rglob("*.py"):
        assert not re.search(
            r"^\s*(from|import) lib\b", path.read_text(encoding="utf-8"), re.MULTILINE
        ), path


def test_every_module_can_be_imported_and_none_of_the_repository_is_needed(site):
    modules = [".".join(p.relative_to(site).with_suffix("").parts) for p in site.rglob("*.py")]
    names = [
        name.removesuffix(".__init__")
        for name in sorted(modules)
        if not name.endswith(("__main__", "triton_kernel"))
    ]
    done = run(
        site,
        "-c",
        f"import importlib, sys\nfor name in {names}: importlib.import_module(name)\n"
        "assert not any(m == 'lib' or m.startswith('lib.') for m in sys.modules)",
    )
    assert done.returncode == 0, done.stderr


def test_its_commands_say_what_is_missing_in_a_sentence(site):
    for room in ("env", "generate"):
        done = run(site, "-m", f"state_space_music.{room}")
        assert (
            done.returncode == 2
            and done.stderr.startswith("error: ")
            and done.stderr.count("\n") == 1
        )


def test_what_it_requires_is_what_the_course_requires():
    """Every package that the requirements name is asked for in the same versions."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = project["dependencies"] + sum(project["optional-dependencies"].values(), [])
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    known = {line.split("  #")[0] for line in lines}
    name = lambda line: re.split(r"[=<>;]", line)[0]
    names = {name(line) for line in known}
    assert {line for line in asked if name(line) in names} <= known


def test_the_lock_holds_every_requirement_in_a_version_that_it_allows():
    lines = (ROOT / "requirements-lock.txt").read_text(encoding="utf-8").splitlines()
    locked = dict(line.split("==") for line in lines if line[0] != "#")
    for wanted, _ in requirements():
        need = Requirement(wanted)
        assert need.specifier.contains(locked[need.name]), wanted
