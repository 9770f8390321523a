"""Pieces beside two anchors: real music above, noise below. A number means nothing without both.

The real anchor are openings of MAESTRO's test pieces, the noise the same openings with their tokens
shuffled. All pass through the tokens, so that grid and pedal treat them alike.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from lib.env.errors import UserError
from lib.lab.judge.memorisation import Passage, keys, longest_shared
from lib.lab.judge.metrics import Embedding, facts, features, frechet, yang_lerch
from lib.lab.judge.passages import Corpus, Shared
from lib.music.library import excerpt, note_arrays, opening
from lib.music.maestro import Performance
from lib.music.notes import Music
from lib.music.tokens import Tokenizer

DRAWS = 20  # random halves for what real pieces differ by among themselves
CLIP = 10.0  # seconds of an excerpt for the Fréchet distance
FEW = 4  # notes: a piece with fewer is called empty
EXCERPTS = 3000  # training excerpts that the embedding learns from
COPIED = (5.0, 10.0, 20.0)  # seconds of a copy: how long must it be to be seen?


@dataclass(frozen=True)
class Anchors:
    """What pieces of `seconds` are compared with."""

    seconds: float
    real: list[np.ndarray]  # openings of test pieces, through the tokens
    noise: list[np.ndarray]  # the same with their tokens shuffled
    composers: list[str]  # of the real ones
    titles: list[str]  # likewise
    train: list[np.ndarray]  # whole training pieces
    train_facts: list[Performance]


def anchors(
    performances: list[Performance],
    tokenizer: Tokenizer,
    seconds: float,
    *,
    seed: int = 0,
    progress: bool = True,
) -> Anchors:
    """Read the test and the train split.

    A small sample has one test piece: it is cut into openings then.
    """
    arrays = note_arrays(performances, progress=progress)
    rng = np.random.default_rng(seed)
    real, noise, composers, titles = [], [], [], []
    test = [(p, a) for p, a in zip(performances, arrays) if p.split == "test"]
    few = len(test) < 8
    for performance, notes in test:
        starts = (
            np.arange(notes["start"][0], notes["end"].max() - seconds, seconds)
            if few
            else [notes["start"][0]]
        )
        for start in starts:
            ids = tokenizer.encode(Music(excerpt(notes, start, seconds)))
            pieces = [
                _cut(tokenizer.decode(tokens).notes, seconds)
                for tokens in (ids, rng.permutation(ids))
            ]
            if min(map(len, pieces)) >= FEW:
                real.append(pieces[0])
                noise.append(pieces[1])
                composers.append(performance.composer)
                titles.append(performance.title)
    train = [(p, a) for p, a in zip(performances, arrays) if p.split == "train"]
    if not real or not train:
        raise UserError("there is no test or no train piece to compare with: fetch MAESTRO")
    return Anchors(
        seconds, real, noise, composers, titles, [a for _, a in train], [p for p, _ in train]
    )


def _cut(notes: np.ndarray, seconds: float) -> np.ndarray:
    return excerpt(notes, 0, seconds)


def quantiles(pieces: Sequence[np.ndarray], seconds: float) -> dict[str, list[float]]:
    """10 %, 50 % and 90 % of each fact over the pieces where it is defined."""
    rows = [facts(notes, seconds) for notes in pieces]
    found = {}
    for name in rows[0]:
        values = [row[name] for row in rows if not np.isnan(row[name])]
        if values:  # a lag longer than the pieces has none
            found[name] = np.quantile(values, [0.1, 0.5, 0.9]).tolist()
    return found


def overlaps(anchor: Anchors, groups: dict[str, Sequence[np.ndarray]], *, seed: int = 0) -> dict:
    """Overlap area and KL of each feature and group against all real pieces,
    and what halves of the real ones reach.
    """
    rng = np.random.default_rng(seed)
    real = features(anchor.real)
    table = {name: yang_lerch(real, features(pieces)) for name, pieces in groups.items()}
    draws = []
    for _ in range(DRAWS):
        order = rng.permutation(len(anchor.real))
        half = len(order) // 2
        first = {name: values[order[:half]] for name, values in real.items()}
        second = {name: values[order[half:]] for name, values in real.items()}
        draws.append(yang_lerch(first, second))
    table["real"] = {name: np.mean([draw[name] for draw in draws], 0).tolist() for name in real}
    return {group: _overlap_facts(row) for group, row in table.items()}


def _overlap_facts(row: dict[str, Sequence[float]]) -> dict:
    """(Overlap area, KL) of each feature as two dicts and their means."""
    areas = {name: area for name, (area, _) in row.items()}
    nats = {name: kl for name, (_, kl) in row.items()}
    return {
        "overlap_area": areas,
        "kl_nats": nats,
        "mean_overlap_area": float(np.mean(list(areas.values()))),
        "mean_kl_nats": float(np.mean(list(nats.values()))),
    }


def clips(pieces: Sequence[np.ndarray], seconds: float) -> list[list[np.ndarray]]:
    """Excerpts of ten seconds of each piece, those with enough notes."""
    return [
        [
            clip
            for at in np.arange(0, seconds - CLIP + 1e-9, CLIP)
            if len(clip := excerpt(notes, at, CLIP)) >= FEW
        ]
        for notes in pieces
    ]


def frechets(
    anchor: Anchors, groups: dict[str, Sequence[np.ndarray]], *, seed: int = 0
) -> dict[str, float]:
    """Fréchet distance of each group to real pieces, mean over random draws; NaN for too few.

    In a draw the real pieces fall into two halves: all are compared with the first, the second
    stands beside the groups. From each come as many excerpts, because the distance of fewer is
    larger, and at least twice as many as the embedding has numbers.
    """
    rng = np.random.default_rng(seed)
    embed = Embedding(_train_clips(anchor, rng))
    nothing = np.empty((0, len(embed.directions)))

    def rows(pieces: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The embedded excerpts of each piece."""
        return [embed(found) if found else nothing for found in clips(pieces, anchor.seconds)]

    real = rows(anchor.real)
    others = {name: np.concatenate([nothing, *rows(pieces)]) for name, pieces in groups.items()}
    distances: dict[str, list[float]] = {name: [] for name in ["real", *groups]}
    for _ in range(DRAWS):
        order = rng.permutation(len(real))
        reference, second = (
            np.concatenate([nothing, *(real[i] for i in part)])
            for part in (order[: len(order) // 2], order[len(order) // 2 :])
        )
        sets = {"real": second, **others}
        size = min(map(len, [reference, *sets.values()]))
        if size < 2 * nothing.shape[1]:
            return dict.fromkeys(distances, float("nan"))
        for name, excerpts in sets.items():
            apart = frechet(some(reference, size, rng), some(excerpts, size, rng))
            distances[name].append(apart)
    return {name: float(np.mean(values)) for name, values in distances.items()}


def some(rows: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """So many of these rows, drawn at random."""
    return rows[rng.permutation(len(rows))[:size]]


def _train_clips(anchor: Anchors, rng: np.random.Generator) -> list[np.ndarray]:
    """Random excerpts of training pieces, those with enough notes."""
    found = []
    for _ in range(EXCERPTS):
        notes = anchor.train[rng.integers(len(anchor.train))]
        latest = max(1e-3, notes["start"][-1] - CLIP)
        clip = excerpt(notes, rng.uniform(0, latest), CLIP)
        if len(clip) >= FEW:
            found.append(clip)
    return found


def copied(anchor: Anchors, groups: dict[str, Sequence[np.ndarray]]) -> dict:
    """Longest passages shared with the train split, in notes:
    exactly and transposed, a group a row.

    "real" are the test openings against the pieces of *other* composers: what unrelated music
    shares by chance. What a copy looks like, `passages` says.
    """
    train = [keys(notes) for notes in anchor.train]
    composers = sorted({p.composer for p in anchor.train_facts} | {*anchor.composers})
    number = {composer: i for i, composer in enumerate(composers)}
    other = (
        [number[composer] for composer in anchor.composers],
        [number[p.composer] for p in anchor.train_facts],
    )
    kinds = {}
    for kind in ("exact", "transposed"):
        transposed = kind == "transposed"
        found: dict[str, list[Passage]] = {}
        for name, pieces in {"real": anchor.real, **groups}.items():
            apart = other if name == "real" else None
            found[name] = longest_shared(
                [keys(n) for n in pieces], train, transposed=transposed, groups=apart
            )
        kinds[kind] = {
            name: _summary(passages, anchor, named=name in groups)
            for name, passages in found.items()
        }
    return kinds


def passages(anchor: Anchors, groups: dict[str, Sequence[np.ndarray]], *, seed: int = 0) -> dict:
    """The most surprising passage of each piece that training pieces share, a group a row, in bits.

    Beside the groups stand controls, all of real openings. Test pieces against training pieces of
    other composers: what chance does; the largest percent of these is the threshold. Against other
    titles of the same composer: what style does; beside it the same against as few notes by others.
    And training pieces against recordings of the same title by other pianists: what a copy looks
    like. Of these copies it is also counted how many are seen when only their first seconds are
    given, and the titles of which nothing is seen are named.
    """
    train = anchor.train_facts
    corpus = Corpus([keys(notes) for notes in anchor.train])
    found = chance_and_style(anchor, corpus, np.random.default_rng(seed))
    threshold = float(np.percentile([one.bits for one in found["other composers"]], 99))
    copies = other_hands(train)
    seen = []
    for seconds in sorted({*(t for t in COPIED if t < anchor.seconds), anchor.seconds}):
        again = [
            corpus.shared(keys(opening(anchor.train[number], seconds)), others)
            for number, others in copies.items()
        ]
        if again:
            above = [one.bits > threshold for one in again]
            seen.append({"seconds": seconds, "above": float(np.mean(above))})
    found["same title, other hands"] = again
    for name, pieces in groups.items():
        found[name] = [corpus.shared(keys(notes)) for notes in pieces]
    return {
        "threshold_bits": threshold,
        "groups": {
            name: _passage_facts(shared, threshold, train)
            for name, shared in found.items()
            if shared
        },
        "copies_seen": seen,
        "copies_unseen": [
            f"{train[number].composer}, {train[number].title}"
            for number, one in zip(copies, again)
            if one.bits <= threshold
        ],
    }


def chance_and_style(
    anchor: Anchors, corpus: Corpus, rng: np.random.Generator
) -> dict[str, list[Shared]]:
    """What openings of test pieces share with other composers and with their own.

    The own composer's other titles are few, and in fewer notes less is found by chance: so a third
    group, random pieces by others with as few notes.
    """
    composer = np.array([p.composer for p in anchor.train_facts])
    title = np.array([p.title for p in anchor.train_facts])
    count = np.array([len(notes) for notes in anchor.train])
    found: dict[str, list[Shared]] = {
        "other composers": [],
        "other composers, as few notes": [],
        "same composer": [],
    }
    for notes, by, called in zip(anchor.real, anchor.composers, anchor.titles):
        query = keys(notes)
        others = composer != by
        kin = ~others & (title != called)
        found["other composers"].append(corpus.shared(query, others))
        if kin.any():
            order = rng.permutation(np.flatnonzero(others))
            enough = np.searchsorted(count[order].cumsum(), count[kin].sum())
            few = np.isin(np.arange(len(composer)), order[: enough + 1])
            found["other composers, as few notes"].append(corpus.shared(query, few))
            found["same composer"].append(corpus.shared(query, kin))
    return found


def other_hands(train: list[Performance]) -> dict[int, np.ndarray]:
    """For the first recording of each title those of it by others, bool (pieces,).

    A title that only one pianist has in one year has no entry.
    """
    piece = np.array([f"{p.composer}, {p.title}" for p in train])
    evening = np.array([_evening(p) for p in train])
    found = {}
    for number in range(len(train)):
        same = piece == piece[number]
        others = same & (evening != evening[number])
        if same.argmax() == number and others.any():
            found[number] = others
    return found


def _evening(performance: Performance) -> str:
    """Year and pianist, as MAESTRO's file names tell.

    A set of pieces may lie in several files of one evening, all under its title.
    """
    evening, _, recorded = performance.path.stem.lower().partition("_mid--")
    pianist = re.search(r"(\d+)_r\d_\d{4}", recorded)
    return f"{performance.year} {pianist[1] if pianist else evening}"


def _passage_facts(shared: list[Shared], threshold: float, train: list[Performance]) -> dict:
    bits = np.array([one.bits for one in shared])
    top = int(bits.argmax())
    row = {
        "pieces": len(shared),
        "bits": bits.round(1).tolist(),
        "median_bits": float(np.median(bits)),
        "most_bits": float(bits[top]),
        "above": float((bits > threshold).mean()),
        "longest_notes": max(one.notes for one in shared),
    }
    if shared[top].piece >= 0:
        source = train[shared[top].piece]
        row["top"] = {
            "query": top,
            "of": f"{source.composer}, {source.title}",
            **asdict(shared[top]),
        }
    return row


def _summary(passages: list[Passage], anchor: Anchors, named: bool) -> dict:
    lengths = np.array([p.notes for p in passages])
    top = int(lengths.argmax())
    row = {
        "pieces": len(lengths),
        "median": float(np.median(lengths)),
        "p95": float(np.percentile(lengths, 95)),
        "longest": int(lengths[top]),
    }
    if named and passages[top].notes:
        source = anchor.train_facts[passages[top].piece]
        row |= {
            "query": top,
            "at_note": passages[top].at,
            "of": f"{source.composer}, {source.title}",
            "piece": passages[top].piece,
            "its_note": passages[top].there,
        }
    return row


def compare(anchor: Anchors, groups: dict[str, Sequence[np.ndarray]]) -> dict:
    """Everything above for groups of note arrays, beside the anchors, as one JSON-ready dict."""
    empty = {name: sum(len(notes) < FEW for notes in pieces) for name, pieces in groups.items()}
    groups = {
        name: [notes for notes in pieces if len(notes) >= FEW] for name, pieces in groups.items()
    }
    if any(len(pieces) < 2 for pieces in groups.values()):
        raise UserError(f"two pieces with {FEW} notes or more are needed: play some more")
    others = {**groups, "noise": anchor.noise}
    every = {"real": anchor.real, **others}
    return {
        "seconds": anchor.seconds,
        "pieces": {name: len(pieces) for name, pieces in every.items()},
        "empty": empty,
        "facts": {name: quantiles(pieces, anchor.seconds) for name, pieces in every.items()},
        "overlap": overlaps(anchor, others),
        "frechet": frechets(anchor, others),
        "copied": copied(anchor, others),
    }


# ---- showing it ------------------------------------------------------------------------------


def table(result: dict) -> str:
    """The comparison as a Markdown table: medians, and in brackets the middle 80 %."""
    names = ["real", *(n for n in result["pieces"] if n not in ("real", "noise")), "noise"]
    facts_of, overlap = result["facts"], result["overlap"]
    lines = [
        f"| | {' | '.join(names)} |",
        f"|---|{'---|' * len(names)}",
        _row("pieces", [str(result["pieces"][n]) for n in names]),
    ]
    for fact in facts_of["real"]:
        if all(fact in facts_of[n] for n in names):
            cells = ["{1:.3g} ({0:.3g} to {2:.3g})".format(*facts_of[n][fact]) for n in names]
            lines.append(_row(fact, cells))
    lines += [
        _row(
            "mean overlap area with real, 1 is best",
            [f"{overlap[n]['mean_overlap_area']:.3f}" for n in names],
        ),
        _row(
            "mean KL from real in nats, 0 is best",
            [f"{overlap[n]['mean_kl_nats']:.3f}" for n in names],
        ),
        _row("Fréchet distance to real", [f"{result['frechet'][n]:.4f}" for n in names]),
    ]
    for kind, rows in result["copied"].items():
        lines.append(
            _row(
                f"longest passage shared with train, {kind}, notes",
                ["median {median:.0f}, most {longest}".format(**rows[n]) for n in names],
            )
        )
    return "\n".join(lines)


def _row(name: str, cells: list[str]) -> str:
    return f"| {name} | {' | '.join(cells)} |"


def plot(result: dict):
    """Overlap area of each feature, a dot a group: a figure."""
    from lib.show import plots

    names = ["noise", *(n for n in result["pieces"] if n not in ("real", "noise")), "real"]
    colours = {"real": plots.INPUT, "noise": plots.GREY}
    rest = iter((plots.OUTPUT, plots.STATE, *plots.OTHER))
    kinds = list(result["overlap"]["real"]["overlap_area"])
    mean = {n: result["overlap"][n]["mean_overlap_area"] for n in names}
    said = ", ".join(f"{plots.printable(n)} {mean[n]:.2f}" for n in reversed(names))
    fig, ax = plots.figure(height=4.2)
    for name in names:
        label = plots.printable(name) + (" halves" if name == "real" else "")
        ax.plot(
            [result["overlap"][name]["overlap_area"][k] for k in kinds],
            range(len(kinds)),
            "o",
            markersize=9,
            color=colours.get(name) or next(rest),
            label=label,
        )
    ax.set_yticks(range(len(kinds)), kinds)
    ax.invert_yaxis()
    ax.grid(axis="y", visible=True)
    ax.set(
        xlim=(0, 1.02),
        xlabel="overlap area with the test pieces",
        title=f"Overlap area, on average: {said}",
    )
    ax.legend(loc="lower left", reverse=True)
    return fig
