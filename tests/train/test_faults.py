"""Claims about a run's folder when the disk or the process fails:
at every write, fsync and rename, in every way.

What is saved at a validation is saved again and again, and each time another one of its calls
fails: with an error of the system, by the end of the process, or by a power cut, which also empties
every file that nobody had waited for. By hand, with the counts:

    python tests/train/test_faults.py
"""

import builtins
import csv
import errno
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]

import pytest  # noqa: E402
import safetensors.torch  # noqa: E402
from made_up import TINY, make_streams, quiet, store  # noqa: E402
from safetensors import SafetensorError  # noqa: E402

from lib import mamba  # noqa: E402
from lib.env.errors import UserError  # noqa: E402
from lib.train import checkpoints  # noqa: E402
from lib.train.trainer import Trainer, keep_best, log_row  # noqa: E402
from lib.train.warm_start import TOKENIZER_FILES  # noqa: E402

HOW = ("error", "kill", "power cut")
FILES = ("tokenizer.json", "tokens.json")


class Disk:
    """Counts the calls that change files under a folder;
    the one with number `fatal` fails, half done.
    """

    def __init__(self, folder: Path, how: str, fatal: int):
        self.folder, self.how, self.fatal, self.calls = folder, how, fatal, 0
        self.unsafe: set[str] = set()  # files that may be empty after a power cut
        self.real = {
            "open": builtins.open,
            "fsync": os.fsync,
            "replace": os.replace,
            "save_file": safetensors.torch.save_file,
        }

    def call(self, half: Callable[[], object] = lambda: None) -> None:
        """One more call; where it is the fatal one, do half of it and fail."""
        self.calls += 1
        if self.calls != self.fatal:
            return
        half()
        if self.how == "error":
            raise OSError(errno.ENOSPC, "No space left on device")
        for path in self.unsafe if self.how == "power cut" else ():
            if os.path.isfile(path):
                os.truncate(path, 0)
        os._exit(1)

    def ours(self, path) -> bool:
        return isinstance(path, str | os.PathLike) and Path(path).is_relative_to(self.folder)

    def open(self, path, mode="r", *args, **kwargs):
        file = self.real["open"](path, mode, *args, **kwargs)
        return Watched(file, str(path), self) if self.ours(path) and mode[0] in "wxa" else file

    def fsync(self, number: int) -> None:
        self.call()
        self.real["fsync"](number)
        self.unsafe.discard(os.readlink(f"/proc/self/fd/{number}"))

    def replace(self, source, target) -> None:
        self.call()
        self.real["replace"](source, target)
        source, target = str(source), str(target)
        self.unsafe = {
            target + path[len(source) :] if path.startswith(source) else path
            for path in self.unsafe
        }

    def save_file(self, tensors, path, *args, **kwargs) -> None:
        self.unsafe.add(str(path))

        def half():
            self.real["save_file"](tensors, path, *args, **kwargs)
            os.truncate(path, os.path.getsize(path) // 2)
            if self.how == "error":  # in Rust's words
                raise SafetensorError(
                    "Error while serializing: I/O error: No space left on device (os error 28)"
                )

        self.call(half)
        self.real["save_file"](tensors, path, *args, **kwargs)

    def __enter__(self):
        builtins.open = io.open = self.open
        os.fsync, os.replace, safetensors.torch.save_file = self.fsync, self.replace, self.save_file
        return self

    def __exit__(self, *_):
        builtins.open = io.open = self.real["open"]
        os.fsync, os.replace = self.real["fsync"], self.real["replace"]
        safetensors.torch.save_file = self.real["save_file"]


class Watched:
    """A file whose writes are counted."""

    def __init__(self, file, path: str, disk: Disk):
        self.file, self.disk = file, disk
        disk.unsafe.add(path)

    def write(self, data) -> int:
        def half():
            self.file.write(data[: len(data) // 2])
            self.file.flush()

        self.disk.call(half)
        return self.file.write(data)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)


def faults(what: str) -> dict:
    """What is wrong with the folder of a run that fails at each of its calls;
    each is tried in each way.
    """
    wrong, tried = [], dict.fromkeys(HOW, 0)
    with tempfile.TemporaryDirectory() as home:
        home = Path(home).resolve()
        streams = store(make_streams(), home / "streams")
        for name in FILES:
            (home / "streams" / name).write_text("{}")
        before, saves = home / "before", {"the first": 0, "the second": 1, "the third": 2}[what]
        trainer = Trainer(streams, replace(TINY, steps=8), before, device="cpu", say=quiet)
        for _ in range(saves):
            save(trainer)
        before.mkdir(exist_ok=True)
        trainer.train_step()
        for how in HOW:
            for fatal in range(1, 1000):
                shutil.rmtree(home / "run", ignore_errors=True)
                shutil.copytree(before, home / "run")
                trainer.folder = home / "run"
                fine, said = failing(trainer, how, fatal)
                if fine:
                    break
                tried[how] += 1
                wrong += [
                    f"{what} save, {how} at call {fatal}: {fault}"
                    for fault in [*said, *inspect(home / "run", streams, saves, how)]
                ]
    return {"tried": tried, "wrong": wrong}


def save(trainer: Trainer) -> None:
    """A step, then what `Trainer.run` writes at a validation that is the best so far."""
    trainer.train_step()
    write(trainer)


def write(trainer: Trainer) -> None:
    trainer.best = 1e9
    trainer.log.append(log_row(trainer, trainer.validate()))
    trainer.save()


def failing(trainer: Trainer, how: str, fatal: int) -> tuple[bool, list[str]]:
    """Save in a process of its own whose call number `fatal` fails:
    whether none did, and what was wrong.
    """
    child = os.fork()
    if not child:
        code = 2
        try:
            with Disk(trainer.folder, how, fatal) as disk:
                write(trainer)
            code = 0 if disk.calls < fatal else 3
        except UserError as error:
            code = 4 if "\n" in str(error) or "disk is full" not in str(error) else 1
            left = [path.name for path in trainer.folder.rglob(".*.part*")]
            try:
                keep_best(trainer)  # there is room again
                trainer.save()
                code = (
                    6
                    if checkpoints.read(trainer.folder, quiet)[1]["step"] != trainer.step
                    else 5
                    if left
                    else code
                )
            except UserError:
                code = 7
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    reasons = {
        2: "a traceback",
        3: "a failure was swallowed",
        4: "not the sentence of a full disk",
        5: "half a file is left",
        6: "the next save was lost",
        7: "the next save failed",
    }
    return code == 0, [reasons[code]] if code in reasons else []


def inspect(folder: Path, streams, saves: int, how: str) -> list[str]:
    """What is wrong with what a failure left: nothing that was saved may be lost,
    and nothing be half there.
    """
    wrong = []
    if saves and not checkpoints.exists(folder):
        wrong.append("every checkpoint is lost")
    if checkpoints.exists(folder):
        said = []
        try:
            step = checkpoints.read(folder, said.append)[1]["step"]
            if step not in (saves, saves + 1) or said:
                wrong.append(f"step {step} of {saves}, {said}")
        except UserError as error:
            wrong.append(str(error))
    if (folder / "best").exists():
        try:
            mamba.load(folder / "best")
        except UserError as error:
            wrong.append(str(error))
        wrong += [
            f"best/{name} is lost"
            for name in TOKENIZER_FILES
            if (folder / "best" / name).read_text() != "{}"
        ]
    elif saves:
        wrong.append("best is lost")
    if (folder / checkpoints.LOG).exists():
        with (folder / checkpoints.LOG).open(newline="") as file:
            rows = list(csv.DictReader(file))
        if len(rows) not in (saves, saves + 1) or any(None in row.values() for row in rows):
            wrong.append(f"a log of {len(rows)} rows")
    elif saves:
        wrong.append("the log is lost")
    again = Trainer(streams, replace(TINY, steps=4), folder, device="cpu", resume=True, say=quiet)
    again.run(progress=False)
    if again.step != 4 or list(folder.rglob(".*.part*")):
        wrong.append("the next run does not go on as it should")
    return wrong


SAVES = ("the first", "the second", "the third")


@pytest.fixture(scope="module")
def found():
    """All of them, in one process of its own: its imports take as long as a hundred saves."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__],
        capture_output=True,
        text=True,
        timeout=560,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-1500:]
    return json.loads(done.stdout)


@pytest.mark.skipif(
    not Path("/proc/self/fd").exists(), reason="needs fork, and Linux's names of open files"
)
@pytest.mark.parametrize("what", SAVES)
def test_a_save_that_fails_anywhere_loses_nothing_and_leaves_a_folder_that_loads(found, what):
    result = found[what]
    assert result["wrong"] == []
    counts = set(result["tried"].values())
    assert len(counts) == 1 and counts.pop() > 15, "every call failed once in each way"


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    print(json.dumps({what: faults(what) for what in sys.argv[1:] or SAVES}, indent=1))
