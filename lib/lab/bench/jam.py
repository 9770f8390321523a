"""How soon does the partner come in? `python -m lib.lab.bench jam`.

Openings of validation pieces are played at it as if by hand, in real time; it takes over after two
seconds of silence in one half of the rounds and by the pedal, in the midst of the music, in the
other. Writes data/results/jam.json.
"""

import argparse
import time
from collections import deque
from pathlib import Path
from statistics import median

from lib.env import machine as env
from lib.env.errors import UserError
from lib.env.files import write_json
from lib.generate.jam import SOFT, Clock, File, Partner, session
from lib.generate.player import load_model
from lib.music.maestro import performances
from lib.music.notes import Music, crop, read_midi

LISTENS = 5.0  # seconds
PLAYS = 1.0


def takeover(model, tokenizer, music: Music, *, pedal: bool, seed: int) -> float:
    """Seconds from one takeover to its first note."""
    from mido import Message

    clock = Clock()
    partner = Partner(model, tokenizer, lambda pitch, velocity: None, clock, seed=seed)
    first = float(music.notes["start"].min())
    heard = crop(music, first, first + LISTENS)
    clock.start()
    hand = File(heard, clock)
    if pedal:
        events = [*hand.left, (LISTENS, Message("control_change", control=SOFT, value=127))]
        hand.left = deque(sorted(events, key=lambda event: event[0]))
    until = LISTENS + PLAYS if pedal else heard.seconds + partner.silence + PLAYS
    session(partner, hand.messages, pause=time.sleep, until=until, say=lambda text: None)
    if not partner.delays:
        raise UserError("the partner did not come in: is the machine too busy to keep time?")
    return partner.delays[0]


def main(argv: list[str] | None = None) -> None:
    """Measure the time from a takeover to the first note."""
    parser = argparse.ArgumentParser(prog="python -m lib.lab.bench jam", description=main.__doc__)
    parser.add_argument("--rounds", type=int, default=12, help="takeovers (%(default)s)")
    parser.add_argument("--output", type=Path, default=env.RESULTS / "jam.json")
    args = parser.parse_args(argv)
    model, tokenizer = load_model()
    pieces = [p for p in performances(say=lambda text: None) if p.split == "validation"]
    rows = []
    for number in range(args.rounds):
        piece = pieces[number % len(pieces)]
        pedal = number % 2 == 1
        delay = takeover(model, tokenizer, read_midi(piece.path), pedal=pedal, seed=number)
        rows.append(
            {
                "piece": piece.path.name,
                "by": "pedal" if pedal else "silence",
                "ms": round(1e3 * delay, 1),
            }
        )
        print(f"{rows[-1]['by']}: first note after {rows[-1]['ms']} ms", flush=True)
    times = [row["ms"] for row in rows]
    result = {
        "median_ms": median(times),
        "most_ms": max(times),
        "rounds": rows,
        **env.provenance("python -m lib.lab.bench jam"),
    }
    write_json(args.output, result)
    print(
        f"first note after {result['median_ms']:.0f} ms in the median, "
        f"{result['most_ms']:.0f} at most"
    )
