"""How well does a model foresee a folder of performances? `python -m lib.lab.judge bits FOLDER`.

Bits per note of whole files, on the tokens of the model, with an interval over files. They can be
set beside those of MAESTRO's test pieces where the recordings have the same kind of timing: a score
without rubato is easier.
"""

import argparse
from pathlib import Path

import numpy as np

from lib.env.errors import UserError
from lib.generate.player import MODEL, load_model
from lib.lab.judge.likelihood import with_interval
from lib.music.folder import gather
from lib.train.bits import held_out, piece_bits


def bits_of(folder: Path, model, tokenizer, say=print) -> dict:
    """Bits per note of every file of a folder,
    and of all together with a 95 % interval over files.
    """
    found = gather(folder, say)
    if not found:
        raise UserError(
            f"no MIDI file in {folder} has enough notes to be measured: name another folder"
        )
    streams = held_out(tokenizer, [one.performance for one in found])
    bits = piece_bits(model, streams, streams.pieces)
    notes = np.array([piece.notes for piece in streams.pieces])
    names = [str(one.performance.path.relative_to(Path(folder).expanduser())) for one in found]
    together = with_interval(bits, notes)
    if len(notes) == 1:
        together["interval_95"] = None
    return {
        "files": dict(zip(names, (bits / notes).round(4).tolist(), strict=True)),
        "notes": int(notes.sum()),
        **together,
    }


def main(argv: list[str]) -> None:
    """Say how many bits a note a model needs for the MIDI files of a folder."""
    parser = argparse.ArgumentParser(prog="python -m lib.lab.judge bits", description=main.__doc__)
    parser.add_argument("folder", type=Path, help="folder of MIDI files")
    parser.add_argument(
        "--model",
        type=Path,
        default=MODEL,
        help="folder of a checkpoint (default: the shipped one)",
    )
    args = parser.parse_args(argv)
    found = bits_of(args.folder, *load_model(args.model))
    for name, bits in sorted(found["files"].items(), key=lambda item: item[1]):
        print(f"{bits:7.2f}  {name}")
    spread = "one file, no interval"
    if found["interval_95"]:
        low, high = found["interval_95"]
        spread = f"95 % over files: {low:.2f} to {high:.2f}"
    print(f"{found['bits_per_note']:7.2f}  bits a note, {found['notes']:,} notes in all ({spread})")
