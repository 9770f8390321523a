"""Large files in parts that can be carried: the streams on their way there,
the results on their way back.
"""

import hashlib
import io
import json
import lzma
import shutil
import tarfile
from pathlib import Path

from lib.env.errors import UserError
from lib.env.files import atomic_write, write_json

LIST = "streams.json"  # beside the first part: how many parts there are, and their checksum
MOST_FILES, LARGEST = 8, 16 * 2**20  # of what is carried back


def cut(streams: Path, folder: Path, size: int) -> int:
    """Compress a folder of streams into parts of at most `size` bytes, folder/in1, in2, …;
    returns how many.
    """
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:xz", preset=6) as tar:
        for name in ("index.json", "tokens.npy"):
            tar.add(streams / name, name)
    data = packed.getvalue()
    count = -(-len(data) // size)
    for number in range(count):
        with atomic_write(folder / f"in{number + 1}" / f"streams.{number + 1}") as part:
            part.write_bytes(data[number * size : (number + 1) * size])
    facts = {"parts": count, "sha256": hashlib.sha256(data).hexdigest()}
    write_json(folder / "in1" / LIST, facts)
    return count


def _paths(folder: Path) -> list[Path]:
    listed = folder / "in1" / LIST
    if not listed.exists():
        return []
    count = json.loads(listed.read_text(encoding="utf-8"))["parts"]
    return [folder / f"in{n}" / f"streams.{n}" for n in range(1, count + 1)]


def complete(folder: Path) -> bool:
    """Whether all parts of the streams are here."""
    paths = _paths(folder)
    return bool(paths) and all(path.exists() for path in paths)


def join(folder: Path, streams: Path) -> None:
    """Put the parts together again. Raises `UserError` where they are not what was cut."""
    data = b"".join(path.read_bytes() for path in _paths(folder))
    listed = json.loads((folder / "in1" / LIST).read_text(encoding="utf-8"))
    if hashlib.sha256(data).hexdigest() != listed["sha256"]:
        raise UserError(
            f"the parts of the streams in {folder} do not belong together: pack them again"
        )
    part = streams.with_name(".streams.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:xz") as tar:
            tar.extractall(part, filter="data")
    except (tarfile.TarError, lzma.LZMAError, EOFError) as error:
        raise UserError(
            f"the parts of the streams in {folder} are damaged: pack them again"
        ) from error
    shutil.rmtree(streams, ignore_errors=True)
    part.rename(streams)


def collect(hour) -> None:
    """Everything that is carried back, anew: results and logs in one file,
    the flagship's best weights in parts.

    Weights come back as float16.
    What would take more than eight files of 16 MiB stays behind, and is said.
    """
    shutil.rmtree(hour.out, ignore_errors=True)
    hour.out.mkdir(parents=True)
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:xz") as tar:
        for name in ("results", "logs", "flagship/log.csv"):
            if (hour.work / name).exists():
                tar.add(hour.work / name, name)
    _lay(hour.out, "results.tar.xz", packed.getvalue(), 2)
    weights = hour.work / "flagship_half.tar"
    if weights.exists():
        _lay(hour.out, "flagship.tar", weights.read_bytes(), MOST_FILES - 2)


def _lay(out: Path, name: str, data: bytes, most: int) -> None:
    """A file in at most so many parts; `cat NAME.*` makes it whole."""
    count = max(1, -(-len(data) // LARGEST))
    if count > most:
        (out / f"{name}.left_behind.txt").write_text(f"{name} has {len(data):,} bytes: too many\n")
        return
    for number in range(count):
        (out / f"{name}.{number + 1}").write_bytes(data[number * LARGEST : (number + 1) * LARGEST])
