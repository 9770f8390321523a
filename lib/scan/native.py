"""C++ kernels: compile a source once, keep the library, load it through ctypes.

The libraries are plain C to the outside: they compile in seconds and need no header of torch.
They are kept in data/cache under a name made of the source, the compiler, torch's version (both
share one OpenMP in a process) and the processor's features, so that a cache carried to another
machine is never loaded there.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch

from lib.env.errors import UserError
from lib.env.files import whole
from lib.env.paths import CACHE

LIB = Path(__file__).parent  # with the headers that the sources of every room may include
# another target than this machine's own, as CPU_FLAGS="-mavx2 -mfma" asks for it, is for measuring what others have
TARGET = os.environ.get("CPU_FLAGS", "-march=native").split()
FLAGS = ["-O3", *TARGET, "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros",
         "-std=c++17", "-shared", "-fPIC", "-w"]
THREADS = [["-fopenmp"], []]  # where a compiler knows no OpenMP, one core does the work


def compiler() -> str | None:
    """The C++ compiler to use: what CXX names, g++ or clang++; None where there is none."""
    return next((c for c in (os.environ.get("CXX"), "g++", "clang++") if c and shutil.which(c)), None)


def processor() -> str:
    """What this machine's processor can do; code that was compiled for it may crash another."""
    try:
        return next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
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
    return "NEON" if platform.machine() in ("arm64", "aarch64") else "no vector unit that is known here"


def bfloat16_is_fast() -> bool:
    """Whether this processor multiplies matrices faster in bfloat16 than in float32: it has matrix units."""
    return units() == "AVX-512 with matrix units"


class Kernel:
    """One C++ source of this package, compiled when it is first wanted.

    `what` it is and what happens `instead` where it cannot be compiled are said in those words.
    """

    def __init__(self, source: str | Path, what: str, instead: str):
        self.source, self.what, self.instead = Path(source), what, instead
        self._library, self._tried = None, False

    def target(self) -> Path:
        """Where this machine's library is kept."""
        texts = [path.read_text(encoding="utf-8") for path in (self.source, *sorted(LIB.glob("*.h")))]
        key = "\n".join([*texts, str(compiler()), " ".join(FLAGS), torch.__version__, processor(), platform.platform()])
        return CACHE / f"{self.source.stem}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.so"

    def ready(self) -> bool:
        """Whether the library is built and loads here. Never compiles."""
        if self._library is None and (target := self.target()).exists():
            try:
                self._library = ctypes.CDLL(str(target))
            except OSError:  # damaged
                return False
        return self._library is not None

    def build(self, say=print) -> bool:
        """Compile the library if it is not there yet; say so. Returns whether it can be used."""
        if self.ready():
            return True
        found = compiler()
        if found is None:
            say(f"no C++ compiler found: {self.instead}")
            return False
        say(f"compiling {self.what} (a few seconds, once)")
        for threads in THREADS:
            try:
                with whole(self.target()) as part:
                    subprocess.run([found, *FLAGS, f"-I{LIB}", *threads, str(self.source), "-o", str(part)], check=True,
                                   capture_output=True, timeout=300)
                return self.ready()
            except (UserError, subprocess.SubprocessError):
                continue
        say(f"{found} could not compile {self.what}: {self.instead}")
        return False

    def available(self) -> bool:
        """Whether the library can be used here; compiles it if need be. Tries, and says so, once a process."""
        if not self._tried:
            self._tried = True
            self.build()
        return self._library is not None

    @property
    def library(self) -> ctypes.CDLL:
        """The loaded library. Raises `UserError` where it cannot be had; ask `available` first."""
        if not self.available():
            raise UserError(f"{self.what} needs a C++ compiler (g++ or clang++) that works: install one")
        return self._library


def address(tensor) -> ctypes.c_void_p:
    """Where a tensor's numbers begin; a null pointer for None."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())
