"""Overfitting as the original work did it, and each repair in turn: `python -m lib.lab.bench overfit`.

A small model reads the same few performances many times. The first arm follows the original's recipe:
20,000 byte-pair tokens learnt on all files, no augmentation, overlapping chunks split at random. Each
further arm mends one thing more. All are measured in bits per note on whole performances of the
official validation split. Writes data/results/overfit.json, arm by arm.
"""

import argparse
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from lib.env import machine as env
from lib.env.errors import UserError
from lib.env.files import write_json
from lib.lab.bench.timing import note
from lib.lab.experiments.original import chunks
from lib.music.encode import Augmentation, build
from lib.music.maestro import performances
from lib.music.streams import Streams
from lib.music.tokens import TokenConfig, Tokenizer
from lib.train.bits import bits_per_note, counting_baselines
from lib.train.trainer import TrainConfig, Trainer

CHUNK, OVERLAP = 128, 16  # tokens; the original's were 1,024 and a bar
BASE = TrainConfig(d_model=128, n_layer=3, batch=4, length=CHUNK, carry=1, lr=3e-3, weight_decay=0.0, copies=False,
                   minutes=1e9)


@dataclass(frozen=True)
class Arm:
    """One way to train; `change` says what differs from the arm before."""

    name: str
    change: str
    vocab_size: int | None
    chunks: bool = False  # overlapping chunks, split at random; else whole performances, the official split
    leak: bool = False  # merges are learnt on the held-out performances too
    config: dict = field(default_factory=dict)  # what differs from BASE


REPAIRS = {"carry": {"carry": 8}, "augment": {"transpose": 5, "louder": 2},
           "regular": {"dropout": 0.1, "weight_decay": 0.1}}
ARMS = (
    Arm("original", "20,000 merged tokens learnt on all files, chunks split at random", 20_000, True, True),
    Arm("official split", "whole performances on one side only, merges learnt on the train side", 20_000),
    Arm("1,024 tokens", "fewer merges", 1024),
    Arm("base tokens", "no merges", None),
    Arm("carried state", "rows read on", None, config=REPAIRS["carry"]),
    Arm("augmentation", "transposed by up to 5 semitones and louder or softer, anew at each visit", None,
        config=REPAIRS["carry"] | REPAIRS["augment"]),
    Arm("dropout and decay", "dropout 0.1, weight decay 0.1", None,
        config=REPAIRS["carry"] | REPAIRS["augment"] | REPAIRS["regular"]),
)


def choose(found, pieces: int, held_out: int, seed: int = 0) -> tuple[list, list]:
    """Some performances of the train split, and some of the validation split with other titles."""
    rng = np.random.default_rng(seed)
    sides = []
    for split, count in (("train", pieces), ("validation", held_out)):
        have = [p for p in found if p.split == split and 150 <= p.seconds <= 900]
        if len(have) < count:
            raise UserError(f"only {len(have)} {split} performances of 2.5 to 15 minutes are here: "
                            "ask for fewer")
        order = rng.permutation(len(have))
        sides.append([have[i] for i in order[:count]])
    train, others = sides
    titles = {(p.composer, p.title) for p in train}
    return train, [p for p in others if (p.composer, p.title) not in titles]


def base_data(found, train: list, held_out: list, merge_pieces: int, folder: Path,
              ) -> tuple[Streams, Tokenizer]:
    """Base tokens of the chosen performances (held out: split "test") and of others to learn merges on."""
    chosen = {p.path for p in [*train, *held_out]}
    others = [p for p in found if p.split == "train" and p.path not in chosen]
    order = np.random.default_rng(1).permutation(len(others))
    wanted = max(0, merge_pieces - len(train))
    more = [others[i] for i in order[:wanted]]
    tests = [replace(p, split="test") for p in held_out]
    return build([*train, *more, *tests], TokenConfig(vocab_size=None), Augmentation(copies=0),
                 folder=folder, progress=False, say=note)


def data_of(arm: Arm, base: Streams, tokenizer: Tokenizer, train: set[str]) -> Streams:
    """The arm's streams: those of the `train` performances, by file name, and of the held-out ones.

    Where the arm trains on chunks, those that are left for its own validation are split "validation".
    """
    mine = [p for p in base.pieces if p.name in train or p.split == "test"]
    if arm.vocab_size is None:
        return replace(base, pieces=mine)
    merged = Tokenizer(replace(tokenizer.config, vocab_size=arm.vocab_size))
    merged.learn([base.stream(p)[1:-1] for p in base.pieces if arm.leak or p.split == "train"])
    pieces, arrays, offset = [], [], 0
    for piece in mine:
        inside = merged.merge(base.stream(piece)[1:-1])
        ids = np.concatenate([[merged.bos], inside, [merged.eos]]).astype(np.uint16)
        pieces.append(replace(piece, offset=offset, length=len(ids)))
        arrays.append(ids)
        offset += len(ids)
    tokens = np.concatenate(arrays)
    streams = Streams(tokens, pieces, merged.vocab_size, int(merged.bos), {"id": arm.name})
    if not arm.chunks:
        return streams
    parts = chunks(streams, merged, streams.select("train"), CHUNK, OVERLAP)
    return replace(streams, pieces=[*parts, *streams.select("test")])


def run(arm: Arm, streams: Streams, notes: int, passes: int, folder: Path) -> dict:
    """Train one arm, `notes` a pass; after each: training loss, its own validation, and the held-out performances."""
    train, test = streams.select("train"), streams.select("test")
    own = streams.select("validation")
    rate = sum(p.length for p in train) / sum(p.notes for p in train)  # tokens a note
    config = replace(BASE, **arm.config)
    each = max(1, round(notes * rate / (config.batch * config.length)))  # steps a pass
    config = replace(config, steps=each * passes)
    trainer = Trainer(streams, config, folder, device="cpu", say=note)
    curve = []
    for number in range(1, passes + 1):
        losses = [trainer.train_step() for _ in range(each)]
        row = {"train": float(np.mean(losses)) * rate,
               "own_validation": bits_per_note(trainer.model, streams, own) if own else None,
               "held_out": bits_per_note(trainer.model, streams, test)}
        curve.append({"pass": number, **row})
        said = ", ".join(f"{name} {bits:.2f}" for name, bits in row.items() if bits is not None)
        note(f"{arm.name}, pass {number}: {said}")
    best = min(curve, key=lambda row: row["held_out"])
    return {"name": arm.name, "change": arm.change, "parameters": trainer.model.parameter_count(),
            "vocabulary": streams.vocab_size, "tokens_a_note": rate, "steps": trainer.step,
            "curve": curve, "final": curve[-1]["held_out"], "best": best["held_out"],
            "best_pass": best["pass"], "baselines": counting_baselines(streams, test)}


def main(argv: list[str] | None = None) -> None:
    """Train the arms one after another and write what each repair gains."""
    parser = argparse.ArgumentParser(prog="python -m lib.lab.bench overfit", description=main.__doc__)
    parser.add_argument("--pieces", type=int, default=4, help="performances to train on (%(default)s)")
    parser.add_argument("--held-out", type=int, default=3, help="performances to measure on (%(default)s)")
    parser.add_argument("--merge-pieces", type=int, default=100, help="performances to learn merges on (%(default)s)")
    parser.add_argument("--passes", type=int, default=12, help="times each note is read (%(default)s)")
    parser.add_argument("--output", type=Path, default=env.RESULTS / "overfit.json")
    args = parser.parse_args(argv)
    if min(args.pieces, args.held_out, args.passes) < 1:
        raise UserError("--pieces, --held-out and --passes are numbers: give at least 1 of each")
    found = performances(say=note)
    train, held_out = choose(found, args.pieces, args.held_out)
    with tempfile.TemporaryDirectory() as work:
        base, tokenizer = base_data(found, train, held_out, args.merge_pieces, Path(work))
        names = {p.path.name for p in train}
        notes = sum(p.notes for p in base.pieces if p.name in names)
        result = {"pieces": len(train), "held_out": len(held_out), "notes": notes, "passes": args.passes,
                  "merge_pieces": len(base.select("train")), "chunk": CHUNK, "overlap": OVERLAP, "arms": [],
                  **env.provenance(f"python -m lib.lab.bench overfit --pieces {args.pieces} --held-out {args.held_out} "
                                   f"--merge-pieces {args.merge_pieces} --passes {args.passes}")}
        for number, arm in enumerate(ARMS):
            streams = data_of(arm, base, tokenizer, names)
            result["arms"].append(run(arm, streams, notes, args.passes, Path(work) / f"run{number}"))
            write_json(args.output, result)
    for arm in result["arms"]:
        print(f"{arm['name']:<20} best {arm['best']:.2f} (pass {arm['best_pass']}), "
              f"at the end {arm['final']:.2f} bits a note")
