"""What some minutes on a folder of one's own bring: `python -m lib.lab.experiments.own_midi`.

Three folders that are unlike each other. Two are composers of MAESTRO's train split, and the model
that goes on learning from them is a small one that never met them. The third holds rags that
`write_rags` makes up, and the shipped model learns from those. As a control the small model goes on
for as many steps with what it knew already: what that brings on the same pieces is no merit of the
folder. Last, the test for near copies is tried on all of MAESTRO. Writes
data/results/own_midi.json, part by part, and goes on where it stopped.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from lib import mamba
from lib.env import machine as env
from lib.env.errors import cli
from lib.env.files import write_json
from lib.env.schema import read_json
from lib.music.encode import build
from lib.music.folder import NEAR, in_common, key_steps, shingles
from lib.music.library import note_arrays
from lib.music.maestro import Performance, performances
from lib.music.notes import HIGHEST, LOWEST, Music, make_notes, write_midi
from lib.music.streams import Streams
from lib.music.tokens import Tokenizer
from lib.train import own_midi
from lib.train.__main__ import main as train_command
from lib.train.config import TrainConfig
from lib.train.trainer import Trainer

COMMAND = "python -m lib.lab.experiments.own_midi"
NAME = "own_midi"
WORK = env.ROOT / "data" / "runs" / "own_midi"
MODEL = env.ROOT / "data" / "model"
COMPOSERS = {"debussy": "Claude Debussy", "bach": "Johann Sebastian Bach"}
LEFT_OUT = ("Bach", "Debussy")  # by whom, or arranged from whom, the small model has met nothing
BASE = TrainConfig(
    d_model=128,
    n_layer=4,
    steps=1500,
    minutes=1e6,
    lr=3e-3,
    eval_every=500,
    save_every=100,
    copies=False,
)
STEPS = {"bach": 150, "debussy": 150, "rags": 150}
RAGS = 60


# ---- the weights and the folders ----------------------------------------------------------------


def without(streams: Streams, names: tuple[str, ...]) -> Streams:
    """The same streams, less every piece whose composer's name holds one of these."""
    kept = [p for p in streams.pieces if not any(name in p.composer for name in names)]
    return replace(streams, pieces=kept)


def train_base(streams: Streams, folder: Path) -> Path:
    """The small model that never met the composers left out: its folder."""
    trainer = Trainer(without(streams, LEFT_OUT), BASE, folder, device="cpu", resume=True)
    if not trainer.finished:
        trainer.run()
    return folder / "best"


def link_files(found: list[Performance], composer: str, folder: Path) -> Path:
    """A folder with the composer's pieces of the train split."""
    folder.mkdir(parents=True, exist_ok=True)
    for performance in found:
        link = folder / performance.path.name
        if (performance.composer, performance.split) == (composer, "train") and not link.exists():
            link.symlink_to(performance.path.resolve())
    return folder


def write_rags(folder: Path, count: int = RAGS) -> Path:
    """A folder with rags that a few rules make up, each from a seed of its own."""
    for seed in range(count):
        path = folder / f"rag{seed:02}.mid"
        if not path.exists():
            write_midi(rag(np.random.default_rng(seed)), path)
    return folder


def rag(rng: np.random.Generator) -> Music:
    """Four strains of sixteen bars, A A B B: a striding left hand, and a line that syncopates."""
    sixteenth = 15 / rng.uniform(80, 110)  # seconds
    tonic = int(rng.integers(41, 53))
    strains = [[bar_of_rag(tonic, rng) for _ in range(16)] for _ in range(2)]
    rows = []  # start and length in sixteenths, key, velocity
    for number, bar in enumerate(strains[0] * 2 + strains[1] * 2):
        rows += [
            (8 * number + start, length, key, velocity) for start, length, key, velocity in bar
        ]
    start, length, pitch, velocity = np.array(rows, float).T
    start *= sixteenth
    return Music(make_notes(start, start + length * sixteenth, pitch, velocity))


def bar_of_rag(tonic: int, rng: np.random.Generator) -> list[tuple[int, int, int, int]]:
    """Eight sixteenths on one harmony."""
    degree, third = [(0, 4), (9, 4), (2, 4), (7, 4), (5, 4), (2, 3)][rng.integers(6)]
    root = tonic + degree
    chord = [root + 12, root + 12 + third, root + 19]
    rows = [(0, 2, root - 12 if root > 45 else root, 75), (4, 2, root - 5, 70)]
    rows += [(beat, 1, key, 55) for beat in (2, 6) for key in chord]
    onsets = [[0, 1, 3, 4, 6], [0, 2, 3, 5, 6], [1, 2, 4, 5, 7], [0, 1, 2, 4, 6]][rng.integers(4)]
    for onset, following in zip(onsets, [*onsets[1:], 8]):
        key = chord[rng.integers(3)] + 12
        rows.append((onset, following - onset, key, 85))
        if rng.random() < 0.3:
            rows.append((onset, following - onset, key + 12, 85))
    return rows


# ---- what is measured ----------------------------------------------------------------------------


def learn(init: Path, folder: Path, steps: int) -> dict:
    """The command of the course on one folder, and what it wrote of itself."""
    out = WORK / f"run-{folder.name}"
    facts = out / "best" / own_midi.FACTS
    if not facts.exists():
        train_command(
            [
                "--init",
                str(init),
                "--midi",
                str(folder),
                "--out",
                str(out),
                "--steps",
                str(steps),
                "--minutes",
                "1000",
                "--resume",
            ]
        )
    found = read_json(facts, dict, do="delete that file, and it is measured again")
    # with paths as they are when it is called from the root
    return json.loads(json.dumps(found).replace(f"{env.ROOT}/", ""))


def control(streams: Streams, init: Path, folder: Path, steps: int) -> dict:
    """As many steps on what the weights knew already, measured on the folder's test pieces."""
    out = WORK / "run-control"
    config = replace(own_midi.gentle(BASE), steps=steps, minutes=1000)
    trainer = Trainer(without(streams, LEFT_OUT), config, out, device="cpu", init=init, resume=True)
    trainer.run()
    theirs = own_midi.open_streams(folder, init, WORK / f"run-{folder.name}")
    after = mamba.load(out / "best")
    return own_midi.before_and_after(
        mamba.load(init), after, theirs, theirs.select("test"), Tokenizer.load(init)
    )


def near_copies(found: list[Performance]) -> dict:
    """How many pairs of MAESTRO the test for near copies finds, by what they have in common."""
    arrays = note_arrays(found, progress=False)
    every = [shingles(key_steps(notes)) for notes in arrays]
    first, second = np.triu_indices(len(found), 1)
    near = in_common(every).toarray()[first, second] >= NEAR
    composer = np.array([p.composer for p in found])
    title = np.array([p.title for p in found])
    side = np.array([p.split for p in found])
    of_one = (composer[first] == composer[second]) & (title[first] == title[second])
    of_two = composer[first] != composer[second]
    result = {"share": NEAR}
    for name, pairs in (
        ("same_title", of_one),
        ("other_composer", of_two),
        ("across_the_splits", side[first] != side[second]),
    ):
        result[name] = {"pairs": int(pairs.sum()), "found": int((pairs & near).sum())}
    rng = np.random.default_rng(0)
    some = rng.choice(len(found), 60, replace=False)
    for stretch, share in ((1.0, 0.0), (0.6, 0.0), (1.5, 0.0), (1.3, 0.1), (1.0, 0.2), (1.0, 0.3)):
        hits = 0
        for i in some:
            copy = shingles(key_steps(changed(arrays[i], stretch, share, rng)))
            hits += in_common([every[i], copy])[0, 1] >= NEAR
        result[f"transposed, {stretch:g} x as long, {share:.0%} of the notes other"] = {
            "pairs": len(some),
            "found": int(hits),
        }
    return result


def changed(notes: np.ndarray, stretch: float, share: float, rng) -> np.ndarray:
    """A copy three semitones up, in another tempo, with a share of its keys replaced."""
    notes = notes.copy()
    notes["start"] *= stretch
    notes["end"] *= stretch
    pitch = notes["pitch"].astype(int) + 3
    other = rng.random(len(notes)) < share
    pitch[other] += rng.integers(-12, 13, int(other.sum()))
    notes["pitch"] = np.clip(pitch, LOWEST, HIGHEST)
    return notes[np.lexsort((notes["pitch"], notes["start"]))]


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog=COMMAND, description="Learn from folders, and measure.")
    parser.parse_args(argv)
    known = env.read_results(NAME)

    def once(part: str, work: Callable[[], dict]) -> None:
        if part not in known:
            known[part] = work()
            known.update(env.provenance(COMMAND))
            write_json(env.RESULTS / f"{NAME}.json", known)
            print(f"{part}: {known[part]}", flush=True)

    found = performances()
    streams, _ = build(found, tokenizer=Tokenizer.load(MODEL))
    base = train_base(streams, WORK / "base")
    folders = {
        name: link_files(found, composer, WORK / "midi" / name)
        for name, composer in COMPOSERS.items()
    }
    rags = write_rags(WORK / "midi" / "rags")
    once("near_copies", lambda: near_copies(found))
    once("rags", lambda: learn(MODEL, rags, STEPS["rags"]))
    for name, folder in folders.items():
        once(name, lambda name=name, folder=folder: learn(base, folder, STEPS[name]))
    for name, folder in folders.items():
        once(
            f"{name}_control",
            lambda name=name, folder=folder: control(streams, base, folder, STEPS[name]),
        )


if __name__ == "__main__":
    cli(main)
