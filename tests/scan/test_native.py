"""Claims about lib.scan.native: a kernel is compiled once, kept for this machine alone,
and never in the way.
"""

import errno
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from lib.env.errors import UserError
from lib.scan import native
from lib.scan.native import Kernel, address

SOURCE = 'extern "C" int answer(const int* n) { return n ? *n + 1 : 0; }'
START = """
import pathlib, sys
from lib.scan import native
native.CACHE = pathlib.Path(sys.argv[1])
kernel = native.Kernel(sys.argv[2], "a test", "plain Python")
"""
needs_compiler = pytest.mark.skipif(
    native.compiler() is None, reason="no C++ compiler here: nothing can be built"
)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(native, "CACHE", tmp_path / "cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
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
def test_whoever_asks_while_another_thread_compiles_waits_for_the_answer(
    cache, source, monkeypatch
):
    def slow(kernel, build=Kernel.build):
        time.sleep(0.3)
        return build(kernel)

    monkeypatch.setattr(Kernel, "build", slow)
    kernel = Kernel(source, "a test", "plain Python")
    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(lambda _: kernel.available(), range(3)))
    assert found == [True] * 3


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
    assert capsys.readouterr().out.endswith(
        f"{tmp_path / 'broken'} could not compile a test: plain Python\n"
    )
    assert list(cache.iterdir()) == []


@needs_compiler
def test_a_compiler_without_openmp_builds_for_one_core(cache, source, tmp_path, monkeypatch):
    real = native.compiler()
    monkeypatch.setenv(
        "CXX", script(tmp_path / "old", f'case "$*" in *-fopenmp*) exit 1;; esac; exec {real} "$@"')
    )
    assert Kernel(source, "a test", "plain Python").available()


@needs_compiler
def test_a_build_that_was_killed_never_blocks_the_next(cache, source, tmp_path):
    """A compiler that hangs is killed half way, with its caller;
    the next use builds as if nothing had been.
    """
    started = tmp_path / "started"
    slow = script(
        tmp_path / "slow",
        f'for a; do last=$a; done; echo half > "$last"; touch {started}; exec sleep 60',
    )
    build = subprocess.Popen(
        [sys.executable, "-c", START + "kernel.build()", cache, source],
        start_new_session=True,
        env=os.environ | {"CXX": slow},
        stdout=subprocess.DEVNULL,
    )
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


def test_the_cache_is_keyed_by_source_headers_compiler_torch_and_processor(
    source, tmp_path, monkeypatch
):
    """A library that was built for another machine is another file: it is never loaded here."""
    one = Kernel(source, "a test", "plain Python")
    names = [one.target().name]
    for module, name, value in (
        (native, "compiler", lambda: "another"),
        (native, "processor", lambda: "another"),
        (torch, "__version__", "0.1"),
        # no headers there
        (native, "HERE", tmp_path),
    ):
        monkeypatch.setattr(module, name, value)
        names.append(one.target().name)
    source.write_text(SOURCE + "\n")
    names.append(one.target().name)
    assert len(set(names)) == 6


def test_an_address_in_the_memory_of_another_device_never_leaves_python():
    with pytest.raises(UserError, match="tensor on meta"):
        address(torch.empty(3, device="meta"))
    with pytest.raises(UserError, match="lies nowhere"):
        address(torch._efficientzerotensor(3))
    assert address(torch.empty(0)).value is None


# ---- folders that are in the way ------------------------------------------------------------


@pytest.fixture
def own(cache, tmp_path, monkeypatch):
    """The user's own cache, which is not there yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return native.own_folder()


def built(source):
    """Whether a new kernel can be used, and what it said."""
    said = []
    return Kernel(source, "a test", "plain Python").build(said.append), said


@needs_compiler
def test_a_folder_that_cannot_be_written_is_named_and_the_user_s_own_cache_is_used(
    cache, own, source
):
    cache.write_text("a file where the folder should be")
    ready, said = built(source)
    assert ready and len(said) == 2
    assert said[1].startswith(f"could not write {cache}") and "File exists" in said[1]
    assert said[1].endswith(f"; a test is kept in {own} instead")
    assert own.stat().st_mode & 0o777 == 0o700
    assert built(source) == (True, []), "the next one finds it there"


@needs_compiler
def test_a_disk_that_cannot_be_written_is_named(cache, own, source, monkeypatch):
    def read_only(part, path, replace=os.replace):
        if cache in path.parents:
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        replace(part, path)

    monkeypatch.setattr(os, "replace", read_only)
    ready, said = built(source)
    assert ready and "no permission to write" in said[1] and str(cache) in said[1]


@needs_compiler
def test_a_disk_that_runs_no_programs_is_named(cache, own, source, monkeypatch):
    def noexec(path, load=native.ctypes.CDLL):
        if path.startswith(str(cache)):
            raise OSError(f"{path}: failed to map segment from shared object")
        return load(path)

    monkeypatch.setattr(native.ctypes, "CDLL", noexec)
    ready, said = built(source)
    assert ready and said[1].startswith(f"{cache} lets no program run") and "noexec" in said[1]
    assert built(source) == (True, [])


@needs_compiler
def test_a_full_disk_is_named(cache, own, source, tmp_path, monkeypatch):
    real = native.compiler()
    full = f'case "$*" in *{cache}*) echo "ld: final link failed: No space left on device" >&2; exit 1;; esac'
    monkeypatch.setenv("CXX", script(tmp_path / "full", f'{full}; exec {real} "$@"'))
    ready, said = built(source)
    assert ready and "the disk is full" in said[1] and str(cache) in said[1]
    assert list(cache.iterdir()) == []


def test_where_no_folder_serves_the_first_reason_is_said(cache, own, source, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", script(tmp_path / "any", "exit 0"))
    cache.write_text("a file")
    own.parent.write_text("a file")
    ready, said = built(source)
    assert not ready and str(cache) in said[1] and said[1].endswith("; plain Python")
    assert "could not compile" not in said[1]


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="Windows has no owners of this kind")
@pytest.mark.parametrize("open_to_others", ["mode", "link", "owner"])
def test_a_cache_that_others_may_enter_is_neither_loaded_from_nor_written_to(
    cache, own, source, open_to_others, tmp_path, monkeypatch
):
    monkeypatch.setenv("CXX", script(tmp_path / "any", "exit 0"))
    cache.write_text("a file")
    own.parent.mkdir()
    if open_to_others == "link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        own.symlink_to(tmp_path / "elsewhere")
    else:
        own.mkdir(mode=0o755 if open_to_others == "mode" else 0o700)
    if open_to_others == "owner":
        another = os.getuid() + 1
        monkeypatch.setattr(os, "getuid", lambda: another)
    one = Kernel(source, "a test", "plain Python")
    monkeypatch.setattr(
        one, "_load", lambda target: pytest.fail("loaded") if own in target.parents else False
    )
    assert not native.is_private(own) and not one.build([].append)
    assert list(own.iterdir()) == []


@needs_compiler
@pytest.mark.skipif(not hasattr(os, "getuid"), reason="Windows has no modes of this kind")
def test_a_library_that_others_could_have_changed_is_built_again(cache, source):
    one = Kernel(source, "a test", "plain Python")
    assert one.build([].append)
    one.target().chmod(0o777)
    again = Kernel(source, "a test", "plain Python")
    assert not again.ready() and again.build([].append)
    assert one.target().stat().st_mode & 0o777 == 0o755


@needs_compiler
def test_a_failure_that_passes_leaves_nothing_slow_behind(cache, source, tmp_path, monkeypatch):
    """Built without threads for once, under a name of its own;
    the next process tries with threads again.
    """
    real, broken = native.compiler(), tmp_path / "broken"
    flaky = f'case "$*" in *-fopenmp*) [ -e {broken} ] && exit 1;; esac; exec {real} "$@"'
    monkeypatch.setenv("CXX", script(tmp_path / "flaky", flaky))
    broken.touch()
    one = Kernel(source, "a test", "plain Python")
    assert one.available() and not one.target().exists() and one.target(threads=[]).exists()
    broken.unlink()
    two = Kernel(source, "a test", "plain Python")
    assert not two.ready() and two.available() and two.target().exists()
    assert Kernel(source, "a test", "plain Python").ready()
