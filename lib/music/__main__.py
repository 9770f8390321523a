"""MAESTRO from the shell.

There are two commands:
    python -m lib.music [FOLDER] [--quick] [--no-download]    find or fetch it, print what is in it
    python -m lib.music encode [FOLDER] [OPTIONS]             build its token streams
"""

import argparse
import sys

from lib.env.errors import cli
from lib.music import encode
from lib.music.maestro import performances, summary


def main(argv: list[str] | None = None) -> None:
    """The command line: find or fetch MAESTRO and print what is in it, or encode it."""
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["encode"]:
        encode.main(words[1:])
        return
    parser = argparse.ArgumentParser(
        "python -m lib.music",
        description="Find or fetch MAESTRO.",
        epilog="python -m lib.music encode --help: token streams",
    )
    parser.add_argument("folder", nargs="?", help="MAESTRO's folder or MIDI zip (else MAESTRO_DIR)")
    parser.add_argument("--quick", action="store_true", help="ten real performances only")
    parser.add_argument("--no-download", action="store_true", help="use only what is on the disk")
    args = parser.parse_args(words)
    print(summary(performances(args.folder, quick=args.quick, download=not args.no_download)))


if __name__ == "__main__":
    cli(main)
