"""Files appear whole or not at all."""

import hashlib
import json
import os
import shutil
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lib.env.errors import UserError, os_errors


@contextmanager
def atomic_write(path: str | Path, what: str = "") -> Iterator[Path]:
    """Give a temporary name beside `path` to write to; it becomes `path` when the block succeeds.

    When the block fails, nothing is left behind and an older file keeps its content. The folder
    is made. An operating system's error becomes a `UserError` that says what could not be written.
    """
    path = Path(path)
    part = _beside(path)
    with os_errors(f"write {what or path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield part
            on_disk(part)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: Path, what: str = "", *, first_stays: bool = False) -> Iterator[Path]:
    """Give a folder to fill beside `folder`, which appears with all of its files or not at all.

    Where it is there already, its files are replaced one by one: they have to fit those that stay.
    With `first_stays` it is left as it is: another process was first, and its work is the same.
    """
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part.d")
    with os_errors(f"write {what or folder}"):
        try:
            part.mkdir(parents=True, exist_ok=True)
            yield part
            if first_stays:
                try:
                    os.replace(part, folder)
                except OSError:
                    if not folder.is_dir():
                        raise
            elif folder.exists():
                for path in sorted(part.iterdir()):
                    os.replace(path, folder / path.name)
            else:
                os.replace(part, folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)


@contextmanager
def only_one(path: Path, say=print) -> Iterator[None]:
    """One process at a time inside the block, by a lock file; a second one waits and says so."""
    from filelock import FileLock, Timeout

    with os_errors(f"write into {path.parent}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            say("another process is fetching the data: waiting for it")
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def sha256_of(path: Path) -> str:
    """The file's checksum in hexadecimal."""
    with os_errors(f"read {path}"), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_writable(path: str | Path) -> None:
    """Raise `UserError` where `atomic_write` could not write this file; asked before long work.

    Nothing is left behind, and an older file is not touched.
    """
    path = Path(path)
    with os_errors(f"write {path}"):
        if path.is_dir():
            raise UserError(f"{path} is a folder: give the name of a file")
        # where folders are missing, in the one that they would be made in
        probe = next(one for one in path.parents if one.exists()) / _beside(path).name
        probe.touch()
        probe.unlink()


def _beside(path: Path) -> Path:
    """The temporary name that a file has until it is whole."""
    writer = f"{os.getpid()}-{threading.get_ident()}"
    return path.with_name(f".{path.stem}.{writer}.part{path.suffix}")


def check_regular(path: str | Path) -> os.stat_result:
    """What the system says of a file.

    Raises `UserError` where it has no end: who reads a pipe waits for ever.
    """
    with os_errors(f"read {path}"):
        found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        what = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe, a socket or a device"
        raise UserError(f"{path} is {what} and no file: put the file itself there")
    return found


def on_disk(path: Path) -> None:
    """Wait until a file's content is on the disk: only then may it take the place of another."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def write_text(path: str | Path, text: str, what: str = "") -> None:
    """Write a text file whole or not at all, as UTF-8 with plain line ends.

    Raises `UserError`, never leaves half a file.
    """
    with atomic_write(path, what) as part:
        # a file's name may hold bytes that are no UTF-8; JSON reads the escape as what it was
        part.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")


def write_json(path: str | Path, value, what: str = "") -> None:
    """A result or a description as JSON that people can read, whole or not at all."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n", what)
