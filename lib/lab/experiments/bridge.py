"""Does a bridge lead anywhere? `python -m lib.lab.experiments.bridge`.

Eight seconds are taken out of each of fifty validation pieces. Four ways to fill them from what
comes before: plain continuation, the mean of many; the best of as many, chosen once at the end;
the bridge, which forks and resamples on the way; and, for comparison, what was there. Each is
judged by the bits that the true continuation then costs the model, paired over the pieces: its
first tokens, by which rows are weighed, and those behind, which no row was asked about. Writes
data/results/bridge.json, piece by piece, and goes on where it stopped.
"""

import argparse

import numpy as np

from lib.env import machine as env
from lib.env.errors import cli
from lib.env.files import write_json
from lib.generate.bridge import AHEAD, EVERY, TWIST, Goal, Row, cross, log_likelihood
from lib.generate.moment import fingerprint
from lib.generate.player import hear_prompt, load_model
from lib.music.maestro import performances
from lib.music.notes import Music, crop, read_midi, sustain
from lib.train.bits import interval

COMMAND = "python -m lib.lab.experiments.bridge"
NAME = "bridge"
BEFORE, GAP = 30.0, 8.0  # seconds that are heard, and that are missing
BEHIND = 256  # tokens of the continuation behind those that rows are weighed by
WAYS = ("plain", "best", "bridge", "true")


def cut(music: Music, rng: np.random.Generator) -> Music:
    """A piece from half a minute before a place in it on, from its first note there."""
    sound = sustain(music)
    first = sound.notes["start"].min()
    latest = max(first, sound.notes["start"].max() - BEFORE - GAP - 30)
    piece = crop(sound, rng.uniform(first, latest), np.inf).notes
    piece["end"] -= piece["start"].min()
    piece["start"] -= piece["start"].min()
    return Music(piece)


def measure(model, tokenizer, music: Music, rows: int, seed: int) -> dict:
    """Bits of the true continuation after each way across one gap: [weighed by, behind]."""
    onsets = music.notes["start"]
    end = round(float(onsets[onsets >= BEFORE + GAP][0]), 2)
    start, _, _ = hear_prompt(model, tokenizer, music, BEFORE)
    there, _, _ = hear_prompt(model, tokenizer, music, end - 0.01)
    goal = Goal.of(tokenizer, Music(music.notes[onsets >= BEFORE + GAP]), end)
    goal = goal.first(AHEAD + BEHIND)
    plain = cross(model, tokenizer, start, goal, rows=rows, seed=seed, every=10**6)
    forked = cross(model, tokenizer, start, goal, rows=rows, seed=seed)
    equal = np.full(rows, 1 / rows)
    ways = {
        "plain": (plain.rows, equal),
        "best": (plain.rows, plain.weights),
        "bridge": (forked.rows, forked.weights),
        "true": ([Row(there, there=True)], np.ones(1)),
    }
    found: dict = {"seconds": end - BEFORE, "sizes": [round(size, 2) for size in forked.sizes]}
    for way, (crowd, weights) in ways.items():
        spans = [
            log_likelihood(model, crowd, goal),
            log_likelihood(model, crowd, goal, AHEAD, BEHIND),
        ]
        found[way] = [float(-(weights * nats).sum() / np.log(2)) for nats in spans]
    notes = tokenizer.notes_of[goal.inside]
    found["notes"] = [int(notes[:AHEAD].sum()), int(notes[AHEAD:].sum())]
    return found


def summary(gaps: list[dict]) -> dict:
    """Bits a note of each way, and each way minus plain with its interval over pieces."""
    found: dict = {}
    for span, name in enumerate(("weighed_by", "behind")):
        notes = np.array([gap["notes"][span] for gap in gaps])
        bits = {way: np.array([gap[way][span] for gap in gaps]) for way in WAYS}
        found[name] = {way: float(bits[way].sum() / notes.sum()) for way in WAYS}
        for way, other in (
            ("bridge", "plain"),
            ("best", "plain"),
            ("bridge", "best"),
            ("true", "plain"),
        ):
            difference = bits[way] - bits[other]
            found[name][f"{way}_minus_{other}"] = {
                "bits_per_note": float(difference.sum() / notes.sum()),
                "interval_95": interval(difference, notes),
            }
    return found


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog=COMMAND, description="Bridge gaps, and measure.")
    parser.add_argument("--gaps", type=int, default=50, help="pieces, a gap each (%(default)s)")
    parser.add_argument("--rows", type=int, default=16, help="side by side (%(default)s)")
    args = parser.parse_args(argv)
    model, tokenizer = load_model()
    pieces = [p for p in performances(say=lambda text: None) if p.split == "validation"]
    chosen = np.random.default_rng(11).permutation(len(pieces))[: args.gaps]
    mark = fingerprint(model)
    known = env.read_results(NAME)
    if (known.get("model"), known.get("rows")) != (mark, args.rows):
        known = {}  # another model's gaps, or other rows', do not belong beside these
    gaps = known.get("gaps", [])
    for number, place in enumerate(chosen.tolist()):
        if number < len(gaps):
            continue
        music = cut(read_midi(pieces[place].path), np.random.default_rng(number))
        found = measure(model, tokenizer, music, args.rows, seed=number)
        gaps.append({"piece": pieces[place].path.name, **found})
        known = {
            "model": mark,
            "rows": args.rows,
            "ahead": AHEAD,
            "behind": BEHIND,
            "every": EVERY,
            "twist": TWIST,
            "summary": summary(gaps),
            "gaps": gaps,
            **env.provenance(COMMAND),
        }
        write_json(env.RESULTS / f"{NAME}.json", known)
        print(
            f"gap {number + 1}: " + ", ".join(f"{way} {sum(found[way]):.0f}" for way in WAYS),
            flush=True,
        )


if __name__ == "__main__":
    cli(main)
