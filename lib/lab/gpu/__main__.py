"""The GPU hour: `python -m lib.lab.gpu plan`, `pack` at home, `run` where the GPU is.

    python -m lib.lab.gpu pack                    at home: data/gpu/in1, in2, … to carry over
    python -m lib.lab.gpu run --minutes 9.5       there, again and again until all is done
    python -m lib.lab.gpu run --tiny              a rehearsal without a GPU, in two minutes

`run` needs nothing but Python to begin with. Each step is a process of its own with its own limit
of time, and is written down when it ends; what is done is not done again.
"""

import argparse
from pathlib import Path

from lib.env.errors import UserError, cli
from lib.env.paths import DATA
from lib.lab.gpu import hour, plan

FOLDER = DATA / "gpu"


def main(argv: list[str] | None = None) -> None:
    """Prepare, run or show the GPU hour."""
    args = _parse(argv)
    if args.what == "plan":
        print(plan.table())
    elif args.what == "pack":
        from lib.lab.gpu import pack

        for line in pack.pack(args.folder, args.streams, args.part_mib, wheels=args.wheels):
            print(line)
    elif args.what == "step":
        from lib.lab.gpu import steps

        steps.take(args.name, hour.Hour(args.folder, args.out, args.tiny), args.minutes)
    elif not hour.run(hour.Hour(args.folder, args.out, args.tiny), args.minutes, set(args.again)):
        print("not all is done: the same command goes on")


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m lib.lab.gpu", description=main.__doc__)
    commands = parser.add_subparsers(dest="what", required=True)
    commands.add_parser("plan", help="the steps, their minutes and what they need")
    packing = commands.add_parser("pack", help="at home: make what is carried over")
    packing.add_argument("--streams", type=Path, help="base token streams (default: MAESTRO's)")
    packing.add_argument("--part-mib", type=float, default=11, help="size of a part (default 11)")
    packing.add_argument(
        "--wheels",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also the packages that a bare machine lacks, and mamba-ssm's sources",
    )
    running = commands.add_parser("run", help="there: all steps, as far as the minutes go")
    running.add_argument("--again", action="append", default=[], help="a step to take once more")
    one = commands.add_parser("step", help="one step, as `run` calls it")
    one.add_argument("name", choices=[step.name for step in plan.STEPS])
    for command in (packing, running, one):
        command.add_argument("--folder", type=Path, default=FOLDER, help="default: data/gpu")
    for command in (running, one):
        command.add_argument("--out", type=Path, help="what is carried back (default FOLDER/out)")
        command.add_argument("--minutes", type=float, default=9.5, help="that there are (9.5)")
        command.add_argument(
            "--tiny", action="store_true", help="a rehearsal: sizes without meaning"
        )
    args = parser.parse_args(argv)
    if getattr(args, "minutes", 1) <= 0:
        raise UserError("--minutes must be above 0: give the minutes that there are")
    for name in getattr(args, "again", ()):
        if name not in {step.name for step in plan.STEPS}:
            raise UserError(f"step {name!r} is unknown: python -m lib.lab.gpu plan lists them")
    return args


if __name__ == "__main__":
    cli(main)
