"""The requirements: what is installed, what is missing, and pip for a lone notebook."""

import importlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from importlib.util import find_spec
from pathlib import Path

from lib.env.errors import Unreachable, UserError, os_errors
from lib.env.paths import ROOT

INSTALL = "pip install -r requirements.txt"
# Never changed where it is installed: torch fits the machine's GPU and Triton fits torch, and the
# widgets fit the page that shows the notebook.
KEPT = ("torch", "torchvision", "torchaudio", "triton", "ipywidgets")
# Never installed: a lone notebook is open already, and runs no tests.
NOT_NEEDED = (
    "jupyterlab",
    "nbformat",
    "nbclient",
    "nbconvert",
    "latex2mathml",
    "pytest",
    "nbmake",
    "pytest-xdist",
    "setuptools",
    "beartype",
    "ruff",
    "codespell",
)

NO_CUDA_SCAN = (
    "mamba-ssm is installed without its CUDA scan, the kernel to compare with: install it again "
    "with MAMBA_KEEP_CUDA_BUILD=TRUE (see requirements-gpu.txt)"
)


@dataclass(frozen=True)
class Check:
    """One requirement, looked up on this machine."""

    ok: bool
    text: str  # one line: the version found, or what to do


def requirements(path: Path | None = None) -> list[tuple[str, str]]:
    """(requirement, reason) of each line of requirements.txt."""
    path = path or ROOT / "requirements.txt"
    if not path.exists() and path == ROOT / "requirements.txt":
        raise UserError(
            "the requirements of the course lie in its repository, and this is the package alone: "
            "run python -m lib.env in the repository"
        )
    with os_errors("read the list of requirements"):
        lines = path.read_text(encoding="utf-8").splitlines()
    pairs = [line.partition(" #") for line in lines if line.strip() and line[0] != "#"]
    return [(wanted.strip(), reason.strip()) for wanted, _, reason in pairs]


def check(wanted: str, reason: str = "") -> Check:
    """Look one requirement up: is it installed, and in a version that was tested?"""
    try:
        from packaging.requirements import Requirement
    except ImportError as error:
        raise UserError(f"packaging is missing: run {INSTALL}") from error
    need = Requirement(wanted)
    if need.marker is not None and not need.marker.evaluate():
        return Check(True, f"{need.name}: not used on this kind of machine")
    exact = f"{need.name}{need.specifier}"
    try:
        found = version(need.name)
    except PackageNotFoundError:
        return Check(False, f'{need.name} is missing ({reason}): run pip install "{exact}"')
    if need.specifier.contains(found, prereleases=True):
        return Check(True, f"{need.name} {found}: {reason}")
    return Check(
        False,
        f'{need.name} {found} was not tested, {need.specifier} was: run pip install "{exact}"',
    )


def optional_kernels() -> str:
    """One line on the official kernels, which nothing here needs."""
    missing = []
    for name in ("causal-conv1d", "mamba-ssm"):
        try:
            version(name)
        except PackageNotFoundError:
            missing.append(name)
    if not missing and find_spec("selective_scan_cuda") is None:
        return NO_CUDA_SCAN
    if not missing:
        return "causal-conv1d and mamba-ssm are installed: used as a reference only"
    return f"{' and '.join(missing)} not installed: not needed (see requirements-gpu.txt)"


# ---- a notebook opened alone --------------------------------------------------------------


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def missing(say=print) -> list[str]:
    """The requirements of the notebooks that this Python lacks or has in an untested version.

    What is in `KEPT` counts as missing only where there is none at all; another version than the
    tested ones is told and left alone.
    """
    lacking = []
    for wanted, reason in requirements():
        name = re.match(r"[\w.-]+", wanted)[0]
        if name in NOT_NEEDED:
            continue
        try:
            found = check(wanted, reason)
        except UserError:  # even `packaging`, which compares versions, is missing
            found = Check(_installed(name) is not None, "")
        if found.ok:
            continue
        if name in KEPT and _installed(name):
            say(f"{found.text.partition(': run pip')[0]}; it is left as it is")
        else:
            lacking.append(wanted)
    return lacking


def _loaded() -> dict[str, str]:
    """The version of every package of which a module is loaded in this process."""
    homes = packages_distributions()
    loaded = {name.partition(".")[0] for name in list(sys.modules)}
    return {home: version(home) for name in loaded for home in homes.get(name, ())}


def install_missing(say=print) -> None:
    """Install what `missing` names, with pip, and leave torch and its kin exactly as they are.

    Nothing happens where nothing is missing, so it may run again and again. Raises UserError, one
    sentence: no network, or a package was replaced that is loaded already.
    """
    lacking = missing(say)
    if not lacking:
        return
    many = f"{len(lacking)} packages" if len(lacking) > 1 else "a package"
    say(f"installing {many} that the course needs: once, and it may take a few minutes")
    before = _loaded()
    with tempfile.TemporaryDirectory() as folder:
        keep = Path(folder) / "keep.txt"
        pins = [f"{name}=={_installed(name)}\n" for name in KEPT if _installed(name)]
        keep.write_text("".join(pins), encoding="utf-8")
        # without compiling every module to bytecode: the few that are imported are compiled then
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-input",
            "--no-compile",
            "--retries",
            "2",
            "--disable-pip-version-check",
            "--constraint",
            str(keep),
            *lacking,
        ]
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, errors="replace"
        )
    if done.returncode:
        raise UserError(
            f"pip could not install what the course needs ({pip_reason(done.stderr)}): "
            "check the network and run this cell again"
        )
    importlib.invalidate_caches()
    after = _loaded()
    replaced = sorted(name for name, was in before.items() if after.get(name, was) != was)
    if replaced:
        raise UserError(
            f"{', '.join(replaced)} was replaced while an older version was in use: "
            "restart the kernel (on Colab: Runtime, Restart session) and run this cell again"
        )


def pip_download(
    requirement: str,
    folder: Path,
    what: str,
    *,
    options: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> None:
    """Put the source distribution of `requirement` into `folder`, as pip finds it.

    A requirement is "name==version", `what` is its name in a sentence. Raises `Unreachable` where
    pip cannot bring it, `UserError` for a full disk.
    """
    name = requirement.partition("==")[0]
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--no-input",
        "--disable-pip-version-check",
        "--retries",
        "1",
        "--timeout",
        "10",
        *options,
        "--no-binary",
        name,
        "--dest",
        str(folder),
        requirement,
    ]
    here = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(folder))  # so that pip leaves nothing
    try:
        done = subprocess.run(
            command,
            check=False,
            cwd=folder,
            env={**os.environ, **here, **(environment or {})},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=180,
        )
    except subprocess.TimeoutExpired as error:
        raise Unreachable(f"pip did not bring {what} within three minutes") from error
    if done.returncode == 0:
        return
    if "No space left" in done.stderr:
        raise UserError("the disk is full: free some space and run it again")
    reason = pip_reason(done.stderr)
    if "No module named pip" in done.stderr:
        reason = "this Python has no pip"
    elif "No matching distribution" in done.stderr:
        reason = "no package index that has it answers"
    raise Unreachable(f"pip cannot fetch {what} ({reason})")


def pip_reason(stderr: str) -> str:
    """Pip's last complaint as the inside of a sentence."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = (
        [line for line in lines if line.lower().startswith("error")]
        or lines[-1:]
        or ["it gave no reason"]
    )
    return re.sub(r"^error:\s*", "", errors[-1], flags=re.IGNORECASE).rstrip(".")[:200]
