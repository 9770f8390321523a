"""A stranger's file is held against a schema before it is used.

The first fact that is wrong is one sentence. A schema is a type: a dataclass, or a `TypedDict`,
whose annotations say what each fact may be. pydantic checks it, strictly: no text is taken for a
number, no 1.5 for a count, no NaN where a limit is set.
"""

import functools
import reprlib
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import FailFast, Field, TypeAdapter, ValidationError

from lib.env.errors import Damaged, UserError, os_errors
from lib.env.files import check_regular

T = TypeVar("T")
Count = Annotated[int, Field(ge=0, le=2**53)]
Amount = Annotated[float, Field(ge=0, le=1e15)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Few = [FailFast(), Field(max_length=1_000_000)]  # for lists: Annotated[list[Count], *Few]

# in bytes; the index of MAESTRO's streams with ten copies of each piece takes 4 MB
MOST_JSON = 32 << 20


def read_json(path: str | Path, schema: type[T], *, do: str) -> T:
    """What a JSON file holds, as `schema` wants it.

    Raises `UserError`, and `Damaged` where it is not so, which names the file,
    the fact and what is wrong with it, and says what to `do`.
    """
    path = Path(path)
    size = check_regular(path).st_size
    if size > MOST_JSON:
        raise Damaged(
            f"{path} is damaged (it has {size / 1e6:,.0f} MB, and no such file is so large): {do}"
        )
    with os_errors(f"read {path}"):
        text = path.read_bytes()
    return parse(text, schema, where=str(path), do=do)


def parse(text: str | bytes, schema: type[T], *, where: str, do: str) -> T:
    """JSON as `schema` wants it. Raises `Damaged` as `read_json` does."""
    try:
        return check(text, schema)
    except ValueError as error:
        raise Damaged(f"{where} is damaged ({error}): {do}") from error


def check(text: str | bytes, schema: type[T]) -> T:
    """JSON as `schema` wants it. Raises ValueError, which names the first fact that is wrong."""
    try:
        return _adapter(schema).validate_json(text, strict=True)
    except ValidationError as error:
        raise ValueError(_first(error)) from error
    except UserError as error:  # a dataclass looks at its facts itself
        raise ValueError(str(error)) from error


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
    return (
        f"{place} is {reprlib.repr(fault['input'])[:80]}, but {fault['msg'].removeprefix('Input ')}"
    )
