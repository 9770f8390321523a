"""Claims about lib.scan.native: a kernel is compiled once, kept for this machine alone, and never in the way."""

import os
import subprocess
import sys
import time

import pytest
import torch

from lib.scan import native
from lib.scan.native import Kernel, address

SOURCE = 'extern "C" int answer(const int* n) { return n ? *n + 1 : 0; }'
START = """
import pathlib, sys
from lib.scan import native
native.CACHE = pathlib.Path(sys.argv[1])
kernel = native.Kernel(sys.argv[2], "a test", "plain Python")
"""
needs_compiler = pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler here: nothing can be built")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(native, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "plus_one.cpp"
    path.write_text(SOURCE)
    return path


def script(path, text):
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return str(path)


@needs_compiler
def test_a_kernel_is_compiled_once_and_says_so(cache, source, capsys):
    one = Kernel(source, "a test", "plain Python")
    assert not one.ready() and one.available() and one.available() and one.ready()
    number = torch.tensor([41], dtype=torch.int32)
    assert one.library.answer(address(number)) == 42 and one.library.answer(address(None)) == 0
    assert Kernel(source, "a test", "plain Python").available()
    assert capsys.readouterr().out == "compiling a test (a few seconds, once)\n"
    assert [path.name for path in cache.iterdir()] == [one.target().name]


def test_without_a_compiler_it_says_once_what_happens_instead(cache, source, monkeypatch, capsys):
    monkeypatch.setattr(native, "compiler", lambda: None)
    one = Kernel(source, "a test", "plain Python")
    assert not one.available() and not one.available() and not one.ready()
    assert capsys.readouterr().out == "no C++ compiler found: plain Python\n"
    assert not cache.exists()


def test_a_compiler_that_fails_leaves_nothing_behind(cache, source, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CXX", script(tmp_path / "broken", "exit 1"))
    assert not Kernel(source, "a test", "plain Python").available()
    assert capsys.readouterr().out.endswith(f"{tmp_path / 'broken'} could not compile a test: plain Python\n")
    assert list(cache.iterdir()) == []


@needs_compiler
def test_a_compiler_without_openmp_builds_for_one_core(cache, source, tmp_path, monkeypatch):
    real = native.compiler()
    monkeypatch.setenv("CXX", script(tmp_path / "old", f'case "$*" in *-fopenmp*) exit 1;; esac; exec {real} "$@"'))
    assert Kernel(source, "a test", "plain Python").available()


@needs_compiler
def test_a_build_that_was_killed_never_blocks_the_next(cache, source, tmp_path):
    """A compiler that hangs is killed half way, with its caller; the next use builds as if nothing had been."""
    started = tmp_path / "started"
    slow = script(tmp_path / "slow", f'for a; do last=$a; done; echo half > "$last"; touch {started}; exec sleep 60')
    build = subprocess.Popen([sys.executable, "-c", START + "kernel.build()", cache, source], start_new_session=True,
                             env=os.environ | {"CXX": slow}, stdout=subprocess.DEVNULL)
    try:
        while not started.exists():
            assert build.poll() is None
            time.sleep(0.01)
    finally:
        os.killpg(build.pid, 9)
        build.wait()
    assert Kernel(source, "a test", "plain Python").available()


@needs_compiler
def test_a_damaged_library_is_built_again(cache, source):
    one = Kernel(source, "a test", "plain Python")
    cache.mkdir()
    one.target().write_bytes(b"half a library")
    assert not one.ready() and one.available()
    assert [path.name for path in cache.iterdir()] == [one.target().name]


def test_the_cache_is_keyed_by_source_headers_compiler_torch_and_processor(source, tmp_path, monkeypatch):
    """A library that was built for another machine is another file: it is never loaded here."""
    one = Kernel(source, "a test", "plain Python")
    names = [one.target().name]
    for module, name, value in ((native, "compiler", lambda: "another"), (native, "processor", lambda: "another"),
                                (torch, "__version__", "0.1"), (native, "LIB", tmp_path)):  # no headers there
        monkeypatch.setattr(module, name, value)
        names.append(one.target().name)
    source.write_text(SOURCE + "\n")
    names.append(one.target().name)
    assert len(set(names)) == 6
