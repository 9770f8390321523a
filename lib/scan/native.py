"""C++ kernels: compile a source once, keep the library, load it through ctypes.

The libraries are plain C to the outside: they compile in seconds and need no header of torch. They
are kept in data/cache under a name made of the source, the compiler, its flags, torch's version
(both share one OpenMP in a process) and the processor's features, so that a cache carried to
another machine is never loaded there. Where data/cache cannot be written, or nothing in it may be
run, a folder in the user's own cache takes its place.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path

import torch

from lib.env.errors import UserError, os_errors
from lib.env.files import atomic_write
from lib.env.paths import CACHE, own_folder

HERE = Path(__file__).parent  # with the headers that the sources of every room may include
# CPU_FLAGS="-mavx2 -mfma", say, asks for another target than this machine's own:
# it is for measuring what others have
TARGET = os.environ.get("CPU_FLAGS", "-march=native").split()
FLAGS = [
    "-O3",
    *TARGET,
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-signed-zeros",
    "-std=c++17",
    "-shared",
    "-fPIC",
    "-w",
]
THREADS = [["-fopenmp"], []]  # where a compiler knows no OpenMP, one core does the work


def compiler() -> str | None:
    """The C++ compiler to use: what CXX names, g++ or clang++; None where there is none."""
    return next(
        (c for c in (os.environ.get("CXX"), "g++", "clang++") if c and shutil.which(c)), None
    )


@functools.cache
def processor() -> str:
    """What this machine's processor can do; code that was compiled for it may crash another."""
    try:
        return next(
            line
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("flags")
        )
    except (OSError, StopIteration):
        return platform.processor() + platform.machine()


def units() -> str:
    """The widest arithmetic of this processor that the kernels are compiled for, in words."""
    flags = set(processor().replace(":", " ").split())
    if "-march=native" not in FLAGS:
        return "as CPU_FLAGS says"
    if "avx512dq" in flags:
        return "AVX-512 with matrix units" if "amx_bf16" in flags else "AVX-512"
    if "avx2" in flags:
        return "AVX2"
    return (
        "NEON"
        if platform.machine() in ("arm64", "aarch64")
        else "no vector unit that is known here"
    )


def bfloat16_is_fast() -> bool:
    """Whether this processor multiplies matrices faster in bfloat16 than in float32.

    It does where it has matrix units.
    """
    return units() == "AVX-512 with matrix units"


def is_private(folder: Path) -> bool:
    """Whether a folder is this user's, no link to another, and nobody else may enter it."""
    try:
        found = folder.lstat()
    except OSError:
        return False
    mine = not hasattr(os, "getuid") or (found.st_uid == os.getuid() and not found.st_mode & 0o077)
    return stat.S_ISDIR(found.st_mode) and mine


def is_trusted(library: Path) -> bool:
    """Whether a file is this user's, the course's owner's or root's, and only theirs to change."""
    try:
        found = library.lstat()
    except OSError:
        return False
    if not hasattr(os, "getuid"):  # Windows
        return stat.S_ISREG(found.st_mode)
    owners = {os.getuid(), HERE.stat().st_uid, 0}
    return stat.S_ISREG(found.st_mode) and found.st_uid in owners and not found.st_mode & 0o022


class Kernel:
    """One C++ source of this package, compiled when it is first wanted.

    `what` it is and what happens `instead` where it cannot be compiled are said in those words.
    """

    def __init__(self, source: str | Path, what: str, instead: str):
        self.source, self.what, self.instead = Path(source), what, instead
        self._library, self._tried = None, False
        self._lock = threading.Lock()

    def target(self, threads: Sequence[str] = THREADS[0], folder: Path | None = None) -> Path:
        """Where this machine's library is kept."""
        texts = [
            path.read_text(encoding="utf-8") for path in (self.source, *sorted(HERE.glob("*.h")))
        ]
        key = "\n".join(
            [
                *texts,
                str(compiler()),
                " ".join([*FLAGS, *threads]),
                torch.__version__,
                processor(),
                platform.platform(),
            ]
        )
        return (
            folder or CACHE
        ) / f"{self.source.stem}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.so"

    def ready(self) -> bool:
        """Whether the library is built and loads here. Never compiles."""
        own = own_folder()
        return self._load(self.target()) or (
            is_private(own) and self._load(self.target(folder=own))
        )

    def build(self, say=print) -> bool:
        """Compile the library if it is not there yet; say so. Returns whether it can be used."""
        if self.ready():
            return True
        found = compiler()
        if found is None:
            say(f"no C++ compiler found: {self.instead}")
            return False
        say(f"compiling {self.what} (a few seconds, once)")
        reason = ""
        for folder in (CACHE, own_folder()):
            try:
                self._build_in(folder, found)
            except UserError as error:
                reason = reason or str(error)
            except subprocess.SubprocessError as error:
                say(f"{found} could not compile {self.what}{_complaint(error)}: {self.instead}")
                return False
            else:
                if reason:
                    say(f"{reason}; {self.what} is kept in {folder} instead")
                return True
        say(f"{reason}; {self.instead}")
        return False

    def _build_in(self, folder: Path, found: str) -> None:
        """Compile into a folder and load.

        Raises `UserError` where the folder is in the way,
        and `SubprocessError` where the compiler is.
        """
        if folder != CACHE:
            with os_errors(f"make the folder {folder}"):
                folder.parent.mkdir(parents=True, exist_ok=True)
                folder.mkdir(mode=0o700, exist_ok=True)
            if not is_private(folder):
                raise UserError(f"{folder} is open to others: make it yours alone, or remove it")
        # where the compiler fails with threads, without them: under a name of its own, so that
        # what failed today is tried again tomorrow
        for threads in THREADS:
            target = self.target(threads, folder)
            try:
                if threads or not self._load(target):
                    self.compile(target, found, threads)
                break
            except subprocess.SubprocessError as error:
                if "the disk is full" in _complaint(error):
                    raise UserError(f"could not write {target}: the disk is full") from error
                if threads == THREADS[-1]:
                    raise
        if not self._load(target):
            if not is_trusted(target):
                raise UserError(f"{folder} lets others change what lies in it")
            raise UserError(f"{folder} lets no program run: its disk may be mounted noexec")

    def compile(self, target: Path, found: str, threads: Sequence[str]) -> None:
        """Write the library, whole or not at all, so that only its owner can change it."""
        with atomic_write(target) as part:
            subprocess.run(
                [found, *FLAGS, f"-I{HERE}", *threads, str(self.source), "-o", str(part)],
                check=True,
                capture_output=True,
                timeout=300,
            )
            part.chmod(0o755)

    def _load(self, target: Path) -> bool:
        """Load a library that is there, whole, and to be trusted. Returns whether one is loaded."""
        if self._library is None and is_trusted(target):
            try:
                self._library = ctypes.CDLL(str(target))
            except OSError:  # damaged, or on a disk that runs no programs
                return False
        return self._library is not None

    def available(self) -> bool:
        """Whether the library can be used here; compiles it if need be.

        Tries, and says so, once a process.
        """
        with self._lock:  # whoever asks meanwhile waits for the answer
            if not self._tried:
                self._tried = True
                self.build()
        return self._library is not None

    @property
    def library(self) -> ctypes.CDLL:
        """The loaded library. Raises `UserError` where it cannot be had; ask `available` first."""
        if not self.available():
            raise UserError(
                f"{self.what} needs a C++ compiler (g++ or clang++) that works: install one"
            )
        return self._library


def _complaint(error: subprocess.SubprocessError) -> str:
    """What a compiler complained of, in brackets; "" where it said nothing."""
    if isinstance(error, subprocess.TimeoutExpired):
        return " (it took more than five minutes)"
    said = error.stderr.decode(errors="replace")
    if "No space left" in said:
        return " (the disk is full)"
    lines = [line.strip() for line in said.splitlines() if "error" in line.lower()]
    return f" ({lines[0][:200]})" if lines else ""


def address(tensor) -> ctypes.c_void_p:
    """Where a tensor's numbers begin; a null pointer for None.

    Raises `UserError` where they are not in memory here.
    """
    if tensor is None:
        return ctypes.c_void_p(None)
    if tensor.device.type != "cpu":
        raise UserError(
            f"a kernel of the CPU was given a tensor on {tensor.device}: move it to the CPU"
        )
    first = tensor.data_ptr()
    if not first and tensor.numel():  # torch knows zeros without a place
        raise UserError("a kernel of the CPU was given a tensor that lies nowhere: clone it")
    return ctypes.c_void_p(first)
