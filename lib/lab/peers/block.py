"""mamba-ssm's own `Mamba` block, made to run on a CPU: a second opinion on `lib.mamba.MambaMixer`.

Its package cannot be imported without CUDA, so the one class is taken out of its file and given
what it asks for: the reference scan for the kernel, and the few turns of axes that it writes with
einops. Nothing is installed, and nothing is put among Python's modules.
"""

import math
from pathlib import Path
from typing import Optional

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib.lab.peers import scans as peers

FILE = "mamba_ssm/modules/mamba_simple.py"
SHA256 = "a17e4c51b582dc0d4d690a649eba521cd0c1ee3dc8f0473a0967cdc9ec0874e3"  # of that file

TURNS = {  # every pattern on the way from input to output, whole sequence and single step
    "b l d -> d (b l)": lambda t: t.permute(2, 0, 1).flatten(1),
    "d (b l) -> b d l": lambda t, l: t.unflatten(1, (-1, l)).transpose(0, 1),
    "b d l -> (b l) d": lambda t: t.transpose(1, 2).flatten(0, 1),
    "(b l) dstate -> b dstate l": lambda t, l: t.unflatten(0, (-1, l)).transpose(1, 2),
    "b d l -> b l d": lambda t: t.transpose(1, 2),
    "d -> d 1": lambda t: t[:, None],
    "b d -> b d 1": lambda t: t[..., None],
    "d 1 w -> d w": lambda t: t[:, 0],
    "n -> d n": lambda t, d: t.expand(d, -1),
}


def _turn(tensor: Tensor, pattern: str, **sizes: int) -> Tensor:
    """`einops.rearrange` and `einops.repeat`, for the patterns of `TURNS`."""
    return TURNS[pattern](tensor, **sizes)


def block() -> type[nn.Module]:
    """mamba-ssm's class `Mamba`: (B, L, d_model) to (B, L, d_model), and `step`, in plain PyTorch.

    Raises `Unreachable`, in one sentence, where neither the package nor a package index is at hand.
    """
    common = {"torch": torch, "F": F, "rearrange": _turn, "repeat": _turn}
    scan = peers.definition(peers.reference_file(), "selective_scan_ref", dict(common))
    without = dict.fromkeys(
        ("causal_conv1d_fn", "causal_conv1d_update", "selective_state_update", "mamba_inner_fn")
    )
    return peers.definition(
        block_file(),
        "Mamba",
        common
        | without
        | {
            "__name__": __name__,
            "math": math,
            "nn": nn,
            "Tensor": Tensor,
            "Optional": Optional,
            "selective_scan_fn": scan,
        },
    )


def block_file(folder: Path | None = None, say=print) -> Path:
    """The file with the block; see `lib.lab.peers.scans.archive_file`."""
    return peers.archive_file(FILE, SHA256, "block", folder, say)
