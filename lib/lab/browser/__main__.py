"""Build the page that plays: `python -m lib.lab.browser`."""

import argparse
from pathlib import Path

from lib.env.errors import UserError
from lib.lab.browser.build import PAGE, build, stale


def main(argv: list[str] | None = None) -> None:
    """Build data/play.html, the shipped model in one page that plays in a browser."""
    parser = argparse.ArgumentParser(prog="python -m lib.lab.browser", description=main.__doc__)
    parser.add_argument("--out", type=Path, default=PAGE, help="(%(default)s)")
    parser.add_argument("--check", action="store_true", help="only say whether the page is stale")
    args = parser.parse_args(argv)
    if args.check:
        if stale(args.out):
            raise UserError(f"{args.out} is stale: run python -m lib.lab.browser")
        print(f"{args.out} is up to date")
        return
    print(f"{args.out}: {build(args.out) / 1e6:.1f} MB")


if __name__ == "__main__":
    from lib.env.errors import cli

    cli(main)
