"""Measurements that the course quotes: `python -m lib.lab.bench NAME`.

Each writes data/results/NAME.json with the device, the versions, the command and the seed.
"""

import sys
from importlib import import_module

from lib.env.errors import UserError, cli

SURVEYS = {  # name: the module whose main(argv) measures it
    "tokens": "lib.lab.bench.tokens", "scan": "lib.lab.bench.scan", "generate": "lib.lab.bench.generate",
    "train": "lib.lab.bench.train",
    "overfit": "lib.lab.bench.overfit", "interruptions": "lib.lab.bench.interruptions"}


def main(argv: list[str] | None = None) -> None:
    """Run the measurement that the first argument names; the others are its own."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    if name not in SURVEYS:
        raise UserError(f"python -m lib.lab.bench measures one of: {', '.join(SURVEYS)}; add --help after it "
                        "for its options")
    import_module(SURVEYS[name]).main(rest)


if __name__ == "__main__":
    cli(main)
