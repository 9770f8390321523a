"""Measurements that the course quotes: `python -m lib.lab.bench NAME`.

Those that the course quotes write a file in data/results, with the device, the versions,
the command and the seed; `rungs` and `triton` print only.
"""

import sys
from importlib import import_module

from lib.env.errors import UserError, cli

SURVEYS = {  # name: the module whose main(argv) measures it
    "curves": "lib.lab.bench.curves",
    "generate": "lib.lab.bench.generate",
    "interruptions": "lib.lab.bench.interruptions",
    "jam": "lib.lab.bench.jam",
    "ladder": "lib.lab.bench.ladder",
    "playing": "lib.lab.bench.playing",
    "rungs": "lib.lab.bench.rungs",
    "scan": "lib.lab.bench.scan",
    "ssd": "lib.lab.bench.ssd",
    "tokens": "lib.lab.bench.tokens",
    "train": "lib.lab.bench.train",
    "triton": "lib.lab.bench.triton_cost",
}


def main(argv: list[str] | None = None) -> None:
    """Run the measurement that the first argument names; the others are its own."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    if name not in SURVEYS:
        raise UserError(
            f"python -m lib.lab.bench measures one of: {', '.join(SURVEYS)}; "
            "add --help after it for its options"
        )
    import_module(SURVEYS[name]).main(rest)


if __name__ == "__main__":
    cli(main)
