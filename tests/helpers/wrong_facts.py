"""Files with one fact changed: each fact of a JSON text, each tensor of a safetensors file,
each cell of a table.
"""

import copy
import json
import math
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path

import torch

GONE = object()
RENAMED = object()
DEEP = "\x00deep\x00"  # stands for a list in a list in a list …, deeper than a parser's stack
WRONG = [
    GONE,
    RENAMED,
    None,
    "x",
    "",
    [],
    [1],
    {},
    True,
    -1,
    0,
    1.5,
    10**10,
    10**30,
    math.nan,
    math.inf,
    -math.inf,
    DEEP,
]


def texts(value) -> Iterator[tuple[str, str]]:
    """(what was changed, the JSON text) for every fact in `value` and everything that it is not;
    `value` itself too.
    """
    for path in _paths(value):
        for wrong in WRONG:
            needs = {GONE: int | str, RENAMED: str}.get(wrong if isinstance(wrong, Hashable) else 0)
            if needs is None or path and isinstance(path[-1], needs):
                name = ".".join(map(str, path)) or "everything"
                said = {GONE: "gone", RENAMED: "renamed", DEEP: "deep"}.get(
                    wrong if isinstance(wrong, Hashable) else 0
                )
                yield f"{name}: {said or repr(wrong)}", _written(_changed(value, path, wrong))


def _paths(value, path=()) -> Iterator[tuple]:
    """The way to every fact; of a list, and of a table of hundreds, to the first and the last."""
    yield path
    if isinstance(value, dict):
        for key in value if len(value) < 100 else [min(value), max(value)]:
            yield from _paths(value[key], (*path, key))
    elif isinstance(value, list):
        for index in sorted({0, len(value) - 1} & set(range(len(value)))):
            yield from _paths(value[index], (*path, index))


def _changed(value, path: tuple, wrong):
    if not path:
        return wrong
    out = copy.deepcopy(value)
    inside = out
    for key in path[:-1]:
        inside = inside[key]
    if wrong is RENAMED:
        inside[f"{path[-1]}_"] = inside.pop(path[-1])
    elif wrong is GONE:
        del inside[path[-1]]
    else:
        inside[path[-1]] = wrong
    return out


def _written(value) -> str:
    return json.dumps(value).replace(json.dumps(DEEP), "[" * 100_000 + "]" * 100_000)


TENSORS: dict[str, Callable[[torch.Tensor], torch.Tensor | None]] = {
    "gone": lambda t: None,
    "a single number": lambda t: torch.zeros((), dtype=t.dtype),
    "empty": lambda t: t.new_zeros(0),
    "no row": lambda t: t.new_zeros((0, *t.shape[1:])),
    "a row more": lambda t: torch.zeros(
        (2 + t.shape[0] if t.dim() else 2, *t.shape[1:]), dtype=t.dtype
    ),
    "a dimension more": lambda t: t[None].clone(),
    "whole numbers": lambda t: t.to(torch.int32),
    "half precision": lambda t: t.to(torch.float16),
    "complex": lambda t: t.to(torch.complex64),
    "no numbers": lambda t: torch.full(t.shape, math.nan),
    "infinite": lambda t: torch.full(t.shape, math.inf),
    "huge": lambda t: torch.full(t.shape, 2**62, dtype=torch.int64),
}


def opened(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()


def spoilt(
    tensors: dict[str, torch.Tensor], name: str
) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """(what was changed, all tensors) with the one of that name changed in every way."""
    for what, change in TENSORS.items():
        other = {k: v for k, v in tensors.items() if k != name}
        if (changed := change(tensors[name])) is not None:
            other[name] = changed.contiguous()
        yield f"{name}: {what}", other
    yield f"one more beside {name}", tensors | {f"{name}.more": torch.zeros(3)}


def headers(data: bytes) -> Iterator[tuple[str, bytes]]:
    """(what was changed, bytes) of a safetensors file whose header is another than its tensors."""

    def told(header, size=None):
        text = json.dumps(header).encode() if isinstance(header, dict) else header
        return (len(text) if size is None else size).to_bytes(8, "little") + text

    one = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    yield "a header of 2^63 bytes", told({}, 2**63) + data
    yield "a header of 90 MB that is not there", told({}, 90_000_000)
    yield "a header of nothing", told({}, 0)
    yield "no object", told(b"[]")
    yield "a deep header", told(b"[" * 100_000)
    yield "no data behind", told({"x": one | {"shape": [10**9], "data_offsets": [0, 4 * 10**9]}})
    yield (
        "a shape that overflows",
        told({"x": one | {"shape": [2**32, 2**32], "data_offsets": [0, 0]}}),
    )
    yield "a negative shape", told({"x": one | {"shape": [-1]}})
    yield "a type of its own", told({"x": one | {"dtype": "Q7"}})
    yield (
        "a million empty tensors",
        told(
            b'{"a":'
            + b",".join(
                b'{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
                if not i
                else b'"t%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i
                for i in range(1_000_000)
            )
            + b"}"
        ),
    )
    yield "fifty thousand empty tensors", told({f"t{i}": one for i in range(50_000)})
    yield "half of it", data[: len(data) // 2]
    yield "all but a byte", data[:-1]
    yield "empty", b""
    yield "seven bytes", data[:7]
    yield "noise", b"\x01" * 300
