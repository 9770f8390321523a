"""What a training step reads: crops of token streams, and which rows begin with an empty state.

A row reads on in its piece from step to step, so that the state it carries is worth something, and
jumps to another piece now and then. Transposition is drawn at each jump, on base tokens.
"""

import hashlib
from pathlib import Path

import numpy as np

from lib.env.errors import UserError
from lib.music.streams import Piece, Streams, read_index
from lib.music.token_names import kind_of
from lib.music.tokens import Tokenizer
from lib.train.config import TrainConfig


class Batches:
    """Batches of crops, each row reading on in its piece for `carry` crops, then jumping.

    `next()` gives tokens of shape (B, L+1), with -1 behind a piece's end, and the rows that
    jumped, whose state must be emptied: all of them at every step where `carry` is 1.
    `position` and `load` make it resumable.
    """

    def __init__(self, streams: Streams, pieces: list[Piece], config: TrainConfig):
        if not pieces:
            raise UserError(
                "there is no training piece in these streams: build them from the train split"
            )
        self.streams = streams
        self.pieces = pieces
        self.config = config
        self.changes = Changes(streams) if config.transpose or config.louder else None
        self.rng = np.random.default_rng(config.seed)
        weights = np.array([p.length for p in pieces], float)
        self.weights = weights / weights.sum()  # a long piece is met more often: each token equally
        # rows jump at different times, so that no step sees only fresh states
        self.rows = [[0, 0, 0] for _ in range(config.batch)]  # piece, next token, crops left
        self.drawn = [[0, 0] for _ in range(config.batch)]  # semitones up, loudness levels up
        self.first = True

    def next(self) -> tuple[np.ndarray, np.ndarray]:
        """The next batch: tokens, int64 (B, L + 1), and which rows jumped, bool (B,)."""
        length = self.config.length
        tokens = np.full((len(self.rows), length + 1), -1, np.int64)
        jumped = np.zeros(len(self.rows), bool)
        for i, (piece, at, left) in enumerate(self.rows):
            if left == 0 or at >= self.pieces[piece].length - 1:
                jumped[i] = True
                self._jump(i)
            part = self._read(i)
            tokens[i, : len(part)] = part
        self.first = False
        return tokens, jumped

    def _jump(self, row: int) -> None:
        """Draw where a row goes on: the piece, the place in it, for how long, how it is changed."""
        number = int(self.rng.choice(len(self.pieces), p=self.weights))
        piece = self.pieces[number]
        # a fifth of the visits begin at the beginning: openings are what a listener meets first
        room = max(1, piece.length - self.config.length)
        at = 0 if self.rng.random() < 0.2 else int(self.rng.integers(room))
        left = self.config.carry
        if self.first:
            left = int(self.rng.integers(1, left + 1))
        self.rows[row] = [number, at, left]
        if self.changes:
            self.drawn[row] = self.changes.draw(self.rng, piece, self.config)

    def _read(self, row: int) -> np.ndarray:
        """The next crop of a row, (up to L + 1,), and one step on."""
        number, at, left = self.rows[row]
        length = self.config.length
        part = self.streams.stream(self.pieces[number])[at : at + length + 1]
        if part.max() >= self.streams.vocab_size:
            raise UserError(
                "the token streams changed while they were read, or are damaged: "
                "delete their folder, build them again and go on with --resume"
            )
        self.rows[row] = [number, at + length, left - 1]
        if self.changes:
            part = self.changes.apply(part, *self.drawn[row])
        return part

    def position(self) -> dict:
        """All that the next batches depend on, as JSON."""
        random = self.rng.bit_generator.state
        return {"rows": self.rows, "drawn": self.drawn, "first": self.first, "rng": random}

    def load(self, position: dict) -> None:
        """Go on from what `position` gave.

        Raises `UserError` where that was on other pieces or another batch.
        """
        self.rows = [list(row) for row in position["rows"]]
        self.first = position["first"]
        unchanged = [[0, 0]] * len(self.rows)  # the course's first version knew no changes
        self.drawn = [list(pair) for pair in position.get("drawn", unchanged)]
        batch = self.config.batch
        fits = len(self.rows) == batch and len(self.drawn) == batch
        if not fits or max(number for number, _, _ in self.rows) >= len(self.pieces):
            raise UserError(
                "the checkpoint is not one of this run (crops are of other pieces or of "
                "another batch): choose another --out"
            )
        self.rng.bit_generator.state = position["rng"]


class Changes:
    """Transposition and loudness on base tokens: a table a change, so that it costs nothing.

    A byte-pair token can hold several pitches, and its transposition need not be a token: there
    the copies that `lib.music.encode.build` makes before merging do the same work.
    """

    def __init__(self, streams: Streams):
        names = base_names(streams)
        kinds = [kind_of(name) for name in names]
        self.pitches = [i for i, kind in enumerate(kinds) if kind == "Pitch"]
        self.velocities = [i for i, kind in enumerate(kinds) if kind == "Velocity"]
        self.size = len(names)
        self.streams = streams
        self.range: dict[int, tuple[int, int]] = {}  # lowest, highest pitch of a piece, by offset
        if not self.pitches or not (in_a_row(self.pitches) and in_a_row(self.velocities)):
            raise UserError(
                "these tokens have no row of pitches that could be shifted: leave --transpose out"
            )

    def draw(self, rng: np.random.Generator, piece: Piece, config: TrainConfig) -> list[int]:
        """Semitones and loudness levels, such that no note of the piece leaves the keyboard."""
        low, high = self._reach(piece)
        down = min(config.transpose, low - self.pitches[0])
        up = min(config.transpose, self.pitches[-1] - high)
        semitones = int(rng.integers(-down, up + 1))
        levels = int(rng.integers(-config.louder, config.louder + 1))
        return [semitones, levels]

    def _reach(self, piece: Piece) -> tuple[int, int]:
        """The tokens of its lowest and its highest pitch; looked up once."""
        if piece.offset not in self.range:
            ids = self.streams.stream(piece)
            ids = ids[(ids >= self.pitches[0]) & (ids <= self.pitches[-1])]
            low = int(ids.min()) if len(ids) else self.pitches[0]
            high = int(ids.max()) if len(ids) else self.pitches[0]
            self.range[piece.offset] = (low, high)
        return self.range[piece.offset]

    def apply(self, tokens: np.ndarray, semitones: int, levels: int) -> np.ndarray:
        """The tokens (L,) with every pitch and every loudness shifted, up to both ends."""
        table = np.arange(self.size)
        for ids, shift in ((self.pitches, semitones), (self.velocities, levels)):
            if ids:
                table[ids] = np.clip(table[ids] + shift, ids[0], ids[-1])
        return table[tokens]


def in_a_row(ids: list[int]) -> bool:
    """Whether token numbers follow one another without a gap."""
    return bool((np.diff(ids) == 1).all())


def base_names(streams: Streams) -> list[str]:
    """The name of each token, for streams without byte-pair merges."""
    if streams.folder is None:
        raise UserError(
            "--transpose and --louder need the names of the tokens: "
            "give streams that lie in a folder"
        )
    names = read_index(Path(streams.folder)).names
    if names is None:  # streams of the course's first version: ask MidiTok
        names = [" ".join(piece) for piece in Tokenizer.load(streams.folder).pieces]
    if any(" " in name for name in names):
        raise UserError(
            "--transpose and --louder shift base tokens, and these streams have "
            "byte-pair merges: build them with python -m lib.music encode "
            "--vocab-size 0, or train on their augmented copies"
        )
    return names


def validation_pieces(streams: Streams, tokens: int) -> list[Piece]:
    """A fixed, spread-out handful of whole validation pieces of about so many tokens.

    Where the streams have no validation split, it is their first training piece.
    """
    pieces = streams.select("validation") or streams.select("train")[:1]
    chosen = []
    total = 0
    for piece in np.random.default_rng(7).permutation(np.array(pieces, object)):
        if not chosen or total + piece.length <= tokens:
            chosen.append(piece)
            total += piece.length
    return chosen


def content(streams: Streams) -> str:
    """A hash of every token: the settings of two streams can agree where their files do not."""
    return hashlib.sha256(np.ascontiguousarray(streams.tokens)).hexdigest()[:16]
