"""The three rungs for a model, from the shell: `python -m lib.lab.bench rungs`."""

import argparse
import tempfile
from pathlib import Path

import numpy as np

from lib.env.errors import UserError
from lib.train.bits import counting_baselines
from lib.train.config import PRESETS
from lib.train.rungs import HEART, climb
from lib.train.trainer import Trainer


def main(argv: list[str] | None = None) -> None:
    """Climb the three rungs with the course's Mamba,
    or with another architecture of lib.lab.rivals.matched.
    """
    from lib.lab.rivals import matched
    from lib.music.encode import build
    from lib.music.maestro import performances

    parser = argparse.ArgumentParser(prog="python -m lib.lab.bench rungs", description=main.__doc__)
    parser.add_argument("--arch", default="mamba", choices=matched.ARCHS)
    parser.add_argument(
        "--count", type=int, default=2000, help="rung 1: the sequence 0 … COUNT - 1 (%(default)s)"
    )
    parser.add_argument(
        "--tokens", type=int, default=1000, help="rung 2: of the first piece so many (%(default)s)"
    )
    parser.add_argument("--preset", choices=PRESETS, default="quick", help="rung 3 (%(default)s)")
    args = parser.parse_args(argv)
    if not 2 <= args.count <= 65_535 or args.tokens < 2:
        raise UserError("--count takes 2 to 65535, --tokens 2 or more")

    def maker(vocab, config):
        size = matched.Size(config.d_model, config.n_layer, config.d_state, dropout=config.dropout)
        return lambda: matched.build(args.arch, vocab, size)

    streams, _ = build(performances(quick=args.preset == "quick"))
    piece = min(streams.select("train"), key=lambda p: p.length)
    with tempfile.TemporaryDirectory() as work:
        rungs = []
        for name, ids, vocab in (
            (f"1: the sequence 0 … {args.count - 1}", np.arange(args.count), args.count),
            ("2: one piece", streams.stream(piece)[: args.tokens], streams.vocab_size),
        ):
            rungs.append(climb(name, ids, vocab, Path(work) / name[0], build=maker(vocab, HEART)))
            print(
                f"rung {name}: {'passed' if rungs[-1].passed else 'FAILED'}, {rungs[-1].said}",
                flush=True,
            )
        config = PRESETS[args.preset]
        trainer = Trainer(
            streams,
            config,
            Path(work) / "3",
            build=maker(streams.vocab_size, config),
            save=lambda model, folder: None,
        )
        trainer.run()
        floor = counting_baselines(streams, trainer.held_out)
        passed = trainer.best < floor["unigram"]
        print(
            f"rung 3: MAESTRO, preset {args.preset}: {'passed' if passed else 'FAILED'}, "
            f"validation {trainer.best:.2f} bits a note "
            f"(unigram {floor['unigram']:.2f}, bigram {floor['bigram']:.2f})"
        )
    if not (passed and all(rung.passed for rung in rungs)):
        raise UserError("this model does not climb: look for a bug before training it for longer")
