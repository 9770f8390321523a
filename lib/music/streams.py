"""Token streams: each performance as one contiguous run of uint16 tokens in one file.

Reading them needs numpy and pydantic alone, so that streams can be carried to a machine with a GPU
and no music library. Building them (`build`, `python -m lib.music encode`) needs MidiTok.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from lib.env.errors import UserError
from lib.env.schema import Amount, Count, Few, read_json

TOKENS, INDEX = "tokens.npy", "index.json"
AGAIN = "delete that folder and run python -m lib.music encode"


@dataclass(frozen=True)
class Piece:
    """One copy of one performance inside the stream."""

    name: str  # file name
    composer: str
    title: str
    split: Literal["train", "validation", "test"]  # MAESTRO's own
    copy: Count  # 0: as played; 1, 2, …: augmented
    offset: Count  # of its first token (BOS) in the stream
    length: Annotated[int, Field(ge=2, le=2**40)]  # in tokens, BOS and EOS included
    notes: Annotated[int, Field(ge=1, le=2**40)]
    seconds: Amount


@dataclass(frozen=True)
class Index:
    """What index.json says."""

    pieces: Annotated[list[Piece], *Few]
    vocab_size: Annotated[int, Field(ge=3, le=2**16)]  # tokens are uint16
    bos: Count
    settings: dict
    # what each token is called; streams of the course's first version do not say
    names: Annotated[list[str], Field(max_length=2**16)] | None = None


@dataclass(frozen=True)
class Streams:
    """All token streams of a data set: `tokens` is uint16 of shape (total,), memory-mapped."""

    tokens: np.ndarray
    pieces: list[Piece]
    vocab_size: int
    bos: int
    settings: dict = field(default_factory=dict)
    folder: Path | None = None

    def select(self, split: str, *, copies: bool = False) -> list[Piece]:
        """The pieces of a split, with augmented copies only where asked for."""
        return [p for p in self.pieces if p.split == split and (copies or p.copy == 0)]

    def tokens_a_note(self, *, copies: bool = False) -> float:
        """Of the train split: how many tokens it takes to write a note down, on average."""
        train = self.select("train", copies=copies)
        return sum(piece.length for piece in train) / sum(piece.notes for piece in train)

    def stream(self, piece: Piece) -> np.ndarray:
        """Tokens of one piece, uint16 of shape (length,): BOS … EOS."""
        return self.tokens[piece.offset : piece.offset + piece.length]

    @classmethod
    def load(cls, folder: str | Path) -> "Streams":
        """Open what `build` wrote. Raises `UserError` when it is missing or damaged."""
        folder = Path(folder)
        if not (folder / INDEX).is_file() or not (folder / TOKENS).is_file():
            raise UserError(f"no token streams in {folder}: run python -m lib.music encode")
        index = read_index(folder)
        tokens = _open(folder / TOKENS)
        offset = 0
        for piece in index.pieces:
            if piece.offset != offset:
                raise _damaged(
                    folder / INDEX, f"{piece.name} begins at {piece.offset}, but should at {offset}"
                )
            offset += piece.length
        if offset != len(tokens):
            raise _damaged(
                folder / TOKENS, f"it holds {len(tokens):,} tokens, but {INDEX} lists {offset:,}"
            )
        if max(index.bos, int(tokens.max(initial=0))) >= index.vocab_size:
            raise _damaged(
                folder, f"there are tokens beyond its vocabulary of {index.vocab_size:,}"
            )
        return cls(tokens, index.pieces, index.vocab_size, index.bos, index.settings, folder)


def read_index(folder: Path) -> Index:
    """What the streams in a folder say of themselves.

    Raises `UserError` where that makes no sense.
    """
    index = read_json(folder / INDEX, Index, do=AGAIN)
    if index.names is not None and len(index.names) != index.vocab_size:
        raise _damaged(folder / INDEX, f"it names {len(index.names)} of {index.vocab_size} tokens")
    return index


def _open(path: Path) -> np.ndarray:
    """The tokens in a file, mapped into memory."""
    try:
        tokens = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:
        # numpy has the header read by Python's own parser, with all its errors
        raise _damaged(path, "it is no array of numpy's, or an incomplete one") from error
    if tokens.dtype != np.uint16 or tokens.ndim != 1:
        raise _damaged(path, "it holds no row of uint16 tokens")
    return tokens


def _damaged(path: Path, why: str) -> UserError:
    return UserError(f"{path} is damaged ({why}): {AGAIN}")
