"""Is it copied? The longest passage that a piece shares with the training pieces.

A piece is read as the sequence of its keys, in the order in which they are struck; the keys of a
chord, which no two pianists strike in one order, from low to high. A passage copied *exactly* is a
run of the same keys; one copied *transposed* a run of the same intervals. Unrelated real pieces
share passages too, by chance and by scales, trills and repeated notes: only what is longer than
theirs is suspicious.
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass

import numpy as np

from lib.env.errors import UserError

FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd: multiplication by it loses nothing modulo 2^64
CHORD = 0.03  # seconds
SHORTEST = 4  # notes; shorter passages are shared by all music


@dataclass(frozen=True)
class Passage:
    """The longest run that one query shares with the corpus."""

    notes: int  # its length in notes; 0 where not even four agree
    at: int = -1  # index of its first note in the query
    piece: int = -1  # which piece of the corpus has it
    there: int = -1  # index of its first note there


def keys(notes: np.ndarray) -> np.ndarray:
    """The keys of a piece in the order in which they are struck, int64 of shape (notes,).

    What follows within `CHORD` belongs to the same chord.
    """
    chord = np.concatenate([[0], np.cumsum(np.diff(notes["start"]) > CHORD)])[: len(notes)]
    return notes["pitch"][np.lexsort((notes["pitch"], chord))].astype(np.int64)


def longest_shared(
    queries: Sequence[np.ndarray],
    corpus: Sequence[np.ndarray],
    *,
    transposed: bool = False,
    groups: tuple[Sequence[int], Sequence[int]] | None = None,
) -> list[Passage]:
    """For each query (keys of one piece) its longest passage that is somewhere in the corpus.

    `groups` gives a number for each query and for each piece of the corpus: only pieces of another
    group count, so that real pieces can be compared with those of other composers.

    Runs of 4, 5, 6 … keys are compared by a hash. A run of k + 1 begins where a run of k does, so
    fewer places are left at every length. The passages found are then compared key by key.
    """
    if not len(corpus):
        raise UserError("there is nothing to compare with: give training pieces")
    step = 1 if transposed else 0  # a run of n intervals has n + 1 notes
    prepare = np.diff if transposed else np.asarray
    ours = [prepare(s) + 128 for s in queries]
    theirs = [prepare(s) + 128 for s in corpus]
    of_ours, of_theirs = groups or ([0] * len(ours), [1] * len(theirs))
    mine = _Runs(ours, of_ours)
    yours = _Runs(theirs, of_theirs)
    best = [Passage(0)] * len(queries)
    before = None
    for length in range(max(1, SHORTEST - step), 2 + max((len(s) for s in ours), default=0)):
        mine.grow(length)
        yours.grow(length)
        in_mine, in_yours = _shared(mine, yours)
        mine.only(in_mine)
        yours.only(in_yours)
        if before:  # queries that have no run of this length: their longest is one shorter
            for query, at, piece, there in _one_each(*before, without=mine):
                best[query] = Passage(length - 1 + step, at, piece, there)
        if not len(mine.start):
            break
        before = copy(mine), copy(yours)
    for query, passage in enumerate(best):
        if passage.notes:
            size = passage.notes - step
            here = ours[query][passage.at : passage.at + size]
            there = theirs[passage.piece][passage.there : passage.there + size]
            assert np.array_equal(here, there), "two different passages have one hash"
    return best


class _Runs:
    """All runs of one length in some sequences, as hashes; those that cannot matter are dropped."""

    def __init__(self, sequences, groups):
        numbers = [np.asarray(s, np.uint64) for s in sequences]
        self.numbers = np.concatenate([*numbers, np.zeros(1, np.uint64)])
        lengths = np.array([len(s) for s in sequences])
        self.offsets = np.cumsum(lengths) - lengths
        self.start = np.arange(lengths.sum())  # where a run begins in `numbers`
        self.piece = np.repeat(np.arange(len(lengths)), lengths)
        self.end = np.repeat(self.offsets + lengths, lengths)  # of its piece
        self.group = np.repeat(np.asarray(groups, np.uint64), lengths)
        self.hash = np.zeros(len(self.start), np.uint64)
        self.length = 0  # of the runs that `hash` stands for

    def only(self, good):
        """Drop the runs that the mask does not name."""
        for name in ("start", "piece", "end", "group", "hash"):
            setattr(self, name, getattr(self, name)[good])

    def grow(self, length):
        """Make every run longer, to `length`; those that would leave their piece are dropped."""
        self.only(self.start + length <= self.end)
        for size in range(self.length, length):
            mixed = (self.hash + self.numbers[self.start + size]) * FACTOR
            self.hash = mixed ^ (mixed >> np.uint64(29))
        self.length = length


def _shared(mine, yours):
    """Which of my runs are among yours in another group,
    and which of yours among mine, as two masks.
    """
    table = np.zeros(1 << 22, bool)  # most of yours are none of mine: this says so quickly
    bits = np.uint64((1 << 22) - 1)
    table[mine.hash & bits] = True
    maybe = np.flatnonzero(table[yours.hash & bits])
    hashes = np.unique(mine.hash)
    place = np.minimum(np.searchsorted(hashes, yours.hash[maybe]), len(hashes) - 1)
    real = hashes[place] == yours.hash[maybe] if len(hashes) else np.zeros(0, bool)
    maybe = maybe[real]
    place = place[real]
    # for each hash, does it occur in one group only, and in which?
    low = np.full(len(hashes), np.iinfo(np.int64).max)
    high = np.full(len(hashes), -1)
    group = yours.group[maybe].astype(np.int64)
    np.minimum.at(low, place, group)
    np.maximum.at(high, place, group)
    where = np.searchsorted(hashes, mine.hash)
    own = mine.group.astype(np.int64)
    keep_mine = (high[where] >= 0) & ~((low[where] == own) & (high[where] == own))
    kept = np.isin(hashes, mine.hash[keep_mine])
    keep_yours = np.zeros(len(yours.hash), bool)
    keep_yours[maybe[kept[place]]] = True
    return keep_mine, keep_yours


def _one_each(mine, yours, without):
    """One shared run of each query that has none in `without`:
    (query, place in it, piece, place there).
    """
    gone = np.setdiff1d(mine.piece, without.piece)
    order = np.argsort(yours.hash, kind="stable") if len(gone) else []
    ranked = yours.hash[order]
    for query in gone:
        for i in np.flatnonzero(mine.piece == query):
            first = np.searchsorted(ranked, mine.hash[i])
            last = np.searchsorted(ranked, mine.hash[i], "right")
            same = order[first:last]
            other = same[yours.group[same] != mine.group[i]]
            if len(other):
                j = other[0]
                piece = yours.piece[j]
                at = mine.start[i] - mine.offsets[query]
                there = yours.start[j] - yours.offsets[piece]
                yield int(query), int(at), int(piece), int(there)
                break


def longest_repeat(sequence: np.ndarray) -> int:
    """Notes of the longest run of keys that comes twice in one piece without overlap."""
    best = 0
    for lag in range(1, len(sequence)):
        if len(sequence) - lag <= best:
            break
        same = np.concatenate([[False], sequence[lag:] == sequence[:-lag], [False]])
        edges = np.flatnonzero(same[1:] != same[:-1])
        if len(edges):
            best = max(best, min(lag, int((edges[1::2] - edges[::2]).max())))
    return best
