"""Other people's selective scans, behind our signature: second opinions, and peers to be timed.

Nothing of theirs is copied here. Each is imported when it is asked for; where it cannot be had, a
`UserError` says why in one sentence, and nothing else in the course needs it.
"""

import ast
import hashlib
import importlib
import inspect
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from lib.env.errors import Unreachable, UserError, os_errors
from lib.env.files import atomic_write, only_one
from lib.env.install import NO_CUDA_SCAN, pip_download
from lib.env.paths import CACHE

SDIST = "mamba-ssm==2.3.2.post1"  # as in requirements-gpu.txt
FILE = "mamba_ssm/ops/selective_scan_interface.py"
SHA256 = "543edd077f11c80cccd5c5e2f926420d9105fd238d9e8960e53660cfa234dce8"  # of that file


def _theirs(module: str, name: str, install: str):
    """`name` out of their `module`, whatever its import may raise
    (some compile, some load CUDA).
    """
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name == "selective_scan_cuda":
            raise UserError(NO_CUDA_SCAN) from error
        raise UserError(
            f"{(error.name or module).partition('.')[0]} is not installed: "
            f"run pip install {install}"
        ) from error
    except Exception as error:
        why = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise UserError(f"{module} of {install} does not work here ({why[:160]})") from error


def _channels_first(scan: Callable) -> Callable:
    """Our signature for a whole scan that wants (B, D, L) and (B, N, L);
    the turning is by views.
    """

    def ours(x, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
        x, delta, B, C, z = (t if t is None else t.transpose(1, 2) for t in (x, delta, B, C, z))
        return scan(
            x, delta, A, B, C, D=D, z=z, delta_bias=delta_bias, delta_softplus=delta_softplus
        ).transpose(1, 2)

    return ours


def _dressed(core: Callable) -> Callable:
    """Our signature for a scan without bias, softplus and gate: they go around it, in float32."""

    def ours(x, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
        dtype, high = x.dtype, torch.promote_types(x.dtype, torch.float32)
        x, delta, B, C = (t.to(high) for t in (x, delta, B, C))
        delta = delta if delta_bias is None else delta + delta_bias
        D = x.new_zeros(()) if D is None else D
        y = core(x, F.softplus(delta) if delta_softplus else delta, A, B, C, D)
        return (y if z is None else y * F.silu(z.to(high))).to(dtype)

    return ours


def _mambapy() -> Callable:
    block = _theirs("mambapy.mamba", "MambaBlock", "mambapy==1.2.0")
    # its `selective_scan` uses nothing of the block that it is a method of
    return _dressed(lambda *tensors: block.selective_scan(None, *tensors))


def _transformers() -> Callable:
    install = "'transformers>=5.24,<6'"
    scan = _theirs("transformers.models.mamba.modeling_mamba", "mamba_selective_scan", install)
    return _channels_first(inspect.unwrap(scan))  # unwrapped: plain PyTorch, never a fused kernel


def _accelerated(module: str) -> Callable:
    scan = _theirs(f"accelerated_scan.{module}", "scan", "accelerated-scan==0.3.1")

    def core(x, delta, A, B, C, D):
        x, delta, B, C = (t.transpose(1, 2) for t in (x, delta, B, C))
        A_bar = torch.exp(delta[:, :, None] * A[:, :, None])  # (B, D, N, L)
        Bx_bar = (delta * x)[:, :, None] * B[:, None]
        h = scan(A_bar.flatten(1, 2).contiguous(), Bx_bar.flatten(1, 2).contiguous())
        return ((h.view_as(A_bar) * C[:, None]).sum(2) + D[..., None] * x).transpose(1, 2)

    return _dressed(core)


def _mamba_ssm_cuda() -> Callable:
    module = "mamba_ssm.ops.selective_scan_interface"
    scan = _theirs(module, "selective_scan_fn", SDIST)
    if getattr(sys.modules[module], "selective_scan_cuda", True) is None:
        raise UserError(NO_CUDA_SCAN)
    return _channels_first(scan)


def _mamba_ssm_reference() -> Callable:
    """`selective_scan_ref`, alone: the rest of its module cannot be imported without CUDA."""
    names = {"torch": torch, "F": F, "rearrange": _rearrange}
    return _channels_first(definition(reference_file(), "selective_scan_ref", names))


def definition(path: Path, name: str, names: dict[str, Any]):
    """The class or function `name` of the file, which sees `names` and none of its own imports."""
    with os_errors(f"read {path.name}"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if getattr(node, "name", "") == name]
    exec(compile(tree, path.name, "exec"), names)  # noqa: S102
    return names[name]


def _rearrange(tensor, pattern):
    """The one use of einops on the way that our arguments take."""
    if pattern != "d -> d 1":
        raise NotImplementedError(pattern)
    return tensor[:, None]


def reference_file(folder: Path | None = None, say=print) -> Path:
    """The file with mamba-ssm's reference scan; see `archive_file`."""
    return archive_file(FILE, SHA256, "reference scan", folder, say)


def archive_file(file: str, sha256: str, what: str, folder: Path | None = None, say=print) -> Path:
    """One source file of mamba-ssm: of the installed package, else out of its archive.

    pip brings the archive (0.2 MB), the one file is kept in data/cache. Raises `Unreachable`.
    """
    installed = find_spec("mamba_ssm")
    if installed is not None and installed.origin:
        return Path(installed.origin).parents[1] / file
    folder = folder or CACHE
    target = folder / f"{SDIST.replace('==', '-')}-{Path(file).name}"
    with only_one(folder / "mamba-ssm.lock", say), os_errors(f"write into {folder}"):
        if not target.exists() or hashlib.sha256(target.read_bytes()).hexdigest() != sha256:
            say(f"fetching mamba-ssm's {what} from its source distribution (0.2 MB, once)")
            with tempfile.TemporaryDirectory(dir=folder) as work, atomic_write(target) as part:
                # nothing is built: its set-up is asked not to look for CUDA
                pip_download(
                    SDIST,
                    Path(work),
                    "mamba-ssm",
                    options=["--no-build-isolation"],
                    environment={"MAMBA_SKIP_CUDA_BUILD": "TRUE"},
                )
                part.write_bytes(_member(Path(work), file, sha256, what))
    return target


def _member(work: Path, file: str, sha256: str, what: str) -> bytes:
    """The one file out of the archive in `work`, its bytes proved."""
    try:
        with tarfile.open(next(work.glob("mamba_ssm-*.tar.gz"))) as tar:
            content = tar.extractfile(f"{SDIST.replace('-', '_').replace('==', '-')}/{file}").read(
                1_000_000
            )
    except (
        tarfile.TarError,
        EOFError,
        KeyError,
        AttributeError,
        StopIteration,
        zlib.error,
    ) as error:
        raise Unreachable(f"mamba-ssm's source distribution is damaged or has no {what}") from error
    if hashlib.sha256(content).hexdigest() != sha256:
        raise Unreachable(f"the {what} in mamba-ssm's source distribution has a wrong checksum")
    return content


@dataclass(frozen=True)
class Peer:
    """Somebody else's scan."""

    label: str  # as figures call it
    package: str  # whose version a result records
    devices: tuple[str, ...]  # where it runs
    # wants (B, D, L) in memory; it is given that, so that nobody pays for a copy
    channels_first: bool
    timed: str  # what a timing of it contains
    load: Callable[[], Callable]  # brings the function with our signature, or raises UserError


BOTH, CUDA = ("cpu", "cuda"), ("cuda",)
PEERS = {
    "mambapy": Peer(
        "mambapy",
        "mambapy",
        BOTH,
        False,
        "its MambaBlock.selective_scan (pscan), with bias, softplus and gate around it",
        _mambapy,
    ),
    "transformers": Peer(
        "transformers",
        "transformers",
        BOTH,
        True,
        "its mamba_selective_scan, the path without kernels, a loop over time, alone",
        _transformers,
    ),
    "mamba_ssm_reference": Peer(
        "mamba-ssm reference",
        "mamba-ssm",
        BOTH,
        True,
        "its selective_scan_ref, alone",
        _mamba_ssm_reference,
    ),
    "mamba_ssm_cuda": Peer(
        "mamba-ssm CUDA", "mamba-ssm", CUDA, True, "its selective_scan_fn, alone", _mamba_ssm_cuda
    ),
    **{
        f"accelerated_scan_{kind}": Peer(
            f"accelerated-scan {kind}",
            "accelerated-scan",
            CUDA,
            True,
            "its scan, with what it needs around it: the discretisation before, "
            "C h, D x and gate after",
            lambda module=module: _accelerated(module),
        )
        for kind, module in (("triton", "scalar"), ("warp", "warp"))
    },
}


def load(name: str) -> Callable:
    """The peer as `scan(x, delta, A, B, C, D, z, delta_bias, delta_softplus) -> y`; see `lib.scan`.

    Raises `UserError` that says in one sentence why it cannot be had.
    """
    if name not in PEERS:
        raise UserError(f"peer {name!r} is unknown: choose {', '.join(PEERS)}")
    return PEERS[name].load()


def version_of(name: str) -> str:
    """The version of the peer's package.

    Where it is not installed, that of the one whose reference is fetched.
    """
    try:
        return version(PEERS[name].package)
    except PackageNotFoundError:
        return SDIST.partition("==")[2] if name == "mamba_ssm_reference" else "unknown"
