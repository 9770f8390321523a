"""How good is what was played, to measures and to listeners?

python -m lib.lab.judge DIR                     beside real test pieces and beside noise
python -m lib.lab.judge bits DIR                bits a note of its files by the model
python -m lib.lab.judge page --group NAME=DIR   a page for listeners to compare two groups or more
python -m lib.lab.judge --ratings FILE          what they preferred
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from lib.env.errors import UserError
from lib.env.files import atomic_write, write_json


def read_folder(folder: Path, seconds: float | None) -> tuple[dict[str, np.ndarray], float]:
    """The openings of a folder's MIDI files, and their length: at most a minute, at most the
    median piece. Files that are shorter are left out, which is said.
    """
    from lib.music.library import opening
    from lib.music.notes import read_midi, sustain

    paths = sorted(p for p in folder.glob("*") if p.suffix.lower() in (".mid", ".midi"))
    if len(paths) < 2:
        raise UserError(
            f"{folder} holds {len(paths)} MIDI files: play two or more into it "
            "with python -m lib.generate"
        )
    pieces = {path.name: sustain(read_midi(path)).notes for path in paths}
    lasts = {name: notes["end"].max() - notes["start"][0] for name, notes in pieces.items()}
    if seconds is None:
        seconds = min(60.0, float(np.floor(np.median(list(lasts.values())))))
    if not 10 <= seconds <= 600:
        raise UserError(f"{seconds:g} seconds of each piece are outside 10 to 600: choose another")
    short = [name for name, length in lasts.items() if length < seconds]
    if len(pieces) - len(short) < 2:
        raise UserError(f"fewer than two files last {seconds:g} seconds: give less with --seconds")
    if short:
        print(f"left out, shorter than {seconds:g} seconds: {', '.join(short)}")
    found = {name: opening(notes, seconds) for name, notes in pieces.items() if name not in short}
    return found, seconds


def name_of(folder: Path) -> str:
    """What a folder's pieces are called beside the anchors."""
    name = folder.resolve().name
    return f"{name} (yours)" if name in ("", "real", "noise") else name


def main(argv: list[str] | None = None) -> None:
    """Set the MIDI files of a folder beside real test pieces and beside noise;
    or analyse listeners' ratings.
    """
    from lib.generate.player import MODEL
    from lib.lab.judge import anchors, bits, listening_page
    from lib.music.maestro import performances
    from lib.music.tokens import Tokenizer
    from lib.show import plots

    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["page"]:
        listening_page.main(words[1:])
        return
    if words[:1] == ["bits"]:
        bits.main(words[1:])
        return
    parser = argparse.ArgumentParser(
        prog="python -m lib.lab.judge",
        description=main.__doc__,
        epilog="python -m lib.lab.judge bits --help: bits a note by the model; "
        "python -m lib.lab.judge page --help: a page for listeners",
    )
    parser.add_argument("folder", nargs="?", type=Path, help="folder of MIDI files")
    parser.add_argument(
        "--seconds", type=float, help="of each piece (default: the median piece, at most 60)"
    )
    parser.add_argument(
        "--model", type=Path, default=MODEL, help="whose tokenizer the anchors pass through"
    )
    parser.add_argument(
        "--quick", action="store_true", help="compare with the ten sample pieces only"
    )
    parser.add_argument(
        "--ratings", nargs="+", type=Path, help="files that the listening page exported"
    )
    args = parser.parse_args(words)
    if args.ratings:
        print(
            listening_page.report(listening_page.analyse(listening_page.read_ratings(args.ratings)))
        )
        return
    if args.folder is None:
        parser.error("give a folder of MIDI files, or --ratings")
    if not args.folder.is_dir():
        raise UserError(f"there is no folder {args.folder}: check the name")
    pieces, seconds = read_folder(args.folder, args.seconds)
    anchor = anchors.anchors(performances(quick=args.quick), Tokenizer.load(args.model), seconds)
    result = anchors.compare(anchor, {name_of(args.folder): list(pieces.values())})
    write_json(args.folder / "evaluation.json", result)
    with atomic_write(args.folder / "evaluation.png") as part:
        part.write_bytes(plots.png_bytes(anchors.plot(result)))
    print(anchors.table(result))
    print(f"\n{args.folder}: evaluation.json, evaluation.png")


if __name__ == "__main__":
    from lib.env.errors import cli

    cli(main)
