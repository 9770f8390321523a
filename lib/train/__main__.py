"""Train a Mamba: `python -m lib.train --preset NAME`, or with `torchrun` on many GPUs.

For example:
    python -m lib.train --preset laptop                                 learn from MAESTRO
    python -m lib.train --init data/model --midi FOLDER --minutes 10    go on with your own files
"""

import argparse
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from lib import mamba
from lib.env.errors import UserError, cli
from lib.env.paths import RUNS
from lib.music.encode import build
from lib.music.maestro import performances
from lib.music.streams import Streams
from lib.train import distributed, own_midi
from lib.train.config import PRESETS, add_options, given
from lib.train.cost import plan
from lib.train.optim import choose_precision
from lib.train.trainer import Trainer, check_folder


def main(argv: list[str] | None = None) -> None:
    """Train a Mamba on MAESTRO's token streams, or on a folder of MIDI files."""
    args = parse(argv)
    config = PRESETS[args.preset]
    if args.midi:
        config = own_midi.gentle(config)
    if args.init:  # its sizes, unless the command line names others, which the trainer then refuses
        sizes = mamba.load(args.init).config
        named = {name: getattr(sizes, name) for name in ("d_model", "n_layer", "d_state")}
        config = replace(config, **named)
    config = replace(config, **given(args))
    world, device = distributed.start(args.device)
    choose_precision(config.precision, device)
    folder = out_of(args)
    check_folder(folder, args.resume)
    try:
        with distributed.explain_lost_process(world):
            if not world.first:
                world.wait()  # the first process builds the streams
            streams = open_streams(args, say=print if world.first else lambda text: None)
            if world.first:
                world.wait()
            trainer = Trainer(
                streams, config, folder, device=args.device, resume=args.resume, init=args.init
            )
            if not trainer.finished:
                trainer.say(plan(trainer))
            with stopping_politely(trainer):
                if args.midi and trainer.step == 0:
                    trainer.validate()  # what it starts from is the first to beat
                trainer.run()
            if trainer.finished:
                trainer.say(
                    f"best validation: {trainer.best:.2f} bits a note, kept in {folder.name}/best"
                )
                if args.midi and world.first:
                    words = shlex.join(sys.argv[1:] if argv is None else argv)
                    own_midi.report(trainer, args.init, f"python -m lib.train {words}")
            else:
                trainer.say(f"stopped at step {trainer.step}: go on with --resume")
    finally:
        distributed.stop()


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line: where and from what, and an option for each choice of `TrainConfig`."""
    parser = argparse.ArgumentParser(prog="python -m lib.train", description=main.__doc__)
    add = parser.add_argument
    add(
        "--preset",
        choices=PRESETS,
        default="laptop",
        help="what is chosen where no option says otherwise (%(default)s)",
    )
    add(
        "--out",
        default=None,
        help="folder of the run (default: data/runs/PRESET, or the folder's name)",
    )
    add(
        "--streams",
        help="folder of token streams (default: built from what lib.music.maestro finds)",
    )
    add(
        "--midi",
        help="folder of MIDI files to learn from, with --init; what was gained and what "
        "was forgotten is measured at the end",
    )
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--init", help="a checkpoint folder whose weights the run starts from (data/model)")
    add("--device", help="cpu or cuda (default: cuda where there is one)")
    add_options(parser)
    args = parser.parse_args(argv)
    if args.midi and args.streams:
        raise UserError("--midi and --streams were given: name one of them to learn from")
    if args.midi and not args.init:
        raise UserError("--midi goes on from weights: add --init data/model, or another checkpoint")
    return args


def out_of(args) -> Path:
    """The folder of the run."""
    if args.out:
        return Path(args.out)
    return RUNS / (Path(args.midi).resolve().name if args.midi else args.preset)


def open_streams(args, say) -> Streams:
    """The streams that the command line names, of its folder of MIDI files, or MAESTRO's."""
    if args.streams:
        return Streams.load(args.streams)
    if args.midi:
        return own_midi.open_streams(args.midi, args.init, out_of(args), say)
    return build(performances(quick=args.preset == "quick", say=say), say=say)[0]


@contextmanager
def stopping_politely(trainer: Trainer) -> Iterator[None]:
    """Ctrl-C, and what torchrun or a cluster sends: finish the step, save, stop. Twice: at once."""

    def ask(number, frame):
        if trainer.stop_asked:
            raise KeyboardInterrupt
        trainer.stop_asked = True
        trainer.say("stopping after this step, with a checkpoint (once more: at once)")

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    cli(main)
