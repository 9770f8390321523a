"""Numbers about one piece of performed piano music, and distances between collections of pieces.

The features are those that make sense without bars and beats, because MAESTRO has neither. Of
MusPy's metrics that leaves out groove, measures and drums.
"""

from collections.abc import Callable, Sequence

import numpy as np

from lib.env.errors import UserError
from lib.lab.judge.memorisation import keys, longest_repeat

STEPS = np.geomspace(0.01, 10, 17)  # seconds: edges of the classes of note lengths and of gaps
LAGS = {"3 to 8 s": (3, 8), "8 to 15 s": (8, 15)}  # seconds
# at longer lags shuffled tokens, being sparse, resemble themselves as much as music does
TELLING = "3 to 8 s"


# ---- one piece ---------------------------------------------------------------------------


def muspy_metrics(notes: np.ndarray) -> dict[str, float]:
    """MusPy's metrics (Dong et al. 2020) of keys and harmony; NaN where one is not defined."""
    import muspy

    ticks = np.round(notes["start"] * 100).astype(int), np.round(notes["end"] * 100).astype(int)
    track = muspy.Track(
        program=0,
        notes=[
            muspy.Note(int(a), int(p), max(1, int(b - a)), int(v))
            for a, b, p, v in zip(*ticks, notes["pitch"], notes["velocity"])
        ],
    )
    music = muspy.Music(resolution=50, tempos=[muspy.Tempo(0, 120)], tracks=[track])
    return {
        "range in semitones": float(muspy.pitch_range(music)),
        "keys used": float(muspy.n_pitches_used(music)),
        "pitch entropy in bits": muspy.pitch_entropy(music),
        "pitch-class entropy in bits": muspy.pitch_class_entropy(music),
        "scale consistency": muspy.scale_consistency(music),
        "keys sounding at once": muspy.polyphony(music),
    }


def facts(notes: np.ndarray, seconds: float) -> dict[str, float]:
    """Plain statistics of the notes of a piece that lasts `seconds`, MusPy's among them."""
    if len(notes) < 2:
        raise UserError("a piece needs two notes to be measured")
    gaps = np.diff(notes["start"])
    apart = gaps[gaps > 0.03]  # a chord counts once
    return {
        "notes a second": len(notes) / seconds,
        "median gap between onsets in s": float(np.median(apart)) if len(apart) else float("nan"),
        "median note length in s": float(np.median(notes["end"] - notes["start"])),
        "mean velocity": float(notes["velocity"].mean()),
        "spread of velocity": float(notes["velocity"].std()),
        **muspy_metrics(notes),
        "longest exact repetition in notes": float(longest_repeat(keys(notes))),
        f"returns after {TELLING}": returns(notes, seconds)[TELLING],
    }


def self_similarity(
    notes: np.ndarray, seconds: float, *, hop: float = 0.5, width: float = 4.0
) -> np.ndarray:
    """Cosine similarity of every `width` seconds of a piece with every other: (frames, frames).

    A frame is the share of each of the twelve pitch classes in each half second, for four seconds
    on end: what is compared are progressions, not single chords. Nothing of a piece shorter than
    `width`.
    """
    frames = int(np.ceil(seconds / hop))
    taps = round(width / hop)
    if frames < taps:
        return np.zeros((0, 0))
    chroma = np.zeros((frames, 12))
    for i in range(frames):
        begin = np.maximum(notes["start"], i * hop)
        end = np.minimum(notes["end"], (i + 1) * hop)
        sounding = np.maximum(end - begin, 0)  # of each note, in this half second
        np.add.at(chroma[i], notes["pitch"] % 12, sounding)
    chroma = _of_length_one(chroma)
    rows = np.concatenate([chroma[i : frames - taps + 1 + i] for i in range(taps)], 1)
    rows = _of_length_one(rows - rows.mean(0))  # without what the whole piece shares: its key
    return rows @ rows.T


def _of_length_one(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)


def returns(notes: np.ndarray, seconds: float, *, hop: float = 0.5) -> dict[str, float]:
    """How well the best match of a moment, so many seconds earlier, resembles it:
    mean over the piece, -1 to 1.

    NaN where a piece is too short for the lag.
    """
    similar = self_similarity(notes, seconds, hop=hop)
    found = {}
    for name, (low, high) in LAGS.items():
        lags = np.arange(round(low / hop), round(high / hop))
        best = [similar[i, i - lags].max() for i in range(lags[-1], len(similar))]
        found[name] = float(np.mean(best)) if best else float("nan")
    return found


# ---- the features of Yang and Lerch ----------------------------------------------------------


def _share(counts: np.ndarray) -> np.ndarray:
    return (counts / max(counts.sum(), 1)).ravel()


def _classes(values: np.ndarray) -> np.ndarray:
    return np.clip(np.searchsorted(STEPS, values, "right") - 1, 0, len(STEPS) - 2)


def _transitions(labels: np.ndarray, size: int) -> np.ndarray:
    table = np.zeros((size, size))
    np.add.at(table, (labels[:-1], labels[1:]), 1)
    return _share(table)


FEATURES: dict[str, Callable[[np.ndarray], float | np.ndarray]] = {
    "keys used": lambda n: len(np.unique(n["pitch"])),
    "range": lambda n: np.ptp(n["pitch"].astype(int)),
    "mean interval": lambda n: np.abs(np.diff(n["pitch"].astype(int))).mean(),
    "notes": len,
    "mean gap between onsets": lambda n: np.diff(n["start"]).mean(),
    "pitch classes": lambda n: _share(np.bincount(n["pitch"] % 12, minlength=12)),
    "pitch-class transitions": lambda n: _transitions(n["pitch"] % 12, 12),
    "note lengths": lambda n: _share(
        np.bincount(_classes(n["end"] - n["start"]), minlength=len(STEPS) - 1)
    ),
    "note-length transitions": lambda n: _transitions(
        _classes(n["end"] - n["start"]), len(STEPS) - 1
    ),
}


def features(pieces: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Each feature of every piece, float64 of shape (pieces, size): Yang and Lerch 2020, table 1.

    Of their nine the note lengths, which they take from a score, are classes of seconds here.
    """
    short = [i for i, notes in enumerate(pieces) if len(notes) < 2]
    if short or not len(pieces):
        raise UserError(
            f"{len(short)} of {len(pieces)} pieces have fewer than two notes: leave them out"
        )
    return {
        name: np.stack([np.atleast_1d(np.asarray(f(n), float)) for n in pieces])
        for name, f in FEATURES.items()
    }


def _distances(a: np.ndarray, b: np.ndarray | None = None) -> np.ndarray:
    """Euclidean distances of all pairs between two sets, or of all different pairs within one."""
    from scipy.spatial.distance import cdist, pdist

    return pdist(a) if b is None else cdist(a, b).ravel()


def overlap(a: np.ndarray, b: np.ndarray, points: int = 512) -> tuple[float, float]:
    """Overlap area and Kullback-Leibler divergence, in nats, of two sets of distances.

    Both are smoothed by a Gaussian kernel of Scott's width, on a grid that holds both.
    """
    low = min(a.min(), b.min())
    high = max(a.max(), b.max())
    reach = 0.1 * (high - low) or 1.0
    edges = np.linspace(low - reach, high + reach, points + 1)
    p = _density(a, edges)
    q = _density(b, edges)
    area = np.minimum(p, q).sum()
    ratio = np.maximum(p, 1e-12) / np.maximum(q, 1e-12)  # no logarithm of 0
    return float(area), float((p * np.log(ratio)).sum())


def _density(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """A kernel density as shares of the cells between `edges`: counted, then smoothed."""
    from scipy.ndimage import gaussian_filter1d

    counts = np.histogram(values, edges)[0].astype(float)
    width = values.std() * len(values) ** -0.2 / (edges[1] - edges[0])
    smooth = gaussian_filter1d(counts, max(width, 1e-3), mode="constant", truncate=6)
    return smooth / smooth.sum()


def yang_lerch(
    real: dict[str, np.ndarray], other: dict[str, np.ndarray]
) -> dict[str, tuple[float, float]]:
    """(overlap area, KL) of each feature:
    distances within the real set against those from it to the other.

    Yang and Lerch, "On the evaluation of generative models in music", 2020, section 3.3. An
    overlap of 1 means that the other pieces lie among the real ones as those lie among themselves.
    """
    return {
        name: overlap(_distances(real[name]), _distances(real[name], other[name])) for name in real
    }


# ---- a Fréchet distance ------------------------------------------------------------------------


def describe(notes: np.ndarray) -> np.ndarray:
    """An excerpt as 300 numbers: square roots of histograms, so that distances are Hellinger's.

    Keys (88), intervals (25), pitch-class transitions (144), gaps, note lengths (16 each) and
    loudness (11).
    """
    pitch = notes["pitch"].astype(int)
    intervals = np.clip(np.diff(pitch), -12, 12)
    gaps = np.diff(notes["start"])
    lengths = notes["end"] - notes["start"]
    histograms = [
        np.bincount(pitch - 21, minlength=88),
        np.bincount(intervals + 12, minlength=25),
        _transitions(pitch % 12, 12),
        np.bincount(_classes(gaps), minlength=16),
        np.bincount(_classes(lengths), minlength=16),
        np.bincount(notes["velocity"] // 12, minlength=11),
    ]
    return np.sqrt(np.concatenate([_share(counts) for counts in histograms]))


class Embedding:
    """`describe`, turned onto the directions in which real music varies most;
    learnt from excerpts.
    """

    def __init__(self, excerpts: Sequence[np.ndarray], size: int = 32):
        rows = np.stack([describe(notes) for notes in excerpts])
        if len(rows) <= size:
            raise UserError(f"{len(rows)} excerpts are too few for an embedding of {size} numbers")
        self.mean = rows.mean(0)
        _, _, directions = np.linalg.svd(rows - self.mean, full_matrices=False)
        self.directions = directions[:size]

    def __call__(self, excerpts: Sequence[np.ndarray]) -> np.ndarray:
        """Excerpts to float64 of shape (excerpts, size)."""
        return (np.stack([describe(notes) for notes in excerpts]) - self.mean) @ self.directions.T


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Fréchet distance of two Gaussians fitted to rows of embeddings (Heusel et al. 2017, eq. 6).

    The fewer rows, the larger it comes out: compare only sets of equal size.
    """
    apart = a.mean(0) - b.mean(0)
    first = np.cov(a.T)
    second = np.cov(b.T)
    # the trace of the root of first · second,
    # by way of a symmetric matrix with the same eigenvalues
    values, vectors = np.linalg.eigh(first)
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    shared = np.linalg.eigvalsh(root @ second @ root)
    cross = np.sqrt(np.maximum(shared, 0)).sum()
    return float(apart @ apart + np.trace(first) + np.trace(second) - 2 * cross)
