"""Safetensors files, whatever they are called.

They are opened after a look at what they are, and written whole or not at all. A file is called
damaged only where its content is: what the system refuses keeps the system's reason.
"""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from lib.env.errors import Damaged, UserError, os_errors
from lib.env.files import atomic_write, check_regular

MOST_HEADER = 16 << 20  # bytes; a model of 64 layers takes 80 kB
MOST_TENSORS = 20_000


@contextmanager
def open_tensors(path: str | Path, *, do: str, device: str = "cpu") -> Iterator:
    """A safetensors file, open, as `safetensors.safe_open` gives it.

    It has `keys`, `metadata`, `get_slice` and `get_tensor`. Raises `UserError`, and `Damaged` where
    it is no whole safetensors file, which says what to `do`.
    """
    from safetensors import SafetensorError, safe_open

    check_regular(path)
    check_header(path, do=do)
    with os_errors(f"read {path}"), _in_utf8(path) as name:
        try:
            with safe_open(name, "pt", device=device) as file:
                if any(
                    max(file.get_slice(name).get_shape(), default=0) >= 2**63
                    for name in file.keys()
                ):
                    raise Damaged(
                        f"{path} is damaged (it has a tensor larger than any memory): {do}"
                    )
                yield file
        except SafetensorError as error:
            raise Damaged(
                f"{path} is damaged (it is no safetensors file, or an incomplete one): {do}"
            ) from error


def load_tensors(path: str | Path, *, do: str) -> dict:
    """Every tensor of a file by its name. Raises what `open_tensors` does."""
    with open_tensors(path, do=do) as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def save_tensors(
    tensors: Mapping, path: str | Path, notes: Mapping[str, str] | None = None
) -> None:
    """Write tensors and `notes`, whole or not at all. Raises `UserError` (a full disk)."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_write(path) as part:
        try:
            save_file(kept, part, metadata={"format": "pt", **(notes or {})})
        except SafetensorError as error:
            # Rust's words for what the system said
            number = re.search(r"os error (\d+)", str(error))
            raise (
                OSError(int(number[1]), os.strerror(int(number[1]))) if number else error
            ) from error


def check_header(path: str | Path, *, do: str) -> None:
    """Refuse a file that lists more tensors than any model has, before it is opened.

    Raises `UserError`. A million empty tensors would take a minute and gigabytes.
    """
    with os_errors(f"read {path}"), open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        count = file.read(size).count(b'"data_offsets"') if size <= MOST_HEADER else None
    if not size:
        raise Damaged(f"{path} is damaged (it has no header): {do}")
    if count is None:
        raise Damaged(
            f"{path} is damaged (its header takes {size / 1e6:,.0f} MB, "
            f"and no such file's is so large): {do}"
        )
    if count > MOST_TENSORS:
        raise Damaged(
            f"{path} is damaged (it lists {count:,} tensors, and no model has so many): {do}"
        )


@contextmanager
def _in_utf8(path: str | Path) -> Iterator[str]:
    """A UTF-8 name for the file, as safetensors takes no other.

    On Linux a path need not be UTF-8.
    """
    name = os.fspath(path)
    if name == name.encode(errors="replace").decode():
        yield name
        return
    if not os.path.isdir("/dev/fd"):
        raise UserError(
            f"{path} has a name that is no UTF-8, and this system has no other for it: rename it"
        )
    with open(path, "rb") as file:
        yield f"/dev/fd/{file.fileno()}"
