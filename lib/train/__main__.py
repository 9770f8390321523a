"""Train a Mamba: `python -m lib.train --preset NAME`, or with `torchrun` on many GPUs."""

import argparse
import signal
from dataclasses import replace
from pathlib import Path

from lib import mamba
from lib.env.paths import RUNS
from lib.music.streams import Streams
from lib.train import distributed
from lib.train.config import PRESETS, add_options, given
from lib.train.trainer import Trainer


def main(argv: list[str] | None = None) -> None:
    """Train a Mamba on MAESTRO's token streams."""
    from lib.train.cost import plan

    args = parse(argv)
    config = replace(PRESETS[args.preset], **given(args))
    if args.init:  # its sizes, unless the command line names others, which the trainer then refuses
        sizes = mamba.load(args.init).config
        named = {name: getattr(sizes, name) for name in ("d_model", "n_layer", "d_state")}
        config = replace(config, **named | given(args))
    world, _ = distributed.start(args.device)
    try:
        with distributed.together(world):
            if not world.first:
                world.wait()  # the first process builds the streams
            streams = open_streams(args, say=print if world.first else lambda text: None)
            if world.first:
                world.wait()
            folder = Path(args.out or RUNS / args.preset)
            trainer = Trainer(streams, config, folder, device=args.device, resume=args.resume,
                              init=args.init)
            if not trainer.finished:
                trainer.say(plan(trainer))
            stop_politely(trainer)
            trainer.run()
            if trainer.finished:
                trainer.say(f"best validation: {trainer.best:.2f} bits a note, kept in "
                            f"{folder.name}/best")
            else:
                trainer.say(f"stopped at step {trainer.step}: go on with --resume")
    finally:
        distributed.stop()


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line: where and from what, and an option for each choice of `TrainConfig`."""
    parser = argparse.ArgumentParser(prog="python -m lib.train", description=main.__doc__)
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="laptop")
    add("--out", default=None, help="folder of the run (default: data/runs/PRESET)")
    add("--streams",
        help="folder of token streams (default: built from what lib.music.maestro finds)")
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--init", help="a checkpoint folder whose weights the run starts from")
    add("--device", help="cpu or cuda (default: cuda where there is one)")
    add_options(parser)
    return parser.parse_args(argv)


def open_streams(args, say) -> Streams:
    """The streams that the command line names, or MAESTRO's."""
    if args.streams:
        return Streams.load(args.streams)
    from lib.music.encode import build
    from lib.music.maestro import performances

    return build(performances(quick=args.preset == "quick", say=say), say=say)[0]


def stop_politely(trainer: Trainer) -> None:
    """Ctrl-C, and what torchrun or a cluster sends: finish the step, save, stop. Twice: at once."""
    def ask(number, frame):
        if trainer.stop_asked:
            raise KeyboardInterrupt
        trainer.stop_asked = True
        trainer.say("stopping after this step, with a checkpoint (once more: at once)")

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, ask)


if __name__ == "__main__":
    from lib.env.errors import cli

    cli(main)
