"""What both commands ask: the options that say how the model plays."""

import argparse
from pathlib import Path

from lib.env.errors import UserError
from lib.generate.player import MODEL
from lib.generate.sampling import Sampling


def add_playing_options(parser: argparse.ArgumentParser) -> None:
    """Seed, temperature, top-p, density and model."""
    add = parser.add_argument
    add("--seed", type=int, default=1, help="another seed, another piece (%(default)s)")
    add(
        "--temperature",
        type=float,
        default=1.0,
        help="below 1 safer, above 1 wilder; well below 1 pieces fall silent or stay on a few keys "
        "(%(default)s)",
    )
    add(
        "--top-p",
        type=float,
        default=Sampling.top_p,
        help="keep this much probability (%(default)s)",
    )
    add("--density", type=float, default=0.0, help="-3 to 3: fewer or more notes (%(default)s)")
    add(
        "--model",
        default=MODEL,
        type=Path,
        help="folder of a checkpoint (default: the shipped one)",
    )


def check_named(option: str, name: str | None) -> None:
    """Raise `UserError` for a name that is empty; None is an option that was not given."""
    if name == "":
        raise UserError(
            f"{option} names nothing (is a variable of your shell empty?): "
            f"give a name, or leave out {option}"
        )
