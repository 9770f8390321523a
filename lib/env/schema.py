"""A stranger's file is held against a schema before it is used: the first fact that is wrong is one sentence.

A schema is a type: a dataclass, or a `TypedDict`, whose annotations say what each fact may be. pydantic
checks it, strictly: no text is taken for a number, no 1.5 for a count, no NaN where a limit is set.
"""

import functools
import reprlib
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import FailFast, Field, TypeAdapter, ValidationError

from lib.env.errors import UserError, os_errors

T = TypeVar("T")
Count = Annotated[int, Field(ge=0, le=2**53)]
Amount = Annotated[float, Field(ge=0, le=1e15)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Few = [FailFast(), Field(max_length=1_000_000)]  # for lists: Annotated[list[Count], *Few]

MOST_JSON = 32 << 20  # bytes; the index of MAESTRO's streams with ten copies of each piece takes 4 MB
MOST_HEADER = 16 << 20  # bytes of a safetensors header; a model of 64 layers takes 80 kB
MOST_TENSORS = 20_000


def read_json(path: str | Path, schema: type[T], *, do: str) -> T:
    """What a JSON file holds, as `schema` wants it.

    Raises `UserError`, which names the file, the fact and what is wrong with it, and says what to `do`.
    """
    path = Path(path)
    with os_errors(f"read {path}"):
        size = path.stat().st_size
        if size > MOST_JSON:
            raise UserError(f"{path} is damaged (it has {size / 1e6:,.0f} MB, and no such file is so large): {do}")
        text = path.read_bytes()
    return parse(text, schema, where=str(path), do=do)


def parse(text: str | bytes, schema: type[T], *, where: str, do: str) -> T:
    """JSON as `schema` wants it. Raises `UserError` as `read_json` does."""
    try:
        return check(text, schema)
    except ValueError as error:
        raise UserError(f"{where} is damaged ({error}): {do}") from error


def check(text: str | bytes, schema: type[T]) -> T:
    """JSON as `schema` wants it. Raises ValueError, which names the first fact that is wrong."""
    try:
        return _adapter(schema).validate_json(text, strict=True)
    except ValidationError as error:
        raise ValueError(_first(error)) from error


@functools.cache
def _adapter(schema: type) -> TypeAdapter:
    return TypeAdapter(schema)


def _first(error: ValidationError) -> str:
    """The first fault in words."""
    fault: Any = error.errors(include_url=False, include_context=False)[0]
    place = ".".join(str(part) for part in fault["loc"])[:80] or "its content"
    if fault["type"] == "json_invalid":
        return fault["msg"].replace("Invalid JSON", "its JSON is invalid")
    if fault["type"] == "missing":
        return f"{place} is missing"
    return f"{place} is {reprlib.repr(fault['input'])[:80]}, but {fault['msg'].removeprefix('Input ')}"


def check_tensors(path: str | Path, *, do: str) -> None:
    """Refuse a safetensors file that lists more tensors than any model has, before it is opened.

    Raises `UserError`. A million empty tensors would take a minute and gigabytes.
    """
    with os_errors(f"read {path}"), open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        count = file.read(size).count(b'"data_offsets"') if size <= MOST_HEADER else None
    if count is None:
        raise UserError(f"{path} is damaged (its header takes {size / 1e6:,.0f} MB, and no such file's is so "
                        f"large): {do}")
    if count > MOST_TENSORS:
        raise UserError(f"{path} is damaged (it lists {count:,} tensors, and no model has so many): {do}")
