"""What keeps the README, the notebooks and a workshop's bundle in step.

python -m lib.lab.pages stamp             write results and addresses into README and notebooks
python -m lib.lab.pages lone 00 07        notebooks alone in fresh environments, to the first sound
python -m lib.lab.pages teaching FOLDER   notebooks as pages, exercises without solutions, decks
python -m lib.lab.pages workshop FOLDER   make, finish, check what a room without a network needs
"""

import argparse
from pathlib import Path

from lib.env.errors import cli
from lib.env.machine import check_python


def main(argv: list[str] | None = None) -> None:
    """Do the errand that the first word names."""
    parser = argparse.ArgumentParser(
        prog="python -m lib.lab.pages", description=__doc__.splitlines()[0]
    )
    errands = parser.add_subparsers(dest="errand", required=True)
    errands.add_parser("stamp", help="write results and addresses into README.md and the notebooks")
    lone = errands.add_parser(
        "lone", help="run lone notebooks in fresh environments up to their first sound"
    )
    lone.add_argument("names", nargs="*", metavar="NN", help="such as 00 07 (default: all)")
    teaching = errands.add_parser(
        "teaching", help="write what a teacher carries, for the day when nothing works"
    )
    teaching.add_argument("folder", nargs="?", type=Path, default=Path("out/teaching"))
    workshop = errands.add_parser(
        "workshop", help="make or finish a bundle for a room without a network, and check it"
    )
    workshop.add_argument("folder", nargs="?", type=Path, default=Path("workshop"))
    workshop.add_argument("--check", action="store_true", help="check only, fetch nothing")
    given = parser.parse_args(argv)
    check_python()
    if given.errand == "stamp":
        from lib.lab.pages.stamp import stamp

        stamp()
    elif given.errand == "lone":
        from lib.lab.pages.lone import main as lone_notebooks

        lone_notebooks(given.names)
    elif given.errand == "teaching":
        from lib.lab.pages.teaching import main as write_teaching

        write_teaching(given.folder)
    else:
        from lib.lab.pages.workshop import main as make_workshop

        make_workshop(given.folder, check_only=given.check)


if __name__ == "__main__":
    cli(main)
