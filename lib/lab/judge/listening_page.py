"""A blind listening test in one HTML file: pairs of clips, a choice for each, ratings to export.

    python -m lib.lab.judge page --group real=DIR --group model=DIR --out page.html

The page needs no network and no server: the sound lies in it. The roll of a clip, which moves
with its sound, is seen only once the listener has chosen, so that the ear decides. Who played
what is written in it too, in code that nobody reads by accident, and appears only in the exported
file. `python -m lib.lab.judge --ratings FILE…` says what the ratings say. The course ships no
rating: it has none.
"""

import argparse
import base64
import hashlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, NotRequired

import numpy as np
from pydantic import Field
from typing_extensions import TypedDict  # pydantic wants this one before Python 3.12

from lib.env.errors import UserError, os_errors
from lib.env.files import atomic_write
from lib.env.schema import read_json
from lib.music.notes import Music, crop, read_midi, sustain
from lib.show.listen import PLAYER_LEVEL, PLAYER_RATE, TAIL, mp3_bytes, render
from lib.show.moving_roll import script, svg

TEMPLATE = Path(__file__).with_name("listening_page.html")
CHOICES = {"a": 1.0, "same": 0.5, "b": 0.0}  # what a choice gives to clip A
FORMAT = "listening 1"
LARGEST = 60  # pairs: nobody listens for longer


class Answer(TypedDict):
    """What a listener said of one pair."""

    choice: Literal[*CHOICES]
    clips: Annotated[
        list[Annotated[str, Field(pattern="/", max_length=1000)]], Field(min_length=2, max_length=2)
    ]


class Ratings(TypedDict):
    """The file that the page exports."""

    format: Literal[FORMAT]
    listener: Annotated[str, Field(max_length=1000)]
    who: NotRequired[Annotated[str, Field(max_length=100)]]  # drawn at random, of each listener
    ratings: Annotated[list[Answer], Field(max_length=10_000)]


def pairs(
    groups: dict[str, int], count: int, seed: int
) -> list[tuple[tuple[str, int], tuple[str, int]]]:
    """`count` pairs of (group, clip), every pair of groups equally often,
    in random order and sides.
    """
    rng = np.random.default_rng(seed)
    kinds = itertools.cycle(list(itertools.combinations(groups, 2)))
    decks: dict[str, list[int]] = {name: [] for name in groups}

    def deal(name):
        decks[name] = decks[name] or rng.permutation(groups[name]).tolist()
        return name, decks[name].pop()

    dealt = [[deal(name) for name in next(kinds)] for _ in range(count)]
    return [tuple(dealt[i][side] for side in rng.permutation(2)) for i in rng.permutation(count)]


def page(
    groups: dict[str, Sequence[Music]],
    path: str | Path,
    *,
    count: int = 12,
    seconds: float = 12.0,
    seed: int = 0,
) -> None:
    """Write the page: `count` pairs of clips, the first `seconds` of pieces of two groups,
    all equally loud at most.
    """
    if len(groups) < 2 or not all(groups.values()):
        raise UserError("a comparison needs two groups with a piece each")
    if not 1 <= count <= LARGEST:
        raise UserError(f"{count} pairs are outside 1 to {LARGEST}: nobody listens for longer")
    if seed < 0:
        raise UserError(f"seed {seed} is below 0: give 0 or more")
    dealt = pairs({name: len(pieces) for name, pieces in groups.items()}, count, seed)
    sounds, rolls, keys = {}, {}, {}
    for name, index in {clip for pair in dealt for clip in pair}:
        music = sustain(groups[name][index])
        start = float(music.notes["start"][0]) if len(music.notes) else 0.0
        clip = crop(music, start, start + seconds)
        clip.notes["end"] = np.minimum(clip.notes["end"], seconds)
        data = mp3_bytes(render(clip, rate=PLAYER_RATE), PLAYER_RATE, level=PLAYER_LEVEL)
        sounds[name, index] = base64.b64encode(data).decode()
        rolls[name, index] = svg(clip, clip.seconds + TAIL)
        keys[name, index] = f"{name}/{index}"
    key = [[keys[clip] for clip in pair] for pair in dealt]
    test = hashlib.sha256(json.dumps([key, seed]).encode()).hexdigest()[:12]
    content = {
        "format": FORMAT,
        "test": test,
        "pairs": [[sounds[clip] for clip in pair] for pair in dealt],
        "rolls": [[rolls[clip] for clip in pair] for pair in dealt],
        "key": base64.b64encode(json.dumps(key).encode()).decode(),
    }
    with os_errors("read the page's template"):
        text = TEMPLATE.read_text(encoding="utf-8")
    text = text.replace("/*MOVE*/", script())
    text = text.replace("/*CONTENT*/null", json.dumps(content).replace("</", "<\\/"))
    with atomic_write(path) as part:
        part.write_text(text, encoding="utf-8")


def read_ratings(paths: Sequence[Path]) -> list[dict]:
    """Exported files, checked. Raises `UserError` where two are by one listener."""
    do = "export it again from the listening page"
    files = [read_json(path, Ratings, do=do) for path in paths]
    seen: dict[str, Path] = {}
    for path, file in zip(paths, files, strict=True):
        who = file.get("who") or str(path.resolve())
        if who in seen:
            raise UserError(f"{seen[who]} and {path} are by one listener: leave out one of them")
        seen[who] = path
    return files


def analyse(files: Sequence[dict], *, draws: int = 2000, seed: int = 0) -> dict:
    """How often each group was preferred to each other, with 95 % intervals over listeners.

    Each file is one listener. A choice counts 1, "no preference" one half. The interval resamples
    listeners, and the answers within each, because one person's answers are alike.
    """
    names = sorted(
        {clip.rpartition("/")[0] for f in files for row in f["ratings"] for clip in row["clips"]}
    )
    answers: dict[tuple[str, str], list[list[float]]] = {}
    for pair in itertools.combinations(names, 2):
        by_listener: dict[int, list[float]] = {}
        for number, f in enumerate(files):
            for row in f["ratings"]:
                clips = tuple(clip.rpartition("/")[0] for clip in row["clips"])
                if set(clips) == set(pair):
                    won = CHOICES[row["choice"]]
                    by_listener.setdefault(number, []).append(
                        won if clips[0] == pair[0] else 1 - won
                    )
        if by_listener:
            answers[pair] = list(by_listener.values())
    rng, out = np.random.default_rng(seed), []
    for (first, second), rows in answers.items():
        every, means = np.concatenate(rows), []
        for _ in range(draws):
            drawn = [
                rng.choice(rows[i], len(rows[i])) for i in rng.integers(len(rows), size=len(rows))
            ]
            means.append(np.concatenate(drawn).mean())
        out.append(
            {
                "first": first,
                "second": second,
                "answers": len(every),
                "listeners": len(rows),
                "preferred_first": float(every.mean()),
                "interval_95": [float(v) for v in np.percentile(means, (2.5, 97.5))],
            }
        )
    return {"listeners": len(files), "comparisons": out}


def report(result: dict) -> str:
    """The analysis as text."""
    if not result["comparisons"]:
        return "no ratings yet"
    lines = [
        f"listeners: {result['listeners']}; the share of answers that preferred the first, "
        "half a point for none"
    ]
    for row in result["comparisons"]:
        low, high = row["interval_95"]
        lines.append(
            f"{row['first']} over {row['second']}: {row['preferred_first']:.0%} "
            f"({low:.0%} to {high:.0%}), {row['answers']} answers"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Write a blind listening page from folders of MIDI files."""
    parser = argparse.ArgumentParser(prog="python -m lib.lab.judge page", description=main.__doc__)
    parser.add_argument(
        "--group", action="append", default=[], metavar="NAME=DIR", help="two or more"
    )
    parser.add_argument(
        "--pairs", type=int, default=12, help="comparisons for a listener (%(default)s)"
    )
    parser.add_argument("--seconds", type=float, default=12, help="of each clip (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which clips meet (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("listening.html"), help="(%(default)s)")
    args = parser.parse_args(argv)
    groups: dict[str, list[Music]] = {}
    for text in args.group:
        name, _, folder = text.partition("=")
        paths = sorted(p for p in Path(folder).glob("*") if p.suffix.lower() in (".mid", ".midi"))
        if not name or "/" in name or not paths:
            raise UserError(f"{text} is no group: give NAME=DIR with MIDI files in DIR")
        groups[name] = [read_midi(p) for p in paths]
    if not 3 <= args.seconds <= 60:
        raise UserError(
            f"clips of {args.seconds} seconds are outside 3 to 60: choose another length"
        )
    page(groups, args.out, count=args.pairs, seconds=args.seconds, seed=args.seed)
    print(f"{args.out}: {args.pairs} pairs, {args.out.stat().st_size / 1e6:.1f} MB")
