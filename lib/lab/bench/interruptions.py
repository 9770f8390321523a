"""Kill a training process at random moments, again and again:
`python -m lib.lab.bench interruptions`.

Each life is a process of its own, killed with SIGKILL, which no program can catch. After each, the
files that it left are opened; the next life goes on from them. In the end the weights must be, bit
for bit, those of a run that was never killed. Writes data/results/interruptions.json.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from lib.env import machine as env
from lib.env.errors import UserError
from lib.env.files import write_json
from lib.lab.bench.timing import note
from lib.mamba import checkpoint as mamba
from lib.music.streams import INDEX, TOKENS, Piece, Streams
from lib.train import checkpoints
from lib.train.config import TrainConfig
from lib.train.trainer import Trainer

CONFIG = TrainConfig(
    d_model=128,
    n_layer=2,
    d_state=8,
    dropout=0.1,
    batch=2,
    length=32,
    minutes=1e9,
    lr=5e-3,
    eval_every=15,
    eval_tokens=500,
    save_every=3,
)
MODULE = "lib.lab.bench.interruptions"  # this file, as a process of its own
STEPS_A_KILL = 18
# a model this small wants no more
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def store(streams: Streams, folder: Path, names: list[str] | None = None) -> Streams:
    """Write streams where `Streams.load` finds them, and open them there."""
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / TOKENS, streams.tokens)
    index = {
        "settings": streams.settings,
        "vocab_size": streams.vocab_size,
        "bos": streams.bos,
        "pieces": [asdict(p) for p in streams.pieces],
        "names": names,
    }
    (folder / INDEX).write_text(json.dumps(index))
    return Streams.load(folder)


def random_streams(vocab: int = 500, lengths=(4000, 3000, 500), seed: int = 0) -> Streams:
    """Noise in the shape of token streams: two training pieces and one for validation."""
    rng, ends = np.random.default_rng(seed), np.cumsum([0, *lengths])
    pieces = [
        Piece(
            f"piece{i}", "nobody", f"noise {i}", split, 0, int(ends[i]), length, length // 4, 60.0
        )
        for i, (length, split) in enumerate(
            zip(lengths, ("train", "train", "validation"), strict=True)
        )
    ]
    return Streams(
        rng.integers(3, vocab, ends[-1]).astype(np.uint16), pieces, vocab, 1, {"id": "noise"}
    )


def life(streams: Path, folder: Path, steps: int) -> None:
    """One process's work: go on with the run, and print the number of each step that is done."""
    say = lambda text: None
    trainer = Trainer(
        Streams.load(streams),
        replace(CONFIG, steps=steps),
        folder,
        device="cpu",
        resume=True,
        say=say,
    )
    print(trainer.step, flush=True)
    trainer.run(progress=False, watch=lambda run: print(run.step, flush=True))


def _start(streams: Path, folder: Path, steps: int) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", MODULE, str(streams), str(folder), str(steps)],
        cwd=env.ROOT,
        env=ONE_THREAD,
        stdout=subprocess.PIPE,
        text=True,
    )


def _parts(folder: Path) -> list[Path]:
    """Half-written files."""
    return [*folder.glob(".*.part*"), *folder.glob("best/.*.part*")]


def _inspect(folder: Path) -> dict:
    """What a killed process left: whether it was writing, and which of its files cannot be read."""
    damaged = []
    for name in (checkpoints.LAST, checkpoints.PREVIOUS):
        if (folder / name).exists():
            try:
                checkpoints.open_one(folder / name)
            except ValueError:
                damaged.append(name)
    if (folder / "best" / mamba.WEIGHTS).exists() and (folder / "best" / mamba.CONFIG).exists():
        try:
            mamba.load(folder / "best")
        except UserError:
            damaged.append("best")
    return {"was_writing": bool(_parts(folder)), "damaged": damaged}


def _freeze_in_a_write(process: subprocess.Popen, folder: Path) -> None:
    """Stop the process while a half-written file is there; return at once if it ends first."""
    while process.poll() is None:
        if _parts(folder):
            process.send_signal(signal.SIGSTOP)
            time.sleep(0.02)
            if _parts(folder):  # else it was finished just before the signal came
                return
            process.send_signal(signal.SIGCONT)
        time.sleep(0.0002)


def _kill(process: subprocess.Popen, folder: Path, at: int, goal: int, pause: float | None) -> int:
    """Let it go on from step `at` to `goal`, then kill it; returns the last step that was done.

    So many seconds later, or, where `pause` is None, in the midst of a write.
    Raises `UserError` where it ends by itself.
    """
    while at < goal and (line := process.stdout.readline()):
        at = int(line)
    if pause is None:
        _freeze_in_a_write(process, folder)
    else:
        time.sleep(pause)
    process.send_signal(signal.SIGKILL)
    rest = process.stdout.read().split()
    if process.wait() != -signal.SIGKILL:
        raise UserError(
            f"the process ended by itself with code {process.returncode}: see what it printed above"
        )
    return int(rest[-1]) if rest else at


def _note_loss(rows: list[dict], resumed: int, say) -> None:
    """What the last kill has cost, now that it is known where the run goes on."""
    if not rows:
        return
    row = rows[-1]
    # a step can be saved and its number not yet be printed: then nothing was lost
    row |= {"resumed_at": resumed, "lost": max(0, row["killed_at"] - resumed)}
    when = ", while a file was being written" if row["was_writing"] else ""
    say(f"kill {len(rows)}: at step {row['killed_at']}, lost {row['lost']} steps{when}")


def torture(kills: int, writes: int, work: Path, *, seed: int = 0, say=note) -> dict:
    """Kill a run so many times, then let it end; what was lost each time,
    and whether it ended the same.

    `kills` come at random moments, `writes` more as soon as a half-written file is seen.

    Raises `UserError` if a life ends by itself or the run is over before the last kill.
    """
    rng = random.Random(seed)
    aims = rng.sample([False] * kills + [True] * writes, kills + writes)
    steps = (len(aims) + 1) * STEPS_A_KILL  # some to spare, should a write be missed
    streams, never, killed = work / "streams", work / "never", work / "killed"
    store(random_streams(), streams)
    process = _start(streams, never, steps)
    process.communicate()
    if process.returncode:
        raise UserError("the run that should not be killed failed: see what it printed above")
    rows: list[dict] = []
    for in_a_write in aims:
        process = _start(streams, killed, steps)
        resumed = int(process.stdout.readline() or -1)
        _note_loss(rows, resumed, say)
        # a step's number tells how far it is; the moment within a step, or a save,
        # is left to chance
        goal = resumed + rng.randint(1, STEPS_A_KILL - CONFIG.save_every - 2)
        pause = None if in_a_write else rng.random() * 0.06
        killed_at = _kill(process, killed, resumed, goal, pause)
        rows.append({"killed_at": killed_at, **_inspect(killed)})
    process = _start(streams, killed, steps)
    _note_loss(rows, int(process.stdout.readline() or -1), say)
    process.communicate()
    if process.returncode:
        raise UserError(
            f"the last life ended with code {process.returncode}: see what it printed above"
        )
    return {
        "kills": len(aims),
        "at_random": kills,
        "save_every": CONFIG.save_every,
        "steps": steps,
        "rows": rows,
        "most_lost": max(row["lost"] for row in rows),
        "while_writing": sum(row["was_writing"] for row in rows),
        "damaged": sum(len(row["damaged"]) for row in rows),
        **_same(never, killed, say),
    }


def _same(never: Path, killed: Path, say) -> dict:
    """Whether two runs ended with the same tensors, and with the same losses on the way."""
    (ours, facts), (theirs, others) = (checkpoints.read(folder, say) for folder in (never, killed))
    same = ours.keys() == theirs.keys() and all((ours[name] == theirs[name]).all() for name in ours)
    losses = [[row["train_bits_per_token"] for row in found["log"]] for found in (facts, others)]
    return {"same_end": bool(same), "same_log": losses[0] == losses[1]}


def main(argv: list[str] | None = None) -> None:
    """Kill a training run at random moments and see what it loses."""
    parser = argparse.ArgumentParser(
        prog="python -m lib.lab.bench interruptions", description=main.__doc__
    )
    parser.add_argument("--kills", type=int, default=20, help="how many times (%(default)s)")
    parser.add_argument(
        "--writes", type=int, default=10, help="and how many in the midst of a write (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=env.RESULTS / "interruptions.json")
    args = parser.parse_args(argv)
    if args.kills < 0 or args.writes < 0 or not args.kills + args.writes:
        raise UserError("--kills and --writes are numbers of times: give at least 1 of them")
    with tempfile.TemporaryDirectory() as work:
        result = torture(args.kills, args.writes, Path(work), seed=args.seed)
    options = f"--kills {args.kills} --writes {args.writes} --seed {args.seed}"
    command = f"python -m lib.lab.bench interruptions {options}"
    result |= env.provenance(command, seed=args.seed)
    write_json(args.output, result)
    print(
        f"{result['kills']} kills, "
        f"{result['while_writing']} of them while a file was being written: "
        f"at most {result['most_lost']} steps lost (a checkpoint every {CONFIG.save_every}), "
        f"{result['damaged']} damaged files, "
        f"the end {'is' if result['same_end'] else 'is not'} that of a run that was never killed"
    )


if __name__ == "__main__":
    life(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
