"""Go on learning from a folder of your own MIDI files: `python -m lib.train --init … --midi …`.

The files are split by their content (`lib.music.folder`) and become the same notes and tokens as
MAESTRO's. The weights are chosen by the folder's validation files, the first ones included, so that
a run which does not help leaves them as they were. What was gained is measured on its test files,
and what was forgotten on pieces of MAESTRO.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

from lib import mamba
from lib.env.errors import UserError
from lib.env.files import atomic_write, write_json, write_text
from lib.env.machine import provenance
from lib.mamba.model import MambaLM
from lib.music.encode import build
from lib.music.folder import key_steps, read_folder, shingles, together
from lib.music.maestro import performances
from lib.music.streams import Piece, Streams
from lib.music.tokens import Tokenizer
from lib.train.bits import held_out, interval, piece_bits
from lib.train.config import TrainConfig
from lib.train.warm_start import TOKENIZER_FILES

# what suits weights that know much already, where the command line says nothing else
GENTLE = {
    "minutes": 10.0,
    "lr": 5e-4,
    "warmup": 0.05,
    "dropout": 0.1,
    "eval_every": 100,
    "save_every": 100,
}
MAESTRO_PIECES = 12  # that tell what was forgotten
FEWEST_PIECES = 5  # that an interval over pieces can be drawn from
FACTS = "own_midi.json"

CARD = """# Model card: {title}

A Mamba language model of {params:,} parameters that went on learning from a folder of MIDI files,
{minutes:.1f} minutes ({steps:,} steps, {device}), from the weights in `{init}`.

| bits per note, whole pieces | before | after | difference (95 % interval over different pieces) |
|---|---|---|---|
{rows}

The files were split by a hash of their content: {train} to learn from, {validation} by which the
weights were chosen, {test} by which they are measured. Near copies (transposed, in another tempo,
with a few other notes) are on one side. `{facts}` lists every file with its side.

Play it: `python -m lib.generate --model {folder}`

What the weights may be used for hangs on what they were made from: the shipped model carries
MAESTRO's licence, CC BY-NC-SA 4.0, and your files have terms of their own.
"""


def gentle(config: TrainConfig) -> TrainConfig:
    """The same choices, for weights that know much already."""
    return replace(config, **GENTLE | {"minutes": min(config.minutes, GENTLE["minutes"])})


def open_streams(folder: str | Path, init: str | Path, out: Path, say=print) -> Streams:
    """The token streams of a folder of MIDI files, in the words of the weights it starts from.

    They are kept in the run's own folder. Raises `UserError` for a folder that cannot be used.
    """
    tokenizer = Tokenizer.load(init)
    found = read_folder(folder, say)
    streams = build(found, tokenizer=tokenizer, folder=out, say=say)[0]
    for name in TOKENIZER_FILES:  # to the byte: MidiTok notes the versions of its libraries in them
        with atomic_write(streams.folder / name) as part:
            part.write_bytes((Path(init) / name).read_bytes())
    return streams


def before_and_after(
    before: MambaLM, after: MambaLM, streams: Streams, pieces: list[Piece], tokenizer: Tokenizer
) -> dict:
    """Bits per note of whole pieces by both models, and the difference with its interval.

    The interval draws groups of near copies: two recordings of one piece are no two pieces.
    """
    notes = np.array([p.notes for p in pieces])
    was = piece_bits(before, streams, pieces)
    now = piece_bits(after, streams, pieces)
    groups = groups_of_copies(streams, pieces, tokenizer)
    different = int(groups.max()) + 1
    result = {"files": len(pieces), "pieces": different, "notes": int(notes.sum())}
    result["before"] = float(was.sum() / notes.sum())
    result["after"] = float(now.sum() / notes.sum())
    result["difference"] = result["after"] - result["before"]
    enough = different >= FEWEST_PIECES
    result["interval_95"] = (
        interval(np.bincount(groups, now - was), np.bincount(groups, notes)) if enough else None
    )
    return result


def groups_of_copies(streams: Streams, pieces: list[Piece], tokenizer: Tokenizer) -> np.ndarray:
    """The group of each piece, int of shape (pieces,): near copies share one."""
    music = (tokenizer.decode(streams.stream(piece)) for piece in pieces)
    return together([shingles(key_steps(one.notes)) for one in music])


def maestro_pieces(tokenizer, say=print) -> Streams | None:
    """Some of MAESTRO's validation pieces, or None where there is no MAESTRO.

    Of its sample they are what is not for training.
    """
    try:
        found = performances(download=False, say=say)
    except UserError as error:
        say(f"what is forgotten of MAESTRO is not measured: {error}")
        return None
    pieces = [p for p in found if p.split == "validation"] or [
        p for p in found if p.split == "test"
    ]
    chosen = np.random.default_rng(7).permutation(len(pieces))[:MAESTRO_PIECES]
    return held_out(tokenizer, [pieces[i] for i in sorted(chosen)])


def measure(
    before: MambaLM, after: MambaLM, streams: Streams, maestro: Streams | None, tokenizer: Tokenizer
) -> dict:
    """What was gained on the folder's test files, and what became of MAESTRO."""
    result = {"folder": before_and_after(before, after, streams, streams.select("test"), tokenizer)}
    if maestro:
        result["maestro"] = before_and_after(before, after, maestro, maestro.pieces, tokenizer)
    return result


def report(trainer, init: str | Path, command: str, say=print) -> dict:
    """Measure a finished run, write card and facts beside the best weights, and say both."""
    best = trainer.folder / "best"
    tokenizer = Tokenizer.load(best)
    maestro = maestro_pieces(tokenizer, say)
    say("measuring the weights before and after")
    after = mamba.load(best, trainer.device)
    result = measure(mamba.load(init, trainer.device), after, trainer.streams, maestro, tokenizer)
    pieces = trainer.streams.select
    result["files"] = {
        split: [p.title for p in pieces(split)] for split in ("train", "validation", "test")
    }
    result |= {"steps": trainer.step, "minutes": trainer.seconds / 60, "init": str(init)}
    result |= provenance(command, seed=trainer.config.seed)
    write_json(best / FACTS, result)
    write_text(best / "README.md", card(result, best, after.parameter_count()))
    for line in lines(result):
        say(line)
    say(f"the model, its card and these figures are in {best}")
    return result


def card(result: dict, folder: Path, params: int) -> str:
    """The model card of a measured run."""
    names = {"folder": "held-out files of the folder", "maestro": "held-out pieces of MAESTRO"}
    rows = []
    for key, name in names.items():
        if key in result:
            found = result[key]
            rows.append(
                f"| {name} ({held_out_in_words(found)}) | {found['before']:.2f} | "
                f"{found['after']:.2f} | {change(found)} |"
            )
        else:
            rows.append(f"| {name} | not measured | not measured | |")
    counts = {split: len(files) for split, files in result["files"].items()}
    return CARD.format(
        title=folder.parent.name,
        params=params,
        rows="\n".join(rows),
        facts=FACTS,
        folder=folder,
        **counts,
        **{key: result[key] for key in ("minutes", "steps", "device", "init")},
    )


def change(found: dict) -> str:
    """A difference with its interval, in words."""
    if found["interval_95"] is None:
        return f"{found['difference']:+.2f} (too few pieces for an interval)"
    low, high = found["interval_95"]
    return f"{found['difference']:+.2f} ({low:+.2f} to {high:+.2f})"


def held_out_in_words(found: dict) -> str:
    """How many files were measured, and how many pieces they are."""
    return f"files: {found['files']}, different pieces: {found['pieces']}"


def lines(result: dict) -> list[str]:
    """What a run has brought, a sentence a measure."""
    own = result["folder"]
    said = [
        f"held-out files of the folder: {own['before']:.2f} bits a note before, "
        f"{own['after']:.2f} after: {change(own)}, {held_out_in_words(own)}"
    ]
    if "maestro" in result:
        other = result["maestro"]
        said.append(
            f"held-out pieces of MAESTRO: {other['before']:.2f} before, "
            f"{other['after']:.2f} after: {change(other)}, {held_out_in_words(other)}"
        )
    return said
