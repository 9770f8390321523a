"""Is it copied, though some notes differ?

The passage that a piece shares with training pieces, weighed by surprise.

Both are read as keys in the order in which they are struck (`memorisation.keys`), at any
transposition. Their best local alignment (Smith and Waterman 1981) is sought: a note that agrees
earns its surprise in bits, what a model of short contexts, counted on the training pieces, did not
expect of it; a note that was changed, left out or put in costs `EDIT` bits. So a trill, a scale or
a repeated note is worth little a note, and one wrong note does not end a passage.

Aligning everything with everything would take too long. Only where a few notes on end agree exactly
is an alignment begun (as in Altschul et al. 1990, BLAST).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lib.env.errors import UserError
from lib.lab.rivals.ngram import NGram

EDIT = 6.0  # bits that a note which differs costs
SEED = 6  # intervals on end that must agree for an alignment to begin there
LEAP = 24  # semitones; wider intervals count as this
ORDER = 4  # of the model of surprise: an interval after the three before it
COMMON = 3000  # places of a seed in the corpus from which on it says nothing
CANDIDATES = 40  # alignments tried for each query, those with most agreeing seeds first
BAND = 32  # notes that an alignment may wander from where its seeds lie
FACTOR = np.uint64(2 * LEAP + 1)


@dataclass(frozen=True)
class Shared:
    """The most surprising passage that one query shares with the corpus."""

    bits: float = 0.0  # surprise of the notes that agree, less the edits
    notes: int = 0  # that agree
    edits: int = 0  # notes changed, left out or put in
    at: int = -1  # index of its first note in the query
    length: int = 0  # notes of the query from its first to its last
    piece: int = -1  # which piece of the corpus has it
    there: int = -1  # index of its first note there
    transposed: int = 0  # semitones that the corpus lies above the query


class Corpus:
    """Training pieces, each its keys in order, ready to be searched."""

    def __init__(self, pieces: Sequence[np.ndarray]):
        if not len(pieces):
            raise UserError("there is nothing to compare with: give training pieces")
        self.pieces = list(pieces)
        self.model = NGram(ORDER, 2 * LEAP + 1).fit(
            [intervals(keys) for keys in pieces if len(keys) > 1]
        )
        hashes = [_windows(intervals(keys)) for keys in pieces]
        lengths = np.array([len(found) for found in hashes])
        of_piece = np.repeat(np.arange(len(pieces)), lengths)
        place = np.concatenate([np.arange(length) for length in lengths])
        every = np.concatenate(hashes)
        order = np.argsort(every, kind="stable")
        self.hashes = every[order]
        self.of_piece = of_piece[order]
        self.place = place[order]

    def surprise(self, keys: np.ndarray) -> np.ndarray:
        """Bits of each note after those before it, float64 (notes,); the first note has none."""
        if len(keys) < 2:
            return np.zeros(len(keys))
        return np.concatenate([[0.0], -np.log2(self.model.probabilities(intervals(keys)))])

    def shared(self, query: np.ndarray, allowed: np.ndarray | None = None) -> Shared:
        """The best passage of a query, its keys; `allowed`, bool (pieces,), names where to look."""
        bits = self.surprise(query)
        best = Shared()
        for piece, transposed, begin, end in self._candidates(query, bits, allowed):
            there = self.pieces[piece][begin:end] - transposed
            found = align(query, there, bits)
            if found.bits > best.bits:
                best = Shared(
                    found.bits,
                    found.notes,
                    found.edits,
                    found.at,
                    found.length,
                    piece,
                    begin + found.there,
                    transposed,
                )
        return best

    def _candidates(self, query: np.ndarray, bits: np.ndarray, allowed: np.ndarray | None):
        """(piece, transposition, first note, last note + 1) of places where seeds agree,
        the best first.
        """
        windows = _windows(intervals(query))
        first = np.searchsorted(self.hashes, windows)
        last = np.searchsorted(self.hashes, windows, "right")
        count = np.where(last - first <= COMMON, last - first, 0)
        if not count.sum():
            return
        at = np.repeat(np.arange(len(windows)), count)
        inside = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
        hit = np.repeat(first, count) + inside
        piece = self.of_piece[hit]
        there = self.place[hit]
        if allowed is not None:
            good = allowed[piece]
            at, piece, there = at[good], piece[good], there[good]
        if not len(at):
            return
        starts = np.cumsum([0, *map(len, self.pieces)])
        every = np.concatenate(self.pieces)
        transposed = every[starts[piece] + there] - query[at]
        stretch = (there - at + len(query)) // BAND  # seeds of one passage lie near one diagonal
        named = np.stack([piece, transposed, stretch], 1)
        places, which = np.unique(named, axis=0, return_inverse=True)
        totals = np.cumsum(np.concatenate([[0.0], bits]))
        worth = totals[at + SEED + 1] - totals[at + 1]  # of a seed's intervals
        score = np.bincount(which.ravel(), weights=worth)
        for chosen in np.argsort(-score)[:CANDIDATES]:
            piece, transposed, stretch = places[chosen]
            middle = stretch * BAND - len(query)
            begin = max(0, middle - BAND)
            end = min(len(self.pieces[piece]), middle + len(query) + 2 * BAND)
            yield int(piece), int(transposed), int(begin), int(end)


def intervals(keys: np.ndarray) -> np.ndarray:
    """Steps from each key to the next, as tokens 0 … 2 · LEAP, int64 (notes - 1,)."""
    return np.clip(np.diff(keys), -LEAP, LEAP) + LEAP


def _windows(steps: np.ndarray) -> np.ndarray:
    """Every SEED intervals on end as one number, uint64: different for different ones."""
    count = max(0, len(steps) - SEED + 1)
    found = np.zeros(count, np.uint64)
    for k in range(SEED):
        found = found * FACTOR + steps[k : k + count].astype(np.uint64)
    return found


def align(query: np.ndarray, there: np.ndarray, bits: np.ndarray) -> Shared:
    """The best local alignment of two sequences of keys;
    `bits` is what each note of the query is worth.
    """
    columns = EDIT * np.arange(len(there) + 1)
    scores = np.zeros((len(query) + 1, len(there) + 1))
    for i, (key, worth) in enumerate(zip(query, bits), 1):
        step = np.where(there == key, worth, -EDIT)
        row = np.zeros(len(there) + 1)
        row[1:] = np.maximum(scores[i - 1, :-1] + step, scores[i - 1, 1:] - EDIT)
        row = np.maximum(row, 0.0)
        # notes put in there: the best score to the left, less EDIT for each step
        scores[i] = np.maximum.accumulate(row + columns) - columns
    return _back(scores, query, there, bits)


def _back(scores: np.ndarray, query: np.ndarray, there: np.ndarray, bits: np.ndarray) -> Shared:
    """From the highest score back to where it began."""
    i, j = np.unravel_index(scores.argmax(), scores.shape)
    best = float(scores[i, j])
    end = i
    notes = edits = 0
    while scores[i, j] > 0:
        agree = query[i - 1] == there[j - 1]
        if np.isclose(scores[i, j], scores[i - 1, j - 1] + (bits[i - 1] if agree else -EDIT)):
            i, j = i - 1, j - 1
            notes += agree
            edits += not agree
        elif np.isclose(scores[i, j], scores[i - 1, j] - EDIT):
            i -= 1
            edits += 1
        else:
            j -= 1
            edits += 1
    return Shared(best, int(notes), int(edits), int(i), int(end - i), there=int(j))
