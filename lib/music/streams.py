"""Token streams: each performance as one contiguous run of uint16 tokens in one file.

Reading them needs numpy alone, so that streams can be carried to a machine with a GPU and no
music library. Building them (`build`, `python -m lib.music encode`) needs MidiTok.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lib.env.errors import UserError

TOKENS, INDEX = "tokens.npy", "index.json"


@dataclass(frozen=True)
class Piece:
    """One copy of one performance inside the stream."""

    name: str  # file name
    composer: str
    title: str
    split: str  # "train", "validation" or "test": MAESTRO's own
    copy: int  # 0: as played; 1, 2, …: augmented
    offset: int  # of its first token (BOS) in the stream
    length: int  # in tokens, BOS and EOS included
    notes: int
    seconds: float


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

    def stream(self, piece: Piece) -> np.ndarray:
        """Tokens of one piece, uint16 of shape (length,): BOS … EOS."""
        return self.tokens[piece.offset : piece.offset + piece.length]

    @classmethod
    def load(cls, folder: str | Path) -> "Streams":
        """Open what `build` wrote. Raises `UserError` when it is missing or damaged."""
        folder = Path(folder)
        try:
            index = json.loads((folder / INDEX).read_text())
            tokens = np.load(folder / TOKENS, mmap_mode="r", allow_pickle=False)
            pieces = [Piece(**p) for p in index["pieces"]]
            if tokens.dtype != np.uint16 or tokens.shape != (sum(p.length for p in pieces),):
                raise ValueError("size")
            return cls(tokens, pieces, index["vocab_size"], index["bos"], index["settings"], folder)
        except FileNotFoundError as error:
            raise UserError(f"no token streams in {folder}: run python -m lib.music encode") from error
        except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"the token streams in {folder} are damaged: delete that folder and run "
                            "python -m lib.music encode") from error
