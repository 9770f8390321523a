"""Fetch a large file and unpack it so that a cut, a liar or a full disk cannot spoil anything.

Nothing here knows of music. Whatever goes wrong is a `UserError` of one sentence; `Unreachable`
says that the source cannot be had just now, so that the caller may try another one.
"""

import errno
import io
import os
import shutil
import stat
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath, PureWindowsPath

from lib.env.errors import Unreachable, UserError, explain_os_error, os_errors
from lib.env.files import sha256_of

CHUNK = 1 << 14  # bytes read at a time; a cut loses at most so much
ANSWER = 8.0  # seconds until a server must have answered at all: no network is found out fast
TIMEOUT = (5.0, 20.0)  # seconds to connect, seconds of silence that count as a cut
PASSING = {408, 425, 429, 500, 502, 503, 504}  # answers that may be different in a moment
MAX_UNPACKED = 1 << 30  # bytes; MAESTRO's MIDI files take 85 MB
MAX_DIRECTORY = 4 << 20  # bytes of a zip's list of entries; MAESTRO's takes 0.2 MB
MAX_TABLE = 2 << 20  # bytes of a table of performances; MAESTRO's takes 0.3 MB
TABLES = (".csv", ".json")


class Cut(Exception):
    """The transfer stopped early: go on from what is there."""


def need_space(folder: Path, size: int) -> None:
    """Raise `UserError` unless the disk under `folder` has `size` bytes free."""
    with os_errors(f"look at {folder}"):
        free = shutil.disk_usage(folder).free
    if free < size:
        raise UserError(
            f"the disk is too full: this needs {size / 1e6:.0f} MB and {folder} "
            f"has {free / 1e6:.0f} MB free: free some space and run it again"
        )


def fetch(
    url: str,
    path: Path,
    *,
    size: int,
    sha256: str,
    tries: int = 5,
    pause: float = 1.0,
    answer: float = ANSWER,
    timeout: tuple[float, float] = TIMEOUT,
    say=print,
) -> None:
    """Download `url` to `path`, which appears only when its size and checksum are right.

    A cut is resumed from `path` + ".part" with an HTTP Range, after 1, 2, 4 … `pause` seconds,
    until `tries` attempts in a row brought nothing new. The part stays for the next run.
    """
    part = path.with_name(path.name + ".part")
    _must_answer(url, answer)
    try:
        _fetch(url, path, part, size, sha256, tries, pause, timeout, say)
    except KeyboardInterrupt:
        say(f"the download was stopped at {_progress(part, size)}")
        raise


def _fetch(
    url: str,
    path: Path,
    part: Path,
    size: int,
    sha256: str,
    tries: int,
    pause: float,
    timeout: tuple[float, float],
    say,
) -> None:
    """Transfer, prove, and try again where that may help."""
    from tqdm import tqdm

    best, failures, began_fresh = _size(part), 0, not part.exists()
    with tqdm(total=size, unit="B", unit_scale=True, unit_divisor=1000, desc=path.name) as bar:
        while True:
            try:
                _transfer(url, part, size, timeout, bar)
            except Cut as cut:
                here = _size(part)
                failures = 1 if here > best else failures + 1
                best = max(best, here)
                if failures >= tries:
                    raise Unreachable(
                        f"the download of {path.name} broke off at {_progress(part, size)} ({cut})"
                    ) from cut
                wait = pause * 2 ** (failures - 1)
                say(f"cut at {here / 1e6:.1f} MB ({cut}): next try in {wait:g} s")
                time.sleep(wait)
                continue
            except OSError as error:
                with suppress(OSError):
                    part.unlink()
                raise UserError(f"could not write {part}: {explain_os_error(error)}") from error
            if sha256_of(part) == sha256:
                with os_errors(f"write {path}"):
                    os.replace(part, path)
                return
            part.unlink(missing_ok=True)
            if began_fresh:
                raise Unreachable(
                    f"the download of {path.name} has a wrong checksum and was "
                    "thrown away: the server does not send the official file"
                )
            say("the resumed download has a wrong checksum: starting again from nothing")
            best, failures, began_fresh = 0, 0, True


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _progress(part: Path, size: int) -> str:
    """How far it came, and what is left behind for the next run."""
    here = _size(part)
    kept = f", {part.name} is kept and the next run goes on from it" if here else ""
    return f"{here / 1e6:.1f} of {size / 1e6:.1f} MB{kept}"


def _must_answer(url: str, seconds: float) -> None:
    """Raise `Unreachable` unless the server answers anything within `seconds` in all.

    A thread, because neither a name server nor a host with twenty addresses keeps to a timeout.
    """
    import requests

    failed: list[Exception] = []

    def ask() -> None:
        try:
            requests.head(url, timeout=seconds, allow_redirects=False)
        except (requests.RequestException, OSError) as error:
            failed.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive() or failed:
        host = url.split("/")[2]
        raise Unreachable(f"{host} does not answer (no network, or it is blocked here)")


def _transfer(url: str, part: Path, size: int, timeout: tuple[float, float], bar) -> None:
    """One attempt. Return when `part` has `size` bytes; raise `Cut`, `Unreachable` or `OSError`."""
    import requests

    here = _size(part)
    if here > size:
        part.unlink()
        here = 0
    if here == size:
        return
    headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={here}-"} if here else {})}
    try:
        reply = requests.get(url, headers=headers, stream=True, timeout=timeout)
    except requests.RequestException as error:
        raise Cut("no answer") from error
    with reply:
        status, reason = reply.status_code, reply.reason or "no reason given"
        if status in PASSING:
            raise Cut(f"the server answered {status} {reason}")
        if status == 416:
            part.unlink(missing_ok=True)
            raise Cut("the server refused to resume")
        if status not in (200, 206):
            raise Unreachable(f"the server answered {status} {reason} for {url}")
        if status == 200:  # no Range was asked for, or the server ignores it
            here, length = 0, reply.headers.get("Content-Length")
            total = length if length and length.isdigit() else str(size)
        else:
            span, _, total = reply.headers.get("Content-Range", "").partition("/")
            if not span.startswith(f"bytes {here}-"):
                part.unlink(missing_ok=True)
                raise Cut("the server resumed at another place")
        if total not in (str(size), "*"):
            raise Unreachable(
                f"the server sends {total} bytes instead of {size} for {url}: "
                "that is not the official file"
            )
        bar.reset()
        bar.initial = bar.n = here
        with part.open("r+b" if here else "wb") as file:
            file.seek(here)
            chunks = reply.iter_content(CHUNK)
            while True:
                try:
                    chunk = next(chunks, b"")
                except (requests.RequestException, OSError) as error:
                    raise Cut("the connection was lost") from error
                if not chunk:
                    break
                here += len(chunk)
                if here > size:
                    break
                file.write(chunk)
                bar.update(len(chunk))
    if here > size:
        part.unlink(missing_ok=True)
        raise Unreachable(f"the server sends more than the {size} bytes of the official file")
    if here < size:
        raise Cut("the connection was closed")


def unpack(
    archive: Path,
    target: Path,
    *,
    suffixes: tuple[str, ...],
    marker: str,
    check: Callable[[Path], None],
) -> None:
    """Unpack a zip's one folder that holds `marker` (a file pattern) to `target`, whole or not.

    Only files with one of `suffixes` (lower case, "" for none) are taken. They are unpacked
    beside, their checksums proved, `check(folder)` is called (it may raise and may add files),
    and only then the folder gets its name. Refused: entries that point outside, links, an
    encrypted or damaged zip, more than a gigabyte.
    """
    work = target.with_name(target.name + ".part")
    try:
        shutil.rmtree(work, ignore_errors=True)  # left by a run that was killed
        with os_errors(f"unpack {archive}"):
            with reading(archive) as zipped:
                wanted = entries(zipped, archive, suffixes, marker)
                work.mkdir(parents=True)
                need_space(work, sum(e.file_size for e in wanted.values()))
                for name, entry in wanted.items():
                    out = work / name
                    out.parent.mkdir(parents=True, exist_ok=True)
                    with zipped.open(entry) as source, out.open("xb") as file:
                        shutil.copyfileobj(source, file, CHUNK)
            check(work)
            os.replace(work, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


class Bounded(io.FileIO):
    """A zip as a file of which no more than `MAX_DIRECTORY` bytes are read at a time.

    zipfile reads the whole list of entries at once, before anybody can count them.
    """

    def read(self, size: int = -1) -> bytes:
        if size > MAX_DIRECTORY:
            raise UserError(
                f"{self.name} lists far more entries than MAESTRO has: do not trust this zip, get "
                "it again from the official address"
            )
        return super().read(size)


@contextmanager
def reading(archive: Path) -> Iterator[zipfile.ZipFile]:
    """The zip, opened.

    A damaged one is one sentence, where zipfile raises a dozen kinds of error.
    """
    try:
        with Bounded(archive) as file, zipfile.ZipFile(file) as zipped:
            yield zipped
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise  # the disk, not the zip; without a number it is bzip2, EINVAL a wrong offset
        raise UserError(f"{archive} is a damaged zip: get it again") from error


def entries(
    zipped: zipfile.ZipFile, archive: Path, suffixes: tuple[str, ...], marker: str
) -> dict[str, zipfile.ZipInfo]:
    """The wanted entries, by their path inside the folder that holds `marker`."""
    infos = zipped.infolist()
    for info in infos:
        name = info.filename
        windows = PureWindowsPath(name)
        if name.startswith("/") or windows.drive or windows.root or ".." in windows.parts:
            raise UserError(
                f"{archive} has an entry that points outside ({name[:80]!r}): "
                "do not trust this zip, get it again from the official address"
            )
        if stat.S_ISLNK(info.external_attr >> 16):
            raise UserError(
                f"{archive} has a link in it ({name[:80]!r}): "
                "do not trust this zip, get it again from the official address"
            )
    files = {PurePosixPath(i.filename): i for i in infos if not i.is_dir()}
    tops = {p.parent for p in files if p.match(marker) and "__MACOSX" not in p.parts}
    if len(tops) != 1:
        raise UserError(
            f"{archive} has {'no' if not tops else 'more than one'} {marker} in it: "
            "give a zip in MAESTRO's layout"
        )
    top = tops.pop()
    wanted = {
        p.relative_to(top).as_posix(): i
        for p, i in files.items()
        if p.is_relative_to(top) and p.suffix.lower() in suffixes
    }
    size = sum(i.file_size for i in wanted.values())
    if size > MAX_UNPACKED:
        raise UserError(
            f"{archive} would unpack to {size / 1e9:.1f} GB, far more than MAESTRO's "
            "MIDI files: do not trust this zip"
        )
    if large := [
        p for p, i in wanted.items() if p.lower().endswith(TABLES) and i.file_size > MAX_TABLE
    ]:
        raise UserError(
            f"{archive} holds {large[0]} of {wanted[large[0]].file_size / 1e6:,.0f} MB, far more "
            "than MAESTRO's table: do not trust this zip"
        )
    return wanted
