"""At home: what the GPU hour needs, in parts of a size that can be carried."""

import importlib.metadata
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from lib.env.errors import UserError
from lib.env.install import pip_download
from lib.lab.gpu import parts
from lib.lab.peers.scans import SDIST

# what a machine with torch and Triton may lack; in the versions that are installed here
PACKAGES = (
    "pydantic",
    "pydantic_core",
    "annotated-types",
    "typing-inspection",
    "typing_extensions",
    "tqdm",
    "jaxtyping",
    "wadler-lindig",
    "safetensors",
    "filelock",
)
TARGET = "3.12"  # its Python


def pack(folder: Path, streams: Path | None, part_mib: float, *, wheels: bool) -> Iterator[str]:
    """Write folder/in1, in2, …, anew; yields what was done, a line each."""
    if part_mib <= 0:
        raise UserError("--part-mib must be above 0: give the MiB that fit beside the repository")
    for old in folder.glob("in*"):
        shutil.rmtree(old)
    streams = streams or _base_streams()
    count = parts.cut(streams, folder, int(part_mib * 2**20))
    if wheels:
        _fetch_wheels(folder / "in1" / "wheels")
        (folder / "in1" / "peer").mkdir(parents=True)
        pip_download(
            SDIST,
            folder / "in1" / "peer",
            "mamba-ssm",
            options=["--no-build-isolation"],
            environment={"MAMBA_SKIP_CUDA_BUILD": "TRUE"},
        )
    for number in range(1, count + 1):
        place = folder / f"in{number}"
        size = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
        yield f"{place.name}: {size / 2**20:.1f} MiB"
    yield "carry them over, one a call if they do not fit together; then: python -m lib.lab.gpu run"


def _base_streams() -> Path:
    """The base token streams of the whole data set, which the race reads too."""
    from lib.lab.experiments.protocol import SCALES
    from lib.lab.experiments.runner import RUNS, Lab

    return Lab(SCALES["hour"], RUNS / "hour").base.folder


def _fetch_wheels(folder: Path) -> None:
    """The packages for Linux on x86-64 and the Python that is there."""
    folder.mkdir(parents=True)
    wanted = [f"{name}=={importlib.metadata.version(name)}" for name in PACKAGES]
    platforms = [f"--platform=manylinux{kind}_x86_64" for kind in ("2014", "_2_17", "_2_28", "1")]
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--no-deps",
        "--only-binary=:all:",
        f"--python-version={TARGET}",
        "--implementation=cp",
        *platforms,
        "-d",
        folder,
        *wanted,
    ]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(f"pip could not fetch what the bare machine lacks ({why[:200]})")
