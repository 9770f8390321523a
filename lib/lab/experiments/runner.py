"""The experiments that compare architectures: `python -m lib.lab.experiments`.

    race         bits per note of the test split: equal tokens and equal arithmetic, over seeds
    efficiency   speed and memory: training against length, generation against position; exponents
    context      bits per note against position and against the number of tokens in reach
    playing      one opening, continued by each architecture
    tokens       time grids and byte-pair vocabularies, compared at 10 ms
    tokenizers   the same by the second protocol: more notes and seeds, TSD and MIDI-Like
    original     the original's recipe in small: each repair alone, and all repairs but each

The protocol is data (`lib.lab.experiments.protocol`). Everything is kept as it goes: the same
command goes on where the last one stopped. Results are data/results/experiments_PART_SCALE.json.
"""

import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import asdict, replace
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, NotRequired

import torch
from pydantic import ConfigDict, Field
from typing_extensions import TypedDict  # pydantic wants this one before Python 3.12

from lib.env import machine as env
from lib.env.errors import UserError
from lib.env.files import atomic_write
from lib.env.schema import read_json
from lib.lab.experiments.protocol import Protocol
from lib.lab.experiments.runs import OutOfTime, Spec, best_model, completed, train
from lib.lab.experiments.runs import Protocol as Recorded
from lib.music.streams import Piece, Streams

PARTS = {
    "race": "lib.lab.experiments.race",
    "efficiency": "lib.lab.experiments.efficiency",
    "context": "lib.lab.experiments.context",
    "playing": "lib.lab.experiments.playing",
    "tokens": "lib.lab.experiments.tokens",
    "tokenizers": "lib.lab.experiments.tokenizers",
    "original": "lib.lab.experiments.original",
}
RUNS = env.ROOT / "data" / "runs" / "experiments"


class Choice(TypedDict):
    """A learning rate and the share of a run that it takes to get there."""

    lr: Annotated[float, Field(gt=0, le=1e3)]
    warmup: Annotated[float, Field(ge=0, le=1)]


class Result(TypedDict):
    """A part's result, as far as other parts rely on it."""

    __pydantic_config__ = ConfigDict(extra="allow")
    protocol: Recorded
    best: NotRequired[dict[str, Choice]]  # of part (a): each architecture's


class Lab:
    """Where a part finds its protocol, its data and what was done before, and leaves its result."""

    def __init__(
        self,
        protocol: Protocol,
        folder: Path,
        *,
        minutes: float = math.inf,
        device: str | None = None,
        jobs: int = 1,
        results: Path | None = None,
        cache: Path | None = None,
        found: list | None = None,
        base: Path | None = None,
        kept: Path | None = None,
        say=print,
    ):
        self.protocol, self.folder, self.say, self.jobs = protocol, Path(folder), say, jobs
        self.deadline = time.monotonic() + 60 * minutes
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.results = results or (
            self.folder / "results" if protocol.scale == "quick" else env.RESULTS
        )
        self.cache = cache or (
            self.folder / "cache" if protocol.scale == "quick" else env.ROOT / "data" / "cache"
        )
        self.kept = kept or self.folder / "kept"  # what runs that have ended left
        # streams that were built elsewhere: no music library is needed then
        self.base_folder = base
        if found is not None:
            self.found = found

    @cached_property
    def found(self) -> list:
        """The performances: MAESTRO, or the openings of the sample's ten at the quick scale."""
        from lib.music.maestro import performances

        found = performances(quick=self.protocol.scale == "quick", say=self.say)
        seconds = self.protocol.piece_seconds
        return found if seconds is None else shorten(found, seconds, self.folder / "midi")

    @cached_property
    def leaks(self) -> set[tuple[str, str]]:
        """The (composer, title) pairs that cross the official splits."""
        from lib.music.maestro import leaking_titles

        return leaking_titles(self.base.pieces if self.base_folder else self.found)

    def streams(
        self,
        grid_ms: float,
        vocab_size: int | None = None,
        copies: int = 0,
        tokenizer=None,
        kind: str = "REMI",
    ):
        """(Streams, Tokenizer) of the performances with pedal-extended notes;
        merges are learnt on the train split.
        """
        from lib.music.encode import Augmentation, build
        from lib.music.tokens import TokenConfig

        config = None if tokenizer else TokenConfig(grid_ms, "extend", vocab_size, kind=kind)
        return build(
            self.found,
            config,
            Augmentation(copies=copies),
            folder=self.cache,
            tokenizer=tokenizer,
            progress=False,
            say=self.say,
        )

    @cached_property
    def base(self) -> Streams:
        """The streams of parts (a) and (c): base tokens,
        transposed and made louder as they are read.
        """
        if self.base_folder:
            return Streams.load(self.base_folder)
        return self.streams(self.protocol.grid_ms)[0]

    def left(self) -> None:
        """Raise `OutOfTime` where the budget of minutes is used up."""
        if time.monotonic() > self.deadline:
            raise OutOfTime

    def place(self, name: str) -> Path:
        """The folder of a run."""
        return self.folder / name

    def train(self, spec: Spec, streams: Streams, judge: Sequence[Piece] = ()) -> dict:
        """The outcome of a run, trained where it is not there yet."""
        folder = self.place(spec.name)
        return train(
            spec,
            streams,
            folder,
            judge=judge,
            deadline=self.deadline,
            device=self.device,
            say=self.say,
        )

    def model(self, spec: Spec, streams: Streams):
        """The best weights of a run, trained again where this machine does not have them."""
        self.train(spec, streams)
        return best_model(self.place(spec.name), self.device)

    @property
    def threads(self) -> int:
        """Threads of one of the processes side by side."""
        return max(1, torch.get_num_threads() // self.jobs)

    def __getstate__(self) -> dict:
        """What another process needs; it opens the streams itself."""
        return {k: v for k, v in self.__dict__.items() if k not in ("base", "processes")}

    @cached_property
    def processes(self) -> ProcessPoolExecutor:
        """`jobs` processes side by side, each on its share of the cores;
        to start one takes seconds.
        """
        return ProcessPoolExecutor(self.jobs, get_context("spawn"), _begin, (self, self.threads))

    def all(self, work: Callable, items: Iterable) -> list:
        """`work(lab, item)` for every item, in order, shared out among the processes side by side.

        `work` is a function of a module, and keeps what it has done:
        an error of one lets the others end.
        """
        items = list(items)
        if self.jobs == 1 or len(items) < 2:
            return [work(self, item) for item in items]
        self.left()
        self.base  # noqa: B018  built once, before all look for it
        futures = [self.processes.submit(_work, work, item) for item in items]
        wait(futures)
        return [future.result() for future in futures]

    def once(self, name: str, work, schema: type = dict):
        """What `work()` gives, as JSON of this schema,
        from the file of an earlier call where there is one.
        """
        path = self.kept / f"{name}.json"
        if not path.exists():
            self.left()
            text = json.dumps(work())
            with atomic_write(path) as part:
                part.write_text(text + "\n")
        return read_json(path, schema, do="delete that file, and it is measured again")

    def path(self, part: str) -> Path:
        return self.results / f"experiments_{part}_{self.protocol.scale}.json"

    def read(self, part: str) -> dict:
        """A part's result so far; empty where there is none. One of another protocol is refused."""
        path = self.path(part)
        found = read_json(path, Result, do="move it away to begin anew") if path.exists() else {}
        if found and completed(found["protocol"]) != self._protocol(part):
            raise UserError(
                f"{path.name} was measured by another protocol: move it away to begin anew"
            )
        return found

    def write(self, part: str, result: dict) -> None:
        """Keep a part's result, with the device, the versions, the command,
        the seed and the protocol.
        """
        command = f"python -m lib.lab.experiments --only {part} --scale {self.protocol.scale}"
        if self.jobs > 1:  # speeds hang on it
            command += f" --jobs {self.jobs}"
        result = env.provenance(command) | {"protocol": self._protocol(part), **result}
        with atomic_write(self.path(part)) as file:
            file.write_text(
                json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
            )

    def _protocol(self, part: str) -> dict:
        """What was chosen about this part, as JSON."""
        protocol = self.protocol
        chosen = {
            "scale": protocol.scale,
            "size": asdict(protocol.size),
            part: asdict(getattr(protocol, part)),
        }
        if part != "efficiency":
            chosen |= {
                "config": asdict(protocol.config),
                "grid_ms": protocol.grid_ms,
                "piece_seconds": protocol.piece_seconds,
            }
        return json.loads(json.dumps(chosen))


_LAB: list[Lab] = []  # of a process beside others


def _begin(lab: Lab, threads: int) -> None:
    torch.set_num_threads(threads)
    _LAB[:] = [lab]


def _work(work: Callable, item):
    return work(_LAB[0], item)


def shorten(found: list, seconds: float, folder: Path) -> list:
    """The same performances, of each the opening alone, as files in `folder`."""
    from lib.music.notes import crop, read_midi, write_midi

    short = []
    for performance in found:
        path = folder / f"{performance.path.stem}.mid"
        if not path.exists():
            write_midi(crop(read_midi(performance.path), 0, seconds), path)
        short.append(replace(performance, path=path, seconds=min(seconds, performance.seconds)))
    return short
