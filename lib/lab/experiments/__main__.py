"""The experiments from the shell: `python -m lib.lab.experiments`."""

import argparse
import math
import os
import shutil
from importlib import import_module
from pathlib import Path

import torch

from lib.env.errors import UserError, cli
from lib.lab.experiments.protocol import SCALES
from lib.lab.experiments.runner import PARTS, RUNS, Lab
from lib.lab.experiments.runs import OutOfTime


def main(argv: list[str] | None = None) -> None:
    """Run the experiments, or go on with them."""
    parser = argparse.ArgumentParser(prog="python -m lib.lab.experiments", description=main.__doc__)
    parser.add_argument(
        "--only", action="append", choices=PARTS, help="a part (default: all; may be given again)"
    )
    parser.add_argument(
        "--budget-minutes",
        type=float,
        default=math.inf,
        help="stop after so long, with everything kept",
    )
    parser.add_argument(
        "--quick", action="store_true", help="ten pieces and tiny models: seconds, and no meaning"
    )
    parser.add_argument(
        "--scale", choices=SCALES, help="how large (default: gpu where there is one, else cpu)"
    )
    parser.add_argument(
        "--folder", type=Path, help="where the runs live (default: data/runs/experiments/SCALE)"
    )
    parser.add_argument(
        "--streams",
        type=Path,
        help="base token streams that were built elsewhere (default: built here)",
    )
    parser.add_argument(
        "--kept",
        type=Path,
        help="where the figures of runs that have ended are kept, small files "
        "that another machine goes on from (default: kept in the folder of the runs)",
    )
    parser.add_argument("--results", type=Path, help="where the results go (default: data/results)")
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        help="runs side by side, each on its share of the cores (default 1)",
    )
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument(
        "--restart",
        action="store_true",
        help="throw the runs and results of a quick run away first",
    )
    args = parser.parse_args(argv)
    if not args.budget_minutes > 0:
        raise UserError("--budget-minutes must be above 0: give the minutes that there are")
    if not 1 <= args.jobs <= (os.cpu_count() or 1):
        raise UserError(f"--jobs {args.jobs} makes no sense here: give 1 to {os.cpu_count()}")
    scale = "quick" if args.quick else args.scale or ("gpu" if torch.cuda.is_available() else "cpu")
    folder = args.folder or RUNS / scale
    if args.restart:
        if scale != "quick":
            raise UserError(
                "--restart throws work away and is for --quick only: "
                "delete what should be measured again"
            )
        shutil.rmtree(folder, ignore_errors=True)
    if scale == "quick":
        torch.set_num_threads(1)  # models this small only wait for one another's threads
    lab = Lab(
        SCALES[scale],
        folder,
        minutes=args.budget_minutes,
        device=args.device,
        jobs=args.jobs,
        results=args.results,
        base=args.streams,
        kept=args.kept,
    )
    for part in args.only or PARTS:
        module = import_module(PARTS[part])
        try:
            result = module.run(lab)
        except OutOfTime:
            print(
                f"the {args.budget_minutes:g} minutes are used up in {part!r}: "
                "the same command goes on from here"
            )
            return
        print(f"\n{part}: {lab.path(part).name}\n{module.table(result)}\n")


if __name__ == "__main__":
    cli(main)
